"""KITTI camera + LiDAR pairs as a Hugging Face data set: the object benchmark and the raw drives.

This one file needs `datasets`, NumPy and Pillow, and gives the same rows in each of these ways:

    # datasets 3.x reads it as a loading script
    load_dataset("dataset_scripts/kitti.py", "object", data_dir=ROOT, trust_remote_code=True)

    # datasets >= 4 no longer runs scripts: use the class
    builder = Kitti(config_name="object", data_dir=ROOT)
    builder.download_and_prepare(num_proc=4)
    train = builder.as_dataset(split="train")
    stream = builder.as_streaming_dataset(split="train")  # reads the files directly, prepares nothing

A row is one camera image with the LiDAR scan of the same instant:

| column | type | meaning |
| --- | --- | --- |
| `frame_id` | string | unique within a split |
| `image` | Image | the rectified colour image |
| `points` | binary | little-endian float32, N x 4: x y z reflectance, metres, LiDAR frame |
| `camera_projection` | 3 x 4 float64 | rectified camera 0 -> pixels: `P2`, `P3` (object), `P_rect_0x` (raw) |
| `lidar_to_camera` | 4 x 4 float64 | LiDAR -> rectified camera 0: `R0_rect @ Tr_velo_to_cam` |
| `objects` | sequence | `object` only: the 15 label fields of every object; empty where a frame has no label file |

The formats are those of the benchmark's own development kits (`readme.txt` of the object and of the raw data kit):
https://www.cvlibs.net/datasets/kitti
"""

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image

logger = datasets.logging.get_logger(__name__)

VERSION = datasets.Version("1.0.0")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
OBJECT_TYPES = ["Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", "DontCare"]
OBJECT_SPLITS = {"train": "training", "val": "training", "trainval": "training", "test": "testing"}
OBJECT_FIELDS = ("type", "truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y")


class Frame(NamedTuple):
    """The files of one camera + LiDAR pair; absolute paths, not checked to exist."""

    frame_id: str
    camera: int
    image: str
    scan: str
    calibration: tuple[str, ...]
    """object: `calib/ID.txt`; raw: `calib_cam_to_cam.txt`, `calib_velo_to_cam.txt` of the day."""
    labels: str | None = None


class Listing(NamedTuple):
    """What a KITTI folder holds."""

    splits: dict[str, list[Frame]]
    problems: list[str]
    """What is wrong with the folder itself: a list that names an absent frame, a drive in another day's folder, …"""
    notes: list[str]
    """What was left out as the data set itself has it: raw images without a scan, unsynchronised drives."""


# --- which frames there are -----------------------------------------------------------------------------------------


def list_frames(
    name: str,
    data_dir: str | os.PathLike | None,
    splits: Sequence[str] | None = None,
    cameras: int | Sequence[int] | None = None,
    drives: Sequence[str] | None = None,
) -> Listing:
    """Frames of a KITTI folder. Reads folder names and `ImageSets/*.txt` only.

    Args:
        name: "object" or "raw".
        data_dir: object: the folder with `training/` or `testing/`; raw: the folder with the dated folders.
        splits: list only these; default all that are there.
        cameras: 2 (left colour) and 3 (right colour). Default: object 2, raw those that a drive has.
        drives: raw only: names like "2011_09_26_drive_0009_sync"; default all.

    Raises:
        ValueError: `data_dir` is no such KITTI folder, or a split, camera or drive asked for isn't there.
    """
    root = _root(data_dir)
    chosen = None if cameras is None else (cameras,) if isinstance(cameras, int) else tuple(cameras)
    if chosen is not None and not set(chosen) <= {2, 3}:
        raise ValueError(f"cameras: expected 2 and / or 3 (KITTI's colour cameras), found {chosen}")
    splits = (splits,) if isinstance(splits, str) else splits
    drives = (drives,) if isinstance(drives, str) else drives
    if name == "raw":
        return _list_raw(root, splits, chosen, drives)
    if drives is not None:
        raise ValueError("drives can be chosen with the configuration 'raw' only")
    return _list_object(root, splits, chosen or (2,))


