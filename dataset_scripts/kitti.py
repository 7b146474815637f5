"""KITTI camera + LiDAR pairs as a Hugging Face data set: object benchmark, odometry sequences and raw drives.

This one file needs `datasets`, NumPy and Pillow. `datasets` 3.x runs it as a script; from 4 on use its class:

    load_dataset("dataset_scripts/kitti.py", "object", data_dir=ROOT, trust_remote_code=True)

    builder = Kitti(config_name="object", data_dir=ROOT)
    builder.download_and_prepare(num_proc=4)
    train = builder.as_dataset(split="train")
    stream = builder.as_streaming_dataset(split="train")  # reads the files directly, prepares nothing

A row is one camera image with the LiDAR scan of the same instant:

| column | type | meaning |
| --- | --- | --- |
| `frame_id` | string | unique within its scene and split |
| `scene` | string | the drive (raw), the sequence (odometry); object: the drive where the devkit's `mapping/` is |
| | | in the folder, else the frame itself |
| `camera` | string | `image_2` (left colour) or `image_3` (right colour) |
| `image` | Image | the rectified colour image |
| `points` | binary | little-endian float32, N x 4: x y z reflectance, metres, LiDAR frame; those in the image, or |
| | | with `whole_scans=True` all |
| `camera_projection` | 3 x 4 float64 | rectified camera 0 -> pixels: `P2`, `P3` (raw: `P_rect_0x`) |
| `lidar_to_camera` | 4 x 4 float64 | LiDAR -> rectified camera 0: `R0_rect @ Tr_velo_to_cam` |
| `objects` | sequence | `object` only: the 15 label fields of every object; empty where there is no `label_2`, |
| | | one region of DontCare, all of the image, where that lacks the frame's file or its line can't be read |

The formats are those of the benchmark's own development kits (`readme.txt` of the object, odometry and raw data kits):
https://www.cvlibs.net/datasets/kitti
"""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image

logger = datasets.logging.get_logger(__name__)

VERSION = datasets.Version("2.0.0")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
OBJECT_TYPES = ["Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", "DontCare"]
OBJECT_SPLITS = {"train": "training", "val": "training", "trainval": "training", "test": "testing"}
# Nothing is known of an image other than the left one, in which the benchmark's boxes are drawn, nor of one that
# lacks its file of labels.
UNKNOWN_OBJECTS: dict[str, list] = {
    "type": ["DontCare"], "truncated": [-1.0], "occluded": [-1], "alpha": [-10.0], "rotation_y": [-10.0],
    "bbox": [[0.0, 0.0, 1e4, 1e4]], "dimensions": [[-1.0] * 3], "location": [[-1000.0] * 3],
}  # fmt: skip
OBJECT_FIELDS = ("type", "truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y")
LAST_SEQUENCE_WITH_POSES = 10  # of odometry: its training set


class Frame(NamedTuple):
    """The files of one camera + LiDAR pair; absolute paths, not checked to exist."""

    layout: str
    """"object", "odometry" or "raw"."""
    frame_id: str
    scene: str
    camera: int
    image: str
    scan: str
    calibration: tuple[str, ...]
    """object: `calib/ID.txt`; odometry: `calib.txt`; raw: `calib_cam_to_cam.txt`, `calib_velo_to_cam.txt`."""
    labels: str | None = None


class Listing(NamedTuple):
    """What a KITTI folder holds."""

    splits: dict[str, list[Frame]]
    problems: list[str]
    """What is wrong with the folder itself: a list that names an absent frame, a drive in another day's folder, …"""
    notes: list[str]
    """What was left out as the data set itself has it: images without a scan, unsynchronised drives."""


# --- which frames there are -----------------------------------------------------------------------------------------


def configurations(data_dir: str | os.PathLike) -> list[str]:
    """Those of "object", "odometry" and "raw" whose layout a folder has. Looks at names of folders only."""
    root = os.fspath(data_dir)
    layouts = {
        "object": any(_folders(os.path.join(root, split), "image_[23]") for split in ("training", "testing")),
        "odometry": bool(_folders(os.path.join(root, "sequences"), r"\d\d")),
        "raw": any(_folders(os.path.join(root, day), ".*_drive_.*") for day in _folders(root, r"\d{4}_\d\d_\d\d")),
    }
    return [name for name, is_there in layouts.items() if is_there]


