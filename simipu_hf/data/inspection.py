"""Looks at a data set before training on it: counts, ranges, what each camera sees, and everything that is damaged."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import datasets
import numpy as np
from tqdm.auto import tqdm

from ..modeling.geometry import inside_image, project_points
from .depth import read_depth_png
from .detection import objects_from_row
from .kitti_objects import OBJECT_TYPES, by_field, object_names
from .loading import list_frames, load_pretraining_dataset
from .rows import Frame, calibration_from_row, image_from_row, points_from_row, scene_of
from .sources import Source, find_source, given_sources, refuse_second_split, split_source, undecoded

NEXT_TO_NOTHING = 0.02  # of the image's cells with a point, or of the scan's points in the image
CELL = 32  # pixels
DEPTH_RANGE = (1.0, 80.0)  # metres
LYING = 30.0  # degrees between the vertical of a camera and the scan's


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
class Camera:
    """What one camera of the rig sees, on average."""

    frames: int
    points: float
    """Points in its images, 1 to 80 m away, a frame."""
    share_of_points: float
    """These among the points of the rows. Rows that were prepared hold only the points in the image: about 1."""
    share_of_image: float
    """Cells of 32 x 32 pixels with at least one of them."""


@dataclass
class InspectionReport:
    """What `inspect_dataset` found; `to_dict` is ready for JSON."""

    source: str
    splits: dict[str, int]
    frames: int
    """Frames looked at, each once however many splits hold it."""
    scenes: int = 0
    """Drives, logs or segments that they come from."""
    image_sizes: dict[str, int] = field(default_factory=dict)
    """"1242x375" -> number of images."""
    cameras: dict[str, Camera] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)
    """Of x, y, z (metres, LiDAR frame) and reflectance over all points; and, per frame, of `points_per_scan`,
    `points_in_view` at any distance and their `depth_in_view` (metres)."""
    objects: dict[str, int] = field(default_factory=dict)
    """Object type -> number of labels, where the data set has labels. A frame of KITTI without a file of labels has
    one DontCare, as large as its image."""
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is left out as the data set itself has it, and what may be as it should be but seldom is."""
    sample: Frame | None = None
    """The first sound frame, to be drawn."""

    def to_dict(self) -> dict[str, Any]:
        values = asdict(replace(self, sample=None))
        del values["sample"]
        return values

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.frames} frames of {self.scenes} scenes; "
            + ", ".join(f"{name} {count}" for name, count in self.splits.items()),
            "image sizes: " + ", ".join(f"{size} ({count})" for size, count in self.image_sizes.items()),
        ]
        near, far = DEPTH_RANGE
        lines += [
            f"camera {name}: {camera.frames} frames; {camera.points:,.0f} points in view from "
            f"{near:.0f} to {far:.0f} m, {camera.share_of_points:.1%} of the scan, in {camera.share_of_image:.0%} of "
            "the image"
            for name, camera in self.cameras.items()
        ]
        lines += [f"{name}: {r.min:.4g} to {r.max:.4g}, mean {r.mean:.4g}" for name, r in self.ranges.items()]
        if self.objects:
            lines.append("objects: " + ", ".join(f"{name} {count}" for name, count in self.objects.items()))
        lines += [f"note: {note}" for note in self.notes]
        for problem in self.problems:
            more = f" and {len(problem.frames) - 5} more" if len(problem.frames) > 5 else ""
            frames = f" [{', '.join(problem.frames[:5])}{more}]" if problem.frames else ""
            lines.append(f"problem: {problem.message}{frames}")
        return "\n".join([*lines, f"{len(self.problems)} problems" if self.problems else "no problems"])


