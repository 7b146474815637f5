"""Geometry: NumPy and torch against formulae written out here."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from simipu_hf.modeling.geometry import (
    FeatureGrid,
    aligned_corners_grid,
    inside_image,
    invert_transform,
    pixel_transform,
    project_points,
    sample_feature_map,
    transform_points,
)


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


@pytest.mark.parametrize(
    ("pixel", "inside"), [((-0.5, 0), True), ((-0.6, 0), False), ((9.4, 3.4), True), ((9.5, 0), False)]
)
def test_image_borders_are_half_a_pixel_beyond_the_outermost_centres(pixel, inside):
    found = inside_image(torch.tensor([[pixel]]), torch.ones(1, 1), torch.tensor([[4, 10]]))
    assert found.item() is inside


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