def split_names(name: str, data_dir: str | os.PathLike | None) -> list[str]:
    """Splits of a KITTI folder.

    Raises:
        ValueError: the folder does not have the layout of this configuration.
    """
    root = _root(data_dir)
    if name == "object":
        return list(_object_splits(root))
    if name == "odometry":
        found = {drive.split for drive in _odometry_drives(root)}
        return [split for split in ("train", "test") if split in found]
    return ["train"]


def list_frames(
    name: str,
    data_dir: str | os.PathLike | None,
    splits: Sequence[str] | None = None,
    cameras: Sequence[int] | None = None,
    scenes: Sequence[str] | None = None,
) -> Listing:
    """Frames of a KITTI folder: all, or those of some splits, cameras and scenes.

    Reads names of folders and files, and lists of frames. ValueError where one of these is not there.

    Args:
        name: "object", "odometry" or "raw".
        data_dir: the folder with `training/`, with `sequences/`, or with the dated folders.
        cameras: 2 (left colour) and 3 (right colour). Default: object 2, else those that a drive has.
        scenes: odometry: names like "00"; raw: like "2011_09_26_drive_0009_sync".
    """
    root = _root(data_dir)
    cameras = None if cameras is None else list(cameras)
    if cameras is not None and not set(map(str, cameras)) <= {"2", "3", "02", "03"}:
        raise ValueError(f"cameras: expected 2 and / or 3 (KITTI's colour cameras), found {cameras}")
    chosen = None if cameras is None else [int(camera) for camera in cameras]
    _require(splits, split_names(name, root), f"{root}: splits")
    if name != "object":
        return _list_drives(name, root, splits, chosen, scenes)
    if scenes is not None:
        raise ValueError("scenes can be chosen with the configurations 'odometry' and 'raw' only")
    drives, listing = _object_drives(root), Listing({}, [], [])
    for split, id_file in _object_splits(root).items():
        if splits is None or split in splits:
            found = _object_frames(root, OBJECT_SPLITS[split], id_file, chosen or (2,), drives, listing)
            if found:
                listing.splits[split] = found
    return listing


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


def _object_drives(root: str) -> dict[str, str]:
    """Training frame -> drive, where the devkit's `mapping/` lies in the folder: line `train_rand[i]` of
    `train_mapping.txt` is the raw frame that became training frame i."""
    for place in ("mapping", "devkit/mapping", "devkit_object/mapping"):
        paths = [os.path.join(root, place, f"train_{name}.txt") for name in ("rand", "mapping")]
        if all(map(os.path.isfile, paths)):
            order, lines = re.findall(r"\d+", " ".join(_lines(paths[0]))), [line.split() for line in _lines(paths[1])]
            for line in map(int, order):
                fields = lines[line - 1] if 0 < line <= len(lines) else [f"{len(lines)} lines"]
                if len(fields) != 3:
                    raise ValueError(
                        f"{paths[1]}: line {line}: expected day, drive and frame, found {' '.join(fields)!r}"
                    )
            return {f"training/{index:06d}": lines[int(line) - 1][1] for index, line in enumerate(order)}
    return {}


def _object_frames(
    root: str, part: str, id_file: str | None, cameras: Sequence[int], drives: dict[str, str], listing: Listing
) -> list[Frame]:
    """Frames of `part`, "training" or "testing"; a frame that lacks a file has the path where it should be."""
    folder = os.path.join(root, part)
    for needed in [f"image_{camera}" for camera in cameras] + ["velodyne", "calib"]:
        if not os.path.isdir(os.path.join(folder, needed)):
            reduced = needed == "velodyne" and os.path.isdir(os.path.join(folder, "velodyne_reduced"))
            in_archive = f"It is in KITTI's data_object_{needed}.zip. "
            hint = "velodyne_reduced/ will do: rename it to velodyne. " if reduced else in_archive
            raise ValueError(
                f"{folder}: expected the folder {needed}, found {_content(folder)}. {hint}"
                "If you need other splits only, choose them, such as train"
            )
    images = {camera: _files(os.path.join(folder, f"image_{camera}"), IMAGE_SUFFIXES) for camera in cameras}
    scans, calibrations, labels = (
        _files(os.path.join(folder, name), (suffix,))
        for name, suffix in (("velodyne", ".bin"), ("calib", ".txt"), ("label_2", ".txt"))
    )
    known = sorted(set(scans).union(*images.values()))
    keys = known if id_file is None else _listed_ids(id_file, known, folder, listing.problems)
    unlabelled = [key for key in keys if labels and key not in labels]
    if unlabelled:
        listing.notes.append(
            f"{folder}: {len(unlabelled)} of {len(keys)} frames have no file in label_2, the first {unlabelled[0]}: "
            "nothing is known of their objects"
        )
    frames = []
    for key in keys:
        scan = scans.get(key, os.path.join(folder, "velodyne", f"{key}.bin"))
        calibration = calibrations.get(key, os.path.join(folder, "calib", f"{key}.txt"))
        label = labels.get(key, os.path.join(folder, "label_2", f"{key}.txt") if labels else None)
        scene = drives.get(f"{part}/{key}", f"{part}/{key}")
        for camera in cameras:
            image = images[camera].get(key, os.path.join(folder, f"image_{camera}", f"{key}.png"))
            frame_id = key if camera == 2 else f"{key}_image_{camera}"
            frames.append(Frame("object", frame_id, scene, camera, image, scan, (calibration,), label))
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


