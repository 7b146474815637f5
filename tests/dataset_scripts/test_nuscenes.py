"""The nuScenes reader against published numbers, a real key frame, and a tiny set of tables made here."""

import json
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
from PIL import Image

from simipu_hf.data.conversion import convert_to_parquet
from simipu_hf.data.kitti_objects import KittiObjects
from simipu_hf.data.loading import load_pretraining_dataset
from simipu_hf.data.sources import hub_license
from simipu_hf.dataset_scripts import kitti, nuscenes
from simipu_hf.errors import SimIPUError

UNIT = [1.0, 0.0, 0.0, 0.0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pose(rotation: list[float], translation: list[float]) -> np.ndarray:
    return np.array([*rotation, *translation])


def test_chain_of_poses_equals_published_numbers() -> None:
    """First sample of scene-0001, CAM_FRONT: values of the published tables."""
    frame = nuscenes.Frame(
        frame_id="golden",
        scene="scene-0001",
        camera="CAM_FRONT",
        image="",
        size=(1600, 900),
        scan="",
        intrinsics=np.array(
            [[1266.417203046554, 0, 816.2670197447984], [0, 1266.417203046554, 491.50706579294757], [0, 0, 1]]
        ),
        camera_to_ego=pose(
            [0.4998015430569128, -0.5030316162024876, 0.4997798114386805, -0.49737083824542755],
            [1.70079118954, 0.0159456324149, 1.51095763913],
        ),
        ego_at_image=pose(
            [-0.7530285141171715, -0.007718682910458633, 0.00863090844122062, -0.6578859979358822],
            [1010.1102882349232, 610.6567106479714, 0.0],
        ),
        lidar_to_ego=pose(
            [0.7077955119163518, -0.006492242056004365, 0.010646214713995808, -0.7063073142877817],
            [0.943713, 0.0, 1.84023],
        ),
        ego_at_scan=pose(
            [-0.7495886280607293, -0.0077695335695504636, 0.00829759813869316, -0.6618063711504101],
            [1010.1328353833223, 610.8111652918716, 0.0],
        ),
    )
    projection, lidar_to_camera = nuscenes.read_calibration(frame)
    expected = [
        [0.99995012, -0.00694924, 0.00717441, 0.00573034],
        [0.00730543, 0.01901527, -0.9997925, -0.32185337],
        [0.00681137, 0.99979504, 0.01906509, -0.60214521],
    ]
    np.testing.assert_allclose(lidar_to_camera[:3], expected, atol=1e-8)
    for point, pixel in (((0, 20, 0), (807.565, 495.324)), ((3, 15, -1), (1070.865, 578.164))):
        u, v, depth = projection @ lidar_to_camera @ np.array([*point, 1.0])
        np.testing.assert_allclose((u / depth, v / depth), pixel, atol=1e-3)


def test_real_key_frame_has_the_points_that_the_devkit_counts(rigs: Path) -> None:
    listing = nuscenes.list_frames("v1.0-mini", rigs / "nuscenes")
    assert not listing.problems
    frames = {frame.camera: frame for frame in listing.splits["mini_train"]}
    assert set(frames) == set(nuscenes.CAMERAS)
    for camera, expected in (("CAM_FRONT", 3053), ("CAM_BACK", 4820)):  # depth above 1 m, inside by a pixel
        row = nuscenes.read_row(frames[camera], whole_scans=True)
        points = np.frombuffer(row["points"], "<f4").reshape(-1, 4).astype(np.float64)
        matrix = np.array(row["camera_projection"]) @ np.array(row["lidar_to_camera"])
        u, v, depth = matrix[:, :3] @ points[:, :3].T + matrix[:, 3:]
        u, v = u / depth, v / depth
        inside = (depth > 1) & (u > 1) & (u < 1599) & (v > 1) & (v < 899)
        assert abs(int(inside.sum()) - expected) <= 1  # the devkit computes in single precision
        cut = np.frombuffer(nuscenes.read_row(frames[camera])["points"], "<f4").reshape(-1, 4)
        assert len(cut) < len(points) / 5
        assert {tuple(p) for p in points[inside].astype("<f4")} <= {tuple(p) for p in cut}


class TinyTables:
    """Two scenes, two samples each, CAM_FRONT and LIDAR_TOP, as JSON tables that a test may damage."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.record("sensor", "s_cam", channel="CAM_FRONT", modality="camera")
        self.record("sensor", "s_lid", channel="LIDAR_TOP", modality="lidar")
        camera = {"rotation": [0.5, -0.5, 0.5, -0.5], "camera_intrinsic": [[50.0, 0, 32], [0, 50.0, 16], [0, 0, 1]]}
        for name, values in (("cam", camera), ("lid", {"rotation": UNIT, "camera_intrinsic": []})):
            place = {"sensor_token": f"s_{name}", "translation": [0.0, 0.0, 0.0]}
            self.record("calibrated_sensor", f"cs_{name}", **place, **values)
        for scene in ("scene-0061", "scene-0103"):
            self.record("scene", scene, name=scene)
            for sample in range(2):
                token = f"{scene}_{sample}"
                self.record("sample", token, scene_token=scene)
                time = 1_000_000 + 500_000 * sample
                self.add(token, "CAM_FRONT", "jpg", time)
                self.add(token, "LIDAR_TOP", "pcd.bin", time + 30_000)

    def record(self, table: str, token: str, **fields: Any) -> None:
        self.tables[table].append({"token": token, **fields})

    def add(self, sample: str, channel: str, suffix: str, time: int, key: bool = True) -> None:
        is_camera = channel != "LIDAR_TOP"
        name = f"{'samples' if key else 'sweeps'}/{channel}/{sample}__{channel}__{time}.{suffix}"
        token = f"{sample}_{channel}_{time}"
        self.record("ego_pose", token, timestamp=time, rotation=UNIT, translation=[time / 1e5, 0.0, 0.0])
        size = {"width": 64, "height": 32} if is_camera else {"width": 0, "height": 0}
        of = {"sample_token": sample, "ego_pose_token": token, "is_key_frame": key}
        sensor = "cs_cam" if is_camera else "cs_lid"
        self.record("sample_data", token, filename=name, timestamp=time, calibrated_sensor_token=sensor, **of, **size)
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_camera:
            Image.new("RGB", (64, 32), (10, 20, 30)).save(path)
        else:
            x, y = np.meshgrid(np.linspace(5, 40, 8), np.linspace(-4, 4, 8))
            points = np.stack([x.ravel(), y.ravel(), 0 * x.ravel(), 0 * x.ravel() + 51, 0 * x.ravel()], 1)
            points.astype("<f4").tofile(path)

    def annotate(self, category: str, size: list[float], place: list[float], **changes: Any) -> None:
        """A box in the first sample of scene-0061, whose car stands at x = 10 m when the image is taken."""
        token = f"box{len(self.tables['sample_annotation'])}"
        self.record("category", f"c_{token}", name=category)
        self.record("instance", f"i_{token}", category_token=f"c_{token}")
        fields = {"sample_token": "scene-0061_0", "instance_token": f"i_{token}", "visibility_token": "3"}
        fields |= {"size": size, "rotation": UNIT, "translation": place, "num_lidar_pts": 5, "num_radar_pts": 0}
        self.record("sample_annotation", token, **fields | changes)

    def write(self) -> str:
        for name, records in self.tables.items():
            path = self.root / "v1.0-mini" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(records), encoding="utf-8")
        return str(self.root)


@pytest.fixture
def tiny(tmp_path: Path) -> TinyTables:
    return TinyTables(tmp_path / "nuscenes")


def test_published_splits_by_scene_and_builder_rows(tiny: TinyTables, tmp_path: Path) -> None:
    root = tiny.write()
    assert nuscenes.configurations(root) == ["v1.0-mini", "v1.0-mini-sweeps", "v1.0-mini-objects"]
    assert nuscenes.split_names("v1.0-mini", root) == ["mini_train", "mini_val"]
    shutil.copytree(tiny.root / "v1.0-mini", tiny.root / "v1.0-trainval")
    assert nuscenes.configurations(root)[:2] == ["v1.0-trainval", "v1.0-mini"]
    builder = nuscenes.NuScenes(config_name="v1.0-mini", data_dir=root, cache_dir=str(tmp_path / "rows"))
    builder.download_and_prepare()
    rows = builder.as_dataset(split="mini_val")
    assert set(rows["scene"]) == {"scene-0103"}
    points = np.frombuffer(rows[0]["points"], "<f4").reshape(-1, 4)
    np.testing.assert_allclose(points[:, 3], 51 / 255)
    # 30 ms at 10 m/s: the car is 0.3 m further when the scan ends
    np.testing.assert_allclose(np.array(rows[0]["lidar_to_camera"])[:3, 3], (0, 0, 0.3), atol=1e-9)


def test_an_image_takes_the_first_scan_that_ends_after_it(tiny: TinyTables) -> None:
    tiny.add("scene-0061_0", "LIDAR_TOP", "pcd.bin", 1_010_000, key=False)  # ends sooner than the key frame's scan
    tiny.add("scene-0061_0", "LIDAR_TOP", "pcd.bin", 999_000, key=False)  # nearer in time, but over before
    tiny.add("scene-0061_0", "CAM_FRONT", "jpg", 1_080_000, key=False)
    root = tiny.write()
    frames = nuscenes.list_frames("v1.0-mini", root, scenes=["scene-0061"]).splits["mini_train"]
    assert [Path(frame.scan).name.split("__")[-1] for frame in frames] == ["1010000.pcd.bin", "1530000.pcd.bin"]
    sweeps = nuscenes.list_frames("v1.0-mini-sweeps", root, scenes=["scene-0061"]).splits["mini_train"]
    assert len(sweeps) == 3


def test_own_splits_and_choices_that_are_not_there(tiny: TinyTables) -> None:
    root = tiny.write()
    (tiny.root / "v1.0-mini" / "splits.json").write_text('{"mine": ["scene-0061"]}', encoding="utf-8")
    assert nuscenes.list_frames("v1.0-mini", root, splits=["mine"]).splits.keys() == {"mine"}
    for choice in ({"splits": ["train"]}, {"cameras": ["CAM_TOP"]}, {"scenes": ["scene-9999"]}):
        with pytest.raises(ValueError, match=r"expected some of"):
            nuscenes.list_frames("v1.0-mini", root, **choice)


def test_parts_that_were_not_downloaded_are_counted(tiny: TinyTables, caplog: pytest.LogCaptureFixture) -> None:
    root = tiny.write()
    next(tiny.root.glob("samples/CAM_FRONT/scene-0061_1*")).unlink()
    listing = nuscenes.list_frames("v1.0-mini", root)
    assert len(listing.splits["mini_train"]) == 1
    assert "1 files of CAM_FRONT are not on disk" in listing.notes[0]
    assert len(load_pretraining_dataset(data_dir=root, split="mini_train")) == 1
    assert caplog.messages.count(listing.notes[0]) == 1
    shutil.rmtree(tiny.root / "samples/CAM_FRONT")
    with pytest.raises(SimIPUError, match=r"expected images .* found none\n.*2 files of CAM_FRONT are not on disk"):
        load_pretraining_dataset(data_dir=root, split="mini_train")


def test_damaged_tables_are_named(tiny: TinyTables) -> None:
    tiny.tables["ego_pose"].pop(0)
    tiny.tables["sample_data"][1]["calibrated_sensor_token"] = "lost"
    root = tiny.write()
    listing = nuscenes.list_frames("v1.0-mini", root)
    assert "1 records have no calibrated_sensor, the first is samples/LIDAR_TOP" in listing.problems[0]
    assert "1 records have no ego_pose" in listing.problems[1]
    path = tiny.root / "v1.0-mini" / "sample.json"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(ValueError, match=r"sample\.json: expected a whole record"):
        nuscenes.list_frames("v1.0-mini", root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"sample\.json"):
        nuscenes.list_frames("v1.0-mini", root)
    tiny.tables["calibrated_sensor"][0].pop("rotation")
    with pytest.raises(ValueError, match=r"calibrated_sensor\.json: record 0: expected the fields .*'rotation'"):
        nuscenes.list_frames("v1.0-mini", tiny.write())
    tiny.tables["calibrated_sensor"][0]["rotation"] = [1, 0, 0]
    with pytest.raises(ValueError, match=r"record cs_cam: expected 4 numbers as rotation, found \[1, 0, 0\]"):
        nuscenes.list_frames("v1.0-mini", tiny.write())
    tiny.tables["calibrated_sensor"][0]["rotation"] = UNIT
    for field in ("timestamp", "width", "filename"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(tiny.tables["sample_data"][0], field, None)
            root = tiny.write()
        with pytest.raises(ValueError, match=rf"sample_data\.json: record .*: expected a .* as {field}, found None"):
            nuscenes.list_frames("v1.0-mini", root)
    for text in ("[", "[]", '{"mine": [["scene-0061"]]}', '{"day-light": ["scene-0061"]}'):
        (tiny.root / "v1.0-mini/splits.json").write_text(text)
        with pytest.raises(ValueError, match=r"splits\.json: expected split -> list of scenes, found: "):
            nuscenes.split_names("v1.0-mini", root)
    (tiny.root / "v1.0-mini/splits.json").write_text('{"mine": ["scene-0061", "scene-61"]}')
    with pytest.raises(ValueError, match=r"splits\.json: mine: expected scenes of the tables, found 'scene-61'"):
        nuscenes.split_names("v1.0-mini", root)


def test_damaged_frames_are_named(tiny: TinyTables) -> None:
    frame = nuscenes.list_frames("v1.0-mini", tiny.write()).splits["mini_train"][0]
    with pytest.raises(ValueError, match="expected a unit quaternion"):
        nuscenes.read_calibration(frame._replace(ego_at_scan=np.zeros(7)))
    problems: list[str] = []
    Path(frame.scan).write_bytes(b"0" * 50)
    Image.new("RGB", (32, 32)).save(frame.image)
    row = nuscenes.read_row(frame, problems=problems)
    assert row["points"] is None
    assert row["image"] is None
    assert "64 x 32 pixels" in problems[0]
    assert "whole points of 20 bytes" in problems[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nuscenes, "open", Mock(side_effect=OSError(5, "Input/output error")), raising=False)
        with pytest.raises(ValueError, match=r"\.bin: expected a LiDAR scan, found: .*Input/output error"):
            nuscenes.read_points(frame.scan)
    np.random.default_rng(0).normal(size=(20, 4)).astype("<f4").tofile(frame.scan)
    with pytest.raises(ValueError, match="each x, y, z, intensity, ring, found other numbers"):
        nuscenes.read_points(frame.scan)


def test_boxes_come_as_kitti_labels(tiny: TinyTables, tmp_path: Path) -> None:
    tiny.annotate("vehicle.car", [2, 4, 1.5], [30, 2, 0])  # 20 m ahead, 2 m to the left, driving ahead
    tiny.annotate("vehicle.truck", [2, 4, 1.5], [10.5, -3, 0], visibility_token="")  # beside the camera
    tiny.annotate("vehicle.car", [2, 4, 1.5], [30, 40, 0])  # out of view
    tiny.annotate("vehicle.car", [2, 4, 1.5], [0, 0, 0])  # behind
    tiny.annotate("movable_object.trafficcone", [1, 1, 1], [30, 0, 0])
    tiny.annotate("animal", [1, 1, 1], [30, 0, 0])
    tiny.annotate("human.pedestrian.child", [1, 1, 1], [30, 0, 0], num_lidar_pts=0)
    root = tiny.write()
    rows = load_pretraining_dataset(data_dir=root, labels=True, split="mini_train", cache_dir=tmp_path / "rows")
    assert rows.features["objects"] == kitti.features("object")["objects"]
    assert rows.info.license.startswith("CC BY-NC-SA 4.0")  # which the card of a model made from them states
    convert_to_parquet(tmp_path / "parquet", data_dir=root, split="mini_train", cache_dir=tmp_path / "rows")
    shards = load_pretraining_dataset(str(tmp_path / "parquet"), cache_dir=tmp_path / "rows")
    assert hub_license(shards.info.license) == hub_license(rows.info.license)
    assert rows["objects"][1]["type"] == []
    objects = KittiObjects.from_row(rows["objects"][0])
    assert objects.type.tolist() == ["Car", "DontCare", "DontCare"]
    assert objects.occluded.tolist() == [1, 1, 1]
    np.testing.assert_allclose(objects.dimensions[0], (1.5, 2, 4))
    np.testing.assert_allclose(objects.location[0], (-2, 0.75, 20), atol=1e-9)
    np.testing.assert_allclose(objects.rotation_y[0], -np.pi / 2)
    np.testing.assert_allclose(objects.alpha[0], -np.pi / 2 + np.arctan2(2, 20))
    np.testing.assert_allclose(objects.bbox[0], (32 - 150 / 18, 16 - 37.5 / 18, 32 - 50 / 22, 16 + 37.5 / 18))
    np.testing.assert_allclose(objects.truncated, 0, atol=1e-9)
    np.testing.assert_allclose(objects.bbox[1], (32 - 25 / 19.5, 16 - 25 / 19.5, 32 + 25 / 19.5, 16 + 25 / 19.5))


def test_a_box_beside_the_camera_is_cut_at_its_plane(tiny: TinyTables) -> None:
    # from 2 m behind the camera to 10 m ahead, the near side 1.5 m to the right: u = 32 + 50 * 1.5 / 10 at its end
    tiny.annotate("vehicle.truck", [2, 12, 2], [14, -2.5, 0], visibility_token="")
    frame = nuscenes.list_frames("v1.0-mini-objects", tiny.write()).splits["mini_train"][0]
    objects = nuscenes.read_objects(frame)
    np.testing.assert_allclose(objects["bbox"], [[39.5, 0, 63, 31]])
    assert objects["occluded"] == [3]
    assert 0.99 < objects["truncated"][0] < 1


def test_a_box_over_the_border_covers_what_is_seen_of_it(tiny: TinyTables) -> None:
    # the near end is out of view; the side 1.5 m to the right leaves it where 50 * 1.5 / depth = 31
    tiny.annotate("vehicle.truck", [1, 8, 0.5], [10 + 6, -2, 0])  # from 2 to 10 m ahead
    frame = nuscenes.list_frames("v1.0-mini-objects", tiny.write()).splits["mini_train"][0]
    objects = nuscenes.read_objects(frame)
    height = 50 * 0.25 * 31 / (50 * 1.5)
    np.testing.assert_allclose(objects["bbox"], [[32 + 7.5, 16 - height, 63, 16 + height]])
    whole = (50 * 2.5 / 2 - 7.5) * 50 * 0.5 / 2
    np.testing.assert_allclose(objects["truncated"], 1 - (31 - 7.5) * 2 * height / whole)


def test_damaged_annotations_are_named_where_labels_are_asked_for(tiny: TinyTables, tmp_path: Path) -> None:
    tiny.annotate("vehicle.car", [2, 4, 1.5], [30, 0, 0])
    tiny.annotate("vehicle.car", [2, 4, 1.5], [30, 0, 0], rotation=[0, 0, 0, 0])
    tiny.annotate("vehicle.car", [2, 4, 1.5], [30, 0, 0], instance_token="lost")
    tiny.annotate("vehicle.car", [2, 4, 1.5], [30, 0])
    tiny.annotate("vehicle.car", [2, 4, 1.5], [float("nan"), 0, 0])
    root = tiny.write()
    options = {"data_dir": root, "split": "mini_train", "cache_dir": tmp_path / "rows"}
    assert "objects" not in load_pretraining_dataset(**options).column_names
    with pytest.raises(SimIPUError, match="record box1: expected a size above 0, a unit quaternion"):
        load_pretraining_dataset(labels=True, **options)
    skipped: list[str] = []
    rows = load_pretraining_dataset(labels=True, skipped=skipped, **options)
    assert len(rows["objects"][0]["type"]) == 1
    assert [message.partition("record ")[2][:22] for message in skipped] == [
        "box1: expected a size ",
        "box2: expected an inst",
        "box3: expected 3 numbe",
        "box4: expected a size ",
    ]
    (tiny.root / "v1.0-mini" / "instance.json").unlink()
    assert nuscenes.list_frames("v1.0-mini", root).splits
    with pytest.raises(FileNotFoundError, match=r"instance\.json"):
        nuscenes.list_frames("v1.0-mini-objects", root)


@pytest.mark.parametrize(("camera", "kind", "expected"), [("CAM_FRONT", "Truck", 495), ("CAM_BACK", "Car", 45)])
def test_labels_of_the_real_key_frame_hold_the_points_that_its_table_counts(rigs, camera, kind, expected) -> None:
    listing = nuscenes.list_frames("v1.0-mini-objects", rigs / "nuscenes", cameras=[camera])
    row = nuscenes.read_row(listing.splits["mini_train"][0], whole_scans=True)
    objects = KittiObjects.from_row(row["objects"])
    label = objects[objects.type == kind][0:1]
    (height, width, length), angle = label.dimensions[0], label.rotation_y[0]
    lidar_to_camera = np.array(row["lidar_to_camera"])
    points = np.frombuffer(row["points"], "<f4").reshape(-1, 4)[:, :3] @ lidar_to_camera[:3, :3].T
    x, up, z = (points + lidar_to_camera[:3, 3] - label.location[0]).T
    along, across = np.cos(angle) * x - np.sin(angle) * z, np.sin(angle) * x + np.cos(angle) * z
    inside = (abs(along) < length / 2) & (abs(across) < width / 2) & (up < 0) & (up > -height)
    assert abs(inside.sum() - expected) < 0.05 * expected  # labels stand upright in a camera that is tilted a little


def test_tables_are_read_record_by_record(tmp_path: Path) -> None:
    records = [{"token": f"t{i}", "text": "{[,]}" * 20} for i in range(30000)]
    path = tmp_path / "table.json"
    path.write_text("\ufeff" + json.dumps(records, indent=1), encoding="utf-8")  # longer than one part that is read
    assert list(nuscenes._records(str(path))) == records


def test_rows_are_prepared_anew_where_a_table_is_repaired(tiny: TinyTables) -> None:
    load = partial(load_pretraining_dataset, data_dir=tiny.write(), split="mini_train", num_proc=1)
    assert set(load()["scene"]) == {"scene-0061"}
    tiny.tables["scene"][0]["name"] = "scene-0553"
    tiny.tables["sensor"][0]["channel"] = "CAM_BACK"
    tiny.write()
    assert set(load()["scene"]) == {"scene-0553"}
    assert set(load()["camera"]) == {"CAM_BACK"}


def test_the_index_is_kept_and_renewed(tiny: TinyTables, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tiny.write()
    first = nuscenes.list_frames("v1.0-mini", root)
    with monkeypatch.context() as patch:
        patch.setattr(nuscenes, "_build_index", lambda *_: pytest.fail("the index is read again"))
        second = nuscenes.list_frames("v1.0-mini", root)
    assert nuscenes.fingerprint(first.splits["mini_train"]) == nuscenes.fingerprint(second.splits["mini_train"])
    tiny.add("scene-0061_1", "CAM_FRONT", "jpg", 1_520_000)
    assert len(nuscenes.list_frames("v1.0-mini", tiny.write()).splits["mini_train"]) == 3
    sensors = tiny.root / "v1.0-mini/sensor.json"  # alone: the index leaves records out by channel
    sound = sensors.read_text(encoding="utf-8")
    sensors.write_text(sound.replace("CAM_FRONT", "RADAR_FRONT"), encoding="utf-8")
    assert not nuscenes.list_frames("v1.0-mini", root).splits
    sensors.write_text(sound, encoding="utf-8")
    assert len(nuscenes.list_frames("v1.0-mini", root).splits["mini_train"]) == 3
