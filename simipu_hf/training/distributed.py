"""What several processes need beyond accelerate: agreement on errors, on stopping, on non-finite values."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from simipu_hf.errors import SimIPUError, TrainingInterrupted, first_line
from simipu_hf.machine import available_processors

from .arguments import RunArguments

T = TypeVar("T")


def create_accelerator(arguments: RunArguments) -> Accelerator:
    """The accelerator of a run; it writes nothing yet. The flags count, not the launcher's environment.

    Raises:
        SimIPUError: a launch gone wrong.
    """
    output_dir = arguments.output_dir
    has_mps = torch.backends.mps.is_available()  # Apple's GPUs have no float64, which the geometry takes
    # of an earlier run in this process, whose precision it would keep, and whose device
    AcceleratorState._reset_state(reset_partial_state=has_mps)
    accelerator = Accelerator(
        cpu=has_mps,
        mixed_precision=arguments.mixed_precision,
        dynamo_backend="no",
        # the plugin, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS overrides the plain argument
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=arguments.gradient_accumulation_steps),
        step_scheduler_with_optimizer=False,
        log_with=arguments.trackers() or None,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=str(Path(output_dir) / "logs")),
        # the others wait while the main process writes checkpoints and the final folder, on a slow disk for long
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    check_launch(accelerator)
    return accelerator


@contextmanager
def kept_session() -> Iterator[None]:
    """A run leaves what a notebook has set of accelerate and transformers as it was: the precision and accumulation of
    its own `Accelerator`, and progress bars, of which a run shows one alone."""
    kept = [AcceleratorState, GradientState, *([PartialState] if torch.backends.mps.is_available() else [])]
    states = [(state, dict(state._shared_state)) for state in kept]
    has_bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        for state, before in states:
            state._shared_state.clear()
            state._shared_state.update(before)
        if has_bars:
            enable_progress_bar()


def choose_device(device: str | None) -> torch.device:
    """The device named, or CUDA where there is one; a GPU becomes the current one, which PyTorch's timers wait for."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, dtype=torch.float64, device=chosen)  # the geometry takes it; MPS, without, is untested
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SimIPUError(f"--device {device}: {first_line(error)}") from error
    if chosen.type == "cuda" and chosen.index is not None:  # without a number it is the current one
        torch.cuda.set_device(chosen)
    return chosen


def check_precision(precision: str) -> None:
    """Raises a `SimIPUError` for a precision that this device lacks, or where the launcher was given another one."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise SimIPUError(
            f"--mixed_precision {precision}: accelerate launch, or its configuration, asks for {launched}: give the "
            f"flag to this command as well, or --mixed_precision {precision} to the launcher"
        )
    if precision == "fp16" and not torch.cuda.is_available():
        raise SimIPUError("--mixed_precision fp16 needs a GPU: without one PyTorch would compute in full precision")
    if (
        precision == "bf16"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise SimIPUError(f"--mixed_precision bf16: {torch.cuda.get_device_name()} does not have it; use fp16")


def recompute_activations(model: Any) -> None:
    """Gradient checkpointing of a model's image encoder; a `SimIPUError` where timm does not have it."""
    try:
        model.gradient_checkpointing_enable()
    except (AttributeError, AssertionError) as error:
        architecture = model.config.image_encoder_config.architecture
        raise SimIPUError(f"--gradient_checkpointing: timm does not support it for {architecture}") from error


def compile_image_encoder(model: Any) -> None:
    """`torch.compile` of what the model calls of its image encoder; the point branch's index operations gain nothing
    from it."""
    encoder = model.simipu.image_encoder
    encoder.forward_intermediates = torch.compile(encoder.forward_intermediates)


