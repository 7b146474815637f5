"""Shared fixtures. Real frames and the reference step come from folders named by environment variables."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# The tests have a Hub server of their own. Cleared here because huggingface_hub reads them when it is imported.
for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(variable, None)


def pytest_configure(config: pytest.Config) -> None:
    """Results are compared to the bit, which CUDA does not give: only `pytest -m cuda` sees the GPUs."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def folder_from(variable: str) -> Callable[[], Path]:
    """A fixture: the folder that an environment variable names. Where it is not set, tests are skipped."""

    @pytest.fixture(scope="session")
    def folder() -> Path:
        value = os.environ.get(variable)
        return Path(value) if value else pytest.skip(f"{variable} is not set")

    return folder


kitti_mini = folder_from("SIMIPU_KITTI_MINI")  # a few real KITTI object frames, in the benchmark's layout
kitti_raw_mini = folder_from("SIMIPU_KITTI_RAW_MINI")  # a short real KITTI raw drive
rigs = folder_from("SIMIPU_RIGS")  # a few real frames of nuScenes and Argoverse 2, and a miniature of Waymo
reference = folder_from("SIMIPU_REFERENCE")  # one float64 training step of the official network
