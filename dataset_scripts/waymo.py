"""Waymo Open Dataset v2 camera + LiDAR pairs as a Hugging Face data set, without the devkit and TensorFlow.

This one file needs `datasets`, NumPy, pyarrow and Pillow. `datasets` 3.x runs it as a script; from 4 on use its class:

    load_dataset("dataset_scripts/waymo.py", "perception", data_dir=ROOT, trust_remote_code=True)

    builder = Waymo(config_name="perception", data_dir=ROOT, cameras=("FRONT",))
    builder.download_and_prepare(num_proc=4)
    train = builder.as_dataset(split="train")

ROOT holds `training/`, `validation/`, `testing/`, each with a folder a component: `camera_image`,
`camera_calibration`, `lidar`, `lidar_calibration`, `lidar_pose`, `vehicle_pose`. A row is one camera image with the
scan of its frame:

| column | type | meaning |
| --- | --- | --- |
| `frame_id` | string | segment, time of the frame and camera |
| `scene` | string | the segment |
| `camera` | string | `FRONT`, `FRONT_LEFT`, `FRONT_RIGHT`, `SIDE_LEFT` or `SIDE_RIGHT` |
| `image` | Image | JPEG with the lens distortion removed, same intrinsics |
| `points` | binary | little-endian float32, N x 4: x y z (metres, vehicle frame: x forward, y left, z up, origin |
| | | near the ground), tanh(intensity); all lasers, all returns; those in the image, or with `whole_scans=True` all |
| `camera_projection` | 3 x 4 float64 | `[K / 0]`, camera -> pixels, integer coordinates at pixel centres |
| `lidar_to_camera` | 4 x 4 float64 | vehicle at the frame's pose -> camera (x right, y down, z forward) at its own |

Formulas: the published component definitions (waymo-open-dataset, src/waymo_open_dataset/v2/perception). Rolling
shutter is not modelled: an image has one pose. Licence: Waymo Dataset License Agreement for Non-Commercial Use, which
also concerns what is trained on the data.
"""

import functools
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

logger = datasets.logging.get_logger(__name__)

VERSION = datasets.Version("1.0.0")
LICENSE = "Waymo Dataset License Agreement for Non-Commercial Use"
FOLDERS = {"train": "training", "validation": "validation", "test": "testing"}
CAMERAS = {"FRONT": 1, "FRONT_LEFT": 2, "FRONT_RIGHT": 3, "SIDE_LEFT": 4, "SIDE_RIGHT": 5}
COMPONENTS = ("camera_image", "camera_calibration", "lidar", "lidar_calibration", "lidar_pose", "vehicle_pose")
OPENCV_FROM_WAYMO = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
TOP = 1  # the laser whose pixels have poses of their own

TIME, CAMERA, LASER = "key.frame_timestamp_micros", "key.camera_name", "key.laser_name"


class Frame(NamedTuple):
    """One image of one frame of a segment."""

    frame_id: str
    scene: str
    camera: str
    folder: str
    """`ROOT/training` or another split's."""
    time: int


class Listing(NamedTuple):
    """What a Waymo folder holds."""

    splits: dict[str, list[Frame]]
    problems: list[str]
    """Segments whose files are incomplete or damaged."""
    notes: list[str]
    """Always empty: nothing is left out of a whole segment."""


# --- which frames there are -----------------------------------------------------------------------------------------


def configurations(data_dir: str | os.PathLike) -> list[str]:
    """["perception"] where a folder has the layout of Waymo Open Dataset v2."""
    there = any(os.path.isdir(os.path.join(data_dir, folder, "camera_image")) for folder in FOLDERS.values())
    return ["perception"] if there else []


def split_names(name: str, data_dir: str | os.PathLike | None) -> list[str]:
    """Splits of a folder: train, validation, test."""
    root = _root(data_dir)
    return [split for split, folder in FOLDERS.items() if os.path.isdir(os.path.join(root, folder, "camera_image"))]


def list_frames(
    name: str,
    data_dir: str | os.PathLike | None,
    splits: Sequence[str] | None = None,
    cameras: Sequence[str] | None = None,
    scenes: Sequence[str] | None = None,
) -> Listing:
    """Frames of a Waymo folder: all, or those of some splits, cameras (`FRONT`, …) and scenes (segments).

    Reads names of files and the key columns of `camera_image`. ValueError where one of these is not there.
    """
    root = _root(data_dir)
    available = split_names(name, root)
    splits, cameras = splits or available, cameras or tuple(CAMERAS)
    _require(splits, available, f"{root}: splits")
    _require(cameras, CAMERAS, f"{root}: cameras")
    segments = {split: _segments(os.path.join(root, FOLDERS[split])) for split in splits}
    _require(scenes, set().union(*segments.values()), f"{root}: scenes")
    listing = Listing({}, [], [])
    for split in splits:
        folder = os.path.join(root, FOLDERS[split])
        chosen = [segment for segment in segments[split] if scenes is None or segment in scenes]
        frames = [frame for segment in chosen for frame in _segment_frames(folder, segment, cameras, listing.problems)]
        if frames:
            listing.splits[split] = frames
    return listing


