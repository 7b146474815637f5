"""nuScenes camera + LiDAR pairs as a Hugging Face data set, without the devkit.

This one file needs `datasets`, NumPy, pyarrow and Pillow. `datasets` 3.x runs it as a script; from 4 on use its class:

    load_dataset("dataset_scripts/nuscenes.py", "v1.0-mini", data_dir=ROOT, trust_remote_code=True)

    builder = NuScenes(config_name="v1.0-trainval", data_dir=ROOT, cameras=("CAM_FRONT",))
    builder.download_and_prepare(num_proc=4)
    train = builder.as_dataset(split="train")

ROOT holds `v1.0-mini/`, `v1.0-trainval/` or `v1.0-test/` with the tables, and `samples/` (and `sweeps/`).
Configurations are the versions' names; `v1.0-trainval-sweeps` and the like also give the images between key frames,
`v1.0-trainval-objects` the annotated boxes. A row is one camera image with the scan that the camera saw:

| column | type | meaning |
| --- | --- | --- |
| `frame_id` | string | the image's file name without its suffix |
| `scene` | string | `scene-0061` |
| `camera` | string | `CAM_FRONT` |
| `image` | Image | 1600 x 900, undistorted as published |
| `points` | binary | little-endian float32, N x 4: x y z (metres, LIDAR_TOP: x right, y forward, z up), intensity |
| | | / 255; those in the image, or with `whole_scans=True` all |
| `camera_projection` | 3 x 4 float64 | `[K / 0]`, camera -> pixels |
| `lidar_to_camera` | 4 x 4 float64 | LIDAR_TOP at the scan's time -> camera at the image's, with the car's motion |
| `objects` | sequence | `-objects` only: the annotated boxes in the image, in the form of KITTI's labels |

LIDAR_TOP's time is the end of a turn, and cameras fire when the beam passes: an image belongs to the first scan that
ends after it. Published splits by scene: train, val (trainval), test, mini_train, mini_val, and those of a
`splits.json` beside the tables. mini_train holds scenes 0553 and 0796 of val. Format:
https://www.nuscenes.org/nuscenes#data-format and docs/schema_nuscenes.md of nutonomy/nuscenes-devkit.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

logger = datasets.logging.get_logger(__name__)

VERSION = datasets.Version("1.0.0")
LICENSE = "CC BY-NC-SA 4.0 and the terms of use of nuScenes"
VERSIONS = ("v1.0-trainval", "v1.0-mini", "v1.0-test")  # the first that is there is read
SWEEPS, OBJECTS = "-sweeps", "-objects"
CAMERAS = ("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
LIDAR = "LIDAR_TOP"
INDEXED = ("sample_data", "ego_pose", "calibrated_sensor", "sensor")  # the tables that an index is made of
SEPARATORS = re.compile(r"[ \t\r\n,]*")  # between the records of a table
TURN = 60_000  # microseconds: one turn of the LiDAR, 50 ms, and some tolerance

# numbers of the published scenes (devkit: python-sdk/nuscenes/utils/splits.py)
VAL = """3,12-18,35-36,38-39,92-110,221,268-278,329-332,344-346,519-524,552-565,625-627,629-630,632-638,770-771,775,
777-778,780-784,794-800,802,904-917,919-931,962-963,966-969,971-972,1059-1073"""
OBJECT_TYPES = ["Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", "DontCare"]
OBJECT_FIELDS = ("type", "truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y")
# The categories of nuScenes' ten detection classes (devkit: nuscenes/eval/detection/utils.py), in KITTI's types, of
# which none is a barrier or a cone. Other categories, as strollers and animals, are regions of DontCare.
CATEGORIES: dict[str, str | None] = {
    "vehicle.car": "Car",
    "vehicle.truck": "Truck",
    **dict.fromkeys(("vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.trailer", "vehicle.construction"), "Misc"),
    **{f"human.pedestrian.{who}": "Pedestrian" for who in ("adult", "child", "construction_worker", "police_officer")},
    **dict.fromkeys(("vehicle.bicycle", "vehicle.motorcycle"), "Cyclist"),
    **dict.fromkeys(("movable_object.barrier", "movable_object.trafficcone"), None),
}
OCCLUDED = {"4": 0, "3": 1, "2": 1, "1": 2}  # of the share that is visible: over 80 %, over 60, over 40, less
NEAR = 0.1  # metres: what is nearer to the camera's plane is cut off a box
# Corners (8, 3) of a box of edge length 1 around the origin, and the four of each of its faces, in a ring
CORNERS = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
FACES = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))
MINI_TRAIN = "61,553,655,757,796,1077,1094,1100"
MINI_VAL = "103,916"


class Frame(NamedTuple):
    """One image and its scan; absolute paths. Poses are qw qx qy qz tx ty tz as in the tables, (7,) each."""

    frame_id: str
    scene: str
    camera: str
    image: str
    size: tuple[int, int]
    scan: str
    intrinsics: np.ndarray
    camera_to_ego: np.ndarray
    ego_at_image: np.ndarray
    lidar_to_ego: np.ndarray
    ego_at_scan: np.ndarray
    boxes: np.ndarray | None = None
    """(N, 13) the sample's boxes in the world: number of the type, occlusion, has points, width, length, height, qw qx
    qy qz, x y z of the middle. None where no labels are asked for."""


class Listing(NamedTuple):
    """What a nuScenes folder holds."""

    splits: dict[str, list[Frame]]
    problems: list[str]
    """What is wrong with the tables: tokens without a partner, scenes that are in no split, …"""
    notes: list[str]
    """What was left out: files of parts that were not downloaded, images without a scan."""


# --- which frames there are -----------------------------------------------------------------------------------------


def configurations(data_dir: str | os.PathLike) -> list[str]:
    """Versions whose tables a folder holds, then the same with sweeps, and with labels where there are some."""
    there = [v for v in VERSIONS if os.path.isfile(os.path.join(data_dir, v, "sample_data.json"))]
    labelled = [v for v in there if v != "v1.0-test"]
    return there + [version + SWEEPS for version in there] + [version + OBJECTS for version in labelled]


def split_names(name: str, data_dir: str | os.PathLike | None) -> list[str]:
    """Splits of which a folder holds scenes. ValueError where its tables are missing."""
    folder = _tables(name, data_dir)
    there = {scene["name"] for scene in _records(os.path.join(folder, "scene.json"), "name")}
    return [split for split, scenes in _published_splits(folder, there).items() if scenes & there]


def list_frames(
    name: str,
    data_dir: str | os.PathLike | None,
    splits: Sequence[str] | None = None,
    cameras: Sequence[str] | None = None,
    scenes: Sequence[str] | None = None,
) -> Listing:
    """Frames of a nuScenes folder: all, or those of some splits, cameras and scenes.

    Reads the tables and names of files. OSError where a table is missing, ValueError where it is damaged or one of
    these is not there.
    """
    folder = _tables(name, data_dir)
    root = os.path.dirname(folder)
    cameras = cameras or CAMERAS
    scene_names = {row["token"]: row["name"] for row in _records(os.path.join(folder, "scene.json"), "name")}
    there = set(scene_names.values())
    published = _published_splits(folder, there)
    _require(cameras, CAMERAS, f"{folder}: cameras")
    _require(scenes, there, f"{folder}: scenes")
    _require(splits, [split for split, names in published.items() if names & there], f"{folder}: splits")
    wanted = {split: names for split, names in published.items() if splits is None or split in splits}

    tables = _Tables(folder, scene_names, name.endswith(OBJECTS), name.endswith(SWEEPS))
    chosen = set().union(*wanted.values()) & (there if scenes is None else set(scenes))
    frames = _pair(tables, root, cameras, chosen)
    by_split = {split: [f for f in frames if f.scene in names] for split, names in wanted.items()}
    unknown = sorted(there - set().union(*published.values()))
    if unknown:
        tables.problems.append(f"{folder}: scenes of no published split: {', '.join(unknown[:8])}")
    return Listing({split: found for split, found in by_split.items() if found}, tables.problems, tables.notes)


class _Tables:
    """The tables that pairs are made of, joined by their tokens."""

    def __init__(self, folder: str, scene_names: dict[str, str], with_boxes: bool, sweeps: bool) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.notes: list[str] = []
        samples = _records(os.path.join(folder, "sample.json"), "scene_token")
        scene_of = {row["token"]: scene_names.get(row["scene_token"]) for row in samples}
        channels = {row["token"]: row["channel"] for row in _records(os.path.join(folder, "sensor.json"), "channel")}
        self.sensors: dict[str, tuple[str, np.ndarray, np.ndarray]] = {}
        path = os.path.join(folder, "calibrated_sensor.json")
        for row in _records(path, "sensor_token", "camera_intrinsic", "rotation", "translation"):
            sensor, intrinsics = channels.get(row["sensor_token"]), row["camera_intrinsic"] or []
            if sensor is None:
                token = row["sensor_token"]
                self.problems.append(f"{path}: record {row['token']}: expected a sensor, found {token!r}")
            matrix = [_vector({**row, "camera_intrinsic": line}, "camera_intrinsic", 3, path) for line in intrinsics]
            self.sensors[row["token"]] = sensor or "", _pose(row, path), np.array(matrix).reshape(-1, 3)
        self.data = _sample_data(folder, {token: sensor[0] for token, sensor in self.sensors.items()}, sweeps)
        self._drop("calibrated_sensor", lambda row: row["sensor"] not in self.sensors)
        self._drop("ego_pose", lambda row: row["pose"] is None)
        for row in self.data:
            row["scene"] = scene_of.get(row["sample"])
        self._drop("sample with a scene", lambda row: row["scene"] is None)
        self.boxes = _boxes(folder, self.problems) if with_boxes else None

    def _drop(self, partner: str, is_lost: Callable[[dict[str, Any]], bool]) -> None:
        lost = [row["filename"] for row in self.data if is_lost(row)]
        if lost:
            self.data = [row for row in self.data if not is_lost(row)]
            path = os.path.join(self.folder, "sample_data.json")
            self.problems.append(f"{path}: {len(lost)} records have no {partner}, the first is {lost[0]}")


def _pair(tables: _Tables, root: str, cameras: Sequence[str], scenes: set[str]) -> list[Frame]:
    """Every image with the first scan that ends after it, both on disk."""

    @functools.cache
    def names(folder: str) -> frozenset[str]:  # one listing a folder instead of one question a file
        full = os.path.join(root, *folder.split("/"))
        return frozenset(os.listdir(full)) if os.path.isdir(full) else frozenset()

    missing: Counter[str] = Counter()
    scans: dict[str, list[dict[str, Any]]] = defaultdict(list)
    images = []
    for row in tables.data:
        channel = tables.sensors[row["sensor"]][0]
        if row["scene"] not in scenes or channel not in (*cameras, LIDAR):
            continue
        folder, _, name = row["filename"].rpartition("/")
        if name not in names(folder):
            missing[channel] += channel != LIDAR or row["key"]  # sweeps of the LiDAR are a help, not a need
        elif channel == LIDAR:
            scans[row["scene"]].append(row)
        else:
            images.append(row)
    for found in scans.values():
        found.sort(key=lambda row: row["time"])
    frames, alone = [], 0
    for row in sorted(images, key=lambda row: (row["scene"], row["time"], row["filename"])):
        scan = _scan_of(row["time"], scans[row["scene"]])
        if scan is None:
            alone += 1
        else:
            frames.append(_frame(tables, root, row, scan))
    for channel, count in sorted(missing.items()):
        if count:
            tables.notes.append(f"{root}: {count} files of {channel} are not on disk, left out")
    if alone:
        tables.notes.append(f"{root}: {alone} images have no scan of the same turn on disk, left out")
    return frames


def _scan_of(time: int, scans: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first scan that ends at `time` or later, else the last before it; None where both are over a turn away."""
    after = bisect.bisect_left(scans, time, key=lambda row: row["time"])
    for index in (after, after - 1):
        if 0 <= index < len(scans) and abs(scans[index]["time"] - time) <= TURN:
            return scans[index]
    return None


