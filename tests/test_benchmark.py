"""The benchmarks' structure and agreement figures on tiny inputs; never their times."""

import json
import math

import pytest
import torch
from tiny_run import OVERRIDES, write_frames

from simipu_hf.benchmark import BenchmarkResult, benchmark_data, benchmark_ops, benchmark_step, step
from simipu_hf.benchmark.data import PILLOW_RESIZE, RESIZE, WORKER
from simipu_hf.benchmark.inputs import sample_keys, two_view_dataset
from simipu_hf.benchmark.measure import median_seconds, peak_bytes
from simipu_hf.benchmark.step import BACKWARD, IMAGE, OPTIMIZER, POINTS, STEP, WAITING, create_model
from simipu_hf.data.rows import check_row
from simipu_hf.errors import SimIPUError
from simipu_hf.training.arguments import (
    BenchmarkArguments,
    BenchmarkDataArguments,
    BenchmarkOpsArguments,
    BenchmarkStepArguments,
)

CPU = torch.device("cpu")
SMALL = {"num_points": 96, "config_overrides": OVERRIDES, "device": "cpu", "repeats": 1}


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr("simipu_hf.benchmark.measure.MIN_RUN_TIME", 1e-4)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    write_frames(folder, train=3)
    return str(folder)


def test_ops_measures_every_backend_and_the_whole_encoder(data_dir):
    rows = benchmark_ops(BenchmarkOpsArguments(data_dir=data_dir, **SMALL)).rows
    assert {row["backend"] for row in rows} >= {"torch", "numba", "scipy", "auto"}
    for operation in ("furthest_point_sample ", "furthest_point_sample_features", "ball_query", "group_max"):
        assert any(operation in row["part"] for row in rows), operation
    assert all(math.isfinite(row["seconds"]) and row["speedup"] > 0 for row in rows)
    assert all(row["speedup"] == 1 for row in rows if row["backend"] == "torch")
    assert rows[-1]["part"] == "point encoder"


@pytest.mark.parametrize(
    ("preset", "precision"), [("recommended", "no"), ("official", "bf16"), ("recommended", "fp16")]
)
def test_step_measures_the_whole_and_its_parts(data_dir, preset, precision, monkeypatch):
    models = []
    monkeypatch.setattr(step, "create_model", lambda *given: models.append(create_model(*given)) or models[0])
    result = benchmark_step(
        BenchmarkStepArguments(
            data_dir=data_dir,
            preset=preset,
            mixed_precision=precision,
            image_encoder="test_resnet",
            image_size=(32, 96),
            **SMALL,
        )
    )
    seconds = {row["part"]: row["seconds"] for row in result.rows}
    parts = ["point encoder", "image encoder", WAITING, "heads, sampling and losses", BACKWARD]
    assert list(seconds) == [IMAGE, POINTS, STEP, OPTIMIZER, *parts]
    assert all(seconds[part] >= 0 for part in parts)
    assert min(seconds["point encoder"], seconds["image encoder"], seconds[BACKWARD]) > 0
    assert all(parameter.isfinite().all() for parameter in models[0].parameters())
    assert 0 <= result.summary["share_of_time_waiting"] < 1
    assert json.loads(json.dumps(result.to_dict()))["settings"]["pixel_values"][1] == 3
    assert "step over image encoder" in str(result)


def test_data_counts_rows(data_dir):
    arguments = BenchmarkDataArguments(
        data_dir=data_dir, image_size=(32, 96), num_points=96, num_rows=4, num_workers=1, repeats=1
    )
    rows = {row["part"]: row for row in benchmark_data(arguments).rows}
    assert tuple(rows) == (PILLOW_RESIZE, RESIZE, WORKER, "loader, 1 worker")
    assert rows[PILLOW_RESIZE]["over_pillow_and_resize"] == 1


@pytest.mark.parametrize(
    ("run", "arguments", "settings", "message"),
    [
        (benchmark_step, BenchmarkStepArguments, {"repeats": 0}, "--repeats must be at least 1, found 0"),
        (benchmark_step, BenchmarkStepArguments, {"image_encoder": "resnet51"}, "resnet51"),
        (benchmark_data, BenchmarkDataArguments, {"num_workers": 0}, "--num_workers must be at least 1, found 0"),
        (benchmark_data, BenchmarkDataArguments, {"image_size": (0, 1)}, "image_size"),
    ],
)
def test_bad_settings_are_named(data_dir, run, arguments, settings, message):
    with pytest.raises(SimIPUError, match=message):
        run(arguments(data_dir=data_dir, num_points=96, **settings))


def test_without_data_the_frames_are_synthetic():
    with two_view_dataset(BenchmarkArguments(num_points=256), (32, 96), synthetic_frames=1) as dataset:
        assert len(dataset) == 1
        check_row(dataset.read_row(0))


def test_sample_keys_go_round():
    assert sample_keys([None] * 3, 5) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_functions_take_turns():
    calls = []
    seconds = median_seconds({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2)
    turns = "".join(name for name, before in zip(calls, ["", *calls], strict=False) if name != before)
    assert turns == "abab"
    assert list(seconds) == ["a", "b"]


def test_peak_memory_is_what_a_call_needs():
    held = torch.zeros(64 * 2**18)
    peak = peak_bytes(lambda: (held + 1).sum(), CPU)
    if peak is None:
        pytest.skip("this system does not tell")
    assert 60 < peak / 2**20 < 70
    assert peak_bytes(lambda: held.sum(), CPU) < 2**22


def test_result_prints_settings_machine_table_and_summary():
    rows = [{"part": "a", "note": "no"}, {"part": "bb", "seconds": 0.0125}]
    text = str(BenchmarkResult("thing", {"image_size": [3, 4]}, rows, {"ratio": 2.0}))
    assert text.startswith("thing. image size [3, 4]\ncpu ")
    assert "0.0125" in text
    assert text.endswith("ratio 2")
    assert f"torch {torch.__version__.split('+')[0]}" in text