def inspect_dataset(
    dataset_name: str | None = None,
    data_dir: str | os.PathLike | None = None,
    dataset_config_name: str | None = None,
    split: str | Sequence[str] | None = None,
    *,
    cameras: Sequence[int | str] | None = None,
    scenes: Sequence[str] | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> InspectionReport:
    """Reads every frame completely, counts, measures, and lists all damage in one run.

        report = inspect_dataset(data_dir="KITTI")
        print(report)

    Args:
        dataset_name, data_dir, dataset_config_name, cameras, scenes, cache_dir: As `load_pretraining_dataset`, one
            source. Published data sets are read directly, nothing is prepared.
        split: One split or several; None: all of them.

    Raises:
        SimIPUError: there is no data set to look at, or a column is missing or of another type. Damage to single
            frames is reported, not raised.
    """
    source, wanted = open_source(dataset_name, data_dir, dataset_config_name, split)
    inspector = _Inspector()
    if source.reader is not None:
        listing = list_frames(source, wanted, cameras, scenes, skipped=[])
        counts, notes = {name: len(frames) for name, frames in listing.splits.items()}, listing.notes
        inspector.add_problems(listing.problems)
        if not any(counts.values()) and not listing.problems:
            inspector.add_problems([f"{source.location}: expected frames, found none"])
        frames: dict[str, tuple[str, Any]] = {}
        for name, found in listing.splits.items():
            for frame in found:  # trainval holds the frames of train and val once more
                frames.setdefault(repr(frame), (f"{name}/{frame.frame_id}", frame))
        rows, total = _read_files(source, frames.values()), len(frames)
    else:
        repeated: list[str] = []
        loaded = load_splits(source, wanted, cameras=cameras, scenes=scenes, cache_dir=cache_dir, skipped=repeated)
        inspector.add_problems(repeated)
        counts, notes = {name: len(found) for name, found in loaded.items()}, []
        rows, total = _read_rows(loaded), sum(counts.values())
    for label, row, type_names, damage in tqdm(rows, total=total, desc="Inspecting", unit="frame"):
        inspector.look_at(label, row, type_names, damage)
    return inspector.report(source.location, counts, total, notes)


def open_source(
    dataset_name: str | None,
    data_dir: str | os.PathLike | None,
    dataset_config_name: str | None,
    split: str | Sequence[str] | None,
) -> tuple[Source, list[str]]:
    """One source and the splits of it that are asked for; `None`: all.

    Raises:
        SimIPUError: several sources, none, or a split that it does not have.
    """
    (text,) = given_sources(dataset_name, data_dir, most=1)
    refuse_second_split(split if isinstance(split, str) else None, text)
    location, own_split = split_source(text)
    source = find_source(location, dataset_config_name, must_be_folder=dataset_name is None)
    split = split or own_split or source.splits
    return source, [source.find_split(name) for name in ([split] if isinstance(split, str) else split)]


def load_splits(source: Source, names: Sequence[str], **options: Any) -> dict[str, datasets.Dataset]:
    """Rows of splits of a source; `options` are those of `load_pretraining_dataset`."""
    load = partial(load_pretraining_dataset, source.location, dataset_config_name=source.config, **options)
    return {name: load(split=name) for name in names}


# a frame's label, its row, what the numbers of its objects' types stand for, its damage
Look: TypeAlias = tuple[str, dict[str, Any], list[str], list[str]]


def _read_files(source: Source, frames: Iterable[tuple[str, Any]]) -> Iterator[Look]:
    assert source.reader is not None
    for label, frame in frames:
        damage: list[str] = []
        yield label, source.reader.read_row(frame, whole_scans=True, problems=damage), [], damage


def _read_rows(loaded: Mapping[str, datasets.Dataset]) -> Iterator[Look]:
    for name, rows in loaded.items():
        type_names = object_names(rows.features)
        for row in undecoded(rows):
            yield f"{name}/{row['frame_id']}", row, type_names, []


def _object_types(row: Mapping[str, Any], type_names: Sequence[str]) -> list[str]:
    """Types of the objects of a row; empty where its column `objects` is of another form."""
    try:
        types = by_field(row.get("objects"))["type"]
        return [kind if isinstance(kind, str) else type_names[kind] for kind in types]
    except (KeyError, IndexError, TypeError):
        return []


class _Inspector:
    """Adds up what the frames hold."""

    def __init__(self) -> None:
        self.sample: Frame | None = None
        self.problems: dict[str, dict[str, None]] = {}  # message -> frames, in order
        self.damaged: set[str] = set()
        self.scenes: set[str] = set()
        self.sizes: Counter[str] = Counter()
        self.objects: Counter[str] = Counter()
        self.one_color: list[str] = []
        self.ranges: dict[str, tuple[float, float, int, float]] = {}  # name -> min, sum, count, max
        self.views: dict[str, list[tuple[int, float, float]]] = {}  # camera -> points, share of points and of image
        self.tilts: dict[str, list[float]] = {}  # camera -> see `_tilt`
        self.sizes_of_camera: dict[bytes, dict[tuple[int, int], list[str]]] = {}

    def add_problems(self, messages: Sequence[str], frame: str | None = None) -> None:
        for message in messages:
            frames = self.problems.setdefault(message, {})
            if frame is not None:
                frames[frame] = None
                self.damaged.add(frame)

    def look_at(self, label: str, row: Mapping[str, Any], type_names: list[str], damage: Sequence[str]) -> None:
        """`row` holds None for parts that its reader described in `damage`."""
        self.add_problems(damage, label)
        self.scenes.add(row.get("scene") or scene_of(row["frame_id"]))
        types = _object_types(row, type_names)
        self.objects.update(types)
        if types and type_names in ([], list(OBJECT_TYPES)):  # labels that training takes
            self._read(label, row, objects_from_row)
        if isinstance(row.get("depth"), Mapping):
            self._read(label, row, lambda row: read_depth_png(row["depth"], f"frame {row['frame_id']}"))
        described = {column for column in ("image", "points", "camera_projection") if damage and row[column] is None}
        image = None if "image" in described else self._read(label, row, image_from_row)
        points = None if "points" in described else self._read(label, row, points_from_row)
        calibration = None if "camera_projection" in described else self._read(label, row, calibration_from_row)
        if image is not None:
            self.sizes[f"{image.width}x{image.height}"] += 1
            if all(low == high for low, high in image.getextrema()):
                self.one_color.append(label)
        if points is not None:
            self._measure("points_per_scan", [len(points)])
            for column, values in zip(("x", "y", "z", "reflectance"), points.T, strict=True):
                self._measure(column, values)
        if image is None or calibration is None:
            return
        projection, lidar_to_camera = calibration
        self.sizes_of_camera.setdefault(projection.tobytes(), {}).setdefault(image.size, []).append(label)
        if points is not None:
            camera = str(row.get("camera") or _direction(lidar_to_camera))
            points = points.astype(np.float64)
            pixels, depth = project_points(points, projection @ lidar_to_camera)
            self._look_at_view(label, camera, pixels, depth, np.array(image.size[::-1]))
            if (tilt := _tilt(points[:, :3], lidar_to_camera)) is not None:
                self.tilts.setdefault(camera, []).append(tilt)
            if self.sample is None and label not in self.damaged:
                self.sample = Frame.from_row(row)

    def _read(self, label: str, row: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
        """Each part is read on its own, so that damage to one doesn't hide damage to another."""
        try:
            return read(row)
        except ValueError as error:
            self.add_problems([str(error)], label)
            return None

    def _look_at_view(
        self, label: str, camera: str, pixels: np.ndarray, depth: np.ndarray, image_size: np.ndarray
    ) -> None:
        inside = inside_image(pixels, depth, image_size)
        self._measure("points_in_view", [inside.sum()])
        if inside.any():
            self._measure("depth_in_view", depth[inside])
        else:
            self.add_problems(["expected points of the scan in the image, found none"], label)
        near, far = DEPTH_RANGE
        seen = inside & (depth >= near) & (depth <= far)
        cells = np.unique(((pixels[seen] + 0.5) // CELL).astype(int), axis=0)
        total = np.prod(-(-image_size // CELL))
        self.views.setdefault(camera, []).append((int(seen.sum()), seen.sum() / len(seen), len(cells) / total))

    def _measure(self, name: str, values: Sequence[float] | np.ndarray) -> None:
        values = np.asarray(values, dtype=np.float64)
        low, total, count, high = self.ranges.get(name, (np.inf, 0.0, 0, -np.inf))
        smallest, largest = min(low, values.min()), max(high, values.max())
        self.ranges[name] = (smallest, total + values.sum(), count + values.size, largest)

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

    def _notes(self, cameras: Mapping[str, Camera]) -> list[str]:
        notes = [
            f"camera {name} keeps {camera.share_of_points:.1%} of the points, in {camera.share_of_image:.1%} of its "
            "image, next to nothing: is lidar_to_camera the way from LiDAR to camera?"
            for name, camera in cameras.items()
            if min(camera.share_of_points, camera.share_of_image) < NEXT_TO_NOTHING
        ]
        notes += [
            f"camera {name} lies on its side, its vertical {np.median(tilts):.0f} degrees from that of the scan: is "
            "it mounted so, or is lidar_to_camera the way from camera to LiDAR?"
            for name, tilts in self.tilts.items()
            if np.median(tilts) > LYING
        ]
        if self.one_color:
            notes.append(f"{len(self.one_color)} images of one colour, the first {self.one_color[0]}")
        return notes

    def report(self, source: str, counts: dict[str, int], frames: int, notes: Sequence[str]) -> InspectionReport:
        self._compare_sizes()
        cameras = {name: Camera(len(views), *np.mean(views, axis=0).tolist()) for name, views in self.views.items()}
        return InspectionReport(
            source=source,
            splits=counts,
            frames=frames,
            scenes=len(self.scenes),
            image_sizes=dict(self.sizes.most_common()),
            cameras=cameras,
            ranges={
                name: Range(float(low), float(total / count), float(high))
                for name, (low, total, count, high) in self.ranges.items()
            },
            objects=dict(self.objects.most_common()),
            problems=[Problem(message, list(frames)) for message, frames in self.problems.items()],
            notes=[*notes, *self._notes(cameras)],
            sample=self.sample,
        )


def _tilt(points: np.ndarray, lidar_to_camera: np.ndarray) -> float | None:
    """Degrees between a camera's vertical and the scan's (`(N, 3)`), the direction in which it is flattest; `None`
    where it is about as high as wide."""
    if len(points) < 3:
        return None
    variances, directions = np.linalg.eigh(np.cov(points.T))
    if variances[0] > variances[1] / 4:
        return None
    return float(np.degrees(np.arccos(min(1.0, abs(lidar_to_camera[1, :3] @ directions[:, 0])))))


def _direction(lidar_to_camera: np.ndarray) -> str:
    """Where a camera without a name looks: the angle of its optical axis from the LiDAR's x axis, to 30 degrees."""
    angle = np.degrees(np.arctan2(lidar_to_camera[2, 1], lidar_to_camera[2, 0]))
    return f"looking {round(angle / 30) * 30 % 360} degrees left of the LiDAR's x axis"
