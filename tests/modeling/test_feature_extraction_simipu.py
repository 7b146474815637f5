"""Feature extractor: which points are kept, in which frame, and scans that are not four float32 a point."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from camera import PROJECTION, project

from simipu_hf.modeling.feature_extraction_simipu import SimIPUFeatureExtractor, to_point_cloud
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

# x forward, y left, z up -> x right, y down, z forward, shifted
EXTRINSICS = np.array([[0.0, -1, 0, 0.02], [0, 0, -1, -0.08], [1, 0, 0, -0.27], [0, 0, 0, 1]])
SIZE = (80, 250)


def make_points(count=3000):
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform((-10, -45, -4), (80, 45, 2), (count, 3)), np.linspace(0, 1, count)])
    return points.astype("<f4")


def test_official_keeps_what_is_strictly_in_the_box_and_in_the_frustum_of_the_whole_image():
    points = make_points(20000)
    points[:3, :3] = [[0.0, 0, -1], [70.4, 0, -1], [20, 0, 1.0]]  # on the bounds
    pixels, depth = project(PROJECTION @ EXTRINSICS, points)
    # mmdetection3d's remove_outside_points takes the frustum of the box 0, 0, width, height
    seen = (depth > 0) & ((pixels >= 0) & (pixels <= (250, 80))).all(1)
    low, high = np.array([0, -40, -3], np.float32), np.array([70.4, 40, 1], np.float32)
    inside = ((points[:, :3] > low) & (points[:, :3] < high)).all(1)
    extractor = SimIPUProcessor.from_preset("official").feature_extractor
    kept, to_pixel = extractor.visible_points(points, PROJECTION, EXTRINSICS, SIZE)
    np.testing.assert_array_equal(kept, points[seen & inside])
    np.testing.assert_array_equal(to_pixel, PROJECTION @ EXTRINSICS)


def test_recommended_keeps_what_the_camera_sees_between_two_depths_in_its_frame():
    points = make_points(20000)
    pixels, depth = project(PROJECTION @ EXTRINSICS, points)
    seen = ((pixels > -0.5) & (pixels < (249.5, 79.5))).all(1) & (depth >= 2) & (depth <= 50)
    kept, to_pixel = SimIPUFeatureExtractor(depth_range=(2, 50)).visible_points(points, PROJECTION, EXTRINSICS, SIZE)
    np.testing.assert_array_equal(kept[:, 3], points[seen, 3])
    np.testing.assert_allclose(kept[:, 0], depth[seen], rtol=1e-6)
    np.testing.assert_allclose(project(to_pixel, kept)[0], pixels[seen], atol=1e-3)
    assert not to_pixel[:, 3].any()
    everything = SimIPUFeatureExtractor(depth_range=None).visible_points(points, PROJECTION, EXTRINSICS, SIZE)[0]
    assert len(everything) > len(kept)


@pytest.mark.parametrize(("degrees", "refused"), [(-90, True), (-55, False), (0, False), (55, False), (180, True)])
def test_official_range_is_for_cameras_along_x(degrees, refused):
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    extrinsics = EXTRINSICS.copy()
    extrinsics[:3, :3] = EXTRINSICS[:3, :3] @ turn.T
    official = SimIPUProcessor.from_preset("official").feature_extractor
    refusal = pytest.raises(ValueError, match=f"looks along x, .* found {abs(degrees)}")
    with refusal if refused else nullcontext():
        official.visible_points(make_points(), PROJECTION, extrinsics, SIZE)
    SimIPUFeatureExtractor().visible_points(make_points(), PROJECTION, extrinsics, SIZE)


def test_drawing_is_without_replacement_where_there_are_enough_points():
    points = make_points(50)
    for num_points, distinct in ((50, 50), (20, 20), (500, 50)):
        drawn = SimIPUFeatureExtractor(num_points).draw(points, np.random.default_rng(0))
        assert drawn.shape == (num_points, 4)
        assert len(np.unique(drawn[:, 3])) == distinct
        assert np.isin(drawn, points).all()


def test_one_scan_is_a_batch_of_one():
    extractor, scan = SimIPUFeatureExtractor(num_points=64), make_points()
    single = extractor(torch.from_numpy(scan), PROJECTION, EXTRINSICS, SIZE)
    batch = extractor([scan.tobytes()], [PROJECTION], [EXTRINSICS], [SIZE])
    assert all(torch.equal(single[name], batch[name]) for name in ("points", "lidar_to_pixel"))


@pytest.mark.parametrize(
    "values",
    [
        {"num_points": 0},
        {"frame": "ego"},
        {"depth_range": (80, 1)},
        {"depth_range": (-1, 80)},
        {"depth_range": (1, 2, 3)},
        {"depth_range": ()},
        {"point_cloud_range": ()},
        {"point_cloud_range": [0, 0, 0, 1, 1, 0]},
    ],
)
def test_wrong_settings_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        SimIPUFeatureExtractor(**values)


def spoiled(points, value):
    points = points.copy()
    points[5, 2] = value
    return points


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (make_points()[:, :3], r"expected shape \(N, 4\).*\(3000, 3\)"),
        (make_points().tobytes()[:-4], "expected the bytes of whole points, 16 .* 47996 bytes"),
        (spoiled(make_points(), np.nan), "expected finite values, found 1 of 3000 .* at index 5"),
        (spoiled(make_points(), np.inf).tobytes(), "expected finite values, found 1 of 3000 .* at index 5"),
        (spoiled(make_points(), 1e19).tobytes(), "expected four float32 .* as float32 its values reach 1e[+]19"),
        (
            make_points().astype(float) + 4.5e5,
            "expected metres .*, found values up to 4.5e[+]05; subtract",
        ),
    ],
)
def test_a_damaged_scan_is_named(points, message):
    with pytest.raises(ValueError, match=f"points: {message}"):
        to_point_cloud(points)


def spinning(rng, turn):
    """x, y, z and reflectance of a sensor that turns 20 times."""
    angle, distance, count = 40 * np.pi * turn, rng.uniform(3, 60, len(turn)), len(turn)
    return [distance * np.cos(angle), distance * np.sin(angle), rng.uniform(-2, 1, count), rng.uniform(0, 1, count)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("columns", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("lost", [0.0, 0.2])
def test_other_columns_and_types_are_named(columns, dtype, lost):
    """x y z reflectance, ring, time within the sweep, the point's own share of it, and which return it is."""
    rng, count = np.random.default_rng(0), 20 * 420
    turn = np.linspace(0, 1, count)
    others = [rng.integers(0, 32, count), rng.uniform(0, 0.1, count), turn, rng.integers(0, 3, count)]
    came_back = rng.uniform(size=(count, 1)) >= lost
    data = (np.column_stack([*spinning(rng, turn), *others])[:, :columns] * came_back).astype(dtype).tobytes()
    if (columns, dtype) == (4, "float32"):
        assert to_point_cloud(data).shape == (count, 4)
        return
    with pytest.raises(ValueError, match=f"points: .*found what looks like {columns} columns of {dtype}"):
        to_point_cloud(data)


