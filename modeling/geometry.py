"""Geometry of SimIPU: pixels, points and feature cells, every map once.

Pixel coordinates: an integer is the centre of a pixel, as in OpenCV and KITTI. Everything that happens to an image
(crop, resize, mirror) is one 3 x 3 matrix on pixel coordinates and is folded into `lidar_to_pixel`; padding is on the
right and at the bottom and moves nothing.

Functions of an `Array` take NumPy arrays and torch tensors alike and return what they were given.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

Array = TypeVar("Array", np.ndarray, torch.Tensor)

MIN_DEPTH = 1e-5
# Published calibrations are rounded: four decimals of a rotation are 1e-4 off.
ROTATION_TOLERANCE = 1e-3


def transform_points(points: Array, matrix: Array) -> Array:
    """Applies a homogeneous map.

    Args:
        points: `(..., M, 3)`, further columns are not read.
        matrix: `(..., 4, 4)` or `(..., 3, 4)`.

    Returns:
        `(..., M, 3)`.
    """
    return _stack(points, _apply_rows(matrix, points))


def transform_cloud(cloud: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """`transform_points` of the coordinates of a cloud `(M, C)`, whose further columns stay: a new one of its type."""
    moved = np.empty_like(cloud)
    for axis, column in enumerate(_apply_rows(matrix, cloud)):
        moved[:, axis] = column
    moved[:, 3:] = cloud[:, 3:]
    return moved


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


def box_corners(boxes_3d: torch.Tensor) -> torch.Tensor:
    """The eight corners `(..., 8, 3)` of boxes `(..., 7)`: x, y, z of the middle of the bottom (camera frame: x right,
    y down, z ahead), height, width, length, and `rotation_y` about y; the four of the bottom come first."""
    x, y, z, height, width, length, rotation = (value[..., None] for value in boxes_3d.unbind(-1))
    along = length / 2 * length.new_tensor([1, 1, -1, -1, 1, 1, -1, -1])
    across = width / 2 * width.new_tensor([1, -1, -1, 1, 1, -1, -1, 1])
    up = height * height.new_tensor([0, 0, 0, 0, 1, 1, 1, 1])
    cos, sin = rotation.cos(), rotation.sin()
    return torch.stack([x + cos * along + sin * across, y - up, z - sin * along + cos * across], dim=-1)


def image_boxes(boxes_3d: torch.Tensor, camera_projection: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """What boxes `(N, 7)` cover of an image of height and width `image_size`: left, top, right, bottom `(N, 4)`.

    Args:
        camera_projection: `(3, 4)`, camera frame to pixels. Corners behind the camera do not count.
    """
    pixels, depth = project_points(box_corners(boxes_3d), camera_projection)
    behind = (depth < 0.1)[..., None]
    low = pixels.masked_fill(behind, float("inf")).amin(dim=-2)
    high = pixels.masked_fill(behind, float("-inf")).amax(dim=-2)
    limits = pixels.new_tensor([image_size[1] - 1, image_size[0] - 1])
    return torch.cat([low.clamp(min=0).minimum(limits), high.clamp(min=0).minimum(limits)], dim=-1)


# Rows: x ahead, y left and z up of the camera-aligned frame, in the camera's own x right, y down, z ahead.
CAMERA_TO_ALIGNED = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


def camera_aligned_frame(camera_projection: np.ndarray, lidar_to_camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The frame that follows from the camera alone: x along the optical axis, y left, z up, metres.

    Its origin is the camera's centre, the point that `camera_projection` sends to depth 0 and to no pixel. That takes
    in the projection's last column (in KITTI the offset of a camera from camera 0), so x is the depth exactly and the
    projection out of this frame has no offset: it knows nothing of where the LiDAR is or how its axes are named.

    Args:
        camera_projection, lidar_to_camera: as `to_calibration` returns them.

    Returns:
        `lidar_to_aligned` (4, 4) and `aligned_to_pixel` (3, 4), float64.
    """
    intrinsics = camera_projection[:, :3]
    offset = np.linalg.solve(intrinsics, camera_projection[:, 3])
    lidar_to_aligned = np.eye(4)
    lidar_to_aligned[:3, :3] = CAMERA_TO_ALIGNED @ lidar_to_camera[:3, :3]
    lidar_to_aligned[:3, 3] = CAMERA_TO_ALIGNED @ (lidar_to_camera[:3, 3] + offset)
    return lidar_to_aligned, np.column_stack([intrinsics @ CAMERA_TO_ALIGNED.T, np.zeros(3)])


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
        ValueError: no numbers, a wrong shape, values that are not finite, a projection whose last row is not 0 0 1 and
            a distance, or that maps everything onto one line, or a `lidar_to_camera` that is no rotation and shift.
    """
    projection = _to_matrix("camera_projection", camera_projection, (3, 4))
    if np.abs(projection[2, :3] - (0, 0, 1)).max() > 1e-6:
        found = projection[2].tolist()
        raise ValueError(f"camera_projection: expected the last row 0 0 1 and a distance, found {found}")
    if np.linalg.det(projection[:, :3]) == 0:
        raise ValueError(f"camera_projection: expected focal lengths that are not 0, found {projection.tolist()}")
    extrinsics = _to_matrix("lidar_to_camera", lidar_to_camera, (4, 4))
    if np.abs(extrinsics[3] - (0, 0, 0, 1)).max() > 1e-6:
        raise ValueError(f"lidar_to_camera: expected the last row 0 0 0 1, found {extrinsics[3].tolist()}")
    rotation = extrinsics[:3, :3]
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if error > ROTATION_TOLERANCE or np.linalg.det(rotation) < 0:
        raise ValueError(
            "lidar_to_camera: expected a rotation in the left 3 x 3, orthonormal and not mirrored, found "
            f"{rotation.round(4).tolist()}, {error:.2g} off"
        )
    return projection, extrinsics


def _to_matrix(name: str, matrix: Any, shape: tuple[int, int]) -> np.ndarray:
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
    return matrix


class FeatureGrid(NamedTuple):
    """Where the cells of a feature map look: cell (row, column) is centred on pixel offset + index * stride."""

    stride_y: float
    stride_x: float
    offset_y: float
    offset_x: float

    def cells(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(..., 2)` as fractional cell coordinates, x and y; an integer is the centre of a cell."""
        x, y = pixels.unbind(-1)
        return torch.stack([(x - self.offset_x) / self.stride_x, (y - self.offset_y) / self.stride_y], dim=-1)

    def pixels(self, map_size: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
        """The pixel `(H * W, 2)`, x and y, on which each cell of a map of height and width `map_size` is centred."""
        y = torch.arange(map_size[0], device=device) * self.stride_y + self.offset_y
        x = torch.arange(map_size[1], device=device) * self.stride_x + self.offset_x
        return torch.cartesian_prod(y, x).flip(-1)


def aligned_corners_grid(map_size: Sequence[int], image_size: Sequence[int]) -> FeatureGrid:
    """The grid that puts the outermost cells on pixel 0 and on the image's height and width, as the official code."""
    stride_y, stride_x = (length / max(cells - 1, 1e-9) for length, cells in zip(image_size, map_size, strict=True))
    return FeatureGrid(stride_y, stride_x, 0.0, 0.0)


def sample_feature_map(feature_map: torch.Tensor, cells: torch.Tensor, padding_mode: str = "border") -> torch.Tensor:
    """Bilinear samples `(B, M, C)` of a feature map.

    Args:
        feature_map: `(B, C, H, W)`.
        cells: `(B, M, 2)`, x and y in cells, as [`FeatureGrid.cells`] gives them.
        padding_mode: beyond the outermost cells `"border"`, the nearest one, or `"zeros"`.
    """
    height, width = feature_map.shape[-2:]
    x, y = cells.unbind(-1)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    sampled = F.grid_sample(
        feature_map.to(grid.dtype), grid.unsqueeze(2), padding_mode=padding_mode, align_corners=False
    )
    return sampled.squeeze(-1).transpose(1, 2)


def _apply_rows(matrix: Array, points: Array) -> list[Array]:
    """Rows 0 to 2 of `matrix` `(..., R, 4)` applied to `points` `(..., M, 3)`: three arrays `(..., M)`.

    Without a matrix product: NumPy's starts threads in every worker of a data loader, which halves what several
    workers reach together, and autocast would run torch's in half precision. A point's result depends on no other
    point, to the bit, so that a scan may be cut to the points in view before.
    """
    columns: list[Any] = [points[..., axis] for axis in range(3)]
    if isinstance(points, np.ndarray):  # NumPy is several times slower on strided or mixed input
        columns = [np.ascontiguousarray(column, dtype=matrix.dtype) for column in columns]
    x, y, z = columns
    results = []
    for row in range(3):
        a, b, c, d = (matrix[..., row, column, None] for column in range(4))
        result = a * x
        result += b * y
        result += c * z
        result += d
        results.append(result)
    return results


def _stack(like: Array, columns: list[Array]) -> Array:
    if isinstance(like, torch.Tensor):
        return torch.stack(columns, -1)
    return np.moveaxis(np.stack(columns), 0, -1)  # every column stays contiguous in memory
