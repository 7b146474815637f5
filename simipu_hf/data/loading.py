"""Reads a pre-training data set from wherever it is: files of known data sets, Parquet, `save_to_disk`, the Hub."""

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from ..errors import SimIPUError
from .mixture import Mixture
from .preparation import prepare, read_frames
from .rows import ROW_FEATURES, check_features, scene_of
from .sources import (
    Source,
    Sources,
    find_source,
    full_path,
    given_sources,
    license_of,
    named_errors,
    split_source,
    undecoded,
)

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset

logger = logging.getLogger(__name__)


def load_pretraining_dataset(
    dataset_name: Sources | None = None,
    data_dir: Sources | None = None,
    dataset_config_name: str | None = None,
    split: str | None = "train",
    streaming: bool = False,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    *,
    cameras: Sequence[int | str] | None = None,
    scenes: Sequence[str] | None = None,
    whole_scans: bool = False,
    labels: bool = False,
    validation_share: float | None = None,
    skipped: list[str] | None = None,
) -> AnyDataset:
    """Rows of the data contract (`simipu_hf.data.rows`), whatever the data set and the version of `datasets`.

        rows = load_pretraining_dataset(data_dir="KITTI", split="train")
        rows = load_pretraining_dataset(data_dir=["KITTI", "drives#train[:50%]"], validation_share=0.1)

    Several processes may call it at once; one of them prepares the rows while the others wait. In a distributed run,
    call it before the process group exists, whose time limit would end the waiting.

    Args:
        dataset_name: A folder as for `data_dir`, the id of a data set on the Hub, or the address of a folder of
            Parquet files (`s3://`, `gs://`, `hf://datasets/…`). Give this or `data_dir`.
        data_dir: A folder of KITTI, nuScenes, Waymo or Argoverse 2 as it was published, of Parquet files, or of
            `save_to_disk`. Both take a list: the rows of all. `SOURCE#SPLIT` takes another split for "train".
        dataset_config_name: "object", "odometry" or "raw" for KITTI, the name of a configuration otherwise. None: the
            one it has.
        split: One split or an expression such as "train[:50%]+val" (names only where streaming, except of what
            `save_to_disk` wrote). "validation" and "val" find one another. None: "train", or the only split.
        streaming: Read while iterating, prepare nothing on disk. Images may then come undecoded, as `{"bytes",
            "path"}`: `image_from_row(row)` gives the picture in either case.
        num_proc: Processes that prepare the rows; None: one per core.
        cache_dir: Folder of prepared rows; default: the cache of `datasets`.
        cameras: Of a published data set; KITTI: 2 (left) and 3 (right).
        scenes: Of a published data set: its drives, logs or segments. Default: all.
        whole_scans: Of a published data set: keep all points, not only those that the camera sees.
        labels: Of a published data set: with its labels, in the column `objects`, where there is such a configuration.
        validation_share: For a source without a validation split: "validation" is this share of the scenes of
            "train", chosen by a hash of their names, and "train" is the rest. Other splits stay whole.
        skipped: Where given, frames that can't become a row and rows with a `frame_id` that came before are left
            out, and a message for each is appended here. Otherwise the first of them is an error. While streaming,
            such frames are logged as they come, and repeated rows are not looked for.

    Raises:
        SimIPUError: nothing readable is there, a split or configuration doesn't exist, a file is missing or
            damaged, a column is missing or of another type, or the cache cannot be written.
    """
    request = Request(
        split, streaming, num_proc, cache_dir, cameras, scenes, whole_scans, labels, validation_share, skipped
    )
    return join_rows(_load_parts(dataset_name, data_dir, dataset_config_name, request), cache_dir)


