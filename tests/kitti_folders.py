"""Small KITTI folders of random frames in front of a real-looking camera, and the rows that the builder makes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simipu_hf.dataset_scripts import kitti

SIZE = (48, 16)
PROJECTIONS = {2: "40 0 23.5 0 0 40 7.5 0 0 0 1 0", 3: "40 0 23.5 -20.5 0 40 7.5 0.25 0 0 1 0.002"}
IDENTITY = "1 0 0 0 1 0 0 0 1"
# x right = -y, y down = -z, z forward = x of the LiDAR
ROTATION, LIDAR_TO_CAMERA = "0 -1 0 0 0 -1 1 0 0", "0 -1 0 0.1 0 0 -1 0.1 1 0 0 0.1"
LABEL = "Car 0.50 1 -1.25 10.00 2.50 30.00 12.75 1.50 1.60 3.70 -2.10 1.65 12.30 -1.45\n"


def write_pair(image: Path, scan: Path, rng: np.random.Generator) -> None:
    for path in (image, scan):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)).save(image)
    rng.uniform([5, -5, -2, 0], [50, 5, 2, 1], size=(60, 4)).astype("<f4").tofile(scan)


def write_lines(path: Path, lines: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key}: {values}\n" for key, values in lines.items()) + "\n")


def write_object(
    root: Path,
    image_sets: Mapping[str, str] | None = None,
    training: int = 5,
    testing: int = 1,
    cameras: tuple[int, ...] = (2,),
) -> Path:
    """Frames 000000, 000001, … of `training` and `testing`, labels for the first two: two cars, and none."""
    rng = np.random.default_rng(0)
    for folder, count in ((root / "training", training), (root / "testing", testing)):
        for frame_id in (f"{index:06d}" for index in range(count)):
            for camera in cameras:
                write_pair(folder / f"image_{camera}/{frame_id}.png", folder / f"velodyne/{frame_id}.bin", rng)
            lines = {f"P{camera}": PROJECTIONS[camera] for camera in cameras}
            lines |= {"R0_rect": IDENTITY, "Tr_velo_to_cam": LIDAR_TO_CAMERA}
            write_lines(folder / f"calib/{frame_id}.txt", lines)
    files = {"training/label_2/000000": LABEL * 2, "training/label_2/000001": ""}
    files |= {f"ImageSets/{split}": text for split, text in (image_sets or {}).items()}
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / f"{name}.txt").write_text(text)
    return root


def write_raw(root: Path, drives: Mapping[str, tuple[tuple[int, ...], int]]) -> Path:
    """Drives of 2011_09_26, by number: the cameras and how many frames each has."""
    rng, day = np.random.default_rng(1), root / "2011_09_26"
    for drive, (cameras, count) in drives.items():
        folder = day / f"2011_09_26_drive_{drive}_sync"
        for key in (f"{index:010d}" for index in range(count)):
            for camera in cameras:
                image = folder / f"image_{camera:02d}/data/{key}.png"
                write_pair(image, folder / f"velodyne_points/data/{key}.bin", rng)
    lines = {"calib_time": "09-Jan-2012 13:57:47", "R_rect_00": IDENTITY}
    for camera, values in PROJECTIONS.items():
        lines |= {f"S_rect_0{camera}": f"{SIZE[0]} {SIZE[1]}", f"P_rect_0{camera}": values}
    write_lines(day / "calib_cam_to_cam.txt", lines)
    write_lines(day / "calib_velo_to_cam.txt", {"calib_time": "15-Mar-2012", "R": ROTATION, "T": "0.1 0.1 0.1"})
    return root


def build(root: Path, name: str, cache: Path, **options: Any) -> Any:
    """The rows that the builder makes of a folder, by split."""
    builder = kitti.Kitti(config_name=name, data_dir=str(root), cache_dir=str(cache), **options)
    builder.download_and_prepare()
    return builder.as_dataset()
