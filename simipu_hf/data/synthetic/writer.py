"""Write a synthetic drive as a folder in KITTI object layout."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import patch_environment
from PIL import Image
from tqdm.auto import tqdm

from simipu_hf.errors import SimIPUError

from .frame import SyntheticFrame, synthesize_frame
from .sensors import Calibration, Lidar

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class _Job:
    """One frame to make: the folder (training or testing) and number it gets, and where in which drive it is."""

    folder: str
    number: int
    drive: tuple[int, ...]
    step: int


def synthesize_drive(
    output_dir: str | os.PathLike,
    num_frames: int = 200,
    image_size: tuple[int, int] = (375, 1242),
    seed: int = 0,
    num_workers: int | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.1,
    frames_per_drive: int = 25,
    interval: float = 0.5,
    azimuth_steps: int = 2083,
    range_noise: float = 0.02,
    dropouts: bool = True,
    progress: bool = True,
) -> Path:
    """Generate streets and drive along them with a camera and a 64-beam LiDAR: KITTI object data without a download.

    The folder is KITTI's: `training/{image_2,velodyne,calib,label_2}`, `testing/{image_2,velodyne,calib}`,
    `ImageSets/{train,val,trainval,test}.txt`, and beside them `depth_2`: dense true depth of every pixel of image_2 as
    16-bit PNG, value = metres * 256 (depth of the third row of P2), 0 where there is none (sky, beyond 255 m).

    Frames come in drives of `frames_per_drive` consecutive frames, each in a new street with its own light and
    calibration; no drive is shared by two splits. A frame is a function of the seed and its place in the drive: the
    number of workers, and of frames after it, makes no difference.

    Args:
        output_dir: must not exist, or be empty. It appears complete or not at all.
        image_size: height and width in pixels; the field of view is KITTI's at any width.
        num_workers: processes; by default one per processor, but no more than one for every 25 frames. Two or more are
            started afresh, so that a script which calls this needs the usual `if __name__ == "__main__":`.
        interval: seconds between consecutive frames of a drive, at 5 to 11 m/s.
        azimuth_steps: LiDAR firings per turn and beam; 2083 is KITTI's.
        range_noise: standard deviation in metres.
        dropouts: whether weak LiDAR returns are lost.

    Returns:
        `output_dir` as a path.

    Raises:
        SimIPUError: a value out of range, or `output_dir` is not empty.
    """
    target = Path(output_dir)
    _check(
        target, num_frames, image_size, seed, val_fraction, test_fraction, frames_per_drive, interval, azimuth_steps
    )
    counts = _split_counts(num_frames, val_fraction, test_fraction)
    jobs = list(_plan(counts, seed, frames_per_drive))
    settings = {
        "image_size": tuple(image_size),
        "interval": interval,
        "steps": frames_per_drive,
        "lidar": Lidar(azimuth_steps=azimuth_steps, range_noise=range_noise, dropouts=dropouts),
    }
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        for folder in sorted({job.folder for job in jobs}):
            kinds = ("image_2", "velodyne", "calib", "depth_2") + (("label_2",) if folder == "training" else ())
            for kind in kinds:
                (partial / folder / kind).mkdir(parents=True)
        _run(jobs, settings, partial, num_workers, frames_per_drive, progress)
        _write_image_sets(partial / "ImageSets", counts)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check(
    target: Path,
    num_frames: int,
    image_size: tuple[int, int],
    seed: int,
    val_fraction: float,
    test_fraction: float,
    frames_per_drive: int,
    interval: float,
    azimuth_steps: int,
) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SimIPUError(
            f"{target}: expected a new or empty folder to write the synthetic drive to, found one in use"
        )
    if not (len(image_size) == 2 and min(image_size) >= 16):
        raise SimIPUError(f"image_size: expected (height, width) of at least 16 pixels, found {tuple(image_size)}")
    if seed < 0:
        raise SimIPUError(f"seed: expected a number of at least 0, found {seed}")
    if min(num_frames, frames_per_drive, azimuth_steps) < 1 or interval <= 0:
        raise SimIPUError(
            "num_frames, frames_per_drive, azimuth_steps and interval must be positive, found "
            f"{num_frames}, {frames_per_drive}, {azimuth_steps} and {interval}"
        )
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise SimIPUError(
            "val_fraction and test_fraction must be at least 0 and sum to less than 1, found "
            f"{val_fraction} and {test_fraction}"
        )


def _split_counts(num_frames: int, val_fraction: float, test_fraction: float) -> dict[str, int]:
    """Frames per split; a wanted split gets at least one frame where there are enough for every split to have one."""
    least = 1 if num_frames >= len(SPLITS) else 0
    val = max(round(num_frames * val_fraction), least) if val_fraction else 0
    test = max(round(num_frames * test_fraction), least) if test_fraction else 0
    return {"train": num_frames - val - test, "val": val, "test": test}


def _plan(counts: dict[str, int], seed: int, frames_per_drive: int) -> Iterator[_Job]:
    """Every frame in order: train and val are numbered through in training/, test starts again in testing/."""
    for split, name in enumerate(SPLITS):
        first = counts["train"] if name == "val" else 0
        for index in range(counts[name]):
            drive, step = divmod(index, frames_per_drive)
            yield _Job("testing" if name == "test" else "training", first + index, (seed, split, drive), step)


def _run(
    jobs: list[_Job],
    settings: dict[str, Any],
    root: Path,
    num_workers: int | None,
    frames_per_drive: int,
    progress: bool,
) -> None:
    """Make all frames, in as many processes as wanted; a process takes stretches of a drive at a time."""
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = min(cores, len(jobs) // 25)  # a process takes seconds to start
    stretch = max(1, min(frames_per_drive, len(jobs) // (4 * max(num_workers, 1))))
    stretches = [jobs[i : i + stretch] for i in range(0, len(jobs), stretch)]
    with tqdm(total=len(jobs), desc="synthetic drive", unit="frame", disable=not progress) as bar:
        if num_workers <= 1 or len(stretches) == 1:
            for job in jobs:
                bar.update(_make([job], settings, root))
            return
        num_workers = min(num_workers, len(stretches))
        # linear algebra in one thread each, or the processes would fight over the processors
        one_thread = patch_environment(OMP_NUM_THREADS=1, OPENBLAS_NUM_THREADS=1)
        with one_thread, ProcessPoolExecutor(num_workers, mp_context=_fresh_processes()) as pool:
            pending = [pool.submit(_make, part, settings, root) for part in stretches]
            try:
                for future in pending:
                    bar.update(future.result())
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _fresh_processes() -> multiprocessing.context.BaseContext:
    """Never a fork of this process: with running threads (PyTorch's, Embree's) that may hang."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # the seconds of importing are paid once, not by every worker
    return context


