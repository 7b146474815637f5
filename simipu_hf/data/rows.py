"""A row of the data contract: one synchronised camera + LiDAR pair, of any data set.

| column | type | meaning |
| --- | --- | --- |
| `frame_id` | string | unique within its scene and split; what errors, pictures and reports name |
| `image` | `datasets.Image` | the camera image, undistorted |
| `points` | binary | little-endian float32, N x 4: x y z reflectance, metres, LiDAR frame |
| `camera_projection` | 3 x 4 float64 | (rectified) camera frame -> pixels; integer coordinates are pixel centres |
| `lidar_to_camera` | 4 x 4 float64 | LiDAR frame -> (rectified) camera frame: x right, y down, z forward, metres |
| `scene` | string | the drive, log or segment, for splits that do not leak; made of `frame_id` where it is absent |

The points are bytes because every other column type is 10 to 2,000 times slower to read. Further columns are allowed.
"""

import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import kornia_rs
import numpy as np
from datasets.arrow_writer import ArrowWriter
from datasets.utils.file_utils import xopen
from filelock import FileLock
from PIL import Image

from ..errors import AT_THE_END, SimIPUError
from ..files import atomic_path
from ..modeling.feature_extraction_simipu import to_point_cloud
from ..modeling.geometry import inside_image, project_points, to_calibration
from ..modeling.image_processing_simipu import open_unturned, to_8_bits
from .sources import undecoded

ROW_FEATURES = datasets.Features(
    {
        "frame_id": datasets.Value("string"),
        "image": datasets.Image(),
        "points": datasets.Value("binary"),
        "camera_projection": datasets.Array2D((3, 4), "float64"),
        "lidar_to_camera": datasets.Array2D((4, 4), "float64"),
        "scene": datasets.Value("string"),
    }
)
REQUIRED_COLUMNS = [column for column in ROW_FEATURES if column != "scene"]

# chunks of a PNG none of which turns the image or makes a colour transparent
PLAIN_PNG_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"bKGD", b"cHRM", b"gAMA", b"iCCP", b"pHYs", b"sBIT", b"sRGB", b"tIME"}


def to_row(
    frame_id: str,
    image: Image.Image | np.ndarray | str | os.PathLike | bytes,
    points: np.ndarray,
    camera_projection: np.ndarray,
    lidar_to_camera: np.ndarray,
    scene: str | None = None,
) -> dict[str, Any]:
    """One row of the contract from one camera image and the LiDAR scan of the same instant.

        rows = (to_row(f.name, f.image_path, f.points, f.projection, f.extrinsics, scene=f.log) for f in my_frames)
        dataset_from_rows(rows).save_to_disk("my_dataset")   # then: --dataset_name my_dataset

    Args:
        frame_id: Unique name of the frame.
        image: The undistorted image: PIL image, (H, W, 3) RGB array, path, or the bytes of an image file. Of a path
            or of bytes the file is kept; of pixels a PNG is made.
        points: (N, 4) x, y, z in metres in the LiDAR frame, and reflectance (zeros where the sensor has none).
        camera_projection: (3, 4) matrix from the camera frame to pixels. For a pinhole camera with intrinsics K (3, 3)
            it is `[K | 0]`.
        lidar_to_camera: (4, 4) matrix from the LiDAR frame to the camera frame (x right, y down, z forward). For
            extrinsics that map camera to LiDAR, pass the inverse.
        scene: Name of the drive, log or segment; `None` makes it of `frame_id`, see `scene_of`.

    Raises:
        SimIPUError: anything that `check_row` refuses.
    """
    encoded: Any = image
    if isinstance(image, bytes):
        encoded = {"bytes": image, "path": None}
    elif isinstance(image, str | os.PathLike):
        encoded = os.path.abspath(image)
    elif isinstance(image, np.ndarray | Image.Image):
        # datasets would store 16 bits modulo 256, and of an image that was opened and then changed its file
        encoded = image_from_row({"frame_id": frame_id, "image": image}).copy()
    with _naming(frame_id):
        row = {
            "frame_id": str(frame_id),
            "image": encoded,
            "points": to_point_cloud(points).astype("<f4", copy=False).tobytes(),
            "camera_projection": np.asarray(camera_projection, dtype=np.float64).tolist(),
            "lidar_to_camera": np.asarray(lidar_to_camera, dtype=np.float64).tolist(),
            "scene": scene_of(str(frame_id)) if scene is None else str(scene),
        }
    check_row(row)
    return row


def scene_of(frame_id: str) -> str:
    """A scene's name where none is given: what is before the first slash of `frame_id`, or before the number at its
    end and KITTI's name of a camera, `_image_NN`.

    >>> [scene_of(name) for name in ("log7/000123/left", "drive_0009_sync_image_02_0000000042", "000123")]
    ['log7', 'drive_0009_sync', '000123']
    """
    if "/" in frame_id.strip("/"):
        return frame_id.strip("/").partition("/")[0]
    return re.sub(r"(_image_\d+)?[^0-9A-Za-z]*\d+$", "", frame_id) or frame_id


