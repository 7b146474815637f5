"""The atomic write: a file or a folder is complete under its name, or it is not there.

    with atomic_write("metrics.json") as stream:
        stream.write(text)

What is written beside the target is flushed to the disk and takes the target's name at the end, with the permissions
that the umask gives (safetensors writes files that only their owner may read).
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from simipu_hf.errors import SimIPUError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[str]]:
    """An open stream of text that replaces the file `path` when the block succeeds.

    Raises:
        SimIPUError: it cannot be written (full disk, no permission); an earlier file is untouched.
    """
    with atomic_path(path) as beside, beside.open("w", encoding="utf-8", newline="\n") as stream:
        yield stream


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """As [`atomic_write`], for libraries that want a path to write a file to; it ends like `path`.

    with atomic_path("encoder.safetensors") as beside:
        save_file(weights, beside)
    """
    path = Path(path)
    beside = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    with _writing(path):
        beside.touch(exist_ok=False)
        permissions = beside.stat().st_mode & 0o777
        try:
            yield beside
            beside.chmod(permissions)
            _synchronize(beside)
            os.replace(beside, path)
            _synchronize(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def to_json(content: Any, default: Callable[[Any], Any] | None = None, indent: int | None = 2) -> str:
    """As JSON, whose numbers are finite: NaN and infinity become null. `default` converts other objects."""
    return json.dumps(json.loads(json.dumps(content, default=default), parse_constant=lambda _: None), indent=indent)


def write_json(path: Path, content: Any) -> None:
    """Write [`to_json`] atomically."""
    with atomic_write(path) as stream:
        stream.write(to_json(content) + "\n")


@contextmanager
def atomic_folder(
    path: str | Path, *, overwrite: bool = False, is_earlier_output: Callable[[Path], bool] = lambda folder: True
) -> Iterator[Path]:
    """An empty folder that takes the name `path` when the block succeeds.

    with atomic_folder("encoder") as beside:
        model.save_pretrained(beside)

    Args:
        path: a folder that does not exist, or is empty, or is replaced with `overwrite`.
        overwrite: replace what is there.
        is_earlier_output: given what is there, says whether it is an earlier output of the same kind; nothing else
            is replaced.

    Raises:
        SimIPUError: `path` is occupied, is being written by another process, is a mounted disk, or cannot be written
            (full disk, no permission); it is untouched.
    """
    path = Path(path).resolve()
    check_not_mounted(path)
    beside, replaced = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.replaced")

    def put_back() -> None:
        """Undo the first rename where an error, or the end of a process, came before the second."""
        if replaced.exists() and not path.exists():
            replaced.rename(path)

    with _writing(path), write_lock(path):
        put_back()
        check_target(path, overwrite, lambda there: there.is_dir() and is_earlier_output(there))
        try:
            for leftover in (beside, replaced):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            beside.mkdir()
            yield beside
            _synchronize_tree(beside)
            if path.exists():
                path.rename(replaced)
            beside.rename(path)
            _synchronize(path.parent)
        finally:
            put_back()
            for leftover in (beside, replaced):
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def write_lock(target: Path, file: Path | None = None) -> Iterator[None]:
    """Keeps other processes from writing what this one writes; the folders above it exist.

    Args:
        target: what is written, as the error names it.
        file: marks it, and is removed at the end; `None`: a hidden file beside the target.

    Raises:
        SimIPUError: another process has it, or nothing may be written there.
    """
    file = file or target.with_name(f".{target.name}.lock")
    # the same process may go on; a soft lock would outlive a process that is killed
    lock = FileLock(file.resolve(), timeout=0, is_singleton=True, fallback_to_soft=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise SimIPUError(f"{target} is being written by another process: wait for its end") from error
    except PermissionError as error:
        raise SimIPUError(f"{target} cannot be written, or is being written by another user: {error}") from error
    except OSError:  # a file system without locks; or one that is full, which the writing names
        with suppress(OSError):
            file.unlink()
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows keeps what is open; filelock removes it there
                file.unlink()  # first: else another process could lock it in between
            lock.release(force=True)


def check_target(path: Path, overwrite: bool, is_earlier_output: Callable[[Path], bool]) -> None:
    """Raise a SimIPUError unless `path` is free, an empty folder, or to be overwritten and an earlier output."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise SimIPUError(f"{path} exists already: choose another place, or ask to overwrite it")
    if not is_earlier_output(path):
        raise SimIPUError(f"{path} is not overwritten: it holds something else than an earlier output of this command")


def check_not_mounted(path: Path) -> None:
    """Raise a SimIPUError where the folder `path`, which a finished folder is to replace, is a mounted disk."""
    if os.path.ismount(path):
        raise SimIPUError(f"{path} is a mounted disk, which a finished folder cannot replace: name a folder in it")


def check_apart(source: str | Path, target: str | Path) -> None:
    """Raise a SimIPUError where writing `target` could touch `source`: one is the other or lies in it."""
    first, second = Path(source).resolve(), Path(target).resolve()
    if Path(source).exists() and (first == second or first in second.parents or second in first.parents):
        raise SimIPUError(f"{target} and {source} contain one another: choose a place outside of what is read")


def move_into(source: Path, target: Path) -> None:
    """Move every entry of the folder `source` into the folder `target`, replacing what is there; remove `source`.

    Raises:
        SimIPUError: an entry cannot be replaced, such as weights that a program on Windows has loaded.
    """
    for entry in source.iterdir():
        destination = target / entry.name
        with _writing(destination):
            if destination.is_dir():
                shutil.rmtree(destination)
            entry.replace(destination)
    source.rmdir()


def _synchronize_tree(folder: Path) -> None:
    permissions = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(permissions)
            _synchronize(file)
    _synchronize(folder)


def _synchronize(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the block name `path`. The folders above it exist; those created that stay empty are removed again."""
    created = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise SimIPUError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):  # stops at the first that is not empty
            for folder in created:
                folder.rmdir()
