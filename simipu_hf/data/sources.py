"""Recognises where rows can be read: files of published data sets, Parquet, `save_to_disk`, the Hub."""

import errno
import glob
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import datasets
import datasets.data_files
import fsspec
import yaml
from huggingface_hub import DatasetCard

from ..dataset_scripts import argoverse2, kitti, nuscenes, waymo
from ..errors import SimIPUError

Sources: TypeAlias = str | os.PathLike | Sequence[str | os.PathLike]

logger = logging.getLogger(__name__)

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z")
READERS: tuple[ModuleType, ...] = (kitti, nuscenes, waymo, argoverse2)


@dataclass(frozen=True)
class Source:
    """Where rows come from: `kind` is "files" (of a data set that `reader` knows), "saved", "parquet" or "hub"."""

    location: str
    kind: str
    config: str | None = None
    reader: ModuleType | None = None

    @property
    def is_address(self) -> bool:
        """Of any file system that fsspec knows: `s3://`, `gs://`, `hf://`, …"""
        return "://" in self.location

    @cached_property
    def splits(self) -> list[str]:
        """Names of its splits; a `save_to_disk` folder without splits is "train".

        Raises:
            SimIPUError: they cannot be found out.
        """
        with named_errors(self.location):
            if self.reader is not None:
                return self.reader.split_names(self.config, self.location)
            if self.kind == "saved":
                return list(self.saved)
            if self.is_address:
                return list(self.remote_files)
            return datasets.get_dataset_split_names(self.location, self.config)

    def find_split(self, name: str) -> str:
        """The split that is meant: "validation" and "val" find one another, "train" finds "mini_train".

        Raises:
            SimIPUError: there is none, or several.
        """
        names = ("validation", "val") if name in ("validation", "val") else (name,)
        found = [split for split in (name, *names) if split in self.splits]
        found = found or [split for split in self.splits if split.endswith(tuple(f"_{name}" for name in names))]
        if not found or (len(found) > 1 and found[0] not in names):
            raise SimIPUError(f"{self.location}: split: expected one of {self.splits}, found {name!r}")
        return found[0]

    @property
    def default_split(self) -> str:
        """The split where none is named: the only one, or "train"."""
        return self.splits[0] if len(self.splits) == 1 else "train"

    @cached_property
    def saved(self) -> Mapping[str, datasets.Dataset]:
        try:
            saved = _load_saved(Path(self.location)).with_format(None)  # it keeps the format it was saved in
        except Exception as error:  # a folder that lacks a file raises KeyError and others
            raise SimIPUError(f"{self.location}: expected what save_to_disk wrote, found: {error}") from error
        return saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}

    @cached_property
    def remote_files(self) -> datasets.data_files.DataFilesDict:
        """Split -> its Parquet files, of an address.

        Raises:
            SimIPUError: there are none.
        """
        patterns = datasets.data_files.get_data_patterns(self.location)
        found = datasets.data_files.DataFilesDict.from_patterns(patterns, self.location, [".parquet"])
        if not any(found.values()):
            raise SimIPUError(f"{self.location}: expected Parquet files, found none")
        return datasets.data_files.DataFilesDict({str(split): files for split, files in found.items() if files})

    def load(self, split: str, **options: Any) -> datasets.Dataset | datasets.IterableDataset:
        """`datasets.load_dataset` of a split of Parquet files or of the Hub."""
        if self.is_address:
            return datasets.load_dataset("parquet", data_files=self.remote_files, split=split, **options)
        return datasets.load_dataset(self.location, self.config, split=split, **options)


def _load_saved(folder: Path) -> datasets.Dataset | datasets.DatasetDict:
    """`datasets.load_from_disk`, which cannot read a split without rows, nor then the splits beside it."""
    if (folder / "dataset_dict.json").is_file():
        names = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return datasets.DatasetDict({name: _load_saved(folder / name) for name in names})
    if json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
        return datasets.load_from_disk(folder)
    features = datasets.DatasetInfo.from_directory(folder).features
    return datasets.Dataset.from_dict({name: [] for name in features}, features)


def given_sources(dataset_name: Sources | None, data_dir: Sources | None, most: int | None = None) -> list[str]:
    """The sources of whichever of the two is given; SimIPUError for none, both, or more than `most`."""
    given = [place for place in (dataset_name, data_dir) if place is not None]
    if len(given) != 1:
        raise SimIPUError(f"expected either dataset_name or data_dir, found {dataset_name=}, {data_dir=}")
    sources = [given[0]] if isinstance(given[0], str | os.PathLike) else list(given[0])
    if not sources or len(sources) > (most or len(sources)):
        raise SimIPUError(f"expected {'one data set' if most else 'a data set'}, found {sources}")
    return [os.fspath(source) for source in sources]


