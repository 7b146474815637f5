"""The main job in minutes on two cores: data, pre-training, export, loading, a depth probe, and a report to look at.

    simipu-hf demo
    simipu-hf demo --data_dir KITTI

Without a data set it drives through streets generated on the spot. Read `demo` first; every stage is one function.
"""

import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import timm
import torch
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm
from transformers import AutoModel

from simipu_hf.data.depth import DepthFrame
from simipu_hf.data.frames import to_pixel_values
from simipu_hf.data.loading import load_pretraining_dataset
from simipu_hf.data.rows import ROW_FEATURES, dataset_from_rows
from simipu_hf.data.sources import find_source
from simipu_hf.data.synthetic import synthesize_drive
from simipu_hf.errors import SimIPUError, TrainingInterrupted
from simipu_hf.evaluation.depth import evaluate_maps
from simipu_hf.evaluation.linear_probe import fit_linear_depth_probe
from simipu_hf.files import atomic_folder, write_json
from simipu_hf.hub.sources import load_image_encoder
from simipu_hf.modeling.image_encoder import TimmModel
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.pretrain import pretrain
from simipu_hf.training.arguments import PreTrainingArguments, read_config
from simipu_hf.training.logging import METRICS_FILE, read_metrics
from simipu_hf.training.run_folder import versions
from simipu_hf.visualization.figures import draw_depth
from simipu_hf.visualization.frames import visualize
from simipu_hf.visualization.report import write_report
from simipu_hf.visualization.style import save_figure

REPORT, RESULTS = "report.html", "results.json"
DRIVE, FRAMES, RUN, PICTURES = "drive", "frames", "run", "pictures"
VALIDATION_SHARE = 0.2
PRETRAINED, RANDOM = "pretrained", "scratch"  # names of the two encoders of the probe


@dataclass
class DemoSettings:
    """The size of everything; the defaults fit into minutes on two cores."""

    num_frames: int = 200  # in all; a fifth is held out
    image_size: tuple[int, int] = (96, 320)  # height and width that the networks see, and of generated pictures
    image_encoder: str = "resnet18"  # timm name
    num_points: int = 2048  # drawn from each scan, at least 512
    per_device_train_batch_size: int = 4
    max_steps: int = 120