def split_names(name: str, data_dir: str | os.PathLike | None) -> list[str]:
    """Splits of a KITTI folder. Raises ValueError where it is none."""
    root = _root(data_dir)
    return list(_object_splits(root)) if name == "object" else ["train"]


def _list_object(root: str, splits: Sequence[str] | None, cameras: Sequence[int]) -> Listing:
    available = _object_splits(root)
    _require(splits, available, f"{root}: splits")
    frames: dict[str, list[Frame]] = {}
    problems: list[str] = []
    for split, id_file in available.items():
        if splits is None or split in splits:
            frames[split] = _object_frames(os.path.join(root, OBJECT_SPLITS[split]), id_file, cameras, problems)
    return Listing({split: found for split, found in frames.items() if found}, problems, [])


def _object_splits(root: str) -> dict[str, str | None]:
    """Split -> its file in `ImageSets/`, or None for every frame of its folder."""
    files = {split: os.path.join(root, "ImageSets", f"{split}.txt") for split in OBJECT_SPLITS}
    splits: dict[str, str | None] = {split: path for split, path in files.items() if os.path.isfile(path)}
    if not splits.keys() & {"train", "val", "trainval"}:
        splits["train"] = None
    splits.setdefault("test", None)
    splits = {split: path for split, path in splits.items() if os.path.isdir(os.path.join(root, OBJECT_SPLITS[split]))}
    if not splits:
        raise _not_kitti(root, "training/ or testing/, each with image_2/, velodyne/ and calib/")
    return splits


def _object_frames(folder: str, id_file: str | None, cameras: Sequence[int], problems: list[str]) -> list[Frame]:
    for needed in [f"image_{camera}" for camera in cameras] + ["velodyne", "calib"]:
        if not os.path.isdir(os.path.join(folder, needed)):
            raise ValueError(
                f"{folder}: expected the folder {needed}, found {_content(folder)}. "
                'If you need other splits only, choose them: splits=("train",)'
            )
    images = {camera: _files(os.path.join(folder, f"image_{camera}"), IMAGE_SUFFIXES) for camera in cameras}
    scans = _files(os.path.join(folder, "velodyne"), (".bin",))
    labels = _files(os.path.join(folder, "label_2"), (".txt",))
    known = sorted(set(scans).union(*images.values()))
    frames = []
    for frame_id in known if id_file is None else _listed_ids(id_file, known, folder, problems):
        for camera in cameras:
            image = os.path.join(folder, f"image_{camera}", f"{frame_id}.png")
            frames.append(
                Frame(
                    frame_id if camera == 2 else f"{frame_id}_image_{camera}",
                    camera,
                    images[camera].get(frame_id, image),
                    os.path.join(folder, "velodyne", f"{frame_id}.bin"),
                    (os.path.join(folder, "calib", f"{frame_id}.txt"),),
                    labels.get(frame_id),
                )
            )
    return frames


def _listed_ids(path: str, known: list[str], folder: str, problems: list[str]) -> list[str]:
    """Frame ids of an `ImageSets` file, one a line; repeated and absent ones become problems."""
    there = set(known)
    ids: dict[str, None] = {}
    for number, line in enumerate(_lines(path), start=1):
        frame_id = line.strip()
        if not frame_id:
            continue
        if frame_id in ids:
            problems.append(f"{path}, line {number}: frame {frame_id} is listed a second time")
        elif frame_id not in there:
            problems.append(f"{path}, line {number}: frame {frame_id} has neither image nor scan in {folder}")
        else:
            ids[frame_id] = None
    return list(ids)