def _frame(tables: _Tables, root: str, image: dict[str, Any], scan: dict[str, Any]) -> Frame:
    channel, camera_to_ego, intrinsics = tables.sensors[image["sensor"]]
    return Frame(
        frame_id=os.path.splitext(os.path.basename(image["filename"]))[0],
        scene=image["scene"],
        camera=channel,
        image=os.path.join(root, *image["filename"].split("/")),
        size=(image["width"], image["height"]),
        scan=os.path.join(root, *scan["filename"].split("/")),
        intrinsics=intrinsics,
        camera_to_ego=camera_to_ego,
        ego_at_image=image["pose"],
        lidar_to_ego=tables.sensors[scan["sensor"]][1],
        ego_at_scan=scan["pose"],
        boxes=None if tables.boxes is None else tables.boxes.get(image["sample"], np.zeros((0, 13))),
    )


def _published_splits(folder: str, there: set[str]) -> dict[str, set[str]]:
    version = os.path.basename(folder)
    if version == "v1.0-test":
        splits = {"test": there}
    elif version == "v1.0-mini":
        splits = {"mini_train": _scene_names(MINI_TRAIN), "mini_val": _scene_names(MINI_VAL)}
    else:
        splits = {"train": there - _scene_names(VAL), "val": _scene_names(VAL)}
    own = os.path.join(folder, "splits.json")
    if os.path.isfile(own):
        try:
            with open(own, encoding="utf-8-sig") as file:
                named = {split: set(scenes) for split, scenes in json.load(file).items()}
            if not all(re.fullmatch(r"\w+", split) for split in named):
                raise ValueError("names of splits other than letters, digits and _")
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{own}: expected split -> list of scenes, found: {error}") from error
        for split, scenes in named.items():
            if unknown := sorted(map(str, scenes - there)):
                raise ValueError(f"{own}: {split}: expected scenes of the tables, found {unknown[0]!r}")
        splits |= named
    return splits


