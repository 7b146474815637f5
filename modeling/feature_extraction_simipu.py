"""Feature extractor of SimIPU: LiDAR scans in, clouds of a fixed number of points out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin

from .geometry import inside_image, project_points


@contextmanager
def naming_row(row: str) -> Iterator[None]:
    """Puts the row's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row}: {error}") from error


def to_point_cloud(points: Any) -> np.ndarray:
    """Points as (N, 4) float32, checked: x, y, z in metres and reflectance.

    Args:
        points: bytes of little-endian float32 records of four, or an array or tensor (N, 4).

    Raises:
        ValueError: half a record, another shape, or NaN or infinite values.
    """
    if isinstance(points, bytes | bytearray | memoryview):
        size = memoryview(points).nbytes
        if size % 16:
            raise ValueError(f"points: expected the bytes of whole points, 16 (four float32) each, found {size} bytes")
        cloud = np.frombuffer(points, dtype="<f4").reshape(-1, 4)
    else:
        if isinstance(points, torch.Tensor):
            points = points.detach().cpu().numpy()
        cloud = np.asarray(points, dtype=np.float32)
    if cloud.ndim != 2 or cloud.shape[1] != 4:
        raise ValueError(f"points: expected shape (N, 4), x y z reflectance, found {cloud.shape}")
    finite = np.isfinite(cloud)
    if not finite.all():
        bad = ~finite.all(axis=1)
        raise ValueError(
            f"points: expected finite values, found {bad.sum()} of {len(cloud)} with NaN or infinity, the first at "
            f"index {bad.argmax()}"
        )
    return cloud


class SimIPUFeatureExtractor(FeatureExtractionMixin):
    """Filters LiDAR scans and draws a fixed number of points.

    Args:
        num_points: points per cloud, drawn without replacement where the cloud has enough, else with.
        point_cloud_range: x, y, z minimum, then maximum, in metres in the LiDAR frame; points strictly inside are
            kept. `None` keeps all. The default is the official configuration's.
        do_filter_field_of_view: keep only points that the camera sees: in front of it and between the centres of the
            outermost pixels of the original image.
    """

    model_input_names = ["points"]  # noqa: RUF012

    def __init__(
        self,
        num_points: int = 16384,
        point_cloud_range: Sequence[float] | None = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0),
        do_filter_field_of_view: bool = True,
        **kwargs: Any,
    ) -> None:
        if num_points < 1:
            raise ValueError(f"num_points: expected at least 1, found {num_points}")
        if point_cloud_range is not None:
            low, high = point_cloud_range[:3], point_cloud_range[3:]
            if len(point_cloud_range) != 6 or any(a >= b for a, b in zip(low, high, strict=True)):
                raise ValueError(
                    f"point_cloud_range: expected x y z minimum, then maximum, found {list(point_cloud_range)}"
                )
            point_cloud_range = [float(bound) for bound in point_cloud_range]
        self.num_points = num_points
        self.point_cloud_range = point_cloud_range
        self.do_filter_field_of_view = do_filter_field_of_view
        super().__init__(**kwargs)

    def filter(
        self,
        points: np.ndarray,
        lidar_to_image: np.ndarray | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Points inside the range and, where `lidar_to_image` is given, seen by the camera; their order is kept.

        Args:
            points: (N, 4).
            lidar_to_image: (3, 4), LiDAR to pixels of the original image.
            image_size: height and width of the original image.

        Raises:
            ValueError: no point is left, or `lidar_to_image` comes without `image_size`.
        """
        kept = points
        if self.point_cloud_range is not None:
            x, y, z = points[:, 0], points[:, 1], points[:, 2]
            x_min, y_min, z_min, x_max, y_max, z_max = self.point_cloud_range
            inside = (x > x_min) & (x < x_max) & (y > y_min) & (y < y_max) & (z > z_min) & (z < z_max)
            kept = points.compress(inside, axis=0)  # several times faster than points[inside]
        in_range = len(kept)
        if self.do_filter_field_of_view and lidar_to_image is not None:
            if image_size is None:
                raise ValueError("image_size: expected height and width beside lidar_to_image, found None")
            # single precision is good to a thousandth of a pixel
            pixels, depth = project_points(kept, np.asarray(lidar_to_image, kept.dtype))
            kept = kept.compress(inside_image(pixels, depth, np.array(image_size), margin=0), axis=0)
        if len(kept) == 0:
            raise ValueError(
                f"no usable point: of {len(points)} points {in_range} are inside point_cloud_range "
                f"{self.point_cloud_range} and none of these projects into the image"
                if in_range
                else f"no usable point: none of {len(points)} points is inside point_cloud_range "
                f"{self.point_cloud_range}"
            )
        return kept

    def draw(self, points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """`num_points` of the points (N, 4), in random order: each at most once where there are enough."""
        enough = len(points) >= self.num_points
        return points.take(generator.choice(len(points), self.num_points, replace=not enough), axis=0)

    def __call__(self, points: Any, seed: int = 0, return_tensors: str | None = "pt") -> BatchFeature:
        """Range filter and drawing for one scan or a list of scans (the field of view needs `SimIPUProcessor`).

        Args:
            points: bytes, array or tensor (N, 4), or a list of these.
            seed: of the drawing; the same scan gives the same points wherever it stands in the batch.

        Returns:
            `points` (B, num_points, 4) float32.

        Raises:
            ValueError: names the row, what was expected and what was found.
        """
        clouds = []
        for row, scan in enumerate(points if isinstance(points, list | tuple) else [points]):
            with naming_row(f"row {row}"):
                clouds.append(self.draw(self.filter(to_point_cloud(scan)), np.random.default_rng(seed)))
        return BatchFeature({"points": torch.from_numpy(np.stack(clouds))}, tensor_type=return_tensors)


SimIPUFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
