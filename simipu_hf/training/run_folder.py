"""The output folder of a run: when it may be used, and the record of what was run."""

import hashlib
import importlib.metadata
import itertools
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from simipu_hf.errors import SimIPUError
from simipu_hf.files import atomic_write, write_lock

from .arguments import RunArguments
from .checkpoint import list_checkpoints, newest_checkpoint, step_of
from .logging import METRICS_FILE

RUN_FILE = "run.yaml"
# what is there once, at the end of a run: the model and what was measured of it
_FINAL = re.compile(
    r"model.*\.safetensors.*|config\.json|(pre)?processor_config\.json|image_encoder|\w+_(evaluation|results)\.json"
)
_PACKAGES = (
    *("simipu-hf", "torch", "torchvision", "transformers", "timm", "accelerate", "datasets", "numpy", "scipy"),
    *("pillow", "kornia-rs"),
)


def find_checkpoint(arguments: RunArguments) -> Path | None:
    """Whether a run may start in its output folder, and from which checkpoint. Writes nothing.

    Returns:
        the checkpoint to resume from; `None` to start at the beginning, also where `"latest"` finds no checkpoint
        yet, so that one command serves the first start and every restart.

    Raises:
        SimIPUError: the folder is not empty and the checkpoint is not one of its own, or it holds a finished model and
            no whole checkpoint for `"latest"`.
    """
    output_dir, resume = Path(arguments.output_dir), arguments.resume_from_checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise SimIPUError(f"--output_dir {output_dir} is a file")
    if resume == "latest":
        newest = newest_checkpoint(output_dir, on_damaged=lambda text: print(f"damaged, not used: {text}"))
        if newest is None:
            # a job's log file may lie there already
            if any((output_dir / name).exists() for name in ("config.json", "image_encoder")):
                raise SimIPUError(
                    f"--output_dir {output_dir} holds a model and no whole checkpoint to resume from: choose another"
                )
            kind = f"kind: {type(arguments).__name__}\n"
            run_file = output_dir / RUN_FILE
            if run_file.is_file() and kind not in run_file.read_text(encoding="utf-8"):
                raise SimIPUError(f"--output_dir {output_dir} holds a run of another command: choose another")
            print(f"no checkpoint in {output_dir} yet: starting at the beginning")
        return newest
    if resume is not None and Path(resume).absolute().parent.resolve() == output_dir.resolve():
        return Path(resume)
    if output_dir.is_dir() and any(output_dir.iterdir()):  # also for a checkpoint of another run
        raise SimIPUError(
            f"--output_dir {output_dir} is not empty: choose another folder, or continue the run in it with "
            "--resume_from_checkpoint latest"
        )
    return None if resume is None else Path(resume)


def open_run_folder(arguments: RunArguments, held: ExitStack, step: int, last_step: int, **record: Any) -> None:
    """Create the output folder, or make an earlier run's ready to go on from `step` to `last_step`, and write
    `run.yaml`.

    That holds the arguments (it can be given to `--config`), versions, command, git state, and `record`. Main process
    only, after [`find_checkpoint`]. From here on other runs are kept out, until the caller closes `held`.

    Raises:
        SimIPUError: the folder cannot be written to, or another run is writing to it.
    """
    output_dir = Path(arguments.output_dir)
    held.enter_context(write_lock(output_dir, output_dir / ".lock"))
    for path in output_dir.glob(".checkpoint-*"):  # what a kill during a checkpoint left behind
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    written = {
        "kind": type(arguments).__name__,
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "arguments": arguments.to_dict(),
        **record,
        "versions": versions(),
        "git": git_state(),
        "machine": {
            "platform": platform.platform(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
    }
    with atomic_write(output_dir / RUN_FILE) as stream:
        yaml.safe_dump(written, stream, sort_keys=False, allow_unicode=True, width=sys.maxsize)
    set_aside(output_dir, step, last_step)


def set_aside(output_dir: Path, step: int, last_step: int) -> None:
    """Move what a run that goes on from `step` leaves behind into a folder of its own: the checkpoints beyond it and,
    where it goes on at all, the model that it ended with. So it is neither deleted nor taken for the newest."""
    beyond = [path for path in list_checkpoints(output_dir) if step_of(path) > step]
    final = [path for path in output_dir.iterdir() if _FINAL.fullmatch(path.name)] if step < last_step else []
    if not beyond and not final:
        return
    folder = next(f for n in itertools.count(1) if not (f := output_dir / f"set_aside-{n}").exists())
    folder.mkdir()
    for path in output_dir.iterdir():  # what the run needs as well: its metrics and the model's code
        if path.name == METRICS_FILE or path.suffix == ".py":
            shutil.copyfile(path, folder / path.name)
    # config.json first: without it the folder stands for its newest checkpoint
    for path in [*beyond, *sorted(final, key=lambda path: path.name != "config.json")]:
        path.rename(folder / path.name)
    print(f"what the run had beyond step {step} is now in {folder}")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the result depends on."""
    found = {package: package_version(package) or "not installed" for package in _PACKAGES}
    return {"python": platform.python_version(), **found, "torch": str(torch.__version__)}  # with the build: +cpu


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> str | None:
    """Commit of the repository that this package lies in, with `-dirty` where files differ; `None` outside of one."""
    describe = ("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def weights_fingerprint(weights: Mapping[str, torch.Tensor], about: Any = None) -> str:
    """A short digest of named tensors of any data type, and of what JSON can say `about` them."""
    digest = hashlib.sha256(json.dumps(about, default=str).encode())
    for name, value in weights.items():
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def short_digest(of: Any) -> str:
    """Sixteen characters that tell apart what JSON can write."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
