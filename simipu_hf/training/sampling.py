"""Which rows make which batch, and the loaders that make them."""

import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from simipu_hf.data.mixture import Mixture
from simipu_hf.data.overlap import rows_fingerprint
from simipu_hf.data.streaming import stream_two_views
from simipu_hf.data.two_views import TwoViewAugmentation, TwoViewCollator, TwoViewDataset
from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

from .arguments import PreTrainingArguments
from .distributed import StopRequest
from .run_folder import short_digest

# Another number wherever the same rows and seed give another run (order, drawn numbers, inputs, targets): no run and
# no comparison goes on across that.
TRAINING_VERSION = 5


@dataclass
class Steps:
    """Optimizer steps, counted from 1: those after `first` are to be taken, up to `last`."""

    first: int
    last: int

    def is_due(self, step: int, every: int) -> bool:
        """Every so many steps (never where that is 0), and at the end."""
        return step == self.last or (every > 0 and step % every == 0)


class StoredBatches:
    """The training batches of this process, of rows on the disk.

    Where a run stands in them is nothing but the step; their state is which rows were left out.
    """

    def __init__(self, accelerator: Accelerator, arguments: PreTrainingArguments, dataset: TwoViewDataset) -> None:
        self.dataset = dataset
        self.collate = TwoViewCollator(dataset.processor.image_processor.pad_size_divisor)
        self.pin_memory = accelerator.device.type != "cpu"
        self.num_workers = arguments.dataloader_num_workers
        self.sampler = GlobalBatchSampler(
            len(dataset),
            arguments.per_device_train_batch_size,
            accumulation_steps=arguments.gradient_accumulation_steps,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            seed=arguments.seed,
        )
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.identity: dict[str, Any] = {"data_fingerprint": rows_fingerprint(dataset.rows)}

    def loader(self, first_step: int, last_step: int) -> DataLoader:
        """One loader for the whole run: its workers live through all epochs."""
        self.sampler.first_step, self.sampler.last_step = first_step, last_step
        return create_loader(self.dataset, self.sampler, self.collate, self.num_workers, self.pin_memory)

    def example(self) -> dict[str, torch.Tensor]:
        """A first batch, to try."""
        return self.collate([self.dataset[key] for key in self.sampler.step_keys(0)[0]])

    def frame_ids(self, step: int) -> list[str]:
        """The rows of this process in `step`, counted from 1."""
        keys = [key for batch in self.sampler.step_keys(step - 1) for key in batch]
        mixture = self.dataset.mixture
        rows = [index if mixture is None else mixture.row(epoch, index) for epoch, index in keys]
        return self.dataset.rows.select_columns("frame_id")[rows]["frame_id"]  # this does not decode images

    def state_dict(self) -> dict[str, Any]:
        return {"bad_rows": self.dataset.bad_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.bad_rows = state["bad_rows"]


class StreamedBatches:
    """The training batches of this process, of rows that are read as they are needed."""

    steps_per_epoch = 0  # not known

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: PreTrainingArguments,
        rows: datasets.IterableDataset,
        processor: SimIPUProcessor,
        augmentation: TwoViewAugmentation,
        mixture: Mixture | None = None,
    ) -> None:
        sources = ("dataset_name", "data_dir", "train_split", "dataset_config_name", "validation_share")
        self.identity: dict[str, Any] = {
            "stream": short_digest([getattr(arguments, name) for name in sources]),
            # the order of a source that grew is another one
            "num_shards": rows.num_shards if mixture is None else list(mixture.sizes),
            # its state belongs to one process and its workers
            "num_processes": accelerator.num_processes,
            "num_workers": arguments.dataloader_num_workers,
        }
        self.create_loader = functools.partial(
            stream_two_views,
            rows,
            processor,
            augmentation,
            seed=arguments.seed,
            batch_size=arguments.per_device_train_batch_size,
            collate=TwoViewCollator(processor.image_processor.pad_size_divisor),
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            on_bad_row=arguments.on_bad_row,
        )
        self.stream = self.create_loader(num_workers=arguments.dataloader_num_workers)
        self.stream.worker_init_fn = quiet_worker
        self.stream.pin_memory = accelerator.device.type != "cpu"

    def loader(self, first_step: int, last_step: int) -> DataLoader:
        return self.stream

    def example(self) -> dict[str, torch.Tensor]:
        return next(iter(self.create_loader(num_workers=0)))

    def frame_ids(self, step: int) -> list[str]:
        return []  # not known

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


