"""Comparison of encoders: what is run and reused, the two claims by hand, the depth task."""

import dataclasses
import json
import re
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from depth_rows import make_rows, save_rows
from timm.models import save_for_hf
from tiny_run import COMPARISON, ENCODER

from simipu_hf.compare import (
    Task,
    baseline_of,
    compare,
    describe_claims,
    estimate_batch_norm,
    fingerprint,
    label_subset,
    late_improvement,
    level,
    load_encoders,
    run_settings,
    speed,
    summarize,
)
from simipu_hf.compare_depth import DepthTask, best_constant, compare_depth
from simipu_hf.data.depth import DepthDataset, DepthFrame
from simipu_hf.data.detection import DetectionFrame
from simipu_hf.data.frames import to_pixel_values
from simipu_hf.data.kitti_objects import KittiObjects
from simipu_hf.data.rows import dataset_from_rows
from simipu_hf.errors import SimIPUError
from simipu_hf.finetune_depth import create_processor
from simipu_hf.finetuning import create_model, find_rgb_encoder
from simipu_hf.modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from simipu_hf.training.arguments import CompareArguments, CompareDepthArguments, DepthTaskArguments
from simipu_hf.training.logging import read_metrics


class FakeTask(Task):
    """The value falls from 1 by a rate of the encoder, the seed adds a constant."""

    trainer_class = SimpleNamespace(task="fake")
    shown = ("error", "score")
    higher_is_better = ("score",)

    def __init__(self):
        self.ran, self.test_frames, self.data = [], [None] * 3, {"train": "abc"}
        self.guess = {"name": "nothing", "metrics": {"error": 9.0, "score": 0.0}}

    def __call__(self, arguments):  # for `compare`, which is given a class
        return self

    def run(self, encoder, mode, fraction, seed, picture_dir):
        self.ran.append((mode, fraction, seed))
        if picture_dir is not None:
            self.draw(picture_dir)
        rate = 0.05 if "random" in encoder.description else 0.1
        curve = [{"step": step, "error": 1 - rate * step + 0.01 * seed} for step in (2, 4, 6, 8)]
        metrics = {"error": curve[-1]["error"], "score": 1.0}
        return {"metrics": metrics, "curve": curve, "num_frames": round(100 * fraction)}

    def draw(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "000_frame.png").touch()


@pytest.fixture
def arguments(tmp_path):
    return CompareArguments(
        image_encoders=[f"other={ENCODER}", f"scratch={ENCODER}"],
        train_frames=["x"],
        test_frames=["y"],
        output_dir=str(tmp_path / "comparison"),
        modes=["full", "frozen"],
        label_fractions=[0.5, 1.0],
        seeds=[0, 1],
    )


def test_every_combination_runs_once_and_a_killed_comparison_goes_on(arguments, tmp_path):
    task = FakeTask()
    task.draw(tmp_path / "comparison" / "pictures" / "earlier_full")  # of an encoder that is not compared any more
    (tmp_path / "comparison" / "runs.jsonl").touch()
    result = compare(arguments, task)
    assert len(task.ran) == 2 * 2 * 2 * 2
    assert [entry["num_frames"] for entry in result["table"] if entry["mode"] == "full"] == [100, 100, 50, 50]
    folder = tmp_path / "comparison"
    for file in ("comparison.json", "comparison.md", "comparison.png", "runs.jsonl"):
        assert (folder / file).stat().st_size > 0
    report = (folder / "comparison.md").read_text("utf-8")
    assert re.search(r"!\[000_frame\]\(pictures/\w+/other_frozen/000_frame.png\)", report)
    assert "earlier_full" not in report
    assert "3 of 3 test frames, 400 steps of at most 8 frames, mean" in report
    lines = (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "runs.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:20]]), encoding="utf-8")  # while writing
    again = compare(arguments, task)
    assert len(task.ran) == 17
    assert len(read_metrics(folder / "runs.jsonl")) == 16
    assert [run["metrics"] for run in again["runs"]] == [run["metrics"] for run in result["runs"]]
    arguments.learning_rate = 0.5  # another recipe: nothing is reused
    compare(arguments, task)
    assert len(task.ran) == 33
    task.data = {"train": "xyz"}  # other frames: neither
    compare(arguments, task)
    assert len(task.ran) == 49
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    arguments.output_dir = str(tmp_path / "papers")
    with pytest.raises(SimIPUError, match="holds something else"):
        compare(arguments, task)


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        (["a=x", "a=y"], "expected each NAME once, found a a"),
        (["../a=x"], r"--image_encoders \.\./a=x: expected NAME=SOURCE, a NAME of letters"),
        (["a="], "expected NAME=SOURCE"),
    ],
)
def test_names_of_encoders_are_told_apart_and_fit_for_files(arguments, encoders, message):
    with pytest.raises(SimIPUError, match=message):
        dataclasses.replace(arguments, image_encoders=encoders)


