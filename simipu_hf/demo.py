"""The main job in minutes on two cores: data, pre-training, export, loading, a depth probe, and a report to look at.

    simipu-hf demo
    simipu-hf demo --data_dir KITTI

Without a data set it drives through streets generated on the spot. Read `demo` first; every stage is one function.
"""

import contextlib
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import AutoModel

from simipu_hf.compare_depth import estimate_batch_norm, load_encoders
from simipu_hf.data.depth_samples import DepthFrame, DepthPreprocessing
from simipu_hf.data.depth_targets import KB_CROP
from simipu_hf.data.loading import load_pretraining_dataset
from simipu_hf.data.rows import ROW_FEATURES, dataset_from_rows
from simipu_hf.data.sources import find_source
from simipu_hf.data.synthetic import synthesize_drive
from simipu_hf.errors import SimIPUError
from simipu_hf.evaluation.depth import evaluate_maps, write_json
from simipu_hf.evaluation.linear_probe import fit_linear_depth_probe
from simipu_hf.finetune_depth import build_depth_model
from simipu_hf.hub.files import written_aside
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.pretrain import pretrain
from simipu_hf.report import write_report
from simipu_hf.training.command import TrainingInterrupted
from simipu_hf.training.legacy_arguments import DataArguments, ModelArguments, PreTrainingArguments, TrainingArguments
from simipu_hf.training.metrics import METRICS_FILE, read_metrics
from simipu_hf.training.run_folder import versions
from simipu_hf.visualization import save_figure, visualize
from simipu_hf.visualization.style import (
    DEPTH_TICKS,
    add_colorbar,
    depth_colormap,
    depth_norm,
    new_figure,
    style_axes,
)

REPORT, RESULTS = "report.html", "results.json"
DRIVE, FRAMES, RUN, PICTURES = "drive", "frames", "run", "pictures"
VALIDATION_SHARE = 0.2
PRETRAINED, RANDOM = "pretrained", "scratch"  # names of the two encoders of the probe

# A PointNet++ of the same three levels as the default, with a quarter of the points and half the width.
SMALL_POINT_ENCODER = (
    "point_config.num_points=[[1024],[256],[128,128]],"
    "point_config.fps_sample_ranges=[[-1],[-1],[128,-1]],"
    "point_config.num_samples=[[16,16,32],[16,16,32],[16,16,16]],"
    "point_config.mlp_channels=[[[16,16,32],[16,16,32],[32,32,64]],[[32,32,64],[32,32,64],[64,64,128]],"
    "[[64,64,128],[64,64,128],[128,128,256]]],"
    "point_config.aggregation_channels=[64,128,256]"
)


@dataclass
class DemoSettings:
    """The size of everything; the defaults fit into minutes on two cores.

    Args:
        num_frames: frames in all; a fifth is held out.
        image_size: height and width of the pictures the networks see, and of the generated ones.
        image_encoder: timm name.
        num_points: points drawn from each scan, at least 1024.
        per_device_train_batch_size: rows per step of pre-training.
        max_steps: optimizer steps of pre-training.
    """

    num_frames: int = 200
    image_size: tuple[int, int] = (96, 320)
    image_encoder: str = "resnet18"
    num_points: int = 4096
    per_device_train_batch_size: int = 4
    max_steps: int = 120


