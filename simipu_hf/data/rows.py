"""A row of the data contract: one synchronised camera + LiDAR pair, of any data set.

| column | type | meaning |
| --- | --- | --- |
| `frame_id` | string | unique within the data set; what errors, pictures and reports name |
| `image` | `datasets.Image` | the camera image, undistorted |
| `points` | binary | little-endian float32, N x 4: x y z reflectance, metres, LiDAR frame |
| `camera_projection` | 3 x 4 float64 | (rectified) camera frame -> pixels; integer coordinates are pixel centres |
| `lidar_to_camera` | 4 x 4 float64 | LiDAR frame -> (rectified) camera frame: x right, y down, z forward, metres |

The points are bytes because every other column type is 10 to 2,000 times slower to read. Further columns are allowed.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Protocol

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from PIL import Image

from ..errors import SimIPUError
from ..modeling.feature_extraction_simipu import to_point_cloud
from ..modeling.geometry import to_calibration


class Rows(Protocol):
    """Rows by index: a `datasets.Dataset`, a list, or anything else that reads them one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


ROW_FEATURES = datasets.Features(
    {
        "frame_id": datasets.Value("string"),
        "image": datasets.Image(),
        "points": datasets.Value("binary"),
        "camera_projection": datasets.Array2D((3, 4), "float64"),
        "lidar_to_camera": datasets.Array2D((4, 4), "float64"),
    }
)


def to_row(
    frame_id: str,
    image: Image.Image | np.ndarray | str | os.PathLike | bytes,
    points: np.ndarray,
    camera_projection: np.ndarray,
    lidar_to_camera: np.ndarray,
) -> dict[str, Any]:
    """One row of the contract from one camera image and the LiDAR scan of the same instant.

    Args:
        frame_id: Unique name of the frame.
        image: The undistorted image: PIL image, (H, W, 3) uint8 RGB array, path, or the bytes of an image file.
        points: (N, 4) x, y, z in metres in the LiDAR frame, and reflectance (zeros where the sensor has none).
        camera_projection: (3, 4) matrix from the camera frame to pixels. For a pinhole camera with intrinsics K (3, 3)
            it is `[K | 0]`.
        lidar_to_camera: (4, 4) matrix from the LiDAR frame to the camera frame (x right, y down, z forward). For
            extrinsics that map camera to LiDAR, pass the inverse.

    Raises:
        SimIPUError: anything that `check_row` refuses.

    Example, for a data set of your own:

        def rows():
            for log in my_logs:
                yield to_row(log.name, log.image_path, log.points, log.projection, log.extrinsics)

        dataset_from_rows(rows()).save_to_disk("my_dataset")   # then: --dataset_name my_dataset
    """
    encoded: Any = image
    if isinstance(image, bytes):
        encoded = {"bytes": image, "path": None}
    elif isinstance(image, str | os.PathLike):
        encoded = os.path.abspath(image)
    with _naming(frame_id):
        cloud = to_point_cloud(points)
    row = {
        "frame_id": str(frame_id),
        "image": encoded,
        "points": cloud.astype("<f4", copy=False).tobytes(),
        "camera_projection": np.asarray(camera_projection, dtype=np.float64).tolist(),
        "lidar_to_camera": np.asarray(lidar_to_camera, dtype=np.float64).tolist(),
    }
    check_row(row)
    return row


def dataset_from_rows(rows: Iterable[dict[str, Any]], cache_dir: str | os.PathLike | None = None) -> datasets.Dataset:
    """A data set of rows made by `to_row`, from a generator or any other iterable; it need not fit in memory.

    The rows are written to a new file in `cache_dir` (default: the cache of datasets). To keep them, call
    `save_to_disk` or `push_to_hub` on the result.
    """
    parent = os.fspath(cache_dir or datasets.config.HF_DATASETS_CACHE)
    os.makedirs(parent, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="rows-", dir=parent)
    path = os.path.join(folder, "rows.arrow")
    try:
        with ArrowWriter(path=path, features=ROW_FEATURES, writer_batch_size=16) as writer:
            for row in rows:
                writer.write(ROW_FEATURES.encode_example(row))
            writer.finalize()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return datasets.Dataset.from_file(path)


