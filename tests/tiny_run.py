"""Frames and flags for training runs small enough for tests, which run in the test's own process."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate.state import AcceleratorState, GradientState

from simipu_hf.data.rows import dataset_from_rows, to_row

OVERRIDES = (
    "projection_dim=8,point_config.num_points=[[64],[32],[16,16]],point_config.fps_sample_ranges=[[-1],[-1],[16,-1]],"
    "point_config.radii=[[1.0],[2.0],[4.0]],point_config.num_samples=[[8],[8],[8]],"
    "point_config.mlp_channels=[[[8]],[[8]],[[8]]],point_config.aggregation_channels=[8,8,8]"
)


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


def reset_accelerate() -> None:
    """Accelerate keeps its state for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
