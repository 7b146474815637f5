"""The training set as a torch Dataset: row index in, both augmented views out."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

from .augmentation import TwoViewAugmentation, two_view_sample
from .rows import Rows

OnBadRow = Literal["error", "skip"]
REQUIRED_COLUMNS = ("image", "points", "camera_projection", "lidar_to_camera")


class TwoViewDataset(torch.utils.data.Dataset):
    """Two views of each row, the same for one (seed, epoch, index) in every process and with any number of workers.

    A key is `(epoch, index)`, or an index alone for epoch 0. The epoch is part of the key, which
    [`GlobalBatchSampler`](simipu_hf.training.sampling.GlobalBatchSampler) makes, because workers fetch ahead beyond
    the end of an epoch.

    Args:
        rows: a `datasets.Dataset` of the data contract, or any sequence of such rows.
        processor: of the model.
        augmentation: how the views differ.
        seed: of all augmentation.
        on_bad_row: `"error"` stops at a row that cannot be used. `"skip"` puts the next usable row in its place, so
            that batches keep their size and processes stay in step, and notes it in `bad_rows`.

    Raises:
        SimIPUError: no rows, or a column is missing.
    """

    def __init__(
        self,
        rows: Rows,
        processor: SimIPUProcessor,
        augmentation: TwoViewAugmentation,
        seed: int = 0,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        if on_bad_row not in ("error", "skip"):
            raise SimIPUError(f"on_bad_row: expected 'error' or 'skip', found {on_bad_row!r}")
        if len(rows) == 0:
            raise SimIPUError("the data set has no rows")
        columns = getattr(rows, "column_names", REQUIRED_COLUMNS)
        missing = [name for name in REQUIRED_COLUMNS if name not in columns]
        if missing:
            raise SimIPUError(f"the data set has no column {', '.join(missing)}; found {', '.join(columns)}")
        self.rows: Any = rows  # what a datasets.Dataset has beyond Rows is used where it is there
        self.processor = processor
        self.augmentation = augmentation
        self.seed = seed
        self.on_bad_row = on_bad_row
        self._is_bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bad_rows(self) -> list[int]:
        """Indices of the rows that this process and its workers found unusable and replaced so far."""
        return self._is_bad.nonzero().flatten().tolist()

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """The sample of `two_view_sample`.

        Raises:
            IndexError: there is no such row.
            SimIPUError: names the row and what is wrong with it.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"expected a row from 0 to {len(self) - 1}, found {index}")
        if self.on_bad_row == "error":
            return self._sample(index, epoch, index)
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return self._sample(candidate, epoch, index)
            except SimIPUError as error:
                self._is_bad[candidate] = True
                last_error = error
        raise SimIPUError(f"none of the {len(self)} rows can be used; the last: {last_error}")

    def read_row(self, index: int) -> Mapping[str, Any]:
        """A row of the data set as it is, its image decoded.

        Raises:
            SimIPUError: names the row and why it cannot be read.
        """
        try:
            return self.rows[index]
        # Reading a row decodes its image, and Pillow raises OSError, SyntaxError, ValueError and errors of its own.
        except Exception as error:
            raise SimIPUError(f"{self._row_name(index)}: cannot be read ({error})") from error

    def _sample(self, row_index: int, epoch: int, index: int) -> dict[str, torch.Tensor]:
        row = self.read_row(row_index)
        try:
            return two_view_sample(row, self.processor, self.augmentation, seed=self.seed, epoch=epoch, index=index)
        except ValueError as error:
            raise SimIPUError(f"{self._row_name(row_index)}: {error}") from error

    def _row_name(self, row_index: int) -> str:
        if "frame_id" not in getattr(self.rows, "column_names", ()):
            return f"row {row_index}"
        frame_id = self.rows.select_columns("frame_id")[row_index]["frame_id"]  # this does not decode the image
        return f"row {row_index} (frame_id {frame_id})"
