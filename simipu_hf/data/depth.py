"""Frames with depth: where they come from, their ground truth, and the training samples of the published recipe.

A depth map is float32 `(H, W)`, metres along the optical axis of the rectified camera; 0 where nothing is known.
Integer pixel coordinates are pixel centres.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from ..errors import SimIPUError
from ..modeling.geometry import inside_image, project_points
from ..modeling.image_processing_simipu import SimIPUImageProcessor
from .frames import FrameDataset, OnBadRow, crop_window, jitter_colors, select_frames, to_pixel_values
from .rows import calibration_from_row, open_image, pixels_from_row, points_from_row

# KITTI Eigen training and evaluation use the bottom centre of every image (the "KB" crop): height, width.
KB_CROP = (352, 1216)


# --- Eigen file lists -----------------------------------------------------------------------------------------------


def read_eigen_list(
    file_list: str | os.PathLike,
    image_root: str | os.PathLike,
    depth_root: str | os.PathLike,
    on_bad_row: OnBadRow = "error",
) -> datasets.Dataset:
    """The frames of an Eigen file list that have ground truth: `frame_id`, `image` and `depth` (not decoded).

    A line is `image_path depth_path`, with or without a focal length behind it (which nothing needs), and `None` for
    a missing depth. The paths start from `image_root` (KITTI raw) and `depth_root` (KITTI's annotated depth maps).
    The published test list has 697 lines, 652 of them with ground truth. A frame that is listed twice is taken once;
    `on_bad_row="skip"` leaves a line out whose files are not there.

    Raises:
        SimIPUError: a line of another form, no line with ground truth, or a listed file is missing.
        OSError: the list cannot be read.
    """
    entries = _read_lines(file_list)
    rows, missing = [], []
    for image, depth in entries:
        paths = Path(image_root) / image, Path(depth_root) / depth
        absent = [path for path in paths if not path.is_file()]
        missing += absent[:1]
        if not absent:
            rows.append({"frame_id": image, "image": str(paths[0]), "depth": str(paths[1])})
    if missing:
        count = f"{len(missing)} of {len(entries)} frames"
        found = f"{file_list}: the files of {count} are missing, the first {missing[0]}"
        if on_bad_row == "error":
            raise SimIPUError(f"{found}; --on_bad_row skip leaves such frames out")
        print(f"{found}; they are left out", file=sys.stderr)
    if not rows:
        raise SimIPUError(f"{file_list}: no line has ground truth")
    file = datasets.Image(decode=False)
    columns = {"frame_id": datasets.Value("string"), "image": file, "depth": file}
    return datasets.Dataset.from_list(rows, features=datasets.Features(columns))


def _read_lines(path: str | os.PathLike) -> list[tuple[str, str]]:
    """Image and depth path of every line with ground truth, once, relative to their roots."""
    entries = []
    for number, line in enumerate(Path(path).read_text("utf-8-sig", "replace").splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) not in (2, 3):
            raise SimIPUError(f"{path}, line {number}: expected 'image depth [focal_length]', found {line!r}")
        # some published lists begin every path with a separator, which would drop the root
        image, depth = (field.replace("\\", "/").lstrip("/") for field in fields[:2])
        if depth != "None":
            entries.append((image, depth))
    return list(dict.fromkeys(entries))


def select_depth_rows(
    frames: Sequence[str], file_list: str | None, image_dir: str | None, depth_dir: str | None, on_bad_row: OnBadRow
) -> datasets.Dataset:
    """The rows that a depth command is asked for: those of an Eigen file list, or else named ones.

    Raises:
        SimIPUError: as [`select_frames`] and [`read_eigen_list`].
    """
    if file_list:
        return read_eigen_list(file_list, str(image_dir), str(depth_dir), on_bad_row)
    return select_frames(frames)


# --- ground truth ---------------------------------------------------------------------------------------------------


def project_to_depth_map(
    points: np.ndarray, camera_projection: np.ndarray, lidar_to_camera: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Depth `(height, width)` of a LiDAR scan in the image, float32 metres: the nearest point's in each pixel, 0 where
    none falls.

    Args:
        points: `(N, 3)` or more columns, x y z in metres, LiDAR frame.
        camera_projection: `(3, 4)`, rectified camera to pixels.
        lidar_to_camera: `(4, 4)`, LiDAR to rectified camera.
    """
    lidar_to_pixel = np.asarray(camera_projection, np.float64) @ np.asarray(lidar_to_camera, np.float64)
    pixels, depth = project_points(np.asarray(points, np.float64)[:, :3], lidar_to_pixel)
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


def read_depth_png(source: Image.Image | Mapping[str, Any] | str | os.PathLike, name: str) -> np.ndarray:
    """Metres of a KITTI depth PNG: 16-bit grey, value / 256, 0 where unknown. `source` is opened, its path, or
    `{"bytes", "path"}` of a column that is not decoded.

    Raises:
        SimIPUError: the file is missing, no image, or not 16-bit grey; `name` says which.
    """
    if not isinstance(source, Image.Image):
        try:
            with open_image(source) as source:
                source.load()
        except Exception as error:  # Pillow raises more than OSError
            raise SimIPUError(f"{name}: cannot be read as a depth PNG ({error})") from error
    if source.mode not in ("I;16", "I;16B", "I;16L", "I"):
        raise SimIPUError(f"{name}: expected a 16-bit grey depth PNG, found mode {source.mode!r}")
    return np.asarray(source).astype(np.float32) / 256.0


def image_and_depth(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The image of a row, `(H, W, 3)` uint8 RGB, and its ground truth, `(H, W)` float32 metres: its `depth`, as
    [`read_depth_png`] takes it, where it has one, else its LiDAR scan projected.

    Raises:
        SimIPUError: something cannot be read, or the depth has another size than the image; names the frame.
    """
    name = f"frame {row.get('frame_id', '?')}"
    image = pixels_from_row(row)
    height, width = image.shape[:2]
    if row.get("depth") is None:
        return image, project_to_depth_map(points_from_row(row), *calibration_from_row(row), height, width)
    depth = read_depth_png(row["depth"], f"{name}: depth")
    if depth.shape != (height, width):
        raise SimIPUError(f"{name}: depth is {depth.shape[1]} x {depth.shape[0]}, its image {width} x {height}")
    return image, depth


# --- what a model sees ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DepthFrame:
    """One frame as a model sees it before normalisation, and its ground truth; nothing random has happened to it.

    Args:
        frame_id: its name.
        image: `(h, w, 3)` uint8 RGB, cropped and resized by the image processor.
        target: `(h, w)` float32, metres, 0 where unknown: what training compares the prediction with.
        depth: `(H, W)`, the ground truth of the whole original image: what evaluation compares it with.
        window: top, left, height and width of the part of the original image that `image` shows.
    """

    frame_id: str
    image: np.ndarray
    target: np.ndarray
    depth: np.ndarray
    window: tuple[int, int, int, int]

    @classmethod
    def from_row(cls, row: Mapping[str, Any], processor: SimIPUImageProcessor) -> "DepthFrame":
        """Decode a row, crop and resize it.

        Raises:
            SimIPUError: the row cannot be used, or nothing is known of its depth; names the frame.
        """
        name = f"frame {row.get('frame_id', '?')}"
        image, depth = image_and_depth(row)
        window = top, left, height, width = crop_window(processor, depth.shape, name)
        known = depth[top : top + height, left : left + width]
        if not known.any():
            raise SimIPUError(f"{name}: no pixel with known depth")
        pixels = processor.resize_image(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        target = resize_depth_map(known, *pixels.shape[:2])
        return cls(str(row.get("frame_id", "?")), pixels, target, depth, window)


def refuse_small_crop(frame: DepthFrame) -> None:
    """Raises a `SimIPUError` where the KITTI crop is less than half of a frame's image, as of no image of KITTI's."""
    height, width = frame.depth.shape
    if 2 * KB_CROP[0] * KB_CROP[1] < height * width:
        raise SimIPUError(
            f"frame {frame.frame_id}: the KITTI crop of 352 x 1216 pixels (height x width) is less than half of the "
            f"image, {height} x {width}; --no_kb_crop trains and evaluates without the KITTI crop"
        )


# --- training samples -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DepthAugmentation:
    """The published augmentation (depth toolbox, `configs/_base_/datasets/kitti.py`), in its order.

    Args:
        rotation: largest angle in degrees, and how often an image is rotated (0 to 1).
        flip: how often an image is mirrored.
        crop_size: height and width of the random window; `None` keeps the whole image.
        color: how often gamma, brightness and the three channels are each scaled by a factor of `color_range`.
    """

    rotation: tuple[float, float] = (2.5, 0.5)
    flip: float = 0.5
    crop_size: tuple[int, int] | None = (352, 704)
    color: float = 0.5
    color_range: tuple[float, float] = (0.9, 1.1)

    def __call__(
        self, image: np.ndarray, depth: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augment `image` (`(h, w, 3)` uint8) and `depth` (`(h, w)`) together; the image comes back as float32."""
        limit, probability = self.rotation
        if generator.random() < probability:
            angle = generator.uniform(-limit, limit)
            image = np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR))
            # nearest: depths must not be mixed with each other nor with "unknown"
            depth = np.asarray(Image.fromarray(depth).rotate(angle, Image.Resampling.NEAREST))
        if generator.random() < self.flip:
            image, depth = image[:, ::-1], depth[:, ::-1]
        if self.crop_size is not None:
            height, width = self.crop_size
            top = generator.integers(image.shape[0] - height + 1)
            left = generator.integers(image.shape[1] - width + 1)
            window = (slice(top, top + height), slice(left, left + width))
            image, depth = image[window], depth[window]
        image = image.astype(np.float32)
        if generator.random() < self.color:
            image = jitter_colors(image, generator, self.color_range)
        return image, depth


