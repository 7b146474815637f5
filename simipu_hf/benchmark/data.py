"""`simipu-hf benchmark data`: how many samples a second the workers make, against decoding their images alone.

What decoding and resizing alone take is given twice: with Pillow, as most loaders decode, and as this one does.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import datasets
import torch
from PIL import Image
from torch.utils.data import DataLoader

from simipu_hf.data.rows import pixels_from_row
from simipu_hf.data.two_views import TwoViewCollator, TwoViewDataset
from simipu_hf.machine import available_processors
from simipu_hf.training.arguments import BenchmarkDataArguments

from .inputs import described, sample_keys, two_view_dataset
from .measure import BenchmarkResult, median_seconds

PILLOW_RESIZE = "decode and resize the image with Pillow"
RESIZE = "decode and resize it as the loader does"
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
        # a few batches for every worker: a rate, and not how long the first takes
        loaded = sample_keys(dataset, max(arguments.num_rows, 4 * arguments.batch_size * workers))
        loader = DataLoader(
            dataset,
            batch_size=arguments.batch_size,
            sampler=loaded,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=True,
        )
        torch.set_num_threads(1)
        try:
            passes = _single_thread_passes(dataset, keys, collate, arguments.batch_size)
            counts = dict.fromkeys(passes, arguments.num_rows)
            whole = f"loader, {workers} worker{'s' if workers > 1 else ''}"
            passes[whole], counts[whole] = lambda: [None for _ in loader], len(loaded)
            taken = median_seconds(passes, arguments.repeats)
            seconds = {part: taken[part] / counts[part] for part in passes}
        finally:
            torch.set_num_threads(threads)
    rows = [
        {
            "part": part,
            "rows_per_second": 1 / each,
            "seconds": each,
            "over_pillow_and_resize": each / seconds[PILLOW_RESIZE],
        }
        for part, each in seconds.items()
    ]
    summary = {
        "worker_over_pillow_and_resize": seconds[WORKER] / seconds[PILLOW_RESIZE],
        "worker_over_decode_and_resize": seconds[WORKER] / seconds[RESIZE],
    }
    return BenchmarkResult("training data", described(arguments), rows, summary)


def _single_thread_passes(
    dataset: TwoViewDataset, keys: list[tuple[int, int]], collate: TwoViewCollator, batch_size: int
) -> dict[str, Callable[[], object]]:
    """One pass over the rows each: the images alone, and whole batches."""
    for _, index in keys:
        dataset.read_row(index)  # names one that cannot be used
    encoded = dataset.rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
    files = [encoded[index]["image"] for _, index in keys]
    images = [Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"] for file in files]
    processor = dataset.processor.image_processor

    def pillow_and_resize() -> None:
        for data in images:
            processor.resize_image(processor.load_image(Image.open(BytesIO(data))))

    def decode_and_resize() -> None:
        for data in images:
            row = {"image": {"bytes": data, "path": None}}
            processor.resize_image(processor.load_image(pixels_from_row(row)))

    def make_batches() -> None:
        for start in range(0, len(keys), batch_size):
            collate([dataset[key] for key in keys[start : start + batch_size]])

    return {PILLOW_RESIZE: pillow_and_resize, RESIZE: decode_and_resize, WORKER: make_batches}
