"""Two views of a row: one image, its point cloud as it is, and the same points moved.

The point cloud's second view is rotated about the vertical axis, scaled and mirrored as in the official pipeline;
where it is mirrored, the image is mirrored with it, and the un-augmented view never is. Everything the model has to
know about it is in two matrices, `lidar_to_aug` and `lidar_to_pixel`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tvF
from transformers.image_utils import SizeDict

from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.geometry import pixel_transform
from simipu_hf.modeling.image_processing_simipu import size_within
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

Range = tuple[float, float]

# Only what differs from the defaults, which are the recommended preset.
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "official": {"random_resize": ((640, 192), (2400, 720))},
}


@dataclass(frozen=True)
class TwoViewAugmentation:
    """How the two views of a row differ and how its image varies from epoch to epoch.

    Args:
        rotation: range of the rotation of the augmented view about the vertical axis, in radians.
        scale: range of its scale.
        translation_std: standard deviation of its shift along each axis, in metres.
        flip_probability: how often the image and the augmented view are mirrored, always together.
        rotation_center: x, y, z in metres in the LiDAR frame; the scale is about the origin.
        random_resize: smallest and largest (long edge, short edge) in pixels; both edges are drawn independently and
            the image is resized within them, keeping its ratio. `None` resizes as the image processor does.
        random_zoom: range of the zoom of a random window, which keeps the image's ratio and is resized in the
            image's place; 1 is the whole image.
        brightness, contrast, saturation: strength s of the colour change, a factor from [1 - s, 1 + s].
        hue: strength of the hue change, a shift from [-hue, hue] of a full turn, at most 0.5.

    Raises:
        SimIPUError: a value outside its meaning.
    """

    rotation: Range = (-math.pi / 2, math.pi / 2)
    scale: Range = (0.75, 1.25)
    translation_std: float = 0.0
    flip_probability: float = 0.5
    rotation_center: tuple[float, float, float] = (35.2, 0.0, -1.0)
    random_resize: tuple[tuple[int, int], tuple[int, int]] | None = None
    random_zoom: Range = (1.0, 1.0)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("rotation", -math.inf), ("scale", 1e-3), ("random_zoom", 1.0)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise SimIPUError(f"augmentation {name}: expected a range from at least {least}, found {low}, {high}")
        for name, most in (
            ("flip_probability", 1),
            ("brightness", 1),
            ("contrast", 1),
            ("saturation", 1),
            ("hue", 0.5),
        ):
            if not 0 <= getattr(self, name) <= most:
                raise SimIPUError(f"augmentation {name}: expected 0 to {most}, found {getattr(self, name)}")
        if self.translation_std < 0:
            raise SimIPUError(f"augmentation translation_std: expected at least 0, found {self.translation_std}")
        if self.random_resize is not None:
            smallest, largest = self.random_resize
            if any(not 1 <= low <= high for low, high in zip(smallest, largest, strict=True)):
                raise SimIPUError(
                    "augmentation random_resize: expected the smallest, then the largest (long edge, short edge), "
                    f"found {self.random_resize}"
                )

    @classmethod
    def from_preset(cls, preset: str = "recommended", **overrides: Any) -> "TwoViewAugmentation":
        """The augmentation of a preset, `"recommended"` or `"official"`, with fields changed.

        The official one draws image sizes; `random_resize=None` makes it keep to the image processor's.

        Raises:
            SimIPUError: an unknown preset.
        """
        if preset not in PRESETS:
            raise SimIPUError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
        return cls(**{**PRESETS[preset], **overrides})


def two_view_sample(
    row: Mapping[str, Any],
    processor: SimIPUProcessor,
    augmentation: TwoViewAugmentation,
    *,
    seed: int,
    epoch: int,
    index: int,
) -> dict[str, torch.Tensor]:
    """Both views of a row, as a pure function of the row, the settings and (seed, epoch, index).

    Args:
        row: `image`, `points`, `camera_projection` and `lidar_to_camera` as in the data contract.
        processor: filters, draws and resizes.
        augmentation: what varies.
        seed, epoch, index: not negative; all randomness follows from them.

    Returns:
        `image` (3, h, w), resized and in the data type of the row's; `points` and `points_aug` (num_points, 4)
        float32, the same physical points in separate random orders; `lidar_to_aug` (4, 4); `lidar_to_pixel` (3, 4),
        un-augmented LiDAR to pixels of `image`.

    Raises:
        ValueError: an image, scan or calibration that cannot be used.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, index])))
    mirrored = generator.random() < augmentation.flip_probability
    lidar_to_aug = torch.from_numpy(_draw_view_transform(augmentation, mirrored, generator)).to(torch.float32)

    image = processor.image_processor.load_image(row["image"])
    image_size = (image.shape[-2], image.shape[-1])
    cloud, lidar_to_image = processor.load_points(
        row["points"], row["camera_projection"], row["lidar_to_camera"], image_size
    )
    image, image_transform = _augment_image(image, processor, augmentation, mirrored, generator)

    points = processor.feature_extractor.draw(cloud, generator)  # in random order, so this view is shuffled
    points_aug = torch.from_numpy(points.take(generator.permutation(len(points)), axis=0))
    # by PyTorch, which keeps to one thread in a worker: NumPy's matrix product does not
    points_aug[:, :3] = torch.addmm(lidar_to_aug[:3, 3], points_aug[:, :3], lidar_to_aug[:3, :3].T)
    return {
        "image": image,
        "points": torch.from_numpy(points),
        "points_aug": points_aug,
        "lidar_to_aug": lidar_to_aug,
        "lidar_to_pixel": torch.from_numpy(image_transform @ lidar_to_image).to(torch.float32),
    }


