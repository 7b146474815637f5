"""`simipu-hf benchmark data`: how many samples a second the workers make, against decoding their images alone."""

import os
from collections.abc import Callable, Sequence
from io import BytesIO

import datasets
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.image_utils import SizeDict

from simipu_hf.data.collate import TwoViewCollator
from simipu_hf.data.pretraining_dataset import TwoViewDataset
from simipu_hf.errors import SimIPUError

from .inputs import benchmark_rows, check_at_least_one, sample_keys, two_view_dataset
from .measure import BenchmarkResult, choose_device, conclude, time_interleaved

DECODE = "decode the image"
DECODE_RESIZE = "decode and resize the image"
WORKER = "two-view batches, one worker"


def benchmark_data(
    *,
    data_dir: str | None = None,
    dataset_name: str | None = None,
    preset: str = "recommended",
    image_size: Sequence[int] = (384, 1248),
    num_points: int = 16384,
    num_rows: int = 16,
    num_workers: int | None = None,
    batch_size: int = 2,
    repeats: int = 5,
    seed: int = 0,
    json_path: str | os.PathLike | None = None,
) -> BenchmarkResult:
    """Rows per second: the two-view batches of one worker, and of the loader with several, against decoding alone.

    What one worker does, samples and their collation, is measured in this process, on one thread, as PyTorch gives a
    worker.

    Args:
        data_dir, dataset_name: rows to read, as in `load_pretraining_dataset`; synthetic ones where neither is given.
        preset: `"recommended"` or `"official"`.
        image_size: height and width of the images.
        num_points: points in each cloud.
        num_rows: rows in one pass; a smaller data set is read several times over.
        num_workers: of the loader; as many as this process may use processors where not given.
        batch_size: of the loader.
        repeats: passes of which the medians are taken, after one that is not counted.
        seed: of the augmentation.
        json_path: where to write the result as JSON.

    Raises:
        SimIPUError: an unknown preset, or data that cannot be used.
    """
    workers = available_processors() if num_workers is None else num_workers
    check_at_least_one(
        num_rows=num_rows, batch_size=batch_size, repeats=repeats, num_points=num_points, num_workers=workers
    )
    cpu = choose_device("cpu")
    threads = torch.get_num_threads()
    with benchmark_rows(data_dir, dataset_name, min(num_rows, 4)) as (rows, source):
        if not isinstance(rows, datasets.Dataset):
            raise SimIPUError(f"{source}: expected rows that can be read in any order")
        dataset = two_view_dataset(rows, preset, image_size, num_points, seed)
        collate = TwoViewCollator()
        keys = sample_keys(dataset, num_rows)
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=keys,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=True,
        )
        name = f"loader, {workers} worker{'s' if workers > 1 else ''}"
        torch.set_num_threads(1)
        try:
            timings = time_interleaved(_single_thread_passes(dataset, keys, collate, batch_size), cpu, repeats)
            timings |= time_interleaved({name: lambda: _exhaust(loader)}, cpu, repeats)
        finally:
            torch.set_num_threads(threads)

    table = [
        {
            "part": part,
            "rows_per_second": num_rows / timing.seconds,
            "seconds": timing.seconds / num_rows,
            "of_decode_and_resize": timings[DECODE_RESIZE].seconds / timing.seconds,
        }
        for part, timing in timings.items()
    ]
    return conclude(
        name="training data",
        settings={
            "data": source,
            "preset": preset,
            "image_size": list(image_size),
            "num_points": num_points,
            "num_rows": num_rows,
            "batch_size": batch_size,
            "repeats": repeats,
            "seed": seed,
        },
        rows=table,
        summary={"worker_over_decode_and_resize": timings[WORKER].seconds / timings[DECODE_RESIZE].seconds},
        device=cpu,
        json_path=json_path,
    )


def available_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _single_thread_passes(
    dataset: TwoViewDataset, keys: list[tuple[int, int]], collate: TwoViewCollator, batch_size: int
) -> dict[str, Callable[[], object]]:
    """One pass over the rows each: the images alone, and whole batches."""
    encoded = dataset.rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
    files = [encoded[index]["image"] for _, index in keys]
    images = [file["bytes"] if file["bytes"] is not None else _read(file["path"]) for file in files]
    processor = dataset.processor

    def decode() -> None:
        for data in images:
            processor.image_processor.load_image(Image.open(BytesIO(data)))

    def decode_and_resize() -> None:
        settings = processor.image_processor
        for data in images:
            image = processor.image_processor.load_image(Image.open(BytesIO(data)))
            height, width = settings.output_size(tuple(image.shape[-2:]))
            settings.resize(image, SizeDict(height=height, width=width), settings.resample)

    def make_batches() -> None:
        for start in range(0, len(keys), batch_size):
            collate([dataset[key] for key in keys[start : start + batch_size]])

    return {DECODE: decode, DECODE_RESIZE: decode_and_resize, WORKER: make_batches}


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _exhaust(loader: DataLoader) -> None:
    for _ in loader:
        pass