class _Drive(NamedTuple):
    """A raw drive or an odometry sequence; `images` is the folder of a camera once its number is filled in."""

    split: str
    scene: str
    scans: str
    images: str
    calibration: tuple[str, ...]


def _list_drives(
    name: str, root: str, splits: Sequence[str] | None, cameras: Sequence[int] | None, scenes: Sequence[str] | None
) -> Listing:
    listing = Listing({}, [], [])
    drives = _odometry_drives(root) if name == "odometry" else _raw_drives(root, listing)
    if scenes is not None:
        listing.notes.clear()  # of what was not asked for
        listing.problems.clear()
        suffix = "_sync" if name == "raw" else ""
        scenes = [scene if scene.endswith(suffix) else f"{scene}{suffix}" for scene in scenes]
        _require(scenes, [drive.scene for drive in drives], f"{root}: scenes")
    for drive in drives:
        if (splits is None or drive.split in splits) and (scenes is None or drive.scene in scenes):
            frames = _drive_frames(name, drive, cameras, listing)
            if frames:
                listing.splits.setdefault(drive.split, []).extend(frames)
    return listing


def _odometry_drives(root: str) -> list[_Drive]:
    drives = []
    for sequence in _folders(os.path.join(root, "sequences"), r"\d\d"):
        folder = os.path.join(root, "sequences", sequence)
        split = "train" if int(sequence) <= LAST_SEQUENCE_WITH_POSES else "test"
        scans, images, calibration = (os.path.join(folder, name) for name in ("velodyne", "image_{}", "calib.txt"))
        drives.append(_Drive(split, sequence, scans, images, (calibration,)))
    if not drives:
        raise _not_kitti(root, "sequences/00/ and so on, each with image_2/, velodyne/ and calib.txt")
    return drives


def _raw_drives(root: str, listing: Listing) -> list[_Drive]:
    days = _folders(root, r"\d{4}_\d\d_\d\d")
    if not days:
        raise _not_kitti(root, "dated folders such as 2011_09_26/, each with calib_*.txt and *_drive_*_sync/")
    drives, left_out = [], []
    for day in days:
        folder = os.path.join(root, day)
        calibration = tuple(os.path.join(folder, f"calib_{name}.txt") for name in ("cam_to_cam", "velo_to_cam"))
        for name in _folders(folder, ".*_drive_.*"):
            if not name.endswith("_sync"):
                left_out.append(name)
            elif not name.startswith(f"{day}_drive_"):
                listing.problems.append(
                    f"{os.path.join(folder, name)}: expected a drive of {day}, found another day's"
                )
            else:
                scans, images = (
                    os.path.join(folder, name, place, "data") for place in ("velodyne_points", "image_0{}")
                )
                drives.append(_Drive("train", name, scans, images, calibration))
    if left_out:
        listing.notes.append(
            f"{root}: left out {left_out}: only *_sync drives have rectified images and a scan for each"
        )
    return drives