def _segments(folder: str) -> list[str]:
    names = sorted(os.listdir(os.path.join(folder, "camera_image")))
    return [name.removesuffix(".parquet") for name in names if re.fullmatch(r"[^.].*\.parquet", name)]


def _segment_frames(folder: str, segment: str, cameras: Sequence[str], problems: list[str]) -> list[Frame]:
    missing = [c for c in COMPONENTS if not os.path.isfile(_path(folder, c, segment))]
    if missing:
        problems.append(f"{folder}: segment {segment}: expected {', '.join(missing)}/{segment}.parquet, found no file")
        return []
    try:
        path = _path(folder, "camera_image", segment)
        keys = sorted(_index(path, _state(path)))
    except ValueError as error:
        problems.append(str(error))
        return []
    names = {number: name for name, number in CAMERAS.items()}
    chosen = [(time, names.get(camera, "")) for time, camera in keys if names.get(camera) in cameras]
    return [Frame(f"{segment}_{time}_{camera}", segment, camera, folder, time) for time, camera in chosen]


def fingerprint(frames: Iterable[Frame]) -> str:
    """Changes with this file and with the frames' files, by size and time of change."""
    frames = list(frames)
    with open(__file__, "rb") as file:
        digest = hashlib.sha256(file.read() + repr(frames).encode("utf-8"))
    for folder, segment in sorted({(frame.folder, frame.scene) for frame in frames}):
        for component in COMPONENTS:
            path = _path(folder, component, segment)
            digest.update(repr((path, _state(path))).encode("utf-8"))
    return digest.hexdigest()


def _state(path: str) -> tuple[int, int] | None:
    """Size and time of change of a file: what was read of it is used again only while they stay the same."""
    found = os.stat(path) if os.path.isfile(path) else None
    return found and (found.st_size, found.st_mtime_ns)


def _root(data_dir: str | os.PathLike | None) -> str:
    if data_dir is None or not os.path.isdir(data_dir):
        raise ValueError(f"data_dir must be the folder of Waymo Open Dataset v2, found no folder at {data_dir!r}")
    return os.path.abspath(data_dir)


def _require(wanted: Iterable[str] | None, available: Iterable[str], what: str) -> None:
    missing = [name for name in wanted or () if name not in available]
    if missing:
        raise ValueError(f"{what}: expected some of {sorted(available)}, found {missing}")


# --- tables ---------------------------------------------------------------------------------------------------------


def _path(folder: str, component: str, segment: str) -> str:
    return os.path.join(folder, component, f"{segment}.parquet")


@functools.lru_cache(maxsize=64)
def _index(path: str, state: tuple[int, int] | None) -> dict[tuple[int, ...], tuple[int, int]]:
    """Keys of a file's rows, the segment left out, to row group and row: files do not share an order."""
    try:
        file = pq.ParquetFile(path)
        names = [name for name in (TIME, CAMERA, LASER) if name in file.schema_arrow.names]
        index = {}
        for group in range(file.num_row_groups):
            keys = file.read_row_group(group, columns=names)
            for row, values in enumerate(zip(*(keys[name].to_pylist() for name in names), strict=True)):
                index[values] = group, row
        return index
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: expected a Parquet file of Waymo Open Dataset v2, found: {error}") from error


@functools.lru_cache(maxsize=len(COMPONENTS))
def _group(path: str, group: int, state: tuple[int, int] | None) -> pa.Table:
    """A row group. One a component is kept: in published files they are large, and rows are asked for in order."""
    try:
        return pq.ParquetFile(path).read_row_group(group)
    except (OSError, pa.ArrowException) as error:
        older = "" if int(pa.__version__.split(".")[0]) >= 26 else f" (or null lists, for pyarrow {pa.__version__})"
        raise ValueError(f"{path}: expected a whole Parquet file, found: {error}{older}") from error


