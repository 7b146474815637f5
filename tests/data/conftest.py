"""Small KITTI folders of random frames."""

from pathlib import Path

import datasets
import pytest
from kitti_folders import write_object, write_raw


@pytest.fixture(autouse=True)
def datasets_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are prepared lie in `cache`, and datasets hardly waits where a mixture of streams is left."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture
def object_root(tmp_path: Path) -> Path:
    """Training frames 000000 to 000004, `ImageSets` with train (0 to 2), val (3, 4), testing frame 000000."""
    return write_object(tmp_path / "object", {"train": "000000\n000001\n000002\n", "val": "000003\n000004\n"})


@pytest.fixture
def raw_root(tmp_path: Path) -> Path:
    """Drive 0001 of 2011_09_26 with two frames of the left camera."""
    return write_raw(tmp_path / "raw", {"0001": ((2,), 2)})
