"""How the benchmarks measure time and memory, and what they return."""

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas
import torch
from torch.utils.benchmark import Measurement, Timer

from simipu_hf.training.run_folder import package_version

Function = Callable[[], Any]
MIN_RUN_TIME = 0.1  # seconds of one measurement; a function that takes longer runs once
PACKAGES = ("torch", "numba", "scipy", "triton", "pillow", "kornia-rs")


@dataclass
class BenchmarkResult:
    """What a benchmark found; `print` shows tables, `to_dict` gives data.

    Args:
        name: which benchmark.
        settings: what was measured, and on which data.
        rows: one measurement each; `*seconds` are medians, `*bytes` peak memory beyond what was held before.
        summary: what the rows amount to.
        machine: what it ran on.
    """

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: machine_facts())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        table = pandas.DataFrame(self.rows).to_string(index=False, na_rep="", float_format="{:.4g}".format)
        return f"{self.name}. {_facts(self.settings)}\n{_facts(self.machine)}\n\n{table}\n\n{_facts(self.summary)}"


def median_seconds(functions: Mapping[str, Function], repeats: int) -> dict[str, float]:
    """Times functions in turn, so that whatever else the machine does affects all of them alike.

    `torch.utils.benchmark` runs each once before it counts, and waits for CUDA.
    """
    threads = torch.get_num_threads()
    timers = {name: Timer("run()", globals={"run": run}, num_threads=threads) for name, run in functions.items()}
    measured: dict[str, list[Measurement]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, timer in timers.items():
            measured[name].append(timer.blocked_autorange(min_run_time=MIN_RUN_TIME))
    return {name: Measurement.merge(measurements)[0].median for name, measurements in measured.items()}


def peak_bytes(function: Function, device: torch.device) -> int | None:
    """Memory that `function` needs at its peak, beyond what is held before; `None` where the system cannot tell.

    On CUDA it is what PyTorch allocates. On the CPU it is the growth of resident memory, which only Linux tells, so
    that what NumPy and compiled kernels allocate counts as well.
    """
    process = Path("/proc/self")
    function()  # what is set up once, and compiled
    gc.collect(1)  # cycles that the call left; the whole heap would take a second
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - held
    if sys.platform != "linux" or not (process / "clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # blocks that were freed would serve the call unseen
    (process / "clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    held = _resident_bytes(process, "VmRSS")
    function()
    return max(0, _resident_bytes(process, "VmHWM") - held)


def _resident_bytes(process: Path, name: str) -> int:
    lines = (process / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def machine_facts() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{package: package_version(package) for package in PACKAGES},
    }


def _facts(facts: dict[str, Any]) -> str:
    values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in facts.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
