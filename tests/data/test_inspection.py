"""Inspection measures what is there and finds all damage at once."""

import io
import json
import re
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from simipu_hf.data.inspection import inspect_dataset
from simipu_hf.data.loading import load_pretraining_dataset
from simipu_hf.data.rows import dataset_from_rows, to_row
from simipu_hf.errors import SimIPUError


def test_inspection_counts_and_measures(object_root):
    report = inspect_dataset(data_dir=object_root)
    scans = [np.fromfile(path, "<f4").reshape(-1, 4) for path in sorted(object_root.glob("t*ing/velodyne/*.bin"))]
    points = np.concatenate(scans)
    assert (report.splits, report.frames) == ({"train": 3, "val": 2, "test": 1}, 6)
    assert (report.image_sizes, report.objects) == ({"48x16": 6}, {"DontCare": 3, "Car": 2})
    assert report.problems == []
    assert ["have no file in label_2" in note for note in report.notes] == [True, True]  # of train and val
    for index, column in enumerate(("x", "y", "z", "reflectance")):
        found = report.ranges[column]
        np.testing.assert_allclose(
            [found.min, found.mean, found.max],
            [points[:, index].min(), points[:, index].mean(), points[:, index].max()],
            rtol=1e-5,
            atol=1e-6,
        )
    in_view = [sum_in_view(scan) for scan in scans]
    assert report.ranges["points_in_view"].mean == pytest.approx(np.mean(in_view))
    assert min(in_view) > 0
    assert report.sample.frame_id == "000000"
    camera = report.cameras["image_2"]
    assert (camera.frames, camera.points) == (6, pytest.approx(np.mean(in_view)))
    assert camera.share_of_points == pytest.approx(np.mean(in_view) / 60)
    assert camera.share_of_image == 1  # two cells of 32 x 32 pixels
    assert json.loads(json.dumps(report.to_dict()))["splits"] == {"train": 3, "val": 2, "test": 1}
    assert "no problems" in str(report)


def sum_in_view(scan: np.ndarray) -> int:
    """Points in the image of the fixture's camera, one by one."""
    count = 0
    for x, y, z, _ in scan.astype(float):
        right, down, forward = -y + 0.1, -z + 0.1, x + 0.1
        u, v = 40 * right / forward + 23.5, 40 * down / forward + 7.5
        count += forward > 0 and -0.5 <= u < 47.5 and -0.5 <= v < 15.5
    return count


def test_inspection_lists_all_damage_in_one_run(object_root):
    training = object_root / "training"
    (training / "velodyne/000000.bin").write_bytes(b"\0" * 40)
    (training / "image_2/000000.png").write_bytes((training / "image_2/000000.png").read_bytes()[:200])
    (training / "velodyne/000001.bin").unlink()
    (training / "calib/000002.txt").write_text("P2: 1 2 3\n")
    np.full((2, 4), np.inf, "<f4").tofile(training / "velodyne/000003.bin")
    np.full((2, 4), -5.0, "<f4").tofile(training / "velodyne/000004.bin")
    Image.new("RGB", (50, 20)).save(object_root / "testing/image_2/000000.png")
    with open(object_root / "ImageSets/val.txt", "a") as file:
        file.write("000003\n000099\n")
    found = {problem.message: problem.frames for problem in inspect_dataset(data_dir=object_root).problems}

    def frames_with(*parts: str) -> list[str]:
        return next(frames for message, frames in found.items() if all(part in message for part in parts))

    assert frames_with("000000.bin", "40 bytes") == ["train/000000"]
    assert frames_with("000000.png", "readable") == ["train/000000"]
    assert frames_with("000001.bin", "no such file") == ["train/000001"]
    assert frames_with("000002.txt", "12 finite numbers") == ["train/000002"]
    assert frames_with("000003.bin", "finite points") == ["val/000003"]
    assert frames_with("in the image, found none") == ["val/000004"]
    assert frames_with("expected 48 x 16", "found 50 x 20", "another day") == ["test/000000"]
    assert frames_with("val.txt, line 3", "000003", "second time") == []
    assert frames_with("val.txt, line 4", "000099") == []
    assert len(found) == 9


def test_inspection_of_rows(tmp_path):
    rows = [to_row(name, np.zeros((4, 6, 3), np.uint8), np.ones((2, 4)), np.eye(3, 4), np.eye(4)) for name in "aabc"]
    rows[2]["points"] = b"\0" * 10
    rows[3]["image"] = None
    png = io.BytesIO()
    Image.fromarray(np.ones((4, 6), np.uint16)).save(png, "png")
    depth = [png.getvalue()[:length] for length in (45, None, None, None)]
    rows = dataset_from_rows(rows, tmp_path / "rows")
    rows = rows.add_column("depth", [{"bytes": data, "path": None} for data in depth])
    rows.cast_column("depth", datasets.Image()).save_to_disk(tmp_path / "saved")
    report = inspect_dataset(str(tmp_path / "saved"))
    assert report.splits == {"train": 3}
    assert [(problem.frames, problem.message.partition(": ")[0]) for problem in report.problems] == [
        ([], str(tmp_path / "saved")),
        (["train/a"], "frame a"),
        (["train/b"], "frame b"),
        (["train/c"], "frame c"),
    ]


