"""The training loop that pre-training and depth fine-tuning share: step, watch, log, evaluate, save, resume.

What is trained on what comes in as a [`TrainingJob`]; everything here is about surviving and being reproducible.
"""

import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, gather_object, send_to_device
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from simipu_hf.errors import SimIPUError

from .checkpoint import (
    Checkpoint,
    check_same_run,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from .command import TrainingInterrupted, exit_code_of
from .distributed import StopRequest, check_processes, on_main_process, use_all_cores
from .metrics import RunLogger, check_trackers, flatten
from .optimization import Optimization
from .run_folder import find_checkpoint, prepare_run_folder, write_run_file
from .sampling import GlobalBatchSampler
from .watch import Watch

__all__ = [
    "Batch",
    "TrainingInterrupted",
    "TrainingJob",
    "TrainingSettings",
    "accumulate_gradients",
    "create_accelerator",
    "exit_code_of",
    "iterate",
    "move_into",
    "quiet_worker",
    "train",
]

Batch = dict[str, torch.Tensor]


@dataclass
class TrainingSettings:
    """How long, how often, and where; the fields are the flags of the same names."""

    output_dir: Path
    total_steps: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int = 1
    seed: int = 0
    dataloader_num_workers: int = 0
    logging_steps: int = 10
    eval_steps: int = 0
    checkpointing_steps: int = 500
    save_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    overwrite_output_dir: bool = False


@dataclass
class TrainingJob:
    """What is trained.

    Args:
        name: of the progress bar and the trackers' project.
        model: not yet prepared by accelerate, on any device.
        create_optimization: called with the model on its device.
        dataset: takes `(epoch, row)` keys.
        collate: samples to a batch of tensors.
        compute_loss: (model, batch) to the loss and the scalar tensors to log; a finite-ness check covers all.
        frame_ids: of the rows, for messages.
        save_model: writes weights (`model.safetensors`, the model's state-dict names), configuration, processor.
        finish: writes the final folder, given the output folder.
        evaluate: returns the values to log, on every process; `None` for no evaluation.
        identity: what must not change between a checkpoint and its resumption.
        run_record: `arguments` and `data` for `run.yaml`.
        show: logged values for the progress bar, name -> label.
        on_saved: told about every written checkpoint, on the main process.
    """

    name: str
    model: nn.Module
    create_optimization: Callable[[Any], Optimization]
    dataset: Dataset
    collate: Callable[[list[Any]], Batch]
    compute_loss: Callable[[nn.Module, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
    frame_ids: list[str]
    save_model: Callable[[Path], None]
    finish: Callable[[Path], None]
    evaluate: Callable[[], dict[str, float]] | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    run_record: dict[str, Any] = field(default_factory=dict)
    show: dict[str, str] = field(default_factory=dict)
    on_saved: Callable[[Path], Any] | None = None


def create_accelerator(
    output_dir: str | Path, *, mixed_precision: str, gradient_accumulation_steps: int, report_to: list[str]
) -> Accelerator:
    """The accelerator of a run; writes nothing yet.

    Raises:
        SimIPUError: a tracker that is not installed, a precision this device has not, or a launch gone wrong.
    """
    trackers = check_trackers(report_to)
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise SimIPUError("--mixed_precision fp16 needs a GPU: without one PyTorch would compute in full precision")
    if mixed_precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise SimIPUError(f"--mixed_precision bf16: {torch.cuda.get_device_name()} does not have it; use fp16")
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=trackers or None,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(Path(output_dir) / "logs")),
        # which parameters get no gradient depends on the encoder: stages beyond the sampled ones, unused norms
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    check_processes(accelerator)
    use_all_cores(accelerator)
    return accelerator


def train(accelerator: Accelerator, job: TrainingJob, settings: TrainingSettings) -> Path:
    """Run `job` to its last step and write the final folder.

    Returns:
        the output folder.

    Raises:
        SimIPUError: bad input, an unusable folder or checkpoint, or a loss that is no number.
        TrainingInterrupted: Ctrl-C or SIGTERM, after saving.
    """
    assert isinstance(job.dataset, Sized)
    checkpoint = _open_run(accelerator, job, settings)
    model = _prepare_model(accelerator, job.model, checkpoint)
    optimization = job.create_optimization(job.model)
    first_step = 0 if checkpoint is None else checkpoint.step
    sampler = create_sampler(accelerator, len(job.dataset), settings, first_step)
    loader = create_loader(accelerator, job, settings, sampler)
    logger = _create_logger(accelerator, job, settings, first_step)
    watch = Watch(lambda text: logger.message(f"warning: {text}"))
    try:
        with StopRequest() as stop, iterate(loader) as batches:
            if checkpoint is not None:
                _restore(checkpoint, accelerator, optimization, logger)
                logger.message(f"resumed from {checkpoint.path}")
            for step in range(first_step, settings.total_steps):
                started = time.perf_counter()
                learning_rates = optimization.learning_rates()
                values, data_wait = accumulate_gradients(accelerator, model, job.compute_loss, batches)
                values |= {f"grad_norm/{part}": norm for part, norm in optimization.gradient_norms().items()}
                values, stopping = _agree(accelerator, values, stop.requested)
                _check_finite(accelerator, step, values, sampler, job, settings)
                optimization.step()
                values |= {f"learning_rate/{part}": rate for part, rate in learning_rates.items()}
                logger.log_step(step + 1, values, data_wait)
                watch.look(step + 1, values, data_wait / (time.perf_counter() - started))

                done = step + 1 == settings.total_steps
                if job.evaluate and (_is_due(step + 1, settings.eval_steps) or (done and settings.eval_steps)):
                    with logger.pause_clock():
                        logger.write(step + 1, {f"eval/{name}": v for name, v in job.evaluate().items()})
                if done or stopping or _is_due(step + 1, settings.checkpointing_steps):
                    with logger.pause_clock():
                        saved = _save(accelerator, step + 1, job, settings, optimization, logger)
                if stopping and not done:
                    raise _interrupted(step + 1, settings, stop, saved)
    finally:
        logger.close()
    on_main_process(accelerator, job.finish, settings.output_dir)
    return settings.output_dir


def capture_random_state() -> dict[str, Any]:
    """This process's random states (Python, NumPy, PyTorch), in types that `weights_only` loading allows."""
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy_key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_rest": (numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of [`capture_random_state`]."""
    random.setstate(state["python"])
    position, has_gauss, gauss = state["numpy_rest"]
    key = state["numpy_key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def accumulate_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    compute_loss: Callable[[nn.Module, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    batches: Iterator[Batch],
) -> tuple[dict[str, float], float]:
    """Forward and backward of one optimizer step's micro-batches.

    Returns:
        the means of the scalars over the micro-batches, and the seconds spent waiting for data.
    """
    model.train()
    micro_batches = accelerator.gradient_accumulation_steps
    sums: dict[str, torch.Tensor] = {}
    data_wait = 0.0
    for micro_batch in range(micro_batches):
        started = time.perf_counter()
        batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
        data_wait += time.perf_counter() - started
        is_last = micro_batch + 1 == micro_batches
        with nullcontext() if is_last else accelerator.no_sync(model):
            loss, scalars = compute_loss(model, batch)
            with kept_running_statistics(model):
                accelerator.backward(loss)
        for name, value in scalars.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double()
    means = (torch.stack(list(sums.values())) / micro_batches).tolist()
    return dict(zip(sums, means, strict=True)), data_wait


class kept_running_statistics:  # noqa: N801 (a context manager, named like a function)
    """Keeps batch-norm buffers as they are while gradient checkpointing runs a forward again in the backward pass.

    Does nothing for a model whose image encoder does not checkpoint.
    """

    def __init__(self, model: nn.Module):
        recomputes = any(getattr(module, "grad_checkpointing", False) for module in model.modules())
        self.norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] * recomputes
        self.counters = [norm.num_batches_tracked for norm in self.norms if norm.num_batches_tracked is not None]

    def __enter__(self) -> None:
        self.momenta = [norm.momentum for norm in self.norms]
        self.counts = [counter.clone() for counter in self.counters]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, momentum in zip(self.norms, self.momenta, strict=True):
            norm.momentum = momentum
        for counter, count in zip(self.counters, self.counts, strict=True):
            counter.copy_(count)


def create_sampler(
    accelerator: Accelerator, num_rows: int, settings: TrainingSettings, first_step: int = 0
) -> GlobalBatchSampler:
    """The sampler of this process; its `steps_per_epoch` also serves to turn epochs into steps."""
    return GlobalBatchSampler(
        num_rows,
        settings.per_device_train_batch_size,
        accumulation_steps=settings.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        seed=settings.seed,
        first_step=first_step,
        last_step=settings.total_steps,
    )


def create_loader(
    accelerator: Accelerator, job: TrainingJob, settings: TrainingSettings, sampler: GlobalBatchSampler
) -> DataLoader:
    """One loader for the whole run: its workers live through all epochs."""
    return DataLoader(
        job.dataset,
        batch_sampler=sampler,
        collate_fn=job.collate,
        num_workers=settings.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=quiet_worker,
        generator=torch.Generator().manual_seed(settings.seed),  # or it would draw from the global random state
    )


def quiet_worker(worker: int) -> None:
    """Signals to the whole process group are for the main process, which needs its workers to finish the step."""
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


@contextmanager
def iterate(loader: DataLoader) -> Iterator[Iterator[Batch]]:
    """`with iterate(loader) as batches`: ends the workers whatever happens.

    Workers that ignore signals have to be told: a process that ends by an exception would wait for them for ever.
    """
    batches = iter(loader)
    try:
        yield batches
    finally:
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


def _open_run(accelerator: Accelerator, job: TrainingJob, settings: TrainingSettings) -> Checkpoint | None:
    start = settings.output_dir, settings.resume_from_checkpoint, settings.overwrite_output_dir
    path = on_main_process(accelerator, find_checkpoint, *start)
    overwrite = settings.overwrite_output_dir and settings.resume_from_checkpoint is None
    step = 0 if path is None else load_checkpoint(path).step
    on_main_process(accelerator, prepare_run_folder, settings.output_dir, step, overwrite)
    checkpoint = None if path is None else load_checkpoint(path)
    if checkpoint is not None:
        check_same_run(checkpoint.values["identity"], job.identity, checkpoint.path)
        if checkpoint.step > settings.total_steps:
            raise SimIPUError(f"{path} is beyond the last step, {settings.total_steps}: raise --max_steps")
    on_main_process(accelerator, write_run_file, settings.output_dir, **job.run_record)
    return checkpoint


def _prepare_model(accelerator: Accelerator, model: nn.Module, checkpoint: Checkpoint | None) -> nn.Module:
    if checkpoint is not None:
        try:
            model.load_state_dict(load_file(checkpoint.path / "model.safetensors"))
        except (OSError, RuntimeError) as error:
            raise SimIPUError(f"{checkpoint.path}: the weights do not fit the model ({error})") from error
    return accelerator.prepare(model)


def _create_logger(
    accelerator: Accelerator, job: TrainingJob, settings: TrainingSettings, first_step: int
) -> RunLogger:
    rows_per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    accelerator.init_trackers(
        job.name,
        config=flatten(job.run_record.get("arguments", {})),
        init_kwargs={"tensorboard": {"purge_step": first_step + 1}} if first_step else {},
    )
    return RunLogger(
        accelerator,
        settings.output_dir,
        total_steps=settings.total_steps,
        first_step=first_step,
        logging_steps=settings.logging_steps,
        rows_per_step=rows_per_step * accelerator.num_processes,
        description=job.name,
        show=job.show,
    )


def _restore(checkpoint: Checkpoint, accelerator: Accelerator, optimization: Optimization, logger: RunLogger) -> None:
    try:
        optimization.load_state_dict(checkpoint.tensors["optimization"])
    except (KeyError, ValueError, TypeError) as error:
        raise SimIPUError(f"{checkpoint.path}: the optimizer state does not fit ({error})") from error
    logger.load_state_dict(checkpoint.values["logger"])
    random_states = checkpoint.tensors["random"]
    if accelerator.process_index < len(random_states):
        restore_random_state(random_states[accelerator.process_index])


def _save(
    accelerator: Accelerator,
    step: int,
    job: TrainingJob,
    settings: TrainingSettings,
    optimization: Optimization,
    logger: RunLogger,
) -> Path:
    random_states = gather_object([capture_random_state()])

    def write() -> Path:
        path = save_checkpoint(
            settings.output_dir,
            step,
            save_model=job.save_model,
            tensors={"optimization": optimization.state_dict(), "random": random_states},
            values={"identity": job.identity, "logger": logger.state_dict()},
            total_limit=settings.save_total_limit or None,
        )
        if job.on_saved is not None:
            job.on_saved(path)
        return path

    return on_main_process(accelerator, write)


def sum_over_processes(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The element-wise sum of `values` over all processes, in float64. Every process gets the same answer."""
    if accelerator.num_processes == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(total, reduction="sum").tolist()


def _agree(accelerator: Accelerator, values: dict[str, float], stop_requested: bool) -> tuple[dict[str, float], bool]:
    """The means of `values` over all processes, and whether any of them was asked to stop."""
    *sums, stops = sum_over_processes(accelerator, [*values.values(), float(stop_requested)])
    return {name: total / accelerator.num_processes for name, total in zip(values, sums, strict=True)}, stops > 0


def _check_finite(
    accelerator: Accelerator,
    step: int,
    values: dict[str, float],
    sampler: GlobalBatchSampler,
    job: TrainingJob,
    settings: TrainingSettings,
) -> None:
    """Stop before the optimizers spread a NaN; `values` are equal on all processes, so all of them stop."""
    scaled = accelerator.scaler is not None  # the loss scaler finds its scale by overflowing gradients
    broken = [
        name
        for name, value in values.items()
        if not math.isfinite(value) and not (scaled and name.startswith("grad_norm/"))
    ]
    if not broken:
        return
    rows = [job.frame_ids[row] for batch in sampler.step_keys(step) for _, row in batch]
    kept = newest_checkpoint(settings.output_dir)
    raise SimIPUError(
        f"step {step + 1}: {', '.join(f'{name} is {values[name]}' for name in broken)}. "
        f"Rows of the step: {', '.join(gather_object(rows))}. The weights were not updated; "
        + (f"the last good checkpoint is {kept}. " if kept else "there is no checkpoint yet. ")
        + "Lower the learning rate of that part, clip with --max_grad_norm, or look at the rows"
    )


def _interrupted(step: int, settings: TrainingSettings, stop: StopRequest, saved: Path) -> TrainingInterrupted:
    return TrainingInterrupted(
        f"stopped by {stop.signal.name} after step {step} of {settings.total_steps}, saved {saved}. "
        "Continue with the same command and --resume_from_checkpoint latest",
        exit_code=128 + stop.signal,
    )


def move_into(source: Path, target: Path) -> None:
    """Move every entry of `source` into `target`, replacing what is there, and remove `source`."""
    for entry in source.iterdir():
        destination = target / entry.name
        if destination.is_dir():
            shutil.rmtree(destination)
        entry.replace(destination)
    source.rmdir()
