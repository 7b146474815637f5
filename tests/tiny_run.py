"""Frames and flags for training runs small enough for tests, which run in the test's own process."""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate.state import AcceleratorState, GradientState

from simipu_hf.data.rows import dataset_from_rows, to_row
from simipu_hf.training.arguments import PreTrainingArguments, parse_arguments
from simipu_hf.training.optimizers import clip_gradients

OVERRIDES = (
    "projection_dim=8,point_config.num_points=[[64],[32],[16,16]],point_config.fps_sample_ranges=[[-1],[-1],[16,-1]],"
    "point_config.radii=[[1.0],[2.0],[4.0]],point_config.num_samples=[[8],[8],[8]],"
    "point_config.mlp_channels=[[[8]],[[8]],[[8]]],point_config.aggregation_channels=[8,8,8]"
)

ENCODER = "random:test_resnet"
# fields of the commands that start from an encoder
FINE_TUNING = {"image_encoder": ENCODER, "per_device_train_batch_size": 2, "logging_steps": 1}
FINE_TUNING |= {"dataloader_num_workers": 0, "report_to": ["none"]}
COMPARISON = {"image_encoders": [f"other={ENCODER}"], "seeds": [3], "batch_size": 2, "num_evaluations": 2}
COMPARISON |= {"device": "cpu", "json": True}


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Made-up rows in scenes of two: images of 96 x 32 pixels, scans of 500 points."""
    generator = np.random.default_rng(seed)
    projection = np.array([[100.0, 0, 48, 0], [0, 100, 16, 0], [0, 0, 1, 0]])
    extrinsics = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    rows = []
    for frame in range(count):
        depth = generator.uniform(3, 40, 500)
        spread = generator.uniform(-1, 1, (2, 500)) * depth * np.array([[0.4], [0.12]])
        points = np.stack([depth, *spread, generator.uniform(0, 1, 500)], axis=1)
        image = generator.integers(0, 255, (32, 96, 3), dtype=np.uint8)
        name, scene = f"frame-{seed}-{frame}", f"scene-{seed}-{frame // 2}"
        rows.append(to_row(name, image, points, projection, extrinsics, scene=scene))
    return rows


def write_frames(folder: Path, **splits: int) -> None:
    """A `save_to_disk` folder with so many made-up rows in each split; ten and six by default."""
    sizes = splits or {"train": 10, "validation": 6}
    rows = {name: dataset_from_rows(make_rows(size, seed)) for seed, (name, size) in enumerate(sizes.items())}
    datasets.DatasetDict(rows).save_to_disk(folder)


def arguments(frames: Path, output_dir: Path, *flags: str) -> PreTrainingArguments:
    """Of a pre-training of eight steps with a tiny model; `flags` come last."""
    defaults = [
        *("--dataset_name", str(frames), "--output_dir", str(output_dir), "--image_encoder", "test_resnet"),
        *("--image_size", "32", "96", "--num_points", "128", "--config_overrides", OVERRIDES, "--report_to", "none"),
        *("--per_device_train_batch_size", "2", "--max_steps", "8", "--logging_steps", "2"),
        *("--checkpointing_steps", "3", "--dataloader_num_workers", "0", "--learning_rate", "0.003"),
    ]
    return parse_arguments(PreTrainingArguments, [*defaults, *flags])


def stopping(step: int, error: Exception | None = None) -> Callable[..., Any]:
    """`clip_gradients` that breaks a run, or asks it to stop, in optimizer step `step`, counted from 1."""
    calls = itertools.count(1)

    def clip(*positional: Any) -> Any:
        if next(calls) == step:
            if error is not None:
                raise error
            os.kill(os.getpid(), signal.SIGTERM)
        return clip_gradients(*positional)

    return clip


def reset_accelerate() -> None:
    """Accelerate keeps its state for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