def test_what_is_seldom_as_it_should_be_is_noted(tmp_path):
    points = np.tile([[10.0, 0, 0, 0.5]], (100, 1))
    points[1:] = [10.0, 90, 0, 0.5]  # one of a hundred is in the image
    forward = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    turned = np.diag([-1.0, 1, -1, 1]) @ forward
    projection = np.array([[40.0, 0, 31.5, 0], [0, 40, 31.5, 0], [0, 0, 1, 0]])
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    rows = [to_row(f"log/{i}", image, points, projection, forward) for i in range(2)]
    rows.append(to_row("log/2", np.full((64, 64, 3), 255, np.uint8), -points, projection, turned))
    dataset_from_rows(rows, tmp_path / "rows").save_to_disk(tmp_path / "saved")
    report = inspect_dataset(str(tmp_path / "saved"))
    assert (report.scenes, report.problems) == (1, [])
    ahead, back = (f"looking {angle} degrees left of the LiDAR's x axis" for angle in (0, 180))
    assert {name: camera.frames for name, camera in report.cameras.items()} == {ahead: 2, back: 1}
    assert report.cameras[ahead].share_of_points == pytest.approx(0.01)
    assert report.cameras[ahead].share_of_image == pytest.approx(0.25)
    assert report.notes[0].startswith(f"camera {ahead} keeps 1.0% of the points, in 25.0% of its image")
    assert report.notes[-1] == "1 images of one colour, the first train/log/2"


@pytest.mark.parametrize("inverted", [False, True])
def test_an_inverted_calibration_is_noted_though_points_are_in_view(tmp_path, inverted):
    rng = np.random.default_rng(0)
    street = np.column_stack([rng.uniform(-60, 60, (4000, 2)), rng.normal(-1.7, 0.1, 4000), np.zeros(4000)])
    house = np.column_stack([rng.uniform(5, 60, (800, 1)), rng.uniform(8, 12, (800, 1)), rng.uniform(-2, 6, (800, 2))])
    lidar_to_camera = np.array([[0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, -0.3], [0, 0, 0, 1]])
    lidar_to_camera = np.linalg.inv(lidar_to_camera) if inverted else lidar_to_camera
    projection = np.array([[60.0, 0, 64, 0], [0, 60, 32, 0], [0, 0, 1, 0]])
    image = rng.integers(0, 255, (64, 128, 3), dtype=np.uint8)
    scan = np.concatenate([street, house])
    rows = [to_row(str(index), image, scan, projection, lidar_to_camera) for index in range(2)]
    dataset_from_rows(rows).save_to_disk(tmp_path / "rows")
    report = inspect_dataset(tmp_path / "rows")
    (camera,) = report.cameras.values()
    assert camera.points > 20
    lying = [re.search(r"lies on its side, its vertical (\d+) degrees from that of the scan", n) for n in report.notes]
    assert [int(found[1]) for found in lying] == ([pytest.approx(90, abs=3)] if inverted else [])


def test_scans_of_other_columns_and_labels_that_cannot_be_used_are_named(object_root):
    training = object_root / "training"
    scan = np.fromfile(training / "velodyne/000000.bin", "<f4")
    scan.astype("<f8").tofile(training / "velodyne/000000.bin")
    (training / "label_2/000001.txt").write_text(
        "Boat 0 0 0 1 1 5 5 1 1 1 0 0 9 0\nCar 0 0 0 1 1 5 5 1 1 1 0 0 9 0 0.9\n"
    )
    (training / "label_2/000002.txt").write_text("Van 0 0 0 5 1 1 5 1 1 1 0 0 9 0\n")
    report = inspect_dataset(data_dir=object_root, split="train")
    assert [problem.frames for problem in report.problems] == [[f"train/00000{index}"] for index in range(3)]
    assert "000001.txt, line 1" in report.problems[1].message
    assert report.problems[2].message.startswith("frame 000002, object 0: expected left <= right")
    assert report.objects == {"Car": 3, "Van": 1, "DontCare": 1}


def test_only_what_is_asked_for_is_looked_at(object_root, raw_root, tmp_path):
    shutil.copytree(object_root / "training/image_2", object_root / "training/image_3")
    load_pretraining_dataset(data_dir=raw_root).save_to_disk(tmp_path / "saved")
    assert "P3" in inspect_dataset(data_dir=object_root, split="train", cameras=3).problems[0].message
    assert inspect_dataset(data_dir=object_root, split="validation").splits == {"val": 2}
    with pytest.raises(SimIPUError, match="scenes: expected"):
        inspect_dataset(data_dir=raw_root, scenes=["none"])
    with pytest.raises(SimIPUError, match=r"can be chosen of a published data set.*rows\.filter"):
        inspect_dataset(data_dir=tmp_path / "saved", scenes=["none"])


def test_no_frames_at_all_are_a_problem(tmp_path):
    (tmp_path / "2011_09_26/2011_09_26_drive_0001_extract/image_02/data").mkdir(parents=True)
    report = inspect_dataset(data_dir=tmp_path)
    assert [problem.message for problem in report.problems] == [f"{tmp_path}: expected frames, found none"]
    assert "only *_sync drives" in report.notes[0]
