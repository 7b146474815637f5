"""Frames by name: several sources, splits and ids on one command line, as one data set."""

from collections.abc import Sequence
from pathlib import Path

import datasets

from ..errors import SimIPUError
from .depth_targets import EigenDataset
from .loading import load_pretraining_dataset
from .rows import ROW_FEATURES, Rows


def select_frames(specifications: Sequence[str]) -> datasets.Dataset:
    """The rows that the specifications name, in their order.

    Args:
        specifications: each `SOURCE`, `SOURCE#SPLIT` or `SOURCE#SPLIT:IDS`. SOURCE is whatever
            `load_pretraining_dataset` reads; SPLIT is one of its splits (its default where empty), such as
            `train` or `train[:50%]`; IDS is a list of `frame_id`s separated by commas, or `@FILE` with one a line.

    Returns:
        A data set with the columns of the data contract, and `depth` where every source has it.

    Raises:
        SimIPUError: a source that cannot be read, an id it does not have, or a frame named twice.
    """
    parts = [_select(specification) for specification in specifications]
    if not parts:
        raise SimIPUError("no frames were named: expected SOURCE[#SPLIT[:IDS]]")
    columns = [*ROW_FEATURES, *(["depth"] if all("depth" in part.column_names for part in parts) else [])]
    parts = [part.select_columns(columns) for part in parts]
    # casting copies the data, and is only needed where another writer stored a column in another way
    parts = [part if part.features == parts[0].features else part.cast(parts[0].features) for part in parts]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def select_depth_rows(
    frames: Sequence[str], file_list: str | None, image_dir: str | None, depth_dir: str | None
) -> Rows | None:
    """The rows that a depth command is asked for: named ones, or those of an Eigen file list; `None` for neither.

    Raises:
        SimIPUError: as [`select_frames`] and [`EigenDataset`], or a list without its two folders.
    """
    if not file_list:
        return select_frames(frames) if frames else None
    if not (image_dir and depth_dir):
        raise SimIPUError(f"{file_list}: a file list needs --image_dir and --depth_dir")
    return EigenDataset(file_list, image_dir, depth_dir)


def _select(specification: str) -> datasets.Dataset:
    source, _, rest = specification.partition("#")
    split, separator, ids = _split_ids(rest)
    rows = load_pretraining_dataset(source, split=split or None)
    if not separator:
        return rows
    wanted = _read_ids(ids, specification)
    position = {frame_id: index for index, frame_id in enumerate(rows["frame_id"])}
    missing = [frame_id for frame_id in wanted if frame_id not in position]
    if missing:
        raise SimIPUError(f"{specification}: {len(missing)} frames are not there, the first {missing[0]!r}")
    if len(set(wanted)) < len(wanted):
        raise SimIPUError(f"{specification}: a frame is named twice")
    return rows.select([position[frame_id] for frame_id in wanted])


def _split_ids(rest: str) -> tuple[str, str, str]:
    """`SPLIT:IDS`, where a split may hold colons of its own inside brackets, as in `train[:50%]`."""
    depth = 0
    for index, character in enumerate(rest):
        depth += (character == "[") - (character == "]")
        if character == ":" and depth == 0:
            return rest[:index], ":", rest[index + 1 :]
    return rest, "", ""


def _read_ids(ids: str, specification: str) -> list[str]:
    if not ids.startswith("@"):
        return [name.strip() for name in ids.split(",") if name.strip()]
    try:
        lines = Path(ids[1:]).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SimIPUError(f"{specification}: the file of ids cannot be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]
