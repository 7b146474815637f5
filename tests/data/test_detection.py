"""Samples of the detector: labels of real frames there and back, and everything that moves together."""

import datasets
import numpy as np
import pytest
import torch

from simipu_hf.data.detection import (
    DetectionAugmentation,
    DetectionDataset,
    DetectionFrame,
    DetectionLabels,
    collate_detection,
    mirror_boxes,
    move_projection,
    objects_from_row,
    select_labelled,
)
from simipu_hf.data.frames import select_frames
from simipu_hf.data.inspection import inspect_dataset
from simipu_hf.data.kitti_objects import OBJECT_TYPES, KittiObjects, object_names
from simipu_hf.data.rows import dataset_from_rows, to_row
from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.configuration_simipu import SimIPUDetectionConfig
from simipu_hf.modeling.geometry import FeatureGrid, pixel_transform
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.modeling_simipu_detection import decode_boxes, encode_targets

CLASSES = ("Car", "Pedestrian", "Cyclist")
CONFIG = SimIPUDetectionConfig(image_config={"architecture": "test_resnet"})
PROJECTION = np.array([[700.0, 0, 600, 45], [0, 700, 170, 0.2], [0, 0, 1, 0.003]])


def objects(*rows) -> KittiObjects:
    """Of (type, bbox, location); the rest is a car's."""
    return KittiObjects.from_row(
        {
            "type": [row[0] for row in rows],
            "bbox": [row[1] for row in rows],
            "location": [row[2] for row in rows],
            "dimensions": [(-1, -1, -1) if row[0] == "DontCare" else (1.5, 1.6, 4) for row in rows],
            **{name: [0.3] * len(rows) for name in ("truncated", "occluded", "alpha", "rotation_y")},
        }
    )


