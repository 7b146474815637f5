"""The KITTI builder on random frames: splits, cameras, drives, cache, damage."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from kitti_folders import LABEL, LIDAR_TO_CAMERA, PROJECTIONS, build
from PIL import ExifTags, Image

from simipu_hf.dataset_scripts import kitti


def test_splits_come_from_image_sets(object_root, tmp_path):
    root = object_root({"train": "000002\n000000\n", "val": "000001\n", "trainval": "000000\n000001\n000002\n"})
    data = build(root, "object", tmp_path / "cache")
    assert {name: list(rows["frame_id"]) for name, rows in data.items()} == {
        "train": ["000002", "000000"],
        "val": ["000001"],
        "trainval": ["000000", "000001", "000002"],
        "test": ["000000", "000001"],
    }


def test_without_image_sets_train_is_all_of_training(object_root, tmp_path):
    root = object_root()
    data = build(root, "object", tmp_path / "cache")
    assert {name: len(rows) for name, rows in data.items()} == {"train": 4, "test": 2}
    shutil.rmtree(root / "testing/velodyne")  # which a split that is not chosen may lack
    assert list(build(root, "object", tmp_path / "cache", splits=("train",))) == ["train"]
    shutil.rmtree(root / "testing")
    assert kitti.split_names("object", root) == ["train"]


def test_objects_have_all_label_fields(object_root, tmp_path):
    rows = build(object_root(), "object", tmp_path / "cache")["train"]
    objects = rows[0]["objects"]
    assert objects == {
        "type": [0, 0],
        "truncated": [0.5, 0.5],
        "occluded": [1, 1],
        "alpha": [-1.25, -1.25],
        "bbox": [[10.0, 2.5, 30.0, 12.75]] * 2,
        "dimensions": [[1.5, 1.6, 3.7]] * 2,
        "location": [[-2.1, 1.65, 12.3]] * 2,
        "rotation_y": [-1.45, -1.45],
    }
    assert all(values == [] for values in rows[1]["objects"].values())  # an empty label file


def test_a_frame_without_a_label_file_among_labelled_ones_is_one_unknown_region(object_root):
    listing = kitti.list_frames("object", object_root())
    assert ["2 of 4 frames have no file in label_2, the first 000002" in note for note in listing.notes] == [True]
    assert kitti.read_row(listing.splits["train"][2])["objects"] == kitti.UNKNOWN_OBJECTS
    assert kitti.read_row(listing.splits["test"][0])["objects"]["type"] == []


@pytest.mark.parametrize("path", ["velodyne/000001.bin", "calib/000001.txt", "label_2/000001.txt"])
def test_a_file_that_cannot_be_read_is_damage_of_its_frame(object_root, monkeypatch, path):
    frame = kitti.list_frames("object", object_root()).splits["train"][1]

    def broken(file, *args, **kwargs):
        if str(file).replace(os.sep, "/").endswith(path):
            raise OSError(5, "Input/output error")
        return open(file, *args, **kwargs)

    monkeypatch.setattr(kitti, "open", broken, raising=False)
    with pytest.raises(ValueError, match=rf"{path[-10:]}: expected a .* found: .*Input/output error"):
        kitti.read_row(frame)
    problems = []
    kitti.read_row(frame, problems=problems)
    assert len(problems) == 1


def test_raw_pairs_every_image_that_has_a_scan(raw_root, tmp_path):
    rows = build(raw_root, "raw", tmp_path / "cache")["train"]
    first, second = "2011_09_26_drive_0001_sync", "2011_09_26_drive_0002_sync"
    assert list(rows["frame_id"]) == (
        [f"{first}_image_02_{index:010d}" for index in (0, 2, 3)]
        + [f"{first}_image_03_{index:010d}" for index in (0, 2)]
        + [f"{second}_image_02_{index:010d}" for index in (0, 1)]
    )
    notes = kitti.list_frames("raw", raw_root).notes
    assert any("1 of 4 images have no partner for camera 2, left out: 0000000001" in note for note in notes)


@pytest.mark.parametrize("drive", ["2011_09_26_drive_0001_sync", "2011_09_26_drive_0001"])
def test_raw_drive_and_camera_are_selectable(raw_root, tmp_path, drive):
    (raw_root / "2011_09_26/2011_09_28_drive_0003_sync").mkdir()  # damage, but to no drive that is asked for
    rows = build(raw_root, "raw", tmp_path / "cache", scenes=(drive,), cameras=(3,))["train"]
    assert list(rows["frame_id"]) == [f"2011_09_26_drive_0001_sync_image_03_{index:010d}" for index in (0, 2)]
    frames = kitti.list_frames("raw", raw_root, splits=["train"], cameras=[3], scenes=[drive]).splits["train"]
    assert [frame.frame_id for frame in frames] == list(rows["frame_id"])


@pytest.mark.parametrize("name", ["object", "raw"])
def test_each_camera_uses_its_own_projection(object_root, raw_root, tmp_path, name):
    root, scenes = (raw_root, ("2011_09_26_drive_0001",)) if name == "raw" else (object_root(), None)
    for camera, values in PROJECTIONS.items():
        row = build(root, name, tmp_path / "cache", cameras=(camera,), scenes=scenes)["train"][0]
        np.testing.assert_array_equal(np.ravel(row["camera_projection"]), np.array(values.split(), float))
        if camera == 3 and name == "object":  # the benchmark's boxes are drawn in the left camera's images
            assert row["objects"]["type"] == [kitti.OBJECT_TYPES.index("DontCare")]


def test_two_processes_and_streaming_give_the_same_rows(object_root, tmp_path):
    root = object_root()
    one = build(root, "object", tmp_path / "one")["train"]
    builder = kitti.Kitti(config_name="object", data_dir=str(root), cache_dir=str(tmp_path / "two"))
    builder.download_and_prepare(num_proc=2)
    two, stream = builder.as_dataset(split="train"), builder.as_streaming_dataset(split="train")
    assert stream.num_shards == 4
    for a, b, c in zip(one, two, stream, strict=True):
        images = [np.asarray(row.pop("image")) for row in (a, b, c)]
        np.testing.assert_array_equal(images[0], images[1])
        np.testing.assert_array_equal(images[0], images[2])
        assert a == b == c


def test_a_relative_folder_works_from_elsewhere_later(object_root, tmp_path, monkeypatch):
    root = object_root()
    monkeypatch.chdir(root)
    rows = build(Path("."), "object", tmp_path / "cache")["train"]
    monkeypatch.chdir(tmp_path)
    assert rows[0]["image"].size == (48, 16)


def test_cache_is_kept_while_nothing_changes_and_left_when_files_or_code_change(object_root, tmp_path, monkeypatch):
    root = object_root()

    def cache_folder() -> str:
        return kitti.Kitti(config_name="object", data_dir=str(root), cache_dir=str(tmp_path / "cache")).cache_dir

    before = cache_folder()
    assert cache_folder() == before
    np.tile([10, 0, 0, 0], (3, 1)).astype("<f4").tofile(root / "training/velodyne/000000.bin")
    other_files = cache_folder()
    assert other_files != before
    assert len(build(root, "object", tmp_path / "cache")["train"][0]["points"]) == 3 * 16
    changed = tmp_path / "kitti_changed.py"
    changed.write_bytes(Path(kitti.__file__).read_bytes() + b"\n# changed\n")
    monkeypatch.setattr(kitti, "__file__", str(changed))
    assert cache_folder() not in (before, other_files)


def delete(path):
    return lambda root: (root / path).unlink()


def rewrite(path, old, new):
    def apply(root):
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new))

    return apply


def overwrite(path, data):
    return lambda root: (root / path).write_bytes(data)


SCAN, IMAGE, CALIB = "training/velodyne/000001.bin", "training/image_2/000001.png", "training/calib/000001.txt"
LABELS = "training/label_2/000000.txt"
SOUND = np.random.default_rng(0).uniform((3, -20, -2, 0), (60, 20, 1, 1), (840, 4)).astype("<f4")
BEHIND = np.float32([-9, 0, 0, 0])
NO_NUMBERS = np.array([[0] * 4, [0, np.nan, 0, 0], [0, 0, 0, np.inf]], "<f4")


def turned(root: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (48, 16)).save(root / "training/image_2/000001.png", "JPEG", exif=exif)


OBJECT_DAMAGE = {
    "image to be turned": (turned, ["000001.png", "an EXIF orientation"]),
    "scan missing": (delete(SCAN), [SCAN, "no such file"]),
    "image missing": (delete(IMAGE), [IMAGE, "No such file"]),
    "calibration missing": (delete(CALIB), [CALIB, "No such file"]),
    "scan truncated": (overwrite(SCAN, b"\0" * 40), [SCAN, "16 bytes", "40 bytes"]),
    "scan empty": (overwrite(SCAN, b""), [SCAN, "0 bytes"]),
    "scan with NaN": (overwrite(SCAN, NO_NUMBERS), [SCAN, "finite points"]),
    "image unreadable": (overwrite(IMAGE, b"not a PNG"), [IMAGE, "readable image"]),
    "calibration line missing": (rewrite(CALIB, "P2:", "Q2:"), [CALIB, "'P2:'", "Q2"]),
    "calibration line too long": (rewrite(CALIB, "R0_rect:", "R0_rect: 1.0"), [CALIB, "'R0_rect:'", "9", "10"]),
    "calibration not numeric": (rewrite(CALIB, "Tr_velo_to_cam:", "Tr_velo_to_cam: x"), [CALIB, "'x'"]),
    "calibration with NaN": (rewrite(CALIB, "R0_rect: ", "R0_rect: nan nan nan 0 0 0 0 0 0\nX: "), [CALIB, "finite"]),
    "scan of float64": (overwrite(SCAN, SOUND.astype("<f8")), [SCAN, "4 columns of float64"]),
    "scan in millimetres": (overwrite(SCAN, 1000 * SOUND), [SCAN, "within 1,000 m", "float32"]),
    "scan behind the camera": (overwrite(SCAN, BEHIND), ["frame 000001", "points of the scan in the image"]),
    "ImageSets names an absent frame": (
        overwrite("ImageSets/train.txt", b"000000\n000077\n"),
        ["ImageSets/train.txt, line 2", "000077"],
    ),
    "ImageSets names a frame twice": (
        overwrite("ImageSets/train.txt", b"000000\n000000\n"),
        ["ImageSets/train.txt, line 2", "second time"],
    ),
    "folder missing": (lambda root: shutil.rmtree(root / "training/velodyne"), ["velodyne", "image_2"]),
}


def test_labels_never_decide_whether_a_frame_can_be_used(object_root, tmp_path):
    root = object_root({"train": "000000\n"})
    lines = [
        "Car 0 0",
        LABEL.strip().replace("Car", "car") + " 0.75",
        LABEL.strip().replace("Car", "Boat"),
        LABEL.strip().replace("1.60", "x"),
    ]
    (root / LABELS).write_text("\n".join(lines))
    objects = build(root, "object", tmp_path / "cache")["train"][0]["objects"]
    # in the place of those that cannot be used: a region of which nothing is known
    assert (objects["type"], objects["rotation_y"]) == ([8, 0, 8, 8], [-10, -1.45, -10, -10])
    everything, box = [0, 0, 1e4, 1e4], [10, 2.5, 30, 12.75]
    assert objects["bbox"] == [everything, box, box, everything]
    problems = []
    kitti.read_row(kitti.list_frames("object", root).splits["train"][0], problems=problems)
    assert [problem.partition(":")[0].rpartition(", ")[2] for problem in problems] == ["line 1", "line 3", "line 4"]


def test_file_names_may_be_in_upper_case_and_lists_may_begin_with_a_mark(object_root, tmp_path):
    root = object_root({"train": "\ufeff000001\n000002\n"})
    for path in (SCAN, IMAGE, CALIB):
        (root / path).rename((root / path).with_suffix((root / path).suffix.upper()))
    calibration = (root / CALIB).with_suffix(".TXT")
    calibration.write_text("\ufeff" + calibration.read_text(), encoding="utf-8")
    assert list(build(root, "object", tmp_path / "cache")["train"]["frame_id"]) == ["000001", "000002"]


def test_object_frames_know_their_drive_where_the_devkit_is_at_hand(object_root, tmp_path):
    root = object_root()
    assert build(root, "object", tmp_path / "cache")["train"]["scene"][2] == "training/000002"
    (root / "devkit_object/mapping").mkdir(parents=True)
    mapping = "".join(f"2011_09_26 2011_09_26_drive_000{index}_sync 0000000000\n" for index in range(1, 5))
    (root / "devkit_object/mapping/train_mapping.txt").write_text(mapping)
    (root / "devkit_object/mapping/train_rand.txt").write_text("3,1,4,2\n")
    frames = kitti.list_frames("object", root).splits
    assert [frame.scene[-6] for frame in frames["train"]] == ["3", "1", "4", "2"]
    assert [frame.scene for frame in frames["test"]] == ["testing/000000", "testing/000001"]
    (root / "devkit_object/mapping/train_mapping.txt").write_text(mapping[:60])
    with pytest.raises(ValueError, match=r"mapping\.txt: line 3: expected day, drive and frame, found '2 lines'"):
        kitti.list_frames("object", root)


def test_odometry_sequences(object_root, tmp_path):
    training, root = object_root() / "training", tmp_path / "odometry"
    calib = (training / "calib/000000.txt").read_text().replace("Tr_velo_to_cam", "Tr").replace("R0_rect", "unused")
    for sequence, names in (("03", ("image_2", "image_3", "velodyne")), ("12", ("image_2", "velodyne"))):
        for name in names:
            shutil.copytree(training / name, root / "sequences" / sequence / name)
        (root / "sequences" / sequence / "calib.txt").write_text(calib)
    assert kitti.configurations(root) == ["odometry"]
    data = build(root, "odometry", tmp_path / "cache", whole_scans=True)
    assert {name: len(rows) for name, rows in data.items()} == {"train": 8, "test": 4}
    row = data["train"][5]
    assert (row["frame_id"], row["scene"], row["camera"]) == ("03_image_3_000001", "03", "image_3")
    np.testing.assert_array_equal(np.ravel(row["camera_projection"]), np.array(PROJECTIONS[3].split(), float))
    np.testing.assert_array_equal(np.ravel(row["lidar_to_camera"])[:12], np.array(LIDAR_TO_CAMERA.split(), float))
    assert row["points"] == (root / "sequences/03/velodyne/000001.bin").read_bytes()
    some = build(root, "odometry", tmp_path / "cache", scenes=("12",), cameras=(2,))
    assert {name: len(rows) for name, rows in some.items()} == {"test": 4}
    with pytest.raises(ValueError, match=r"scenes: expected some of \['03', '12'\]"):
        kitti.list_frames("odometry", root, scenes=["05"])


DRIVE = "2011_09_26/2011_09_26_drive_0002_sync"
RAW_DAMAGE = {
    "calibration missing": (delete("2011_09_26/calib_velo_to_cam.txt"), ["calib_velo_to_cam.txt", "No such file"]),
    "calibration line missing": (rewrite("2011_09_26/calib_cam_to_cam.txt", "P_rect_02", "X"), ["'P_rect_02:'"]),
    "calibration of another day": (
        lambda root: Image.new("RGB", (47, 15)).save(root / DRIVE / "image_02/data/0000000000.png"),
        ["48 x 16", "47 x 15", "another day", "calib_cam_to_cam.txt"],
    ),
    "drive in another day's folder": (
        lambda root: (root / DRIVE).rename(root / "2011_09_26/2011_09_28_drive_0002_sync"),
        ["2011_09_28_drive_0002_sync", "2011_09_26"],
    ),
    "no scans": (lambda root: shutil.rmtree(root / DRIVE / "velodyne_points"), ["velodyne_points", "found none"]),
    "no images": (lambda root: shutil.rmtree(root / DRIVE / "image_02"), [DRIVE, "found no pair"]),
}


def messages(error: BaseException) -> str:
    text = ""
    while error is not None:
        text, error = f"{text}\n{error}", error.__cause__
    return text


@pytest.mark.parametrize(
    ("name", "case"), [("object", case) for case in OBJECT_DAMAGE] + [("raw", case) for case in RAW_DAMAGE]
)
def test_damage_is_named_and_that_of_a_frame_can_be_skipped(object_root, raw_root, tmp_path, name, case):
    root = raw_root if name == "raw" else object_root({"train": "000000\n000001\n"})
    damage, expected = (RAW_DAMAGE if name == "raw" else OBJECT_DAMAGE)[case]
    damage(root)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (datasets wraps it)
        build(root, name, tmp_path / "cache")
    assert all(part.replace("/", os.sep) in messages(caught.value) for part in expected), messages(caught.value)
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    if name == "object" and case != "folder missing":
        rows = build(root, name, tmp_path / "cache", on_bad_row="skip")["train"]
        assert list(rows["frame_id"]) == ["000000"]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("object", {"splits": ("valid",)}, "'train'"),
        ("object", {"cameras": (1,)}, r"cameras: .* found \[1\]"),
        ("object", {"cameras": ("image_2",)}, r"cameras: .* found \['image_2'\]"),
        ("object", {"scenes": ("2011_09_26_drive_0001_sync",)}, "'raw' only"),
        ("raw", {"scenes": ("2011_09_26_drive_0077_sync",)}, "2011_09_26_drive_0001_sync.*found.*drive_0077"),
    ],
)
def test_impossible_choices_are_errors(object_root, raw_root, tmp_path, name, options, expected):
    with pytest.raises(ValueError, match=expected):
        build(raw_root if name == "raw" else object_root(), name, tmp_path / "cache", **options)


@pytest.mark.parametrize("name", ["object", "raw"])
def test_a_folder_that_is_not_kitti_is_an_error(tmp_path, name):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday/photo.jpg").touch()
    with pytest.raises(ValueError, match=r"(training/|2011_09_26/).*found photo\.jpg"):
        build(tmp_path / "holiday", name, tmp_path / "cache")
    with pytest.raises(ValueError, match="no folder at"):
        build(tmp_path / "absent", name, tmp_path / "cache")
    assert "points" in kitti.Kitti(config_name=name).info.features  # without a folder
