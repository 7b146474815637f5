"""Weights of models and of folders, compared to the bit."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

Weights = Mapping[str, torch.Tensor] | nn.Module | Path


def weights(of: Weights) -> Mapping[str, torch.Tensor]:
    """Of a model, or of one that is saved in a folder."""
    if isinstance(of, Path):
        return load_file(of / "model.safetensors")
    return of.state_dict() if isinstance(of, nn.Module) else of


def assert_same_weights(first: Weights, second: Weights) -> None:
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)