def full_path(location: str) -> str:
    """What names a source wherever the command is run: of a folder its path without links, otherwise the text."""
    return os.path.realpath(location) if os.path.exists(location) else location


def split_source(text: str) -> tuple[str, str]:
    """ "SOURCE#REST" -> SOURCE, REST. A folder whose own name holds a # is found too.

    >>> split_source("KITTI#train[:50%]")
    ('KITTI', 'train[:50%]')
    """
    marks = [index for index, character in enumerate(text) if character == "#"]
    for end in (len(text), *reversed(marks)):
        if os.path.exists(text[:end]):
            return text[:end], text[end + 1 :]
    return (text[: marks[0]], text[marks[0] + 1 :]) if marks else (text, "")


def split_ids(rest: str) -> tuple[str, str]:
    """ "SPLIT:IDS" -> SPLIT, IDS. Colons inside brackets are part of the split.

    >>> split_ids("train[:2]+val[1:]:000001,000002")
    ('train[:2]+val[1:]', '000001,000002')
    """
    split, *ids = re.split(r":(?![^\[]*\])", rest, maxsplit=1)
    return split, "".join(ids)


def refuse_second_split(split: str | None, *sources: str) -> None:
    """Raise a SimIPUError where a source names a split, SOURCE#SPLIT, and another one is given beside it."""
    for text in sources:
        if split and split_source(text)[1]:
            raise SimIPUError(f"{text}: split: expected one, found {split!r} as well")


def describe_frames(frames: Sequence[str]) -> tuple[str, str]:
    """Names of the data sets and of their splits, without folders and without lists of ids."""
    splits = [split_ids(rest)[0] or _default_split(source) for source, rest in map(split_source, frames)]
    return name_sources(frames), " + ".join(dict.fromkeys(splits))


def name_sources(frames: Sequence[str]) -> str:
    """Names of the data sets, without their folders."""
    places = (split_source(text)[0].rstrip("/\\") for text in frames)
    sources = (os.path.abspath(place) if os.path.isdir(place) else place for place in places)  # "." has no name
    return " + ".join(dict.fromkeys(re.split(r"[/\\]", source)[-1] for source in sources))


def _default_split(location: str) -> str:
    """The name of the split that is read where none is named; "all" of a list of files, which has none."""
    try:
        source = find_source(location)
        return source.find_split(source.default_split)
    except SimIPUError:
        return "all"


def hub_license(name: str | None) -> tuple[str | None, str | None]:
    """A licence as the Hub takes it: one of its identifiers, or "other" and the name."""
    if not name:
        return None, None
    identifier = re.sub(r"[^a-z0-9.]+", "-", name.lower())
    # "CC BY-NC-SA 3.0", as data sets write it
    is_known = identifier == name.lower() or re.fullmatch(r"cc-by(-nc)?(-sa|-nd)?-\d\.\d", identifier)
    return (identifier, None) if is_known else ("other", identifier)


def license_of(location: str) -> str:
    """The licence that the README.md of a folder, an address or a Hub id names; "" for none.

    In words where the Hub has no identifier of it.
    """
    address = location if "://" in location else f"hf://datasets/{location}"
    try:
        if os.path.isdir(location):
            text = Path(location, "README.md").read_text(encoding="utf-8-sig")
        else:
            with fsspec.open(f"{address}/README.md", "r", encoding="utf-8-sig") as file:
                text = file.read()
    except Exception:  # there is none, or it cannot be reached; every file system has errors of its own
        return ""
    try:
        data = DatasetCard(text, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError) as error:
        logger.warning(f"{location}: the header of its README.md, where a licence may be, cannot be read: {error}")
        return ""
    names = data.get("license") or ""
    return str(data.get("license_name") or "").replace("-", " ") or (
        " and ".join(map(str, names)) if isinstance(names, list) else str(names)
    )


