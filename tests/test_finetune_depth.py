"""Depth fine-tuning from frames to folder: samples, sources of weights, resume, evaluation, comparison."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from simipu_hf.compare_depth import (
    CompareDepthArguments,
    compare_depth,
    estimate_batch_norm,
    format_table,
    label_subset,
    summarize,
)
from simipu_hf.data.depth_samples import (
    DepthAugmentation,
    DepthDataset,
    DepthFrame,
    DepthPreprocessing,
    default_crop_size,
)
from simipu_hf.data.rows import dataset_from_rows, to_row
from simipu_hf.data.selection import select_frames
from simipu_hf.errors import SimIPUError
from simipu_hf.evaluate_depth import EvaluateDepthArguments, describe_frames, evaluate_depth
from simipu_hf.evaluation.depth import METRICS, depth_picture, evaluate_frames, load_depth_model
from simipu_hf.finetune_depth import DepthArguments, create_depth_model, create_optimization, finetune_depth, fit, main

HEIGHT, WIDTH = 64, 96
ENCODER = "test_resnet"


def make_rows():
    """A slanted plane seen by a camera that looks along the LiDAR's x axis; brightness tells the depth."""
    projection = np.array([[60.0, 0, WIDTH / 2, 0], [0, 60.0, HEIGHT / 2, 0], [0, 0, 1, 0]])
    lidar_to_camera = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)
    for index in range(6):
        rng = np.random.default_rng(index)
        u, v = rng.uniform(0, WIDTH - 1, 1500), rng.uniform(0, HEIGHT - 1, 1500)
        depth = 5 + 10 * index + v / 4
        points = np.stack([depth, -(u - WIDTH / 2) / 60 * depth, -(v - HEIGHT / 2) / 60 * depth, 0 * u], axis=1)
        image = np.full((HEIGHT, WIDTH, 3), 30 * index, dtype=np.uint8)
        yield to_row(f"{index:06d}", image, points, projection, lidar_to_camera)