def load_mixture(
    dataset_name: Sources | None = None,
    data_dir: Sources | None = None,
    dataset_config_name: str | None = None,
    mixture: Sequence[float] | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[AnyDataset, Mixture | None]:
    """Rows of several sources, and how they are mixed.

        rows, mixture = load_mixture(data_dir=["KITTI", "drives"], mixture=[1, 2])
        dataset = TwoViewDataset(rows, processor, augmentation, mixture=mixture)

    Args:
        dataset_name, data_dir, dataset_config_name: as `load_pretraining_dataset`.
        mixture: a weight for each source; `None` mixes them by size, which streams do not know.
        seed: of the mixture.
        options: further arguments of `load_pretraining_dataset`.

    Returns:
        The rows of all sources one after another, and the `Mixture` that `TwoViewDataset` draws from them with, or
        `None`. While streaming the rows are mixed already, and the `Mixture` holds the shards of each source.

    Raises:
        SimIPUError: as `load_pretraining_dataset`; or another number of weights than of sources.
    """
    request = Request(**options)
    parts = _load_parts(dataset_name, data_dir, dataset_config_name, request)
    if not isinstance(parts[0], datasets.IterableDataset):
        joined = join_rows(parts, request.cache_dir)
        mixed = Mixture([len(part) for part in parts], mixture, seed) if mixture else None
        if mixed is not None and 0 in mixed.shares:
            raise SimIPUError(f"mixture: the weights {mixture} leave a data set without any of {len(joined)} rows")
        return joined, mixed
    if len(parts) > 1 and not mixture:
        raise SimIPUError("mixture: expected a weight for each data set, since a stream does not know its size")
    weights = mixture or [1]
    shards = Mixture([part.num_shards for part in parts], weights)  # checks the weights
    probabilities = [weight / sum(weights) for weight in weights]
    streams = _with_common_columns(parts)
    if len(streams) == 1:
        return streams[0], None
    return datasets.interleave_datasets(streams, probabilities, seed, stopping_strategy="all_exhausted"), shards


@dataclass(frozen=True)
class Request:
    """What is read of a source; the arguments of `load_pretraining_dataset`."""

    split: str | None = "train"
    streaming: bool = False
    num_proc: int | None = None
    cache_dir: str | os.PathLike | None = None
    cameras: Sequence[int | str] | None = None
    scenes: Sequence[str] | None = None
    whole_scans: bool = False
    labels: bool = False
    validation_share: float | None = None
    skipped: list[str] | None = None


def _load_parts(
    dataset_name: Sources | None, data_dir: Sources | None, dataset_config_name: str | None, request: Request
) -> list[AnyDataset]:
    parts: list[AnyDataset] = []
    taken: dict[str, set[Any]] = {}
    for text in given_sources(dataset_name, data_dir):
        location, own_split = split_source(text)
        source = find_source(location, dataset_config_name, dataset_name is None, request.labels)
        split = own_split if own_split and request.split in (None, "train") else request.split
        own_request = replace(request, split=split)
        with named_errors(location):
            held_out, planned = _plan_split(source, own_request, own_split or None)
            part = _load(source, own_request, held_out, planned)
        rows = part
        if source.kind == "saved" and isinstance(part, datasets.IterableDataset):
            rows = _with_scene(_take(planned, source.saved))
        names = row_names(rows) if isinstance(rows, datasets.Dataset) else _names(planned)
        take_rows(taken, text, source.location, dict.fromkeys(names))  # repeats in one source: `_without_duplicates`
        parts.append(part)
    return parts


def take_rows(taken: dict[str, set[Any]], text: str, location: str, names: Iterable[Any]) -> None:
    """Add the rows that the source `text` names to those `taken` of every location.

    Raises:
        SimIPUError: one of them was taken before.
    """
    before = taken.setdefault(full_path(location), set())
    for name in names:
        if name in before:
            raise SimIPUError(f"{text}: expected other rows than those taken before, found {name} again")
        before.add(name)


def row_names(rows: datasets.Dataset) -> list[tuple[str, str]]:
    """Scene and frame of every row: KITTI's training and testing frames share their numbers."""
    # sliced: a column of datasets is iterated a hundred times slower
    names = zip(rows["scene"][:], rows["frame_id"][:], strict=True)
    return [(scene or scene_of(frame_id), frame_id) for scene, frame_id in names]


def _load(source: Source, request: Request, held_out: bool | None, split: str) -> AnyDataset:
    if source.reader is None and (request.cameras is not None or request.scenes is not None):
        raise SimIPUError(
            f"{source.location}: cameras and scenes can be chosen of a published data set's files only. Of own "
            "rows keep some with datasets: rows.filter(lambda row: row['scene'] in ('a', 'b')).save_to_disk(FOLDER)"
        )
    if source.reader is not None:
        dataset = _load_files(source, split, request, held_out)
        # KITTI's reader names none: the synthetic drive has the same layout
        dataset.info.license = getattr(source.reader, "LICENSE", "")
    elif source.kind == "saved":
        dataset = _take(split, source.saved)
        if request.streaming and len(dataset):  # one without rows is refused below
            dataset = dataset.to_iterable_dataset(num_shards=min(len(dataset), 64))
    else:
        dataset = source.load(
            split,
            streaming=request.streaming,
            num_proc=None if request.streaming else request.num_proc,
            cache_dir=None if request.cache_dir is None else os.fspath(request.cache_dir),
        )
        dataset.info.license = dataset.info.license or license_of(source.location)
    dataset = _checked(dataset, source.location, split, request.skipped)
    is_shared_already = source.reader is not None and request.streaming
    if request.validation_share is None or held_out is None or is_shared_already:
        return dataset
    return _share(dataset, held_out, request.validation_share, source.location)


def _plan_split(source: Source, request: Request, train_split: str | None) -> tuple[bool | None, str]:
    """Whether the rows held out of a split are wanted or its others (`None`: all of them), and the split to read."""
    shared = train_split or source.default_split
    split, held_out = shared if request.split is None else request.split, None
    if request.validation_share is not None:
        if any(re.fullmatch(r"(.*_)?val(idation)?", name) for name in source.splits):
            raise SimIPUError(f"{source.location} has the splits {source.splits}: leave validation_share out")
        held_out = split in ("validation", "val")
        split = shared if held_out else split
    for name in set(_names(split)):
        split = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", source.find_split(name), split)
    if held_out is False and not _is_part_of(source, shared, split):
        held_out = None
    return held_out, split


def _is_part_of(source: Source, shared: str, split: str) -> bool:
    with suppress(SimIPUError):  # there is no such split
        return any(source.find_split(name) in _names(split) for name in _names(shared))
    return False


def _names(split: str) -> list[str]:
    """ "train[:50%]+val" -> train, val."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def list_frames(
    source: Source,
    splits: Sequence[str],
    cameras: Sequence[int | str] | None,
    scenes: Sequence[str] | None,
    skipped: list[str] | None,
) -> Any:
    """The reader's listing of some splits of a published data set, whose problems are added to `skipped`; one camera
    or scene may be given by itself.

    Raises:
        SimIPUError: a split, camera or scene is not there, or there are problems and no `skipped`.
    """
    assert source.reader is not None
    cameras = [cameras] if isinstance(cameras, str | int) else cameras
    scenes = [scenes] if isinstance(scenes, str) else scenes
    with named_errors(source.location):
        listing = source.reader.list_frames(source.config, source.location, splits, cameras, scenes)
    if skipped is not None:
        skipped += listing.problems
    elif listing.problems:
        raise SimIPUError("\n".join(listing.problems[:10]))
    return listing


def _load_files(source: Source, split: str, request: Request, held_out: bool | None) -> AnyDataset:
    assert source.reader is not None
    names, skipped = list(dict.fromkeys(_names(split))), request.skipped
    listing = list_frames(source, names, request.cameras, request.scenes, skipped)
    frames = {name: listing.splits.get(name, []) for name in names}
    empty = [name for name, found in frames.items() if not found]
    if empty:
        message = f"{source.location}: split {empty[0]!r}: expected images with their scans, found none"
        raise SimIPUError("\n".join([message, *listing.notes[:10]]))
    if os.environ.get("RANK", "0") == "0":  # before the processes are connected
        for note in listing.notes[:10]:  # simipu-hf data inspect lists all
            logger.warning(note)
    if not request.streaming:
        prepared = {
            name: prepare(source, found, request.whole_scans, skipped, request.num_proc, request.cache_dir)
            for name, found in frames.items()
        }
        return _take(split, prepared)
    if "[" in split or len(names) < len(_names(split)):
        raise SimIPUError(f"{source.location}: split: expected different names where streaming, found {split!r}")
    if held_out is not None and request.validation_share is not None:  # of the others no file is opened
        for name, found in frames.items():
            scenes = [(frame.scene, frame.frame_id) for frame in found]
            own = _rows_of_side(scenes, held_out, request.validation_share, source.location)
            frames[name] = [found[index] for index in own]
    read = partial(source.reader.read_row, whole_scans=request.whole_scans)
    features, options = source.reader.features(source.config), {"read": read, "skip": skipped is not None}
    streams = [
        datasets.IterableDataset.from_generator(_stream_rows, features, {"runs": _runs(frames[name]), **options})
        for name in _names(split)
    ]
    return streams[0] if len(streams) == 1 else datasets.concatenate_datasets(streams)


def _runs(frames: Sequence[Any]) -> list[Sequence[Any]]:
    """The shards of a stream: of a large data set up to 64 frames that lie beside one another in its files.

    As many for each of the processes that were launched, or every process would have to read all of them.
    """
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    wanted = -(-len(frames) // max(1, min(64, len(frames) // 1024)))
    count = min(len(frames), -(-wanted // processes) * processes)
    return [frames[len(frames) * run // count : len(frames) * (run + 1) // count] for run in range(count)]


def _stream_rows(runs: Sequence[Sequence[Any]], read: Callable[..., Any], skip: bool) -> Iterator[dict[str, Any]]:
    skipped: list[str] | None = [] if skip else None
    for frames in runs:
        yield from read_frames(read, frames, skipped)
    for message in skipped or ():
        logger.warning(f"skipped: {message}")


def _take(split: str, saved: Mapping[str, datasets.Dataset]) -> datasets.Dataset:
    """The rows of an expression such as "train[:50%]+val"."""
    lengths = {name: len(rows) for name, rows in saved.items()}
    instructions = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    # a range that is empty, behind the last row, is an error of datasets
    parts = [saved[part.splitname].select(range(part.from_, part.to) or []) for part in instructions]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _checked(dataset: AnyDataset, location: str, split: str, skipped: list[str] | None) -> AnyDataset:
    check_features(dataset.features or {}, location)
    if isinstance(dataset, datasets.IterableDataset):
        return _with_scene(dataset)
    if len(dataset) == 0:
        reason = f"; {len(skipped)} left out, the first: {skipped[0]}" if skipped else ""
        raise SimIPUError(f"{location}: split {split!r}: expected rows, found none{reason}")
    if None in (names := dataset["frame_id"][:]):
        raise SimIPUError(
            f"{location}: split {split!r}, row {names.index(None)}: frame_id: expected a name, found none"
        )
    return _without_duplicates(_with_scene(dataset), location, skipped)


def _without_duplicates(dataset: datasets.Dataset, location: str, skipped: list[str] | None) -> datasets.Dataset:
    names = row_names(dataset)
    messages = [
        f"{location}: frame {frame_id}: expected one row, found {count}"
        for (_, frame_id), count in Counter(names).items()
        if count > 1
    ]
    if not messages:
        return dataset
    if skipped is None:
        raise SimIPUError(messages[0])
    skipped += messages
    first_rows = {name: index for index, name in reversed(list(enumerate(names)))}
    return dataset.select(sorted(first_rows.values()))


def _with_scene(dataset: AnyDataset) -> AnyDataset:
    if "scene" in dataset.column_names:
        return dataset
    if isinstance(dataset, datasets.Dataset):
        return dataset.add_column("scene", [scene_of(frame_id) for frame_id in dataset["frame_id"][:]])
    encoded = undecoded(dataset)  # a map or a filter decodes images, and what it has decoded stays so
    features = datasets.Features({**encoded.features, "scene": ROW_FEATURES["scene"]})
    return encoded.map(_add_scene, features=features)


def _add_scene(row: dict[str, Any]) -> dict[str, Any]:
    return {"scene": scene_of(str(row["frame_id"]))}


def _share(dataset: AnyDataset, held_out: bool, share: float, location: str) -> AnyDataset:
    """The rows of the scenes that `validation_share` holds out, or of the others."""
    if not 0 < share < 1:
        raise SimIPUError(f"validation_share: expected a share between 0 and 1, found {share}")
    if isinstance(dataset, datasets.IterableDataset):
        is_on_side = partial(_is_on_side, share=share, held_out=held_out)
        return undecoded(dataset).filter(is_on_side, input_columns=["scene", "frame_id"])
    return dataset.select(_rows_of_side(row_names(dataset), held_out, share, location))


def _rows_of_side(names: Sequence[tuple[str, str]], held_out: bool, share: float, location: str) -> list[int]:
    """The rows, by scene and name, that are held out, or the others; SimIPUError where all are on one side."""
    places = {scene: _place(scene) for scene, _ in names}
    low, high = min(places.values()), max(places.values())
    if not low < share <= high:
        advice = f"choose a value between {low:.3f} and {high:.3f}" if len(places) > 1 else "one cannot be shared"
        problem = f"validation_share {share} puts all of {len(places)} scenes on one side"
        raise SimIPUError(f"{location}: {problem}: {advice}")
    if len(names) < 3 * len(places) and all(scene == scene_of(frame_id) for scene, frame_id in names):
        logger.warning(
            f"{location}: validation_share makes {len(places)} scenes of the names of {len(names)} frames; if these "
            "are of fewer drives, the same places stand on both sides: name the drives in a column scene"
        )
    return [index for index, name in enumerate(names) if _is_on_side(*name, share, held_out)]


def _is_on_side(scene: str | None, frame_id: str, share: float, held_out: bool) -> bool:
    return (_place(scene or scene_of(frame_id)) < share) == held_out


def _place(scene: str) -> float:
    """A number from 0 to 1 that depends on the scene's name alone, so that a scene stays on its side for ever."""
    return int.from_bytes(hashlib.sha256(scene.encode("utf-8")).digest()[:8], "big") / 2**64


def join_rows(
    parts: Sequence[AnyDataset], cache_dir: str | os.PathLike | None = None, optional: Sequence[str] = ()
) -> AnyDataset:
    """The rows of all parts one after another, with the columns that all of them have, of one type.

    Columns that are `optional` stay, and are None where a part has none.
    """
    if len(parts) == 1:
        return parts[0]
    return datasets.concatenate_datasets(_with_common_columns(parts, cache_dir, optional))


def _unlike(feature: Any, other: Any) -> bool:
    """Whether two columns differ in more than whether their images are decoded."""
    both_images = isinstance(feature, datasets.Image) and isinstance(other, datasets.Image)
    return feature != other and not both_images


def _with_common_columns(
    parts: Sequence[AnyDataset], cache_dir: str | os.PathLike | None = None, optional: Sequence[str] = ()
) -> list[AnyDataset]:
    if len(parts) > 1 and isinstance(parts[0], datasets.IterableDataset):
        parts = [undecoded(part) for part in parts]  # a map decodes images, and what it has decoded stays so
    features = datasets.Features()
    for part in reversed(parts):
        features |= part.features
    columns = [name for name in features if name in optional or all(name in part.column_names for part in parts)]
    unlike = [
        column
        for column in columns
        if column not in ROW_FEATURES
        and any(_unlike(part.features.get(column, features[column]), features[column]) for part in parts)
    ]
    if unlike:
        logger.warning(f"columns left out, since their types differ between the data sets: {', '.join(unlike)}")
    joined = []
    for part in parts:
        kept = [column for column in columns if column in part.column_names and column not in unlike]
        selected, types = part.select_columns(kept), datasets.Features({column: features[column] for column in kept})
        # casting copies the data, and is only needed where another writer stored a column in another way
        joined.append(selected if selected.features == types else _cast(selected, types, cache_dir))
    return joined


def _cast(rows: AnyDataset, features: datasets.Features, cache_dir: str | os.PathLike | None) -> AnyDataset:
    if isinstance(rows, datasets.IterableDataset):  # whose cast leaves what it reads as Arrow as it was
        return rows.map(dict, features=features)
    # in the cache: datasets would write the copy beside the rows, into a save_to_disk folder
    name = datasets.fingerprint.Hasher.hash((rows._fingerprint, str(features)))
    path = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / f"cast-{name}.arrow"
    with named_errors("the data sets that are joined"):
        path.parent.mkdir(parents=True, exist_ok=True)
        return rows.cast(features, cache_file_name=str(path))
