"""Two views of a row: one image, its point cloud as it is, and the same points moved.

The point cloud's second view is rotated about the vertical axis, scaled and mirrored as in the official pipeline;
where it is mirrored, the image is mirrored with it, and the un-augmented view never is. Everything the model has to
know about it is in two matrices, `lidar_to_aug` and `lidar_to_pixel`, which speak of the frame that the processor
brings the points into.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torchvision.transforms.v2 import functional as tvF

from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.configuration_simipu import preset_values
from simipu_hf.modeling.geometry import pixel_transform, transform_cloud
from simipu_hf.modeling.image_processing_simipu import (
    SimIPUImageProcessor,
    open_unturned,
    pad_to_largest,
    size_within,
)
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

from .frames import OnBadRow, draw_window
from .mixture import Mixture
from .rows import REQUIRED_COLUMNS, image_from_row, pixels_from_row, points_from_row
from .sources import undecoded

Range = tuple[float, float]


@dataclass(frozen=True)
class TwoViewAugmentation:
    """How the two views of a row differ and how its image varies from epoch to epoch.

    Args:
        rotation: range of the rotation of the augmented view about the vertical axis, in radians.
        scale: range of its scale.
        translation_std: standard deviation of its shift along each axis, in metres.
        flip_probability: how often the image and the augmented view are mirrored, always together.
        rotation_center: x, y, z in metres in the frame of the points; the scale is about the origin. The default is
            the origin, in the camera-aligned frame the camera, which suits every range of depths.
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
    rotation_center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    random_resize: tuple[tuple[int, int], tuple[int, int]] | None = None
    random_zoom: Range = (1.0, 1.0)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("rotation", -math.inf), ("scale", 1e-3), ("random_zoom", 1.0)):
            low, high = getattr(self, name)
            if not least <= low <= high < math.inf:
                raise SimIPUError(f"augmentation {name}: expected a range from at least {least}, found {low}, {high}")
        for name in ("flip_probability", "brightness", "contrast", "saturation", "hue"):
            most = 0.5 if name == "hue" else 1
            if not 0 <= getattr(self, name) <= most:
                raise SimIPUError(f"augmentation {name}: expected 0 to {most}, found {getattr(self, name)}")
        if len(self.rotation_center) != 3:
            raise SimIPUError(f"augmentation rotation_center: expected x, y, z, found {self.rotation_center}")
        if not 0 <= self.translation_std < math.inf:
            raise SimIPUError(f"augmentation translation_std: expected 0 or more metres, found {self.translation_std}")
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
            ValueError: an unknown preset.
        """
        return cls(**(preset_values(preset, "augmentation") | overrides))


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
        processor: selects and draws the points, and resizes the image.
        augmentation: what varies.
        seed, epoch, index: not negative; all randomness follows from them.

    Returns:
        `image` (3, h, w), resized and in the data type of the row's; `points` and `points_aug` (num_points, 4)
        float32, the same physical points in separate random orders, in the processor's frame of points;
        `lidar_to_aug` (4, 4), un-augmented to augmented; `lidar_to_pixel` (3, 4), un-augmented to pixels of `image`.

    Raises:
        ValueError: an image, scan or calibration that cannot be used.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, index])))
    mirrored = generator.random() < augmentation.flip_probability
    lidar_to_aug = view_transform(
        generator.uniform(*augmentation.rotation),
        generator.uniform(*augmentation.scale),
        generator.normal(size=3) * augmentation.translation_std,
        augmentation.rotation_center,
        mirrored,
    ).astype(np.float32)

    image = processor.image_processor.load_image(open_unturned(row["image"]))
    processor.image_processor.check_floats(image)
    image_size = (image.shape[-2], image.shape[-1])
    cloud, frame_to_pixel = processor.feature_extractor.visible_points(
        row["points"], row["camera_projection"], row["lidar_to_camera"], image_size
    )
    image, image_transform = _augment_image(image, processor.image_processor, augmentation, mirrored, generator)

    points = processor.feature_extractor.draw(cloud, generator)  # in random order, so this view is shuffled
    points_aug = transform_cloud(points.take(generator.permutation(len(points)), axis=0), lidar_to_aug)
    return {
        "image": image,
        "points": torch.from_numpy(points),
        "points_aug": torch.from_numpy(points_aug),
        "lidar_to_aug": torch.from_numpy(lidar_to_aug),
        "lidar_to_pixel": torch.from_numpy(image_transform @ frame_to_pixel).to(torch.float32),
    }


def sample_row(
    row: Mapping[str, Any], processor: SimIPUProcessor, augmentation: TwoViewAugmentation, **place: int
) -> dict[str, torch.Tensor]:
    """[`two_view_sample`] of a row as it is stored; `place` is seed, epoch and index.

    Raises:
        SimIPUError: names the frame and what is wrong with it.
    """
    decoded = {**row, "points": points_from_row(row), "image": pixels_from_row(row)}
    try:
        return two_view_sample(decoded, processor, augmentation, **place)
    except ValueError as error:
        raise SimIPUError(f"frame {row['frame_id']}: {error}") from error


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


def _augment_image(
    image: torch.Tensor,
    processor: SimIPUImageProcessor,
    augmentation: TwoViewAugmentation,
    mirrored: bool,
    generator: np.random.Generator,
) -> tuple[torch.Tensor, np.ndarray]:
    """Window, resize, colour change and mirror of an image (3, H, W), and the (3, 3) map of its pixels."""
    zoom = generator.uniform(*augmentation.random_zoom)
    window = draw_window(processor.crop_window((image.shape[-2], image.shape[-1])), zoom, generator)
    output_size = None
    if augmentation.random_resize is not None:
        long_edge, short_edge = generator.integers(*augmentation.random_resize, endpoint=True).tolist()
        height, width = window[2:]
        output_size = size_within(
            (height, width), (short_edge, long_edge) if width >= height else (long_edge, short_edge)
        )
    image = _jitter_colors(processor.resize_image(image, window, output_size), augmentation, generator)
    if mirrored:
        image = image.flip(-1)
    new_size = (image.shape[-2], image.shape[-1])
    return image, pixel_transform(window, new_size, mirrored, processor.half_pixel_centers)


def _jitter_colors(
    image: torch.Tensor, augmentation: TwoViewAugmentation, generator: np.random.Generator
) -> torch.Tensor:
    is_float_to_255 = image.is_floating_point() and image.max() > 1
    for adjust, strength, neutral in (
        (tvF.adjust_brightness, augmentation.brightness, 1.0),
        (tvF.adjust_contrast, augmentation.contrast, 1.0),
        (tvF.adjust_saturation, augmentation.saturation, 1.0),
        (tvF.adjust_hue, augmentation.hue, 0.0),
    ):
        amount = neutral + strength * generator.uniform(-1.0, 1.0)  # drawn even where off: the rest stays the same
        if strength:
            # torchvision clamps floats at 1
            image = adjust(image / 255, amount) * 255 if is_float_to_255 else adjust(image, amount)
    return image


@dataclass(eq=False, repr=False)
class TwoViewDataset(torch.utils.data.Dataset):
    """Two views of each row, the same for one (seed, epoch, index) in every process and with any number of workers.

    A key is `(epoch, index)`, or an index alone for epoch 0. The epoch is part of the key, which
    [`GlobalBatchSampler`](simipu_hf.training.sampling.GlobalBatchSampler) makes, because workers fetch ahead beyond
    the end of an epoch.

    Args:
        rows: of the data contract.
        processor: of the model.
        augmentation: how the views differ.
        seed: of all augmentation.
        on_bad_row: `"error"` stops at a row that cannot be used. `"skip"` puts the next usable row in its place, so
            that batches keep their size and processes stay in step, and notes it in `bad_rows`.
        mixture: which row stands at an index of an epoch, where `rows` joins several sources; by default the index.

    Raises:
        SimIPUError: no rows.
    """

    rows: datasets.Dataset
    processor: SimIPUProcessor
    augmentation: TwoViewAugmentation
    seed: int = 0
    on_bad_row: OnBadRow = "error"
    mixture: Mixture | None = None

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise SimIPUError("the data set has no rows")
        # as Arrow tables: making Python objects of a whole row costs more than all of the geometry
        self._arrow_rows = undecoded(self.rows.select_columns(REQUIRED_COLUMNS)).with_format("arrow")
        self._is_bad = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.rows if self.mixture is None else self.mixture)

    @property
    def bad_rows(self) -> list[int]:
        """Indices of the rows that this process and its workers found unusable and replaced so far."""
        return self._is_bad.nonzero().flatten().tolist()

    @bad_rows.setter
    def bad_rows(self, rows: Sequence[int]) -> None:
        self._is_bad[list(rows)] = True  # beside those that are known already

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """The sample of `two_view_sample`.

        Raises:
            IndexError: there is no such row.
            SimIPUError: names the frame and what is wrong with it.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"expected a row from 0 to {len(self) - 1}, found {index}")
        row_index = index if self.mixture is None else self.mixture.row(epoch, index)
        if self.on_bad_row != "skip":
            return self._sample(row_index, epoch, index)
        for step in range(len(self.rows)):
            candidate = (row_index + step) % len(self.rows)
            try:
                return self._sample(candidate, epoch, index)
            except SimIPUError as error:
                self._is_bad[candidate] = True
                last_error = error
        raise SimIPUError(f"none of the {len(self.rows)} rows can be used; the last: {last_error}")

    def read_row(self, index: int) -> Mapping[str, Any]:
        """A row of the data set as it is, its image decoded.

        Raises:
            SimIPUError: names the frame and why its image cannot be read.
        """
        row = undecoded(self.rows)[index]
        return {**row, "image": image_from_row(row)}

    def _sample(self, row_index: int, epoch: int, index: int) -> dict[str, torch.Tensor]:
        table = self._arrow_rows[row_index]
        row = {name: table[name][0].as_py() for name in REQUIRED_COLUMNS if name != "points"}
        points = table["points"][0].as_buffer()
        row["points"] = None if points is None else memoryview(points)  # not copied
        return sample_row(row, self.processor, self.augmentation, seed=self.seed, epoch=epoch, index=index)