def demo(
    output_dir: str | os.PathLike = "simipu_demo",
    data_dir: str | os.PathLike | None = None,
    seed: int = 0,
    settings: DemoSettings | None = None,
) -> Path:
    """Pre-train a small SimIPU, load its image encoder elsewhere, probe it for depth, and write a report of it all.

    Writes into `output_dir`: `drive/` (the generated data, in KITTI layout), `frames/` (the same as rows, what the
    stages read), `run/` (the pre-training run with its `image_encoder/`), `pictures/`, `results.json` (what every
    stage found), and last `report.html`, one file that needs no other.

    Args:
        output_dir: new or empty.
        data_dir: a KITTI root, or whatever else `load_pretraining_dataset` takes; `None` generates a drive.
        seed: of the drive, of all weights, and of the order of the frames.
        settings: sizes.

    Returns:
        The report.

    Raises:
        SimIPUError: a stage failed, the message says which; no report was written.
        TrainingInterrupted: Ctrl-C or SIGTERM; likewise.
    """
    settings, folder = settings or DemoSettings(), Path(output_dir)
    if data_dir is not None:
        find_source(os.fspath(data_dir), must_be_folder=True)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise SimIPUError(f"--output_dir {folder} exists already: choose another, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    frames, run, pictures = folder / FRAMES, folder / RUN, folder / PICTURES
    stages: dict[str, dict[str, Any]] = {}

    threads = torch.get_num_threads()
    with contextlib.ExitStack() as afterwards:
        # a core less: threads that wait for one that a loading process holds up waste both
        afterwards.callback(torch.set_num_threads, threads)
        torch.set_num_threads(max(1, threads - 1))
        with stage(stages, folder, "data", "Copying frames" if data_dir else "Generating a synthetic drive") as result:
            result |= make_frames(frames, data_dir, settings, seed)
        with stage(stages, folder, "pretraining", "Pre-training on camera + LiDAR pairs, without labels") as result:
            pretrain(pretraining_arguments(frames, run, settings, seed))
            result |= summarize_pretraining(run)
        with stage(stages, folder, "encoder", "Loading the image encoder in plain timm and transformers") as result:
            result |= check_encoder(run, load_rows(frames, "validation")[0])
        with stage(stages, folder, "depth", "Probing the features for depth, against random weights") as result:
            result |= probe_depth(run, frames, pictures / "depth.png", settings, seed)
        with stage(stages, folder, "pictures", "Drawing what was learnt") as result:
            middle = len(load_rows(frames, "validation")) // 2
            drawn = visualize(pictures, model=run, data_dir=frames, split="validation", frames=[middle])
            result |= {"files": [path.relative_to(folder).as_posix() for path in drawn]}
    results = {
        "output_dir": folder.as_posix(),
        "data_dir": None if data_dir is None else os.fspath(data_dir),
        "seed": seed,
        "settings": asdict(settings),
        "versions": versions(),
        "stages": stages,
    }
    write_json(folder / RESULTS, results)
    report = write_report(results, folder / REPORT)
    print(closing_words(results), flush=True)
    return report


@contextlib.contextmanager
def stage(stages: dict[str, dict[str, Any]], folder: Path, name: str, title: str) -> Iterator[dict[str, Any]]:
    """Announces a stage, times it, says which one failed.

    What the block puts into the dictionary becomes the stage's result in `stages`; `message` is printed at its end.
    """
    print(f"[{len(stages) + 1}/5] {title}", flush=True)
    started, result = time.perf_counter(), {"title": title}
    where = f"stage {len(stages) + 1} of 5 ({title[0].lower()}{title[1:]})"
    kept = f"No report was written; {folder} holds what was made so far: delete it to start anew"
    try:
        yield result
    except SimIPUError as error:
        raise SimIPUError(f"{where} failed: {error}. {kept}") from error
    except (TrainingInterrupted, KeyboardInterrupt) as stopped:
        raise TrainingInterrupted(f"stopped in {where}. {kept}", getattr(stopped, "exit_code", 130)) from stopped
    except Exception:
        print(f"{where} failed, with an error that is not yours. {kept}", file=sys.stderr)
        raise
    message = result.pop("message", "")
    stages[name] = result | {"seconds": round(time.perf_counter() - started, 1)}
    print(f"      {stages[name]['seconds']:.0f} s{': ' if message else ''}{message}", flush=True)


def make_frames(
    frames_dir: Path, data_dir: str | os.PathLike | None, settings: DemoSettings, seed: int
) -> dict[str, Any]:
    """Copy the first frames of a data set, of a generated drive where there is none, into `frames_dir`."""
    source = f"the first frames of {data_dir}"
    if data_dir is None:
        source = "synthetic streets in KITTI layout, each with its own light and calibration"
        data_dir = synthesize_drive(
            frames_dir.with_name(DRIVE),
            num_frames=settings.num_frames,
            image_size=settings.image_size,
            seed=seed,
            val_fraction=VALIDATION_SHARE,
            test_fraction=0,
            azimuth_steps=1024,  # half of KITTI's: the pictures are a quarter as wide
        )
    copy_frames(data_dir, frames_dir, settings.num_frames)
    train, held_out = load_rows(frames_dir, "train"), load_rows(frames_dir, "validation")
    width, height = held_out[0]["image"].size
    return {
        "source": source,
        "train_frames": len(train),
        "held_out_frames": len(held_out),
        "image_size": [height, width],
        "points_per_frame": sum(len(points) for points in held_out["points"]) // 16 // len(held_out),
        "message": f"{len(train)} frames to train on, {len(held_out)} held out, {width} x {height} pixels",
    }


def copy_frames(data_dir: str | os.PathLike, frames_dir: Path, num_frames: int) -> None:
    """The first frames of a data set, without reading the others, as a `save_to_disk` folder of two splits.

    Held-out frames come from the validation split. Without one they are the last ones of `train`, and without that the
    last ones of the first split.
    """
    source = os.fspath(data_dir)
    splits = find_source(source).splits
    train, validation = "train", next((name for name in ("validation", "val") if name in splits), None)
    if splits and "train" not in splits:  # others may share frames, as KITTI's trainval and val do
        train, validation = splits[0], None
    held_out = max(1, round(VALIDATION_SHARE * num_frames))
    # beside the folder, not in the cache of datasets, where every demo would leave its frames
    scratch = tempfile.TemporaryDirectory(prefix=f".{FRAMES}-", dir=frames_dir.parent, ignore_cleanup_errors=True)
    with atomic_folder(frames_dir) as beside, scratch as cache:
        if validation is None:
            rows = dataset_from_rows(read_first(source, train, num_frames), cache)
            if len(rows) < 2:
                raise SimIPUError(f"{source}: expected frames to train on and to hold out, found {len(rows)}")
            parts = rows.train_test_split(VALIDATION_SHARE, shuffle=False)
            parts["validation"] = parts.pop("test")
        else:
            counts = {"train": (train, num_frames - held_out), "validation": (validation, held_out)}
            parts = {
                name: dataset_from_rows(read_first(source, split, count), cache)
                for name, (split, count) in counts.items()
            }
        datasets.DatasetDict(parts).save_to_disk(beside)


def read_first(source: str, split: str, count: int) -> Iterator[dict[str, Any]]:
    """The first rows of a split, their images still encoded."""
    stream = load_pretraining_dataset(data_dir=source, split=split, streaming=True)
    rows = stream.select_columns(list(ROW_FEATURES)).cast_column("image", datasets.Image(decode=False))
    yield from tqdm(rows.take(count), total=count, desc=f"{split} frames", unit="frame", leave=False)


def load_rows(frames_dir: Path, split: str) -> datasets.Dataset:
    """A split of the demo's frames."""
    return load_pretraining_dataset(data_dir=frames_dir, split=split)


def pretraining_arguments(frames_dir: Path, run_dir: Path, settings: DemoSettings, seed: int) -> PreTrainingArguments:
    """The recommended recipe on a small model, with the small point encoder of `--config two_cores`."""
    batch_size = settings.per_device_train_batch_size
    return PreTrainingArguments(
        output_dir=str(run_dir),
        data_dir=str(frames_dir),
        train_split="train",
        validation_split="validation",
        image_encoder=settings.image_encoder,
        config_overrides=read_config("two_cores")["config_overrides"],
        image_size=settings.image_size,
        num_points=settings.num_points,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=min(batch_size, len(load_rows(frames_dir, "validation"))),
        max_steps=settings.max_steps,
        seed=seed,
        dataloader_num_workers=1,
        logging_steps=max(1, settings.max_steps // 24),
        eval_steps=math.ceil(settings.max_steps / 2),
        checkpointing_steps=0,
        report_to=["none"],
    )


def summarize_pretraining(run_dir: Path) -> dict[str, Any]:
    """Where the held-out losses and recall ended, each with its chance level."""
    metrics = read_metrics(run_dir / METRICS_FILE)
    last = {name.removeprefix("eval/"): value for name, value in metrics[-1].items() if name.startswith("eval/")}
    losses = [f"{kind}_modal_{value}" for kind in ("intra", "inter") for value in ("loss", "chance")]
    held_out = {name: last.get(name) for name in (*losses, "recall_within_2_cells")}
    loss, chance = held_out["inter_modal_loss"], held_out["inter_modal_chance"]
    return {
        "held_out": held_out,
        "seconds_per_step": next(line["seconds_per_step"] for line in reversed(metrics) if "seconds_per_step" in line),
        "message": f"inter-modal loss {loss:.2f} on held-out frames (random guess {chance:.2f})",
    }


@torch.no_grad()
def check_encoder(run_dir: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Load `image_encoder/` with timm and with transformers, and compare it with the encoder that was trained.

    Raises:
        SimIPUError: weights or features differ.
    """
    folder = run_dir / "image_encoder"
    trained = SimIPUForPreTraining.from_pretrained(run_dir).simipu.image_encoder.eval()
    pyramid = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    wrapped = AutoModel.from_pretrained(folder).eval()

    pixel_values = SimIPUImageProcessor.from_pretrained(run_dir)(row["image"], return_tensors="pt")["pixel_values"]
    expected_maps = trained.forward_intermediates(pixel_values, intermediates_only=True)
    maps = pyramid(pixel_values)
    last = wrapped(pixel_values).last_hidden_state

    weights = trained.state_dict()
    for loader, state in (("timm", pyramid.state_dict()), ("transformers", wrapped.timm_model.state_dict())):
        common = state.keys() & weights.keys()
        different = {name for name in common if not torch.equal(state[name], weights[name])}
        different |= state.keys() ^ weights.keys()
        if different:
            names = ", ".join(sorted(different)[:3])
            raise SimIPUError(f"{folder}: {loader} loaded other weights than were trained: {names}")
    differences = [(a - b).abs().max().item() for a, b in zip(expected_maps, maps, strict=True)]
    difference = max(*differences, (expected_maps[-1] - last).abs().max().item())
    if difference > 1e-5:
        raise SimIPUError(f"{folder}: features differ by up to {difference:.2g} from those of the trained encoder")
    return {
        "path": folder.as_posix(),
        "architecture": trained.pretrained_cfg["architecture"],
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "largest_feature_difference": difference,
        "feature_shapes": [list(feature.shape[1:]) for feature in maps],
        "message": "the weights that were trained, and the same features",
    }


def probe_depth(run_dir: Path, frames_dir: Path, picture: Path, settings: DemoSettings, seed: int) -> dict[str, Any]:
    """Read depth off the frozen features by a linear map, and off those of random weights; test on held-out frames.

    The targets are the LiDAR points in the image. The random encoder's batch norms get the statistics of half of the
    training frames: without, it would be an unfairly weak baseline.
    """
    processor = SimIPUImageProcessor.from_pretrained(run_dir)
    train, test = (
        [DepthFrame.from_row(row, processor) for row in load_rows(frames_dir, split)]
        for split in ("train", "validation")
    )
    torch.manual_seed(seed)
    random = cast("TimmModel", timm.create_model(settings.image_encoder, num_classes=0))
    batches = (to_pixel_values([frame.image for frame in train[i::8]], processor) for i in range(4))
    update_bn(batches, random)
    encoders = {RANDOM: random, PRETRAINED: load_image_encoder(run_dir / "image_encoder", verbose=False)[0]}

    metrics, shown = {}, {"LiDAR, the target": test[len(test) // 2].depth}
    for name, encoder in encoders.items():
        probe = fit_linear_depth_probe(encoder, train, processor, seed=seed)
        maps = [(frame.frame_id, probe.predict(frame, processor), frame.depth) for frame in test]
        metrics[name] = evaluate_maps(maps)["metrics"]
        shown[f"predicted, {'random weights' if name == RANDOM else 'pre-trained'}"] = maps[len(maps) // 2][1]
    middle = test[len(test) // 2]
    save_figure(draw_depth(middle.frame_id, middle.image, shown), picture)
    error, random_error = metrics[PRETRAINED]["abs_rel"], metrics[RANDOM]["abs_rel"]
    change = 100 * (error / random_error - 1)
    return {
        "metrics": metrics,
        "abs_rel_change_percent": change,
        "message": f"AbsRel {error:.3f} pre-trained, {random_error:.3f} random ({change:+.0f} %)",
    }


def closing_words(results: dict[str, Any]) -> str:
    """What was made, where, and what to do next."""
    folder, stages = results["output_dir"], results["stages"]
    encoder, metrics = stages["encoder"]["path"], stages["depth"]["metrics"]
    minutes = sum(stage["seconds"] for stage in stages.values()) / 60
    on_your_data = "" if results["data_dir"] else "\n  simipu-hf demo --data_dir KITTI --output_dir kitti_demo"
    return f"""
Done in {minutes:.1f} minutes. Depth AbsRel on held-out frames, lower is better: {metrics[PRETRAINED]["abs_rel"]:.3f} \
with the pre-trained encoder, {metrics[RANDOM]["abs_rel"]:.3f} with random weights.

  {folder}/{REPORT}   the report: open it in a browser
  {encoder}   the image encoder:
      timm.create_model("local-dir:{encoder}", pretrained=True, features_only=True)
      AutoModel.from_pretrained("{encoder}")
  {folder}/{RESULTS}   the numbers

Next:{on_your_data}
  simipu-hf pretrain --data_dir KITTI --output_dir my_run"""
