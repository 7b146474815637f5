"""Rows of a reader's files, prepared once: read on several processes into Arrow files of the cache.

Own part, beside `datasets`' builders: an Arrow file holds at most 512 rows and is named by the files and the code that
it was made of. Preparation that was interrupted goes on behind the last whole file, and a folder that grew by scenes
is prepared where it is new.
"""

import hashlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
from filelock import FileLock

from ..errors import SimIPUError
from ..processes import run_in_processes
from .rows import write_arrow

CHUNK, LONG_SCENE = 512, 32  # frames
DAY = 24 * 60 * 60  # seconds
LOGGED_LABELS = 10  # of those that cannot be used

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How frames become rows: the module of `dataset_scripts` that reads them, and its configuration."""

    module: str
    config: str
    whole_scans: bool = False

    @property
    def reader(self) -> ModuleType:
        return sys.modules[self.module]

    def rows(self, frames: Sequence[Any], skipped: list[str] | None) -> Iterator[dict[str, Any]]:
        """Rows of the frames; damaged ones end it with a SimIPUError, or are left out and described in `skipped`.

        Labels that cannot be used are logged.
        """
        labels = 0
        for frame in frames:
            problems: list[str] = []
            try:
                row = self.reader.read_row(frame, self.whole_scans, problems)
                if None in row.values():
                    raise ValueError(problems[0].removeprefix(f"frame {frame.frame_id}: "))
                if not row["points"]:
                    raise ValueError(f"frame {frame.frame_id}: expected points of the scan in the image, found none")
            except ValueError as error:
                if skipped is None:
                    raise SimIPUError(str(error)) from error
                skipped.append(f"frame {frame.frame_id}: {error}")
                continue
            for message in problems[: max(0, LOGGED_LABELS - labels)]:
                logger.warning(message)
            labels += len(problems)
            yield row
        if labels > LOGGED_LABELS:
            logger.warning(f"{labels - LOGGED_LABELS} more labels cannot be used; simipu-hf data inspect names all")


def prepare(
    reading: Reading,
    frames: Sequence[Any],
    skipped: list[str] | None = None,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> datasets.Dataset:
    """The rows of frames, from the cache where they were prepared before.

    Several processes may call it at once: the first one prepares, the others wait for it. Damaged frames are left out
    and described in `skipped` where that is given. `num_proc` processes prepare, `None`: one per core; the default of
    `cache_dir` is the cache of datasets.

    Raises:
        SimIPUError: a damaged frame, or a cache that cannot be written.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "simipu_hf"
    chunks = list(_chunks(frames))
    kind = reading.module.rpartition(".")[2]
    # outside of the lock: the processes of a launch look at the files of a large data set at the same time
    digests = [_digest(reading.reader.fingerprint(chunk), reading) for chunk in chunks]
    paths = [folder / f"{kind}-{digest}.arrow" for digest in digests]
    if missing := _missing(reading, paths, chunks):
        with _lock(folder / f"{_digest(paths)}.lock"):
            missing = _missing(reading, *zip(*missing, strict=True))  # another process may have prepared them
            _remove_leftovers(folder)
            write = partial(_write_chunk, reading, stop_at_damage=skipped is None)
            run_in_processes(write, missing, num_proc, "Preparing", lambda item: len(item[1]))
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths])
    messages: list[str] = []
    if len(rows) < len(frames):  # those left out are read again for the reason why
        for _ in reading.rows(_left_out(rows, frames), messages):
            pass
    if messages and skipped is None:
        raise SimIPUError(messages[0].partition(": ")[2])
    if skipped is not None:
        skipped += messages
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


def _missing(reading: Reading, paths: Sequence[Path], chunks: Sequence[Any]) -> list[tuple[Path, Sequence[Any]]]:
    return [item for item in zip(paths, chunks, strict=True) if not _is_whole(reading, *item)]


def _is_whole(reading: Reading, path: Path, frames: Sequence[Any]) -> bool:
    """Whether a file holds all frames that can be read: some may have been left out for a passing reason."""
    if not path.is_file():
        return False
    rows = datasets.Dataset.from_file(str(path))
    return len(rows) == len(frames) or next(reading.rows(_left_out(rows, frames), []), None) is None


def _left_out(rows: datasets.Dataset, frames: Sequence[Any]) -> list[Any]:
    prepared = set(rows["frame_id"][:])
    return [frame for frame in frames if frame.frame_id not in prepared]


def _write_chunk(reading: Reading, item: tuple[Path, Sequence[Any]], stop_at_damage: bool) -> None:
    path, frames = item
    write_arrow(path, reading.rows(frames, None if stop_at_damage else []), reading.reader.features(reading.config))


def _remove_leftovers(folder: Path) -> None:
    """Unfinished files older than a day: a younger one may be another process's at work."""
    for path in folder.glob(".*.arrow"):
        with suppress(OSError):  # it was finished just now
            if time.time() - path.stat().st_mtime > DAY:
                path.unlink()


def _digest(*made_of: Any) -> str:
    return hashlib.sha256(repr(made_of).encode("utf-8")).hexdigest()[:32]


def _lock(path: Path) -> FileLock:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise SimIPUError(
            f"{path.parent}: the cache of prepared rows cannot be written: {error}; set HF_DATASETS_CACHE to another"
        ) from error
    return FileLock(path)