def points_from_row(row: Mapping[str, Any]) -> np.ndarray:
    """Points of a row: (N, 4) float32 x, y, z (metres, LiDAR frame), reflectance. Read-only, shares the row's memory.

    Raises:
        SimIPUError: no bytes, a size that is no multiple of 16, or NaN or infinite values.
    """
    data = row["points"]
    if not isinstance(data, bytes) or not data:
        found = "0 bytes" if isinstance(data, bytes) else type(data).__name__
        raise _row_error(row, "points", "the bytes of whole points, 16 (four float32) each", found)
    with _naming(row.get("frame_id")):
        return to_point_cloud(data)


def calibration_from_row(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """`camera_projection` (3, 4) and `lidar_to_camera` (4, 4) of a row, float64.

    Raises:
        SimIPUError: another shape, no numbers, NaN or infinity, or a last row of `lidar_to_camera` other than
            0 0 0 1.
    """
    with _naming(row.get("frame_id")):
        return to_calibration(row["camera_projection"], row["lidar_to_camera"])


def image_from_row(row: Mapping[str, Any]) -> Image.Image:
    """Decoded RGB image of a row, whether the column is decoded (PIL image) or not (`{"bytes", "path"}`).

    To have a broken file reported by its row, read the data set with `cast_column("image", Image(decode=False))`.

    Raises:
        SimIPUError: the image can't be read.
    """
    image = row["image"]
    try:
        if isinstance(image, np.ndarray):
            return Image.fromarray(image).convert("RGB")
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        encoded = image if isinstance(image, dict) else {"bytes": None, "path": image}
        source = encoded["path"] if encoded["bytes"] is None else BytesIO(encoded["bytes"])
        with Image.open(source) as opened:
            return opened.convert("RGB")
    except Exception as error:
        raise _row_error(row, "image", "a readable image", f"{type(error).__name__}: {error}") from error


def check_row(row: Mapping[str, Any]) -> None:
    """Checks all of a row.

    Raises:
        SimIPUError: a column is missing, or anything that `points_from_row`, `calibration_from_row` or
            `image_from_row` refuses; names the frame, what was expected and what was found.
    """
    missing = [column for column in ROW_FEATURES if column not in row]
    if missing:
        raise _row_error(row, ", ".join(missing), f"the columns {list(ROW_FEATURES)}", list(row))
    points_from_row(row)
    calibration_from_row(row)
    image_from_row(row)


def check_features(features: datasets.Features, source: str) -> None:
    """Checks that a data set has the columns of a row, of the right types; `source` names it in the error.

    Raises:
        SimIPUError: names the column, the type expected and the type found.
    """
    for column, expected in ROW_FEATURES.items():
        found = features.get(column)
        if found is None:
            raise SimIPUError(
                f"{source}: column {column!r}: expected {_describe(expected)}, found only {list(features)}"
            )
        if not _same_kind(column, found):
            raise SimIPUError(f"{source}: column {column!r}: expected {_describe(expected)}, found {found}")


def _same_kind(column: str, found: Any) -> bool:
    if column == "frame_id":
        return getattr(found, "dtype", None) in ("string", "large_string")
    if column == "image":
        return isinstance(found, datasets.Image)
    if column == "points":
        return getattr(found, "dtype", None) in ("binary", "large_binary")
    if isinstance(found, datasets.Array2D):
        return tuple(found.shape) == ROW_FEATURES[column].shape and found.dtype.startswith("float")
    # nested lists, as other writers store a matrix: the shape is checked row by row
    for _ in range(2):
        found = found[0] if isinstance(found, list) else getattr(found, "feature", None)
    return getattr(found, "dtype", "").startswith("float")


def _describe(feature: Any) -> str:
    return "datasets.Image" if isinstance(feature, datasets.Image) else str(feature)


@contextmanager
def _naming(frame_id: Any) -> Iterator[None]:
    """Turns a ValueError into a SimIPUError that begins with the frame's name."""
    try:
        yield
    except ValueError as error:
        raise SimIPUError(f"frame {frame_id}: {error}") from error


def _row_error(row: Mapping[str, Any], column: str, expected: str, found: Any) -> SimIPUError:
    return SimIPUError(f"frame {row.get('frame_id')}: {column}: expected {expected}, found {found}")
