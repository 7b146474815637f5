"""Objects of a frame as KITTI describes them: the column `objects` of rows, and the benchmark's text files.

A line of a file is one object (https://www.cvlibs.net/datasets/kitti, `readme.txt` of the object development kit):

    type truncated occluded alpha left top right bottom height width length x y z rotation_y [score]
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from simipu_hf.errors import SimIPUError
from simipu_hf.files import atomic_folder

OBJECT_TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", "DontCare")
NEIGHBOURS = {"Car": "Van", "Pedestrian": "Person_sitting"}
"""Classes so alike that a label of the second is neither to be found as the first nor held against it."""


@dataclass(frozen=True)
class KittiObjects:
    """N objects of one frame; predictions have scores.

    labels = KittiObjects.from_row(rows[0]["objects"])
    labels.location[labels.type == "Car"]  # metres, in the rectified camera frame

    type: (N,) names. truncated: (N,) 0 to 1. occluded: (N,) 0 fully visible, 1 partly, 2 largely occluded, 3 unknown.
    alpha: (N,) observation angle, radians. bbox: (N, 4) left, top, right, bottom, pixels.
    dimensions: (N, 3) height, width, length, metres. location: (N, 3) x right, y down, z forward of the middle of the
    bottom, metres, rectified camera frame. rotation_y: (N,) radians. score: (N,) or None.

    DontCare regions have a box in the image only; the other numbers are -1, -10 and -1000.
    """

    type: np.ndarray
    truncated: np.ndarray
    occluded: np.ndarray
    alpha: np.ndarray
    bbox: np.ndarray
    dimensions: np.ndarray
    location: np.ndarray
    rotation_y: np.ndarray
    score: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.type)

    def __getitem__(self, rows: Any) -> KittiObjects:
        """Some of the objects: a boolean mask (N,), indices or a slice."""
        picked: dict[str, Any] = {name: value if value is None else value[rows] for name, value in vars(self).items()}
        return KittiObjects(**picked)

    @classmethod
    def from_row(cls, objects: Any) -> KittiObjects:
        """From the column `objects` of a row; numbers of its `type` are indices into `OBJECT_TYPES`."""
        objects = by_field(objects)
        count = len(objects["type"])
        types = [kind if isinstance(kind, str) else OBJECT_TYPES[kind] for kind in objects["type"]]
        return cls(
            type=np.array(types, dtype="U14"),
            bbox=np.array(objects["bbox"], float).reshape(count, 4),
            dimensions=np.array(objects["dimensions"], float).reshape(count, 3),
            location=np.array(objects["location"], float).reshape(count, 3),
            **{name: np.array(objects[name], float) for name in ("truncated", "occluded", "alpha", "rotation_y")},
            score=np.array(objects["score"], float) if "score" in objects else None,
        )

    @classmethod
    def read(cls, path: str | os.PathLike, with_scores: bool = False) -> KittiObjects:
        """From a text file; empty lines count for nothing.

        Raises:
            SimIPUError: a line is not an object; names file and line, what was expected and what was found.
            OSError: the file cannot be read.
        """
        parsed = []
        for number, line in enumerate(Path(path).read_text("utf-8-sig", "replace").splitlines(), start=1):
            try:
                parsed += [_parse(line.split(), with_scores)] if line.strip() else []
            except ValueError as error:
                raise SimIPUError(f"{path}, line {number}: {error}: {line.strip()!r}") from error
        names = [field.name for field in fields(cls)][: 8 + with_scores]
        return cls.from_row({name: [one[index] for one in parsed] for index, name in enumerate(names)})

    @property
    def numbers(self) -> np.ndarray:
        """(N, 14), in the order of text files, without scores."""
        head = np.c_[self.truncated, self.occluded, self.alpha]
        return np.c_[head, self.bbox, self.dimensions, self.location, self.rotation_y]

    def to_text(self) -> str:
        """The lines of a text file, with four decimals; scores with nine digits, which tell any two float32 apart."""
        scores = [""] * len(self) if self.score is None else [f" {score:.9g}" for score in self.score]
        lines = []
        for kind, (truncated, occluded, *numbers), score in zip(self.type, self.numbers, scores, strict=True):
            decimals = " ".join(f"{number:.4f}" for number in numbers)
            lines.append(f"{kind} {truncated:.2f} {int(occluded)} {decimals}{score}\n")
        return "".join(lines)


def _parse(values: list[str], with_score: bool) -> list[Any]:
    """The fields of a line as those of `KittiObjects`; labels may have a score, which is dropped."""
    if len(values) not in ((16,) if with_score else (15, 16)):
        raise ValueError(
            f"expected {'16 fields, the last one a score' if with_score else '15 fields'}, found {len(values)}"
        )
    kind = {name.lower(): name for name in OBJECT_TYPES}.get(values[0].lower(), values[0])
    numbers = [float(value) for value in values[1 : 16 if with_score else 15]]
    check_object(kind, numbers)
    return [kind, *numbers[:3], numbers[3:7], numbers[7:10], numbers[10:13], *numbers[13:]]


def check_object(kind: str, numbers: Sequence[float]) -> None:
    """Raises a `ValueError` that says what was expected where an object is none; `numbers` as in a line."""
    if kind not in OBJECT_TYPES:
        raise ValueError(f"expected a class of {', '.join(OBJECT_TYPES)}, found {kind!r}")
    if not np.isfinite(numbers).all():
        raise ValueError("expected finite numbers")
    (left, top, right, bottom), dimensions = numbers[3:7], numbers[7:10]
    if right < left or bottom < top:
        raise ValueError(f"expected left <= right and top <= bottom, found {left}, {top}, {right}, {bottom}")
    # -1: unknown, as in DontCare regions and in detections of images alone
    if min(dimensions) < 0 and list(dimensions) != [-1, -1, -1]:
        raise ValueError(f"expected height, width and length of at least 0, found {list(dimensions)}")


def read_objects_folder(folder: str | os.PathLike, with_scores: bool = False) -> dict[str, KittiObjects]:
    """Name of a frame (`000042`) -> its objects, of every `.txt` file in `folder`, sorted by name.

    Raises:
        SimIPUError: there is none, or a line is damaged.
    """
    paths = sorted(Path(folder).glob("*.txt"))
    if not paths:
        raise SimIPUError(f"{folder}: expected files like 000042.txt, one for each frame, found none")
    return {path.stem: KittiObjects.read(path, with_scores) for path in paths}


def write_objects_folder(
    folder: str | os.PathLike, objects: Mapping[str, KittiObjects], overwrite: bool = False
) -> None:
    """Write one text file for each frame, also where it has no objects: the benchmark asks for all.

    Raises:
        SimIPUError: the folder is in use and not to be overwritten, or can't be written.
    """
    is_ours = lambda found: all(path.suffix == ".txt" for path in found.iterdir())  # noqa: E731
    with atomic_folder(Path(folder), overwrite=overwrite, is_earlier_output=is_ours) as beside:
        for name, of_frame in objects.items():
            (beside / f"{name}.txt").write_text(of_frame.to_text(), encoding="utf-8")


def by_field(objects: Any) -> Mapping[str, Sequence]:
    """Field -> its value for every object of a row, also where they are stored one by one, or not at all."""
    if isinstance(objects, Mapping):
        return objects
    names = objects[0] if objects else [field.name for field in fields(KittiObjects) if field.name != "score"]
    return {name: [one[name] for one in objects or ()] for name in names}


def object_names(features: Mapping[str, Any]) -> list[str]:
    """What the numbers in `type` of a column `objects` stand for; empty where there are none, or no such column."""
    try:
        objects: Any = features["objects"]
        kind = objects["type"] if isinstance(objects, dict) else objects.feature["type"]
        label: Any = getattr(kind, "feature", kind)  # datasets 3 and 4 describe a list of labels differently
        return list(label.names)
    except (AttributeError, KeyError, TypeError):
        return []
