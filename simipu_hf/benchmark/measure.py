"""How the benchmarks measure, and what they return."""

import json
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Function = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Medians over repeats: `seconds` on the clock, `cpu_seconds` that all threads of this process worked."""

    seconds: float
    cpu_seconds: float


@dataclass
class BenchmarkResult:
    """What a benchmark found. `print` shows it as tables, `to_dict` and `save` give it as data.

    Args:
        name: which benchmark.
        settings: what was measured, and on which data.
        rows: one measurement each; the keys `part`, `backend` and `note` are text, `*seconds` are medians, `*bytes`
            memory needed beyond what was held before (None: this system cannot tell), the others plain numbers.
        summary: what the rows amount to.
        machine: what it ran on.
    """

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, json_path: str | os.PathLike) -> None:
        """Writes `to_dict()` as JSON; the file appears whole or not at all."""
        path = Path(json_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".tmp")
        aside.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(aside, path)

    def __str__(self) -> str:
        facts = [f"{self.name}. {_format_facts(self.settings)}", _format_facts(self.machine)]
        return "\n\n".join(["\n".join(facts), format_table(self.rows), _format_facts(self.summary)])


def conclude(
    name: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
    device: torch.device,
    json_path: str | os.PathLike | None,
) -> BenchmarkResult:
    """The result of a benchmark on `device`, also written to `json_path` where one is given."""
    result = BenchmarkResult(name, settings, rows, summary, machine_facts(device))
    if json_path is not None:
        result.save(json_path)
    return result


def time_interleaved(
    functions: Mapping[str, Function], device: torch.device, repeats: int = 5, warmup: int = 1
) -> dict[str, Timing]:
    """Times functions in turn, so that whatever else the machine does hits all of them alike."""
    measured: dict[str, list[Timing]] = {name: [] for name in functions}
    for repeat in range(warmup + repeats):
        for name, function in functions.items():
            synchronize(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            synchronize(device)
            timing = Timing(time.perf_counter() - start, time.process_time() - cpu_start)
            if repeat >= warmup:
                measured[name].append(timing)
    return {name: median_timing(timings) for name, timings in measured.items()}


def median_timing(timings: list[Timing]) -> Timing:
    return Timing(
        statistics.median(timing.seconds for timing in timings),
        statistics.median(timing.cpu_seconds for timing in timings),
    )


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_device(device: str | None) -> torch.device:
    """The device named, or CUDA where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    facts = {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    for package in ("torch", "numba", "scipy", "torch-quickfps", "triton"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text; a column for every key that some row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=lambda column: column == "note")  # last
    cells = [[_heading(column) for column in columns]]
    cells += [[_format_value(column, row[column]) if column in row else "" for column in columns] for row in rows]
    widths = [max(len(line[c]) for line in cells) for c in range(len(columns))]
    is_text = [column in ("part", "backend", "note") for column in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _heading(column: str) -> str:
    return column.removesuffix("_seconds").removesuffix("_bytes").replace("_", " ").replace("seconds", "time")


def _format_facts(facts: dict[str, Any]) -> str:
    line = ", ".join(f"{_heading(name)} {_format_value(name, value)}" for name, value in facts.items())
    return textwrap.fill(line, 119)


def _format_value(column: str, value: Any) -> str:
    if value is None:
        return "not available"
    if column.endswith("seconds"):
        return f"{value:.3f} s" if value >= 1 else f"{1e3 * value:.2f} ms"
    if column.endswith("bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " x ".join(str(item) for item in value)
    return str(value)
