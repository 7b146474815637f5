"""Where the numbers of a run go: `metrics.jsonl`, the trackers, the progress bar, and warnings."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers.utils import flatten_dict

from simipu_hf.errors import SimIPUError
from simipu_hf.files import atomic_write, to_json

from .arguments import PreTrainingArguments

METRICS_FILE = "metrics.jsonl"
SHOWN = {"intra_modal_loss": "intra", "inter_modal_loss": "inter", "inter_modal_chance": "chance"}  # by the bar
T = TypeVar("T")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; one that was cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def append_metrics(path: Path, values: Mapping[str, Any]) -> None:
    """Add a line to a `metrics.jsonl`; `values` hold the step."""
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(to_json(values, indent=None) + "\n")
    except OSError as error:
        raise SimIPUError(
            f"{path}: step {values['step']} cannot be written ({error}); make room, and go on from the last "
            "checkpoint with --resume_from_checkpoint latest"
        ) from error


def cut_metrics(path: Path, step: float) -> None:
    """Drop the lines beyond `step`, and a line cut short, so that no step appears twice after a resume."""
    kept = [line for line in read_metrics(path) if line.get("step", 0) <= step] if step and path.exists() else []
    with atomic_write(path) as stream:
        stream.writelines(json.dumps(line) + "\n" for line in kept)


class RunLogger:
    """Sums up the values of every step on the device, and writes their means every `logging_steps`.

    Nothing is read from the device in between. The unfinished window is part of a checkpoint (`state_dict`), so that
    a resumed run logs what the uninterrupted one would have. Only the main process writes.

    Args:
        accelerator: its trackers are started, used and closed.
        first_step, last_step: where the run starts or resumes, and ends.
        record: what the trackers are told beside the arguments.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: PreTrainingArguments,
        first_step: int,
        last_step: int,
        record: Mapping[str, Any],
    ) -> None:
        self.accelerator = accelerator
        rows = arguments.per_device_train_batch_size * accelerator.num_processes
        self.rows_per_step = rows * arguments.gradient_accumulation_steps
        self.main = accelerator.is_main_process
        purge = {"tensorboard": {"purge_step": first_step + 1}}  # also what a start without a checkpoint wrote
        told = flatten_dict({"arguments": arguments.to_dict(), **record})
        config = {n: v if isinstance(v, (int, float, str, bool)) else str(v) for n, v in told.items()}
        accelerator.init_trackers("pretrain", config=config, init_kwargs=purge)
        self.file = Path(arguments.output_dir) / METRICS_FILE
        if self.main:
            cut_metrics(self.file, first_step)
        self.bar = tqdm(
            total=last_step, initial=first_step, unit="step", disable=not self.main, smoothing=0.1, desc="pretrain"
        )
        self.watch = Watch(lambda text: self.message(f"warning: {text}"))
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._reset_clock()

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """`batches`, with the time spent waiting for each counted."""
        started = time.perf_counter()
        for batch in batches:
            self._data_wait += time.perf_counter() - started
            yield batch
            started = time.perf_counter()

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add scalar tensors to the running means, without reading them."""
        for name, value in values.items():
            wide = value.detach().to(torch.float64)
            self._sums[name] = self._sums[name] + wide if name in self._sums else wide
            self._counts[name] = self._counts.get(name, 0) + 1

    def not_finite(self) -> dict[str, torch.Tensor]:
        """Name -> a flag on the device, whether a NaN or an infinity was added since the last written line.

        Without gradient norms in fp16: the loss scaler finds its scale by overflowing them.
        """
        names = [n for n in self._sums if self.accelerator.scaler is None or not n.startswith("grad_norm/")]
        return dict(zip(names, ~torch.stack([self._sums[name] for name in names]).isfinite(), strict=True))

    def step_done(self) -> None:
        self._timed_steps += 1
        self.bar.update()

    def write_means(self, step: int, values: Mapping[str, float]) -> None:
        """Write the means over all processes since the last call, the host's `values`, and the rate."""
        sums = torch.stack([self._sums[name] / self._counts[name] for name in self._sums])
        means = dict(zip(self._sums, self.accelerator.reduce(sums, reduction="mean").tolist(), strict=True))
        throughput = self._throughput()
        self.write(step, {**means, **values, **throughput})
        self.watch.look(step, means, throughput["data_wait_share"])
        self.bar.set_postfix({label: f"{means[n]:.3f}" for n, label in SHOWN.items() if n in means})
        self._sums, self._counts = {}, {}
        self._reset_clock()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line to `metrics.jsonl` and to the trackers."""
        if self.main:
            append_metrics(self.file, {"step": step, **values})
            self.accelerator.log(dict(values), step=step)

    def message(self, text: str) -> None:
        """Print above the progress bar, on the main process."""
        if self.main:
            tqdm.write(text)

    @contextmanager
    def paused_clock(self) -> Iterator[None]:
        """Keeps evaluation and saving out of the rate."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def close(self) -> None:
        self.bar.close()
        for tracker in self.accelerator.trackers:  # not end_training: that also takes the process group down
            tracker.finish()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: value.cpu() for name, value in self._sums.items()}, "counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: value.to(self.accelerator.device) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])

    def _reset_clock(self) -> None:
        self._start, self._paused, self._data_wait, self._timed_steps = time.perf_counter(), 0.0, 0.0, 0

    def _throughput(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._start - self._paused, 1e-9)
        values = {
            "rows_per_second": self._timed_steps * self.rows_per_step / elapsed,
            "seconds_per_step": elapsed / max(self._timed_steps, 1),
            "data_wait_share": min(self._data_wait / elapsed, 1.0),
            "memory_gb": psutil.Process().memory_info().rss / 1e9,
        }
        if self.accelerator.device.type == "cuda":
            values["device_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return values


class Watch:
    """Early warning of what goes wrong quietly in contrastive training, once per kind until it recovers.

    - a loss within `CHANCE_MARGIN` nats of the random-guess level, after the first `GRACE` steps,
    - embeddings whose standard deviation over the batch vanishes (collapse),
    - a device that spends more than `MAX_DATA_WAIT` of its time waiting for data,

    each where it holds on every logged line over `patience` steps.
    """

    GRACE, CHANCE_MARGIN, MIN_SPREAD, MAX_DATA_WAIT = 200, 0.1, 0.05, 0.5

    def __init__(self, warn: Callable[[str], None], patience: int = 100) -> None:
        self.warn = warn
        self.patience = patience
        self._since: dict[str, float] = {}  # name -> the first line on which it held; infinity where that was told

    def look(self, step: int, means: Mapping[str, float], data_wait_share: float) -> None:
        """`means` up to `step`, since the last call; they may hold `X_loss` with `X_chance`, and `X_spread`."""
        found = {}
        for name, value in means.items():
            kind, _, quantity = name.rpartition("_")
            chance = means.get(f"{kind}_chance")
            if quantity == "loss" and chance is not None and step > self.GRACE and chance - value < self.CHANCE_MARGIN:
                found[name] = (
                    f"the {kind.replace('_', '-')} loss is still at chance level ({chance:.2f}): nothing is learnt "
                    "there. Check the learning rates, and with simipu-hf data inspect that points and image belong "
                    "together"
                )
            if quantity == "spread" and value < self.MIN_SPREAD:
                found[name] = (
                    f"the {kind} features are collapsing: their spread is {value:.3f} (1 is uniform, 0 all alike). "
                    "Lower the learning rate"
                )
        if data_wait_share > self.MAX_DATA_WAIT:
            found["data_wait"] = (
                f"{data_wait_share:.0%} of the time is spent waiting for data; raise --dataloader_num_workers"
            )
        self._since = {name: self._since.get(name, step) for name in found}
        for name, text in found.items():
            if step - self._since[name] >= self.patience:
                self._since[name] = math.inf
                self.warn(f"step {step}: {text}")


@torch.no_grad()
def feature_spread(embeds: torch.Tensor) -> torch.Tensor:
    """How different the rows of `embeds` (..., D) are: the standard deviation of the unit vectors' coordinates,
    averaged over D and times sqrt(D). 1 for directions spread evenly, 0 where all rows point the same way."""
    unit = torch.nn.functional.normalize(embeds.detach().float().flatten(0, -2), dim=-1)
    return unit.std(0).mean() * math.sqrt(unit.shape[-1])