class _Row:
    """One row of a component's file, its columns by the part of their name behind the component's."""

    def __init__(self, folder: str, component: str, segment: str, *key: int) -> None:
        self.path = _path(folder, component, segment)
        state = _state(self.path)
        index = _index(self.path, state)
        if key not in index:
            raise ValueError(f"{self.path}: expected a row with the key {key}, found none")
        group, self.row = index[key]
        self.table = _group(self.path, group, state)
        self.names = {name.rpartition("].")[2]: name for name in self.table.column_names}

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise ValueError(f"{self.path}: expected a column {name}, found {', '.join(self.names)}")
        return self.table[self.names[name]][self.row]

    def number(self, name: str) -> float:
        value = self[name].as_py()
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise ValueError(f"{self.path}: {name}: expected a finite number, found {value!r}")
        return value

    def numbers(self, name: str) -> np.ndarray:
        """A list column's numbers; none where it is null. Never through Python lists: a scan has 678,400 floats."""
        value = self[name]
        return np.asarray(value.values) if value.is_valid else np.zeros(0)

    def image(self, name: str) -> np.ndarray:
        """A range image (H, W, channels); (0, 0, 0) where there is none."""
        shape, values = self.numbers(f"{name}.shape").astype(int), self.numbers(f"{name}.values")
        if len(shape) == len(values) == 0:
            return np.zeros((0, 0, 0))
        if len(shape) != 3 or np.prod(shape) != len(values):
            raise ValueError(f"{self.path}: {name}: expected {shape.tolist()} values, found {len(values)}")
        return values.reshape(shape)

    def pose(self, name: str) -> np.ndarray:
        """A rigid transform (4, 4) float64; published files hold some of them in single precision."""
        values = self.numbers(name).astype(np.float64)
        if len(values) != 16 or not np.isfinite(values).all():
            raise ValueError(f"{self.path}: {name}: expected 16 finite numbers, found {values.tolist()}")
        matrix = values.reshape(4, 4)
        rotation = matrix[:3, :3]
        if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3):
            raise ValueError(f"{self.path}: {name}: expected a rotation, found {rotation.tolist()}")
        return matrix


# --- the content of a frame -----------------------------------------------------------------------------------------


