"""Rows of a reader's files, prepared once: read on several processes into Arrow files of the cache.

Own part, beside `datasets`' builders: an Arrow file holds at most 512 rows and is named by the files and the code that
it was made of. Preparation that was interrupted goes on behind the last whole file, and a folder that grew by scenes
is prepared where it is new.
"""

import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock

from ..errors import SimIPUError
from ..processes import run_in_processes
from .rows import write_arrow
from .sources import Source

CHUNK, LONG_SCENE = 512, 32  # frames
DAY = 24 * 60 * 60  # seconds

logger = logging.getLogger(__name__)


def read_frames(
    read: Callable[..., Any], frames: Sequence[Any], skipped: list[str] | None
) -> Iterator[dict[str, Any]]:
    """Rows of frames by a reader's `read_row`; damaged ones end it with a SimIPUError, or are left out and described
    in `skipped`. Labels that cannot be used are logged."""
    labels: list[str] = []
    for frame in frames:
        problems: list[str] = []
        try:
            row = read(frame, problems=problems)
            if None in row.values():
                raise ValueError(problems[0])
            if not row["points"]:
                raise ValueError("expected points of the scan in the image, found none")
        except ValueError as error:
            message = f"frame {frame.frame_id}: {error}"
            if skipped is None:
                raise SimIPUError(message) from error
            skipped.append(message)
        else:
            labels += problems
            yield row
    if labels:
        logger.warning(
            f"{len(labels)} labels cannot be used, the first: {labels[0]}; simipu-hf data inspect names all"
        )


def prepare(
    source: Source,
    frames: Sequence[Any],
    whole_scans: bool = False,
    skipped: list[str] | None = None,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> datasets.Dataset:
    """The rows of frames of a published data set, from the cache where they were prepared before.

    Several processes may call it at once: the first one prepares, the others wait for it. Damaged frames are left out
    and described in `skipped` where that is given. `num_proc` processes prepare, `None`: one per core; the default of
    `cache_dir` is the cache of datasets.

    Raises:
        SimIPUError: a damaged frame, or rows that cannot be written.
        OSError: a cache that cannot be written.
    """
    assert source.reader is not None
    read = partial(source.reader.read_row, whole_scans=whole_scans)
    how = source.reader.__name__, source.config, whole_scans
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "simipu_hf"
    kind = source.reader.__name__.rpartition(".")[2]
    # outside of the lock: the processes of a launch look at the files of a large data set at the same time
    chunks = [
        (folder / f"{kind}-{_digest(source.reader.fingerprint(chunk), *how)}.arrow", chunk)
        for chunk in _chunks(frames)
    ]
    if missing := [chunk for chunk in chunks if not _is_whole(read, *chunk)]:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / f"{_digest([path for path, _ in chunks])}.lock"
        lock.touch()  # an error where that is not allowed; FileLock would wait on Windows
        with FileLock(lock):
            missing = [chunk for chunk in missing if not _is_whole(read, *chunk)]  # of another process
            _remove_leftovers(folder)
            write = partial(_write_chunk, read, source.reader.features(source.config), skipped is None)
            run_in_processes(write, missing, num_proc, "Preparing", lambda item: len(item[1]))
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path, _ in chunks])
    if len(rows) < len(frames):
        for _ in read_frames(read, _left_out(rows, frames), skipped):  # once more, for the reason why
            pass
    return rows


def _chunks(frames: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """At most `CHUNK` frames each. A long scene shares none with others, so that new scenes leave it as it is."""
    chunk: list[Any] = []
    for _, run in itertools.groupby(frames, key=lambda frame: frame.scene):
        scene = list(run)
        is_long = len(scene) >= LONG_SCENE
        if chunk and (is_long or len(chunk) + len(scene) > CHUNK):
            yield chunk
            chunk = []
        if is_long:
            yield from (scene[start : start + CHUNK] for start in range(0, len(scene), CHUNK))
        else:
            chunk += scene
    if chunk:
        yield chunk


def _is_whole(read: Callable[..., Any], path: Path, frames: Sequence[Any]) -> bool:
    """Whether a file holds all frames that can be read: some may have been left out for a passing reason."""
    if not path.is_file():
        return False
    rows = datasets.Dataset.from_file(str(path))
    return len(rows) == len(frames) or next(read_frames(read, _left_out(rows, frames), []), None) is None


def _left_out(rows: datasets.Dataset, frames: Sequence[Any]) -> list[Any]:
    prepared = set(rows["frame_id"][:])
    return [frame for frame in frames if frame.frame_id not in prepared]


def _write_chunk(
    read: Callable[..., Any], features: datasets.Features, stop_at_damage: bool, chunk: tuple[Path, Sequence[Any]]
) -> None:
    path, frames = chunk
    write_arrow(path, read_frames(read, frames, None if stop_at_damage else []), features)


def _remove_leftovers(folder: Path) -> None:
    """Unfinished files older than a day: a younger one may be another process's at work."""
    for path in folder.glob(".*.arrow"):
        with suppress(OSError):  # it was finished just now
            if time.time() - path.stat().st_mtime > DAY:
                path.unlink()


def _digest(*made_of: Any) -> str:
    return hashlib.sha256(repr(made_of).encode("utf-8")).hexdigest()[:32]