def check_launch(accelerator: Accelerator) -> None:
    """Refuse launches that start other processes than they say, or that shard the model; a single CPU process that
    `accelerate launch` started gets every core that it may use."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise SimIPUError(
            f"the launcher started {launched} processes but accelerate joined {accelerator.num_processes}: each would "
            "train alone into the same folder. Without a GPU, launch with ACCELERATE_USE_CPU=true accelerate launch "
            f"--multi_gpu --num_processes {launched}"
        )
    strategy = accelerator.distributed_type.value
    if strategy not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU"):
        raise SimIPUError(f"{strategy} is not supported: launch with plain data parallelism (--multi_gpu)")
    # the launcher sets it to 1 unless it is told otherwise, which suits one process per core
    one_thread = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if one_thread and accelerator.num_processes == 1 and accelerator.device.type == "cpu":
        torch.set_num_threads(available_processors())


def on_main_process(accelerator: Accelerator, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `function` on the main process alone; every process gets its result, or its `SimIPUError`.

    Without the second half the other processes would wait for a main process that has given up.
    """
    result = on_every_process(lambda: function(*args, **kwargs) if accelerator.is_main_process else None)
    return cast("T", broadcast_object_list([result])[0])


def on_every_process(function: Callable[[], T]) -> T:
    """Call `function` on every process; where one fails, all of them end with its `SimIPUError`.

    Else the others would go on to wait for it, and blame what they were doing when it ended.
    """
    result, failure = None, None
    try:
        result = function()
    except SimIPUError as error:
        failure = error
    messages = gather_object([failure and str(failure)])
    if any(messages):
        raise failure or SimIPUError(next(filter(None, messages)))
    return cast("T", result)


class SharedFlags:
    """Flags that any process may raise in a step and that all processes see together, one step later.

    flags.put(step, not_finite=~loss.isfinite(), stop=stop.requested)
    flags.get()             # of the step before: the values have arrived, nothing waits for the device
    flags.get(wait=True)    # of this step too

    Reading this step's values at once would stop the host until the device has finished the step. On the CPU there is
    nothing to wait for, and they are read at once.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._pending: list[tuple[int, list[str], torch.Tensor, torch.Event | None]] = []
        self._raised: dict[str, int] = {}

    def put(self, step: int, **flags: torch.Tensor | bool) -> None:
        """Start to exchange the flags of `step`. Every process calls this with the same names."""
        device = self.accelerator.device
        values = torch.stack(
            [
                flag.float() if isinstance(flag, torch.Tensor) else torch.full((), float(flag), device=device)
                for flag in flags.values()
            ]
        )
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(values)
        arrived = None
        if device.type != "cpu":
            values = values.to("cpu", non_blocking=True)  # into pinned memory
            arrived = torch.Event(device)
            arrived.record()
        self._pending.append((step, list(flags), values, arrived))

    def get(self, wait: bool = False) -> dict[str, int]:
        """Name -> the first step in which the flag was raised, for the flags that were raised so far."""
        late = 0 if wait or self.accelerator.device.type == "cpu" else 1
        while len(self._pending) > late:
            step, names, values, arrived = self._pending.pop(0)
            if arrived is not None:
                arrived.synchronize()
            for name, value in zip(names, values.tolist(), strict=True):
                if value:
                    self._raised.setdefault(name, step)
        return self._raised


class StopRequest:
    """Graceful preemption: `with StopRequest() as stop:` and look at `stop.requested` after every step.

    The first Ctrl-C or SIGTERM only sets `requested`, so that the step can be finished and saved; a second Ctrl-C
    interrupts at once. Outside the main thread, where Python allows no handlers, nothing is ever requested.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self.signal = signal.SIGTERM  # where another process received it
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def interruption(self, step: int, last_step: int, saved: Path) -> TrainingInterrupted:
        """Says how to go on, with the exit code that a shell gives a process ended by that signal."""
        return TrainingInterrupted(
            f"stopped by {self.signal.name} after step {step} of {last_step}, saved {saved}. "
            "Continue with the same command and --resume_from_checkpoint latest",
            exit_code=128 + self.signal,
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self.signal = signal.Signals(number)
