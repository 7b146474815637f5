"""A KITTI folder of random frames, in the object benchmark's and in the raw layout."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from kitti_folders import write_object, write_raw


@pytest.fixture
def object_root(tmp_path: Path) -> Callable[..., Path]:
    """Writes training frames 000000 to 000003 and testing frames 000000, 000001, of both cameras."""
    return partial(write_object, tmp_path / "kitti", training=4, testing=2, cameras=(2, 3))


@pytest.fixture
def raw_root(tmp_path: Path) -> Path:
    """Drive 0001 with 4 frames of both cameras (image_03 of frame 3 and the scan of frame 1 absent), drive 0002 with
    2 frames of the left camera."""
    root = write_raw(tmp_path / "raw", {"0001": ((2, 3), 4), "0002": ((2,), 2)})
    first = root / "2011_09_26/2011_09_26_drive_0001_sync"
    (first / "velodyne_points/data/0000000001.bin").unlink()
    (first / "image_03/data/0000000003.png").unlink()
    return root
