"""Training on rows that are never all on this machine: shuffled, split by process and worker, resumed exactly.

The order is a pure function of (seed, process, worker), and the position in it is a small state: that of `datasets`
at the start of a block of rows, and how many rows of the block are done. The shuffle buffer of `datasets` itself
loses its rows on resuming, so shards are shuffled by `datasets` and rows within blocks here.
"""

import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node

from ..errors import SimIPUError
from ..modeling.processing_simipu import SimIPUProcessor
from .rows import REQUIRED_COLUMNS
from .sources import undecoded
from .two_views import TwoViewAugmentation, sample_row

logger = datasets.logging.get_logger(__name__)

BLOCK_BYTES = 2**29  # of images and scans in the block of one worker
# Arguments of IterableDataset.shuffle: several shards read in turns would not be resumed exactly.
SHARDS_ONLY = {"buffer_size": 1, "max_buffer_input_shards": 1}


def stream_two_views(
    rows: datasets.IterableDataset,
    processor: SimIPUProcessor,
    augmentation: TwoViewAugmentation,
    *,
    seed: int,
    batch_size: int,
    collate: Callable[[Sequence[Mapping[str, torch.Tensor]]], dict[str, torch.Tensor]],
    num_workers: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    shuffle_buffer: int = 256,
    on_bad_row: str = "error",
) -> Any:
    """A loader of batches of two views without end: epoch follows epoch inside it.

        loader = stream_two_views(rows, processor, augmentation, seed=0, batch_size=8, collate=TwoViewCollator())
        loader.load_state_dict(state)   # of loader.state_dict() after the last batch that was used

    Args:
        rows: of `load_pretraining_dataset(streaming=True)`.
        processor, augmentation: as [`TwoViewDataset`]; rows are augmented by (seed, epoch, `frame_id`, how many came
            before in the epoch), so that a mixture's small source gives other views each time.
        seed: of order and augmentation.
        batch_size, collate: rows of a batch, and what makes a batch of them.
        num_workers: at most; a process cannot use more than it has shards.
        process_index, num_processes: this process reads its part.
        shuffle_buffer: rows of a block, which are shuffled among themselves, fewer where they would take more than
            512 MB; 1 keeps their order in a shard.
        on_bad_row: "error", or "skip" to log and leave out what cannot be used.

    Returns:
        A `torchdata.stateful_dataloader.StatefulDataLoader`: iterate it, move batches to the device yourself.

    Raises:
        SimIPUError: torchdata is not installed, or datasets is older than 5.1, or there are fewer shards than
            processes.
    """
    if tuple(map(int, datasets.__version__.split(".")[:2])) < (5, 1):
        raise SimIPUError(
            f"streaming needs datasets >= 5.1, found {datasets.__version__}: older versions do not resume exactly"
        )
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise SimIPUError("streaming needs torchdata: pip install 'simipu-hf[streaming]'") from error
    if rows.num_shards < num_processes:
        raise SimIPUError(
            f"streaming: expected at least one shard for each of {num_processes} processes, found {rows.num_shards}: "
            "write a multiple of that with simipu-hf data convert --num_shards"
        )
    if rows.num_shards % num_processes:
        logger.warning(
            f"streaming: {rows.num_shards} shards are no multiple of {num_processes} processes, so each process reads "
            "all rows and uses its part of them"
        )
    own = split_dataset_by_node(rows, process_index, num_processes) if num_processes > 1 else rows
    encoded = undecoded(own.select_columns(REQUIRED_COLUMNS))
    stream = TwoViewStream(encoded, processor, augmentation, seed, max(1, shuffle_buffer), on_bad_row)
    workers = min(num_workers, max(1, rows.num_shards // num_processes))
    if workers < num_workers:
        logger.warning(f"streaming: {workers} of {num_workers} data-loading workers have shards to read")
    return StatefulDataLoader(stream, batch_size, num_workers=workers, collate_fn=collate, drop_last=True)


@dataclass(eq=False, repr=False)
class TwoViewStream(torch.utils.data.IterableDataset):
    """Samples of `two_view_sample` without end, with `state_dict` and `load_state_dict`; see `stream_two_views`."""

    rows: datasets.IterableDataset
    processor: SimIPUProcessor
    augmentation: TwoViewAugmentation
    seed: int
    block_size: int
    on_bad_row: str

    def __post_init__(self) -> None:
        self._state: dict[str, Any] = {"epoch": 0, "rows": None, "done": 0, "count": 0}

    def state_dict(self) -> dict[str, Any]:
        """Where the next sample comes from."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = dict(state)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        used = self._state["done"] > 0  # in this epoch, before it was interrupted
        while True:
            for row in self._rows_of_epoch(self._state["epoch"]):
                sample = self._sample(row)
                if sample is not None:
                    used = True
                    yield sample
            if not used:
                raise SimIPUError("streaming: an epoch without one row that can be used")
            used = False

    def _rows_of_epoch(self, epoch: int) -> Iterator[Mapping[str, Any]]:
        """Rows from the state on; before each is handed out, the state is what comes after it."""
        rows = self.rows.shuffle(seed=zlib.crc32(f"{self.seed}/{epoch}".encode()), **SHARDS_ONLY)
        if self._state["rows"] is not None:
            rows.load_state_dict(self._state["rows"])
            datasets.logging.get_logger("datasets.iterable_dataset").addFilter(_is_not_about_the_buffer)
        reader, block_start, count = iter(rows), self._state["rows"], self._state["count"]
        while True:
            done = self._state["done"]
            block, is_last = self._next_block(reader)
            names = "/".join(str(row["frame_id"]) for row in block)
            order = np.random.default_rng([self.seed, epoch, zlib.crc32(names.encode())]).permutation(len(block))
            for place in range(done, len(block)):
                count += 1
                self._state = {"epoch": epoch, "rows": block_start, "done": place + 1, "count": count}
                yield block[order[place]]
            if is_last:
                self._state = {"epoch": epoch + 1, "rows": None, "done": 0, "count": 0}
                return
            block_start = rows.state_dict()
            self._state = {"epoch": epoch, "rows": block_start, "done": 0, "count": count}

    def _next_block(self, reader: Iterator[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], bool]:
        """The next rows, and whether there are no more behind them."""
        block, size = [], 0
        for row in reader:
            block.append(row)
            image = row["image"].get("bytes") if isinstance(row["image"], dict) else None
            size += sum(len(data) for data in (row["points"], image) if isinstance(data, bytes))
            if len(block) == self.block_size or size >= BLOCK_BYTES:
                return block, False
        return block, True

    def _sample(self, row: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
        index = zlib.crc32(f"{row['frame_id']}/{self._state['count']}".encode())
        place = {"seed": self.seed, "epoch": self._state["epoch"], "index": index}
        try:
            return sample_row(row, self.processor, self.augmentation, **place)
        except SimIPUError as error:
            if self.on_bad_row != "skip":
                raise
            logger.warning(f"left out: {error}")
            return None


def _is_not_about_the_buffer(record: logging.LogRecord) -> bool:
    """`datasets` warns of rows in a shuffle buffer, which are lost on resuming; one of size 1 holds none."""
    return "shuffle buffer" not in record.getMessage()
