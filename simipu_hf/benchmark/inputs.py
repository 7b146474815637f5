"""What the benchmarks run on: real rows where the caller has some, else a few synthetic frames."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import datasets
import torch
from PIL import Image

from simipu_hf.data.augmentation import TwoViewAugmentation
from simipu_hf.data.collate import TwoViewCollator, to_model_inputs
from simipu_hf.data.loading import load_pretraining_dataset
from simipu_hf.data.pretraining_dataset import TwoViewDataset
from simipu_hf.data.rows import dataset_from_rows, to_row
from simipu_hf.data.synthetic.frame import synthesize_frame
from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.configuration_simipu import SimIPUConfig
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


@contextmanager
def benchmark_rows(
    data_dir: str | None, dataset_name: str | None, synthetic_frames: int
) -> Iterator[tuple[datasets.Dataset, str]]:
    """Rows of the data contract and where they come from; without a data set `synthetic_frames` synthetic ones."""
    if data_dir is not None or dataset_name is not None:
        yield load_pretraining_dataset(dataset_name, data_dir), str(dataset_name or data_dir)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        rows = dataset_from_rows((_synthetic_row(step) for step in range(synthetic_frames)), folder)
        yield rows, f"{synthetic_frames} synthetic frame{'s' if synthetic_frames > 1 else ''}"


def _synthetic_row(step: int) -> dict:
    frame = synthesize_frame((0,), step)
    png = BytesIO()
    Image.fromarray(frame.image).save(png, "PNG")
    calibration = frame.calibration
    return to_row(f"synthetic {step}", png.getvalue(), frame.points, calibration.P2, calibration.lidar_to_camera)


def two_view_dataset(
    rows: datasets.Dataset, preset: str, image_size: Sequence[int] | None, num_points: int, seed: int = 0
) -> TwoViewDataset:
    """The training set as pre-training reads it, but every image in one size, so that samples cost the same."""
    try:
        processor = SimIPUProcessor.from_preset(preset, image_size=image_size, num_points=num_points)
    except ValueError as error:
        raise SimIPUError(str(error)) from error
    return TwoViewDataset(rows, processor, TwoViewAugmentation.from_preset(preset, random_resize=None), seed=seed)


def sample_keys(dataset: TwoViewDataset, count: int) -> list[tuple[int, int]]:
    """`count` keys of samples; a data set with fewer rows serves them again in the next epoch."""
    return [divmod(k, len(dataset)) for k in range(count)]


def training_batch(dataset: TwoViewDataset, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The first batch of a data set, on the device."""
    batch = TwoViewCollator()([dataset[key] for key in sample_keys(dataset, batch_size)])
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    return to_model_inputs(moved, dataset.processor.image_processor)


def create_config(preset: str, config_overrides: dict | None, **overrides: Any) -> SimIPUConfig:
    """A preset's configuration; `config_overrides` come last, their sub-configurations merged."""
    try:
        for name, value in (config_overrides or {}).items():
            overrides[name] = {**overrides.get(name, {}), **value} if isinstance(value, dict) else value
        return SimIPUConfig.from_preset(preset, **overrides)
    except ValueError as error:
        raise SimIPUError(str(error)) from error


def choose(name: str, value: str, known: Sequence[str]) -> None:
    """Raises SimIPUError unless `value` is one of `known`."""
    if value not in known:
        raise SimIPUError(f"{name}: expected one of {', '.join(known)}, found {value!r}")


def check_at_least_one(**values: int) -> None:
    """Raises SimIPUError for a value below 1."""
    for name, value in values.items():
        if value < 1:
            raise SimIPUError(f"{name}: expected at least 1, found {value}")