def test_level_is_paired_by_seed():
    claim = level([(0.1, 0.2), (0.41, 0.4)])
    assert claim["percent"] == pytest.approx([-50.0, 2.5])
    assert claim["mean"] == pytest.approx(-23.75)
    assert claim["std"] == pytest.approx(statistics.stdev([-50, 2.5]))
    assert claim["seeds_better"] == 1
    assert level([(0.5, 0.0)], sign=-1) == {"points": [0.5], "mean": 0.5, "std": None, "seeds_better": 1}


def points(*values):
    return [{"step": 10 * (index + 1), "error": value} for index, value in enumerate(values)]


@pytest.mark.parametrize(
    ("curve", "final", "share"),
    [
        (points(0.8, 0.6, 0.4, 0.2), 0.5, 0.625),  # half way between 20 and 30 of 40 steps
        (points(0.8, 0.6, 0.4, 0.2), 0.4, 0.75),
        (points(0.3, 0.2, 0.2, 0.2), 0.4, 0.25),  # at the first evaluation, or before
        (points(0.8, 0.7, 0.6, 0.5), 0.4, None),
    ],
)
def test_speed_is_the_share_of_scratchs_steps_until_its_final_value(curve, final, share):
    assert speed([(curve, {"step": 40, "error": final})], "error")["share"] == [
        pytest.approx(share) if share else None
    ]
    mirrored = [{**point, "error": -point["error"]} for point in curve]  # where higher is better
    claim = speed([(mirrored, {"step": 40, "error": -final})], "error", sign=-1)
    assert claim["share"] == [pytest.approx(share) if share else None]


def test_every_architecture_has_its_scratch(arguments):
    arguments.image_encoders = [f"a={ENCODER}", "b=random:test_resnet", "c=random:test_vit"]
    result = compare(arguments, FakeTask())
    baselines = {entry["encoder"]: entry["baseline"] for entry in result["table"]}
    vit = "scratch-test_vit"
    assert baselines == {"scratch": "scratch", "a": "scratch", "b": "scratch", "c": vit, vit: vit}
    claims = describe_claims(result, FakeTask())
    assert any(claim.startswith("c (") and "SPEED: scratch-test_vit's final error" in claim for claim in claims)
    assert any(claim.startswith("scratch-test_vit (") and "% of the steps" in claim for claim in claims)


def save_encoder(folder, **model_args):
    model = timm.create_model("test_resnet", num_classes=0, **model_args)
    save_for_hf(model, folder, model_args=model_args, safe_serialization=True)


def test_scratch_is_the_same_network(tmp_path):
    save_encoder(tmp_path / "a", output_stride=8)
    encoders = load_encoders([f"a={tmp_path / 'a'}"])
    assert encoders["scratch"].model_args == {"output_stride": 8}
    assert not encoders["scratch"].state_dict
    encoders = load_encoders([f"plain={ENCODER}", f"a={tmp_path / 'a'}"])
    assert list(encoders) == ["scratch", "plain", "a", "scratch-test_resnet-output_stride=8"]
    with pytest.raises(SimIPUError, match="scratch is the name of random weights"):
        load_encoders([f"scratch={tmp_path / 'a'}"])
    vit = ["a=random:test_vit", "b=random:test_vit"]
    encoders = load_encoders(vit)
    encoders["b"].model_args |= {"dynamic_img_size": True, "img_size": [160, 160]}  # as of a run
    assert {baseline_of(encoder, encoders) for encoder in encoders.values()} == {"scratch"}


