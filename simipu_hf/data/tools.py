"""Looks at a data set before training on it (`inspect_dataset`), and packs it into Parquet (`convert_to_parquet`)."""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from huggingface_hub import DatasetCardData
from PIL import Image
from tqdm.auto import tqdm

from ..dataset_scripts import kitti
from ..errors import SimIPUError
from .frame import Frame
from .loading import find_source, load_pretraining_dataset, one_source, source_splits
from .rows import calibration_from_row, image_from_row, points_from_row

logger = logging.getLogger(__name__)

MANIFEST = "conversion.json"  # what an unfinished conversion is of
BATCH = 16  # rows in memory at a time, and in a Parquet row group: about 50 MB


# --- inspect --------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """One kind of damage and the frames that have it (empty: the data set as a whole)."""

    message: str
    frames: list[str] = field(default_factory=list)


@dataclass
class Range:
    """Smallest, mean and largest of what was seen."""

    min: float
    mean: float
    max: float


@dataclass
class InspectionReport:
    """What `inspect_dataset` found; `to_dict` is ready for JSON."""

    source: str
    splits: dict[str, int]
    """Rows of each split."""
    frames: int
    """Frames looked at, each once however many splits hold it."""
    image_sizes: dict[str, int] = field(default_factory=dict)
    """"1242x375" -> number of images."""
    ranges: dict[str, Range] = field(default_factory=dict)
    """Of x, y, z (metres, LiDAR frame) and reflectance over all points; and, per frame, of `points_per_scan`,
    `points_in_view` and their `depth_in_view` (metres)."""
    objects: dict[str, int] = field(default_factory=dict)
    """Object type -> number of labels, where the data set has labels."""
    problems: list[Problem] = field(default_factory=list)
    """All that is damaged or missing."""
    notes: list[str] = field(default_factory=list)
    """What is left out as the data set itself has it."""
    picture: str | None = None
    """Path of the picture that was drawn."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.frames} frames; "
            + ", ".join(f"{name} {count}" for name, count in self.splits.items()),
            "image sizes: " + ", ".join(f"{size} ({count})" for size, count in self.image_sizes.items()),
        ]
        lines += [f"{name}: {r.min:.4g} to {r.max:.4g}, mean {r.mean:.4g}" for name, r in self.ranges.items()]
        if self.objects:
            lines.append("objects: " + ", ".join(f"{name} {count}" for name, count in self.objects.items()))
        lines += [f"note: {note}" for note in self.notes]
        for problem in self.problems:
            shown = ", ".join(problem.frames[:5]) + (
                f" and {len(problem.frames) - 5} more" * (len(problem.frames) > 5)
            )
            lines.append(f"problem: {problem.message}" + (f" [{shown}]" if shown else ""))
        lines.append(f"{len(self.problems)} problems" if self.problems else "no problems")
        if self.picture:
            lines.append(f"picture: {self.picture}")
        return "\n".join(lines)


def inspect_dataset(
    dataset_name: str | None = None,
    data_dir: str | os.PathLike | None = None,
    dataset_config_name: str | None = None,
    split: str | Sequence[str] | None = None,
    picture_path: str | os.PathLike | None = None,
    *,
    cameras: Sequence[int] | None = None,
    drives: Sequence[str] | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> InspectionReport:
    """Reads every frame completely, counts, measures, and lists all damage in one run.

    Args:
        dataset_name, data_dir, dataset_config_name, cameras, drives, cache_dir: As `load_pretraining_dataset`. KITTI
            folders are read directly, nothing is prepared.
        split: One split or several; None: all of them.
        picture_path: Where to draw the first sound frame's image with its points, coloured by depth.

    Raises:
        SimIPUError: there is no data set to look at, or a column is missing or of another type. Damage to single
            frames is reported, not raised.
    """
    source = _open(dataset_name, data_dir, dataset_config_name, split)
    inspector = _Inspector(None if picture_path is None else Path(picture_path))
    if source.kind == "kitti":
        listing = _list_kitti(source, cameras, drives)
        counts, notes = {name: len(frames) for name, frames in listing.splits.items()}, listing.notes
        inspector.add_problems(listing.problems)
        frames: dict[kitti.Frame, str] = {}
        for name, found in listing.splits.items():
            for frame in found:  # trainval holds the frames of train and val once more
                frames.setdefault(frame, f"{name}/{frame.frame_id}")
        readers = ((label, _kitti_readers(frame)) for frame, label in frames.items())
        total = len(frames)
    else:
        loaded = {}
        for name in source.splits:
            repeated: list[str] = []
            rows = load_pretraining_dataset(
                dataset_name, data_dir, source.config, name, cache_dir=cache_dir, skipped=repeated
            )
            loaded[name] = rows.cast_column("image", datasets.Image(decode=False))
            inspector.add_problems(repeated)
        counts, notes = {name: len(rows) for name, rows in loaded.items()}, []
        readers = (
            (f"{name}/{row['frame_id']}", _row_readers(row, rows.features))
            for name, rows in loaded.items()
            for row in rows
        )
        total = sum(counts.values())
    for label, parts in tqdm(readers, total=total, desc="Inspecting", unit="frame"):
        inspector.look_at(label, parts)
    return inspector.report(source.location, counts, total, notes)


def _kitti_readers(frame: kitti.Frame) -> dict[str, Callable[[], Any]]:
    """Each part of a frame is read on its own, so that damage to one doesn't hide damage to another."""

    def image() -> Image.Image:
        kitti.check_image(frame)
        return image_from_row({"frame_id": frame.frame_id, "image": frame.image})

    return {
        "image": image,
        "image_size": lambda: kitti.check_image(frame, kitti.read_calibration(frame)[2]),
        "points": lambda: np.frombuffer(kitti.read_points(frame.scan), dtype="<f4").reshape(-1, 4),
        "calibration": lambda: kitti.read_calibration(frame)[:2],
        "objects": lambda: kitti.read_objects(frame.labels)["type"],
    }


