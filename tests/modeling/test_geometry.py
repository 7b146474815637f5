"""Geometry: NumPy and torch against formulae written out here."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from camera import PROJECTION

from simipu_hf.modeling.geometry import (
    FeatureGrid,
    aligned_corners_grid,
    camera_aligned_frame,
    inside_image,
    invert_transform,
    pixel_transform,
    project_points,
    sample_feature_map,
    to_calibration,
    transform_points,
)

# x forward, y left, z up -> x right, y down, z forward, slightly tilted and shifted
EXTRINSICS = np.array([[0.0, -1, 0, 0.02], [-0.6, 0, -0.8, -0.08], [0.8, 0, -0.6, -0.27], [0, 0, 0, 1]])


@pytest.mark.parametrize("half_pixel_centers", [True, False])
@pytest.mark.parametrize("mirrored", [True, False])
def test_pixel_transform_step_by_step(half_pixel_centers, mirrored):
    top, left, height, width = 7, 31, 60, 180
    x, y = np.meshgrid(np.linspace(-5, 250, 9), np.linspace(-5, 80, 7))
    matrix = pixel_transform((top, left, height, width), (96, 320), mirrored, half_pixel_centers)
    found = np.einsum("ij,jhw->ihw", matrix, np.stack([x, y, np.ones_like(x)]))
    if half_pixel_centers:
        x, y = (x - left + 0.5) * 320 / width - 0.5, (y - top + 0.5) * 96 / height - 0.5
        x = 320 - 1 - x if mirrored else x
    else:
        x, y = (x - left) * 320 / width, (y - top) * 96 / height
        x = 320 - x if mirrored else x
    np.testing.assert_allclose(found, np.stack([x, y, np.ones_like(x)]), atol=1e-9)


def test_transform_and_its_inverse():
    torch.manual_seed(0)
    matrix = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    matrix[:, :3] += torch.rand(2, 3, 4)
    points = torch.rand(2, 7, 3, dtype=torch.float64)
    moved = transform_points(points, matrix)
    homogeneous = np.concatenate([points.numpy(), np.ones((2, 7, 1))], axis=2)
    expected = np.einsum("bij,bnj->bni", matrix.numpy(), homogeneous)[..., :3]
    np.testing.assert_allclose(moved.numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(transform_points(moved, invert_transform(matrix)), points, rtol=1e-10, atol=1e-12)


def test_projection_of_a_pinhole_camera():
    camera = torch.tensor([[[100.0, 0, 50, 0], [0, 100, 20, 0], [0, 0, 1, 0]]])
    pixels, depth = project_points(torch.tensor([[[1.0, -0.5, 10.0], [0, 0, -5]]]), camera)
    torch.testing.assert_close(pixels[0, 0], torch.tensor([60.0, 15.0]))
    assert depth[0].tolist() == [10, -5]
    inside = inside_image(pixels, depth, torch.tensor([[40, 80]]))
    assert inside[0].tolist() == [True, False]


def test_numpy_and_torch_agree_to_the_bit():
    points = np.random.default_rng(0).normal(size=(2, 50, 4)) * 30
    matrices = np.stack([PROJECTION @ EXTRINSICS, PROJECTION])
    pixels, depth = project_points(points, matrices)
    found, found_depth = project_points(torch.from_numpy(points), torch.from_numpy(matrices))
    np.testing.assert_array_equal(found.numpy(), pixels)
    np.testing.assert_array_equal(found_depth.numpy(), depth)
    sizes = np.array([[80, 250], [8, 25]])
    inside = inside_image(found, found_depth, torch.from_numpy(sizes))
    np.testing.assert_array_equal(inside.numpy(), inside_image(pixels, depth, sizes))


def test_the_camera_aligned_frame_looks_along_the_optical_axis_from_the_camera():
    lidar_to_aligned, aligned_to_pixel = camera_aligned_frame(PROJECTION, EXTRINSICS)
    points = np.random.default_rng(0).uniform((-5, -20, -3), (60, 20, 3), (200, 3))
    aligned = transform_points(points, lidar_to_aligned)
    pixels, depth = project_points(points, PROJECTION @ EXTRINSICS)
    found, found_depth = project_points(aligned, aligned_to_pixel)
    np.testing.assert_allclose(found[depth > 0.1], pixels[depth > 0.1], rtol=1e-9)
    np.testing.assert_allclose(found_depth, depth, atol=1e-12)
    np.testing.assert_allclose(aligned[:, 0], depth, atol=1e-12)
    # ten metres ahead is the principal point; a metre to the left and one up are lower pixel coordinates
    (ahead, left, up), _ = project_points(np.array([[10.0, 0, 0], [10, 1, 0], [10, 0, 1]]), aligned_to_pixel)
    np.testing.assert_allclose([ahead, left, up], [[125.5, 39.5], [107.5, 39.5], [125.5, 22.0]])
    np.testing.assert_allclose(np.linalg.det(lidar_to_aligned), 1)


@pytest.mark.parametrize(
    ("projection", "extrinsics", "message"),
    [
        (np.eye(3), EXTRINSICS, r"camera_projection: expected shape \(3, 4\), found \(3, 3\)"),
        ("none", EXTRINSICS, "camera_projection: expected a matrix"),
        (PROJECTION + np.inf, EXTRINSICS, "camera_projection: expected finite values"),
        (2 * PROJECTION, EXTRINSICS, "camera_projection: expected the last row 0 0 1 and a distance"),
        (np.diag([0.0, 1, 1, 1])[:3], EXTRINSICS, "camera_projection: expected focal lengths that are not 0"),
        (PROJECTION, EXTRINSICS[:3], r"lidar_to_camera: expected shape \(4, 4\), found \(3, 4\)"),
        (PROJECTION, EXTRINSICS.T, "lidar_to_camera: expected the last row 0 0 0 1"),
        (PROJECTION, np.diag([1.01, 1, 1, 1]) @ EXTRINSICS, "lidar_to_camera: expected a rotation .*0.02 off"),
        (PROJECTION, np.diag([-1, 1, 1, 1]) @ EXTRINSICS, "lidar_to_camera: expected a rotation .*not mirrored"),
    ],
)
def test_a_wrong_calibration_is_named(projection, extrinsics, message):
    with pytest.raises(ValueError, match=message):
        to_calibration(projection, extrinsics)
    rounded = EXTRINSICS.round(3)
    assert to_calibration(torch.from_numpy(PROJECTION), rounded.tolist())[1].tolist() == rounded.tolist()


def test_image_borders_are_half_a_pixel_beyond_the_outermost_centres():
    pixels = torch.tensor([[[-0.5, 0], [-0.6, 0], [9.4, 3.4], [9.5, 0]]])
    assert inside_image(pixels, torch.ones(1, 4), torch.tensor([[4, 10]])).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("grid", [FeatureGrid(8, 8, 3.5, 3.5), FeatureGrid(16, 32, 0.0, 14.0)])
def test_sampling_where_cells_look_returns_the_cells(grid):
    cells = torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4)
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    x, y = columns * grid.stride_x + grid.offset_x, rows * grid.stride_y + grid.offset_y
    pixels = torch.stack([x, y], dim=-1).reshape(1, 12, 2)
    assert torch.equal(grid.pixels((3, 4)), pixels[0])
    sampled = sample_feature_map(cells, grid.cells(pixels))
    torch.testing.assert_close(sampled, cells.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_aligned_corners_map_the_image_border_to_the_outermost_cells():
    cells = torch.arange(12.0, dtype=torch.float64).reshape(1, 1, 3, 4)
    pixels = torch.tensor([[[0.0, 0.0], [32.0, 24.0], [16.0, 12.0]]], dtype=torch.float64)
    grid = aligned_corners_grid((3, 4), (24, 32))
    np.testing.assert_allclose(sample_feature_map(cells, grid.cells(pixels)).flatten(), [0.0, 11.0, 5.5])
    normalized = (pixels / torch.tensor([32.0, 24.0]) * 2 - 1)[:, :, None]
    expected = F.grid_sample(cells, normalized, align_corners=True)
    np.testing.assert_allclose(sample_feature_map(cells, grid.cells(pixels), "zeros").flatten(), expected.flatten())
    assert aligned_corners_grid((1, 4), (24, 32)).cells(pixels)[..., 1].max() < 1e-6


def test_beyond_the_outermost_cells_lies_the_nearest_one_or_nothing():
    cells = torch.ones(1, 2, 3, 4)
    far = torch.tensor([[[15.0, 1.0], [1.0, 1.0]]])
    assert sample_feature_map(cells, far, "border").unique().tolist() == [1.0]
    assert sample_feature_map(cells, far, "zeros")[0].tolist() == [[0, 0], [1, 1]]
