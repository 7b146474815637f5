"""A camera on a car with a LiDAR, and where points are in its image."""

import numpy as np

PROJECTION = np.array([[180.0, 0, 125.5, 11.0], [0, 175.0, 39.5, -3.0], [0, 0, 1, 0.002]])
# x forward, y left, z up -> x right, y down, z forward, slightly tilted and shifted
LIDAR_TO_CAMERA = np.array(
    [[0.01, -0.99995, 0, 0.02], [-0.02, 0, -0.9998, -0.08], [0.9998, 0.01, -0.02, -0.27], [0, 0, 0, 1]]
)


def project(matrix, points):
    """Pixels (N, 2) and depths (N,) of points with three or more columns."""
    columns = np.column_stack([np.asarray(points, np.float64)[:, :3], np.ones(len(points))]).T
    homogeneous = np.asarray(matrix, np.float64) @ columns
    return (homogeneous[:2] / homogeneous[2]).T, homogeneous[2]


def project_aligned(projection, points):
    """The same for points in the camera-aligned frame: x ahead, y left, z up, from the camera's centre."""
    x, y, z = np.asarray(points, np.float64)[:, :3].T
    center = np.linalg.inv(projection[:, :3]) @ projection[:, 3]
    return project(projection, np.column_stack([-y, -z, x]) - center)
