"""Argoverse 2 Sensor camera + LiDAR pairs as a Hugging Face data set, without the devkit.

This one file needs `datasets`, NumPy, pyarrow and Pillow. `datasets` 3.x runs it as a script; from 4 on use its class:

    load_dataset("dataset_scripts/argoverse2.py", "sensor", data_dir=ROOT, trust_remote_code=True)

    builder = Argoverse2(config_name="sensor", data_dir=ROOT, cameras=("ring_front_center",))
    builder.download_and_prepare(num_proc=4)
    train = builder.as_dataset(split="train")

ROOT holds `train/`, `val/`, `test/` with a folder a log (`sensors/lidar`, `sensors/cameras`, `calibration`,
`city_SE3_egovehicle.feather`). A row is one sweep with the nearest image of one camera, at most 25 ms apart:

| column | type | meaning |
| --- | --- | --- |
| `frame_id` | string | log, time of the sweep in nanoseconds and camera |
| `scene` | string | the log |
| `camera` | string | `ring_front_center` and six more |
| `image` | Image | undistorted as published; the front camera's is upright, 1550 x 2048 |
| `points` | binary | little-endian float32, N x 4: x y z (metres, ego frame: x forward, y left, z up, origin near |
| | | the ground), intensity / 255; those in the image, or with `whole_scans=True` all |
| `camera_projection` | 3 x 4 float64 | `[K / 0]`, camera -> pixels |
| `lidar_to_camera` | 4 x 4 float64 | ego at the sweep's time -> camera (x right, y down, z forward) at the image's |

Format: argoverse/av2-api (src/av2/datasets/sensor). k1 to k3 of `intrinsics.feather` are left-overs: the published
images are undistorted. Data: CC BY-NC-SA 4.0.
"""

import bisect
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
from PIL import Image

logger = datasets.logging.get_logger(__name__)

VERSION = datasets.Version("1.0.0")
LICENSE = "CC BY-NC-SA 4.0"
SPLITS = ("train", "val", "test")
CAMERAS = (
    "ring_front_center",
    "ring_front_left",
    "ring_front_right",
    "ring_side_left",
    "ring_side_right",
    "ring_rear_left",
    "ring_rear_right",
)
TOLERANCE = 25_000_000  # nanoseconds, half the time between two images (av2-api: synchronization_database.py)
CALIBRATION = (
    os.path.join("calibration", "intrinsics.feather"),
    os.path.join("calibration", "egovehicle_SE3_sensor.feather"),
)
POSES = "city_SE3_egovehicle.feather"
QUATERNION_AND_TRANSLATION = ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")


class Frame(NamedTuple):
    """One sweep and one image of a log; absolute path of the log, times in nanoseconds."""

    frame_id: str
    scene: str
    camera: str
    log: str
    sweep_time: int
    image_time: int

    @property
    def image(self) -> str:
        return os.path.join(self.log, "sensors", "cameras", self.camera, f"{self.image_time}.jpg")

    @property
    def sweep(self) -> str:
        return os.path.join(self.log, "sensors", "lidar", f"{self.sweep_time}.feather")


class Listing(NamedTuple):
    """What an Argoverse 2 folder holds."""

    splits: dict[str, list[Frame]]
    problems: list[str]
    """Logs that lack a table or all sweeps."""
    notes: list[str]
    """Sweeps without an image of a camera."""


# --- which frames there are -----------------------------------------------------------------------------------------


def configurations(data_dir: str | os.PathLike) -> list[str]:
    """["sensor"] where a folder has the layout of the Argoverse 2 Sensor data set."""
    logs = (log for split in SPLITS for log in _logs(os.path.join(data_dir, split)))
    return ["sensor"] if next(logs, None) else []


def split_names(name: str, data_dir: str | os.PathLike | None) -> list[str]:
    """Splits of a folder: train, val, test."""
    root = _root(data_dir)
    return [split for split in SPLITS if next(_logs(os.path.join(root, split)), None)]


def list_frames(
    name: str,
    data_dir: str | os.PathLike | None,
    splits: Sequence[str] | None = None,
    cameras: Sequence[str] | None = None,
    scenes: Sequence[str] | None = None,
) -> Listing:
    """Frames of an Argoverse 2 folder: all, or those of some splits, cameras and scenes (logs).

    Reads names of folders and files only. ValueError where one of these is not there.
    """
    root = _root(data_dir)
    available = split_names(name, root)
    splits, cameras = splits or available, cameras or CAMERAS
    _require(splits, available, f"{root}: splits")
    _require(cameras, CAMERAS, f"{root}: cameras")
    logs = {split: list(_logs(os.path.join(root, split))) for split in splits}
    _require(scenes, [os.path.basename(log) for split in logs.values() for log in split], f"{root}: scenes")
    listing = Listing({}, [], [])
    for split in splits:
        chosen = [log for log in logs[split] if scenes is None or os.path.basename(log) in scenes]
        frames = [frame for log in chosen for frame in _log_frames(log, cameras, listing)]
        if frames:
            listing.splits[split] = frames
    return listing


