"""Frames with depth, and the training samples of the published depth recipe drawn from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import SimIPUError
from .depth_targets import image_and_depth, kb_crop, resize_depth_map
from .rows import Rows


@dataclass(frozen=True)
class DepthFrame:
    """One frame, decoded, cropped and resized; nothing random has happened to it yet.

    Args:
        frame_id: name of the frame.
        image: `(H, W, 3)` uint8 RGB, as the model sees it.
        depth: `(H, W)` float32, metres, 0 where unknown: the target for training.
        full_depth: `(H', W')`, the same before resizing: the target for evaluation.
    """

    frame_id: str
    image: np.ndarray
    depth: np.ndarray
    full_depth: np.ndarray


@dataclass(frozen=True)
class DepthPreprocessing:
    """What happens to every frame, in training and evaluation alike.

    Args:
        use_kb_crop: keep the bottom centre of 352 x 1216 pixels, as KITTI is evaluated.
        image_size: height and width to resize to after that; `None` keeps the size.
        image_mean, image_std: of RGB values from 0 to 1.
    """

    use_kb_crop: bool = True
    image_size: tuple[int, int] | None = None
    image_mean: Sequence[float] = (0.485, 0.456, 0.406)
    image_std: Sequence[float] = (0.229, 0.224, 0.225)

    def load(self, row: Mapping[str, Any]) -> DepthFrame:
        """Decode, crop and resize a row.

        Raises:
            SimIPUError: the row cannot be used, or nothing is known of its depth; names the frame.
        """
        name = f"frame {row.get('frame_id', '?')}"
        image, full_depth = image_and_depth(row)
        if self.use_kb_crop:
            top, bottom, left, right = kb_crop(image.height, image.width, name)
            image, full_depth = image.crop((left, top, right, bottom)), full_depth[top:bottom, left:right]
        if not full_depth.any():
            raise SimIPUError(f"{name}: no pixel with known depth")
        height, width = self.image_size or full_depth.shape
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        depth = resize_depth_map(full_depth, height, width)
        return DepthFrame(str(row.get("frame_id", "?")), np.asarray(image), depth, full_depth)

    def normalize(self, image: np.ndarray) -> torch.Tensor:
        """`(H, W, 3)` with values 0 to 255, any type, to `(3, H, W)` float32."""
        mean, std = np.asarray(self.image_mean, np.float32), np.asarray(self.image_std, np.float32)
        scaled = (image.astype(np.float32) / 255 - mean) / std
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))


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
    color_range: tuple[float, float] = field(default=(0.9, 1.1))

    def __call__(
        self, image: np.ndarray, depth: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augment `image` (`(H, W, 3)` uint8) and `depth` (`(H, W)`) together; the image comes back as float32."""
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
            image, depth = (
                image[top : top + height, left : left + width],
                depth[top : top + height, left : left + width],
            )
        image = image.astype(np.float32)
        if generator.random() < self.color:
            image = 255 * (image / 255) ** np.float32(generator.uniform(*self.color_range))
            image = image * np.float32(generator.uniform(*self.color_range))
            image = image * generator.uniform(*self.color_range, size=3).astype(np.float32)
            image = image.clip(0, 255)
        return image, depth


class DepthDataset(torch.utils.data.Dataset):
    """Training samples: `pixel_values` (`(3, H, W)`) and `labels` (`(H, W)`, metres) of a row.

    A key is `(epoch, row)`, or a row alone for epoch 0. The augmentation is a pure function of (seed, epoch, row), so
    that neither workers nor a resume change it.

    Args:
        rows: rows that [`image_and_depth`] takes.
        preprocessing: of every frame.
        augmentation: of training samples; `None` for none.
        seed: of the augmentation.
        keep_frames: keep every decoded frame in memory, for small sets that are gone through many times.

    Raises:
        SimIPUError: no rows, or (at the first sample) a window larger than the images.
    """

    def __init__(
        self,
        rows: Rows | Sequence[DepthFrame],
        preprocessing: DepthPreprocessing,
        augmentation: DepthAugmentation | None = None,
        seed: int = 0,
        keep_frames: bool = False,
    ):
        if len(rows) == 0:
            raise SimIPUError("the data set has no rows")
        self.rows = rows
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self.kept: dict[int, DepthFrame] | None = {} if keep_frames else None

    def __len__(self) -> int:
        return len(self.rows)

    def frame(self, index: int) -> DepthFrame:
        """The frame of a row before augmentation."""
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        row = self.rows[index]
        frame = row if isinstance(row, DepthFrame) else self.preprocessing.load(row)
        if self.kept is not None:
            self.kept[index] = frame
        return frame

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        frame = self.frame(index)
        image, depth = frame.image, frame.depth
        if self.augmentation is not None:
            size = self.augmentation.crop_size
            if size is not None and (size[0] > depth.shape[0] or size[1] > depth.shape[1]):
                raise SimIPUError(
                    f"frame {frame.frame_id}: the random window {size[1]} x {size[0]} is larger than the image "
                    f"{depth.shape[1]} x {depth.shape[0]}: choose a smaller --crop_size"
                )
            image, depth = self.augmentation(image, depth, np.random.default_rng([self.seed, epoch, index]))
        # a copy: the depth may be a kept frame's, or memory of PIL that cannot be written to
        return {"pixel_values": self.preprocessing.normalize(image), "labels": torch.from_numpy(depth.copy())}


def default_crop_size(image_size: tuple[int, int] | None) -> tuple[int, int]:
    """The training window: 352 x 704 of 352 x 1216, or the same share of a smaller image, a multiple of 32 wide."""
    if image_size is None:
        return 352, 704
    height, width = image_size
    return height, min(width, max(32, round(width * 704 / 1216 / 32) * 32))