@dataclass(eq=False)
class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of `(epoch, row)` keys for one process, from optimizer step `first_step` to `last_step`.

    Every epoch is one permutation of the rows, drawn from (seed, epoch). It is cut into global micro-batches of
    `batch_size * num_processes` rows, of which process r takes the r-th part; so two processes with B rows see,
    together, what one process with 2B rows sees. Rows that do not fill an optimizer step wait for the next epoch.
    Carrying the epoch in the key keeps augmentation a pure function of (seed, epoch, row) even in workers that
    live for the whole run, and makes the position in the data nothing but the step.

    Args:
        batch_size: rows per process and micro-batch.
        accumulation_steps: micro-batches per optimizer step.
        first_step, last_step: optimizer steps to serve, the last one excluded.

    Raises:
        SimIPUError: fewer rows than one optimizer step takes.
    """

    num_rows: int
    batch_size: int
    _: KW_ONLY
    accumulation_steps: int = 1
    num_processes: int = 1
    process_index: int = 0
    seed: int = 0
    first_step: int = 0
    last_step: int = 1

    def __post_init__(self) -> None:
        rows_per_step = self.batch_size * self.num_processes * self.accumulation_steps
        if self.num_rows < rows_per_step:
            raise SimIPUError(
                f"the data set has {self.num_rows} rows, but one optimizer step takes {rows_per_step} "
                f"({self.batch_size} per process x {self.num_processes} processes x {self.accumulation_steps} "
                "accumulation steps): lower --per_device_train_batch_size or --gradient_accumulation_steps"
            )
        self.steps_per_epoch = self.num_rows // rows_per_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.last_step):
            yield from self.step_keys(step)

    def step_keys(self, step: int) -> list[list[tuple[int, int]]]:
        """This process's micro-batches of optimizer step `step` (counted from 0)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        rows = permutation(self.seed, epoch, self.num_rows)
        first = step_in_epoch * self.accumulation_steps * self.num_processes + self.process_index
        starts = ((first + k * self.num_processes) * self.batch_size for k in range(self.accumulation_steps))
        return [[(epoch, row) for row in rows[start : start + self.batch_size]] for start in starts]


@functools.lru_cache(maxsize=1)
def permutation(seed: int, epoch: int, num_rows: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows).tolist()


def create_loader(
    dataset: Dataset, batch_sampler: Any, collate: Callable[..., Any], num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """A loader whose workers live for the whole run and leave signals and random states alone."""
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=quiet_worker,
        generator=torch.Generator(),  # or it would draw from the global random state
    )


def quiet_worker(worker: int) -> None:
    """Signals to the whole process group are for the main process, which needs its workers to finish the step."""
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


@contextmanager
def iterate(loader: DataLoader) -> Iterator[Iterator[Any]]:
    """`with iterate(loader) as batches`: ends the workers also after an exception, for they ignore signals."""
    batches = iter(loader)
    try:
        yield batches
    finally:
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


def seed_micro_batch(seed: int, index: int, process_index: int) -> None:
    """Make what the model draws (drop path) a pure function of (seed, micro-batch, process), as the rows are.

    So a checkpoint needs no random states, and evaluation cannot disturb them.
    """
    # hashed to 32 bits: PyTorch's generator on the CPU reads no more of a seed
    torch.manual_seed(int(np.random.SeedSequence([seed, process_index, index]).generate_state(1)[0]))
