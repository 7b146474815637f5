"""Shared fixtures. Real frames and the reference step come from folders named by environment variables."""

import os
from pathlib import Path

import pytest

# The tests have a Hub server of their own. Cleared here because huggingface_hub reads them when it is imported.
for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(variable, None)


def pytest_configure(config: pytest.Config) -> None:
    """Results are compared to the bit, which CUDA does not give: only `pytest -m cuda` sees the GPUs."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _folder_from_env(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    return Path(value)


@pytest.fixture(scope="session")
def kitti_mini() -> Path:
    """Root of a few real KITTI object frames, in the benchmark's layout."""
    return _folder_from_env("SIMIPU_KITTI_MINI")


@pytest.fixture(scope="session")
def kitti_raw_mini() -> Path:
    """Root of a short real KITTI raw drive."""
    return _folder_from_env("SIMIPU_KITTI_RAW_MINI")


@pytest.fixture(scope="session")
def rigs() -> Path:
    """Folder with a few real frames of nuScenes and Argoverse 2, and a miniature of Waymo."""
    return _folder_from_env("SIMIPU_RIGS")


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder with one float64 training step of the official network."""
    return _folder_from_env("SIMIPU_REFERENCE")
