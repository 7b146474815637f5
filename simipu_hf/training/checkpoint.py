"""Checkpoints that are complete or absent: written aside, flushed, listed in a manifest, then renamed.

`OUTPUT_DIR/checkpoint-<optimizer step>` holds whatever the model saves (`from_pretrained` reads the folder) and

- `training_state.pt`: optimizers, schedules and the random state of each process; read with `weights_only=True`,
- `training_state.json`: the step, what the run was (compared on resume), and the logger's unfinished window,
- `manifest.json`: size and SHA-256 of every file, so that damage is noticed before anything is loaded.
"""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from simipu_hf.errors import SimIPUError

MANIFEST = "manifest.json"
STATE_TENSORS = "training_state.pt"
STATE_VALUES = "training_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class Checkpoint:
    """What [`load_checkpoint`] returns: `tensors` and `values` as they were given to [`save_checkpoint`]."""

    path: Path
    step: int
    tensors: dict[str, Any]
    values: dict[str, Any]


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    save_model: Callable[[Path], None],
    tensors: dict[str, Any],
    values: dict[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Write `output_dir/checkpoint-<step>` and delete the oldest beyond `total_limit`. Main process only.

    Args:
        save_model: writes the model's and the processor's files into the folder it is given.
        tensors: nested dictionaries, lists and tuples of tensors, numbers and strings.
        values: anything JSON can hold.

    Returns:
        the checkpoint's folder.

    Raises:
        SimIPUError: it could not be written (full disk, no permission); earlier checkpoints are untouched.
    """
    target = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".checkpoint-{step}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_model(partial)
        torch.save(tensors, partial / STATE_TENSORS)
        write_text(partial / STATE_VALUES, json.dumps({"step": step, **values}, indent=2))
        write_text(partial / MANIFEST, json.dumps({"step": step, "files": _describe_files(partial)}, indent=2))
        _synchronize_folder(partial)
        if target.exists():  # a damaged one, or this step taken again after a resume from an earlier checkpoint
            shutil.rmtree(target)
        partial.rename(target)
        _synchronize_folder(output_dir)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = newest_checkpoint(output_dir)
        raise SimIPUError(
            f"could not write checkpoint {target}: {error}. "
            + (f"The last good checkpoint is {kept}" if kept else "There is no earlier checkpoint")
        ) from error
    for old in list_checkpoints(output_dir)[: -total_limit if total_limit else 0]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify and read the checkpoint folder `path`; the model's own files are left to its `from_pretrained`.

    Raises:
        SimIPUError: it is no checkpoint, is damaged, or holds anything but tensors and plain values.
    """
    verify_checkpoint(path)
    try:
        tensors = torch.load(path / STATE_TENSORS, map_location="cpu", weights_only=True)
        values = json.loads((path / STATE_VALUES).read_text(encoding="utf-8"))
    except pickle.UnpicklingError as error:
        raise SimIPUError(
            f"{path / STATE_TENSORS} holds more than tensors and plain values; it was not loaded, because unpickling "
            "runs code from the file"
        ) from error
    except (OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        raise SimIPUError(f"{path}: the training state cannot be read ({error})") from error
    return Checkpoint(path, int(values["step"]), tensors, values)


def verify_checkpoint(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        SimIPUError: naming the file, what was expected and what was found.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise SimIPUError(f"{path} is not a training checkpoint: it has no {MANIFEST}")
    try:
        files = dict(json.loads(manifest_path.read_text(encoding="utf-8"))["files"])
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SimIPUError(f"{manifest_path} is damaged ({error})") from error
    for required in (STATE_TENSORS, STATE_VALUES):
        if required not in expected:
            raise SimIPUError(f"{manifest_path} does not list {required}")
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise SimIPUError(f"{path} is damaged: {name} is missing")
        if file.stat().st_size != size:
            raise SimIPUError(f"{path} is damaged: {name} has {file.stat().st_size} bytes, expected {size}")
        if _sha256(file) != digest:
            raise SimIPUError(f"{path} is damaged: the contents of {name} differ from what was written")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first, damaged ones included."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


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


def remove_partial_checkpoints(output_dir: Path) -> None:
    """Delete what a kill during a checkpoint left behind."""
    for path in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def check_same_run(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Refuse to continue a run under other conditions than it was started with.

    Raises:
        SimIPUError: listing every value that differs.
    """
    differing = [
        f"{name}: {saved.get(name)!r} in the checkpoint, {current.get(name)!r} now"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise SimIPUError(
            f"{path} belongs to another configuration; resume with the same, or start anew in another folder:\n  "
            + "\n  ".join(differing)
        )


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


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: aside, then renamed."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        _synchronize_file(file)
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return _digest(stream)


def _digest(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _synchronize_file(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _synchronize_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