def read_row(frame: Frame, whole_scans: bool = False, problems: list[str] | None = None) -> dict[str, Any]:
    """The row of a frame (see the table above).

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

    camera, lidar_to_camera = part(read_calibration, frame) or (None, None)
    image = None if camera is None else part(read_image, frame, camera)
    points = part(read_points, frame.folder, frame.scene, frame.time)
    if not (whole_scans or points is None or camera is None):
        points = points_in_view(points, camera.projection @ lidar_to_camera, camera.size)
    return {
        "frame_id": frame.frame_id,
        "scene": frame.scene,
        "camera": frame.camera,
        "image": None if image is None else {"bytes": image, "path": None},
        "points": None if points is None else points.tobytes(),
        "camera_projection": None if camera is None else camera.projection.tolist(),
        "lidar_to_camera": None if lidar_to_camera is None else lidar_to_camera.tolist(),
    }


class Camera(NamedTuple):
    """Intrinsics of a camera; pixel coordinates count from the centre of the first pixel."""

    focal_length: tuple[float, float]
    center: tuple[float, float]
    distortion: tuple[float, float, float, float, float]
    """k1, k2, p1, p2, k3, as in OpenCV."""
    size: tuple[int, int]

    @property
    def projection(self) -> np.ndarray:
        (f_u, f_v), (c_u, c_v) = self.focal_length, self.center
        return np.array([[f_u, 0.0, c_u, 0.0], [0.0, f_v, c_v, 0.0], [0.0, 0.0, 1.0, 0.0]])


def read_calibration(frame: Frame) -> tuple[Camera, np.ndarray]:
    """The camera, and lidar_to_camera (4, 4) float64: vehicle at the frame's pose -> world -> vehicle at the image's
    pose -> camera, in double precision because world coordinates reach tens of kilometres."""
    number = CAMERAS[frame.camera]
    calibration = _Row(frame.folder, "camera_calibration", frame.scene, number)
    names = ("f_u", "f_v", "c_u", "c_v", "k1", "k2", "p1", "p2", "k3")
    f_u, f_v, c_u, c_v, *distortion = [calibration.number(f"intrinsic.{name}") for name in names]
    size = int(calibration.number("width")), int(calibration.number("height"))
    # published pixel coordinates count from the left edge of the first pixel
    camera = Camera((f_u, f_v), (c_u - 0.5, c_v - 0.5), tuple(distortion), size)  # type: ignore[arg-type]
    image_pose = _Row(frame.folder, "camera_image", frame.scene, frame.time, number).pose("pose.transform")
    vehicle = _Row(frame.folder, "vehicle_pose", frame.scene, frame.time).pose("world_from_vehicle.transform")
    extrinsic = calibration.pose("extrinsic.transform")
    return camera, OPENCV_FROM_WAYMO @ np.linalg.inv(extrinsic) @ np.linalg.inv(image_pose) @ vehicle


def read_image(frame: Frame, camera: Camera) -> bytes:
    """The image as JPEG bytes, its lens distortion removed."""
    row = _Row(frame.folder, "camera_image", frame.scene, frame.time, CAMERAS[frame.camera])
    data = row["image"].as_py()
    try:
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:
        raise ValueError(f"{row.path}: expected a readable image of {frame.frame_id}, found: {error}") from error
    if image.size != camera.size:
        raise ValueError(
            f"{row.path}: expected {camera.size[0]} x {camera.size[1]} pixels by camera_calibration, found "
            f"{image.width} x {image.height} in {frame.frame_id}"
        )
    if not any(camera.distortion):
        return data
    buffer = io.BytesIO()
    Image.fromarray(undistort(np.asarray(image), camera)).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def undistort(image: np.ndarray, camera: Camera) -> np.ndarray:
    """The image (H, W, 3) uint8 that a camera of the same intrinsics without distortion would have taken."""
    height, width = image.shape[:2]
    columns, rows, right, below = _source_pixels(camera)
    result = np.zeros(image.shape, np.float32)
    for shift_y, weight_y in ((0, 1 - below), (1, below)):
        for shift_x, weight_x in ((0, 1 - right), (1, right)):
            y, x = np.minimum(rows + shift_y, height - 1), np.minimum(columns + shift_x, width - 1)
            result += (weight_y * weight_x)[..., None] * image[y, x]
    return (result + 0.5).astype(np.uint8)


@functools.lru_cache(maxsize=5)
def _source_pixels(camera: Camera) -> tuple[np.ndarray, ...]:
    """For every pixel without distortion: column and row of the pixel up and left of it in the distorted image, and
    how far beyond that it lies, 0 to 1."""
    width, height = camera.size
    (f_u, f_v), (c_u, c_v) = camera.focal_length, camera.center
    x, y = distort((np.arange(width) - c_u) / f_u, ((np.arange(height) - c_v) / f_v)[:, None], camera.distortion)
    u, v = np.clip(f_u * x + c_u, 0, width - 1), np.clip(f_v * y + c_v, 0, height - 1)
    columns, rows = np.floor(u).astype(np.intp), np.floor(v).astype(np.intp)
    return columns, rows, (u - columns).astype(np.float32), (v - rows).astype(np.float32)


def distort(x: np.ndarray, y: np.ndarray, distortion: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Where ideal image coordinates x / z and y / z appear: the radial and tangential model, as in OpenCV."""
    k1, k2, p1, p2, k3 = distortion
    squared = x * x + y * y
    radial = 1 + squared * (k1 + squared * (k2 + squared * k3))
    return (
        x * radial + 2 * p1 * x * y + p2 * (squared + 2 * x * x),
        y * radial + p1 * (squared + 2 * y * y) + 2 * p2 * x * y,
    )


def read_points(folder: str, segment: str, time: int) -> np.ndarray:
    """All returns of all lasers of a frame, (N, 4) float32: x, y, z in metres, vehicle frame, and tanh(intensity)."""
    return _points(folder, segment, time, tuple(_state(_path(folder, name, segment)) for name in COMPONENTS))


@functools.lru_cache(maxsize=2)
def _points(folder: str, segment: str, time: int, states: tuple[tuple[int, int] | None, ...]) -> np.ndarray:
    vehicle = _Row(folder, "vehicle_pose", segment, time).pose("world_from_vehicle.transform")
    clouds = []
    lidar = _path(folder, "lidar", segment)
    for _, laser in sorted(key for key in _index(lidar, _state(lidar)) if key[0] == time):
        scan = _Row(folder, "lidar", segment, time, laser)
        calibration = _Row(folder, "lidar_calibration", segment, laser)
        extrinsic = calibration.pose("extrinsic.transform")
        pixel_poses = None
        if laser == TOP:
            pixel_poses = _Row(folder, "lidar_pose", segment, time, laser).image("range_image_return1")
        for name in ("range_image_return1", "range_image_return2"):
            image = scan.image(name)
            if image.size:
                if image.shape[2] < 2:
                    raise ValueError(f"{lidar}: {name}: expected range and intensity, found the shape {image.shape}")
                shape = (*image.shape[:2], 6)
                if pixel_poses is not None and pixel_poses.shape != shape:
                    path = _path(folder, "lidar_pose", segment)
                    raise ValueError(f"{path}: expected poses of the shape {shape}, found {pixel_poses.shape}")
                inclinations = _inclinations(calibration, len(image))
                points, valid = range_image_to_points(image[..., 0], inclinations, extrinsic, pixel_poses, vehicle)
                clouds.append(np.column_stack([points, np.tanh(image[..., 1][valid])]))
    cloud = np.concatenate(clouds) if clouds else np.zeros((0, 4))
    if len(cloud) == 0 or not np.isfinite(cloud).all():
        raise ValueError(f"{lidar}: expected finite points at time {time}, found others or none")
    return cloud.astype("<f4")


