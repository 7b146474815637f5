"""The Waymo v2 reader against published numbers, expected points and pixels, and damaged copies of a tiny segment."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simipu_hf.data.sources import find_source
from simipu_hf.dataset_scripts import waymo
from simipu_hf.errors import SimIPUError


def test_range_image_equals_the_published_example() -> None:
    image = np.arange(-12.0, 12.0).reshape(3, 2, 4)
    poses = np.tile([np.pi / 2, np.pi / 2, np.pi / 2, 1.0, 2.0, 3.0], (3, 2, 1))
    inclinations = np.array([np.pi / 2, 0.0, -np.pi / 2])
    points, valid = waymo.range_image_to_points(image[..., 0], inclinations, np.eye(4), poses, np.eye(4))
    np.testing.assert_allclose(points, [[-3, 2, 3], [-7, 2, 3]], atol=1e-12)
    assert valid.sum() == 2


def test_camera_model_equals_the_published_example() -> None:
    extrinsic = np.eye(4)
    extrinsic[:3] = [
        [0.999892684989, -0.00599320840002, 0.0133678704017, 1.53891424471],
        [0.00604223652133, 0.999975156055, -0.0036302411765, -0.0236339408393],
        [-0.0133457814992, 0.00371062343188, 0.999904056092, 2.11527057298],
    ]
    x, y, depth, _ = waymo.OPENCV_FROM_WAYMO @ np.linalg.inv(extrinsic) @ np.array([21.44064, 8.32240, -1.62938, 1.0])
    distortion = (0.032316008498, -0.321412482553, 0.000793258395371, -0.000625749354133, 0.0)
    u, v = waymo.distort(x / depth, y / depth, distortion)
    pixel = np.array([u, v]) * 2055.55614936 + (939.657469886, 641.072182194)
    np.testing.assert_allclose(pixel, (100.0006, 999.9993), atol=1e-4)
    np.testing.assert_allclose(depth, 19.99999, atol=1e-5)


def test_rows_have_the_expected_points_and_pixels(rigs: Path) -> None:
    root = rigs / "waymo_v2_miniature"
    expected = np.load(root / "expected.npz")
    frames = waymo.list_frames("perception", root).splits["train"]
    assert len(frames) == 4
    for frame in frames:
        row = waymo.read_row(frame, whole_scans=True)
        points = np.frombuffer(row["points"], "<f4").reshape(-1, 4)
        truth = expected[f"points_{frame.time}"]
        np.testing.assert_allclose(points[:, :3], truth, atol=1e-5)  # single precision
        np.testing.assert_allclose(points[:, 3], np.tanh(expected[f"intensity_{frame.time}"]), atol=1e-6)
        key = f"{frame.time}_{waymo.CAMERAS[frame.camera]}"
        camera, lidar_to_camera = waymo.read_calibration(frame)
        chosen = truth[expected[f"index_{key}"]]
        x, y, depth = lidar_to_camera[:3, :3] @ chosen.T + lidar_to_camera[:3, 3:]
        distorted = np.stack(waymo.distort(x / depth, y / depth, camera.distortion), 1)
        pixels = distorted * camera.focal_length + camera.center + 0.5  # from the left edge of the first pixel
        np.testing.assert_allclose(np.column_stack([pixels, depth]), expected[f"uvd_{key}"], atol=1e-6)
        u, v, w = np.array(row["camera_projection"]) @ np.array(row["lidar_to_camera"]) @ np.c_[chosen, np.ones(200)].T
        undistorted = expected[f"uvd_undistorted_{key}"]
        np.testing.assert_allclose(np.column_stack([u / w + 0.5, v / w + 0.5]), undistorted[:, :2], atol=1e-6)
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == camera.size
        cut = np.frombuffer(waymo.read_row(frame)["points"], "<f4").reshape(-1, 4)
        assert len(cut) < len(points) / 2


def test_undistorting_moves_pixels_to_where_the_projection_looks() -> None:
    camera = waymo.Camera((60.0, 60.0), (47.5, 31.5), (0.2, -0.1, 0.01, -0.02, 0.05), (96, 64))
    columns, rows = np.meshgrid(np.arange(96.0), np.arange(64.0))
    # an image whose colours are the ideal coordinates that each distorted pixel shows, found by fixed-point iteration
    u, v = (columns - 47.5) / 60, (rows - 31.5) / 60
    x, y = u.copy(), v.copy()
    for _ in range(200):
        distorted_x, distorted_y = waymo.distort(x, y, camera.distortion)
        x, y = x + (u - distorted_x), y + (v - distorted_y)
    image = np.stack([x * 60 + 47.5, y * 60 + 31.5, 0 * x], -1)
    assert image.min() > -15
    result = waymo.undistort(((image + 15) * 2).round().astype(np.uint8), camera) / 2 - 15
    inner = (slice(8, -8), slice(8, -8))
    np.testing.assert_allclose(result[..., 0][inner], columns[inner], atol=0.1)
    np.testing.assert_allclose(result[..., 1][inner], rows[inner], atol=0.1)


def component(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Columns of a component's table."""
    return {f"[{name}Component].{field}": value for field, value in fields.items()}


