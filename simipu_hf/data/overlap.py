"""Frames told apart by what they hold, without reading them whole: those on both sides of a split, and whether a data
set is still the same."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import SimIPUError
from .sources import undecoded

Key: TypeAlias = tuple[str, Any]
COMPARED_BYTES = 64  # of a scan's start and of an image file's end


def refuse_shared_frames(train: datasets.Dataset, held_out: datasets.Dataset, what: str) -> None:
    """Ends a command that would evaluate on frames that it trains on; `what` names the held-out side in the error.

        refuse_shared_frames(train_rows, test_rows, "--test_frames")

    Raises:
        SimIPUError: says how many there are and names the first.
    """
    shared = frames_on_both_sides(train, held_out)
    if shared:
        raise _shared_error(what, len(shared), len(held_out), *shared[0])


def refuse_shared_stream(
    train: datasets.IterableDataset, held_out: datasets.Dataset | None, what: str
) -> datasets.IterableDataset:
    """The rows of `train`, ending in a SimIPUError before the first one that is also in `held_out`.

    A stream is not read for the comparison alone: every row is compared when it comes. Without `held_out` all rows
    pass, and the state of the stream has the same form, so that a run may be resumed with or without evaluation.
    """
    names: dict[Key, str] = {}
    for row in () if held_out is None else _compared_columns(held_out):
        names |= dict.fromkeys(_content(row), row["frame_id"])
    is_not_shared = partial(_is_not_shared, names=names, what=what, count=0 if held_out is None else len(held_out))
    return undecoded(train).filter(is_not_shared)


def _is_not_shared(row: Mapping[str, Any], names: Mapping[Key, str], what: str, count: int) -> bool:
    for key in _content(row) if names else ():
        if key in names:
            raise _shared_error(what, "some", count, row["frame_id"], names[key])
    return True


def _shared_error(what: str, shared: int | str, count: int, first: str, second: str) -> SimIPUError:
    return SimIPUError(
        f"{what}: {shared} of {count} frames are also trained on (the same image or the same scan), the first is "
        f"{second!r}, {first!r} among the training frames: choose splits that share no frame"
    )


def frames_on_both_sides(first: datasets.Dataset, second: datasets.Dataset) -> list[tuple[str, str]]:
    """Pairs of `frame_id`s, one of each side, with the same image file or the same scan, byte for byte.

    Copies with other names are found, and the other camera of the same instant where whole scans are kept. Of all
    frames the scan's first bytes and the length and last bytes of the image are compared; what agrees is read. What
    cannot be read is not compared. At most one pair for each row of `second`, in their order.
    """
    first, second = _compared_columns(first), _compared_columns(second)
    keys_of_second = list(_cheap_keys(second))
    wanted = set(chain(*keys_of_second))
    met: set[Key] = set()
    places: dict[Key, int] = {}  # content -> row of `first`
    for index, keys in enumerate(_cheap_keys(first)):
        if shared := wanted.intersection(keys):
            met |= shared
            for key in _content(first[index]):
                places.setdefault(key, index)
    pairs = []
    for index, keys in enumerate(keys_of_second):
        same = [places[key] for key in _content(second[index]) if key in places] if met.intersection(keys) else []
        if same:
            pairs.append((first[min(same)]["frame_id"], second[index]["frame_id"]))
    return pairs


def _compared_columns(rows: datasets.Dataset) -> datasets.Dataset:
    columns = [column for column in ("frame_id", "image", "points") if column in rows.column_names]
    return undecoded(rows.select_columns(columns))


def _cheap_keys(rows: datasets.Dataset) -> Iterator[list[Key]]:
    """Keys that equal frames share: length and last bytes of the image's file (of JPEGs, many share their length), and
    the first points of the scan."""
    for table in rows.with_format("arrow").iter(1024):  # reads ends of files and starts of scans, not the rows
        starts: list[bytes] = [b""] * len(table)
        if "points" in table.column_names:
            starts = pc.binary_slice(table["points"].cast(pa.large_binary()), 0, COMPARED_BYTES).to_pylist()
        for image, start in zip(_lengths_and_last_bytes(table), starts, strict=True):
            yield [("image", image)] * bool(image) + [("points", start)] * bool(start)  # a damaged one may be empty


def rows_fingerprint(rows: datasets.Dataset) -> str:
    """A short digest of what a data set holds, in which order: names, calibration and labels; of images, scans and
    depth maps the lengths, and of every 16th scan the first points. The same wherever the files lie."""
    columns = ("frame_id", "image", "points", "camera_projection", "lidar_to_camera", "depth", "objects")
    rows = undecoded(rows.select_columns([column for column in columns if column in rows.column_names]))
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(1024):
        for column in rows.column_names:
            if isinstance(rows.features[column], datasets.Image):
                digest.update(repr(list(_lengths(table, column))).encode())
            elif column == "points":
                scans = table[column].cast(pa.large_binary())
                starts = [pc.binary_slice(scans.slice(at, 1), 0, COMPARED_BYTES) for at in range(0, len(table), 16)]
                digest.update(repr(pc.binary_length(scans).to_pylist()).encode())
                digest.update(repr([start.to_pylist() for start in starts]).encode())
            else:
                for part in _parts(table[column].combine_chunks()):
                    digest.update(part)
    return digest.hexdigest()[:16]


def _parts(values: Any) -> Iterator[bytes]:
    """What an array holds, lists and structures taken apart: made into Python's objects it takes a hundred times as
    long."""
    values = values.storage if isinstance(values, pa.ExtensionArray) else values
    if pa.types.is_struct(values.type):
        for index in range(values.type.num_fields):
            yield from _parts(pc.struct_field(values, index))
    elif pa.types.is_nested(values.type):
        yield pc.list_value_length(values).to_numpy(zero_copy_only=False).tobytes()
        yield from _parts(values.flatten())
    elif pa.types.is_primitive(values.type):
        yield values.to_numpy(zero_copy_only=False).tobytes()
    else:
        yield repr(values.to_pylist()).encode()


def _lengths(table: pa.Table, column: str = "image") -> Iterator[int | None]:
    """Bytes of the file of every row; `None` where there is none."""
    for chunk in table[column].chunks:
        lengths, paths = pc.binary_length(chunk.field("bytes")), chunk.field("path")
        for length, path in zip(lengths.to_pylist(), paths.to_pylist(), strict=True):
            if length is None and path:
                with suppress(OSError):
                    length = os.stat(path).st_size
            yield length


def _lengths_and_last_bytes(table: pa.Table) -> Iterator[tuple[int | None, bytes] | None]:
    ends = [pc.binary_slice(chunk.field("bytes"), -COMPARED_BYTES).to_pylist() for chunk in table["image"].chunks]
    paths = [chunk.field("path").to_pylist() for chunk in table["image"].chunks]
    for length, end, path in zip(_lengths(table), chain(*ends), chain(*paths), strict=True):
        if end is None and length is not None:
            with suppress(OSError), open(path, "rb") as file:
                file.seek(max(0, length - COMPARED_BYTES))
                end = file.read(COMPARED_BYTES)
        yield (length, end) if end else None


def _content(row: Mapping[str, Any]) -> list[Key]:
    keys: list[Key] = []
    if row.get("points"):
        keys.append(("points", hashlib.sha256(row["points"]).digest()))
    image = row["image"] or {}
    data = image.get("bytes")
    if data is None and image.get("path"):
        with suppress(OSError):
            data = Path(image["path"]).read_bytes()
    return [("image", hashlib.sha256(data).digest()), *keys] if data else keys