def _scene_names(numbers: str) -> set[str]:
    names = set()
    for part in numbers.split(","):
        first, _, last = part.strip().partition("-")
        names |= {f"scene-{number:04d}" for number in range(int(first), int(last or first) + 1)}
    return names


# --- tables ---------------------------------------------------------------------------------------------------------


def _sample_data(folder: str, channels: dict[str, str], sweeps: bool) -> list[dict[str, Any]]:
    """Records of cameras and LIDAR_TOP, and those of no known sensor, with their ego poses, from an index beside the
    cache of `datasets`; the images between key frames, most of them, only with `sweeps`.

    Two of the tables have 2.6 million records each in trainval: they are read record by record, once.
    """
    paths = [os.path.join(folder, f"{table}.json") for table in INDEXED]
    state = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    with open(__file__, "rb") as file:
        key = hashlib.sha256(file.read() + repr(state).encode("utf-8")).hexdigest()[:16]
    index = os.path.join(datasets.config.HF_DATASETS_CACHE, "nuscenes_index", f"{key}.parquet")
    try:
        table = pq.read_table(index)
    except (OSError, pa.ArrowInvalid):
        table = _build_index(paths[0], paths[1], channels)
        _keep(table, index)
    if not sweeps and table.num_rows:
        cameras = pa.array([token for token, channel in channels.items() if channel != LIDAR], pa.string())
        table = table.filter(pc.or_(table["key"], pc.invert(pc.is_in(table["sensor"], cameras))))
    rows = table.to_pylist()
    for row in rows:
        row["pose"] = row["pose"] and np.array(row["pose"])
    return rows