def _logs(folder: str) -> Iterator[str]:
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if os.path.isdir(os.path.join(folder, name, "sensors")):
            yield os.path.join(folder, name)


def _log_frames(log: str, cameras: Sequence[str], listing: Listing) -> list[Frame]:
    """Every sweep with the nearest image of each camera."""
    missing = [name for name in (*CALIBRATION, POSES) if not os.path.isfile(os.path.join(log, name))]
    sweeps = _times(os.path.join(log, "sensors", "lidar"), ".feather")
    if missing or not sweeps:
        expected = ", ".join(missing or ["sensors/lidar/*.feather"])
        listing.problems.append(f"{log}: expected {expected}, found no such file")
        return []
    images = {camera: _times(os.path.join(log, "sensors", "cameras", camera), ".jpg") for camera in cameras}
    scene, frames, pairs = os.path.basename(log), [], len(sweeps) * len(cameras)
    for sweep in sweeps:
        for camera in cameras:
            image = _nearest(sweep, images[camera])
            if image is not None:
                frames.append(Frame(f"{scene}_{sweep}_{camera}", scene, camera, log, sweep, image))
    if len(frames) < pairs:
        alone = pairs - len(frames)
        listing.notes.append(f"{log}: {alone} of {pairs} sweeps and cameras have no image within 25 ms, left out")
    return frames


def _nearest(time: int, times: list[int]) -> int | None:
    after = bisect.bisect_left(times, time)
    near = min(times[max(after - 1, 0) : after + 1], key=lambda other: abs(other - time), default=None)
    return near if near is not None and abs(near - time) <= TOLERANCE else None


def _times(folder: str, suffix: str) -> list[int]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def fingerprint(frames: Iterable[Frame]) -> str:
    """Changes with this file and with the frames' files, by size and time of change."""
    frames = list(frames)
    tables = {os.path.join(frame.log, name) for frame in frames for name in (*CALIBRATION, POSES)}
    with open(__file__, "rb") as file:
        digest = hashlib.sha256(file.read() + repr(frames).encode("utf-8"))
    for path in sorted(tables.union(*({frame.image, frame.sweep} for frame in frames))):
        digest.update(repr((path, _state(path))).encode("utf-8"))
    return digest.hexdigest()


def _state(path: str) -> tuple[int, int] | None:
    """Size and time of change of a file: what was read of it is used again only while they stay the same."""
    found = os.stat(path) if os.path.isfile(path) else None
    return found and (found.st_size, found.st_mtime_ns)


def _root(data_dir: str | os.PathLike | None) -> str:
    if data_dir is None or not os.path.isdir(data_dir):
        raise ValueError(f"data_dir must be the folder of Argoverse 2 Sensor, found no folder at {data_dir!r}")
    return os.path.abspath(data_dir)


def _require(wanted: Iterable[str] | None, available: Iterable[str], what: str) -> None:
    missing = [name for name in wanted or () if name not in available]
    if missing:
        raise ValueError(f"{what}: expected some of {sorted(available)}, found {missing}")


# --- the content of a frame -----------------------------------------------------------------------------------------


