"""Checkpoints that are complete or absent, and named when they are damaged.

`OUTPUT_DIR/checkpoint-<optimizer step>` holds whatever the model saves (`from_pretrained` reads the folder) and

- `training_state.pt`: optimizers, schedule and the logger's unfinished window, read with `weights_only=True`; those of
  fine-tuning hold the Trainer's files in its place,
- `manifest.json`: the step, what the run was (compared on resume), and the SHA-256 of every file, so that damage is
  noticed before anything is loaded.

accelerate's `save_state` writes in place and from every process; a kill or a full disk then leaves half a checkpoint.
"""

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim.lr_scheduler import LRScheduler
from transformers.utils import flatten_dict

from simipu_hf.errors import SimIPUError
from simipu_hf.files import atomic_folder
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

from .distributed import on_main_process
from .logging import RunLogger

MANIFEST = "manifest.json"
STATE_TENSORS = "training_state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    save: Callable[[Path], None],
    identity: dict[str, Any],
    total_limit: int = 0,
) -> Path:
    """Write `output_dir/checkpoint-<step>` and delete the oldest beyond `total_limit`. Main process only.

    Args:
        save: writes everything into the folder it is given.
        identity: what must be the same for a run to continue, as JSON.
        total_limit: checkpoints to keep; 0 keeps all.

    Raises:
        SimIPUError: it could not be written (full disk, no permission); earlier checkpoints are untouched.
    """
    target = output_dir / f"checkpoint-{step}"
    # a target that exists is a damaged one, or this step taken again
    with checkpoint_errors(target), atomic_folder(target, overwrite=True) as beside:
        save(beside)
        write_manifest(beside, step, identity)
    for old in list_checkpoints(output_dir)[: -total_limit if total_limit else 0]:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def write_manifest(checkpoint: Path, step: int, identity: dict[str, Any]) -> None:
    """Record every file of a checkpoint, the last thing that is written of it."""
    files = {
        file.relative_to(checkpoint).as_posix(): {"sha256": _sha256(file)}
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file()
    }
    text = json.dumps({"step": step, "identity": identity, "files": files}, indent=2)
    (checkpoint / MANIFEST).write_text(text, encoding="utf-8")


@contextmanager
def checkpoint_errors(checkpoint: Path) -> Iterator[None]:
    """Errors of the block, such as a full disk or a missing permission, name the checkpoint that it writes."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, SimIPUError) as error:
        raise SimIPUError(f"could not write checkpoint {checkpoint}: {error}. Earlier ones are untouched") from error


def resumed_step(path: Path, identity: dict[str, Any]) -> int:
    """The step of a checkpoint that the run of `identity` may go on from.

    Raises:
        SimIPUError: it is no checkpoint, is damaged, or belongs to another run; lists all that differs.
    """
    manifest = verify_checkpoint(path)
    saved, current = flatten_dict(manifest["identity"]), flatten_dict(identity)
    differing = [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, {current.get(name, 'absent')} now"
        for name in sorted({*saved, *current}, key=lambda name: (name != "kind", name))  # kind: of the command
        if saved.get(name, "absent") != current.get(name, "absent")
    ]
    if differing:
        raise SimIPUError(
            f"{path} belongs to another configuration; resume with the same, or start anew in another folder:\n  "
            + "\n  ".join(differing)
        )
    return manifest["step"]


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest, and return that.

    Raises:
        SimIPUError: naming the file, what was expected and what was found.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise SimIPUError(f"{path} is not a training checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        expected = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        manifest["step"], manifest["identity"]  # a KeyError where one is missing
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SimIPUError(f"{manifest_path} is damaged: {error}") from error
    for name, digest in expected.items():
        if not (path / name).is_file():
            raise SimIPUError(f"{path} is damaged: {name} is missing")
        if _sha256(path / name) != digest:
            raise SimIPUError(f"{path} is damaged: the contents of {name} differ from what was written")
    return manifest


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first, damaged ones included."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def newest_checkpoint(output_dir: Path, on_damaged: Callable[[str], None] = lambda message: None) -> Path | None:
    """The newest checkpoint of a run that is whole, or `None`; `on_damaged` is told about each one passed over."""
    for path in reversed(list_checkpoints(output_dir)):
        try:
            verify_checkpoint(path)
        except SimIPUError as error:
            on_damaged(str(error))
        else:
            return path
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What [`TrainingState.save`] wrote beside the model; a `SimIPUError` where it is more than tensors and plain
    values, or cannot be read."""
    path = checkpoint / STATE_TENSORS
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SimIPUError(
            f"{path} holds more than tensors and plain values; it was not loaded, because unpickling runs code from "
            "the file"
        ) from error
    except (OSError, EOFError, RuntimeError, KeyError, ValueError) as error:
        raise SimIPUError(f"{path} cannot be read ({error})") from error


@dataclass
class TrainingState:
    """What a run saves and takes up again: model, optimizer, schedule, loss scale, the logger's unfinished window, and
    where each process stands in a stream. Model and optimizer are as accelerate prepared them.
    """

    accelerator: Accelerator
    model: nn.Module
    processor: SimIPUProcessor
    optimizer: AcceleratedOptimizer
    schedule: LRScheduler
    logger: RunLogger
    batches: Stateful
    identity: dict[str, Any]

    def save(self, output_dir: Path, step: int, total_limit: int) -> Path:
        """Every process calls it; the main one writes, see [`save_checkpoint`]."""
        scaler = self.accelerator.scaler
        tensors = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler and scaler.state_dict(),
            "processes": gather_object([{"logger": self.logger.state_dict(), "batches": self.batches.state_dict()}]),
        }

        def save(folder: Path) -> None:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder)  # with the remote code
            self.processor.save_pretrained(folder)
            torch.save(tensors, folder / STATE_TENSORS)

        return on_main_process(
            self.accelerator,
            save_checkpoint,
            output_dir,
            step,
            save=save,
            identity=self.identity,
            total_limit=total_limit,
        )

    def restore(self, checkpoint: Path) -> None:
        """Raises a `SimIPUError` where the checkpoint does not fit the model or the optimizers."""
        saved = read_state(checkpoint)
        try:
            self.accelerator.unwrap_model(self.model).load_state_dict(load_file(checkpoint / "model.safetensors"))
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            if self.accelerator.scaler is not None and saved["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
            processes = saved["processes"]
            if len(processes) == self.accelerator.num_processes:  # or the logged means and the skipped rows start anew
                own = processes[self.accelerator.process_index]
                self.logger.load_state_dict(own["logger"])
                self.batches.load_state_dict(own["batches"])
        except (OSError, EOFError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise SimIPUError(f"{checkpoint} does not fit the model or its optimizers ({error})") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