def _make(jobs: list[_Job], settings: dict, root: Path) -> int:
    for job in jobs:
        _write_frame(synthesize_frame(job.drive, job.step, **settings), root / job.folder, f"{job.number:06d}")
    return len(jobs)


def _write_frame(frame: SyntheticFrame, folder: Path, name: str) -> None:
    Image.fromarray(frame.image).save(folder / "image_2" / f"{name}.png", compress_level=1)
    Image.fromarray(depth_to_png(frame.depth)).save(folder / "depth_2" / f"{name}.png", compress_level=1)
    frame.points.astype("<f4").tofile(folder / "velodyne" / f"{name}.bin")
    (folder / "calib" / f"{name}.txt").write_text(calibration_text(frame.calibration), encoding="utf-8")
    if (folder / "label_2").is_dir():
        lines = "".join(label.line() + "\n" for label in frame.objects)
        (folder / "label_2" / f"{name}.txt").write_text(lines, encoding="utf-8")


def depth_to_png(depth: np.ndarray) -> np.ndarray:
    """Metres (H, W) -> KITTI's uint16: metres * 256, 0 where there is no depth or it does not fit."""
    scaled = np.where(np.isfinite(depth), np.round(depth * 256.0), 0)
    return np.where(scaled < 2**16, scaled, 0).astype(np.uint16)


def calibration_text(calibration: Calibration) -> str:
    """A calib file of KITTI object. The other three cameras repeat P2's; the IMU sits in the LiDAR."""
    imu = np.eye(4)[:3]
    rows = {
        **{f"P{camera}": calibration.P2 for camera in range(4)},
        "R0_rect": calibration.R0_rect,
        "Tr_velo_to_cam": calibration.Tr_velo_to_cam,
        "Tr_imu_to_velo": imu,
    }
    return "".join(f"{name}: " + " ".join(f"{x:.12e}" for x in matrix.ravel()) + "\n" for name, matrix in rows.items())


def _write_image_sets(folder: Path, counts: dict[str, int]) -> None:
    train, val, test = (counts[name] for name in SPLITS)
    frames = {
        "train": range(train),
        "val": range(train, train + val),
        "trainval": range(train + val),
        "test": range(test),
    }
    folder.mkdir(parents=True)
    for name, numbers in frames.items():
        (folder / f"{name}.txt").write_text("".join(f"{n:06d}\n" for n in numbers), encoding="utf-8")
