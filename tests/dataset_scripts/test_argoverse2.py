"""The Argoverse 2 reader against published numbers, real sweeps, and a tiny log made here."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
from PIL import Image

from simipu_hf.dataset_scripts import argoverse2

CAMERA = "ring_front_center"


def make_log(log: Path, **changes: dict[str, list]) -> None:
    """A log with two sweeps, 100 ms apart, and images 10 ms after the first and 40 ms after the second."""
    tables = {
        "calibration/intrinsics": {
            "sensor_name": [CAMERA], "fx_px": [40.0], "fy_px": [40.0], "cx_px": [15.5], "cy_px": [23.5],
            "height_px": [48], "width_px": [32],
        },
        "calibration/egovehicle_SE3_sensor": {
            "sensor_name": [CAMERA], "qw": [0.5], "qx": [-0.5], "qy": [0.5], "qz": [-0.5],
            "tx_m": [1.0], "ty_m": [0.0], "tz_m": [1.5],
        },
        "city_SE3_egovehicle": {
            "timestamp_ns": [0, 10_000_000, 100_000_000, 140_000_000], "qw": [1.0] * 4, "qx": [0.0] * 4,
            "qy": [0.0] * 4, "qz": [0.0] * 4, "tx_m": [5000.0, 5000.1, 5001.0, 5001.4], "ty_m": [0.0] * 4,
            "tz_m": [0.0] * 4,
        },
    }  # fmt: skip
    for name, table in tables.items():
        path = log / f"{name}.feather"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.feather.write_feather(pa.table({**table, **changes.get(name, {})}), path)
    x, y = (axis.ravel() for axis in np.meshgrid(np.linspace(-20, 40, 16), np.linspace(-3, 3, 8)))
    columns = {"x": x, "y": y, "z": 0 * x + 1}
    for time in (0, 100_000_000):
        path = log / "sensors" / "lidar" / f"{time}.feather"
        path.parent.mkdir(parents=True, exist_ok=True)
        points = {name: values.astype(np.float16) for name, values in columns.items()}
        pyarrow.feather.write_feather(pa.table({**points, "intensity": np.full(len(x), 51, np.uint8)}), path)
    for time in (10_000_000, 140_000_000):
        path = log / "sensors" / "cameras" / CAMERA / f"{time}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 48)).save(path)


def test_calibration_and_points_equal_published_numbers(rigs: Path) -> None:
    log = rigs / "argoverse2/sensor/val/7fab2350-7eaf-3b7e-a39d-6937a4c1bede"
    time = 315966265259836000
    frame = argoverse2.Frame("golden", "log", CAMERA, str(log), time, time)
    projection, lidar_to_camera, size = argoverse2.read_calibration(frame)
    assert size == (1550, 2048)
    for point, pixel in (
        ((20, 0, 0), (779.944, 1149.807)),
        ((20, 2, 1), (586.013, 1054.144)),
        ((10, -1, 0.5), (992.898, 1204.129)),
    ):
        u, v, depth = projection @ lidar_to_camera @ np.array([*point, 1.0])
        np.testing.assert_allclose((u / depth, v / depth), pixel, atol=1e-3)
    points = argoverse2.read_points(frame.sweep)
    assert len(points) == 99_229
    np.testing.assert_allclose(points[0] * (1, 1, 1, 255), (-1.537109, 3.060547, -0.322510, 10), atol=1e-6)
    u, v, depth = (projection @ lidar_to_camera) @ np.c_[points[:, :3], np.ones(len(points))].T
    u, v = u / depth, v / depth
    assert ((u >= 0) & (u < 1549) & (v >= 0) & (v < 2047) & (depth > 0)).sum() == 11_452


def test_nearest_image_within_tolerance_and_motion_between_the_times(tmp_path: Path) -> None:
    make_log(tmp_path / "train" / "log")
    (tmp_path / "train" / "log" / "sensors" / "cameras" / CAMERA / "5000000").touch()  # no image
    assert argoverse2.configurations(tmp_path) == ["sensor"]
    listing = argoverse2.list_frames("sensor", tmp_path, cameras=[CAMERA])
    [frame] = listing.splits["train"]  # the second sweep's image is 40 ms away
    assert (frame.sweep_time, frame.image_time) == (0, 10_000_000)
    assert "1 of 2 sweeps and cameras have no image" in listing.notes[0]
    builder = argoverse2.Argoverse2(data_dir=str(tmp_path), cameras=(CAMERA,), cache_dir=str(tmp_path / "rows"))
    builder.download_and_prepare()
    [row] = builder.as_dataset(split="train")
    # the car moved 0.1 m towards the points, and the camera is 1 m ahead of the origin
    np.testing.assert_allclose(np.array(row["lidar_to_camera"])[:3, 3], (0, 1.5, -1.1), atol=1e-9)
    points = np.frombuffer(row["points"], "<f4").reshape(-1, 4)
    assert (points[:, 0] > 1.1).all()
    np.testing.assert_allclose(points[:, 3], 0.2)


@pytest.mark.parametrize(
    ("table", "column", "message"),
    [
        ("city_SE3_egovehicle", {"timestamp_ns": [1, 2, 3, 4]}, "expected a record with timestamp_ns"),
        ("calibration/egovehicle_SE3_sensor", {"qw": [0.0], "qx": [0.0], "qy": [0.0], "qz": [0.0]}, "unit quaternion"),
        ("calibration/intrinsics", {"sensor_name": ["ring_side_left"]}, f"sensor_name {CAMERA}, found none"),
        ("calibration/intrinsics", {"width_px": [64]}, "expected 64 x 48 pixels"),
        ("calibration/intrinsics", {"fx_px": [float("nan")]}, "expected a finite number fx_px"),
        ("city_SE3_egovehicle", {"qw": ["one"] * 4}, "expected a finite number qw, found one"),
    ],
)
def test_damage_is_named(tmp_path: Path, table: str, column: dict[str, list], message: str) -> None:
    make_log(tmp_path / "val" / "log", **{table: column})
    [frame] = argoverse2.list_frames("sensor", tmp_path, cameras=[CAMERA]).splits["val"]
    with pytest.raises(ValueError, match=message):
        argoverse2.read_row(frame)


def test_what_changes_on_disk_is_read_again(tmp_path: Path) -> None:
    log = tmp_path / "val" / "log"
    make_log(log, **{"calibration/intrinsics": {"fx_px": [77.0]}})
    [frame] = argoverse2.list_frames("sensor", tmp_path, cameras=[CAMERA]).splits["val"]
    assert argoverse2.read_row(frame)["camera_projection"][0][0] == 77
    make_log(log)
    sweep = pyarrow.feather.read_table(frame.sweep)
    pyarrow.feather.write_feather(sweep.slice(0, 64), frame.sweep)
    row = argoverse2.read_row(frame, whole_scans=True)
    assert row["camera_projection"][0][0] == 40
    assert len(row["points"]) == 64 * 16


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    log = tmp_path / "val" / "log"
    make_log(log)
    [frame] = argoverse2.list_frames("sensor", tmp_path, cameras=[CAMERA]).splits["val"]
    sweep = Path(frame.sweep)
    sweep.write_bytes(sweep.read_bytes()[:64])
    with pytest.raises(ValueError, match="expected a whole feather file"):
        argoverse2.read_row(frame)
    (log / "city_SE3_egovehicle.feather").unlink()
    listing = argoverse2.list_frames("sensor", tmp_path)
    assert not listing.splits
    assert "expected city_SE3_egovehicle.feather" in listing.problems[0]
