"""`simipu-hf benchmark data`: how many samples a second the workers make, against decoding their images alone."""

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import datasets
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.image_utils import SizeDict

from simipu_hf.data.two_views import TwoViewCollator, TwoViewDataset
from simipu_hf.training.arguments import BenchmarkDataArguments

from .inputs import described, sample_keys, two_view_dataset
from .measure import BenchmarkResult, median_seconds

DECODE = "decode the image"
DECODE_RESIZE = "decode and resize the image"
WORKER = "two-view batches, one worker"


def benchmark_data(arguments: BenchmarkDataArguments) -> BenchmarkResult:
    """Rows per second: the two-view batches of one worker, and of the loader with several, against decoding alone.

    What one worker does, samples and their collation, is measured in this process, on one thread, as PyTorch gives a
    worker.

    Raises:
        SimIPUError: data that cannot be used.
    """
    workers = arguments.num_workers or available_processors()
    threads = torch.get_num_threads()
    with two_view_dataset(arguments, arguments.image_size, min(arguments.num_rows, 4)) as dataset:
        keys = sample_keys(dataset, arguments.num_rows)
        collate = TwoViewCollator()
        loader = DataLoader(
            dataset,
            batch_size=arguments.batch_size,
            sampler=keys,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=True,
        )
        torch.set_num_threads(1)
        try:
            passes = _single_thread_passes(dataset, keys, collate, arguments.batch_size)
            passes[f"loader, {workers} worker{'s' if workers > 1 else ''}"] = lambda: [None for _ in loader]
            seconds = median_seconds(passes, arguments.repeats)
        finally:
            torch.set_num_threads(threads)
    rows = [
        {
            "part": part,
            "rows_per_second": arguments.num_rows / taken,
            "seconds": taken / arguments.num_rows,
            "of_decode_and_resize": seconds[DECODE_RESIZE] / taken,
        }
        for part, taken in seconds.items()
    ]
    summary = {"worker_over_decode_and_resize": seconds[WORKER] / seconds[DECODE_RESIZE]}
    return BenchmarkResult("training data", described(arguments), rows, summary)


def available_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _single_thread_passes(
    dataset: TwoViewDataset, keys: list[tuple[int, int]], collate: TwoViewCollator, batch_size: int
) -> dict[str, Callable[[], object]]:
    """One pass over the rows each: the images alone, and whole batches."""
    encoded = dataset.rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
    files = [encoded[index]["image"] for _, index in keys]
    images = [Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"] for file in files]
    processor = dataset.processor.image_processor

    def decode() -> None:
        for data in images:
            processor.load_image(Image.open(BytesIO(data)))

    def decode_and_resize() -> None:
        for data in images:
            image = processor.load_image(Image.open(BytesIO(data)))
            height, width = processor.output_size(tuple(image.shape[-2:]))
            processor.resize(image, SizeDict(height=height, width=width), processor.resample)

    def make_batches() -> None:
        for start in range(0, len(keys), batch_size):
            collate([dataset[key] for key in keys[start : start + batch_size]])

    return {DECODE: decode, DECODE_RESIZE: decode_and_resize, WORKER: make_batches}
