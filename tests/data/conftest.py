"""Small KITTI folders of random frames in front of a real-looking camera."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE = (48, 16)
PROJECTION = "40 0 23.5 0 0 40 7.5 0 0 0 1 0"
# x right = -y, y down = -z, z forward = x of the LiDAR
ROTATION = "0 -1 0 0 0 -1 1 0 0"


def write_pair(image: Path, scan: Path, rng: np.random.Generator) -> None:
    for path in (image, scan):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)).save(image)
    points = rng.uniform([5, -5, -2, 0], [50, 5, 2, 1], size=(60, 4))
    points.astype("<f4").tofile(scan)


@pytest.fixture
def object_root(tmp_path: Path) -> Path:
    """Training frames 000000 to 000004, `ImageSets` with train (0 to 2), val (3, 4), testing frame 000000."""
    root, rng = tmp_path / "object", np.random.default_rng(0)
    for folder, frame_id in [("training", f"{index:06d}") for index in range(5)] + [("testing", "000000")]:
        write_pair(root / folder / f"image_2/{frame_id}.png", root / folder / f"velodyne/{frame_id}.bin", rng)
        calib = root / folder / f"calib/{frame_id}.txt"
        calib.parent.mkdir(exist_ok=True)
        rows = [ROTATION.split()[3 * index : 3 * index + 3] for index in range(3)]
        rigid = " ".join(" ".join([*row, "0.1"]) for row in rows)
        calib.write_text(f"P2: {PROJECTION}\nR0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: {rigid}\n")
    (root / "training/label_2").mkdir()
    (root / "training/label_2/000000.txt").write_text("Car 0 0 0 1 1 5 5 1 1 1 0 0 9 0\n" * 2)
    (root / "ImageSets").mkdir()
    (root / "ImageSets/train.txt").write_text("000000\n000001\n000002\n")
    (root / "ImageSets/val.txt").write_text("000003\n000004\n")
    return root


@pytest.fixture
def raw_root(tmp_path: Path) -> Path:
    """Drive 0001 of 2011_09_26 with two frames of the left camera."""
    root, rng = tmp_path / "raw", np.random.default_rng(1)
    day = root / "2011_09_26"
    drive = day / "2011_09_26_drive_0001_sync"
    for key in ("0000000000", "0000000001"):
        write_pair(drive / f"image_02/data/{key}.png", drive / f"velodyne_points/data/{key}.bin", rng)
    (day / "calib_cam_to_cam.txt").write_text(
        f"calib_time: now\nR_rect_00: 1 0 0 0 1 0 0 0 1\nS_rect_02: {SIZE[0]} {SIZE[1]}\nP_rect_02: {PROJECTION}\n"
    )
    (day / "calib_velo_to_cam.txt").write_text(f"R: {ROTATION}\nT: 0.1 0.1 0.1\n")
    return root
