"""The KITTI builder on real frames, against an independent reading with NumPy and Pillow."""

from pathlib import Path

import numpy as np
import pytest
from kitti_folders import build
from PIL import Image

from simipu_hf.dataset_scripts.kitti import OBJECT_TYPES


def read_lines(path: Path) -> dict[str, np.ndarray]:
    """Lines of numbers of a calibration file."""
    result = {}
    for line in path.read_text().splitlines():
        key, _, rest = line.partition(": ")
        if key and key != "calib_time":
            result[key] = np.array(rest.split(), dtype=np.float64)
    return result


def assert_frame_equals(row: dict, image: Path, scan: Path, projection: np.ndarray, rigid: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(Image.open(image)))
    points = np.frombuffer(row["points"], "<f4").reshape(-1, 4)
    np.testing.assert_array_equal(points, np.fromfile(scan, dtype="<f4").reshape(-1, 4))
    np.testing.assert_array_equal(row["camera_projection"], projection)
    np.testing.assert_array_equal(row["lidar_to_camera"], rigid)


def padded(matrix: np.ndarray) -> np.ndarray:
    return np.block([[matrix, np.zeros((3, 4 - matrix.shape[1]))], [np.array([0, 0, 0, 1.0])]])


@pytest.fixture(scope="module")
def object_splits(kitti_mini, tmp_path_factory):
    return build(kitti_mini, "object", tmp_path_factory.mktemp("cache"), whole_scans=True)


@pytest.fixture(scope="module")
def raw_rows(kitti_raw_mini, tmp_path_factory):
    return build(kitti_raw_mini, "raw", tmp_path_factory.mktemp("cache"), whole_scans=True)["train"]


def test_every_object_frame_equals_an_independent_reading(kitti_mini, object_splits):
    for split, rows in object_splits.items():
        assert list(rows["frame_id"]) == (kitti_mini / f"ImageSets/{split}.txt").read_text().split()
    for split in ("trainval", "test"):
        folder = kitti_mini / ("testing" if split == "test" else "training")
        assert list(object_splits[split]["frame_id"]) == sorted(path.stem for path in (folder / "image_2").iterdir())
        for row in object_splits[split]:
            name = row["frame_id"]
            calib = read_lines(folder / f"calib/{name}.txt")
            rigid = padded(calib["R0_rect"].reshape(3, 3)) @ padded(calib["Tr_velo_to_cam"].reshape(3, 4))
            image, scan = folder / f"image_2/{name}.png", folder / f"velodyne/{name}.bin"
            assert_frame_equals(row, image, scan, calib["P2"].reshape(3, 4), rigid)


def test_every_label_equals_an_independent_reading(kitti_mini, object_splits):
    labelled = 0
    for row in object_splits["trainval"]:
        path, objects = kitti_mini / f"training/label_2/{row['frame_id']}.txt", row["objects"]
        if not path.exists():
            assert [OBJECT_TYPES[kind] for kind in objects["type"]] == ["DontCare"]
            continue
        lines = [line.split() for line in path.read_text().splitlines()]
        labelled += bool(lines)
        assert len(lines) == len(objects["type"])
        for index, fields in enumerate(lines):
            values = np.concatenate([np.ravel(objects[key][index]) for key in objects if key != "type"])
            assert OBJECT_TYPES[objects["type"][index]] == fields[0]
            assert values.tolist() == [float(field) for field in fields[1:]]
    assert labelled == 15
    assert all(row["objects"]["type"] == [] for row in object_splits["test"].select_columns("objects"))


def test_every_raw_frame_equals_an_independent_reading(kitti_raw_mini, raw_rows):
    day = kitti_raw_mini / "2011_09_26"
    drive = day / "2011_09_26_drive_0009_sync"
    cam, velo = read_lines(day / "calib_cam_to_cam.txt"), read_lines(day / "calib_velo_to_cam.txt")
    lidar_to_camera_0 = padded(np.column_stack([velo["R"].reshape(3, 3), velo["T"]]))
    rigid = padded(cam["R_rect_00"].reshape(3, 3)) @ lidar_to_camera_0
    pairs = [(camera, path) for camera in (2, 3) for path in sorted((drive / f"image_0{camera}/data").iterdir())]
    assert len(raw_rows) == len(pairs) == 25
    for row, (camera, image) in zip(raw_rows, pairs, strict=True):
        assert row["frame_id"] == f"2011_09_26_drive_0009_sync_image_0{camera}_{image.stem}"
        scan = drive / f"velodyne_points/data/{image.stem}.bin"
        assert_frame_equals(row, image, scan, cam[f"P_rect_0{camera}"].reshape(3, 4), rigid)


def test_the_raw_calibration_is_the_object_benchmark_s_of_that_day(object_splits, raw_rows):
    """So projected points agree too. Frames of 2011_09_26 are those of its image size."""
    raw = raw_rows[0]
    same_day = [row for row in object_splits["trainval"] if row["image"].size == raw["image"].size]
    assert len(same_day) > 10
    for row in same_day:
        np.testing.assert_array_equal(row["camera_projection"], raw["camera_projection"])
        np.testing.assert_array_equal(row["lidar_to_camera"], raw["lidar_to_camera"])
