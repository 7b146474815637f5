"""Packs a data set into Parquet files with the images inside."""

import itertools
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub import DatasetCardData
from PIL import Image

from ..dataset_scripts.kitti import points_in_view
from ..errors import SimIPUError, first_line
from ..files import atomic_path, check_apart, check_not_mounted, write_lock
from ..modeling.geometry import pixel_transform
from ..processes import run_in_processes
from .depth import read_depth_png, resize_depth_map
from .inspection import load_splits, open_source
from .kitti_objects import by_field
from .loading import list_frames
from .rows import REQUIRED_COLUMNS, calibration_from_row, image_from_row, open_image, points_from_row
from .sources import hub_license, named_errors, undecoded

logger = logging.getLogger(__name__)

MANIFEST = "conversion.json"  # what an unfinished conversion is of
BATCH = 16  # rows in memory at a time, and in a Parquet row group
FORMATS = ("jpeg", "png", "webp")


@dataclass(frozen=True)
class Packing:
    """What happens to each row on its way into a file.

    Args:
        image_size: height and width to resize images to; `camera_projection`, the boxes of labels and `depth` follow,
            so that the benchmark's least heights count resized pixels. `None` keeps them.
        image_format: "jpeg", "png" or "webp" to encode images anew; `None` keeps the files byte for byte, and writes
            PNG where they are resized.
        quality: of JPEG and WebP, 1 to 100.
        whole_scans: keep all points, not only those in the image.
    """

    image_size: tuple[int, int] | None = None
    image_format: str | None = None
    quality: int = 90
    whole_scans: bool = False

    def __post_init__(self) -> None:
        if self.image_format not in (None, *FORMATS):
            raise SimIPUError(f"image_format: expected one of {FORMATS}, found {self.image_format!r}")
        if not 1 <= self.quality <= 100:
            raise SimIPUError(f"quality: expected 1 to 100, found {self.quality}")
        if self.quality != 90 and self.image_format in (None, "png"):
            raise SimIPUError("quality does nothing without image_format jpeg or webp")
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise SimIPUError(f"image_size: expected height and width in pixels, found {self.image_size}")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row (its images undecoded) as it is written."""
        row = dict(row)
        image = image_from_row(row)
        projection, lidar_to_camera = calibration_from_row(row)
        points = points_from_row(row)
        if not self.whole_scans:
            points = points_in_view(points, projection @ lidar_to_camera, image.size)
            if not len(points):
                raise SimIPUError(f"frame {row['frame_id']}: expected points of the scan in the image, found none")
            row["points"] = points.tobytes()
        if self.image_size is not None or self.image_format is not None:
            height, width = self.image_size or (image.height, image.width)
            moved = pixel_transform((0, 0, image.height, image.width), (height, width), False, True)
            row["camera_projection"] = (moved @ projection).tolist()
            objects = row.get("objects")
            labels = by_field(objects)
            if objects and {"bbox", "rotation_y"} <= labels.keys():  # not of another form
                corners = np.reshape(labels["bbox"], (-1, 2)) * moved.diagonal()[:2] + moved[:2, 2]
                boxes = corners.reshape(-1, 4).tolist()
                if isinstance(objects, dict):
                    row["objects"] = {**objects, "bbox": boxes}
                else:
                    row["objects"] = [{**one, "bbox": box} for one, box in zip(objects, boxes, strict=True)]
            if row.get("depth") is not None and self.image_size is not None:
                depth = resize_depth_map(read_depth_png(row["depth"], f"frame {row['frame_id']}"), height, width)
                row["depth"] = _encode(Image.fromarray((depth * 256).round().astype(np.uint16)), "png")
            resized = image.resize((width, height), Image.Resampling.BILINEAR)
            row["image"] = _encode(resized, self.image_format or "png", quality=self.quality)
        return row


def _encode(image: Image.Image, image_format: str, **options: Any) -> dict[str, Any]:
    data = BytesIO()
    image.save(data, image_format, **options)
    return {"bytes": data.getvalue(), "path": None}


def convert_to_parquet(
    output_dir: str | os.PathLike,
    dataset_name: str | None = None,
    data_dir: str | os.PathLike | None = None,
    dataset_config_name: str | None = None,
    split: str | Sequence[str] | None = None,
    *,
    max_shard_size: str = "500MB",
    num_shards: int = 1,
    image_size: tuple[int, int] | None = None,
    image_format: str | None = None,
    quality: int = 90,
    whole_scans: bool = False,
    cameras: Sequence[int | str] | None = None,
    scenes: Sequence[str] | None = None,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Packs a data set into Parquet files with the images embedded, which plain `datasets.load_dataset(output_dir)`
    reads, and which may be uploaded to the Hub as they are.

        convert_to_parquet("kitti_parquet", data_dir="KITTI")
        convert_to_parquet("small", data_dir="KITTI", image_size=(192, 640), image_format="jpeg", num_shards=16)

    Files are written to `<output_dir>.partial` one by one, and the folder is renamed when all are there. After an
    interruption the same call goes on behind the last whole file and ends with the same bytes.

    Args:
        output_dir: Folder to make; must not exist or be empty.
        dataset_name, data_dir, dataset_config_name, cameras, scenes, num_proc, cache_dir: As
            `load_pretraining_dataset`, one source.
        split: One split or several; None: all of them (KITTI object's `trainval` holds all of train and val again).
        max_shard_size: About the largest size of a file.
        num_shards: At least so many files a split: for streaming, as many as processes times data-loading workers.
        image_size, image_format, quality, whole_scans: See `Packing`.

    Returns:
        `output_dir`, `splits` (rows of each), `shards`, `resumed_shards` (found whole), `bytes`; ready for JSON.

    Raises:
        SimIPUError: the output folder holds something or is being written by another process, the splits have
            different columns, a frame is damaged, or the disk is full. What is whole stays in `<output_dir>.partial`.
    """
    target = Path(output_dir).resolve()
    partial_dir = target.with_name(f"{target.name}.partial")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SimIPUError(f"{output_dir}: expected a new or empty folder to convert into, found something there")
    check_not_mounted(target)
    if num_shards < 1:
        raise SimIPUError(f"num_shards: expected at least 1, found {num_shards}")
    with named_errors("max_shard_size"):
        shard_bytes = convert_file_size_to_int(max_shard_size)
    packing: Packing | None = Packing(image_size, image_format, quality, whole_scans)
    source, names = open_source(dataset_name, data_dir, dataset_config_name, split)
    check_apart(source.location, target)
    if source.reader is not None and scenes is not None and split is None:
        listing = list_frames(source, names, cameras, scenes, skipped=None)
        names = [name for name in names if listing.splits.get(name)] or names
    options: dict[str, Any] = {"cameras": cameras, "scenes": scenes, "num_proc": num_proc, "cache_dir": cache_dir}
    splits = load_splits(source, names, whole_scans=whole_scans, **options)
    features = _common_features(source.location, splits)
    for rows in splits.values() if image_size else ():
        depth = rows.features.get("depth")
        if not (depth is None or isinstance(depth, datasets.Image)):
            raise SimIPUError(f"{source.location}: depth: expected datasets.Image to resize with image, found {depth}")
    already_checked = source.reader is not None
    packing = None if already_checked and not (image_size or image_format) else packing
    shards = [
        shard for name, rows in splits.items() for shard in _plan_shards(name, rows, packing, shard_bytes, num_shards)
    ]
    with write_lock(target):
        _prepare_partial(partial_dir, splits, shards, packing)
        missing = [shard for shard in shards if not (partial_dir / shard.file).is_file()]
        try:
            write = partial(_write_shard, partial_dir, splits, packing)
            run_in_processes(write, missing, num_proc, "Converting", lambda shard: shard.stop - shard.start)
        except SimIPUError as error:
            raise SimIPUError(f"{error}. The same command goes on with what is whole in {partial_dir}") from error
        _write_card(partial_dir, splits, features, source.config or "default")
        if target.exists():
            target.rmdir()  # empty; Windows doesn't rename onto a folder
        partial_dir.rename(target)
        (target / MANIFEST).unlink()
    return {
        "output_dir": str(output_dir),
        "splits": {name: len(rows) for name, rows in splits.items()},
        "shards": len(shards),
        "resumed_shards": len(shards) - len(missing),
        "bytes": sum(path.stat().st_size for path in target.rglob("*.parquet")),
    }


