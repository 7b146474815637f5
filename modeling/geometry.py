"""Geometry of SimIPU: pixels, points and feature cells, every map once.

Pixel coordinates: an integer is the centre of a pixel, as in OpenCV and KITTI. Everything that happens to an image
(crop, resize, mirror) is one 3 x 3 matrix on pixel coordinates and is folded into `lidar_to_pixel`; padding is on the
right and at the bottom and moves nothing.

Functions of an `Array` take NumPy arrays and torch tensors alike and return what they were given.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

Array = TypeVar("Array", np.ndarray, torch.Tensor)

MIN_DEPTH = 1e-5


def transform_points(points: Array, matrix: Array) -> Array:
    """Applies a homogeneous map.

    Args:
        points: `(..., M, 3)`, further columns are not read.
        matrix: `(..., 4, 4)` or `(..., 3, 4)`.

    Returns:
        `(..., M, 3)`.
    """
    return _stack(points, _apply_rows(matrix, points))


def invert_transform(matrix: torch.Tensor) -> torch.Tensor:
    """Inverse of `(B, 4, 4)` in float64, without the device synchronisation of `torch.linalg.inv`."""
    return torch.linalg.inv_ex(matrix.double()).inverse


def project_points(points: Array, lidar_to_pixel: Array) -> tuple[Array, Array]:
    """Where points appear in the image.

    Args:
        points: `(..., M, 3)` in metres, further columns are not read.
        lidar_to_pixel: `(..., 3, 4)`.

    Returns:
        Pixels `(..., M, 2)`, x and y, and depths `(..., M)` in metres. Depths are clamped to 1e-5 before the
        division, as in the official code: pixels of points behind the camera mean nothing.
    """
    u, v, depth = _apply_rows(lidar_to_pixel, points)
    divisor = depth.clip(min=MIN_DEPTH)
    return _stack(points, [u / divisor, v / divisor]), depth


def inside_image(pixels: Array, depth: Array, image_sizes: Array, margin: float = 0.5) -> Array:
    """Which points are in front of the camera and inside the image, `(..., M)` bool.

    Args:
        pixels: `(..., M, 2)`, x and y.
        depth: `(..., M)` in metres.
        image_sizes: `(..., 2)`, height and width.
        margin: how far, in pixels, the image reaches beyond the centres of its outermost pixels; 0.5 is their edge.
    """
    x, y = pixels[..., 0], pixels[..., 1]
    height, width = image_sizes[..., 0, None], image_sizes[..., 1, None]
    in_columns = (x >= -margin) & (x < width - 1 + margin)
    in_rows = (y >= -margin) & (y < height - 1 + margin)
    return (depth > MIN_DEPTH) & in_columns & in_rows


def content_mask(image_sizes: torch.Tensor, padded_size: tuple[int, int]) -> torch.Tensor:
    """`(B, 1, H, W)` bool: which pixels of padded images belong to the images of `image_sizes` `(B, 2)`."""
    rows, columns = (torch.arange(length, device=image_sizes.device) for length in padded_size)
    heights, widths = image_sizes[:, None].unbind(-1)
    return ((rows < heights)[:, :, None] & (columns < widths)[:, None, :])[:, None]


def pixel_transform(
    crop: tuple[int, int, int, int], output_size: tuple[int, int], mirrored: bool, half_pixel_centers: bool
) -> np.ndarray:
    """What cropping, then resizing, then mirroring an image does to pixel coordinates.

    Args:
        crop: top, left, height and width of the window that is kept, in pixels of the original image.
        output_size: height and width to which the window is resized.
        mirrored: the result is mirrored left to right.
        half_pixel_centers: true for the exact map of a resize whose pixels are areas, `x' = (x + 0.5) s - 0.5`,
            and of a mirror, `x' = width - 1 - x`; false for the official code's `x' = x s` and `x' = width - x`.

    Returns:
        (3, 3) float64, homogeneous: `x_new = matrix @ [x, y, 1]`.
    """
    top, left, crop_height, crop_width = crop
    height, width = output_size
    scale_x, scale_y = width / crop_width, height / crop_height
    center = 0.5 if half_pixel_centers else 0.0
    matrix = np.array(
        [
            [scale_x, 0.0, (center - left) * scale_x - center],
            [0.0, scale_y, (center - top) * scale_y - center],
            [0.0, 0.0, 1.0],
        ]
    )
    if mirrored:
        matrix[0] *= -1
        matrix[0, 2] += width - 2 * center
    return matrix


def to_calibration(camera_projection: Any, lidar_to_camera: Any) -> tuple[np.ndarray, np.ndarray]:
    """The two calibration matrices in float64, checked.

    Args:
        camera_projection: (3, 4), rectified camera to pixels.
        lidar_to_camera: (4, 4), LiDAR to rectified camera, homogeneous.

    Raises:
        ValueError: no numbers, a wrong shape, values that are not finite, or a last row that is not 0 0 0 1.
    """
    matrices = []
    for name, matrix, shape in (
        ("camera_projection", camera_projection, (3, 4)),
        ("lidar_to_camera", lidar_to_camera, (4, 4)),
    ):
        if isinstance(matrix, torch.Tensor):
            matrix = matrix.detach().cpu().numpy()
        try:
            matrix = np.asarray(matrix, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: expected a matrix {shape}, found {matrix!r}") from error
        if matrix.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise ValueError(f"{name}: expected finite values, found NaN or infinity")
        matrices.append(matrix)
    if not np.allclose(matrices[1][3], (0, 0, 0, 1)):
        raise ValueError(f"lidar_to_camera: expected the last row 0 0 0 1, found {matrices[1][3].tolist()}")
    return matrices[0], matrices[1]


def sample_feature_maps(
    maps: Sequence[torch.Tensor],
    pixels: torch.Tensor,
    sizes: torch.Tensor,
    align_corners: bool,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """Bilinear samples of several feature maps, concatenated: `(B, M, sum of C_s)`.

    Args:
        maps: `(B, C_s, H_s, W_s)` each.
        pixels: `(B, M, 2)`, x and y in pixels of the image.
        sizes: `(B, 2)`, the height and width in pixels that the maps are taken to cover.
        align_corners: true maps 0 and `sizes` to the outermost cell centres; false takes integer pixels as pixel
            centres and samples cells at theirs.
        padding_mode: `"zeros"` outside the outermost cell centres, or `"border"`, the nearest cell.
    """
    width_height = sizes.flip(-1).unsqueeze(1).to(pixels.dtype)
    grid = (pixels if align_corners else pixels + 0.5) / width_height * 2 - 1
    sampled = [
        F.grid_sample(
            m.to(grid.dtype), grid.unsqueeze(2), padding_mode=padding_mode, align_corners=align_corners
        ).squeeze(-1)
        for m in maps
    ]
    return torch.cat(sampled, dim=1).transpose(1, 2)


def _apply_rows(matrix: Array, points: Array) -> list[Array]:
    """Rows 0 to 2 of `matrix` `(..., R, 4)` applied to `points` `(..., M, 3)`: three arrays `(..., M)`.

    Without a matrix product: NumPy's starts threads in every worker of a data loader, which halves what several
    workers reach together, and autocast would run torch's in half precision.
    """
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    results = []
    for row in range(3):
        a, b, c, d = (matrix[..., row, column, None] for column in range(4))
        results.append(a * x + b * y + c * z + d)
    return results


def _stack(like: Array, columns: list[Array]) -> Array:
    return torch.stack(columns, -1) if isinstance(like, torch.Tensor) else np.stack(columns, -1)