def read_row(frame: Frame, whole_scans: bool = False, problems: list[str] | None = None) -> dict[str, Any]:
    """The row of a frame (see the table above); `image` is the path.

    `whole_scans` keeps all points, not only those in the image. A ValueError names a file that is missing or damaged,
    what was expected and what was found; with `problems` it is appended there, and what it is about is None.
    """

    def part(read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except ValueError as error:
            if problems is None:
                raise
            problems.append(str(error))
            return None

    projection, lidar_to_camera, expected_size = part(read_calibration, frame) or (None, None, None)
    size = part(image_size, frame.image, expected_size, "intrinsics.feather")
    points = part(read_points, frame.sweep)
    if not (whole_scans or points is None or size is None or projection is None):
        points = points_in_view(points, projection @ lidar_to_camera, size)
    return {
        "frame_id": frame.frame_id,
        "scene": frame.scene,
        "camera": frame.camera,
        "image": frame.image if size else None,
        "points": None if points is None else points.tobytes(),
        "camera_projection": None if projection is None else projection.tolist(),
        "lidar_to_camera": None if lidar_to_camera is None else lidar_to_camera.tolist(),
    }


def read_calibration(frame: Frame) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """camera_projection (3, 4), lidar_to_camera (4, 4), both float64, and the image size (width, height).

    Ego at the sweep -> city -> ego at the image -> camera, in double precision: city coordinates reach thousands of
    metres.
    """
    intrinsics_path, extrinsics_path = (os.path.join(frame.log, name) for name in CALIBRATION)
    intrinsics = _record(intrinsics_path, "sensor_name", frame.camera)
    fx, fy, cx, cy = (_number(intrinsics, name, intrinsics_path) for name in ("fx_px", "fy_px", "cx_px", "cy_px"))
    size = tuple(int(_number(intrinsics, name, intrinsics_path)) for name in ("width_px", "height_px"))
    camera_to_ego = _rigid(extrinsics_path, "sensor_name", frame.camera)
    poses = os.path.join(frame.log, POSES)
    at_image, at_sweep = (_rigid(poses, "timestamp_ns", time) for time in (frame.image_time, frame.sweep_time))
    projection = np.array([[fx, 0.0, cx, 0.0], [0.0, fy, cy, 0.0], [0.0, 0.0, 1.0, 0.0]])
    return projection, np.linalg.inv(camera_to_ego) @ np.linalg.inv(at_image) @ at_sweep, size  # type: ignore[return-value]


@functools.lru_cache(maxsize=16)
def _table(path: str, key: str, state: tuple[int, int] | None) -> dict[Any, dict[str, Any]]:
    """The records of a small feather table by one of its columns."""
    records = _read_feather(path).to_pylist()
    if records and key not in records[0]:
        raise ValueError(f"{path}: expected a column {key}, found {', '.join(records[0])}")
    return {record[key]: record for record in records}


def _record(path: str, key: str, value: Any) -> dict[str, Any]:
    table = _table(path, key, _state(path))
    if value not in table:
        raise ValueError(f"{path}: expected a record with {key} {value}, found none among {len(table)}")
    return table[value]


def _number(record: dict[str, Any], name: str, path: str) -> float:
    value = record.get(name)
    if not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"{path}: expected a finite number {name}, found {value}")
    return float(value)


def _rigid(path: str, key: str, value: Any) -> np.ndarray:
    """The homogeneous matrix of a record's quaternion and translation."""
    record = _record(path, key, value)
    w, x, y, z, *translation = (_number(record, name, path) for name in QUATERNION_AND_TRANSLATION)
    length = np.linalg.norm([w, x, y, z])
    if abs(length - 1) > 0.01:
        raise ValueError(f"{path}: {key} {value}: expected a unit quaternion, found {[w, x, y, z]}")
    w, x, y, z = np.array([w, x, y, z]) / length
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = translation
    return matrix


def image_size(path: str, expected: tuple[int, int] | None = None, source: str = "") -> tuple[int, int]:
    """Width and height of an image, without decoding it. ValueError where it is missing, or by PNG's checksums or the
    mark at JPEG's end not whole (what is between is not looked at), or not of the size `expected` by `source`."""
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            if image.format in ("JPEG", "MPO") and image.getexif().get(274) in range(2, 9):
                raise ValueError("an EXIF orientation: turn the pixels to what the calibration speaks of, without it")
            image.verify()
            file.seek(-min(4096, os.path.getsize(path)), os.SEEK_END)
            if image.format in ("JPEG", "MPO") and b"\xff\xd9" not in file.read():
                file.seek(0)
                Image.open(file).load()  # raises where it is cut short; some writers leave much behind the end
            size = image.size
    except Exception as error:
        raise ValueError(f"{path}: expected a readable image, found: {error}") from error
    if expected is not None and size != expected:
        found = f"{size[0]} x {size[1]}"
        raise ValueError(f"{path}: expected {expected[0]} x {expected[1]} pixels by {source}, found {found}")
    return size


def read_points(path: str) -> np.ndarray:
    """A sweep of both LiDARs, (N, 4) float32: x, y, z in metres in the ego frame, intensity from 0 to 1."""
    return _points(path, _state(path))


@functools.lru_cache(maxsize=2)
def _points(path: str, state: tuple[int, int] | None) -> np.ndarray:
    table = _read_feather(path)
    missing = [name for name in ("x", "y", "z", "intensity") if name not in table.column_names]
    if missing or len(table) == 0:
        raise ValueError(
            f"{path}: expected points with x, y, z, intensity, found {table.column_names}, {len(table)} rows"
        )
    points = np.column_stack([table[name].to_numpy().astype("<f4") for name in ("x", "y", "z", "intensity")])
    if not np.isfinite(points).all():
        raise ValueError(f"{path}: expected finite points, found NaN or infinity")
    points[:, 3] /= 255
    return points