def test_an_encoder_that_is_fed_otherwise_is_another(arguments, tmp_path):
    save_encoder(tmp_path / "a")
    arguments = dataclasses.replace(arguments, image_encoders=[f"a={tmp_path / 'a'}"], modes=["full"], seeds=[0])
    task = FakeTask()
    compare(arguments, task)
    assert len(task.ran) == 4
    config = json.loads((tmp_path / "a" / "config.json").read_text("utf-8"))
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config), "utf-8")
    compare(arguments, task)
    assert len(task.ran) == 6  # scratch is not run again


def test_scratch_has_converged_when_the_last_quarter_brings_less_than_a_percent():
    def improvement(*values):
        return late_improvement([{"step": s + 1, "values": [v]} for s, v in enumerate(values)])

    late = improvement(0.5, 0.4, 0.3, 0.27)
    assert late == {"late_improvement": pytest.approx(0.1), "late_share": 0.25, "converged": False}
    assert improvement(0.5, 0.4, 0.3, 0.298)["converged"] is True
    rounded_up = late_improvement([{"step": step, "values": [0.3]} for step in (38, 75, 113, 150)])
    assert rounded_up["late_share"] == pytest.approx(37 / 150)
    assert improvement(0.3, 0.2)["late_share"] == 0.5  # no evaluation lies at three quarters
    assert improvement(0.3) == {"late_improvement": None, "late_share": None, "converged": None}


def test_nothing_is_claimed_where_scratch_finds_nothing():
    curve = [{"step": step, "score": 0.0, "values": [0.0, 0.0]} for step in (2, 4)]
    assert late_improvement(curve, sign=-1)["converged"] is None
    assert speed([(curve, curve[-1])], "score", sign=-1)["share"] == [None]


def test_claims_are_told_apart_in_words():
    def run(encoder, seed, *values):
        metrics = {"error": values[-1], "score": 0.0}
        return {"encoder": encoder, "mode": "full", "label_fraction": 1.0, "seed": seed, "metrics": metrics,
                "num_frames": 9, "curve": points(*values), "baseline": "scratch"}  # fmt: skip

    runs = [run("scratch", 0, 0.8, 0.6, 0.5, 0.4), run("scratch", 1, 0.8, 0.6, 0.5, 0.4)]
    runs += [run("simipu", 0, 0.4, 0.4, 0.38, 0.36), run("simipu", 1, 0.6, 0.4, 0.38, 0.38)]
    task = FakeTask()
    table = summarize(runs, task)
    assert table[1]["std"]["error"] == pytest.approx(statistics.stdev([0.36, 0.38]))
    scratch, simipu = describe_claims({"table": table, "guess": task.guess}, task)
    assert "improved by 20.0 % over the last 25 % of the steps, not converged" in scratch
    assert "rule: less than 1%" in scratch
    assert "SPEED: scratch's final error after 38 ± 18 % of its steps (2 of 2 seeds reach it)" in simipu
    assert "LEVEL at the end: -7.5 ± 3.5 % (by seed -10.0, -5.0; better for 2 of 2)" in simipu


def test_a_scratch_no_better_than_a_guess_is_said_to_be_so(arguments):
    task = FakeTask()
    # scratch ends at 0.605, the mean over two seeds
    task.guess = {"name": "0.5 everywhere", "metrics": {"error": 0.605, "score": 0.0}}
    result = compare(arguments, task)
    table = (Path(arguments.output_dir) / "comparison.md").read_text(encoding="utf-8")
    assert "| none | | 0.5 everywhere | 0.6050 | 0.0000 |" in table
    assert table.count("is no better than 0.5 everywhere") == 4  # modes and shares of the labels
    saved = json.loads((Path(arguments.output_dir) / "comparison.json").read_text(encoding="utf-8"))
    assert result["guess"] == saved["guess"] == task.guess
    task.guess["metrics"]["error"] = 0.61
    compare(arguments, task)
    assert "no better than" not in (Path(arguments.output_dir) / "comparison.md").read_text(encoding="utf-8")


def test_smaller_label_shares_are_part_of_larger_ones():
    shares = [set(label_subset(10, fraction, seed=4)) for fraction in (0.01, 0.3, 0.7, 1)]
    assert [len(share) for share in shares] == [1, 3, 7, 10]
    assert shares[0] < shares[1] < shares[2] < shares[3]