def _inclinations(calibration: _Row, rows: int) -> np.ndarray:
    """Inclination of each row of a range image in radians, the highest beam first."""
    values = calibration.numbers("beam_inclination.values").astype(np.float64)
    if len(values) == 0:
        low, high = calibration.number("beam_inclination.min"), calibration.number("beam_inclination.max")
        values = (np.arange(rows) + 0.5) / rows * (high - low) + low
    if len(values) != rows:
        raise ValueError(f"{calibration.path}: expected {rows} beam inclinations, found {len(values)}")
    return values[::-1]


def range_image_to_points(
    distance: np.ndarray,
    inclinations: np.ndarray,
    extrinsic: np.ndarray,
    pixel_poses: np.ndarray | None = None,
    vehicle_pose: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Points of a range image in the vehicle frame.

    Args:
        distance: (H, W), metres; not above 0 where nothing came back.
        inclinations: (H,), radians.
        extrinsic: (4, 4), laser -> vehicle.
        pixel_poses: (H, W, 6), roll, pitch, yaw, x, y, z of the vehicle in the world as each pixel was measured.
        vehicle_pose: (4, 4), the frame's vehicle -> world, needed with `pixel_poses`.

    Returns:
        (N, 3) float64, and which pixels (H, W) they come from.
    """
    valid = distance > 0
    width = distance.shape[1]
    azimuth = ((width - np.arange(width) - 0.5) / width * 2 - 1) * np.pi - np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
    row, column = np.nonzero(valid)
    inclination, azimuth, r = inclinations[row], azimuth[column], distance[valid].astype(np.float64)
    flat = np.cos(inclination) * r
    points = np.column_stack([np.cos(azimuth) * flat, np.sin(azimuth) * flat, np.sin(inclination) * r])
    points = points @ extrinsic[:3, :3].T + extrinsic[:3, 3]
    if pixel_poses is not None and vehicle_pose is not None:
        roll, pitch, yaw, *origin = pixel_poses[valid].astype(np.float64).T
        world = _rotate(points.T, roll, pitch, yaw) + origin
        to_vehicle = np.linalg.inv(vehicle_pose)
        points = world.T @ to_vehicle[:3, :3].T + to_vehicle[:3, 3]
    return points, valid


def _rotate(points: np.ndarray, roll: np.ndarray, pitch: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """Rz(yaw) Ry(pitch) Rx(roll) applied to each column of points (3, N)."""
    x, y, z = points
    y, z = np.cos(roll) * y - np.sin(roll) * z, np.sin(roll) * y + np.cos(roll) * z
    x, z = np.cos(pitch) * x + np.sin(pitch) * z, -np.sin(pitch) * x + np.cos(pitch) * z
    return np.stack([np.cos(yaw) * x - np.sin(yaw) * y, np.sin(yaw) * x + np.cos(yaw) * y, z])


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
class WaymoConfig(datasets.BuilderConfig):
    """Configuration of `Waymo`: `splits`, `cameras`, `scenes` as in `list_frames`, `whole_scans` as in `read_row`.

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


class Waymo(datasets.GeneratorBasedBuilder):
    """Waymo Open Dataset v2, perception: images of five cameras, each with the points of its frame."""

    VERSION = VERSION
    BUILDER_CONFIG_CLASS = WaymoConfig
    BUILDER_CONFIGS = [  # noqa: RUF012
        WaymoConfig(name="perception", version=VERSION, description="Waymo Open Dataset v2, perception")
    ]
    DEFAULT_CONFIG_NAME = "perception"
    DEFAULT_WRITER_BATCH_SIZE = 16

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description=f"{self.config.description}: camera + LiDAR pairs",
            features=features(self.config.name),
            homepage="https://waymo.com/open",
            license=LICENSE,
            citation="Sun et al.: Scalability in Perception for Autonomous Driving: Waymo Open Dataset. CVPR 2020.",
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        listing = self.config.list_frames()
        if listing.problems and self.config.on_bad_row != "skip":
            raise ValueError("\n".join(listing.problems[:10]))
        for message in listing.problems:
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