def undecoded(rows: Any) -> Any:
    """The rows, or the stream of rows, with all columns of images as `{"bytes", "path"}`.

    A damaged image is then an error where it is decoded, which names the frame, and not where its row is read.
    """
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def find_source(
    location: str, dataset_config_name: str | None = None, must_be_folder: bool = False, labels: bool = False
) -> Source:
    """Recognises what `location` is; with `labels`, prefers a configuration of a published data set that has some.

    Raises:
        SimIPUError: it is nothing of the kind, or has no such configuration.
    """
    folder = Path(location)
    if not folder.is_dir():
        is_address = re.match(r"[\w+-]+://", location)
        is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", location) and not folder.is_absolute()
        if folder.exists() or (must_be_folder and not is_address) or not (is_address or is_hub_id):
            found = "an archive: unpack it first" if folder.suffix in ARCHIVES else "a file"
            found = found if folder.exists() else "no such folder"
            raise SimIPUError(f"{location}: expected the folder of a data set, found {found}")
        if is_address:
            _refuse_config(location, dataset_config_name)
            return Source(location.rstrip("/"), "parquet")
        return Source(location, "hub", _find_config(location, dataset_config_name))
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        _refuse_config(location, dataset_config_name)
        return Source(location, "saved")
    for reader in READERS:
        names = reader.configurations(location)
        if names:
            labelled = [name for name in names if labels and "objects" in reader.features(name)]
            config = dataset_config_name or [*labelled, *names][0]
            if config not in names:
                raise SimIPUError(f"{location}: dataset_config_name: expected one of {names}, found {config!r}")
            return Source(os.path.abspath(location), "files", config, reader)
    if (folder / "camera_image").is_dir() and (folder / "lidar").is_dir():  # Parquet, and one level too deep
        raise SimIPUError(
            f"{location}: expected the folder of Waymo Open Dataset v2, found one of its splits{_hint(folder)}"
        )
    if _holds_parquet(folder):
        location = os.path.abspath(location)  # a folder called "parquet" is not datasets' module of that name
        if location != glob.escape(location):
            raise SimIPUError(f"{location}: expected a path without *, ? and [, which datasets expands for Parquet")
        return Source(location, "parquet", _find_config(location, dataset_config_name))
    raise SimIPUError(
        f"{location}: expected a data set as published (KITTI, nuScenes, Waymo v2, Argoverse 2), a folder of Parquet "
        f"files, or a save_to_disk folder; found {listed(folder)}{_hint(folder)}"
    )


def _holds_parquet(folder: Path) -> bool:
    """Whether a Parquet file lies anywhere in a folder, also behind links, but for those to what was looked at."""
    seen = set(map(str, folder.resolve().parents))
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
        elif any(name.endswith(".parquet") for name in names):
            return True
        seen.add(os.path.realpath(place))
    return False


def _refuse_config(location: str, wanted: str | None) -> None:
    if wanted is not None:
        raise SimIPUError(f"{location}: dataset_config_name: it has no configurations, found {wanted!r}")


def _find_config(source: str, wanted: str | None) -> str:
    try:
        names = datasets.get_dataset_config_names(source)
    except (ValueError, OSError, ImportError, datasets.exceptions.DatasetsError) as error:
        what, folder = "neither a folder here nor a data set that can be read", Path(source)
        if folder.is_dir():
            what = f"expected a folder of one data set, found {listed(folder)}{_hint(folder)}"
        raise SimIPUError(f"{source}: {what} ({error})") from error
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None or wanted not in names:
        raise SimIPUError(f"{source}: expected dataset_config_name to be one of {names}, found {wanted!r}")
    return wanted


def listed(folder: Path) -> str:
    """What lies in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return (", ".join(names[:10]) + (", …" if len(names) > 10 else "")) or "an empty folder"


def _hint(folder: Path) -> str:
    """What to give instead of a folder that nothing can be read from."""
    near = [folder.absolute().parent, folder.absolute().parent.parent, *sorted(folder.iterdir())]
    for other in near:
        with suppress(OSError):  # a folder beside it that is closed to us, such as lost+found
            if other.is_dir() and any(reader.configurations(other) for reader in READERS):
                return f"; did you mean {other}?"
    archives = sorted(path.name for path in folder.iterdir() if path.suffix in ARCHIVES)
    if archives:
        return f"; unpack {', '.join(archives[:3])} first"
    if any((folder / place / "image_02").is_dir() for place in ("training", "testing")):
        return (
            "; this is the layout of KITTI's tracking benchmark, which is not read: the same drives are in KITTI raw"
        )
    return ""


@contextmanager
def named_errors(location: str) -> Iterator[None]:
    """Turns what datasets and the readers raise into a SimIPUError that names the source, or the cache."""
    try:
        yield
    except SimIPUError:
        raise
    except (ValueError, OSError, ImportError, datasets.exceptions.DatasetsError) as error:
        cause: BaseException = error
        while isinstance(cause, datasets.exceptions.DatasetGenerationError) and cause.__cause__ is not None:
            cause = cause.__cause__  # what went wrong beneath "An error occurred while generating the dataset"
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise SimIPUError(
                f"{cause.filename or 'the cache of datasets'}: cannot be read or written ({cause}); the cache of "
                f"prepared rows is {datasets.config.HF_DATASETS_CACHE}, name another with HF_DATASETS_CACHE"
            ) from error
        raise SimIPUError(f"{location}: {cause}") from error
