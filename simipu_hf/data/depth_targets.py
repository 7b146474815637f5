"""Sparse ground-truth depth: from a LiDAR scan, or from KITTI's annotated depth PNGs and the Eigen file lists.

A depth map is float32 `(H, W)`, metres along the optical axis of the rectified camera; 0 where nothing is known.
Integer pixel coordinates are pixel centres.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import SimIPUError
from ..modeling.geometry import inside_image, project_points
from .rows import calibration_from_row, image_from_row, points_from_row

# KITTI Eigen training and evaluation use the bottom centre of every image (the "KB" crop).
KB_CROP = (352, 1216)


def project_to_depth_map(
    points: np.ndarray, camera_projection: np.ndarray, lidar_to_camera: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Project a LiDAR scan into the image; where several points fall in one pixel, the nearest wins.

    Args:
        points (`(N, 3)` or more columns): x y z in metres, LiDAR frame; non-finite points are left out.
        camera_projection (`(3, 4)`): rectified camera to pixels.
        lidar_to_camera (`(4, 4)`): LiDAR to rectified camera.
        height, width: size of the image in pixels.

    Returns:
        `(height, width)` float32, metres; 0 where no point falls.
    """
    xyz = np.asarray(points, dtype=np.float64)[:, :3]
    xyz = xyz[np.isfinite(xyz).all(axis=1)]
    lidar_to_pixel = np.asarray(camera_projection, np.float64) @ np.asarray(lidar_to_camera, np.float64)
    pixels, depth = project_points(xyz, lidar_to_pixel)
    inside = inside_image(pixels, depth, np.array([height, width]))
    column, row = np.floor(pixels[inside].T + 0.5)
    return _nearest_wins(row, column, depth[inside], height, width)


def resize_depth_map(depth: np.ndarray, height: int, width: int) -> np.ndarray:
    """Move every known depth to the pixel it falls in at another size; the nearest wins.

    Unlike interpolation this never mixes depths of two surfaces, and keeps sparse points when shrinking.
    """
    if depth.shape == (height, width):
        return depth
    row, column = np.nonzero(depth)
    scaled_row = (row + 0.5) * (height / depth.shape[0])
    scaled_column = (column + 0.5) * (width / depth.shape[1])
    return _nearest_wins(scaled_row, scaled_column, depth[row, column], height, width)


def _nearest_wins(row: np.ndarray, column: np.ndarray, depth: np.ndarray, height: int, width: int) -> np.ndarray:
    nearest = np.full(height * width, np.inf)
    np.minimum.at(nearest, row.astype(np.int64) * width + column.astype(np.int64), depth)
    nearest[np.isinf(nearest)] = 0
    return nearest.reshape(height, width).astype(np.float32)


def decode_depth_png(image: Image.Image, name: str = "depth image") -> np.ndarray:
    """Metres of an opened KITTI depth PNG: 16-bit grey, value / 256, 0 where unknown.

    Raises:
        SimIPUError: the image is not 16-bit grey; `name` says which.
    """
    if image.mode not in ("I;16", "I;16B", "I;16L", "I"):
        raise SimIPUError(f"{name}: expected a 16-bit grey depth PNG, found mode {image.mode!r}")
    return np.asarray(image).astype(np.float32) / 256.0


def read_depth_png(path: str | os.PathLike) -> np.ndarray:
    """Read KITTI's annotated depth (or any map stored the same way), see [`decode_depth_png`].

    Raises:
        SimIPUError: the file is missing, no image, or not 16-bit grey.
    """
    try:
        with Image.open(path) as image:
            return decode_depth_png(image, str(path))
    except OSError as error:
        raise SimIPUError(f"{path}: cannot be read as a depth PNG ({error})") from error


def image_and_depth(row: Mapping[str, Any]) -> tuple[Image.Image, np.ndarray]:
    """The image of a row and its ground truth: its `depth` where it has one, else its LiDAR scan projected.

    Args:
        row: a row of the data contract (`frame_id`, `image`, `points`, `camera_projection`, `lidar_to_camera`),
            or one with `image` and `depth`: a KITTI-style 16-bit PNG, opened or its path.

    Returns:
        The RGB image, and `(H, W)` float32 of its size, metres.

    Raises:
        SimIPUError: something cannot be read, or the depth has another size than the image; names the frame.
    """
    name = f"frame {row.get('frame_id', '?')}"
    image = image_from_row(row)
    depth = row.get("depth")
    if depth is None:
        return image, project_to_depth_map(points_from_row(row), *calibration_from_row(row), image.height, image.width)
    depth = decode_depth_png(depth, name) if isinstance(depth, Image.Image) else read_depth_png(depth)
    if depth.shape != (image.height, image.width):
        raise SimIPUError(
            f"{name}: depth is {depth.shape[1]} x {depth.shape[0]}, its image {image.width} x {image.height}"
        )
    return image, depth


def kb_crop(height: int, width: int, name: str = "image") -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the 352 x 1216 crop at the bottom centre, as published.

    Raises:
        SimIPUError: the image is smaller; `name` says which.
    """
    if height < KB_CROP[0] or width < KB_CROP[1]:
        raise SimIPUError(
            f"{name} is {width} x {height}, smaller than the KITTI crop {KB_CROP[1]} x {KB_CROP[0]}: "
            "evaluate and train without it (kb_crop=False, on the command line --no_kb_crop)"
        )
    top, left = height - KB_CROP[0], (width - KB_CROP[1]) // 2
    return top, height, left, left + KB_CROP[1]


@dataclass(frozen=True)
class EigenEntry:
    """One line of an Eigen file list: paths relative to the two roots; `depth` is `None` without ground truth."""

    image: str
    depth: str | None
    focal_length: float


def read_eigen_list(path: str | os.PathLike) -> list[EigenEntry]:
    """Read a KITTI Eigen file list: `image_path depth_path focal_length` a line, `None` for a missing depth.

    Raises:
        SimIPUError: no such file, no line, or a line that is not two paths and a number; names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SimIPUError(f"{path}: cannot be read as a file list ({error})") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            image, depth, focal_length = fields
            entries.append(EigenEntry(image, None if depth == "None" else depth, float(focal_length)))
        except ValueError as error:
            raise SimIPUError(
                f"{path}, line {number}: expected 'image_path depth_path focal_length', found {line!r}"
            ) from error
    if not entries:
        raise SimIPUError(f"{path} lists no frame")
    return entries


class EigenDataset:
    """The frames of an Eigen file list that have ground truth, as rows with `frame_id` and the paths `image`, `depth`.

    Args:
        file_list: an Eigen list, see [`read_eigen_list`] (697 test lines, 652 of them with ground truth).
        image_root: folder the image paths start from (KITTI raw).
        depth_root: folder the depth paths start from (KITTI's annotated depth maps).
    """

    def __init__(self, file_list: str | os.PathLike, image_root: str | os.PathLike, depth_root: str | os.PathLike):
        self.entries = [entry for entry in read_eigen_list(file_list) if entry.depth is not None]
        self.image_root, self.depth_root = Path(image_root), Path(depth_root)
        if not self.entries:
            raise SimIPUError(f"{file_list}: no line has ground truth")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        assert entry.depth is not None
        image, depth = str(self.image_root / entry.image), str(self.depth_root / entry.depth)
        return {"frame_id": entry.image, "image": image, "depth": depth}