def _drive_frames(name: str, drive: _Drive, cameras: Sequence[int] | None, listing: Listing) -> list[Frame]:
    """Every image that has a scan. KITTI itself lacks a few scans: drive 2011_09_26_drive_0009 has 447 images of each
    camera and 443 scans."""
    scans = _files(drive.scans, (".bin",))
    archive = f"KITTI's {drive.scene}.zip" if name == "raw" else "KITTI's data_odometry_{}.zip"
    if not scans:
        in_archive = f"they are in {archive.format('velodyne')}"
        listing.problems.append(f"{drive.scans}: expected *.bin scans, found none; {in_archive}")
        return []
    frames = []
    for camera in cameras or (2, 3):
        folder = drive.images.format(camera)
        images = _files(folder, IMAGE_SUFFIXES)
        if not images and cameras is not None:
            listing.problems.append(f"{folder}: expected images, found none")
        for kind, here, others in (("images", images, scans), ("scans", scans, images)):
            alone = sorted(set(here) - set(others))
            if images and alone:
                listing.notes.append(
                    f"{folder}: {len(alone)} of {len(here)} {kind} have no partner for camera {camera}, left out: "
                    f"{', '.join(alone[:8])}{', …' if len(alone) > 8 else ''}"
                )
        prefix = f"{drive.scene}_image_{camera:02d}" if name == "raw" else f"{drive.scene}_image_{camera}"
        frames += [
            Frame(name, f"{prefix}_{key}", drive.scene, camera, images[key], scans[key], drive.calibration)
            for key in sorted(set(images) & set(scans))
        ]
    if not frames:
        folders = f"{drive.images.format('2')} or {drive.images.format('3')}"
        in_archive = f"the colour images are in {archive.format('color')}"
        listing.problems.append(f"{folders}: expected images with a scan, found no pair; {in_archive}")
    return frames


def fingerprint(frames: Iterable[Frame]) -> str:
    """Changes with this file and with the frames' files (by size and time of change), so that no cache is stale."""
    frames = list(frames)
    with open(__file__, "rb") as file:
        digest = hashlib.sha256(file.read() + repr(frames).encode("utf-8"))
    files = {path for frame in frames for path in (frame.image, frame.scan, *frame.calibration, frame.labels) if path}
    for path in sorted(files):  # frames of a drive share their calibration
        found = os.stat(path) if os.path.isfile(path) else None
        digest.update(repr((path, found and (found.st_size, found.st_mtime_ns))).encode("utf-8"))
    return digest.hexdigest()


def _root(data_dir: str | os.PathLike | None) -> str:
    if data_dir is None or not os.path.isdir(data_dir):
        raise ValueError(f"data_dir must be the folder of a KITTI data set, found no folder at {data_dir!r}")
    return os.path.abspath(data_dir)


def _folders(path: str, pattern: str) -> list[str]:
    """Names of the folders in `path` that match; none where it is absent."""
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    return [name for name in names if re.fullmatch(pattern, name) and os.path.isdir(os.path.join(path, name))]