@dataclass(frozen=True)
class TwoViewCollator:
    """Makes a batch of samples of `two_view_sample`: images of several sizes are padded to the largest.

    Args:
        pad_size_divisor: height and width of the batch are multiples of it.
    """

    pad_size_divisor: int = 32

    def __call__(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """`images` (B, 3, H, W), zeros on the right and at the bottom; `image_sizes` (B, 2), height and width of each;
        and the other tensors stacked. [`to_model_inputs`] makes the model's inputs of it."""
        images = [sample["image"] for sample in samples]
        stacked = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0] if name != "image"}
        return {
            "images": pad_to_largest(images, self.pad_size_divisor),
            "image_sizes": torch.tensor([image.shape[-2:] for image in images]),
            **stacked,
        }


def to_model_inputs(
    batch: Mapping[str, torch.Tensor], image_processor: SimIPUImageProcessor
) -> dict[str, torch.Tensor]:
    """A batch of [`TwoViewCollator`] as inputs of [`SimIPUForPreTraining`]: `pixel_values` (B, 3, H, W) float32,
    normalised on the device that the batch is on, in the place of `images`.

    Workers ship bytes instead, a quarter of the size: several of them are limited by what they send.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "images"}
    return {"pixel_values": image_processor.normalize_images(batch["images"], batch["image_sizes"]), **inputs}
