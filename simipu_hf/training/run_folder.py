"""The output folder of a run: when it may be used, and the record of what was run."""

import hashlib
import importlib.metadata
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from simipu_hf.errors import SimIPUError
from simipu_hf.files import atomic_write

from .checkpoint import newest_checkpoint, remove_partial_checkpoints, set_aside

RUN_FILE = "run.yaml"
_PACKAGES = ("simipu-hf", "torch", "torchvision", "transformers", "timm", "accelerate", "datasets", "numpy", "scipy")


def find_checkpoint(output_dir: Path, resume: str | None, overwrite: bool) -> Path | None:
    """Whether a run may start in `output_dir`, and from which checkpoint. Writes nothing.

    Args:
        output_dir: of the run.
        resume: `"latest"`, the path of a checkpoint, or `None`.
        overwrite: a folder that an earlier run left may be replaced.

    Returns:
        the checkpoint to resume from; `None` to start at the beginning, also where `"latest"` finds no checkpoint
        yet, so that one command serves the first start and every restart.

    Raises:
        SimIPUError: the folder holds something else, or the checkpoint does not exist.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise SimIPUError(f"--output_dir {output_dir} is a file")
    if resume not in (None, "latest"):
        if not Path(resume).is_dir():
            raise SimIPUError(f"--resume_from_checkpoint {resume}: no such folder")
        return Path(resume)
    if resume == "latest":
        found = newest_checkpoint(output_dir, on_damaged=lambda text: print(f"damaged, not used: {text}"))
        if found is None:
            print(f"no checkpoint in {output_dir} yet: starting at the beginning")
        return found
    occupied = output_dir.is_dir() and any(output_dir.iterdir())
    if occupied and not overwrite:
        raise SimIPUError(
            f"--output_dir {output_dir} is not empty: choose another folder, continue the run in it with "
            "--resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
        )
    if occupied and not (output_dir / RUN_FILE).is_file():
        raise SimIPUError(
            f"--overwrite_output_dir: {output_dir} does not look like a run (it has no {RUN_FILE}), so nothing in it "
            "is deleted; choose another folder"
        )
    return None


def open_run_folder(output_dir: Path, step: int, overwrite: bool, **record: Any) -> None:
    """[`prepare_run_folder`] and [`write_run_file`]."""
    prepare_run_folder(output_dir, step, overwrite)
    write_run_file(output_dir, **record)


def prepare_run_folder(output_dir: Path, step: int = 0, overwrite: bool = False) -> None:
    """Create `output_dir`, or make an earlier run's ready to go on from `step`. Main process only.

    Raises:
        SimIPUError: it cannot be written to.
    """
    if overwrite and (output_dir / RUN_FILE).is_file():
        for path in output_dir.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    try:
        with atomic_write(output_dir / ".writable"):
            pass
        (output_dir / ".writable").unlink()
    except (OSError, SimIPUError) as error:
        raise SimIPUError(f"--output_dir {output_dir} cannot be written to ({error})") from error
    remove_partial_checkpoints(output_dir)
    aside = set_aside(output_dir, step)
    if aside is not None:
        print(f"the checkpoints beyond step {step} are now in {aside}")


def write_run_file(output_dir: Path, arguments: dict[str, Any], data: dict[str, Any], **more: Any) -> None:
    """Write `run.yaml`: the arguments (it can be given to `--config`), versions, data, command, git state, `more`."""
    record = {
        "command": current_command(),
        "arguments": arguments,
        "data": data,
        **more,
        "versions": versions(),
        "git": git_state(),
        "machine": {
            "platform": platform.platform(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
    }
    with atomic_write(output_dir / RUN_FILE) as stream:
        yaml.safe_dump(record, stream, sort_keys=False, allow_unicode=True)


def current_command() -> str:
    """The command line of this process, without what is secret in it."""
    words = [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    for position, word in enumerate(words):
        if word.startswith("--hub_token="):
            words[position] = "--hub_token=***"
        elif word == "--hub_token" and position + 1 < len(words):
            words[position + 1] = "***"
    return shlex.join(words)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"torch": str(torch.__version__)}  # with the build: +cpu, +cu130


def git_state() -> dict[str, Any] | None:
    """Commit of the working folder's repository and whether it has changes; `None` outside of one."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def data_fingerprint(frame_ids: Iterable[str]) -> str:
    """A short digest of which frames, in which order, a data set holds; the same wherever its files lie."""
    digest = hashlib.sha256()
    for frame_id in frame_ids:
        digest.update(str(frame_id).encode() + b"\n")
    return digest.hexdigest()[:16]
