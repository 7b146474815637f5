"""A camera image with its scan, as arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..modeling.geometry import inside_image, project_points
from .rows import calibration_from_row, image_from_row, points_from_row


@dataclass(frozen=True)
class Frame:
    """One row of the data contract, ready to measure and to draw.

    Args:
        frame_id: its name.
        image: `(H, W, 3)` uint8, RGB.
        points: `(N, 4)`, x y z in metres in the LiDAR frame (x forward, y left, z up), reflectance.
        lidar_to_image: `(3, 4)`, LiDAR to pixels of `image`; integer coordinates are pixel centres.
    """

    frame_id: str
    image: np.ndarray
    points: np.ndarray
    lidar_to_image: np.ndarray

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Frame":
        """Reads a row.

        Raises:
            SimIPUError: its image, points or calibration are damaged.
        """
        projection, lidar_to_camera = calibration_from_row(row)
        image = np.array(image_from_row(row))  # a copy that may be written to, as PyTorch asks
        return cls(str(row["frame_id"]), image, points_from_row(row), projection @ lidar_to_camera)

    def project(self, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where points `(M, 3)` appear: pixels `(M, 2)` (x, y), depth `(M,)` in metres, and which are in the image."""
        pixels, depth = project_points(coordinates.astype(np.float64), self.lidar_to_image)
        return pixels, depth, inside_image(pixels, depth, np.array(self.image.shape[:2]))

    @cached_property
    def view(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`project` of all points of the scan."""
        return self.project(self.points[:, :3])

    def lift(self, pixels: np.ndarray, depth: float) -> np.ndarray:
        """The points `(M, 3)` in the LiDAR frame that appear at pixels `(M, 2)` at `depth` metres."""
        homogeneous = depth * np.column_stack([pixels, np.ones(len(pixels))])
        return np.linalg.solve(self.lidar_to_image[:, :3], (homogeneous - self.lidar_to_image[:, 3]).T).T
