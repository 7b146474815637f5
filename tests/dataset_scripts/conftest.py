"""A KITTI folder of random frames, in the object benchmark's and in the raw layout."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

LABEL = "Car 0.50 1 -1.25 10.00 2.50 30.00 12.75 1.50 1.60 3.70 -2.10 1.65 12.30 -1.45\n"
SIZE = (48, 16)


def numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.12e}" for value in np.ravel(values))


def write_frame(image: Path, scan: Path, rng: np.random.Generator) -> None:
    for path in (image, scan):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)).save(image)
    rng.normal(size=(40, 4)).astype("<f4").tofile(scan)


@pytest.fixture
def object_root(tmp_path: Path) -> Callable[..., Path]:
    """Writes training frames 000000 to 000003 (labels for the first two) and testing frames 000000, 000001."""

    def write(image_sets: dict[str, str] | None = None) -> Path:
        root, rng = tmp_path / "kitti", np.random.default_rng(0)
        for folder, count in (("training", 4), ("testing", 2)):
            for frame_id in (f"{index:06d}" for index in range(count)):
                write_frame(root / folder / f"image_2/{frame_id}.png", root / folder / f"velodyne/{frame_id}.bin", rng)
                write_frame(root / folder / f"image_3/{frame_id}.png", root / folder / f"velodyne/{frame_id}.bin", rng)
                calib = root / folder / f"calib/{frame_id}.txt"
                calib.parent.mkdir(exist_ok=True)
                lines = {f"P{camera}": rng.normal(size=12) for camera in range(4)}
                lines |= {"R0_rect": rng.normal(size=9), "Tr_velo_to_cam": rng.normal(size=12)}
                calib.write_text("".join(f"{key}: {numbers(value)}\n" for key, value in lines.items()) + "\n")
        (root / "training/label_2").mkdir()
        for frame_id, text in (("000000", LABEL * 2), ("000001", "")):
            (root / f"training/label_2/{frame_id}.txt").write_text(text)
        for split, text in (image_sets or {}).items():
            (root / "ImageSets").mkdir(exist_ok=True)
            (root / f"ImageSets/{split}.txt").write_text(text)
        return root

    return write


@pytest.fixture
def raw_root(tmp_path: Path) -> Path:
    """Drive 0001 with 4 frames of both cameras (image_03 of frame 3 and the scan of frame 1 absent), drive 0002 with
    2 frames of the left camera."""
    root, rng = tmp_path / "raw", np.random.default_rng(1)
    day = root / "2011_09_26"
    for drive, cameras, count in (("0001", (2, 3), 4), ("0002", (2,), 2)):
        folder = day / f"2011_09_26_drive_{drive}_sync"
        for key in (f"{index:010d}" for index in range(count)):
            for camera in cameras:
                image = folder / f"image_{camera:02d}/data/{key}.png"
                write_frame(image, folder / f"velodyne_points/data/{key}.bin", rng)
    first = day / "2011_09_26_drive_0001_sync"
    (first / "velodyne_points/data/0000000001.bin").unlink()
    (first / "image_03/data/0000000003.png").unlink()
    cam = {"calib_time": "09-Jan-2012 13:57:47", "R_rect_00": numbers(rng.normal(size=9))}
    for camera in range(4):
        cam[f"S_rect_0{camera}"] = numbers(np.array(SIZE))
        cam[f"P_rect_0{camera}"] = numbers(rng.normal(size=12))
    velo = {"calib_time": "15-Mar-2012", "R": numbers(rng.normal(size=9)), "T": numbers(rng.normal(size=3))}
    for name, lines in (("cam_to_cam", cam), ("velo_to_cam", velo)):
        (day / f"calib_{name}.txt").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return root