def _files(folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Stem -> path of the files with one of these suffixes, in any case; none where the folder is absent."""
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


def read_row(frame: Frame, whole_scans: bool = False, problems: list[str] | None = None) -> dict[str, Any]:
    """The row of a frame (see the table above); `image` is the path, `objects` there for the object benchmark.

    `whole_scans` keeps all points, not only those in the image. A ValueError names a file that is missing or damaged,
    what was expected and what was found; with `problems` it is appended there, and what it is about is None. Lines of
    `label_2` that can't be used never are an error: they are regions of DontCare, and appended to `problems`.
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
    source = f"{frame.calibration[0]} (is it the calibration of another day?)"
    size = part(image_size, frame.image, expected_size, source)
    points = part(read_points, frame.scan)
    if not (whole_scans or points is None or size is None or projection is None):
        points = points_in_view(points, projection @ lidar_to_camera, size)
    row = {
        "frame_id": frame.frame_id,
        "scene": frame.scene,
        "camera": f"image_{frame.camera}",
        "image": frame.image if size else None,
        "points": None if points is None else points.tobytes(),
        "camera_projection": None if projection is None else projection.tolist(),
        "lidar_to_camera": None if lidar_to_camera is None else lidar_to_camera.tolist(),
    }
    if frame.layout == "object":
        row["objects"] = part(read_objects, frame.labels, problems) if frame.camera == 2 else UNKNOWN_OBJECTS
    return row


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
    """A scan, (N, 4) float32 x, y, z (metres, LiDAR frame), reflectance; finite, at least one point."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: expected a LiDAR scan, found no such file")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ValueError(f"{path}: expected a LiDAR scan, found: {error}") from error
    layout = likely_layout(data)
    if not data or len(data) % 16 or layout:
        hint = f", which look like {layout}, not four float32 (x y z reflectance) a point" if layout else ""
        raise ValueError(f"{path}: expected whole points of 16 bytes each, found {len(data)} bytes{hint}")
    points = np.frombuffer(data, dtype="<f4").reshape(-1, 4)
    if not (np.isfinite(points).all() and np.abs(points[:, :3]).max() <= 1000):
        raise ValueError(
            f"{path}: expected finite points within 1,000 m, each float32 x, y, z, reflectance, found other numbers"
        )
    return points


def likely_layout(data: bytes) -> str | None:
    """What the bytes of a whole scan look like where that is not four float32 a point: another number of columns, or
    float64. Only whole scans tell: of points in view alone, other columns can pass for x, y, z, reflectance."""
    for dtype in ("<f4", "<f8"):
        values = np.frombuffer(data, dtype, count=len(data) // np.dtype(dtype).itemsize)
        if np.abs(values).max(initial=0, where=np.isfinite(values)) <= 1e5:
            columns = _likely_columns(values)
            return None if (dtype, columns) == ("<f4", 4) else f"{columns} columns of {values.dtype.name}"
    return None


def _likely_columns(values: np.ndarray) -> int:
    """How many columns a flat array of points has, 3 to 8: 4 unless another number is clearly more likely.

    Coordinates, reflectance, ring and time have magnitudes of their own. Cut at the wrong length the columns are
    mixtures of all of them, so the share of the variance that lies between columns tells the right length.
    """
    blocks = values[: values.size // 840 * 840].reshape(-1, 840)  # 840 is a multiple of every length
    sample = blocks[:: len(blocks) // 8 + 1]

    def share_between(columns: int) -> float:
        points = sample.reshape(-1, 4 if columns == 8 else columns)  # 8 may be two points of 4, one of them zeros
        found = points[points.any(axis=1)].ravel()  # not the zeros of beams that never came back
        if found.size < columns:
            return 0.0
        rows = found[: found.size // columns * columns].reshape(-1, columns)
        magnitudes = np.log(np.abs(rows, dtype=np.float32) + 0.01)
        return magnitudes.mean(axis=0).var() / max(magnitudes.var(), 1e-6)

    four = share_between(4)
    if not four < 0.5:
        return 4
    shares = {columns: share_between(columns) for columns in (3, 5, 6, 7, 8)}
    best = max(shares, key=lambda columns: round(shares[columns], 2))
    likely = shares[best] > four + 0.1 and not (best == 8 and _are_two_points(sample.reshape(-1, 8)))
    return best if likely else 4


def _are_two_points(rows: np.ndarray) -> bool:
    """Whether columns 4 and 5 of 8 are x and y as well: as often on either side as columns 0 and 1, and metres away.

    Two beams that fire in turns, or two sensors, differ in height and reflectance as columns do.
    """
    first, second = rows[rows[:, :4].any(axis=1), :2], rows[rows[:, 4:].any(axis=1), 4:6]
    if not len(first) or not len(second):
        return False
    signs = np.minimum((second > 0).mean(axis=0), (second < 0).mean(axis=0))
    sides = np.abs((second > 0).mean(axis=0) - (first > 0).mean(axis=0))
    return bool(signs.max() > 0.05 and sides.max() < 0.25 and np.median(np.abs(second).max(axis=1)) > 1)


def points_in_view(points: np.ndarray, lidar_to_image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The points (N, 4) in front of the camera that project into the image of `size` (width, height), or at most a
    pixel beside it: whoever filters them again, by whatever rule and rounding at the border, gets what the whole scan
    gives."""
    u, v, depth = lidar_to_image[:, :3] @ points[:, :3].T.astype(np.float64) + lidar_to_image[:, 3:]
    width, height = size
    inside = (u >= -1.5 * depth) & (u <= (width + 0.5) * depth) & (v >= -1.5 * depth) & (v <= (height + 0.5) * depth)
    return points[inside & (depth > 0)]


def read_calibration(frame: Frame) -> tuple[np.ndarray, np.ndarray, tuple[int, int] | None]:
    """camera_projection (3, 4), lidar_to_camera (4, 4), both float64, and the image size (width, height) if it's told.

    Both cameras share `lidar_to_camera`: it leads to the rectified frame of camera 0, and each projection matrix
    holds its own camera's offset.
    """
    values, path = _read_values(frame.calibration[0]), frame.calibration[0]
    if frame.layout == "odometry":  # Tr leads to the rectified camera 0
        projection = _matrix(values, path, f"P{frame.camera}", (3, 4))
        return projection, _homogeneous(_matrix(values, path, "Tr", (3, 4))), None
    if frame.layout == "object":
        projection = _matrix(values, path, f"P{frame.camera}", (3, 4))
        rectification = _matrix(values, path, "R0_rect", (3, 3))
        rigid = _matrix(values, path, "Tr_velo_to_cam", (3, 4))
        return projection, _homogeneous(rectification) @ _homogeneous(rigid), None
    projection = _matrix(values, path, f"P_rect_{frame.camera:02d}", (3, 4))
    rectification = _matrix(values, path, "R_rect_00", (3, 3))
    width, height = _matrix(values, path, f"S_rect_{frame.camera:02d}", (2,))
    values, path = _read_values(frame.calibration[1]), frame.calibration[1]
    rigid = np.hstack([_matrix(values, path, "R", (3, 3)), _matrix(values, path, "T", (3, 1))])
    return projection, _homogeneous(rectification) @ _homogeneous(rigid), (round(width), round(height))


def read_objects(path: str | None, problems: list[str] | None = None) -> dict[str, list]:
    """Field -> its value for every object of a label file; the fields are the benchmark's 15, boxes and vectors as
    lists. Empty lists where a folder has no labels (`path` None), `UNKNOWN_OBJECTS` where it has others'.

    A 16th field, the score of a prediction, is dropped. A line that can't be used is named in `problems` and becomes a
    region of DontCare: its box, or all of the image where that can't be read.
    """
    if path is not None and not os.path.isfile(path):
        return UNKNOWN_OBJECTS
    objects: dict[str, list] = {field: [] for field in OBJECT_FIELDS}
    names = {name.lower(): name for name in OBJECT_TYPES}
    for number, line in enumerate(_lines(path) if path else (), start=1):
        values = line.split()
        try:
            if not values:
                continue
            region = UNKNOWN_OBJECTS["bbox"][0]
            if len(values) not in (15, 16):
                raise ValueError(f"expected 15 fields, found {len(values)}")
            truncated, occluded, alpha, *box, rotation_y = [float(value) for value in values[1:15]]
            region = box[:4]
            kind = names.get(values[0].lower())
            if kind is None:
                raise ValueError(f"expected a type of {OBJECT_TYPES}")
            parsed = [kind, truncated, int(occluded), alpha, region, box[4:7], box[7:10], rotation_y]
        except (ValueError, OverflowError) as error:
            if problems is not None:
                problems.append(f"{path}, line {number}: {error}: {line.strip()!r}; it is a region of DontCare")
            parsed = [UNKNOWN_OBJECTS[field][0] if field != "bbox" else region for field in OBJECT_FIELDS]
        for field, value in zip(OBJECT_FIELDS, parsed, strict=True):
            objects[field].append(value)
    return objects


def _lines(path: str, what: str = "a text file") -> list[str]:
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: expected {what}, found: {error}") from error


def _read_values(path: str) -> dict[str, str]:
    """Lines `key: values` of a calibration file."""
    pairs = (line.partition(":") for line in _lines(path, "a calibration file"))
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
    """Configuration of `Kitti`: `splits`, `cameras`, `scenes` as in `list_frames`, `whole_scans` as in `read_row`.

    `on_bad_row`: "error" stops at a missing or damaged file, "skip" leaves that frame out and logs why.
    """

    splits: tuple[str, ...] | None = None
    cameras: tuple[int, ...] | None = None
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


class Kitti(datasets.GeneratorBasedBuilder):
    """KITTI object (`ImageSets/` train, val, trainval, test where there; else train: all of `training/`, test: all of
    `testing/`), odometry (train: sequences 00 to 10, test: 11 to 21) and raw (train: every image that has a scan)."""

    VERSION = VERSION
    BUILDER_CONFIG_CLASS = KittiConfig
    BUILDER_CONFIGS = [  # noqa: RUF012
        KittiConfig(name="object", version=VERSION, description="KITTI object benchmark"),
        KittiConfig(name="odometry", version=VERSION, description="KITTI odometry sequences"),
        KittiConfig(name="raw", version=VERSION, description="KITTI raw drives, *_sync"),
    ]
    DEFAULT_CONFIG_NAME = "object"
    DEFAULT_WRITER_BATCH_SIZE = 16  # whole scans have 2 MB

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description=f"{self.config.description}: synchronised camera + LiDAR pairs",
            features=features(self.config.name),
            homepage="https://www.cvlibs.net/datasets/kitti",
            license="CC BY-NC-SA 3.0",
            citation="Geiger, Lenz, Stiller, Urtasun: Vision meets robotics: The KITTI dataset. IJRR 2013.",
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