def view_transform(
    rotation: float, scale: float, translation: np.ndarray, center: tuple[float, float, float], mirrored: bool
) -> np.ndarray:
    """The official transform of the augmented view as one homogeneous matrix on columns, (4, 4) float64.

    In the official code's row vectors it is `p' = F(s ((p - c) R + c) + t)` with
    `R = [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]` and F changing the sign of y where `mirrored`
    (mmdetection3d's `GlobalRotScaleTrans`, then `RandomFlip3D`).
    """
    cos, sin = math.cos(rotation), math.sin(rotation)
    linear = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])  # R transposed, for columns
    fixed = np.asarray(center)
    matrix = np.eye(4)
    matrix[:3, :3] = scale * linear
    matrix[:3, 3] = scale * (fixed - linear @ fixed) + translation
    if mirrored:
        matrix[1] *= -1
    return matrix


def _draw_view_transform(
    augmentation: TwoViewAugmentation, mirrored: bool, generator: np.random.Generator
) -> np.ndarray:
    return view_transform(
        generator.uniform(*augmentation.rotation),
        generator.uniform(*augmentation.scale),
        generator.normal(size=3) * augmentation.translation_std,
        augmentation.rotation_center,
        mirrored,
    )


def _augment_image(
    image: torch.Tensor,
    processor: SimIPUProcessor,
    augmentation: TwoViewAugmentation,
    mirrored: bool,
    generator: np.random.Generator,
) -> tuple[torch.Tensor, np.ndarray]:
    """Window, resize, colour change and mirror of an image (3, H, W), and the (3, 3) map of its pixels."""
    settings = processor.image_processor
    crop = _draw_window((image.shape[-2], image.shape[-1]), augmentation, generator)
    (top, left), window = crop[:2], crop[2:]
    if augmentation.random_resize is None:
        height, width = settings.output_size(window)
    else:
        long_edge, short_edge = generator.integers(*augmentation.random_resize, endpoint=True).tolist()
        bounds = (short_edge, long_edge) if window[1] >= window[0] else (long_edge, short_edge)
        height, width = size_within(window, bounds)
    image = image[:, top : top + window[0], left : left + window[1]]
    image = settings.resize(image, SizeDict(height=height, width=width), settings.resample)
    image = _jitter_colors(image, augmentation, generator)
    if mirrored:
        image = image.flip(-1)
    return image, pixel_transform(crop, (height, width), mirrored, settings.half_pixel_centers)


def _draw_window(
    image_size: tuple[int, int], augmentation: TwoViewAugmentation, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of the window that is kept."""
    zoom = generator.uniform(*augmentation.random_zoom)
    height, width = (max(1, round(length / zoom)) for length in image_size)
    top = generator.integers(image_size[0] - height, endpoint=True)
    left = generator.integers(image_size[1] - width, endpoint=True)
    return int(top), int(left), height, width


def _jitter_colors(
    image: torch.Tensor, augmentation: TwoViewAugmentation, generator: np.random.Generator
) -> torch.Tensor:
    for adjust, strength, neutral in (
        (tvF.adjust_brightness, augmentation.brightness, 1.0),
        (tvF.adjust_contrast, augmentation.contrast, 1.0),
        (tvF.adjust_saturation, augmentation.saturation, 1.0),
        (tvF.adjust_hue, augmentation.hue, 0.0),
    ):
        amount = neutral + strength * generator.uniform(-1.0, 1.0)  # drawn even where off: the rest stays the same
        if strength:
            image = adjust(image, amount)
    return image