class TinySegment:
    """One frame, FRONT camera without distortion, SIDE_LEFT laser; components that a test may damage."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "training"
        eye = np.eye(4).ravel().tolist()
        buffer = io.BytesIO()
        Image.new("RGB", (32, 16), (200, 100, 50)).save(buffer, "JPEG")
        key = {"key.segment_context_name": "seg", "key.frame_timestamp_micros": 7}
        camera = {**key, "key.camera_name": 1}
        calibration = {f"intrinsic.{name}": 20.0 for name in ("f_u", "f_v")}
        calibration |= {"intrinsic.c_u": 16.0, "intrinsic.c_v": 8.0, "width": 32, "height": 16}
        calibration |= {f"intrinsic.{name}": 0.0 for name in ("k1", "k2", "p1", "p2", "k3")}
        values = np.tile([10.0, 0.5, 0.0, -1.0], (4, 36, 1)).astype(np.float32).ravel().tolist()
        beams = {"min": -0.2, "max": 0.2, "values": None}
        self.rows: dict[str, dict[str, Any]] = {
            "camera_image": camera | component("CameraImage", {"image": buffer.getvalue(), "pose.transform": eye}),
            "camera_calibration": {"key.segment_context_name": "seg", "key.camera_name": 1}
            | component("CameraCalibration", calibration | {"extrinsic.transform": eye}),
            "lidar": {**key, "key.laser_name": 3}
            | component("LiDAR", {"range_image_return1.values": values, "range_image_return1.shape": [4, 36, 4]})
            | component("LiDAR", {"range_image_return2.values": None, "range_image_return2.shape": None}),
            "lidar_calibration": {"key.segment_context_name": "seg", "key.laser_name": 3}
            | component("LiDARCalibration", {f"beam_inclination.{name}": value for name, value in beams.items()})
            | component("LiDARCalibration", {"extrinsic.transform": eye}),
            "lidar_pose": {**key, "key.laser_name": 1},
            "vehicle_pose": key | component("VehiclePose", {"world_from_vehicle.transform": eye}),
        }

    def write(self) -> str:
        floats, shapes, doubles = pa.list_(pa.float32()), pa.list_(pa.int32(), 3), pa.list_(pa.float64())
        lists = {"values": floats, "shape": shapes, "transform": doubles}
        for component, row in self.rows.items():
            columns = {n: pa.array([v], lists.get(n.rpartition(".")[2])) for n, v in row.items()}
            path = self.folder / component / "seg.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), path)
        return str(self.folder.parent)


@pytest.fixture
def tiny(tmp_path: Path) -> TinySegment:
    if int(pa.__version__.partition(".")[0]) < 26:
        pytest.skip("pyarrow before 26 reads no null lists of a fixed size")
    return TinySegment(tmp_path)


def only_frame(root: str) -> waymo.Frame:
    [frame] = waymo.list_frames("perception", root).splits["train"]
    return frame


def test_builder_rows_of_a_tiny_segment(tiny: TinySegment, tmp_path: Path) -> None:
    root = tiny.write()
    assert waymo.configurations(root) == ["perception"]
    with pytest.raises(SimIPUError, match=r"found one of its splits; did you mean "):
        find_source(os.path.join(root, "training"))
    builder = waymo.Waymo(data_dir=root, cache_dir=str(tmp_path / "rows"), whole_scans=True)
    builder.download_and_prepare()
    [row] = builder.as_dataset(split="train")
    points = np.frombuffer(row["points"], "<f4").reshape(-1, 4)
    assert len(points) == 4 * 36
    np.testing.assert_allclose(np.linalg.norm(points[:, :3], axis=1), 10, rtol=1e-6)
    # uniform beams lie at the middles of equal parts of their range, the first row highest
    np.testing.assert_allclose(np.arcsin(points[::36, 2] / 10), [0.15, 0.05, -0.05, -0.15], atol=1e-6)
    assert row["image"].size == (32, 16)


@pytest.mark.parametrize(
    ("component", "column", "value", "message"),
    [
        ("vehicle_pose", "[VehiclePoseComponent].world_from_vehicle.transform", [1.0] * 16, "expected a rotation"),
        ("camera_image", "[CameraImageComponent].pose.transform", [1.0] * 4, "expected 16 finite numbers"),
        ("camera_calibration", "[CameraCalibrationComponent].width", 64, "expected 64 x 16 pixels"),
        ("lidar", "[LiDARComponent].range_image_return1.shape", [4, 30, 4], r"expected \[4, 30, 4\] values"),
        ("lidar", "[LiDARComponent].range_image_return1.shape", None, r"expected \[\] values"),
        ("lidar", "[LiDARComponent].range_image_return1.shape", [4, 144, 1], "expected range and intensity"),
        ("lidar_calibration", "[LiDARCalibrationComponent].beam_inclination.min", None, "expected a finite number"),
        ("camera_image", "[CameraImageComponent].image", b"no image", "expected a readable image"),
    ],
)
def test_damage_is_named(tiny: TinySegment, component: str, column: str, value: Any, message: str) -> None:
    tiny.rows[component][column] = value
    frame = only_frame(tiny.write())
    with pytest.raises(ValueError, match=message):
        waymo.read_row(frame)


@pytest.mark.parametrize("shape", [None, [4, 30, 6]])
def test_poses_that_do_not_fit_the_range_image_are_named(tiny: TinySegment, shape: list[int] | None) -> None:
    for component in ("lidar", "lidar_calibration"):
        tiny.rows[component]["key.laser_name"] = waymo.TOP
    prefix = "[LiDARPoseComponent].range_image_return1"
    values = None if shape is None else [0.0] * (4 * 30 * 6)
    tiny.rows["lidar_pose"] |= {f"{prefix}.values": values, f"{prefix}.shape": shape}
    problems: list[str] = []
    assert waymo.read_row(only_frame(tiny.write()), problems=problems)["points"] is None
    assert "lidar_pose" in problems[0]
    assert "expected poses of the shape (4, 36, 6), found" in problems[0]


def test_what_changes_on_disk_is_read_again(tiny: TinySegment) -> None:
    tiny.rows["camera_calibration"]["[CameraCalibrationComponent].intrinsic.f_u"] = 77.0
    frame = only_frame(tiny.write())
    assert waymo.read_row(frame)["camera_projection"][0][0] == 77
    tiny.rows["camera_calibration"]["[CameraCalibrationComponent].intrinsic.f_u"] = 20.0
    tiny.rows["lidar"]["[LiDARComponent].range_image_return1.values"][0] = 9.0
    (tiny.folder / "camera_image" / "._seg.parquet").write_bytes(b"of another system")
    frame = only_frame(tiny.write())
    row = waymo.read_row(frame, whole_scans=True)
    assert row["camera_projection"][0][0] == 20
    np.testing.assert_allclose(np.linalg.norm(np.frombuffer(row["points"], "<f4")[:3]), 9, rtol=1e-6)


def test_missing_and_truncated_files_are_named(tiny: TinySegment) -> None:
    root = tiny.write()
    path = tiny.folder / "lidar" / "seg.parquet"
    frame = only_frame(root)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"seg\.parquet: expected a Parquet file"):
        waymo.read_row(frame)
    path.unlink()
    listing = waymo.list_frames("perception", root)
    assert not listing.splits
    assert "expected lidar/seg.parquet" in listing.problems[0]
