"""The benchmarks' structure and agreement figures on tiny inputs; never their times."""

import copy
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from simipu_hf.benchmark import benchmark_data, benchmark_ops, benchmark_step, memory
from simipu_hf.benchmark.inputs import benchmark_rows, sample_keys
from simipu_hf.benchmark.measure import BenchmarkResult, format_table, machine_facts, time_interleaved
from simipu_hf.benchmark.step import IMAGE, OPTIMIZER, POINTS, STEP, Stopwatch
from simipu_hf.data.rows import check_row, dataset_from_rows, to_row
from simipu_hf.errors import SimIPUError
from simipu_hf.grouped_pointnet2 import GroupedPointNet2
from simipu_hf.modeling.configuration_simipu import SimIPUConfig
from simipu_hf.modeling.pointnet2 import PointNet2Encoder

CPU = torch.device("cpu")
TINY = {
    "point_config": {
        "num_points": [[48], [16], [8, 8]],
        "fps_sample_ranges": [[-1], [-1], [16, -1]],
        "radii": [[2.0, 4.0, 8.0], [4.0, 8.0, 16.0], [8.0, 16.0, 32.0]],
        "num_samples": [[4, 4, 8], [4, 4, 8], [4, 4, 4]],
        "mlp_channels": [[[4, 8]] * 3, [[8, 8]] * 3, [[8, 16]] * 3],
        "aggregation_channels": [8, 16, 16],
    },
    "projection_dim": 8,
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Three random frames, as `save_to_disk` leaves them."""
    rng = np.random.default_rng(0)
    projection = np.array([[60.0, 0, 60, 0], [0, 60, 20, 0], [0, 0, 1, 0]])
    lidar_to_camera = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])

    def frame(index):
        points = rng.uniform([2, -10, -2, 0], [40, 10, 0.5, 1], (600, 4))
        return to_row(
            str(index), rng.integers(0, 255, (40, 120, 3), dtype=np.uint8), points, projection, lidar_to_camera
        )

    folder = tmp_path_factory.mktemp("benchmark")
    rows = dataset_from_rows([frame(index) for index in range(3)], folder / "cache")
    rows.save_to_disk(folder / "rows")
    return str(folder / "rows")


@pytest.fixture(scope="module", autouse=True)
def measure_memory_here():
    """In this process, instead of starting one that first imports everything again."""
    measure = memory._measure if (memory.PROCESS / "clear_refs").exists() else lambda *_: {}
    with pytest.MonkeyPatch.context() as patch:
        for module in ("ops", "step"):
            patch.setattr(f"simipu_hf.benchmark.{module}.peak_memories", measure)
        yield


@pytest.fixture(scope="module", params=["official", "recommended"])
def ops(request, data_dir, measure_memory_here):
    return benchmark_ops(
        data_dir=data_dir, preset=request.param, num_points=96, config_overrides=TINY, device="cpu", repeats=1
    )


def test_ops_backends_agree_with_their_definitions(ops):
    measured = [row for row in ops.rows if "seconds" in row]
    assert {row["backend"] for row in measured} >= {"torch", "in turn", "threads", "fast path"}
    for operation in ("furthest_point_sample ", "furthest_point_sample_features", "ball_query", "group_max"):
        assert any(operation in row["part"] for row in measured), operation
    for row in measured:
        assert math.isfinite(row["seconds"])
        assert row["speedup"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
        if row["backend"] not in ("quickfps", "grouped, plain torch"):  # quickfps breaks ties in its own way
            assert row.get("identical", 1) == 1
            assert row.get("difference", 0) < 1e-3


def test_ops_compares_the_whole_encoder(ops):
    fast, grouped = ops.rows[-2:]
    assert (fast["backend"], grouped["backend"]) == ("fast path", "grouped, plain torch")
    assert fast["identical"] == 1
    assert fast["difference"] < 1e-9
    assert ops.summary["encoder_speedup"] == fast["speedup"] == grouped["seconds"] / fast["seconds"]


def test_grouped_definition_runs_in_float64_as_the_encoder_does():
    torch.manual_seed(0)
    config = SimIPUConfig.from_preset("official", point_config=TINY["point_config"]).point_config
    encoder = PointNet2Encoder(config).double()
    grouped = GroupedPointNet2(copy.deepcopy(encoder))
    points = torch.randn(2, 96, 4, dtype=torch.float64) * 5
    expected, found = grouped(points), encoder(points)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.features, expected.features, rtol=1e-9, atol=1e-9)
    for (name, ours), theirs in zip(encoder.state_dict().items(), grouped.encoder.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("preset", "dtype"), [("recommended", "float32"), ("official", "bf16")])
def test_step_times_the_whole_and_its_parts(data_dir, tmp_path, preset, dtype):
    path = tmp_path / "out" / "step.json"
    result = benchmark_step(
        data_dir=data_dir,
        preset=preset,
        dtype=dtype,
        image_encoder="test_resnet",
        image_size=(32, 96),
        num_points=96,
        config_overrides=TINY,
        device="cpu",
        repeats=2,
        json_path=path,
    )
    seconds = {row["part"].strip(): row["seconds"] for row in result.rows}
    assert all(row["peak_bytes"] is None or row["peak_bytes"] >= 0 for row in result.rows[:4])
    assert list(seconds) == [
        IMAGE,
        POINTS,
        STEP,
        OPTIMIZER,
        "point encoder forward",
        "point encoder forward, augmented view",
        "starting the matching",
        "image encoder forward",
        "sampling, inter-modal heads and loss",
        "waiting for the matching",
        "intra-modal head and loss",
        "rest of the forward",
        "backward",
    ]
    assert result.summary["step_over_image_encoder"] == seconds[STEP] / seconds[IMAGE]
    assert json.loads(path.read_text(encoding="utf-8")) == result.to_dict()
    assert not list(path.parent.glob("*.tmp"))
    assert "step over image encoder" in str(result)


def test_data_counts_rows(data_dir):
    result = benchmark_data(
        data_dir=data_dir, image_size=(32, 96), num_points=96, num_rows=4, num_workers=1, repeats=1
    )
    assert [row["part"] for row in result.rows] == [
        "decode the image",
        "decode and resize the image",
        "two-view batches, one worker",
        "loader, 1 worker",
    ]
    for row in result.rows:
        assert row["rows_per_second"] == pytest.approx(1 / row["seconds"])
    assert result.rows[1]["of_decode_and_resize"] == 1


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (benchmark_ops, {"preset": "best"}, "unknown preset 'best'"),
        (benchmark_step, {"dtype": "int8"}, "dtype: expected one of float32"),
        (benchmark_step, {"repeats": 0}, "repeats: expected at least 1, found 0"),
        (benchmark_step, {"image_encoder": "resnet51"}, "no model named 'resnet51'"),
        (benchmark_data, {"num_workers": 0}, "num_workers: expected at least 1, found 0"),
        (benchmark_data, {"image_size": (0, 1)}, "image_size: expected height and width"),
    ],
)
def test_bad_settings_are_named(data_dir, function, arguments, message):
    with pytest.raises(SimIPUError, match=message):
        function(data_dir=data_dir, **arguments)


def test_without_data_the_frames_are_synthetic():
    with benchmark_rows(None, None, 1) as (rows, source):
        assert source == "1 synthetic frame"
        assert isinstance(rows, datasets.Dataset)
        check_row(rows[0])


def test_sample_keys_go_round():
    assert sample_keys([None] * 3, 5) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_time_interleaved_takes_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = time_interleaved(functions, CPU, repeats=2, warmup=1)
    assert calls == list("ababab")
    assert list(timings) == ["a", "b"]


def test_stopwatch_does_not_count_named_calls_twice(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("simipu_hf.benchmark.step.perf_counter", lambda: clock[0])
    watch = Stopwatch(CPU)

    def wait(seconds):
        clock[0] += seconds

    def outer():
        wait(1)
        watch.run("inner", wait, 10)
        watch.run("inner", wait, 20)
        wait(2)

    watch.run("outer", outer)
    assert [timing.seconds for timing in watch.timings["inner"]] == [10, 20]
    assert [timing.seconds for timing in watch.timings["outer"]] == [3]


def memory_functions(megabytes):
    """For `peak_memories`: this module is what it is told to import."""
    held = torch.zeros(megabytes * 2**18)
    return {"temporary": lambda: (held + 1).sum(), "nothing": lambda: held.sum()}


@pytest.mark.skipif(not (memory.PROCESS / "clear_refs").exists(), reason="this system does not tell")
def test_peak_memory_is_what_a_call_needs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    peaks = memory.peak_memories(Path(__file__).stem, {"megabytes": 64}, CPU)
    assert 60 < peaks["temporary"] / 2**20 < 70
    assert peaks["nothing"] < 2**22


def test_table_leaves_blank_what_a_row_lacks():
    rows = [
        {"part": "a", "note": "no", "peak_bytes": None},
        {"part": "bb", "seconds": 0.0125, "peak_bytes": 3 * 2**20},
        {"part": "c", "seconds": 2.5, "peak_bytes": 2 * 2**30},
    ]
    assert format_table(rows).splitlines() == [
        "part           peak      time  note",
        "-----------------------------------",
        "a     not available            no",
        "bb          3.0 MiB  12.50 ms",
        "c          2.00 GiB   2.500 s",
    ]


def test_result_prints_settings_machine_and_summary():
    result = BenchmarkResult("thing", {"image_size": [3, 4]}, [{"part": "a"}], {"ratio": 2.0}, machine_facts(CPU))
    text = str(result)
    assert text.startswith("thing. image size 3 x 4\ncpu ")
    assert text.endswith("ratio 2")
    assert f"torch {torch.__version__.split('+')[0]}" in text
