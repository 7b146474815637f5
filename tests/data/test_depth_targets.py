"""Sparse depth targets against hand-made projections and, where given, real calibrated frames."""

import numpy as np
import pytest
from PIL import Image

from simipu_hf.data.depth_targets import (
    EigenDataset,
    image_and_depth,
    kb_crop,
    project_to_depth_map,
    read_depth_png,
    read_eigen_list,
    resize_depth_map,
)
from simipu_hf.errors import SimIPUError

FOCAL, CENTRE_X, CENTRE_Y = 100.0, 31.5, 15.5
PROJECTION = np.array([[FOCAL, 0, CENTRE_X, 0], [0, FOCAL, CENTRE_Y, 0], [0, 0, 1, 0]])
# LiDAR x forward, y left, z up; camera x right, y down, z forward
LIDAR_TO_CAMERA = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)


def lidar_point(u: float, v: float, depth: float) -> list[float]:
    return [depth, -(u - CENTRE_X) / FOCAL * depth, -(v - CENTRE_Y) / FOCAL * depth, 0.5]


def test_every_point_lands_on_its_pixel_and_the_nearest_wins():
    points = np.array(
        [
            lidar_point(10, 5, 20.0),
            lidar_point(10.4, 5.4, 8.0),  # same pixel, nearer
            lidar_point(9.6, 4.6, 30.0),  # same pixel, farther
            lidar_point(0, 0, 3.0),
            lidar_point(63.4, 31.4, 4.0),  # the last pixel's cell reaches to 63.5, 31.5
            lidar_point(63.6, 10, 5.0),  # outside
            lidar_point(-0.6, 10, 5.0),
            lidar_point(20, 20, -7.0),  # behind the camera
            [np.nan, 0, 0, 0],
        ],
        dtype=np.float32,
    )
    depth = project_to_depth_map(points, PROJECTION, LIDAR_TO_CAMERA, 32, 64)
    assert depth.dtype == np.float32
    known = {(int(r), int(c)): float(depth[r, c]) for r, c in zip(*np.nonzero(depth), strict=True)}
    assert known == {(5, 10): 8.0, (0, 0): 3.0, (31, 63): 4.0}


def test_projection_of_a_random_scan_equals_a_loop():
    rng = np.random.default_rng(0)
    points = rng.uniform([-5, -20, -3, 0], [60, 20, 3, 1], size=(3000, 4)).astype(np.float32)
    expected = np.zeros((32, 64))
    for x, y, z, _ in points.astype(np.float64):
        u, v, depth = PROJECTION @ (LIDAR_TO_CAMERA @ [x, y, z, 1])
        if depth <= 0:
            continue
        column, row = round(u / depth), round(v / depth)
        if 0 <= column < 64 and 0 <= row < 32 and (expected[row, column] == 0 or depth < expected[row, column]):
            expected[row, column] = depth
    actual = project_to_depth_map(points, PROJECTION, LIDAR_TO_CAMERA, 32, 64)
    np.testing.assert_array_equal(actual, expected.astype(np.float32))


def test_resizing_keeps_depths_and_the_nearest_wins():
    depth = np.zeros((4, 8), np.float32)
    depth[0, 0], depth[1, 1], depth[3, 7], depth[2, 4] = 9.0, 4.0, 30.0, 7.0
    resized = resize_depth_map(depth, 2, 4)
    assert resized.tolist() == [[4.0, 0, 0, 0], [0, 0, 7.0, 30.0]]
    assert resize_depth_map(depth, 4, 8) is depth


def test_depth_png_round_trip(tmp_path):
    stored = np.array([[0, 256, 65535], [1, 512, 20480]], dtype=np.uint16)
    Image.fromarray(stored).save(tmp_path / "depth.png")
    np.testing.assert_array_equal(read_depth_png(tmp_path / "depth.png"), stored.astype(np.float32) / 256)
    Image.new("RGB", (3, 2)).save(tmp_path / "colour.png")
    with pytest.raises(SimIPUError, match=r"colour\.png.*16-bit"):
        read_depth_png(tmp_path / "colour.png")
    with pytest.raises(SimIPUError, match=r"missing\.png"):
        read_depth_png(tmp_path / "missing.png")


def test_target_of_a_row_comes_from_its_depth_or_its_points():
    points = np.array([lidar_point(10, 5, 20.0)], dtype="<f4")
    row = {
        "frame_id": "000007",
        "image": Image.new("RGB", (64, 32)),
        "points": points.tobytes(),
        "camera_projection": PROJECTION.tolist(),
        "lidar_to_camera": LIDAR_TO_CAMERA.tolist(),
    }
    assert image_and_depth(row)[1][5, 10] == 20.0
    stored = np.full((32, 64), 256, dtype=np.uint16)
    assert (image_and_depth({**row, "depth": Image.fromarray(stored)})[1] == 1.0).all()
    with pytest.raises(SimIPUError, match=r"000007.*points"):
        image_and_depth({**row, "points": b"\0" * 17})
    with pytest.raises(SimIPUError, match="depth is 64 x 31, its image 64 x 32"):
        image_and_depth({**row, "depth": Image.fromarray(stored[1:])})


def test_kb_crop_is_the_bottom_centre():
    assert kb_crop(375, 1242) == (23, 375, 13, 1229)
    assert kb_crop(370, 1224) == (18, 370, 4, 1220)
    with pytest.raises(SimIPUError, match="frame 3 is 320 x 96"):
        kb_crop(96, 320, "frame 3")


def test_eigen_list(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "depth").mkdir()
    Image.new("RGB", (64, 32)).save(tmp_path / "raw" / "a.png")
    Image.fromarray(np.full((32, 64), 512, np.uint16)).save(tmp_path / "depth" / "a.png")
    list_file = tmp_path / "list.txt"
    list_file.write_text("a.png a.png 721.5377\nb.png None 721.5377\n\n", encoding="utf-8")
    entries = read_eigen_list(list_file)
    assert [(entry.image, entry.depth) for entry in entries] == [("a.png", "a.png"), ("b.png", None)]
    dataset = EigenDataset(list_file, tmp_path / "raw", tmp_path / "depth")
    assert len(dataset) == 1
    assert (image_and_depth(dataset[0])[1] == 2.0).all()
    list_file.write_text("a.png a.png 721.5377\nb.png None\n", encoding="utf-8")
    with pytest.raises(SimIPUError, match="line 2"):
        read_eigen_list(list_file)


def test_real_frame_has_the_density_of_a_64_beam_scan(kitti_mini):
    calibration = {}
    for line in (kitti_mini / "training" / "calib" / "000001.txt").read_text(encoding="utf-8").splitlines():
        if line.strip():
            name, values = line.split(":")
            calibration[name] = np.array(values.split(), dtype=float)
    rectification, velo_to_cam = np.eye(4), np.eye(4)
    rectification[:3, :3] = calibration["R0_rect"].reshape(3, 3)
    velo_to_cam[:3] = calibration["Tr_velo_to_cam"].reshape(3, 4)
    points = np.fromfile(kitti_mini / "training" / "velodyne" / "000001.bin", dtype="<f4").reshape(-1, 4)
    with Image.open(kitti_mini / "training" / "image_2" / "000001.png") as image:
        width, height = image.size
    depth = project_to_depth_map(points, calibration["P2"].reshape(3, 4), rectification @ velo_to_cam, height, width)
    known = depth > 0
    assert 15_000 < known.sum() < 25_000
    assert not known[: height // 4].any()  # the scanner sees at most 2 degrees above the horizon
    bottom = depth[-20:][known[-20:]]
    assert 4 < np.median(bottom) < 9  # road in front of the car