@dataclass(frozen=True)
class _Shard:
    split: str
    start: int
    stop: int
    file: str


def _plan_shards(
    name: str,
    rows: datasets.Dataset,
    packing: Packing | None,
    shard_bytes: int,
    num_shards: int,
) -> list[_Shard]:
    tables = [_table(rows.select([index]), packing) for index in range(0, len(rows), max(1, len(rows) // 8))]
    row_size = sum(table.nbytes for table in tables) / len(tables)
    most = max(1, int(shard_bytes / row_size))
    needed = -(-len(rows) // most)
    count = min(len(rows), -(-max(needed, 1) // num_shards) * num_shards)  # a multiple, for as many processes
    bounds = [len(rows) * index // count for index in range(count + 1)]
    return [
        _Shard(name, start, stop, f"data/{name}-{index:05d}-of-{len(bounds) - 1:05d}.parquet")
        for index, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]


def _prepare_partial(
    folder: Path, splits: dict[str, datasets.Dataset], shards: list[_Shard], packing: Packing | None
) -> None:
    """Makes the folder to work in, or keeps that of an interrupted conversion of the same rows."""
    manifest = json.dumps(
        {
            "rows": {name: rows._fingerprint for name, rows in splits.items()},
            "shards": [asdict(shard) for shard in shards],
            "packing": packing and asdict(packing),
            "pyarrow": pa.__version__,
        }
    )
    path = folder / MANIFEST
    if path.is_file() and path.read_text(encoding="utf-8") == manifest:
        for leftover in (folder / "data").glob(".*.parquet"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        return
    if path.is_file():
        logger.warning(f"{folder}: another conversion, or its data set has changed since; starting over")
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise SimIPUError(f"{folder}: expected an interrupted conversion or nothing, found something else")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    path.write_text(manifest, encoding="utf-8")


def _write_shard(folder: Path, splits: dict[str, datasets.Dataset], packing: Packing | None, shard: _Shard) -> None:
    rows = splits[shard.split]
    schema = _stored_features(rows).arrow_schema
    with atomic_path(folder / shard.file) as beside, pq.ParquetWriter(beside, schema) as writer:
        for start in range(shard.start, shard.stop, BATCH):
            writer.write_table(_table(rows.select(range(start, min(start + BATCH, shard.stop))), packing))


def _stored_features(rows: datasets.Dataset) -> datasets.Features:
    """Of the rows as they are read again: their images are decoded then."""
    return datasets.Features({**rows.features, "image": datasets.Image()})


def _common_features(location: str, splits: dict[str, datasets.Dataset]) -> datasets.Features:
    """Those of every split, without which none of the files could be read again."""
    first, *others = splits
    features = _stored_features(splits[first])
    for name in others:
        found = _stored_features(splits[name])
        different = sorted(column for column in features | found if features.get(column) != found.get(column))
        if different:
            raise SimIPUError(
                f"{location}: expected the same columns in every split, found that {', '.join(different)} of {name} "
                f"differ from those of {first}: convert the splits one by one (--split)"
            )
    return features


def _table(rows: datasets.Dataset, packing: Packing | None) -> pa.Table:
    """All of `rows`, a few: what is done to them costs time for every file of the data set that they belong to."""
    features = _stored_features(rows)
    table = rows.with_format("arrow")[:]
    if packing is not None:
        # those that it needs or changes; all others are copied as they are stored
        changed = [*REQUIRED_COLUMNS, *(("objects", "depth") if packing.image_size else ())]
        columns = [column for column in changed if column in features]
        packed = datasets.Dataset.from_list(
            [packing(row) for row in undecoded(rows.select_columns(columns))],
            features=datasets.Features({column: features[column] for column in columns}),
        ).with_format("arrow")[:]
        for column in columns:
            table = table.set_column(table.column_names.index(column), column, packed[column])
    _refuse_files_that_are_no_images(table, features)
    return embed_table_storage(table.cast(features.arrow_schema))


def _refuse_files_that_are_no_images(table: pa.Table, features: datasets.Features) -> None:
    """A path in somebody else's rows may be that of any file here, which would be embedded, and then published."""
    for column in (name for name, feature in features.items() if isinstance(feature, datasets.Image)):
        is_embedded = pc.is_valid(pc.struct_field(table[column], "bytes")).to_pylist()
        paths = pc.struct_field(table[column], "path").to_pylist()
        for frame, path, embedded in zip(table["frame_id"].to_pylist(), paths, is_embedded, strict=True):
            if embedded or path is None:
                continue
            try:
                with open_image(path):
                    pass
            except Exception as error:
                found = f"{path} ({first_line(error)})"
                raise SimIPUError(f"frame {frame}: {column}: expected an image file, found {found}") from error


def _write_card(
    folder: Path, splits: dict[str, datasets.Dataset], features: datasets.Features, config_name: str
) -> None:
    """README.md whose header tells `load_dataset` the splits, their sizes and the columns."""
    infos = datasets.SplitDict()
    for name, rows in splits.items():
        size = sum(path.stat().st_size for path in (folder / "data").glob(f"{name}-*.parquet"))
        infos.add(datasets.SplitInfo(name=name, num_bytes=size, num_examples=len(rows)))
    files = [{"split": name, "path": f"data/{name}-*"} for name in splits]
    license, license_name = hub_license(next(iter(splits.values())).info.license)
    header = DatasetCardData(license=license, configs=[{"config_name": config_name, "data_files": files}])
    if license_name:
        header["license_name"] = license_name
    info = datasets.DatasetInfo(features=features, splits=infos)
    DatasetInfosDict({config_name: info}).to_dataset_card_data(header)
    (folder / "README.md").write_text(f"---\n{header.to_yaml()}\n---\n", encoding="utf-8", newline="\n")
