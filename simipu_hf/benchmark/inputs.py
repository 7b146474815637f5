"""What the benchmarks run on: real rows where the caller has some, else a few synthetic frames."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch

from simipu_hf.data.loading import load_pretraining_dataset
from simipu_hf.data.synthetic import synthesize_drive
from simipu_hf.data.two_views import TwoViewAugmentation, TwoViewCollator, TwoViewDataset, to_model_inputs
from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.configuration_simipu import SimIPUConfig
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.training.arguments import BenchmarkArguments, parse_overrides


@contextmanager
def two_view_dataset(
    arguments: BenchmarkArguments, image_size: tuple[int, int], synthetic_frames: int = 2, pad_size_divisor: int = 32
) -> Iterator[TwoViewDataset]:
    """Samples as in pre-training, but every image in one size, so that samples cost the same."""
    try:
        processor = SimIPUProcessor.from_preset(
            arguments.preset, image_size=image_size, num_points=arguments.num_points
        )
    except ValueError as error:
        raise SimIPUError(str(error)) from error
    processor.image_processor.pad_size_divisor = pad_size_divisor
    augmentation = TwoViewAugmentation.from_preset(arguments.preset, random_resize=None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        rows = _rows(arguments, Path(folder), synthetic_frames)
        yield TwoViewDataset(rows, processor, augmentation, seed=arguments.seed)


def _rows(arguments: BenchmarkArguments, folder: Path, synthetic_frames: int) -> datasets.Dataset:
    if arguments.data_dir is not None or arguments.dataset_name is not None:
        return load_pretraining_dataset(arguments.dataset_name, arguments.data_dir)
    drive = synthesize_drive(folder / "drive", synthetic_frames, val_fraction=0, test_fraction=0, num_workers=0)
    return load_pretraining_dataset(data_dir=drive, cache_dir=folder / "cache")


def training_batch(dataset: TwoViewDataset, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The first batch of a data set, on the device."""
    image_processor = dataset.processor.image_processor
    collate = TwoViewCollator(image_processor.pad_size_divisor)
    batch = collate([dataset[key] for key in sample_keys(dataset, batch_size)])
    return to_model_inputs({name: tensor.to(device) for name, tensor in batch.items()}, image_processor)


def sample_keys(dataset: TwoViewDataset, count: int) -> list[tuple[int, int]]:
    """`count` keys of samples; a data set with fewer rows serves them again in the next epoch."""
    return [divmod(k, len(dataset)) for k in range(count)]


def create_config(preset: str, config_overrides: str | None, **overrides: Any) -> SimIPUConfig:
    """A preset's configuration; `config_overrides` come last, their sub-configurations merged."""
    try:
        for name, value in parse_overrides(config_overrides).items():
            overrides[name] = {**overrides.get(name, {}), **value} if isinstance(value, dict) else value
        return SimIPUConfig.from_preset(preset, **overrides)
    except ValueError as error:
        raise SimIPUError(str(error)) from error


def described(arguments: BenchmarkArguments) -> dict[str, Any]:
    """The settings of a benchmark, for its result."""
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    source = settings.pop("dataset_name") or settings.pop("data_dir", None)
    return {"data": source or "synthetic frames", **settings}
