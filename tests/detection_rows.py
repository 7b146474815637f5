"""Rows with labelled objects for tests: bright boxes on a dark road, in front of a camera that looks along z."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np

from simipu_hf.data.rows import to_row

HEIGHT, WIDTH, FOCAL = 64, 192, 120.0
PROJECTION = np.array([[FOCAL, 0, WIDTH / 2, 0], [0, FOCAL, HEIGHT / 2, 0], [0, 0, 1, 0]])
LIDAR_TO_CAMERA = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
FIELDS = ("type", "truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y")


def make_row(index: int, **changes: Any) -> dict[str, Any]:
    """A frame with a car; `changes` are of its label."""
    generator = np.random.default_rng(index)
    x, z = generator.uniform(-4, 4), generator.uniform(8, 14)
    u, bottom, half, height = FOCAL * x / z + WIDTH / 2, FOCAL * 1.5 / z + HEIGHT / 2, FOCAL / z, 1.5 * FOCAL / z
    box = [u - half, bottom - height, u + half, bottom]
    image = generator.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    left, top, right, low = (round(value) for value in box)
    image[max(top, 0) : low, max(left, 0) : max(right, 0)] += 150
    label = {
        "type": "Car", "truncated": 0.0, "occluded": 0, "alpha": -np.arctan2(x, z), "bbox": box,
        "dimensions": [1.5, 1.6, 3.9], "location": [x, 1.5, z], "rotation_y": 0.0,
    } | changes  # fmt: skip
    row = to_row(f"{index:06d}", image, generator.normal(size=(5, 4)), PROJECTION, LIDAR_TO_CAMERA, scene=str(index))
    return row | {"objects": {name: [label[name]] for name in FIELDS}}


def save_rows(folder: Path, **changes: Any) -> str:
    """`train` (frames 0 to 3) and `test` (frames 4 and 5) in a `save_to_disk` folder; `changes` are of frame 1."""
    splits = {"train": range(4), "test": range(4, 6)}
    rows = {
        name: datasets.Dataset.from_list([make_row(i, **(changes if i == 1 else {})) for i in indices]).cast_column(
            "image", datasets.Image()
        )
        for name, indices in splits.items()
    }
    datasets.DatasetDict(rows).save_to_disk(folder / "rows")
    return str(folder / "rows")
