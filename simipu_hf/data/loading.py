"""Reads a pre-training data set from wherever it is: KITTI files, Parquet, `save_to_disk`, the Hub."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import datasets

from ..dataset_scripts import kitti
from ..errors import SimIPUError
from .rows import check_features, check_row

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset


def load_pretraining_dataset(
    dataset_name: str | None = None,
    data_dir: str | os.PathLike | None = None,
    dataset_config_name: str | None = None,
    split: str | None = "train",
    streaming: bool = False,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    *,
    cameras: Sequence[int] | None = None,
    drives: Sequence[str] | None = None,
    skipped: list[str] | None = None,
) -> AnyDataset:
    """Rows of the data contract (`simipu_hf.data.rows`), whatever the version of `datasets`.

    Args:
        dataset_name: A folder as for `data_dir`, or the id of a data set on the Hub. Give this or `data_dir`.
        data_dir: A KITTI object or raw root, a folder of Parquet files, or a `save_to_disk` folder.
        dataset_config_name: "object" or "raw" for KITTI, the name of a configuration otherwise. None: the one it has.
        split: One split or an expression such as "train[:50%]+val" (names only where streaming or saved with
            `save_to_disk`). "validation" also finds a split named "val". None: "train", or the only split.
        streaming: Read while iterating, prepare nothing on disk.
        num_proc: Processes that prepare the rows.
        cache_dir: Folder of prepared rows; default: the cache of `datasets`.
        cameras: KITTI only: 2 (left) and 3 (right). Default: object 2, raw all there are.
        drives: KITTI raw only: such as "2011_09_26_drive_0009_sync". Default: all there are.
        skipped: Where given, frames that can't become a row and rows with a `frame_id` that came before are left
            out, and a message for each is appended here (not for KITTI streaming: the builder logs them as it meets
            them). Otherwise the first of them is an error.

    Raises:
        SimIPUError: nothing readable is there, a split or configuration doesn't exist, a file is missing or
            damaged, or a column is missing or of another type.
    """
    source = one_source(dataset_name, data_dir)
    kind, name = find_source(source, dataset_config_name, must_be_folder=dataset_name is None)
    if kind != "kitti" and (cameras is not None or drives is not None):
        raise SimIPUError(f"{source}: cameras and drives can be chosen for a KITTI folder only")
    try:
        split = _resolve_split(split, source_splits(source, kind, name), source)
        if kind == "kitti":
            dataset = _load_kitti(source, name, split, streaming, num_proc, cache_dir, cameras, drives, skipped)
        elif kind == "saved":
            dataset = _load_saved(source, split, streaming)
        else:
            dataset = datasets.load_dataset(
                source, name, split=split, streaming=streaming, num_proc=num_proc, cache_dir=cache_dir
            )
    except SimIPUError:
        raise
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise SimIPUError(f"{source}: {_root_cause(error)}") from error
    return _checked(dataset, source, split, skipped)


def one_source(dataset_name: str | None, data_dir: str | os.PathLike | None) -> str:
    """Whichever of the two is given; SimIPUError for none or both."""
    given = [place for place in (dataset_name, data_dir) if place is not None]
    if len(given) != 1:
        raise SimIPUError(f"expected either dataset_name or data_dir, found {dataset_name=}, {data_dir=}")
    return os.fspath(given[0])


def find_source(source: str, dataset_config_name: str | None, must_be_folder: bool = False) -> tuple[str, str | None]:
    """What `source` is ("kitti", "saved", "parquet" or "hub"), and the name of the configuration to read.

    Raises:
        SimIPUError: `source` is nothing of the kind, or has no such configuration.
    """
    folder = Path(source)
    if not folder.is_dir():
        if (
            must_be_folder
            or folder.exists()
            or folder.is_absolute()
            or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
        ):
            found = "a file" if folder.exists() else "no such folder"
            raise SimIPUError(f"{source}: expected the folder of a data set, found {found}")
        return "hub", _find_config(source, dataset_config_name)
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "saved", None
    names = sorted(path.name for path in folder.iterdir())
    has_object = any((folder / name).is_dir() for name in ("training", "testing"))
    has_raw = any(re.fullmatch(r"\d{4}_\d\d_\d\d", name) for name in names)
    if has_object or has_raw:
        name = dataset_config_name or ("object" if has_object else "raw")
        if not {"object": has_object, "raw": has_raw}.get(name, False):
            there = [name for name, is_there in (("object", has_object), ("raw", has_raw)) if is_there]
            raise SimIPUError(f"{source}: a KITTI folder with the configuration {there}, found {name!r} asked for")
        return "kitti", name
    if next(folder.rglob("*.parquet"), None) is not None:
        return "parquet", _find_config(source, dataset_config_name)
    hint = ""
    if {"image_2", "velodyne", "image_02", "velodyne_points"} & set(names) or any("_drive_" in name for name in names):
        hint = "; it looks like a part of a KITTI data set, give the folder above that holds all of it"
    listed = ", ".join(names[:10]) + (", …" if len(names) > 10 else "") if names else "an empty folder"
    raise SimIPUError(
        f"{source}: expected a KITTI object root (training/, testing/), a KITTI raw root (2011_09_26/, …), "
        f"a folder of Parquet files, or a save_to_disk folder; found {listed}{hint}"
    )


def source_splits(source: str, kind: str, name: str | None) -> list[str]:
    """Splits of a source that `find_source` has named; [] for a saved data set without splits."""
    if kind == "kitti":
        assert name is not None
        return kitti.split_names(name, source)
    if kind == "saved":
        saved = _from_disk(source)
        return list(saved) if isinstance(saved, datasets.DatasetDict) else []
    try:
        return datasets.get_dataset_split_names(source, name)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise SimIPUError(f"{source}: expected a data set with splits, found: {error}") from error


def _find_config(source: str, wanted: str | None) -> str:
    try:
        names = datasets.get_dataset_config_names(source)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise SimIPUError(f"{source}: neither a folder here nor a data set that can be read: {error}") from error
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None or wanted not in names:
        raise SimIPUError(f"{source}: expected dataset_config_name to be one of {names}, found {wanted!r}")
    return wanted


def _resolve_split(split: str | None, available: list[str], source: str) -> str:
    if not available:
        return split or "train"
    if split is None:
        split = "train" if "train" in available else available[0] if len(available) == 1 else ""
    if "val" in available and "validation" not in available:
        split = re.sub(r"\bvalidation\b", "val", split)
    if not set(_names(split)) <= set(available):
        raise SimIPUError(f"{source}: split: expected one of {available}, found {split!r}")
    return split


def _names(split: str) -> list[str]:
    """ "train[:50%]+val" -> train, val."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def _load_kitti(
    source: str,
    name: str | None,
    split: str,
    streaming: bool,
    num_proc: int | None,
    cache_dir: str | os.PathLike | None,
    cameras: Sequence[int] | None,
    drives: Sequence[str] | None,
    skipped: list[str] | None,
) -> AnyDataset:
    names = tuple(dict.fromkeys(_names(split)))
    builder = kitti.Kitti(
        config_name=name,
        data_dir=os.path.abspath(source),
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        splits=names,
        cameras=None if cameras is None else tuple(cameras),
        drives=None if drives is None else tuple(drives),
        on_bad_row="error" if skipped is None else "skip",
    )
    if streaming:
        return builder.as_streaming_dataset(split=split)
    try:
        builder.download_and_prepare(num_proc=num_proc)
    except datasets.exceptions.DatasetGenerationError:
        if num_proc is not None and num_proc > 1:
            _raise_first_damage(builder)  # the reason doesn't survive the way from another process
        raise
    if skipped is not None:
        skipped += _left_out(builder, names)
    return builder.as_dataset(split=split)