def _list_raw(
    root: str, splits: Sequence[str] | None, cameras: Sequence[int] | None, drives: Sequence[str] | None
) -> Listing:
    days = [name for name in _folders(root) if re.fullmatch(r"\d{4}_\d\d_\d\d", name)]
    if not days:
        raise _not_kitti(root, "dated folders such as 2011_09_26/, each with calib_*.txt and *_drive_*_sync/")
    _require(splits, ["train"], f"{root}: splits")
    frames: list[Frame] = []
    problems: list[str] = []
    notes: list[str] = []
    found = [(day, drive) for day in days for drive in _folders(os.path.join(root, day)) if "_drive_" in drive]
    synced = [(day, drive) for day, drive in found if drive.endswith("_sync")]
    if drives is not None:
        wanted = {drive if drive.endswith("_sync") else f"{drive}_sync" for drive in drives}
        _require(sorted(wanted), [drive for _, drive in synced], f"{root}: drives")
        synced = [(day, drive) for day, drive in synced if drive in wanted]
    elif len(synced) < len(found):
        left_out = [drive for day, drive in found if (day, drive) not in synced]
        notes.append(f"{root}: left out {left_out}: only *_sync drives have rectified images and a scan for each")
    for day, drive in synced:
        if drive.startswith(f"{day}_drive_"):
            frames += _drive_frames(os.path.join(root, day), drive, cameras, problems, notes)
        else:
            problems.append(f"{os.path.join(root, day, drive)}: expected a drive of {day}, found another day's")
    return Listing({"train": frames} if frames else {}, problems, notes)


def _drive_frames(
    day: str, drive: str, cameras: Sequence[int] | None, problems: list[str], notes: list[str]
) -> list[Frame]:
    """Every image that has a scan. KITTI itself lacks a few scans: drive 2011_09_26_drive_0009 has 447 images of each
    camera and 443 scans."""
    folder = os.path.join(day, drive)
    scans = _files(os.path.join(folder, "velodyne_points", "data"), (".bin",))
    if not scans:
        problems.append(f"{os.path.join(folder, 'velodyne_points', 'data')}: expected *.bin scans, found none")
        return []
    frames = []
    for camera in cameras or (2, 3):
        images = _files(os.path.join(folder, f"image_{camera:02d}", "data"), IMAGE_SUFFIXES)
        if not images and cameras is not None:
            problems.append(f"{os.path.join(folder, f'image_{camera:02d}', 'data')}: expected images, found none")
        for kind, here, others in (("images", images, scans), ("scans", scans, images)):
            alone = sorted(set(here) - set(others))
            if images and alone:
                notes.append(
                    f"{folder}: {len(alone)} of {len(here)} {kind} have no partner for camera {camera}, left out: "
                    f"{', '.join(alone[:8])}{', …' if len(alone) > 8 else ''}"
                )
        calibration = tuple(os.path.join(day, f"calib_{name}.txt") for name in ("cam_to_cam", "velo_to_cam"))
        frames += [
            Frame(f"{drive}_image_{camera:02d}_{key}", camera, images[key], scans[key], calibration)
            for key in sorted(set(images) & set(scans))
        ]
    if not frames:
        problems.append(f"{folder}: expected image_02/data or image_03/data with a scan for some image, found no pair")
    return frames


def missing_files(listing: Listing) -> list[str]:
    """A message for each file that a listed frame lacks."""
    frames = {frame.image: frame for split in listing.splits.values() for frame in split}.values()
    needed = {path: frame for frame in frames for path in (frame.image, frame.scan, *frame.calibration)}
    return [
        f"{path}: expected for frame {frame.frame_id}, found no such file"
        for path, frame in needed.items()
        if not os.path.isfile(path)
    ]


def fingerprint(listing: Listing) -> str:
    """Changes with every change of the frames' files (by size and time of change), so that a cache can't be stale."""
    digest = hashlib.sha256()
    for split, frames in listing.splits.items():
        for frame in frames:
            for path in (frame.image, frame.scan, *frame.calibration, frame.labels):
                found = os.stat(path) if path is not None and os.path.isfile(path) else None
                state = (split, path, found and found.st_size, found and found.st_mtime_ns)
                digest.update(repr(state).encode("utf-8"))
    return digest.hexdigest()