@pytest.fixture(scope="session")
def frames(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("depth_frames")
    dataset_from_rows(make_rows(), cache_dir=str(folder / "cache")).save_to_disk(folder / "rows")
    return str(folder / "rows")


def depth_arguments(frames, output_dir, **changes) -> DepthArguments:
    fields = {
        "image_encoder": f"random:{ENCODER}",
        "train_frames": [frames],
        "test_frames": [f"{frames}#train:000004,000005"],
        "kb_crop": False,
        "image_size": [32, 64],
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "checkpointing_steps": 2,
        "save_total_limit": 0,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "report_to": ["none"],
        "flip_test": False,
    }
    return DepthArguments(**{**fields, **changes})


# --- samples --------------------------------------------------------------------------------------------------------


def test_frames_are_selected_by_split_and_id(frames, tmp_path):
    assert select_frames([frames])["frame_id"][:2] == ["000000", "000001"]
    rows = select_frames([f"{frames}#train:000003,000001", f"{frames}#:000005"])
    assert list(rows["frame_id"]) == ["000003", "000001", "000005"]
    (tmp_path / "ids.txt").write_text("000002\n000000\n", encoding="utf-8")
    assert list(select_frames([f"{frames}#:@{tmp_path / 'ids.txt'}"])["frame_id"]) == ["000002", "000000"]
    with pytest.raises(SimIPUError, match="'000009'"):
        select_frames([f"{frames}#train:000001,000009"])
    with pytest.raises(SimIPUError, match="twice"):
        select_frames([f"{frames}#train:000001,000001"])


def test_samples_depend_on_seed_epoch_and_row_alone(frames):
    preprocessing = DepthPreprocessing(use_kb_crop=False, image_size=(32, 64))
    augmentation = DepthAugmentation(crop_size=(32, 32))
    first, second = (
        DepthDataset(select_frames([frames]), preprocessing, augmentation, seed=3, keep_frames=keep)
        for keep in (False, True)
    )
    before = second[2]
    for name in ("pixel_values", "labels"):
        assert torch.equal(first[0, 2][name], before[name])
        assert torch.equal(first[1, 2][name], second[1, 2][name])
    assert not torch.equal(first[1, 2]["pixel_values"], second[2, 2]["pixel_values"])


def test_augmentation_moves_image_and_depth_together():
    """Depth is written into the image, so that every known depth can be checked against its pixel."""
    rng = np.random.default_rng(0)
    depth = np.zeros((40, 60), np.float32)
    depth[::3, ::3] = rng.integers(1, 80, depth[::3, ::3].shape)
    image = np.repeat(depth[..., None], 3, axis=2).astype(np.uint8)
    augmentation = DepthAugmentation(rotation=(2.5, 0.0), flip=0.5, crop_size=(30, 32), color=0.0)
    seen = set()
    for seed in range(20):
        moved, target = augmentation(image, depth, np.random.default_rng(seed))
        assert target.shape == (30, 32)
        np.testing.assert_array_equal(moved[..., 0], target)
        seen.add(moved.tobytes())
    assert len(seen) > 15
    rotated = DepthAugmentation(rotation=(2.5, 1.0), flip=0.0, crop_size=None, color=0.0)
    _, target = rotated(image, depth, np.random.default_rng(0))
    assert set(np.unique(target)) <= set(np.unique(depth))  # no depth is mixed with another


def test_published_window_and_its_share_of_small_images():
    assert default_crop_size(None) == (352, 704)
    assert default_crop_size((352, 1216)) == (352, 704)
    assert default_crop_size((96, 320)) == (96, 192)
    assert default_crop_size((32, 32)) == (32, 32)


def test_window_larger_than_the_image_is_named(frames):
    preprocessing = DepthPreprocessing(use_kb_crop=False, image_size=(32, 64))
    dataset = DepthDataset(select_frames([frames]), preprocessing, DepthAugmentation(crop_size=(64, 64)))
    with pytest.raises(SimIPUError, match=r"frame 000000.*64 x 64 is larger than the image 64 x 32"):
        dataset[0]


def test_targets_of_a_frame_are_its_true_depth(frames):
    frame = DepthPreprocessing(use_kb_crop=False).load(select_frames([frames])[2])
    rows, _ = np.nonzero(frame.full_depth)
    known = frame.full_depth[frame.full_depth > 0]
    assert len(known) > 1000
    # the plane at a pixel's row is 25 m + row / 4, a point lies within half a pixel of it
    assert np.abs(known - (25 + rows / 4)).max() <= 0.125 + 1e-4


# --- where the weights come from ------------------------------------------------------------------------------------


def test_same_decoder_whatever_the_encoders_weights(tmp_path, frames):
    scratch, about = create_depth_model(f"random:{ENCODER}", seed=5)
    assert about["description"] == f"timm model {ENCODER} with random weights"
    encoder = timm.create_model(ENCODER, num_classes=0)
    for parameter in encoder.parameters():
        nn.init.uniform_(parameter, -0.1, 0.1)
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    from simipu_hf.hub.export import export_timm

    export_timm(encoder, tmp_path / "encoder")
    loaded, about = create_depth_model(tmp_path / "encoder", seed=5)
    assert "encoder" in about["description"]
    weights = encoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.image_encoder.state_dict().items())
    scratch_decoder = scratch.decoder.state_dict()
    assert all(torch.equal(value, scratch_decoder[name]) for name, value in loaded.decoder.state_dict().items())
    other, _ = create_depth_model(f"random:{ENCODER}", seed=6)
    assert not torch.equal(other.decoder.project.weight, scratch.decoder.project.weight)
    with pytest.raises(SimIPUError):
        create_depth_model(tmp_path / "empty.pth")
    with pytest.raises(SimIPUError, match="no model named"):
        create_depth_model("random:resnet5000")
    with pytest.raises(SimIPUError, match="no such file"):
        create_depth_model(tmp_path / "nothing here")


def test_one_cycle_starts_at_a_25th_and_ends_at_a_2500th():
    model, _ = create_depth_model(f"random:{ENCODER}")
    optimizer, schedule = create_optimization(model, 50, learning_rate=1.0)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1 / 25)
    assert max(rates) == pytest.approx(1.0, abs=1e-3)
    assert rates[-1] < 0.005
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 2500)


# --- the command ----------------------------------------------------------------------------------------------------