def _raise_first_damage(builder: kitti.Kitti) -> None:
    for frames in builder.config.list_frames().splits.values():
        for frame in frames:
            kitti.read_row(frame)


def _left_out(builder: kitti.Kitti, names: Sequence[str]) -> list[str]:
    """Why frames of the listed splits are not among the prepared rows."""
    listing = builder.config.list_frames()
    messages = list(listing.problems)
    for name in names:
        prepared = set(builder.as_dataset(split=name)["frame_id"])
        for frame in listing.splits.get(name, ()):
            if frame.frame_id not in prepared:
                try:
                    kitti.read_row(frame)
                except ValueError as error:
                    messages.append(f"frame {frame.frame_id}: {error}")
    return messages


def _load_saved(source: str, split: str, streaming: bool) -> AnyDataset:
    if "[" in split or "+" in split:
        raise SimIPUError(f"{source}: split: expected a plain name for a saved data set, found {split!r}")
    saved = _from_disk(source)
    dataset = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    return dataset.to_iterable_dataset(num_shards=min(len(dataset), 64)) if streaming else dataset


def _from_disk(source: str) -> datasets.Dataset | datasets.DatasetDict:
    try:
        return datasets.load_from_disk(source)
    except Exception as error:  # a folder that lacks a file or has no rows raises IndexError, KeyError and others
        raise SimIPUError(f"{source}: expected what save_to_disk wrote, with rows, found: {error}") from error


def _checked(dataset: AnyDataset, source: str, split: str, skipped: list[str] | None) -> AnyDataset:
    if dataset.features is not None:
        check_features(dataset.features, source)
    else:  # some streams have no types before the first row
        first = next(iter(dataset), None)
        if first is not None:
            check_row(first)
    if isinstance(dataset, datasets.IterableDataset):
        return dataset
    if len(dataset) == 0:
        raise SimIPUError(f"{source}: split {split!r}: expected rows, found none")
    return dataset if "+" in split else _without_duplicates(dataset, source, skipped)


def _without_duplicates(dataset: datasets.Dataset, source: str, skipped: list[str] | None) -> datasets.Dataset:
    frame_ids = list(dataset["frame_id"])
    messages = [
        f"{source}: frame {frame_id}: expected one row, found {count}"
        for frame_id, count in Counter(frame_ids).items()
        if count > 1
    ]
    if not messages:
        return dataset
    if skipped is None:
        raise SimIPUError(messages[0])
    skipped += messages
    first_rows = {frame_id: index for index, frame_id in reversed(list(enumerate(frame_ids)))}
    return dataset.select(sorted(first_rows.values()))


def _root_cause(error: BaseException) -> BaseException:
    """What went wrong beneath `datasets`' "An error occurred while generating the dataset"."""
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return error