def _root(data_dir: str | os.PathLike | None) -> str:
    if data_dir is None or not os.path.isdir(data_dir):
        raise ValueError(f"data_dir must be the folder of a KITTI data set, found no folder at {data_dir!r}")
    return os.path.abspath(data_dir)


def _folders(path: str) -> list[str]:
    return sorted(name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name)))


def _files(folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Stem -> path of the files with one of these suffixes; nothing where the folder is absent."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in sorted(names) if name.lower().endswith(suffixes) and not name.startswith(".")]
    return {os.path.splitext(name)[0]: os.path.join(folder, name) for name in names}


def _content(folder: str) -> str:
    names = sorted(os.listdir(folder))
    return ", ".join(names[:10]) + (f", … ({len(names)} in all)" if len(names) > 10 else "") or "an empty folder"


def _not_kitti(root: str, expected: str) -> ValueError:
    return ValueError(
        f"{root} is not a KITTI folder of this configuration: expected {expected}; found {_content(root)}"
    )


def _require(wanted: Iterable[str] | None, available: Collection[str], what: str) -> None:
    missing = [name for name in wanted or () if name not in available]
    if missing:
        raise ValueError(f"{what}: expected some of {sorted(available)}, found {missing}")


# --- the content of a frame -----------------------------------------------------------------------------------------


def read_row(frame: Frame) -> dict:
    """The row of a frame (see the table above); `image` is the path, `objects` there for the object benchmark.

    Raises:
        ValueError: a file is missing or damaged; names the file, what was expected and what was found.
    """
    projection, lidar_to_camera, size = read_calibration(frame)
    check_image(frame, size)
    row = {
        "frame_id": frame.frame_id,
        "image": frame.image,
        "points": read_points(frame.scan),
        "camera_projection": projection.tolist(),
        "lidar_to_camera": lidar_to_camera.tolist(),
    }
    if _is_object(frame):
        row["objects"] = read_objects(frame.labels)
    return row


def check_image(frame: Frame, size: tuple[int, int] | None = None) -> None:
    """Raises ValueError where the image is missing, broken, or not of `size` (width, height). Does not decode it."""
    try:
        with Image.open(frame.image) as image:
            found = image.size
            image.verify()
    except Exception as error:
        raise ValueError(f"{frame.image}: expected a readable image, found: {error}") from error
    if size is not None and found != size:
        raise ValueError(
            f"{frame.image}: expected {size[0]} x {size[1]} pixels, the S_rect_{frame.camera:02d} of "
            f"{frame.calibration[0]}, found {found[0]} x {found[1]}; is it the calibration of another day?"
        )


def read_points(path: str) -> bytes:
    """A scan's bytes, little-endian float32 x, y, z (metres, LiDAR frame), reflectance; finite, at least one point."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: expected a LiDAR scan, found no such file")
    with open(path, "rb") as file:
        data = file.read()
    if not data or len(data) % 16:
        raise ValueError(f"{path}: expected whole points of 16 bytes each, found {len(data)} bytes")
    damaged = ~np.isfinite(np.frombuffer(data, dtype="<f4").reshape(-1, 4)).all(axis=1)
    if damaged.any():
        raise ValueError(
            f"{path}: expected finite points, found {damaged.sum()} of {len(damaged)} with NaN or infinity, "
            f"the first at index {damaged.argmax()}"
        )
    return data


def read_calibration(frame: Frame) -> tuple[np.ndarray, np.ndarray, tuple[int, int] | None]:
    """camera_projection (3, 4), lidar_to_camera (4, 4), both float64, and the image size (width, height) if it's told.

    Both cameras share `lidar_to_camera`: it leads to the rectified frame of camera 0, and each projection matrix
    holds its own camera's offset.
    """
    if _is_object(frame):
        path = frame.calibration[0]
        values = _read_values(path)
        projection = _matrix(values, path, f"P{frame.camera}", (3, 4))
        rectification = _matrix(values, path, "R0_rect", (3, 3))
        lidar_to_unrectified = _matrix(values, path, "Tr_velo_to_cam", (3, 4))
        size = None
    else:
        cam_path, velo_path = frame.calibration
        cam, velo = _read_values(cam_path), _read_values(velo_path)
        projection = _matrix(cam, cam_path, f"P_rect_{frame.camera:02d}", (3, 4))
        rectification = _matrix(cam, cam_path, "R_rect_00", (3, 3))
        lidar_to_unrectified = np.hstack(
            [_matrix(velo, velo_path, "R", (3, 3)), _matrix(velo, velo_path, "T", (3, 1))]
        )
        width, height = _matrix(cam, cam_path, f"S_rect_{frame.camera:02d}", (2,))
        size = (round(width), round(height))
    return projection, _homogeneous(rectification) @ _homogeneous(lidar_to_unrectified), size


def read_objects(path: str | None) -> dict[str, list]:
    """Field -> its value for every object of a label file; the fields are the benchmark's 15, boxes and vectors as
    lists; empty lists where there is no file (`path` None)."""
    objects: dict[str, list] = {field: [] for field in OBJECT_FIELDS}
    for number, line in enumerate(_lines(path) if path else (), start=1):
        values = line.split()
        if not values:
            continue
        if len(values) != 15 or values[0] not in OBJECT_TYPES:
            raise ValueError(
                f"{path}, line {number}: expected 15 fields, the first one of {OBJECT_TYPES}, "
                f"found {len(values)}: {line.strip()!r}"
            )
        try:
            truncated, occluded, alpha, *box, rotation_y = [float(value) for value in values[1:]]
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected numbers after the type, found: {error}") from error
        parsed = (values[0], truncated, int(occluded), alpha, box[:4], box[4:7], box[7:10], rotation_y)
        for field, value in zip(OBJECT_FIELDS, parsed, strict=True):
            objects[field].append(value)
    return objects


def _is_object(frame: Frame) -> bool:
    return len(frame.calibration) == 1


def _lines(path: str) -> list[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().splitlines()


def _read_values(path: str) -> dict[str, str]:
    """Lines `key: values` of a calibration file."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: expected a calibration file, found no such file")
    pairs = (line.partition(":") for line in _lines(path))
    return {key.strip(): values for key, colon, values in pairs if colon}