def dataset_from_rows(
    rows: Iterable[dict[str, Any]],
    cache_dir: str | os.PathLike | None = None,
    features: Mapping[str, Any] | None = None,
) -> datasets.Dataset:
    """A data set of rows made by `to_row`, from a generator or any other iterable; it need not fit in memory.

    The rows are written to a new file in `cache_dir`; by default in the cache of datasets, and removed when this
    process ends. To keep them, call `save_to_disk` or `push_to_hub` on the result.

    Args:
        features: types of further columns, such as `{"depth": datasets.Image()}`.

    Raises:
        SimIPUError: a row has a column whose type is not known.
    """
    path = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / f"rows-{secrets.token_hex(8)}.arrow"
    if cache_dir is None:
        AT_THE_END.enter_context(_temporary(path))
    write_arrow(path, rows, datasets.Features({**ROW_FEATURES, **(features or {})}))
    return datasets.Dataset.from_file(str(path))


@contextmanager
def _temporary(path: Path) -> Iterator[None]:
    """Removes `path` at its end; where this process is killed, the next one that makes such a file does."""
    for abandoned in path.parent.glob("rows-*.arrow.lock"):
        with suppress(OSError), FileLock(abandoned, timeout=0):
            abandoned.with_suffix("").unlink(missing_ok=True)
            abandoned.unlink(missing_ok=True)
    lock = path.with_name(f"{path.name}.lock")
    with FileLock(lock):
        yield
        with suppress(OSError):
            path.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    if path.exists():  # Windows keeps what is open: the lock names it to the next process
        lock.touch()


def dataset_from_stream(rows: datasets.IterableDataset) -> datasets.Dataset:
    """All rows of a stream, in a file of the cache of datasets that is removed when this process ends."""
    # images as they are, not decoded and encoded anew
    return dataset_from_rows(undecoded(rows.select_columns(list(ROW_FEATURES))))


def write_arrow(path: Path, rows: Iterable[dict[str, Any]], features: datasets.Features) -> None:
    """Writes an Arrow file of rows; 16 of them are in memory at a time.

    Raises:
        SimIPUError: it cannot be written, or a row has a column that `features` does not know.
    """
    with atomic_path(path) as beside, ArrowWriter(path=str(beside), features=features, writer_batch_size=16) as writer:
        for row in _without_os_errors(rows):
            if unknown := sorted(row.keys() - features.keys()):
                raise _row_error(row, unknown[0], "a column whose type is given in features", "none given")
            writer.write(features.encode_example(row))
        writer.finalize()