@pytest.mark.parametrize(
    ("window", "size", "mirrored"),
    [
        ((0, 0, 375, 1242), (375, 1242), False),
        ((0, 0, 375, 1242), (96, 320), False),
        ((23, 13, 352, 1216), (352, 1216), True),
        ((40, 100, 300, 1000), (384, 1280), True),
    ],
)
def test_decoding_inverts_encoding_on_real_labels(kitti_mini, window, size, mirrored):
    checked = 0
    for row in select_frames([f"{kitti_mini}#train"]):
        frame = DetectionFrame.from_row(row)
        matrix = pixel_transform(window, size, mirrored, True)
        original = DetectionLabels.from_objects(frame.objects, CLASSES)
        labels = original.moved(matrix, size, mirrored).to_tensors()
        projection = torch.from_numpy(move_projection(frame.camera_projection, matrix, mirrored)).float()
        grid, map_size = FeatureGrid(4.0, 4.0, 1.5, 1.5), (3, size[0] // 4, size[1] // 4)
        targets = encode_targets(labels, projection, grid, map_size, CONFIG)
        arguments = targets.cells[None], targets.values[None], targets.class_labels[None], projection[None]
        found = decode_boxes(*arguments, grid, CONFIG)[0].double().numpy()
        found = mirror_boxes(found) if mirrored else found
        for box in found:
            distance = np.abs(original.boxes_3d - box)
            nearest = distance[:, :6].max(axis=1).argmin()
            assert distance[nearest, :6].max() < 0.01  # metres
            turn = box[6] - original.boxes_3d[nearest, 6]
            assert abs(np.rad2deg(np.angle(np.exp(1j * turn)))) < 0.1
            checked += 1
    assert checked >= 15


def test_labels_say_what_is_to_be_found_and_what_is_not_known():
    found = DetectionLabels.from_objects(
        objects(
            ("Car", (0, 0, 10, 10), (0, 1, 20)),
            ("Van", (1, 0, 10, 10), (0, 1, 20)),
            ("Cyclist", (2, 0, 10, 10), (0, 1, 20)),
            ("Car", (3, 0, 10, 10), (0, 1, -5)),  # behind the camera
            ("DontCare", (4, 0, 10, 10), (-1000, -1000, -1000)),
            ("Tram", (5, 0, 10, 10), (0, 1, 20)),
        ),
        CLASSES,
    )
    assert found.class_labels.tolist() == [0, 2]
    assert found.boxes[:, 0].tolist() == [0, 2]
    assert dict(zip(found.ignored_boxes[:, 0], found.ignored_labels, strict=True)) == {1: 0, 3: 0, 4: -1}


def test_regions_beside_a_window_hide_nothing_in_it():
    labels = DetectionLabels.from_objects(
        objects(
            ("DontCare", (10, 20, 60, 80), (-1000, -1000, -1000)),
            ("DontCare", (190, 20, 230, 80), (-1000, -1000, -1000)),
        ),
        CLASSES,
    )
    moved = labels.moved(np.array([[1.0, 0, -200], [0, 1, 0], [0, 0, 1]]), (100, 300))
    assert moved.ignored_boxes.tolist() == [[0, 20, 30, 80]]
    assert moved.ignored_labels.tolist() == [-1]


def test_a_mirrored_box_projects_where_the_mirrored_image_shows_it():
    """Project the front of a car, mirror the pixel; and project the front of the mirrored car."""
    box = np.array([[3.0, 1.5, 20, 1.5, 1.6, 4, 0.7]])

    def front(boxes, projection):
        x, y, z, _, _, length, yaw = boxes[0]
        point = projection @ [x + length / 2 * np.cos(yaw), y, z - length / 2 * np.sin(yaw), 1]
        return point[:2] / point[2]

    matrix = pixel_transform((0, 0, 375, 1242), (375, 1242), True, True)
    u, v = front(box, PROJECTION)
    assert front(mirror_boxes(box), move_projection(PROJECTION, matrix, True)) == pytest.approx([1241 - u, v])
    np.testing.assert_allclose(mirror_boxes(mirror_boxes(box)), box)


def test_samples_move_image_labels_and_intrinsics_together():
    image = np.zeros((64, 200, 3), np.uint8)
    image[20:40, 50:80] = 255  # what the box of the car covers
    frame = DetectionFrame("0", image, PROJECTION, objects(("Car", (50, 20, 79, 39), (0, 1, 20))))
    processor = SimIPUImageProcessor(size={"height": 64, "width": 200}, do_normalize=False)
    augmentation = DetectionAugmentation(flip=0.5, zoom=1.3, color=0.0)
    dataset = DetectionDataset([frame], processor, augmentation, classes=CLASSES)
    mirrored = set()
    for epoch in range(12):
        sample = dataset[epoch, 0]
        left, top, right, bottom = sample["labels"]["boxes"][0].round().long().tolist()
        bright = sample["pixel_values"][0] > 0.5
        rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
        assert abs(rows[0] - top) <= 1
        assert abs(rows[-1] - bottom) <= 1
        assert abs(columns[0] - left) <= 1
        assert abs(columns[-1] - right) <= 1
        assert sample["camera_projection"][0, 0] > 699
        mirrored.add(bool(sample["labels"]["boxes_3d"][0, 6] > 1))
        again = dataset[epoch, 0]
        torch.testing.assert_close(again["pixel_values"], sample["pixel_values"], rtol=0, atol=0)
    assert mirrored == {False, True}
    batch = collate_detection([dataset[0], dataset[1, 0]])
    assert batch["pixel_values"].shape == (2, 3, 64, 200)
    assert batch["camera_projection"].shape == (2, 3, 4)
    assert len(batch["labels"]) == 2


def test_rows_without_labels_are_named_or_left_out():
    frame = DetectionFrame("0", np.zeros((64, 96, 3), np.uint8), PROJECTION, objects())
    rows = [{"frame_id": "7"}, frame]
    processor = SimIPUImageProcessor(size={"height": 64, "width": 96})
    with pytest.raises(SimIPUError, match="frame 7: expected a column 'objects'"):
        DetectionDataset(rows, processor, classes=CLASSES)[0]
    sample = DetectionDataset(rows, processor, classes=CLASSES, on_bad_row="skip")[0]
    assert sample["labels"]["boxes_3d"].shape == (0, 7)


def test_labels_numbered_otherwise_are_refused_and_other_objects_are_no_labels(tmp_path):
    row = to_row("log/0", np.zeros((16, 48, 3), np.uint8), np.ones((3, 4)), np.eye(3, 4), np.eye(4))
    one = {"type": 1, "bbox": [0.0, 0, 9, 9], "dimensions": [1.0, 1, 1], "location": [0.0, 0, 9]}
    one |= dict.fromkeys(("truncated", "occluded", "alpha", "rotation_y"), 0.0)
    numbers = datasets.Sequence(datasets.ClassLabel(names=list(CLASSES)))
    found = datasets.Dataset.from_list([{"objects": {name: [value] for name, value in one.items()}}])
    found = found.cast(datasets.Features({"objects": {**found.features["objects"], "type": numbers}}))
    rows = datasets.concatenate_datasets([dataset_from_rows([row], tmp_path / "rows"), found], axis=1)
    rows.save_to_disk(tmp_path / "labelled")
    with pytest.raises(SimIPUError, match=r"expected types in the order \('Car', 'Van'.*found \['Car', 'Pedestrian'"):
        select_labelled([str(tmp_path / "labelled")])
    for other in ({"category": [3]}, {"type": ["Car"]}, [1, 2]):
        features = datasets.Dataset.from_list([{"objects": other}]).features
        assert object_names(features) == []


@pytest.mark.parametrize(("one_by_one", "kind_of"), [(False, "number"), (True, "number"), (True, "text")])
def test_labels_may_be_stored_one_by_one_and_be_absent_of_a_row(tmp_path, one_by_one, kind_of):
    number, numbers = datasets.Value("float64"), datasets.Sequence(datasets.Value("float64"))
    is_text = kind_of == "text"
    fields = {"type": datasets.Value("string") if is_text else datasets.ClassLabel(names=list(OBJECT_TYPES))}
    fields |= dict.fromkeys(("bbox", "dimensions", "location"), numbers)
    fields |= dict.fromkeys(("truncated", "occluded", "alpha", "rotation_y"), number)
    one = dict.fromkeys(fields, 0) | {"bbox": [0, 0, 9, 9], "dimensions": [1, 1, 1], "location": [0, 0, 9]}
    one["type"] = "Car" if is_text else 0
    labels = [one] if one_by_one else {name: [value] for name, value in one.items()}
    kind = [fields] if one_by_one else {name: datasets.Sequence(field) for name, field in fields.items()}
    found = datasets.Dataset.from_list(
        [{"objects": labels}, {"objects": None}], features=datasets.Features({"objects": kind})
    )
    image, points = np.zeros((16, 48, 3), np.uint8), np.ones((3, 4))
    rows = [to_row(f"log/{index}", image, points, np.eye(3, 4), np.eye(4)) for index in range(2)]
    rows = datasets.concatenate_datasets([dataset_from_rows(rows, tmp_path / "rows"), found], axis=1)
    rows.save_to_disk(tmp_path / "labelled")
    selected = select_labelled([str(tmp_path / "labelled")])
    assert objects_from_row(selected[0]).type.tolist() == ["Car"]
    report = inspect_dataset(tmp_path / "labelled")
    assert (report.objects, report.problems) == ({"Car": 1}, [])