# --- depth ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def depth_arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth")
    frames = save_rows(folder)
    return CompareDepthArguments(
        train_frames=[f"{frames}#train"],
        test_frames=[f"{frames}#test:000006"],
        output_dir=str(folder / "comparison"),
        modes=["full", "frozen"],
        kb_crop=False,
        image_size=(32, 64),
        max_steps=3,
        decoder_first=0.4,
        **COMPARISON,
    )


def test_depth_runs_are_the_same_for_the_same_weights_and_seed(depth_arguments):
    result = compare_depth(depth_arguments)
    runs = {(run["encoder"], run["mode"]): run for run in result["runs"]}
    assert runs["scratch", "full"]["metrics"] == runs["other", "full"]["metrics"]  # random weights of the same seed
    assert [point["step"] for point in runs["scratch", "full"]["curve"]] == [2, 3]
    assert runs["scratch", "full"]["curve"][-1]["abs_rel"] == runs["scratch", "full"]["metrics"]["abs_rel"]
    assert runs["scratch", "frozen"]["metrics"] != runs["scratch", "full"]["metrics"]
    saved = json.loads((Path(depth_arguments.output_dir) / "comparison.json").read_text(encoding="utf-8"))
    assert saved["table"][1]["level"]["percent"] == [0.0]


def test_the_guess_of_depth_is_the_best_constant(depth_arguments):
    rng = np.random.default_rng(0)
    targets = [rng.uniform(2, 30, 300), rng.uniform(10, 60, 20), np.zeros(0)]

    def error(depth):
        return np.mean([np.mean(np.abs(depth - target) / target) for target in targets if target.size])

    best = best_constant(targets)
    assert error(best) <= min(map(error, np.linspace(2, 60, 5801))) + 1e-12
    with pytest.raises(SimIPUError, match="expected pixels with a depth that counts in the evaluation, found none"):
        best_constant(targets[2:])
    task = DepthTask(depth_arguments)  # the test frame is a plane 65 m away and more
    depth = float(task.guess["name"].removesuffix(" m everywhere"))
    assert task.guess["metrics"]["abs_rel"] == pytest.approx(1 - depth / 75, abs=0.1)
    assert task.guess["metrics"]["a1"] == 0


def test_runs_on_other_frames_are_not_reused_and_kept_whatever_their_pictures(depth_arguments, tmp_path):
    rows = save_rows(tmp_path, range(4), [10, 11, 6])  # the first two to test on are farther than 80 m
    arguments = dataclasses.replace(
        depth_arguments,
        image_encoders=[f"scratch={ENCODER}"],
        train_frames=[f"{rows}#train:@{tmp_path / 'ids.txt'}"],
        test_frames=[f"{rows}#test"],
        output_dir=str(tmp_path / "comparison"),
        modes=["full"],
        max_steps=1,
        num_evaluations=1,
    )
    report = tmp_path / "comparison" / "comparison.md"
    of_first = None
    for ids in (["000000", "000001"], ["000000", "000002", "000003"]):
        (tmp_path / "ids.txt").write_text("\n".join(ids), encoding="utf-8")
        (run,) = compare_depth(arguments)["runs"]
        assert run["num_frames"] == len(ids)
        assert "\n1 of 3 test frames, " in report.read_text("utf-8")
        of_first = of_first or report.read_text("utf-8")
    shutil.move(rows, tmp_path / "moved")  # the same frames somewhere else: reused
    arguments.train_frames = [f"{tmp_path / 'moved'}#train:@{tmp_path / 'ids.txt'}"]
    arguments.test_frames = [f"{tmp_path / 'moved'}#test"]
    assert compare_depth(arguments)["runs"] == [run]
    assert len(read_metrics(tmp_path / "comparison" / "runs.jsonl")) == 2
    shown = re.findall(r"\((.*scratch_full/(.*))\)", report.read_text("utf-8"))
    assert [name for _, name in shown] == ["000_000010.png", "001_000011.png"]
    assert all((report.parent / path).is_file() for path, _ in shown)
    (tmp_path / "ids.txt").write_text("000000\n000001", encoding="utf-8")
    compare_depth(arguments)  # the run of before with its own pictures
    assert re.findall(r"pictures.*png", report.read_text("utf-8")) == re.findall(r"pictures.*png", of_first)
    assert not {path for path, _ in shown} & set(re.findall(r"pictures.*png", of_first))


