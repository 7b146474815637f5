"""The image encoder: a plain timm model, its stages read through `forward_intermediates`."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, cast

import timm
import torch
from torch import nn

from .configuration_simipu import SimIPUImageConfig


class TimmModel(nn.Module):
    """What is used of timm's models, for annotations: they have no class in common that declares it."""

    feature_info: Sequence[dict[str, Any]]
    forward_intermediates: Callable[..., Any]
    num_features: int
    pretrained_cfg: dict[str, Any]
    set_grad_checkpointing: Callable[[bool], None]


def build_image_encoder(config: SimIPUImageConfig) -> TimmModel:
    """A timm model without classifier, random weights, with the batch-norm constants of `config`.

    Raises:
        ValueError: timm does not know the architecture, or the architecture has no such stage.
    """
    if not timm.is_model(config.architecture):
        close = difflib.get_close_matches(config.architecture, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"timm {timm.__version__} has no model named {config.architecture!r}{hint}")
    encoder = timm.create_model(config.architecture, pretrained=False, num_classes=0, **(config.model_args or {}))
    if not hasattr(encoder, "forward_intermediates"):
        raise ValueError(f"timm model {config.architecture!r} has no forward_intermediates: choose another encoder")
    encoder = cast("TimmModel", encoder)
    stages = len(encoder.feature_info)
    for index in config.out_indices:
        if not -stages <= index < stages:
            raise ValueError(
                f"image_config.out_indices: {config.architecture} has stages 0 to {stages - 1} "
                f"(or -{stages} to -1), found {index}"
            )
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            if config.batch_norm_eps is not None:
                module.eps = config.batch_norm_eps
            if config.batch_norm_momentum is not None:
                module.momentum = config.batch_norm_momentum
    return encoder


def feature_channels(encoder: TimmModel, out_indices: Sequence[int]) -> list[int]:
    """Channels of each of the stages `out_indices`."""
    return [
        encoder.feature_info[_position(encoder, index)]["num_chs"] for index in sorted_stages(encoder, out_indices)
    ]


def image_feature_maps(
    encoder: TimmModel, pixel_values: torch.Tensor, out_indices: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """Feature maps `(B, C_s, H_s, W_s)` of the stages `out_indices`, finest first.

    Args:
        pixel_values: `(B, 3, H, W)`, normalised.
    """
    stages = sorted_stages(encoder, out_indices)
    return tuple(encoder.forward_intermediates(pixel_values, indices=stages, intermediates_only=True))


def sorted_stages(encoder: TimmModel, out_indices: Sequence[int]) -> list[int]:
    """`out_indices` counted from the front, in the order in which timm returns them."""
    return sorted(_position(encoder, index) for index in out_indices)


def _position(encoder: TimmModel, index: int) -> int:
    return index % len(encoder.feature_info)