def default_crop_size(image_size: tuple[int, int] | None) -> tuple[int, int]:
    """The training window: 352 x 704 of 352 x 1216, or the same share of a smaller image, a multiple of 32 wide."""
    if image_size is None:
        return 352, 704
    height, width = image_size
    return height, min(width, max(32, round(width * 704 / 1216 / 32) * 32))


class DepthDataset(FrameDataset):
    """Samples for depth: `pixel_values` (`(3, h, w)`) and `labels` (`(h, w)`, metres); see [`FrameDataset`].

    dataset = DepthDataset(select_frames(["KITTI#train"]), processor, DepthAugmentation())

    Raises:
        SimIPUError: no rows, or (at the first sample) a window larger than the images.
    """

    def read(self, row: Any) -> DepthFrame:
        return DepthFrame.from_row(row, self.processor)

    def sample(self, frame: DepthFrame, generator: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        image, depth = frame.image, frame.target
        if generator is not None:
            size = self.augmentation.crop_size
            if size is not None and (size[0] > depth.shape[0] or size[1] > depth.shape[1]):
                raise SimIPUError(
                    f"frame {frame.frame_id}: the random window {size[1]} x {size[0]} is larger than the image "
                    f"{depth.shape[1]} x {depth.shape[0]}: choose a smaller --crop_size"
                )
            image, depth = self.augmentation(image, depth, generator)
        # a copy: the depth may be a kept frame's, or memory of PIL that cannot be written to
        return {"pixel_values": to_pixel_values([image], self.processor)[0], "labels": torch.from_numpy(depth.copy())}
