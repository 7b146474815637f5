"""Files and folders that appear whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from simipu_hf.errors import SimIPUError


@contextmanager
def written_aside(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A path beside `target` to write a file or a folder to; it takes the target's place when the block succeeds.

    Raises:
        SimIPUError: the target exists and is no empty folder, and `overwrite` is false; or it cannot be written.
    """
    target = Path(target)
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not overwrite:
        raise SimIPUError(f"{target} exists already: choose another place, or ask to overwrite it")
    created = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise SimIPUError(f"{target} cannot be written: {error}") from error
    try:
        yield aside / "new"
        if target.exists():
            target.rename(aside / "old")
        try:
            (aside / "new").rename(target)
        except OSError:
            if (aside / "old").exists():
                (aside / "old").rename(target)
            raise
    except OSError as error:
        raise SimIPUError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # stops at the first that is not empty
            for folder in created:
                folder.rmdir()