def test_resumed_run_is_bit_equal_and_the_folder_evaluates(frames, tmp_path):
    finetune_depth(depth_arguments(frames, tmp_path / "straight"))
    finetune_depth(depth_arguments(frames, tmp_path / "resumed"))
    checkpoint = tmp_path / "resumed" / "checkpoint-2"
    finetune_depth(
        depth_arguments(frames, tmp_path / "resumed", resume_from_checkpoint=str(checkpoint), dataloader_num_workers=1)
    )
    straight, resumed = (load_file(tmp_path / run / "model.safetensors") for run in ("straight", "resumed"))
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("straight", "resumed")
    ]
    assert len(logs[0]) == 4
    assert logs[0] == logs[1]

    saved = json.loads((tmp_path / "straight" / "depth_evaluation.json").read_text())
    assert saved["image_encoder"] == f"timm model {ENCODER} with random weights"
    card = (tmp_path / "straight" / "README.md").read_text(encoding="utf-8")
    assert "depth-estimation" in card
    assert f"{saved['metrics']['abs_rel']:.6g}" in card
    again = evaluate_depth(
        EvaluateDepthArguments(
            model=str(tmp_path / "straight"),
            test_frames=[f"{frames}#train:000004,000005"],
            kb_crop=False,
            flip_test=False,
            output_dir=str(tmp_path / "evaluation"),
            update_card=True,
            device="cpu",
        )
    )
    results = json.loads((tmp_path / "straight" / "eval_results.json").read_text())
    assert len(results) == 1  # the same protocol on the same frames: replaced, not repeated
    for name in METRICS:
        assert saved["metrics"][name] == pytest.approx(again["metrics"][name], rel=1e-5)
    assert len(list((tmp_path / "evaluation" / "pictures").iterdir())) == 2
    with pytest.raises(SimIPUError, match="another configuration"):
        finetune_depth(
            depth_arguments(frames, tmp_path / "resumed", resume_from_checkpoint="latest", learning_rate=0.5)
        )


def test_names_of_frames_hide_folders_and_ids():
    assert describe_frames(["/data/kitti/#train[:50%]:000001,000002", "user/logs"]) == (
        "kitti + logs",
        "train[:50%] + all",
    )
    assert describe_frames(["C:\\data\\kitti#val", "/x/kitti#test"]) == ("kitti", "val + test")


def test_probe_leaves_the_encoder_as_it_was(frames, tmp_path):
    finetune_depth(depth_arguments(frames, tmp_path / "run", freeze_image_encoder=True, max_steps=2))
    trained, _ = load_depth_model(tmp_path / "run")
    start, _ = create_depth_model(f"random:{ENCODER}", seed=0)
    expected = start.image_encoder.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trained.image_encoder.state_dict().items())
    assert not torch.equal(trained.decoder.to_depth.weight, start.decoder.to_depth.weight)


def test_bad_flags_are_one_line_and_exit_code_1(frames, tmp_path, capsys):
    assert main(["--train_frames", frames, "--output_dir", str(tmp_path / "x"), "--no_kb_crop"]) == 1
    assert "--image_size" in capsys.readouterr().err
    assert main(["--output_dir", str(tmp_path / "x")]) == 1
    assert "--train_frames or --train_list" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_fitting_learns_brightness_to_depth(frames):
    preprocessing = DepthPreprocessing(use_kb_crop=False, image_size=(32, 64))
    rows = select_frames([frames])
    loaded = [preprocessing.load(rows[index]) for index in range(len(rows))]
    model, _ = create_depth_model(f"random:{ENCODER}", max_depth=100.0)
    dataset = DepthDataset(loaded, preprocessing, DepthAugmentation(crop_size=(32, 64), color=0.0))
    losses = fit(model, dataset, total_steps=60, batch_size=6, learning_rate=2e-3)
    assert losses[-1] < 0.3 * losses[0]
    result = evaluate_frames(model, loaded, preprocessing, crop="none", max_depth=100.0)
    assert result["num_images"] == 6
    assert math.isfinite(result["metrics"]["abs_rel"])


def test_depth_picture_shows_image_depth_and_error():
    image = np.full((8, 16, 3), 200, np.uint8)
    target = np.zeros((8, 16), np.float32)
    target[2, 3], target[5, 9] = 10.0, 10.0
    prediction = np.full((8, 16), 10.0, np.float32)
    prediction[5, 9] = 40.0
    picture = np.asarray(depth_picture(image, prediction, target, 80.0))
    assert picture.shape == (24, 16, 3)
    assert (picture[:8] == 200).all()
    errors = picture[16:].astype(int)
    assert errors.any(axis=-1).sum() == 2  # only where the truth is known
    assert errors[2, 3].argmax() == 1  # right: green
    assert errors[5, 9].argmax() == 0  # wrong: red
    assert isinstance(Image.fromarray(picture), Image.Image)