def test_velocity_is_no_second_point():
    rng, count = np.random.default_rng(0), 8400
    x, y, z, reflectance = spinning(rng, np.linspace(0, 1, count))
    velocity, time = rng.normal(0, 8, count), rng.uniform(0, 9e4, count)
    ring, echo = rng.integers(0, 64, count), rng.integers(0, 2, count)
    scan = np.column_stack([x, y, z, 255 * reflectance, velocity, time, ring, echo])
    with pytest.raises(ValueError, match="found what looks like 8 columns of float32"):
        to_point_cloud(scan.astype("<f4").tobytes())


def test_beams_that_never_came_back_make_no_other_layout():
    """A VLP-16 in the order of its firing, low and high beams in turn: the high ones see the sky, and are zeros."""
    elevation = np.radians([-15, 1, -13, 3, -11, 5, -9, 7, -7, 9, -5, 11, -3, 13, -1, 15])
    azimuth, elevation = (grid.ravel() for grid in np.meshgrid(np.linspace(0, 6.28, 1800), elevation, indexing="ij"))
    distance = np.where(elevation < 0, 2 / np.tan(np.abs(elevation)), 0)
    points = [distance * np.cos(azimuth), distance * np.sin(azimuth), np.where(distance > 0, -2, 0), distance > 0]
    scan = np.column_stack(points).astype("<f4")
    assert to_point_cloud(scan.tobytes()).shape == (1800 * 16, 4)


@pytest.mark.parametrize("near", [0.4, 0.7, 1.2])
@pytest.mark.parametrize("view", [np.pi, 0.7])
def test_two_sensors_in_turns_make_no_other_layout(near, view):
    """A low and a high beam, or a sensor at the bumper and one on the roof, their points one after another."""
    rng, count = np.random.default_rng(0), 3000
    angle, high = rng.uniform(-view, view, count), np.arange(count) % 2 == 1
    distance = np.where(high, rng.uniform(20, 60, count), near * rng.uniform(4, 8, count))
    height = np.where(high, 0.1 * distance, -near)
    reflectance = np.where(high, rng.uniform(0, 1, count), rng.uniform(0, 255, count))
    scan = np.column_stack([distance * np.cos(angle), distance * np.sin(angle), height, reflectance]).astype("<f4")
    np.testing.assert_array_equal(to_point_cloud(scan.tobytes()), scan)


def test_clouds_without_structure_pass():
    rng = np.random.default_rng(0)
    for count in (1, 105, 300, 4000):
        for points in (rng.uniform(-1, 1, (count, 4)), rng.normal(size=(count, 4)), np.zeros((count, 4))):
            assert len(to_point_cloud(points.astype("<f4").tobytes())) == count


def test_real_scans_pass(kitti_mini):
    for path in sorted((kitti_mini / "training" / "velodyne").glob("*.bin"))[:5]:
        assert to_point_cloud(path.read_bytes()).shape[1] == 4