def _row_readers(row: dict[str, Any], features: datasets.Features) -> dict[str, Callable[[], Any]]:
    def object_types() -> list[str]:
        kind: Any = (
            features["objects"]["type"]
            if isinstance(features["objects"], dict)
            else features["objects"].feature["type"]
        )
        names = getattr(kind, "feature", kind).names
        return [names[index] for index in row["objects"]["type"]]

    return {
        "image": lambda: image_from_row(row),
        "points": lambda: points_from_row(row),
        "calibration": lambda: calibration_from_row(row),
        "objects": object_types if "objects" in row else list,
    }


class _Inspector:
    """Adds up what the frames hold."""

    def __init__(self, picture_path: Path | None) -> None:
        self.picture_path = picture_path
        self.picture: str | None = None
        self.problems: dict[str, dict[str, None]] = {}  # message -> frames, in order
        self.sizes: Counter[str] = Counter()
        self.objects: Counter[str] = Counter()
        self.ranges: dict[str, tuple[float, float, int, float]] = {}  # name -> min, sum, count, max
        self.sizes_of_camera: dict[bytes, dict[tuple[int, int], list[str]]] = {}

    def add_problems(self, messages: Sequence[str], frame: str | None = None) -> None:
        for message in messages:
            frames = self.problems.setdefault(message, {})
            if frame is not None:
                frames[frame] = None

    def look_at(self, frame: str, readers: dict[str, Callable[[], Any]]) -> None:
        found: dict[str, Any] = {}
        for part, read in readers.items():
            try:
                found[part] = read()
            except Exception as error:  # damaged files raise whatever their reader raises
                found[part] = None
                self.add_problems([str(error)], frame)
        image, points, calibration = found["image"], found["points"], found["calibration"]
        self.objects.update(found["objects"] or [])
        if image is not None:
            self.sizes[f"{image.width}x{image.height}"] += 1
        if points is not None:
            self._measure("points_per_scan", [len(points)])
            for column, values in zip(("x", "y", "z", "reflectance"), points.T, strict=True):
                self._measure(column, values)
        if image is not None and calibration is not None:
            sizes = self.sizes_of_camera.setdefault(calibration[0].tobytes(), {})
            sizes.setdefault(image.size, []).append(frame)
        if image is not None and points is not None and calibration is not None:
            projection, lidar_to_camera = calibration
            self._look_at_view(Frame(frame, np.asarray(image), points, projection @ lidar_to_camera))

    def _look_at_view(self, frame: Frame) -> None:
        _, depth, inside = frame.view
        self._measure("points_in_view", [inside.sum()])
        if not inside.any():
            self.add_problems(["expected points of the scan in the image, found none"], frame.frame_id)
            return
        self._measure("depth_in_view", depth[inside])
        if self.picture_path is not None and self.picture is None:
            self.picture = _draw(frame, self.picture_path)

    def _measure(self, name: str, values: Sequence[float] | np.ndarray) -> None:
        values = np.asarray(values, dtype=np.float64)
        low, total, count, high = self.ranges.get(name, (np.inf, 0.0, 0, -np.inf))
        self.ranges[name] = (
            min(low, values.min()),
            total + values.sum(),
            count + values.size,
            max(high, values.max()),
        )

    def _compare_sizes(self) -> None:
        """One camera has one image size: images that differ from most of their camera_projection are suspect."""
        for by_size in self.sizes_of_camera.values():
            (usual, _), *others = sorted(by_size.items(), key=lambda item: -len(item[1]))
            for size, frames in others:
                message = (
                    f"expected {usual[0]} x {usual[1]} pixels as other images with this camera_projection, found "
                    f"{size[0]} x {size[1]}; is it the calibration of another day?"
                )
                for frame in frames:
                    self.add_problems([message], frame)

    def report(self, source: str, counts: dict[str, int], frames: int, notes: list[str]) -> InspectionReport:
        self._compare_sizes()
        return InspectionReport(
            source=source,
            splits=counts,
            frames=frames,
            image_sizes=dict(self.sizes.most_common()),
            ranges={
                name: Range(float(low), float(total / count), float(high))
                for name, (low, total, count, high) in self.ranges.items()
            },
            objects=dict(self.objects.most_common()),
            problems=[Problem(message, list(frames)) for message, frames in self.problems.items()],
            notes=list(notes),
            picture=self.picture,
        )


