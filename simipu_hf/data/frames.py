"""Frames by name, and the samples of them that a fine-tuned model is trained and measured on, whatever its task."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch

from ..errors import SimIPUError
from ..modeling.image_processing_simipu import SimIPUImageProcessor
from .loading import join_rows, load_pretraining_dataset, row_names, take_rows
from .sources import split_ids, split_source, undecoded

OnBadRow = Literal["error", "skip"]


# --- frames by name -------------------------------------------------------------------------------------------------


def select_frames(specifications: Sequence[str], labels: bool = False) -> datasets.Dataset:
    """The rows that the specifications name, in their order.

    rows = select_frames(["KITTI#train", "my_parquet#val:000001,000007"])

    Args:
        specifications: each `SOURCE`, `SOURCE#SPLIT` or `SOURCE#SPLIT:IDS`. SOURCE is whatever
            `load_pretraining_dataset` reads; SPLIT is one of its splits (its default where empty), such as
            `train` or `train[:50%]`; IDS is a list of `frame_id`s separated by commas, or `@FILE` with one a line.
        labels: read the labels of published data sets.

    Returns:
        The columns that every source has, and `depth` where any has it; images not decoded.

    Raises:
        SimIPUError: a source that cannot be read, an id it does not have, or a frame named twice.
        OSError: a file of ids that cannot be read.
    """
    parts = [_select(specification, labels) for specification in specifications]
    if not parts:
        raise SimIPUError("no frames were named: expected SOURCE[#SPLIT[:IDS]], as --train_frames takes")
    taken: dict[str, set[Any]] = {}
    for specification, part in zip(specifications, parts, strict=True):
        take_rows(taken, specification, split_source(specification)[0], row_names(part))
    # the depth of rows without a map is that of their scan
    return join_rows([undecoded(part) for part in parts], optional=("depth",))


def _select(specification: str, labels: bool) -> datasets.Dataset:
    source, rest = split_source(specification)
    split, ids = split_ids(rest)
    rows = load_pretraining_dataset(source, split=split or None, labels=labels)
    if not ids:
        return rows
    lines = Path(ids[1:]).read_text("utf-8-sig", "replace").splitlines() if ids.startswith("@") else ids.split(",")
    wanted = [line.strip() for line in lines if line.strip()]
    positions: dict[str, list[int]] = {frame_id: [] for frame_id in wanted}
    for index, frame_id in enumerate(rows["frame_id"][:]):
        positions.get(frame_id, []).append(index)
    for frame_id, found in positions.items():
        if len(found) != 1:
            raise SimIPUError(f"{specification}: expected one frame {frame_id!r}, found {len(found)}")
    return rows.select([positions[frame_id][0] for frame_id in wanted])


# --- samples --------------------------------------------------------------------------------------------------------


def crop_window(processor: SimIPUImageProcessor, image_size: tuple[int, ...], name: str) -> tuple[int, int, int, int]:
    """Top, left, height and width of the part of an image that a processor keeps.

    Raises:
        SimIPUError: the image is smaller; `name` says which.
    """
    try:
        return processor.crop_window((image_size[0], image_size[1]))
    except ValueError as error:
        raise SimIPUError(f"{name}: {error}; --no_kb_crop trains and evaluates without the KITTI crop") from error


def draw_window(
    window: tuple[int, int, int, int], zoom: float, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part of a window, `zoom` times smaller."""
    top, left, *size = window
    height, width = (max(1, round(length / zoom)) for length in size)
    top += int(generator.integers(size[0] - height, endpoint=True))
    left += int(generator.integers(size[1] - width, endpoint=True))
    return top, left, height, width


def to_pixel_values(images: Sequence[np.ndarray], processor: SimIPUImageProcessor) -> torch.Tensor:
    """Normalise images `(h, w, 3)` of one size, values 0 to 255: `(B, 3, h, w)` float32."""
    pixels = torch.stack([torch.from_numpy(np.ascontiguousarray(image)) for image in images]).permute(0, 3, 1, 2)
    return processor.normalize_images(pixels, torch.tensor([pixels.shape[-2:]] * len(images)))


def jitter_colors(image: np.ndarray, generator: np.random.Generator, factors: tuple[float, float]) -> np.ndarray:
    """Gamma, brightness and each channel of an image `(h, w, 3)` float32, 0 to 255, scaled by a factor of a range."""
    image = 255 * (image / 255) ** np.float32(generator.uniform(*factors))
    image = image * np.float32(generator.uniform(*factors))
    return (image * generator.uniform(*factors, size=3).astype(np.float32)).clip(0, 255)


@dataclass(eq=False, repr=False)
class FrameDataset(torch.utils.data.Dataset):
    """Training samples of frames; a task adds `read` and `sample`.

    A key is `(epoch, row)`, or a row alone for epoch 0. The augmentation is a pure function of (seed, epoch, row), so
    that neither workers nor a resume change it.

    Args:
        rows: rows that `read` takes, or frames that were read.
        processor: the model's image processor.
        augmentation: of training samples; `None` for none.
        seed: of the augmentation.
        keep_frames: keep every frame that was read in memory, for small sets that are gone through many times.
        on_bad_row: `"skip"` takes the next usable row instead of one that cannot be used.

    Raises:
        SimIPUError: no rows.
    """

    rows: datasets.Dataset | Sequence[Any]
    processor: SimIPUImageProcessor
    augmentation: Any = None
    seed: int = 0
    keep_frames: bool = False
    on_bad_row: OnBadRow = "error"

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise SimIPUError("the data set has no rows")
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: Any) -> Any:
        """The frame of a row, which has a `frame_id`.

        Raises:
            SimIPUError: the row cannot be used; names the frame.
        """
        raise NotImplementedError

    def sample(self, frame: Any, generator: np.random.Generator | None = None) -> dict[str, Any]:
        """What the model is given of a frame, augmented where there is a generator."""
        raise NotImplementedError

    def usable_frames(self, indices: Iterable[int] | None = None) -> Iterator[Any]:
        """The frames of all rows, or of some, one by one; with `"skip"` unusable ones are named and left out."""
        for index in range(len(self)) if indices is None else indices:
            row = self.rows[index]
            try:
                frame = self.read(row) if isinstance(row, Mapping) else row
            except SimIPUError as error:
                if self.on_bad_row == "error":
                    raise
                print(f"left out: {error}", file=sys.stderr)
            else:
                yield frame

    def frame(self, index: int) -> Any:
        """The frame of a row, or of the next usable one."""
        if index in self._kept:
            return self._kept[index]
        frame = next(self.usable_frames((index + step) % len(self) for step in range(len(self))), None)
        if frame is None:
            raise SimIPUError(f"none of the {len(self)} training frames can be used")
        if self.keep_frames:
            self._kept[index] = frame
        return frame

    def pixel_values(self, index: int) -> torch.Tensor:
        """`(3, h, w)`: a frame's whole image, not augmented."""
        return self.sample(self.frame(index))["pixel_values"]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        generator = None if self.augmentation is None else np.random.default_rng([self.seed, epoch, index])
        return self.sample(self.frame(index), generator)