def _without_os_errors(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the rows' own files raise is not to be taken for an error of the file that is written."""
    try:
        yield from rows
    except OSError as error:
        raise SimIPUError(f"a row cannot be read: {error}") from error


def points_from_row(row: Mapping[str, Any]) -> np.ndarray:
    """Points of a row: (N, 4) float32 x, y, z (metres, LiDAR frame), reflectance. Read-only, shares the row's memory.

    Raises:
        SimIPUError: no bytes, a size that is no multiple of 16, or NaN or infinite values.
    """
    data = row["points"]
    if not isinstance(data, bytes | memoryview) or not data:
        found = type(data).__name__ if data is None or data else "0 bytes"
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
    """Decoded RGB image of a row, whether the column is decoded (PIL image) or not (`{"bytes", "path"}`); alpha is
    dropped.

    To have a broken file reported by its row, read the data set with `cast_column("image", Image(decode=False))`,
    since datasets turns images by their EXIF orientation as it decodes them.

    Raises:
        SimIPUError: the image can't be read, or is to be turned by its EXIF orientation: whether the calibration is
            that of the pixels as they are stored or as they are shown cannot be told.
    """
    image = row["image"]
    try:
        with ExitStack() as opened:
            if not isinstance(image, np.ndarray | Image.Image):
                image = opened.enter_context(open_image(image))
            image = to_8_bits(open_unturned(image))
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        said = re.sub(r" <_io.BytesIO .*>", "", str(error))
        raise _row_error(row, "image", "a readable image", f"{type(error).__name__}: {said}") from error


def pixels_from_row(row: Mapping[str, Any]) -> np.ndarray:
    """The pixels of `image_from_row`, (H, W, 3) uint8, which may be written to.

    RGB of JPEG files, and of PNG files without text, EXIF or transparency, is decoded by kornia-rs: the same pixels in
    half of Pillow's time.

    Raises:
        SimIPUError: as `image_from_row`.
    """
    pixels = _decode_plain(row["image"])
    return np.array(image_from_row(row)) if pixels is None else pixels  # a copy that may be written to


@contextmanager
def open_image(image: Any) -> Iterator[Image.Image]:
    """Opens an image that is not decoded; of a PNG, whose damage Pillow would decode, checks the checksums first."""
    with _open_file(image) as file:
        opened = Image.open(file)
        if opened.format == "PNG":
            opened.verify()
            file.seek(0)
            opened = Image.open(file)
        yield opened


def _open_file(image: Any) -> BinaryIO:
    """The file of an image that is not decoded: `{"bytes", "path"}` or a path, also of hf:// or zip://."""
    encoded = image if isinstance(image, dict) else {"bytes": None, "path": image}
    if encoded["bytes"] is not None:
        return BytesIO(encoded["bytes"])
    # datasets takes what is before :: or : of a local path for an address
    return open(encoded["path"], "rb") if os.path.isfile(encoded["path"]) else xopen(encoded["path"], "rb")


def _decode_plain(image: Any) -> np.ndarray | None:
    """Pixels of an RGB image of 8 bits in a JPEG file, or a PNG file that says nothing more of them; else `None`."""
    try:
        with _open_file(image) as file:
            data = file.read()
        header = Image.open(BytesIO(data))
        if header.mode == "RGB" and header.format == "JPEG":
            open_unturned(header)
            return kornia_rs.io.decode_image_jpegturbo(data, "rgb")
        if header.mode == "RGB" and header.format == "PNG" and data[24] == 8 and _png_chunks(data) <= PLAIN_PNG_CHUNKS:
            return kornia_rs.io.decode_image_png_u8(data, (header.height, header.width), "rgb")
    except Exception:  # decoded already, damaged, or to be turned: `image_from_row` reads it or says why not
        return None
    return None


def _png_chunks(data: bytes) -> set[bytes]:
    """The types of the chunks of a PNG file."""
    types, start = set(), 8
    while start < len(data):
        types.add(data[start + 4 : start + 8])
        start += 12 + int.from_bytes(data[start : start + 4], "big")
    return types


@dataclass(frozen=True)
class Frame:
    """One row of the data contract, ready to measure and to draw.

    Args:
        frame_id: its name.
        image: `(H, W, 3)` uint8, RGB.
        points: `(N, 4)`, x y z in metres in the LiDAR's own axes, reflectance.
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
        return cls(str(row["frame_id"]), pixels_from_row(row), points_from_row(row), projection @ lidar_to_camera)

    def project(self, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where points `(M, 3)` appear: pixels `(M, 2)` (x, y), depth `(M,)` in metres, and which are in the image."""
        pixels, depth = project_points(coordinates.astype(np.float64), self.lidar_to_image)
        return pixels, depth, inside_image(pixels, depth, np.array(self.image.shape[:2]))

    @cached_property
    def view(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`project` of all points of the scan."""
        return self.project(self.points[:, :3])

    def lift(self, pixels: np.ndarray, depth: float | np.ndarray) -> np.ndarray:
        """The points `(M, 3)` in the LiDAR frame that appear at pixels `(M, 2)` at `depth` metres, one or `(M,)`."""
        homogeneous = np.reshape(depth, (-1, 1)) * np.column_stack([pixels, np.ones(len(pixels))])
        return np.linalg.solve(self.lidar_to_image[:, :3], (homogeneous - self.lidar_to_image[:, 3]).T).T


def check_row(row: Mapping[str, Any]) -> None:
    """Checks all of a row.

    Raises:
        SimIPUError: anything that `points_from_row`, `calibration_from_row` or `image_from_row` refuses; names the
            frame, what was expected and what was found.
    """
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
        if found is None and column not in REQUIRED_COLUMNS:
            continue
        if not _same_kind(found, expected):
            raise SimIPUError(f"{source}: column {column!r}: expected {expected}, found {found} of {list(features)}")


def _same_kind(found: Any, expected: Any) -> bool:
    if isinstance(expected, datasets.Image):
        return isinstance(found, datasets.Image)
    if isinstance(expected, datasets.Value):
        return getattr(found, "dtype", None) in (expected.dtype, f"large_{expected.dtype}")
    if isinstance(found, datasets.Array2D):
        return tuple(found.shape) == expected.shape and found.dtype.startswith("float")
    # nested lists, as other writers store a matrix: the shape is checked row by row
    for _ in range(2):
        found = found[0] if isinstance(found, list) else getattr(found, "feature", None)
    return getattr(found, "dtype", "").startswith("float")


@contextmanager
def _naming(frame_id: Any) -> Iterator[None]:
    """Turns a ValueError into a SimIPUError that begins with the frame's name."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise SimIPUError(f"frame {frame_id}: {error}") from error


def _row_error(row: Mapping[str, Any], column: str, expected: str, found: Any) -> SimIPUError:
    return SimIPUError(f"frame {row.get('frame_id')}: {column}: expected {expected}, found {found}")