def test_frames_are_told_apart_by_what_they_hold():
    frame = DepthFrame("a", np.zeros((2, 3, 3), np.uint8), np.ones((2, 3)), np.ones((4, 6)), (0, 0, 2, 3))
    labels = KittiObjects.from_row([])
    detection = DetectionFrame("a", frame.image, np.eye(3, 4), labels)
    others = [dataclasses.replace(frame, **{name: getattr(frame, name) + 1}) for name in ("image", "target", "depth")]
    others += [dataclasses.replace(frame, frame_id="b"), detection]
    others += [dataclasses.replace(detection, objects=dataclasses.replace(labels, bbox=np.ones((1, 4))))]
    assert len({fingerprint([one]) for one in (frame, *others)}) == 1 + len(others)
    assert fingerprint([frame]) == fingerprint([dataclasses.replace(frame, image=frame.image.copy())])


def test_runs_are_trained_in_the_precision_that_is_asked_for(depth_arguments, monkeypatch):
    task = DepthTask(dataclasses.replace(depth_arguments, mixed_precision="bf16", max_steps=1, num_evaluations=1))
    parts, precisions = task.parts, set()

    def hooked(*args):
        found = parts(*args)
        stem = found["model"].image_encoder.conv1[0]
        stem.register_forward_hook(lambda stem, _, output: precisions.add((stem.training, output.dtype)))
        return found

    monkeypatch.setattr(task, "parts", hooked)
    task.run(find_rgb_encoder(ENCODER), "full", 1.0, 0)
    assert precisions == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_depth_frames_on_both_sides_are_refused(depth_arguments, tmp_path):
    dataset_from_rows(make_rows(range(2, 9), prefix="x"), cache_dir=str(tmp_path)).save_to_disk(tmp_path / "rows")
    shared = SimpleNamespace(**{**vars(depth_arguments), "test_frames": [str(tmp_path / "rows")]})
    with pytest.raises(SimIPUError, match=r"4 of 7 frames are also trained on.*'x000002'"):
        DepthTask(shared)


def test_a_folder_of_another_task_is_refused_before_frames_are_read(depth_arguments, tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"task": "detection"}\n', encoding="utf-8")
    missing = [str(tmp_path / "missing")]
    arguments = dataclasses.replace(depth_arguments, train_frames=missing, output_dir=str(tmp_path))
    with pytest.raises(SimIPUError, match=r"runs\.jsonl: expected runs of depth, found runs of detection"):
        compare_depth(arguments)


def test_a_device_that_the_trainer_would_not_take_is_refused(depth_arguments, tmp_path, monkeypatch):
    with pytest.raises(SimIPUError, match=r"--device 'cuda:7': choose from cpu, cuda"):
        dataclasses.replace(depth_arguments, device="cuda:7")
    monkeypatch.setattr("torch.zeros", Mock(side_effect=AssertionError("Torch not compiled with CUDA enabled")))
    with pytest.raises(SimIPUError, match=r"--device cuda: Torch not compiled"):
        run_settings(dataclasses.replace(depth_arguments, device="cuda"), str(tmp_path), num_frames=2, seed=0)


# of MobileNetV4, a norm behind the pooling would see a single value of a single frame
@pytest.mark.parametrize(
    ("architecture", "stem", "frames"), [("resnet18", "conv1", 6), ("mobilenetv4_conv_small_035", "conv_stem", 1)]
)
def test_frozen_random_encoder_gets_the_statistics_of_the_frames(architecture, stem, frames):
    processor = create_processor(DepthTaskArguments(kb_crop=False, image_size=(32, 64)))
    dataset = DepthDataset(list(make_rows(range(frames))), processor)
    model = create_model(SimIPUForDepthEstimation, find_rgb_encoder(f"random:{architecture}")).eval()
    estimate_batch_norm(model, dataset)
    assert not model.image_encoder.training
    images = [frame.image for frame in dataset.usable_frames()]
    first = model.image_encoder.get_submodule(stem)(to_pixel_values(images, processor))
    torch.testing.assert_close(model.image_encoder.bn1.running_mean, first.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.image_encoder.bn1.running_var, first.var((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert model.image_encoder.bn1.momentum == 0.1