def _draw(frame: Frame, path: Path) -> str:
    """Saves the image with its points, near red to far blue, pixel for pixel."""
    canvas = frame.image.copy()
    pixels, depth, inside = frame.view
    far_first = np.flatnonzero(inside)[np.argsort(-depth[inside])]
    hue = np.interp(np.log(depth[far_first]), np.log([3.0, 60.0]), [0, 170]).astype(np.uint8)
    colors = Image.fromarray(np.stack([hue, np.full_like(hue, 255), np.full_like(hue, 255)], -1)[None], mode="HSV")
    columns, rows = np.floor(pixels[far_first] + 0.5).astype(int).T
    for shift in (0, 1):
        canvas[np.minimum(rows + shift, len(canvas) - 1), columns] = np.asarray(colors.convert("RGB"))[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).save(path)
    return str(path)


# --- convert --------------------------------------------------------------------------------------------------------


def convert_to_parquet(
    output_dir: str | os.PathLike,
    dataset_name: str | None = None,
    data_dir: str | os.PathLike | None = None,
    dataset_config_name: str | None = None,
    split: str | Sequence[str] | None = None,
    rows_per_shard: int = 128,
    *,
    cameras: Sequence[int] | None = None,
    drives: Sequence[str] | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Packs a data set into Parquet files with the images embedded, which plain `datasets.load_dataset(output_dir)`
    reads, and which may be uploaded to the Hub as they are.

    Shards are written to `<output_dir>.partial` one by one, and the folder is renamed when all are there. After an
    interruption the same call goes on behind the last whole shard and ends with the same bytes.

    Args:
        output_dir: Folder to make; must not exist or be empty.
        dataset_name, data_dir, dataset_config_name, cameras, drives, cache_dir: As `load_pretraining_dataset`. KITTI
            folders are read directly, nothing is prepared in the cache.
        split: One split or several; None: all of them (KITTI object's `trainval` holds all of train and val again).
        rows_per_shard: Rows of a file; 128 KITTI rows take about 350 MB.

    Returns:
        `output_dir`, `splits` (rows of each), `shards`, `resumed_shards` (found whole), `bytes`; ready for JSON.

    Raises:
        SimIPUError: the output folder holds something, a frame is damaged, or the disk is full. What is whole stays
            in `<output_dir>.partial`.
    """
    target, partial = Path(output_dir), Path(f"{os.path.normpath(output_dir)}.partial")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SimIPUError(f"{target}: expected a new or empty folder to convert into, found something there")
    if rows_per_shard < 1:
        raise SimIPUError(f"rows_per_shard: expected at least 1, found {rows_per_shard}")
    source = _open(dataset_name, data_dir, dataset_config_name, split)
    if source.kind == "kitti":
        splits = _kitti_rows(_list_kitti(source, cameras, drives), source)
    else:
        splits = {
            name: _dataset_rows(
                load_pretraining_dataset(dataset_name, data_dir, source.config, name, cache_dir=cache_dir)
            )
            for name in source.splits
        }
    shards = _plan_shards(splits, rows_per_shard)
    _prepare_partial(partial, splits, rows_per_shard)
    resumed = _write_shards(partial, splits, shards)
    _write_card(partial, splits, source.config or "default")
    if target.exists():
        target.rmdir()  # empty; Windows doesn't rename onto a folder
    partial.rename(target)
    (target / MANIFEST).unlink()
    return {
        "output_dir": str(target),
        "splits": {name: rows.count for name, rows in splits.items()},
        "shards": len(shards),
        "resumed_shards": resumed,
        "bytes": sum(path.stat().st_size for path in target.rglob("*.parquet")),
    }


@dataclass
class _Rows:
    """Rows of one split, read as Arrow tables with the images embedded."""

    count: int
    features: datasets.Features
    fingerprint: str
    read: Callable[[int, int], pa.Table]


@dataclass
class _Shard:
    split: str
    start: int
    stop: int
    name: str


def _kitti_rows(listing: kitti.Listing, source: "_Source") -> dict[str, _Rows]:
    problems = listing.problems + kitti.missing_files(listing)
    if problems:
        raise SimIPUError(problems[0] + (f" (and {len(problems) - 1} more problems)" * (len(problems) > 1)))
    assert source.config is not None
    features = kitti.features(source.config)

    def reader(frames: list[kitti.Frame]) -> Callable[[int, int], pa.Table]:
        def read(start: int, stop: int) -> pa.Table:
            try:
                rows = [kitti.read_row(frame) for frame in frames[start:stop]]
            except ValueError as error:
                raise SimIPUError(str(error)) from error
            return datasets.Dataset.from_list(rows, features=features).with_format("arrow")[:]

        return read

    return {
        name: _Rows(len(frames), features, kitti.fingerprint(kitti.Listing({name: frames}, [], [])), reader(frames))
        for name, frames in listing.splits.items()
    }


def _dataset_rows(dataset: datasets.Dataset) -> _Rows:
    arrow = dataset.with_format("arrow")
    return _Rows(len(dataset), dataset.features, dataset._fingerprint, lambda start, stop: arrow[start:stop])


def _plan_shards(splits: dict[str, _Rows], rows_per_shard: int) -> list[_Shard]:
    shards = []
    for name, rows in splits.items():
        starts = range(0, rows.count, rows_per_shard)
        for index, start in enumerate(starts):
            file = f"data/{name}-{index:05d}-of-{len(starts):05d}.parquet"
            shards.append(_Shard(name, start, min(start + rows_per_shard, rows.count), file))
    return shards


def _prepare_partial(partial: Path, splits: dict[str, _Rows], rows_per_shard: int) -> None:
    """Makes the folder to work in, or keeps that of an interrupted conversion of the same rows."""
    manifest = json.dumps(
        {
            "splits": {name: [rows.count, rows.fingerprint] for name, rows in splits.items()},
            "rows_per_shard": rows_per_shard,
            "pyarrow": pa.__version__,
        }
    )
    path = partial / MANIFEST
    if path.is_file() and path.read_text(encoding="utf-8") == manifest:
        return
    if path.is_file():
        logger.warning(f"{partial}: another conversion, or its data set has changed since; starting over")
        shutil.rmtree(partial)
    elif partial.exists() and any(partial.iterdir()):
        raise SimIPUError(f"{partial}: expected an interrupted conversion or nothing, found something else")
    (partial / "data").mkdir(parents=True, exist_ok=True)
    path.write_text(manifest, encoding="utf-8")


def _write_shards(partial: Path, splits: dict[str, _Rows], shards: list[_Shard]) -> int:
    """Writes the shards that are not there yet; returns how many were."""
    resumed = 0
    total = sum(rows.count for rows in splits.values())
    with tqdm(total=total, desc="Converting", unit="row") as progress:
        for done, shard in enumerate(shards):
            path = partial / shard.name
            if path.is_file():
                resumed += 1
                progress.update(shard.stop - shard.start)
                continue
            try:
                _write_shard(path, splits[shard.split], shard, progress)
            except OSError as error:
                raise SimIPUError(
                    f"{path}: could not be written: {error}. {done} of {len(shards)} shards are kept in {partial}; "
                    "the same command goes on from there"
                ) from error
    return resumed


def _write_shard(path: Path, rows: _Rows, shard: _Shard, progress: tqdm) -> None:
    unfinished = path.with_suffix(".tmp")
    try:
        with pq.ParquetWriter(unfinished, rows.features.arrow_schema) as writer:
            for start in range(shard.start, shard.stop, BATCH):
                table = rows.read(start, min(start + BATCH, shard.stop))
                writer.write_table(embed_table_storage(table))
                progress.update(len(table))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_card(folder: Path, splits: dict[str, _Rows], config_name: str) -> None:
    """README.md whose header tells `load_dataset` the splits, their sizes and the columns."""
    features = next(iter(splits.values())).features
    infos = datasets.SplitDict()
    for name, rows in splits.items():
        size = sum(path.stat().st_size for path in (folder / "data").glob(f"{name}-*.parquet"))
        infos.add(datasets.SplitInfo(name=name, num_bytes=size, num_examples=rows.count))
    files = [{"split": name, "path": f"data/{name}-*"} for name in splits]
    header = DatasetCardData(configs=[{"config_name": config_name, "data_files": files}])
    info = datasets.DatasetInfo(features=features, splits=infos)
    DatasetInfosDict({config_name: info}).to_dataset_card_data(header)
    text = f"---\n{header.to_yaml()}\n---\n\nSynchronised camera images and LiDAR scans, one pair a row.\n"
    (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")


# --- both -----------------------------------------------------------------------------------------------------------


@dataclass
class _Source:
    location: str
    kind: str
    config: str | None
    splits: list[str]


def _open(
    dataset_name: str | None,
    data_dir: str | os.PathLike | None,
    dataset_config_name: str | None,
    split: str | Sequence[str] | None,
) -> _Source:
    location = one_source(dataset_name, data_dir)
    kind, config = find_source(location, dataset_config_name, must_be_folder=dataset_name is None)
    available = source_splits(location, kind, config) or ["train"]
    wanted = available if split is None else [split] if isinstance(split, str) else list(split)
    if not set(wanted) <= set(available):
        raise SimIPUError(f"{location}: split: expected some of {available}, found {wanted}")
    return _Source(location, kind, config, wanted)


def _list_kitti(source: _Source, cameras: Sequence[int] | None, drives: Sequence[str] | None) -> kitti.Listing:
    assert source.config is not None
    try:
        listing = kitti.list_frames(source.config, source.location, source.splits, cameras, drives)
    except ValueError as error:
        raise SimIPUError(str(error)) from error
    if not listing.splits and not listing.problems:
        raise SimIPUError(f"{source.location}: expected images with their scans, found none")
    return listing