def _matrix(values: dict[str, str], path: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    if key not in values:
        raise ValueError(f"{path}: expected a line '{key}:', found {', '.join(values) or 'no such lines'}")
    try:
        numbers = np.array([float(value) for value in values[key].split()], dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path}, line '{key}:': expected numbers, found: {error}") from error
    if numbers.size != np.prod(shape) or not np.isfinite(numbers).all():
        raise ValueError(
            f"{path}, line '{key}:': expected {np.prod(shape)} finite numbers, found {numbers.size}: "
            f"{values[key].strip()!r}"
        )
    return numbers.reshape(shape)


def _homogeneous(matrix: np.ndarray) -> np.ndarray:
    result = np.eye(4)
    result[:3, : matrix.shape[1]] = matrix
    return result


# --- the data set ---------------------------------------------------------------------------------------------------


@dataclass
class KittiConfig(datasets.BuilderConfig):
    """Configuration of `Kitti`; `splits`, `cameras` and `drives` as in `list_frames`.

    `on_bad_row`: "error" stops at a missing or damaged file, "skip" leaves that frame out and logs why.
    """

    splits: tuple[str, ...] | None = None
    cameras: tuple[int, ...] | None = None
    drives: tuple[str, ...] | None = None
    on_bad_row: str = "error"

    def list_frames(self) -> Listing:
        return list_frames(self.name, self.data_dir, self.splits, self.cameras, self.drives)

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: datasets.Features | None = None) -> str:
        # the cache folder's name: rows prepared from files that have changed since must not be found again
        if self.data_dir is not None:
            config_kwargs = {**config_kwargs, "files": fingerprint(self.list_frames())}
        return super().create_config_id(config_kwargs, custom_features)


