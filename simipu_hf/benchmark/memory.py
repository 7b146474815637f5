"""Peak memory of functions.

On CUDA it is what PyTorch allocates. On the CPU it is the growth of resident memory, which includes what NumPy and
compiled kernels allocate; it is measured in a process of its own, whose allocator gives back what is freed: freed
blocks that it kept would count as needed, or serve a later call unseen. Only Linux tells.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROCESS = Path("/proc/self")


def peak_memories(module: str, arguments: dict[str, Any], device: torch.device) -> dict[str, int]:
    """Bytes that functions need at their peak, beyond what is held before the call.

    Args:
        module: name of a module with `memory_functions(**arguments) -> {name: function}`.
        arguments: tensors and plain values.
        device: where the functions run.

    Returns:
        Bytes by name; nothing where the system does not tell.
    """
    if device.type == "cuda":
        return _measure(module, arguments, device)
    if not (PROCESS / "clear_refs").exists():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        torch.save({**arguments, "threads": torch.get_num_threads()}, Path(folder, "arguments.pt"))
        environment = {
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": str(2**16),  # glibc maps larger blocks and unmaps them when they are freed
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        program = f"import sys; from {__name__} import _main; _main(*sys.argv[1:])"
        subprocess.run([sys.executable, "-c", program, module, folder], env=environment, check=True)
        return json.loads(Path(folder, "peaks.json").read_text(encoding="utf-8"))


def _measure(module: str, arguments: dict[str, Any], device: torch.device) -> dict[str, int]:
    functions = importlib.import_module(module).memory_functions(**arguments)
    growth = _growth_on_cuda if device.type == "cuda" else _growth_of_resident_memory
    peaks = {}
    for name, function in functions.items():
        function()  # what is set up once, and compiled
        gc.collect()
        peaks[name] = growth(function)
    return peaks


def _growth_on_cuda(function: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def _growth_of_resident_memory(function: Callable[[], Any]) -> int:
    (PROCESS / "clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    held = _resident_bytes("VmRSS")
    function()
    return max(0, _resident_bytes("VmHWM") - held)


def _resident_bytes(field: str) -> int:
    lines = (PROCESS / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _main(module: str, folder: str) -> None:
    arguments = torch.load(Path(folder, "arguments.pt"), weights_only=True)
    torch.set_num_threads(arguments.pop("threads"))
    peaks = _measure(module, arguments, torch.device("cpu"))
    Path(folder, "peaks.json").write_text(json.dumps(peaks), encoding="utf-8")