def demo(
    output_dir: str | os.PathLike = "simipu_demo",
    data_dir: str | os.PathLike | None = None,
    seed: int = 0,
    overwrite_output_dir: bool = False,
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
        overwrite_output_dir: delete what an earlier demo left in `output_dir`.
        settings: sizes.

    Returns:
        The report.

    Raises:
        SimIPUError: a stage failed, the message says which; no report was written.
        TrainingInterrupted: Ctrl-C or SIGTERM; likewise.
    """
    settings = settings or DemoSettings()
    output_dir = Path(output_dir)
    prepare_output_dir(output_dir, data_dir, overwrite_output_dir)
    with a_core_for_loading():
        results = run_stages(output_dir, data_dir, seed, settings)
    print(closing_words(results), flush=True)
    return output_dir / REPORT


def run_stages(
    output_dir: Path, data_dir: str | os.PathLike | None, seed: int, settings: DemoSettings
) -> dict[str, Any]:
    """All stages, in a folder that is empty; returns what `results.json` holds."""
    stages = Stages(output_dir, total=6)
    frames_dir, run_dir, pictures_dir = output_dir / FRAMES, output_dir / RUN, output_dir / PICTURES

    with stages.stage("data", "Copying frames" if data_dir else "Generating a synthetic drive") as result:
        result |= make_frames(frames_dir, data_dir, settings, seed)
    with stages.stage("pretraining", "Pre-training on camera + LiDAR pairs, without labels") as result:
        pretrain(pretraining_arguments(frames_dir, run_dir, settings, seed))
        result |= summarize_pretraining(run_dir, settings)
    with stages.stage("encoder", "Loading the image encoder with plain timm and plain transformers") as result:
        result |= check_encoder(run_dir, load_rows(frames_dir, "validation")[0])
    with stages.stage("depth", "Probing the features for depth, against random weights") as result:
        result |= probe_depth(run_dir, frames_dir, pictures_dir / "depth.png", settings, seed)
    with stages.stage("pictures", "Drawing what was learnt") as result:
        held_out = len(load_rows(frames_dir, "validation")) // 2
        drawn = visualize(pictures_dir, model=run_dir, data_dir=frames_dir, split="validation", frames=(held_out,))
        result |= {"files": [path.relative_to(output_dir).as_posix() for path in drawn]}
    with stages.stage("report", "Writing the report"):
        results = {
            "output_dir": output_dir.as_posix(),
            "data_dir": None if data_dir is None else os.fspath(data_dir),
            "seed": seed,
            "settings": vars(settings),
            "versions": versions(),
            "stages": {name: result for name, result in stages.results.items() if "seconds" in result},  # not this one
        }
        write_json(output_dir / RESULTS, results)
        write_report(results, output_dir / REPORT)
    return results


@contextlib.contextmanager
def a_core_for_loading() -> Iterator[None]:
    """Keeps PyTorch off one processor: threads that wait for one that a loading process holds up waste both."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stages:
    """Announces the stages, times them, and says which one failed.

    Attributes:
        results: per stage `title`, `seconds`, and what it found.
    """

    def __init__(self, output_dir: Path, total: int):
        self.output_dir = output_dir
        self.total = total
        self.results: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def stage(self, name: str, title: str) -> Iterator[dict[str, Any]]:
        """A stage; what it puts into the dictionary is its result, and `message` is printed at its end."""
        number = len(self.results) + 1
        print(f"[{number}/{self.total}] {title}", flush=True)
        started = time.perf_counter()
        result = self.results[name] = {"title": title}
        where = f"stage {number} of {self.total} ({title[0].lower()}{title[1:]})"
        kept = (
            f"No report was written; {self.output_dir} holds what was made so far, --overwrite_output_dir starts anew"
        )
        try:
            yield result
        except SimIPUError as error:
            raise SimIPUError(f"{where} failed: {error}. {kept}") from error
        except TrainingInterrupted as stopped:
            raise TrainingInterrupted(f"stopped in {where}. {kept}", stopped.exit_code) from stopped
        except KeyboardInterrupt as stopped:
            raise TrainingInterrupted(f"stopped in {where}. {kept}", 130) from stopped
        except Exception:
            print(f"{where} failed, with an error that is not yours. {kept}", file=sys.stderr)
            raise
        result["seconds"] = round(time.perf_counter() - started, 1)
        message = result.pop("message", "")
        print(f"      {result['seconds']:.0f} s{': ' if message else ''}{message}", flush=True)


def prepare_output_dir(output_dir: Path, data_dir: str | os.PathLike | None, overwrite: bool) -> None:
    """Create the folder, or empty it if it holds a demo and may be overwritten.

    Raises:
        SimIPUError: `data_dir` cannot be read, or the folder is in use by something else.
    """
    if data_dir is not None:
        find_source(os.fspath(data_dir), None, must_be_folder=True)
        if output_dir.resolve() in (Path(data_dir).resolve(), *Path(data_dir).resolve().parents):
            raise SimIPUError(f"--data_dir {data_dir} lies in --output_dir {output_dir}: choose another output folder")
    if output_dir.exists() and not output_dir.is_dir():
        raise SimIPUError(f"--output_dir {output_dir} is a file")
    found = sorted(output_dir.iterdir()) if output_dir.exists() else []
    if found and not overwrite:
        raise SimIPUError(
            f"--output_dir {output_dir} is not empty: choose another folder, or replace an earlier demo in it with "
            "--overwrite_output_dir"
        )
    ours = (DRIVE, FRAMES, RUN, PICTURES, REPORT, RESULTS)
    # a stage that was killed may have left a hidden file beside what it was writing
    strangers = [
        path.name for path in found if path.name not in ours and not path.name.startswith(tuple("." + n for n in ours))
    ]
    if strangers:
        raise SimIPUError(
            f"--overwrite_output_dir: {output_dir} holds more than a demo ({', '.join(strangers[:3])}), so nothing "
            "in it was deleted; choose another folder"
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SimIPUError(f"--output_dir {output_dir} cannot be created ({error})") from error


def make_frames(
    frames_dir: Path, data_dir: str | os.PathLike | None, settings: DemoSettings, seed: int
) -> dict[str, Any]:
    """Copy the first frames of a data set, of a generated drive where there is none, into `frames_dir`."""
    if data_dir is None:
        data_dir = synthesize_drive(
            frames_dir.with_name(DRIVE),
            num_frames=settings.num_frames,
            image_size=settings.image_size,
            seed=seed,
            val_fraction=VALIDATION_SHARE,
            test_fraction=0,
            frames_per_drive=10,
            azimuth_steps=1024,  # half of KITTI's: the pictures are a quarter as wide
        )
        source = "synthetic streets in KITTI layout, each with its own light and calibration"
    else:
        source = f"the first frames of {os.fspath(data_dir)}"
    copy_frames(data_dir, frames_dir, settings.num_frames)
    train, held_out = load_rows(frames_dir, "train"), load_rows(frames_dir, "validation")
    width, height = held_out[0]["image"].size
    return {
        "source": source,
        "train_frames": len(train),
        "held_out_frames": len(held_out),
        "image_size": [height, width],
        "points_per_scan": len(held_out[0]["points"]) // 16,
        "message": f"{len(train)} frames to train on, {len(held_out)} held out, {width} x {height} pixels",
    }


def copy_frames(data_dir: str | os.PathLike, frames_dir: Path, num_frames: int) -> None:
    """The first frames of a data set, without reading the others, as a `save_to_disk` folder of two splits.

    Held-out frames come from the validation split, or are the last ones where there is none.
    """
    source = os.fspath(data_dir)
    splits = find_source(source).splits
    train = splits[0] if splits and "train" not in splits else "train"
    validation = next((name for name in ("validation", "val") if name in splits), None)
    held_out = max(1, round(VALIDATION_SHARE * num_frames))
    # beside the folder, not in the cache of datasets, where every demo would leave its frames
    with (
        written_aside(frames_dir) as aside,
        tempfile.TemporaryDirectory(
            prefix=f".{FRAMES}-", dir=frames_dir.parent, ignore_cleanup_errors=True
        ) as scratch,
    ):
        if validation is None:
            rows = dataset_from_rows(read_first(source, train, num_frames), scratch)
            if len(rows) < 2:
                raise SimIPUError(f"{source}: expected frames to train on and to hold out, found {len(rows)}")
            parts = rows.train_test_split(VALIDATION_SHARE, shuffle=False)
            parts = {"train": parts["train"], "validation": parts["test"]}
        else:
            parts = {
                "train": dataset_from_rows(read_first(source, train, num_frames - held_out), scratch),
                "validation": dataset_from_rows(read_first(source, validation, held_out), scratch),
            }
        datasets.DatasetDict(parts).save_to_disk(aside)


def read_first(source: str, split: str, count: int) -> Iterator[dict[str, Any]]:
    """The first rows of a split, their images still encoded."""
    stream = load_pretraining_dataset(data_dir=source, split=split, streaming=True)
    rows = stream.select_columns(list(ROW_FEATURES)).cast_column("image", datasets.Image(decode=False))
    yield from tqdm(rows.take(count), total=count, desc=f"{split} frames", unit="frame", leave=False)


def load_rows(frames_dir: Path, split: str) -> datasets.Dataset:
    """A split of the demo's frames."""
    return load_pretraining_dataset(data_dir=frames_dir, split=split)


def pretraining_arguments(frames_dir: Path, run_dir: Path, settings: DemoSettings, seed: int) -> PreTrainingArguments:
    """The recommended recipe on a small model."""
    return PreTrainingArguments(
        model=ModelArguments(image_encoder=settings.image_encoder, config_overrides=SMALL_POINT_ENCODER),
        data=DataArguments(
            data_dir=str(frames_dir),
            train_split="train",
            validation_split="validation",
            image_size=list(settings.image_size),
            num_points=settings.num_points,
        ),
        training=TrainingArguments(
            output_dir=str(run_dir),
            per_device_train_batch_size=settings.per_device_train_batch_size,
            per_device_eval_batch_size=min(
                settings.per_device_train_batch_size, len(load_rows(frames_dir, "validation"))
            ),
            max_steps=settings.max_steps,
            seed=seed,
            dataloader_num_workers=1,
            logging_steps=max(1, settings.max_steps // 24),
            eval_steps=math.ceil(settings.max_steps / 2),
            checkpointing_steps=0,
            report_to=["none"],
        ),
    )


def summarize_pretraining(run_dir: Path, settings: DemoSettings) -> dict[str, Any]:
    """Where the held-out losses and recall ended, each with its chance level."""
    metrics = read_metrics(run_dir / METRICS_FILE)
    last = {name.removeprefix("eval/"): value for name, value in metrics[-1].items() if name.startswith("eval/")}
    names = (
        "intra_modal_loss",
        "intra_modal_chance",
        "inter_modal_loss",
        "inter_modal_chance",
        "recall_within_2_cells",
    )
    result = {
        "steps": settings.max_steps,
        "rows_per_step": settings.per_device_train_batch_size,
        "held_out": {name: last.get(name) for name in names},
        "seconds_per_step": next(line["seconds_per_step"] for line in reversed(metrics) if "seconds_per_step" in line),
    }
    loss, chance = result["held_out"]["inter_modal_loss"], result["held_out"]["inter_modal_chance"]
    return result | {"message": f"inter-modal loss {loss:.2f} on held-out frames (chance {chance:.2f})"}


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
        different = sorted(
            (state.keys() ^ weights.keys()) | {name for name in common if not torch.equal(state[name], weights[name])}
        )
        if different:
            raise SimIPUError(f"{folder}: {loader} loaded other weights than were trained: {', '.join(different[:3])}")
    differences = [(a - b).abs().max().item() for a, b in zip(expected_maps, maps, strict=True)]
    difference = max(*differences, (expected_maps[-1] - last).abs().max().item())
    if difference > 1e-5:
        raise SimIPUError(f"{folder}: features differ by up to {difference:.2g} from those of the trained encoder")
    return {
        "path": folder.as_posix(),
        "architecture": trained.pretrained_cfg["architecture"],
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "weights_equal": True,
        "largest_feature_difference": difference,
        "feature_shapes": [list(feature.shape[1:]) for feature in maps],
        "message": "the weights that were trained, and the same features",
    }


def probe_depth(run_dir: Path, frames_dir: Path, picture: Path, settings: DemoSettings, seed: int) -> dict[str, Any]:
    """Read depth off the frozen features by a linear map, and off those of random weights; test on held-out frames.

    The targets are the LiDAR points in the image. The random encoder's batch norms get the statistics of the training
    frames: without, it would be an unfairly weak baseline.
    """
    encoders = load_encoders([f"{PRETRAINED}={run_dir / 'image_encoder'}"])
    train_rows, test_rows = load_rows(frames_dir, "train"), load_rows(frames_dir, "validation")
    first = test_rows[0]["image"]
    kb_crop = first.height >= KB_CROP[0] and first.width >= KB_CROP[1]
    about = encoders[-1].about
    preprocessing = DepthPreprocessing(kb_crop, settings.image_size, about["image_mean"], about["image_std"])
    train, test = ([preprocessing.load(row) for row in rows] for rows in (train_rows, test_rows))

    metrics, predictions = {}, {}
    for encoder in tqdm(encoders, desc="encoders", unit="encoder"):
        model = build_depth_model(encoder.image_fields, encoder.weights, seed)
        if encoder.weights is None:
            estimate_batch_norm(model, train[::4], preprocessing)
        probe = fit_linear_depth_probe(model.image_encoder, train, preprocessing, seed=seed)
        maps = [(frame.frame_id, probe.predict(frame, preprocessing), frame.full_depth) for frame in test]
        metrics[encoder.name] = evaluate_maps(maps)["metrics"]
        predictions[encoder.name] = maps[len(maps) // 2][1]
    shown = {"random weights": predictions[RANDOM], "pre-trained": predictions[PRETRAINED]}
    save_figure(draw_depth(test[len(test) // 2], shown), picture)
    change = 100 * (metrics[PRETRAINED]["abs_rel"] / metrics[RANDOM]["abs_rel"] - 1)
    return {
        "train_frames": len(train),
        "test_frames": len(test),
        "metrics": metrics,
        "abs_rel_change_percent": change,
        "message": f"AbsRel {metrics[PRETRAINED]['abs_rel']:.3f} pre-trained, {metrics[RANDOM]['abs_rel']:.3f} random "
        f"({change:+.0f} %)",
    }


def draw_depth(frame: DepthFrame, predictions: dict[str, np.ndarray]) -> Figure:
    """The image, its LiDAR depth, and predictions, all on one scale in metres."""
    height, width = frame.full_depth.shape
    figure = new_figure(12.5, 2 * 5.75 * height / width + 0.9)  # each panel is about 5.75 inches wide
    panels = list(figure.subplots(2, 2).flat)
    style_axes(panels[0], f"{frame.frame_id}: image").imshow(frame.image, extent=(0, width, height, 0))
    known = np.ma.masked_equal(frame.full_depth, 0)
    maps = {"LiDAR, the target": known, **{f"predicted, {name}": depth for name, depth in predictions.items()}}
    for axes, (title, depth) in zip(panels[1:], maps.items(), strict=True):
        drawn = style_axes(axes, title).imshow(
            depth, cmap=depth_colormap(), norm=depth_norm(), interpolation="nearest"
        )
    for axes in panels:
        axes.set(xticks=[], yticks=[])
    bar = add_colorbar(figure, drawn, panels, "depth (m)", ticks=DEPTH_TICKS, extend="both", aspect=30)
    bar.ax.minorticks_off()
    bar.set_ticklabels([str(tick) for tick in DEPTH_TICKS])
    return figure


def closing_words(results: dict[str, Any]) -> str:
    """What was made, where, and what to do next."""
    folder, stages = results["output_dir"], results["stages"]
    encoder = stages["encoder"]["path"]
    seconds = sum(stage["seconds"] for stage in stages.values())
    metrics = stages["depth"]["metrics"]
    return "\n".join(
        [
            "",
            f"Done in {seconds / 60:.1f} minutes. Depth AbsRel on held-out frames, lower is better: "
            f"{metrics[PRETRAINED]['abs_rel']:.3f} with the pre-trained encoder, {metrics[RANDOM]['abs_rel']:.3f} "
            "with random weights.",
            "",
            f"  {folder}/{REPORT}   the report: open it in a browser",
            f"  {encoder}   the image encoder:",
            f'      timm.create_model("local-dir:{encoder}", pretrained=True, features_only=True)',
            f'      AutoModel.from_pretrained("{encoder}")',
            f"  {folder}/{RESULTS}   the numbers",
            "",
            "Next:",
            *(["  simipu-hf demo --data_dir KITTI --output_dir kitti_demo"] if results["data_dir"] is None else []),
            "  simipu-hf pretrain --data_dir KITTI --output_dir my_run",
        ]
    )