def _build_index(sample_data: str, ego_pose: str, channels: dict[str, str]) -> pa.Table:
    rows = []
    tokens = ("sample_token", "calibrated_sensor_token", "ego_pose_token")
    for record in _records(sample_data, *tokens, "filename", "timestamp", "is_key_frame", "width", "height"):
        if channels.get(record["calibrated_sensor_token"], LIDAR) in (*CAMERAS, LIDAR):
            if not isinstance(record["filename"], str) or ".." in record["filename"].split("/"):
                what = f"{sample_data}: record {record['token']}"
                raise ValueError(f"{what}: expected a path in the data set as filename, found {record['filename']!r}")
            numbers = [_whole_number(record, field, sample_data) for field in ("timestamp", "width", "height")]
            names = [record[field] for field in (*tokens, "filename")]
            rows.append((*names, bool(record["is_key_frame"]), *numbers))
    fields = ("sample", "sensor", "ego", "filename", "key", "time", "width", "height")
    columns = {name: [row[index] for row in rows] for index, name in enumerate(fields)}
    egos = columns.pop("ego")
    wanted = set(egos)
    records = _records(ego_pose, "rotation", "translation")
    poses = {record["token"]: _pose(record, ego_pose) for record in records if record["token"] in wanted}
    pose_type = pa.list_(pa.float64(), 7)
    return pa.table({**columns, "pose": pa.array([poses.get(ego) for ego in egos], pose_type)})