def _read_feather(path: str) -> pa.Table:
    try:
        return pyarrow.feather.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: expected a whole feather file, found: {error}") from error


def points_in_view(points: np.ndarray, lidar_to_image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The points (N, 4) in front of the camera that project into the image of `size` (width, height), or at most a
    pixel beside it: whoever filters them again, by whatever rule and rounding at the border, gets what the whole scan
    gives."""
    u, v, depth = lidar_to_image[:, :3] @ points[:, :3].T.astype(np.float64) + lidar_to_image[:, 3:]
    width, height = size
    inside = (u >= -1.5 * depth) & (u <= (width + 0.5) * depth) & (v >= -1.5 * depth) & (v <= (height + 0.5) * depth)
    return points[inside & (depth > 0)]


# --- the data set ---------------------------------------------------------------------------------------------------


@dataclass
class Argoverse2Config(datasets.BuilderConfig):
    """Configuration of `Argoverse2`: `splits`, `cameras`, `scenes` of `list_frames`, `whole_scans` of `read_row`.

    `on_bad_row`: "error" stops at a missing or damaged file, "skip" leaves that frame out and logs why.
    """

    splits: tuple[str, ...] | None = None
    cameras: tuple[str, ...] | None = None
    scenes: tuple[str, ...] | None = None
    on_bad_row: str = "error"
    whole_scans: bool = False

    def list_frames(self) -> Listing:
        return list_frames(self.name, self.data_dir, self.splits, self.cameras, self.scenes)

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: datasets.Features | None = None) -> str:
        # the cache folder's name: rows of files, or by code, that have changed since must not be found again
        if self.data_dir is not None:
            frames = [frame for split in self.list_frames().splits.values() for frame in split]
            config_kwargs = {**config_kwargs, "files": fingerprint(frames)}
        return super().create_config_id(config_kwargs, custom_features)


class Argoverse2(datasets.GeneratorBasedBuilder):
    """Argoverse 2 Sensor: sweeps with the images of seven ring cameras."""

    VERSION = VERSION
    BUILDER_CONFIG_CLASS = Argoverse2Config
    BUILDER_CONFIGS = [  # noqa: RUF012
        Argoverse2Config(name="sensor", version=VERSION, description="Argoverse 2 Sensor")
    ]
    DEFAULT_CONFIG_NAME = "sensor"
    DEFAULT_WRITER_BATCH_SIZE = 16

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description=f"{self.config.description}: camera + LiDAR pairs",
            features=features(self.config.name),
            homepage="https://www.argoverse.org/av2.html",
            license=LICENSE,
            citation="Wilson et al.: Argoverse 2: Next Generation Datasets for Self-Driving Perception. NeurIPS 2021.",
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        listing = self.config.list_frames()
        if listing.problems and self.config.on_bad_row != "skip":
            raise ValueError("\n".join(listing.problems[:10]))
        for message in listing.notes + listing.problems:
            logger.warning(message)
        if not listing.splits:
            expected = f"images with scans of {self.config.description}"
            raise ValueError(f"{self.config.data_dir}: expected {expected}, found none")
        # a list is what datasets divides among processes and stream shards
        return [datasets.SplitGenerator(split, {"frames": frames}) for split, frames in listing.splits.items()]

    def _generate_examples(self, frames: Iterable[Frame]) -> Iterator[tuple[str, dict[str, Any]]]:
        for frame in frames:
            try:
                row = read_row(frame, self.config.whole_scans)
                if not row["points"]:
                    raise ValueError(f"frame {frame.frame_id}: expected points of the scan in the image, found none")
                yield frame.frame_id, row
            except ValueError as error:
                if self.config.on_bad_row != "skip":
                    raise
                logger.warning(f"frame {frame.frame_id} skipped: {error}")


def features(name: str) -> datasets.Features:
    """Columns, the same for every configuration."""
    return datasets.Features(
        {
            "frame_id": datasets.Value("string"),
            "scene": datasets.Value("string"),
            "camera": datasets.Value("string"),
            "image": datasets.Image(),
            "points": datasets.Value("binary"),
            "camera_projection": datasets.Array2D((3, 4), "float64"),
            "lidar_to_camera": datasets.Array2D((4, 4), "float64"),
        }
    )