# --- the comparison -------------------------------------------------------------------------------------------------


def test_comparison_runs_each_combination_once(frames, tmp_path):
    fields = {
        "image_encoders": [f"other=random:{ENCODER}"],
        "train_frames": [f"{frames}#train:000000,000001,000002,000003"],
        "test_frames": [f"{frames}#train:000004,000005"],
        "output_dir": str(tmp_path),
        "modes": ["full", "frozen"],
        "label_fractions": [0.5, 1.0],
        "seeds": [0, 1],
        "kb_crop": False,
        "image_size": [32, 64],
        "max_steps": 2,
        "batch_size": 2,
        "num_evaluations": 2,
        "device": "cpu",
    }
    result = compare_depth(CompareDepthArguments(**fields))
    assert len(result["runs"]) == 2 * 2 * 2 * 2
    assert len(result["table"]) == 2 * 2 * 2
    of_name = {
        name: [run["metrics"] for run in result["runs"] if run["encoder"] == name] for name in ("scratch", "other")
    }
    assert of_name["scratch"] == of_name["other"]  # both are random weights of the same seeds
    assert [entry["num_frames"] for entry in result["table"] if entry["mode"] == "full"] == [4, 4, 2, 2]
    for file in ("comparison.json", "comparison.md", "comparison.png", "runs.jsonl"):
        assert (tmp_path / file).stat().st_size > 0
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])  # killed while writing
    again = compare_depth(CompareDepthArguments(**fields))
    assert [run["metrics"] for run in again["runs"]] == [run["metrics"] for run in result["runs"]]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(lines)


def test_summary_is_mean_and_sample_deviation():
    def run(encoder, seed, abs_rel):
        metrics = dict.fromkeys(METRICS, 1.0) | {"abs_rel": abs_rel}
        return {
            "encoder": encoder,
            "mode": "full",
            "label_fraction": 1.0,
            "seed": seed,
            "metrics": metrics,
            "num_frames": 9,
        }

    runs = [run("scratch", 0, 0.2), run("scratch", 1, 0.4), run("simipu", 0, 0.1), run("simipu", 1, 0.41)]
    scratch, simipu = summarize(runs)
    assert scratch["mean"]["abs_rel"] == pytest.approx(0.3)
    assert scratch["std"]["abs_rel"] == pytest.approx(math.sqrt(0.02))
    assert simipu["abs_rel_change_percent"] == pytest.approx(100 * (0.255 / 0.3 - 1))
    assert simipu["seeds_better"] == 1
    result = {
        "table": [scratch, simipu],
        "runs": runs,
        "encoders": {"scratch": "random", "simipu": "a run"},
        "num_test_frames": 3,
        "recipe": {"max_steps": 7, "batch_size": 2},
    }
    assert "| all | 9 | simipu | 0.2550 ± 0.2192 |" in format_table(result)
    assert "-15.0 % (better for 1 of 2 seeds)" in format_table(result)


def test_smaller_label_shares_are_part_of_larger_ones():
    frames = [DepthFrame(str(i), np.zeros(0), np.zeros(0), np.zeros(0)) for i in range(10)]
    names = [{frame.frame_id for frame in label_subset(frames, fraction, seed=4)} for fraction in (0.01, 0.3, 0.7, 1)]
    assert [len(subset) for subset in names] == [1, 3, 7, 10]
    assert names[0] < names[1] < names[2] < names[3]


def test_frozen_random_encoder_gets_the_statistics_of_the_frames(frames):
    preprocessing = DepthPreprocessing(use_kb_crop=False, image_size=(32, 64))
    rows = select_frames([frames])
    loaded = [preprocessing.load(rows[index]) for index in range(len(rows))]
    model, _ = create_depth_model("random:resnet18")
    estimate_batch_norm(model, loaded, preprocessing)
    images = torch.stack([preprocessing.normalize(frame.image) for frame in loaded])
    first = model.image_encoder.conv1(images)
    torch.testing.assert_close(model.image_encoder.bn1.running_mean, first.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.image_encoder.bn1.running_var, first.var((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert model.image_encoder.bn1.momentum == 0.1