def _boxes(folder: str, problems: list[str]) -> dict[str, np.ndarray]:
    """Sample -> its annotated boxes, see `Frame.boxes`. Those that cannot be used are left out and named."""
    categories = {row["token"]: row["name"] for row in _records(os.path.join(folder, "category.json"), "name")}
    instances = _records(os.path.join(folder, "instance.json"), "category_token")
    category_of = {row["token"]: categories.get(row["category_token"]) for row in instances}
    path = os.path.join(folder, "sample_annotation.json")
    boxes: dict[str, list[list[float]]] = defaultdict(list)
    for row in _records(path, "sample_token", "instance_token", "size", "rotation", "translation"):
        category = category_of.get(row["instance_token"])
        try:
            if category is None:
                raise ValueError(f"expected an instance with a category, found {row['instance_token']!r}")
            size, pose = _vector(row, "size", 3, path), _pose(row, path)
            is_finite = np.isfinite([*size, *pose]).all()
            if not is_finite or min(size) <= 0 or abs(np.linalg.norm(pose[:4]) - 1) > 0.01:
                expected = "a size above 0, a unit quaternion and a finite translation"
                raise ValueError(f"expected {expected}, found {size} and {pose.tolist()}")
        except ValueError as error:
            problems.append(str(error) if str(error).startswith(path) else f"{path}: record {row['token']}: {error}")
            continue
        kind = CATEGORIES.get(category, "DontCare")
        if kind is not None:
            occluded = OCCLUDED.get(row.get("visibility_token", ""), 3)
            has_points = bool(row.get("num_lidar_pts", 1) or row.get("num_radar_pts"))
            numbers = [OBJECT_TYPES.index(kind), occluded, has_points, *size, *pose]
            boxes[row["sample_token"]].append(numbers)
    return {sample: np.array(found, np.float64) for sample, found in boxes.items()}


