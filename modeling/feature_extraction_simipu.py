"""Feature extractor of SimIPU: LiDAR scans in, clouds of a fixed number of points that the camera sees out."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin

from .geometry import camera_aligned_frame, inside_image, project_points, to_calibration, transform_cloud

# No LiDAR sees 100 km far, and no reflectance is counted beyond 16 bits: larger values are another type of number.
LARGEST_VALUE = 1e5


class SimIPUFeatureExtractor(FeatureExtractionMixin):
    """Brings LiDAR scans into the frame of the method, keeps what the camera sees and draws points of it.

        >>> extractor = SimIPUFeatureExtractor(depth_range=(1.0, 120.0))
        >>> batch = extractor(scan, camera_projection, lidar_to_camera, image_size=(375, 1242))

    Args:
        num_points: points per cloud, drawn without replacement where the cloud has enough, else with.
        frame: `"camera"` turns every scan into `camera_aligned_frame` (x along the optical axis, y left, z up, origin
            at the camera), so that nothing depends on the rig; `"lidar"` leaves it in the LiDAR's own axes, as the
            official code does.
        depth_range: nearest and farthest depth in metres, both kept. `None` keeps all in front of the camera.
        point_cloud_range: x, y, z minimum, then maximum, in metres in `frame`; points strictly inside are kept. `None`
            (the default) has no such box; the official configuration has one, in KITTI's LiDAR axes.

    Raises:
        ValueError: a value outside its meaning.
    """

    model_input_names = ["points"]  # noqa: RUF012

    def __init__(
        self,
        num_points: int = 16384,
        frame: Literal["camera", "lidar"] = "camera",
        depth_range: Sequence[float] | None = (1.0, 80.0),
        point_cloud_range: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        if num_points < 1:
            raise ValueError(f"num_points: expected at least 1, found {num_points}")
        if frame not in ("camera", "lidar"):
            raise ValueError(f"frame: expected 'camera' or 'lidar', found {frame!r}")
        self.num_points = num_points
        self.frame = frame
        self.depth_range = None if depth_range is None else [float(depth) for depth in depth_range]
        self.point_cloud_range = None if point_cloud_range is None else [float(bound) for bound in point_cloud_range]
        near_far, box = self.depth_range, self.point_cloud_range
        if near_far is not None and not (len(near_far) == 2 and 0 <= near_far[0] < near_far[1]):
            raise ValueError(f"depth_range: expected the nearest and the farthest depth, found {near_far}")
        if box is not None and not (len(box) == 6 and all(a < b for a, b in zip(box[:3], box[3:], strict=True))):
            raise ValueError(f"point_cloud_range: expected x y z minimum, then maximum, found {box}")
        super().__init__(**kwargs)

    def visible_points(
        self, points: Any, camera_projection: Any, lidar_to_camera: Any, image_size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The points of a scan that are in range and in the image, in `frame`, and how they project.

        Args:
            points: bytes of little-endian float32, array or tensor `(N, 4)`.
            camera_projection: `(3, 4)`, rectified camera to pixels of the original image.
            lidar_to_camera: `(4, 4)`, LiDAR to rectified camera.
            image_size: height and width of the original image.

        Returns:
            `(M, 4)` float32, in the scan's order, and `(3, 4)` float64, from `frame` to pixels of the original image.

        Raises:
            ValueError: a damaged scan, a wrong calibration, or no point that is in range and in the image.
        """
        scan = to_point_cloud(points)
        projection, extrinsics = to_calibration(camera_projection, lidar_to_camera)
        if self.frame == "camera":
            lidar_to_frame, frame_to_pixel = camera_aligned_frame(projection, extrinsics)
            cloud = transform_cloud(scan, lidar_to_frame)
        else:
            towards_x = extrinsics[2, 0]  # of the optical axis, in the LiDAR's axes
            if self.point_cloud_range is not None and self.point_cloud_range[0] >= 0 and towards_x < 0.5:
                raise ValueError(
                    "lidar_to_camera: expected a camera that looks along x, within 60 degrees, as the official "
                    "preset's point_cloud_range in LiDAR axes does, found "
                    f"{math.degrees(math.acos(max(towards_x, -1))):.0f}; use the recommended preset"
                )
            cloud, frame_to_pixel = scan, projection @ extrinsics
        return self._in_view(cloud, frame_to_pixel, image_size), frame_to_pixel

    def _in_view(self, cloud: np.ndarray, frame_to_pixel: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        kept = cloud
        if self.point_cloud_range is not None:
            bounds = zip(cloud.T, self.point_cloud_range[:3], self.point_cloud_range[3:], strict=False)
            in_box = np.logical_and.reduce([(x > low) & (x < high) for x, low, high in bounds])
            kept = cloud.compress(in_box, axis=0)  # several times faster than cloud[in_box]
        # single precision is good to a thousandth of a pixel
        pixels, depth = project_points(kept, frame_to_pixel.astype(kept.dtype))
        # the official frustum begins at the centres of the first pixels and ends a pixel behind those of the last
        official = self.frame == "lidar"
        size, margin = np.array(image_size) + official, 0.0 if official else 0.5
        seen = inside_image(pixels, depth, size, margin)
        if self.depth_range is not None:
            nearest, farthest = self.depth_range
            seen &= (depth >= nearest) & (depth <= farthest)
        if not seen.any():
            ranges = [f"depth_range {self.depth_range}", f"point_cloud_range {self.point_cloud_range}"]
            height, width = image_size
            raise ValueError(
                f"no usable point: none of {len(cloud)} points is within {' and '.join(ranges)} and projects into the "
                f"image of {width} x {height} pixels; {np.count_nonzero(depth > 0)} are in front of the camera"
            )
        return kept.compress(seen, axis=0)

    def draw(self, points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """`num_points` of the points `(N, 4)`, in random order: each at most once where there are enough."""
        enough = len(points) >= self.num_points
        return points.take(generator.choice(len(points), self.num_points, replace=not enough), axis=0)

    def __call__(
        self,
        points: Any,
        camera_projection: Any,
        lidar_to_camera: Any,
        image_size: Any,
        frame_id: str | Sequence[str] | None = None,
        seed: int = 0,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Clouds of one scan, or of lists of as many scans, calibrations and image sizes.

        Args:
            points, camera_projection, lidar_to_camera, image_size: as in `visible_points`, or a list of each.
            frame_id: names used in error messages; by default the number of the row.
            seed: of the drawing; the same scan gives the same points wherever it stands in the batch.

        Returns:
            `points` `(B, num_points, 4)` float32 in `frame`, and `lidar_to_pixel` `(B, 3, 4)` float64, from there to
            pixels of the original images.

        Raises:
            ValueError: names the row, what was expected and what was found.
        """
        rows = [points, camera_projection, lidar_to_camera, image_size]
        if not isinstance(points, list | tuple):
            rows = [[value] for value in rows]
        names = [f"row {row}" for row in range(len(rows[0]))] if frame_id is None else frame_id
        names = [names] if isinstance(names, str) else names
        clouds, projections = [], []
        for name, *row in zip(names, *rows, strict=True):
            with naming_row(name):
                cloud, frame_to_pixel = self.visible_points(*row)
            clouds.append(self.draw(cloud, np.random.default_rng(seed)))
            projections.append(frame_to_pixel)
        batch = {"points": np.stack(clouds), "lidar_to_pixel": np.stack(projections)}
        return BatchFeature(batch, tensor_type=return_tensors)


def to_point_cloud(points: Any) -> np.ndarray:
    """Points as `(N, 4)` float32, checked: x, y, z in metres and reflectance.

    Args:
        points: bytes of little-endian float32 records of four, or an array or tensor `(N, 4)`.

    Raises:
        ValueError: half a record, another shape, NaN, infinite or huge values, or bytes that are not four float32 a
            point; the message then names the number and type that they are likely to be.
    """
    if isinstance(points, bytes | bytearray | memoryview):
        likely = _likely_layout(points)
        if likely is not None:
            raise ValueError(
                f"points: expected four float32 (x y z reflectance) a point, found what looks like {likely}"
            )
        size = memoryview(points).nbytes
        if size % 16:
            raise ValueError(f"points: expected the bytes of whole points, 16 (four float32) each, found {size} bytes")
        values = np.frombuffer(points, dtype="<f4").reshape(-1, 4)
    else:
        values = points.detach().cpu().numpy() if isinstance(points, torch.Tensor) else points
        values = np.asarray(values, dtype=np.float32)
    if values.ndim != 2 or values.shape[1] != 4:
        raise ValueError(f"points: expected shape (N, 4), x y z reflectance, found {values.shape}")
    if not np.abs(values).max(initial=0) <= LARGEST_VALUE:  # nor where one is NaN
        _check_values(values)
    return values


def _check_values(values: np.ndarray) -> None:
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise ValueError(
            f"points: expected finite values, found {bad.sum()} of {len(values)} with NaN or infinity, the first at "
            f"index {bad.argmax()}"
        )
    largest = np.abs(values[:, :3]).max(initial=0)
    if largest > LARGEST_VALUE:
        raise ValueError(
            f"points: expected metres from the sensor, found values up to {largest:.2g}{_of_a_map(largest)}"
        )


def _likely_layout(data: bytes | bytearray | memoryview) -> str | None:
    """What the bytes of a scan look like where that is not four float32 a point, such as `"5 columns of float32"`."""
    size = memoryview(data).nbytes
    largest = {}
    for dtype in ("<f4", "<f8"):
        values = np.frombuffer(data, dtype, count=size // np.dtype(dtype).itemsize)
        sizes = np.abs(values)
        largest[dtype] = sizes.max(initial=0)
        if not np.isfinite(largest[dtype]):  # which is no evidence of another type, and slow to look beyond
            largest[dtype] = sizes.max(initial=0, where=np.isfinite(sizes))
        if largest[dtype] <= LARGEST_VALUE:
            columns = _likely_columns(values)
            return None if (dtype, columns) == ("<f4", 4) else f"{columns} columns of {values.dtype.name}"
    return f"another type: as float32 its values reach {largest['<f4']:.2g}{_of_a_map(largest['<f4'])}"


def _of_a_map(largest: float) -> str:
    """A hint for coordinates that may be those of a map."""
    return "; subtract an origin from coordinates of a map, which float32 cannot hold" if largest < 1e8 else ""


def _likely_columns(values: np.ndarray) -> int:
    """How many columns a flat array of points has, 3 to 8: 4 unless another number is clearly more likely.

    Coordinates, reflectance, ring and time have magnitudes of their own. Cut at the wrong length the columns are
    mixtures of all of them, so the share of the variance that lies between columns tells the right length.
    """
    blocks = values[: values.size // 840 * 840].reshape(-1, 840)  # 840 is a multiple of every length
    sample = blocks[:: len(blocks) // 8 + 1]

    def share_between(columns: int) -> float:
        points = sample.reshape(-1, 4 if columns == 8 else columns)  # 8 may be two points of 4, one of them zeros
        found = points[points.any(axis=1)].ravel()  # not the zeros of beams that never came back
        if found.size < columns:
            return 0.0
        rows = found[: found.size // columns * columns].reshape(-1, columns)
        magnitudes = np.log(np.abs(rows, dtype=np.float32) + 0.01)
        return magnitudes.mean(axis=0).var() / max(magnitudes.var(), 1e-6)

    four = share_between(4)
    if not four < 0.5:
        return 4
    shares = {columns: share_between(columns) for columns in (3, 5, 6, 7, 8)}
    best = max(shares, key=lambda columns: round(shares[columns], 2))
    likely = shares[best] > four + 0.1 and not (best == 8 and _are_two_points(sample.reshape(-1, 8)))
    return best if likely else 4


def _are_two_points(rows: np.ndarray) -> bool:
    """Whether columns 4 and 5 of 8 are x and y as well: as often on either side as columns 0 and 1, and metres away.

    Two beams that fire in turns, or two sensors, differ in height and reflectance as columns do.
    """
    first, second = rows[rows[:, :4].any(axis=1), :2], rows[rows[:, 4:].any(axis=1), 4:6]
    if not len(first) or not len(second):
        return False
    signs = np.minimum((second > 0).mean(axis=0), (second < 0).mean(axis=0))
    sides = np.abs((second > 0).mean(axis=0) - (first > 0).mean(axis=0))
    return bool(signs.max() > 0.05 and sides.max() < 0.25 and np.median(np.abs(second).max(axis=1)) > 1)


@contextmanager
def naming_row(row: str) -> Iterator[None]:
    """Puts the row's name before the message of an error."""
    try:
        yield
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{row}: {error}") from error


SimIPUFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
