"""Write a synthetic drive as a folder in KITTI object layout."""

import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from simipu_hf.errors import SimIPUError
from simipu_hf.files import atomic_folder
from simipu_hf.machine import available_processors
from simipu_hf.processes import run_in_processes

from .frame import synthesize_frame
from .sensors import Lidar


def synthesize_drive(
    output_dir: str | os.PathLike,
    num_frames: int = 200,
    image_size: tuple[int, int] = (375, 1242),
    seed: int = 0,
    num_workers: int | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.1,
    azimuth_steps: int = 2083,
) -> Path:
    """Generate streets seen by a camera and a 64-beam LiDAR: KITTI object data without a download.

    synthesize_drive("DRIVE", num_frames=200, image_size=(96, 320))
    rows = load_pretraining_dataset(data_dir="DRIVE", split="train")

    The folder is KITTI's; beside `image_2` lies `depth_2`: true depth of every pixel as 16-bit PNG, metres * 256 (of
    the third row of P2), 0 where there is none (sky, beyond 255 m). Every frame is a street of its own, a function of
    the seed and of its number: first those for training, then for validation and for testing. The number of
    workers, and of frames after it, makes no difference.

    Args:
        output_dir: must not exist, or be empty; the folder is complete or not there.
        image_size: height and width in pixels; the field of view is KITTI's at any width.
        num_workers: processes; by default one per processor, but no more than one for every 25 frames. Two or more are
            started afresh, so that a script which calls this needs the usual `if __name__ == "__main__":`.
        azimuth_steps: LiDAR firings per turn and beam; 2083 is KITTI's.

    Raises:
        SimIPUError: a value out of range, or `output_dir` is not empty.
    """
    if len(image_size) != 2 or min(image_size) < 16:
        raise SimIPUError(f"image_size: expected two sides of at least 16 pixels, found {image_size}")
    shares = ("val_fraction", 0, val_fraction), ("test_fraction", 0, test_fraction)
    for name, least, found in (("num_frames", 1, num_frames), ("seed", 0, seed), *shares):
        if found < least:
            raise SimIPUError(f"{name}: expected at least {least}, found {found}")
    least = 1 if num_frames >= 3 else 0
    val, test = (max(round(num_frames * share), least) if share else 0 for share in (val_fraction, test_fraction))
    if num_frames - val - test < 1:
        raise SimIPUError(
            f"val_fraction, test_fraction: expected at least 1 of {num_frames} frames left for training, found {val} "
            f"for validation and {test} for testing"
        )
    with atomic_folder(Path(output_dir)) as folder:
        train, trainval = num_frames - val - test, num_frames - test
        sets = {"train": range(train), "val": range(train, trainval), "trainval": range(trainval), "test": range(test)}
        (folder / "ImageSets").mkdir()
        for name, numbers in sets.items():
            lines = "".join(f"{number:06d}\n" for number in numbers)
            (folder / "ImageSets" / f"{name}.txt").write_text(lines, encoding="utf-8")
        for kind in ("image_2", "velodyne", "calib", "depth_2", "label_2"):
            (folder / "training" / kind).mkdir(parents=True)
            if test and kind != "label_2":
                (folder / "testing" / kind).mkdir(parents=True)
        make = partial(_write_frame, folder, trainval, seed, image_size, Lidar(azimuth_steps))
        if num_workers is None:
            num_workers = min(available_processors(), num_frames // 25)  # a process takes seconds to start
        from accelerate.utils import patch_environment  # imports PyTorch, which the workers do without

        with patch_environment(OMP_NUM_THREADS=1, OPENBLAS_NUM_THREADS=1):  # or processes would fight over the cores
            # never a fork of this process, which may hang where threads are running (PyTorch's, Embree's)
            run_in_processes(make, range(num_frames), max(1, num_workers), "synthetic drive", start_method="spawn")
    return Path(output_dir)


def _write_frame(
    folder: Path, trainval: int, seed: int, image_size: tuple[int, int], lidar: Lidar, index: int
) -> None:
    """Make one frame and its files; training and validation share a folder, those for testing start again at 0."""
    frame = synthesize_frame(seed, index, image_size=image_size, lidar=lidar)
    folder, name = folder / "training", f"{index:06d}"
    if index >= trainval:
        folder, name = folder.with_name("testing"), f"{index - trainval:06d}"
    else:
        (folder / "label_2" / f"{name}.txt").write_text(frame.objects.to_text(), encoding="utf-8")
    # KITTI's form: metres * 256, 0 where there is no depth or it does not fit
    scaled = np.round(frame.depth * 256.0)
    depth = np.where(scaled < 2**16, scaled, 0).astype(np.uint16)
    Image.fromarray(frame.image).save(folder / "image_2" / f"{name}.png", compress_level=1)
    Image.fromarray(depth).save(folder / "depth_2" / f"{name}.png", compress_level=1)
    frame.points.astype("<f4").tofile(folder / "velodyne" / f"{name}.bin")
    # the other three cameras repeat P2's; the IMU sits in the LiDAR
    calibration = frame.calibration
    rows = {f"P{camera}": calibration.P2 for camera in range(4)}
    rows |= {"R0_rect": calibration.R0_rect, "Tr_velo_to_cam": calibration.Tr_velo_to_cam}
    rows["Tr_imu_to_velo"] = np.eye(3, 4)
    lines = (f"{key}: {' '.join(f'{x:.12e}' for x in matrix.ravel())}\n" for key, matrix in rows.items())
    (folder / "calib" / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
