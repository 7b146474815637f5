"""Frames that stand on both sides of a split, found by what they hold and not by what they are called."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import SimIPUError
from .rows import Rows, image_from_row

Key: TypeAlias = tuple[str, Any]


def refuse_shared_frames(train: Rows, held_out: Rows, what: str) -> None:
    """Ends a command that would evaluate on frames that it trains on.

        refuse_shared_frames(train_rows, test_rows, "--test_frames")

    Args:
        train, held_out: rows of the data contract, or with `image` alone.
        what: names the held-out side in the error.

    Raises:
        SimIPUError: says how many there are and names the first.
    """
    shared = frames_on_both_sides(train, held_out)
    if shared:
        first, second = shared[0]
        raise SimIPUError(
            f"{what}: {len(shared)} of {len(held_out)} frames are also trained on (the same image or the same scan), "
            f"the first is {second!r}, {first!r} among the training frames: choose splits that share no frame"
        )


def frames_on_both_sides(first: Rows, second: Rows) -> list[tuple[str, str]]:
    """Pairs of `frame_id`s, one of each side, with the same image or the same scan, byte for byte.

    Copies with other names are found, and the other camera of the same instant where whole scans are kept. Only
    lengths and the first bytes of all frames are compared; those that agree are read.

    Args:
        first, second: rows of the data contract. Images of a `datasets.Dataset` are compared as they are encoded; if
            a side is anything else, pixel by pixel.

    Returns:
        At most one pair for each row of `second`, in their order.
    """
    encoded = isinstance(first, datasets.Dataset) and isinstance(second, datasets.Dataset)
    sides = [_undecoded(rows) if encoded else rows for rows in (first, second)]
    keys = [list(_cheap_keys(rows)) if encoded else [_content(rows[i]) for i in range(len(rows))] for rows in sides]
    places: dict[Key, list[int]] = defaultdict(list)
    for index, row_keys in enumerate(keys[0]):
        for key in row_keys:
            places[key].append(index)
    pairs = []
    contents: dict[int, set[Key]] = {}  # of rows of the first side that had to be read
    for index, row_keys in enumerate(keys[1]):
        candidates = sorted({place for key in row_keys for place in places.get(key, ())})
        if not candidates:
            continue
        content = set(_content(sides[1][index]))
        for place in candidates:
            if place not in contents:
                contents[place] = set(_content(sides[0][place]))
            if content & contents[place]:
                pairs.append((_frame_id(sides[0][place], place), _frame_id(sides[1][index], index)))
                break
    return pairs


def _undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    columns = [column for column in ("frame_id", "image", "points") if column in rows.column_names]
    return rows.select_columns(columns).cast_column("image", datasets.Image(decode=False))


def _cheap_keys(rows: datasets.Dataset) -> Iterator[list[Key]]:
    """Keys that equal frames share: the length of the image's file, and length and first points of the scan."""
    for table in rows.with_format("arrow").iter(1024):
        image = table["image"].combine_chunks()
        lengths = _lengths(image)
        scans: list[Any] = [None] * len(table)
        if "points" in table.column_names:
            points = table["points"]
            starts = pc.binary_slice(points.cast(pa.large_binary()), 0, 64)
            scans = list(zip(pc.binary_length(points).to_pylist(), starts.to_pylist(), strict=True))
        for length, scan in zip(lengths, scans, strict=True):
            yield [("image", length), *([("points", scan)] if scan else [])]


def _lengths(images: Any) -> list[int]:
    images = images if isinstance(images, pa.StructArray) else pa.concat_arrays(images.chunks)
    inside = pc.binary_length(images.field("bytes")).to_pylist()
    paths = images.field("path").to_pylist()
    return [_file_size(path) if length is None else length for length, path in zip(inside, paths, strict=True)]


def _file_size(path: str | None) -> int:
    return os.path.getsize(path) if path and os.path.isfile(path) else -1


def _content(row: Mapping[str, Any]) -> list[Key]:
    image = row["image"]
    if isinstance(image, dict):
        data = image["bytes"]
        if data is None:
            with open(image["path"], "rb") as file:
                data = file.read()
    else:
        data = np.asarray(image_from_row(row)).tobytes()
    keys: list[Key] = [("image", hashlib.sha256(data).digest())]
    if row.get("points"):
        keys.append(("points", hashlib.sha256(row["points"]).digest()))
    return keys


def _frame_id(row: Mapping[str, Any], index: int) -> str:
    return str(row.get("frame_id", f"row {index}"))