class Kitti(datasets.GeneratorBasedBuilder):
    """KITTI object (`ImageSets/` train, val, trainval, test where there; else train: all of `training/`, test: all of
    `testing/`) and KITTI raw (train: every image of every drive that has a scan)."""

    VERSION = VERSION
    BUILDER_CONFIG_CLASS = KittiConfig
    BUILDER_CONFIGS = [  # noqa: RUF012
        KittiConfig(name="object", version=VERSION, description="KITTI object benchmark"),
        KittiConfig(name="raw", version=VERSION, description="KITTI raw drives, *_sync"),
    ]
    DEFAULT_CONFIG_NAME = "object"
    DEFAULT_WRITER_BATCH_SIZE = 16  # rows of about 2 MB

    def __init__(self, *args: Any, hash: str | None = None, **kwargs: Any) -> None:
        # datasets only hashes code that it loads as a script; with this, rows of an older version are not found again
        super().__init__(*args, hash=hash or _code_hash(), **kwargs)

    def as_dataset(self, split: Any = None, **kwargs: Any) -> Any:
        return super().as_dataset(_kitti_split(split), **kwargs)

    def as_streaming_dataset(self, split: Any = None, **kwargs: Any) -> Any:
        return super().as_streaming_dataset(_kitti_split(split), **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description=f"{self.config.description}: synchronised camera + LiDAR pairs",
            features=features(self.config.name),
            homepage="https://www.cvlibs.net/datasets/kitti",
            license="CC BY-NC-SA 3.0",
            citation="Geiger, Lenz, Stiller, Urtasun: Vision meets robotics: The KITTI dataset. IJRR 2013.",
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        if self.config.on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row: expected 'error' or 'skip', found {self.config.on_bad_row!r}")
        listing = self.config.list_frames()
        for note in listing.notes:
            logger.warning(note)
        problems = list(listing.problems)
        if self.config.on_bad_row == "error":
            problems += missing_files(listing)
            if problems:
                more = f"\nand {len(problems) - 10} more" if len(problems) > 10 else ""
                raise ValueError("\n".join(problems[:10]) + more)
        for problem in problems:
            logger.warning(problem)
        if not listing.splits:
            raise ValueError(f"{self.config.data_dir}: expected images with their scans, found none")
        # a list is what datasets divides among processes and stream shards
        return [datasets.SplitGenerator(split, {"frames": frames}) for split, frames in listing.splits.items()]

    def _generate_examples(self, frames: Iterable[Frame]) -> Iterator[tuple[str, dict[str, Any]]]:
        for frame in frames:
            try:
                row = read_row(frame)
            except ValueError as error:
                if self.config.on_bad_row == "error":
                    raise
                logger.warning(f"frame {frame.frame_id} skipped: {error}")
                continue
            yield frame.frame_id, row


def features(name: str) -> datasets.Features:
    """Columns of the configuration "object" or "raw"."""
    columns = {
        "frame_id": datasets.Value("string"),
        "image": datasets.Image(),
        "points": datasets.Value("binary"),
        "camera_projection": datasets.Array2D((3, 4), "float64"),
        "lidar_to_camera": datasets.Array2D((4, 4), "float64"),
    }
    if name == "object":
        columns["objects"] = datasets.Sequence(
            {
                "type": datasets.ClassLabel(names=OBJECT_TYPES),
                "truncated": datasets.Value("float64"),
                "occluded": datasets.Value("int32"),
                "alpha": datasets.Value("float64"),
                "bbox": datasets.Sequence(datasets.Value("float64"), length=4),
                "dimensions": datasets.Sequence(datasets.Value("float64"), length=3),
                "location": datasets.Sequence(datasets.Value("float64"), length=3),
                "rotation_y": datasets.Value("float64"),
            }
        )
    return datasets.Features(columns)


def _kitti_split(split: Any) -> Any:
    """`validation`, as Hugging Face calls it, is KITTI's `val`."""
    return re.sub(r"\bvalidation\b", "val", split) if isinstance(split, str) else split


def _code_hash() -> str:
    with open(__file__, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
