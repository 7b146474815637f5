"""Rows with depth for tests: a slanted plane seen by a camera that looks along the LiDAR's x axis."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from simipu_hf.data.rows import dataset_from_rows, to_row

HEIGHT, WIDTH, FOCAL = 64, 96, 60.0
# LiDAR x forward, y left, z up; camera x right, y down, z forward
LIDAR_TO_CAMERA = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)


def lidar_points(u: np.ndarray, v: np.ndarray, depth: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, 4): the points that appear at pixels u, v at a depth, for the camera of `make_rows`."""
    y, z = -(u - width / 2) / FOCAL * depth, -(v - height / 2) / FOCAL * depth
    return np.stack([depth, y, z, 0 * depth], axis=1)


def make_rows(
    indices=range(6), height: int = HEIGHT, width: int = WIDTH, prefix: str = ""
) -> Iterator[dict[str, Any]]:
    """Frame i has depth 5 + 10 i + v / 4 at row v, and is the brighter the farther away, with some texture."""
    projection = np.array([[FOCAL, 0, width / 2, 0], [0, FOCAL, height / 2, 0], [0, 0, 1, 0]])
    for index in indices:
        rng = np.random.default_rng(index)
        u, v = rng.uniform(0, width - 1, 1500), rng.uniform(0, height - 1, 1500)
        points = lidar_points(u, v, 5 + 10 * index + v / 4, height, width)
        image = np.clip(rng.normal(30 * index, 4, (height, width, 3)), 0, 255).astype(np.uint8)
        yield to_row(f"{prefix}{index:06d}", image, points, projection, LIDAR_TO_CAMERA)


def save_rows(folder: Path, train=range(6), test=range(6, 8)) -> str:
    """The frames of `train` and `test` in a `save_to_disk` folder."""
    splits = {"train": make_rows(train), "test": make_rows(test)}
    rows = {name: dataset_from_rows(part, cache_dir=str(folder / "cache")) for name, part in splits.items()}
    datasets.DatasetDict(rows).save_to_disk(folder / "rows")
    return str(folder / "rows")
