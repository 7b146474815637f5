"""Where the numbers of a run go: `metrics.jsonl`, the trackers, the progress bar."""

import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from simipu_hf.errors import SimIPUError

METRICS_FILE = "metrics.jsonl"
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "aim", "clearml", "swanlab")


class MetricsFile:
    """Appends one JSON object per line and flushes it to the system, so that a kill loses none.

    Opened at step s it first drops what an interrupted run had written beyond s, and a line cut short, so that no
    step appears twice after a resume.
    """

    def __init__(self, path: Path, step: int = 0):
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step and path.exists() else []
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        aside.replace(path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        # JSON has no NaN: what is not a finite number is written as null
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._stream.write(json.dumps(finite) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that was cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def check_trackers(names: list[str]) -> list[str]:
    """`names` without `"none"`.

    Raises:
        SimIPUError: an unknown tracker, or one that is not installed (accelerate would drop it silently).
    """
    chosen = [name for name in names if name != "none"]
    for name in chosen:
        if name not in TRACKERS:
            raise SimIPUError(f"--report_to {name}: unknown tracker; choose from {', '.join(TRACKERS)}, none")
        if importlib.util.find_spec(name) is None:
            raise SimIPUError(
                f"--report_to {name}: the package is not installed; pip install {name}, or choose another"
            )
    return chosen


class RunLogger:
    """Collects the values of every step, and every `logging_steps` writes their means.

    The unfinished window is part of a checkpoint (`state_dict`), so that a resumed run logs what the uninterrupted
    one would have. Values are expected to be equal on all processes; only the main process writes.

    Args:
        accelerator: its trackers are used and closed.
        output_dir: of the run; `metrics.jsonl` lies there.
        total_steps: for the progress bar.
        first_step: where the run starts or resumes.
        logging_steps: optimizer steps per written line.
        rows_per_step: rows of all processes together in one optimizer step.
        description: of the progress bar.
        show: which values the bar shows, as name -> label.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        *,
        total_steps: int,
        first_step: int,
        logging_steps: int,
        rows_per_step: int,
        description: str,
        show: dict[str, str],
    ):
        self.accelerator = accelerator
        self.logging_steps = logging_steps
        self.rows_per_step = rows_per_step
        self.show = show
        self.main = accelerator.is_main_process
        self.file = MetricsFile(output_dir / METRICS_FILE, first_step) if self.main else None
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc=description, unit="step", disable=not self.main, smoothing=0.1
        )
        self._sums: dict[str, float] = {}
        self._count = 0
        self._reset_clock()

    def log_step(self, step: int, values: dict[str, float], data_wait: float) -> None:
        """Take the `values` of optimizer step `step` (counted from 1) and the seconds it waited for data."""
        self._data_wait += data_wait
        self._timed_steps += 1
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self.bar.update()
        if step % self.logging_steps == 0 or step == self.bar.total:
            means = {name: total / self._count for name, total in self._sums.items()}
            self.write(step, {**means, **self._throughput()})
            self.bar.set_postfix({label: f"{means[n]:.3f}" for n, label in self.show.items() if n in means})
            self._sums, self._count = {}, 0
            self._reset_clock()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one line to `metrics.jsonl` and to the trackers."""
        if self.file is not None:  # the main process's
            self.file.write({"step": step, **values})
            self.accelerator.log(values, step=step)

    def message(self, text: str) -> None:
        """Print above the progress bar, on the main process."""
        if self.main:
            tqdm.write(text)

    def pause_clock(self) -> "_Paused":
        """`with logger.pause_clock():` keeps evaluation and saving out of the rate."""
        return _Paused(self)

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
        for tracker in self.accelerator.trackers:  # not end_training: that also takes the process group down
            tracker.finish()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._count = dict(state["sums"]), state["count"]

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


class _Paused:
    def __init__(self, logger: RunLogger):
        self.logger = logger

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.logger._paused += time.perf_counter() - self._start


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to one level with dotted names, and what trackers cannot hold to text."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
