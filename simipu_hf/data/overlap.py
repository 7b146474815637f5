"""Frames that stand on both sides of a split, found by what they hold and not by what they are called."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import datasets
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
        raise _shared_error(what, len(shared), len(held_out), *shared[0])


def refuse_shared_stream(train: datasets.IterableDataset, held_out: Rows, what: str) -> datasets.IterableDataset:
    """The rows of `train`, ending in a SimIPUError before the first one that is also in `held_out`.

    A stream is not read for the comparison alone: every row is compared when it comes.
    """
    held_out = _undecoded(held_out)
    names: dict[Key, str] = {}
    for index in range(len(held_out)):
        row = held_out[index]
        names |= dict.fromkeys(_content(row), _frame_id(row, index))
    encoded = train.cast_column("image", datasets.Image(decode=False)) if train.features else train
    return encoded.filter(partial(_is_not_shared, names=names, what=what, count=len(held_out)))


def _is_not_shared(row: Mapping[str, Any], names: Mapping[Key, str], what: str, count: int) -> bool:
    for key in _content(row):
        if key in names:
            raise _shared_error(what, "some", count, _frame_id(row, 0), names[key])
    return True


def _shared_error(what: str, shared: int | str, count: int, first: str, second: str) -> SimIPUError:
    return SimIPUError(
        f"{what}: {shared} of {count} frames are also trained on (the same image or the same scan), the first is "
        f"{second!r}, {first!r} among the training frames: choose splits that share no frame"
    )


def frames_on_both_sides(first: Rows, second: Rows) -> list[tuple[str, str]]:
    """Pairs of `frame_id`s, one of each side, with the same image or the same scan, byte for byte.

    Copies with other names are found, and the other camera of the same instant where whole scans are kept. Only
    lengths and the first bytes of all frames are compared; those that agree are read. What cannot be read is not
    compared.

    Args:
        first, second: rows of the data contract. Images are compared as they are encoded, or pixel by pixel if a
            side is decoded already and no `datasets.Dataset`.

    Returns:
        At most one pair for each row of `second`, in their order.
    """
    encoded = _is_encoded(first) and _is_encoded(second)
    first, second = (_undecoded(rows) if encoded else rows for rows in (first, second))
    keys_of = _cheap_keys if encoded else lambda rows: (_content(rows[index]) for index in range(len(rows)))
    places: dict[Key, list[int]] = defaultdict(list)
    for index, keys in enumerate(keys_of(first)):
        for key in keys:
            places[key].append(index)
    content_of_first = lru_cache(4096)(lambda place: frozenset(_content(first[place])))
    pairs = []
    for index, keys in enumerate(keys_of(second)):
        candidates = sorted({place for key in keys for place in places.get(key, ())})
        content = set(_content(second[index])) if candidates else set()
        same = next((place for place in candidates if content & content_of_first(place)), None)
        if same is not None:
            pairs.append((_frame_id(first[same], same), _frame_id(second[index], index)))
    return pairs


def _is_encoded(rows: Rows) -> bool:
    return isinstance(rows, datasets.Dataset) or (len(rows) > 0 and isinstance(rows[0]["image"], dict))


def _undecoded(rows: Any) -> Any:
    if not isinstance(rows, datasets.Dataset):
        return rows
    columns = [column for column in ("frame_id", "image", "points") if column in rows.column_names]
    return rows.select_columns(columns).cast_column("image", datasets.Image(decode=False))


def _cheap_keys(rows: Any) -> Iterator[list[Key]]:
    """Keys that equal frames share: the length of the image's file, and length and first points of the scan."""
    if not isinstance(rows, datasets.Dataset):
        for index in range(len(rows)):
            row = rows[index]
            yield _keys(_length(row["image"]["bytes"], row["image"]["path"]), (row.get("points") or b"")[:64])
        return
    for table in rows.with_format("arrow").iter(1024):  # reads the lengths, not the rows
        images = pa.concat_arrays(table["image"].chunks)
        lengths, paths = pc.binary_length(images.field("bytes")).to_pylist(), images.field("path").to_pylist()
        starts: list[bytes] = [b""] * len(table)
        if "points" in table.column_names:
            starts = pc.binary_slice(table["points"].cast(pa.large_binary()), 0, 64).to_pylist()
        for length, path, start in zip(lengths, paths, starts, strict=True):
            yield _keys(_length(length, path), start)


def _keys(length: int | None, start: bytes) -> list[Key]:
    return [("image", length)] * (length is not None) + [("points", start)] * bool(start)


def _length(data: bytes | int | None, path: str | None) -> int | None:
    if data is not None:
        return data if isinstance(data, int) else len(data)
    return os.path.getsize(path) if path and os.path.isfile(path) else None


def _content(row: Mapping[str, Any]) -> list[Key]:
    keys: list[Key] = []
    if row.get("points"):
        keys.append(("points", hashlib.sha256(row["points"]).digest()))
    try:
        image = row["image"]
        if not isinstance(image, dict):
            data = image_from_row(row).tobytes()
        else:
            data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    except (OSError, ValueError):
        return keys
    return [("image", hashlib.sha256(data).digest()), *keys]


def _frame_id(row: Mapping[str, Any], index: int) -> str:
    return str(row.get("frame_id", f"row {index}"))
