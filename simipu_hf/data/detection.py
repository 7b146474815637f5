"""Frames with labelled objects: what a 3-D detector sees and has to predict, cropped, resized and mirrored together.

Boxes are KITTI's: x, y, z of the middle of the bottom, height, width, length (metres) and `rotation_y` (radians), in
the rectified camera frame; boxes in the image are left, top, right, bottom in pixels.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch

from ..errors import SimIPUError
from ..modeling.geometry import pixel_transform
from .frames import FrameDataset, OnBadRow, crop_window, draw_window, jitter_colors, select_frames, to_pixel_values
from .kitti_objects import NEIGHBOURS, OBJECT_TYPES, KittiObjects, by_field, check_object, object_names
from .rows import calibration_from_row, pixels_from_row

EVERY_CLASS = -1


@dataclass(frozen=True)
class DetectionLabels:
    """The objects of one image, n of them to be found, and m regions where nothing is known of a class.

    Args:
        class_labels: (n,) indices into the model's classes.
        boxes_3d: (n, 7), see the top of this file.
        boxes: (n, 4) in the image.
        ignored_boxes: (m, 4) in the image.
        ignored_labels: (m,) classes, -1 for every class.
    """

    class_labels: np.ndarray
    boxes_3d: np.ndarray
    boxes: np.ndarray
    ignored_boxes: np.ndarray
    ignored_labels: np.ndarray

    @classmethod
    def from_objects(cls, objects: KittiObjects, classes: Sequence[str]) -> "DetectionLabels":
        """Of labels as KITTI has them.

        Neighbouring classes (a van, where cars are looked for), and objects of the classes whose box in space is
        unknown or has its middle behind the camera, are regions of their class; DontCare is one of every class.
        """
        names = [*classes, *(NEIGHBOURS.get(name, "") for name in classes)]
        index = np.array([names.index(kind) if kind in names else len(names) for kind in objects.type], dtype=np.int64)
        known = (objects.dimensions > 0).all(axis=1) & (objects.location[:, 2] > 0)
        found = (index < len(classes)) & known
        ignored = (index < len(names)) & ~found
        boxes_3d = np.c_[objects.location, objects.dimensions, objects.rotation_y]
        dont_care = objects.type == "DontCare"
        return cls(
            class_labels=index[found],
            boxes_3d=boxes_3d[found],
            boxes=objects.bbox[found],
            ignored_boxes=np.concatenate([objects.bbox[ignored], objects.bbox[dont_care]]),
            ignored_labels=np.r_[index[ignored] % len(classes), np.full(dont_care.sum(), EVERY_CLASS)],
        )

    def moved(self, matrix: np.ndarray, image_size: tuple[int, int], mirrored: bool = False) -> "DetectionLabels":
        """After `matrix` (3, 3) has moved the pixels into an image of height and width `image_size`."""
        ignored_boxes = _move_image_boxes(self.ignored_boxes, matrix, image_size)
        # a region beside the image would cover the cells at its border
        is_inside = (ignored_boxes[:, 2:] > ignored_boxes[:, :2]).all(axis=1)
        return DetectionLabels(
            class_labels=self.class_labels,
            boxes_3d=mirror_boxes(self.boxes_3d) if mirrored else self.boxes_3d,
            boxes=_move_image_boxes(self.boxes, matrix, image_size),
            ignored_boxes=ignored_boxes[is_inside],
            ignored_labels=self.ignored_labels[is_inside],
        )

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """As the model takes them."""
        names = ("boxes_3d", "boxes", "ignored_boxes")
        tensors = {name: torch.from_numpy(getattr(self, name)).float() for name in names}
        return tensors | {name: torch.from_numpy(getattr(self, name)) for name in ("class_labels", "ignored_labels")}


def mirror_boxes(boxes_3d: np.ndarray) -> np.ndarray:
    """Boxes (n, 7) as a mirrored image shows them."""
    mirrored = boxes_3d.copy()
    mirrored[:, 0] *= -1
    mirrored[:, 6] = (np.pi - boxes_3d[:, 6] + np.pi) % (2 * np.pi) - np.pi
    return mirrored


def move_projection(camera_projection: np.ndarray, matrix: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """Camera frame to pixels (3, 4) of an image whose pixels `matrix` (3, 3) has moved; of the mirrored world where
    the matrix mirrors, so that focal lengths stay above 0."""
    world = np.diag([-1.0 if mirrored else 1.0, 1, 1, 1])  # in a mirror x of the camera frame changes its sign
    return matrix @ camera_projection @ world


def _move_image_boxes(boxes: np.ndarray, matrix: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    corners = boxes.reshape(-1, 2, 2) * matrix.diagonal()[:2] + matrix[:2, 2]
    moved = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    height, width = image_size
    return moved.clip(0, [width - 1, height - 1, width - 1, height - 1])


@dataclass(frozen=True)
class DetectionFrame:
    """One frame with its labels.

    Args:
        frame_id: its name.
        image: `(H, W, 3)` uint8 RGB, the original.
        camera_projection: (3, 4), rectified camera frame to pixels of `image`.
        objects: its labels.
    """

    frame_id: str
    image: np.ndarray
    camera_projection: np.ndarray
    objects: KittiObjects

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "DetectionFrame":
        """Decode a row.

        Raises:
            SimIPUError: the row has no labels or cannot be used; names the frame.
        """
        objects = objects_from_row(row)
        projection = calibration_from_row(row)[0]
        return cls(str(row.get("frame_id", "?")), pixels_from_row(row), projection, objects)


def objects_from_row(row: Mapping[str, Any]) -> KittiObjects:
    """The labels of a row.

    Raises:
        SimIPUError: there are none, or one that is no label; names the frame, what was expected and what was found.
    """
    name = f"frame {row.get('frame_id', '?')}"
    if row.get("objects") is None:
        raise SimIPUError(f"{name}: expected a column 'objects' of labels, found none")
    try:
        objects = KittiObjects.from_row(row["objects"])
        numbers_of_all = objects.numbers.tolist()
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise SimIPUError(f"{name}: its objects cannot be read as KITTI's labels ({error!r})") from error
    for index, (kind, numbers) in enumerate(zip(objects.type.tolist(), numbers_of_all, strict=True)):
        try:
            check_object(kind, numbers)
        except ValueError as error:
            raise SimIPUError(f"{name}, object {index}: {error}") from error
    return objects


def select_labelled(frames: Sequence[str]) -> datasets.Dataset:
    """The rows that the specifications name, as [`select_frames`], which have labels.

    Raises:
        SimIPUError: a source without the column `objects`, or no object in any row, as in KITTI's `testing/`.
    """
    rows = select_frames(frames, labels=True)
    if "objects" not in rows.column_names:
        raise SimIPUError(f"{' '.join(frames)}: expected a column 'objects' of labels in every source, found none")
    names = object_names(rows.features)
    if names not in ([], list(OBJECT_TYPES)):
        raise SimIPUError(f"{' '.join(frames)}: objects: expected types in the order {OBJECT_TYPES}, found {names}")
    nothing = {"DontCare", OBJECT_TYPES.index("DontCare")}
    if all(nothing.issuperset(by_field(objects)["type"]) for objects in rows["objects"][:]):
        raise SimIPUError(f"{' '.join(frames)}: expected labelled objects, found none in any of {len(rows)} frames")
    return rows


def read_labels(rows: datasets.Dataset, on_bad_row: OnBadRow = "error") -> list[KittiObjects]:
    """The labels of all rows, without their images, checked before anything is trained on them.

    Raises:
        SimIPUError: a row whose labels cannot be used; with `"skip"` it is named and left out.
    """
    labels = []
    for row in rows.select_columns(["frame_id", "objects"]):
        try:
            labels.append(objects_from_row(row))
        except SimIPUError as error:
            if on_bad_row == "error":
                raise
            print(f"{error}; left out", file=sys.stderr)
    return labels


@dataclass(frozen=True)
class DetectionAugmentation:
    """Random mirror, zoom and colours.

    Args:
        flip: how often an image is mirrored, boxes and angles with it.
        zoom: largest factor by which a random window is enlarged; the intrinsics follow.
        color: how often gamma, brightness and the three channels are each scaled by a factor of `color_range`.
    """

    flip: float = 0.5
    zoom: float = 1.2
    color: float = 0.5
    color_range: tuple[float, float] = (0.8, 1.25)


@dataclass(eq=False, repr=False)
class DetectionDataset(FrameDataset):
    """Samples for 3-D detection: `pixel_values` (3, h, w), `camera_projection` (3, 4) and `labels`.

        dataset = DetectionDataset(select_frames(["KITTI#train"]), processor, classes=model.config.classes)
        Trainer(model, train_dataset=dataset, data_collator=collate_detection)

    `classes` are the model's; the other arguments are those of [`FrameDataset`].
    """

    classes: Sequence[str] = field(kw_only=True)

    def read(self, row: Any) -> DetectionFrame:
        return DetectionFrame.from_row(row)

    def sample(self, frame: DetectionFrame, generator: np.random.Generator | None = None) -> dict[str, Any]:
        height, width = frame.image.shape[:2]
        window = crop_window(self.processor, (height, width), f"frame {frame.frame_id}")
        size, mirrored = self.processor.output_size((height, width)), False
        augmentation = self.augmentation
        if generator is not None:
            mirrored = generator.random() < augmentation.flip
            window = draw_window(window, generator.uniform(1, augmentation.zoom), generator)
        pixels = torch.from_numpy(frame.image).permute(2, 0, 1)
        image = self.processor.resize_image(pixels, window, size).permute(1, 2, 0).numpy()
        image = image[:, ::-1] if mirrored else image
        if generator is not None and generator.random() < augmentation.color:
            image = jitter_colors(image.astype(np.float32), generator, augmentation.color_range)
        matrix = pixel_transform(window, size, mirrored, self.processor.half_pixel_centers)
        labels = DetectionLabels.from_objects(frame.objects, self.classes).moved(matrix, size, mirrored)
        projection = move_projection(frame.camera_projection, matrix, mirrored)
        return {
            "pixel_values": to_pixel_values([image], self.processor)[0],
            "camera_projection": torch.from_numpy(projection).float(),
            "labels": labels.to_tensors(),
        }


def collate_detection(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of samples of one size; labels stay one dictionary an image."""
    stacked = {
        name: torch.stack([sample[name] for sample in samples]) for name in ("pixel_values", "camera_projection")
    }
    return stacked | {"labels": [sample["labels"] for sample in samples]}