def _keep(table: pa.Table, path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        unfinished = f"{path}.{os.getpid()}"
        pq.write_table(table, unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        logger.warning(f"{path}: the index of the tables could not be kept ({error}); it is made anew each time")


def _pose(record: dict[str, Any], path: str) -> np.ndarray:
    """qw qx qy qz tx ty tz of a record."""
    return np.array([*_vector(record, "rotation", 4, path), *_vector(record, "translation", 3, path)])


def _whole_number(record: dict[str, Any], field: str, path: str) -> int:
    value = record[field]
    if not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"{path}: record {record['token']}: expected a number as {field}, found {value!r}")
    return int(value)


def _vector(record: dict[str, Any], field: str, length: int, path: str) -> list[float]:
    values = record[field]
    if not (isinstance(values, list) and len(values) == length and all(isinstance(v, int | float) for v in values)):
        raise ValueError(f"{path}: record {record['token']}: expected {length} numbers as {field}, found {values!r}")
    return values


def _records(path: str, *fields: str) -> Iterator[dict[str, Any]]:
    """The records of a table, one JSON list of objects, without holding all of them.

    Args:
        fields: what each has, beside its token.

    Raises:
        ValueError: no whole list of objects, or one that lacks a field.
    """
    decoder, expected = json.JSONDecoder(), {"token", *fields}
    with open(path, encoding="utf-8-sig") as file:
        text, position, count = file.read(1 << 20).lstrip(), 1, 0
        if not text.startswith("["):
            raise ValueError(f"{path}: expected a JSON list of records, found {text[:20]!r}")
        while True:
            position = SEPARATORS.match(text, position).end()  # type: ignore[union-attr]  # always matches
            if text[position : position + 1] == "]":
                return
            try:
                record, position = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                more = file.read(1 << 20)
                if not more:
                    raise ValueError(f"{path}: expected a whole record after {count}, found: {error}") from error
                text, position = text[position:] + more, 0
                continue
            if not (isinstance(record, dict) and expected <= record.keys()):
                raise ValueError(f"{path}: record {count}: expected the fields {sorted(expected)}, found {record!r}")
            count += 1
            yield record


def _tables(name: str, data_dir: str | os.PathLike | None) -> str:
    if data_dir is None or not os.path.isdir(data_dir):
        raise ValueError(f"data_dir must be the folder of nuScenes, found no folder at {data_dir!r}")
    folder = os.path.join(os.path.abspath(data_dir), name.removesuffix(SWEEPS).removesuffix(OBJECTS))
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: expected the folder of nuScenes' tables, found no such folder")
    return folder


def _require(wanted: Iterable[str] | None, available: Iterable[str], what: str) -> None:
    missing = [name for name in wanted or () if name not in available]
    if missing:
        raise ValueError(f"{what}: expected some of {sorted(available)}, found {missing}")


def fingerprint(frames: Iterable[Frame]) -> str:
    """Changes with this file, the frames' files (by size and time of change) and what the tables say of them."""
    with open(__file__, "rb") as file:
        digest = hashlib.sha256(file.read())
    for frame in frames:
        digest.update(repr(frame[:6]).encode("utf-8"))
        for path in (frame.image, frame.scan):
            found = os.stat(path) if os.path.isfile(path) else None
            digest.update(repr((path, found and found.st_size, found and found.st_mtime_ns)).encode("utf-8"))
        digest.update(pickle.dumps([np.asarray(value).tolist() for value in frame[6:]]))
    return digest.hexdigest()


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

    projection, lidar_to_camera = part(read_calibration, frame) or (None, None)
    size = part(image_size, frame.image, frame.size, "sample_data.json")
    points = part(read_points, frame.scan)
    if not (whole_scans or points is None or size is None or projection is None):
        points = points_in_view(points, projection @ lidar_to_camera, size)
    row = {
        "frame_id": frame.frame_id,
        "scene": frame.scene,
        "camera": frame.camera,
        "image": frame.image if size else None,
        "points": None if points is None else points.tobytes(),
        "camera_projection": None if projection is None else projection.tolist(),
        "lidar_to_camera": None if lidar_to_camera is None else lidar_to_camera.tolist(),
    }
    if frame.boxes is not None:
        row["objects"] = None if projection is None else read_objects(frame)
    return row


def read_calibration(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """camera_projection (3, 4) and lidar_to_camera (4, 4), both float64.

    LIDAR_TOP -> ego at the scan -> world -> ego at the image -> camera, in double precision: world coordinates reach
    thousands of metres.
    """
    if frame.intrinsics.shape != (3, 3) or not np.isfinite(frame.intrinsics).all():
        raise ValueError(
            f"calibrated_sensor of {frame.frame_id}: expected a 3 x 3 camera_intrinsic, found {frame.intrinsics}"
        )
    names = ("camera_to_ego", "ego_at_image", "lidar_to_ego", "ego_at_scan")
    camera, image_ego, lidar, scan_ego = (_rigid(getattr(frame, n), f"{n} of {frame.frame_id}") for n in names)
    lidar_to_camera = np.linalg.inv(camera) @ np.linalg.inv(image_ego) @ scan_ego @ lidar
    return np.hstack([frame.intrinsics, np.zeros((3, 1))]), lidar_to_camera


def read_objects(frame: Frame) -> dict[str, list]:
    """Field -> its value for every box of which something is in the image, in the form of KITTI's labels.

    Boxes are brought to the camera at the image's time; they stand upright in its frame, about the same centre and
    with the same heading. `bbox` is what the box covers of the image, `truncated` what share of that lies beyond its
    borders. Categories outside the ten detection classes, and boxes without a point of a sensor, are DontCare regions.
    """
    assert frame.boxes is not None
    objects: dict[str, list] = {field: [] for field in OBJECT_FIELDS}
    poses = (_rigid(getattr(frame, name), name) for name in ("ego_at_image", "camera_to_ego"))
    world_to_camera = np.linalg.inv(np.matmul(*poses))
    right_most, lowest = np.array(frame.size) - 1
    planes = np.array(
        [[0, 0, 1, -NEAR], [1, 0, 0, 0], [-1, 0, right_most, 0], [0, 1, 0, 0], [0, -1, lowest, 0]], np.float64
    )
    for kind, occluded, has_points, width, length, height, *pose in frame.boxes:
        to_camera = world_to_camera @ _rigid(np.array(pose), "box")
        corners = (CORNERS * [length, width, height]) @ to_camera[:3, :3].T + to_camera[:3, 3]
        faces = [(corners @ frame.intrinsics.T)[list(face)] for face in FACES]
        low, high = _extent(faces, planes[:1])
        (left, top), (right, bottom) = _extent(faces, planes)
        if right <= left or bottom <= top:
            continue
        x, y, z = to_camera[:3, 3]
        rotation_y = -np.arctan2(to_camera[2, 0], to_camera[0, 0])
        known = (OBJECT_TYPES[int(kind)], [height, width, length], [x, y + height / 2, z], rotation_y)
        unknown = ("DontCare", [-1.0] * 3, [-1000.0] * 3, -10.0)
        name, dimensions, location, rotation_y = known if has_points and known[0] != "DontCare" else unknown
        alpha = -10.0 if name == "DontCare" else (rotation_y - np.arctan2(x, z) + np.pi) % (2 * np.pi) - np.pi
        truncated = 1 - (right - left) * (bottom - top) / np.prod(high - low)
        values = (name, truncated, int(occluded), alpha, [left, top, right, bottom], dimensions, location, rotation_y)
        for field, value in zip(OBJECT_FIELDS, values, strict=True):
            objects[field].append(value)
    return objects


def _extent(faces: Sequence[np.ndarray], planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest pixel (x, y) of what `planes` (P, 4) leave of a box; (0, 0) twice where that is nothing.

    Args:
        faces: six times (4, 3), corners as x * depth, y * depth, depth with x and y in pixels.
    """
    left = np.concatenate([functools.reduce(_clip, planes, face) for face in faces])
    if not len(left):
        return np.zeros(2), np.zeros(2)
    pixels = left[:, :2] / left[:, 2:]
    return pixels.min(axis=0), pixels.max(axis=0)


def _clip(polygon: np.ndarray, plane: np.ndarray) -> np.ndarray:
    """The part of a polygon (N, 3) where `plane[:3] @ point + plane[3]` is at least 0."""
    side = polygon @ plane[:3] + plane[3]
    left = []
    for index in range(len(polygon)):
        if (side[index - 1] < 0) != (side[index] < 0):
            share = side[index - 1] / (side[index - 1] - side[index])
            left.append(polygon[index - 1] + share * (polygon[index] - polygon[index - 1]))
        if side[index] >= 0:
            left.append(polygon[index])
    return np.array(left).reshape(-1, 3)


def _rigid(pose: np.ndarray, what: str) -> np.ndarray:
    """The homogeneous matrix of qw qx qy qz tx ty tz."""
    length = np.linalg.norm(pose[:4])
    if not np.isfinite(pose).all() or abs(length - 1) > 0.01:
        raise ValueError(f"{what}: expected a unit quaternion and a translation, found {pose.tolist()}")
    w, x, y, z = pose[:4] / length
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = pose[4:]
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
    """A scan, (N, 4) float32 x, y, z (metres, LIDAR_TOP), intensity from 0 to 1; the file's fifth number, the ring, is
    left out."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ValueError(f"{path}: expected a LiDAR scan, found: {error}") from error
    if not data or len(data) % 20:
        raise ValueError(f"{path}: expected whole points of 20 bytes (five float32) each, found {len(data)} bytes")
    values = np.frombuffer(data, "<f4").reshape(-1, 5)
    points, rings = values[:, :4].copy(), values[:, 4]
    if not (np.isfinite(points).all() and np.abs(points[:, :3]).max() <= 1000 and np.isin(rings, range(128)).all()):
        raise ValueError(f"{path}: expected points within 1,000 m, each x, y, z, intensity, ring, found other numbers")
    points[:, 3] /= 255
    return points


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
class NuScenesConfig(datasets.BuilderConfig):
    """Configuration of `NuScenes`: `splits`, `cameras`, `scenes` of `list_frames`, `whole_scans` of `read_row`.

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


class NuScenes(datasets.GeneratorBasedBuilder):
    """nuScenes: images of six cameras, each with the scan of the same turn."""

    VERSION = VERSION
    BUILDER_CONFIG_CLASS = NuScenesConfig
    BUILDER_CONFIGS = [  # noqa: RUF012
        NuScenesConfig(name=version + suffix, version=VERSION, description=f"nuScenes {version}, {what}")
        for version in VERSIONS
        for suffix, what in (
            ("", "key frames"),
            (SWEEPS, "key frames and sweeps"),
            (OBJECTS, "key frames with labels"),
        )
    ]
    DEFAULT_CONFIG_NAME = "v1.0-trainval"
    DEFAULT_WRITER_BATCH_SIZE = 16

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description=f"{self.config.description}: camera + LiDAR pairs",
            features=features(self.config.name),
            homepage="https://www.nuscenes.org",
            license=LICENSE,
            citation="Caesar et al.: nuScenes: A multimodal dataset for autonomous driving. CVPR 2020.",
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
    """Columns of a configuration."""
    columns = {
        "frame_id": datasets.Value("string"),
        "scene": datasets.Value("string"),
        "camera": datasets.Value("string"),
        "image": datasets.Image(),
        "points": datasets.Value("binary"),
        "camera_projection": datasets.Array2D((3, 4), "float64"),
        "lidar_to_camera": datasets.Array2D((4, 4), "float64"),
    }
    if name.endswith(OBJECTS):
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
