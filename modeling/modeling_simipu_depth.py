"""Monocular depth from any timm image encoder: a DenseDepth-style decoder on its pyramid.

Recipe of the published fine-tuning (`densedepth_head.py` and `sigloss.py` of the depth toolbox, after Alhashim and
Wonka 2018 and Eigen et al. 2014).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import DepthEstimatorOutput
from transformers.utils import can_return_tuple

from .configuration_simipu import SimIPUDepthConfig
from .dense_model import SimIPUDenseModel
from .image_encoder import pad_to_divisor


class UpSample(nn.Module):
    """Enlarge the coarser map to the finer one, concatenate, two 3 x 3 convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels + skip_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, hidden: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        hidden = torch.cat([_resize(hidden, skip.shape[-2:]), skip], dim=1)
        return self.conv2(self.conv1(hidden).relu()).relu()


class PreciseConv2d(nn.Conv2d):
    """Computed in single precision at least: the eight bits of a bfloat16 make a few dozen depths in all."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dtype.itemsize >= 4:
            return super().forward(hidden)
        assert self.bias is not None
        with torch.autocast(hidden.device.type, enabled=False):
            return self._conv_forward(hidden.float(), self.weight.float(), self.bias.float())


class DenseDepthDecoder(nn.Module):
    """Feature pyramid, finest first, to depth in (0, `max_depth`) at the finest map's resolution.

    Args:
        in_channels: of each map of the pyramid.
        channels: of each upsampling block, one fewer than maps.
        max_depth: metres.
    """

    def __init__(self, in_channels: Sequence[int], channels: Sequence[int], max_depth: float):
        super().__init__()
        self.max_depth = max_depth
        self.project = nn.Conv2d(in_channels[-1], in_channels[-1], 1)
        widths = [in_channels[-1], *channels]
        skips = list(reversed(in_channels[:-1]))
        self.blocks = nn.ModuleList(
            UpSample(width, skip, out) for width, skip, out in zip(widths[:-1], skips, channels, strict=True)
        )
        self.to_depth = PreciseConv2d(widths[-1], 1, 3, padding=1)

    def forward(self, pyramid: Sequence[torch.Tensor]) -> torch.Tensor:
        """`(B, 1, H_0, W_0)`, metres."""
        hidden = self.project(pyramid[-1])
        for block, skip in zip(self.blocks, reversed(pyramid[:-1]), strict=True):
            hidden = block(hidden, skip)
        return torch.sigmoid(self.to_depth(hidden)) * self.max_depth


class SimIPUForDepthEstimation(SimIPUDenseModel):
    """An image encoder and a depth decoder.

    Attributes:
        image_encoder, pyramid: as in [`SimIPUDenseModel`].
        decoder: [`DenseDepthDecoder`].

    Raises:
        ValueError: the configuration names stages or decoder widths that do not fit the encoder.

        >>> model = SimIPUForDepthEstimation(SimIPUDepthConfig(image_config={"architecture": "resnet50"}))
        >>> model(pixel_values).predicted_depth  # (B, H, W), metres
    """

    config: SimIPUDepthConfig
    base_model_prefix = "simipu_depth"

    def __init__(self, config: SimIPUDepthConfig):
        super().__init__(config)
        in_channels = self.pyramid.channels
        channels = config.decoder_channels
        if channels is None:
            channels = [max(in_channels[-1] // 2**step, 16) for step in range(1, len(in_channels))]
        if len(channels) != len(in_channels) - 1:
            raise ValueError(
                f"decoder_channels has {len(channels)} entries for {len(in_channels)} stages: "
                "give one fewer than stages"
            )
        self.decoder = DenseDepthDecoder(in_channels, channels, config.max_depth)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> DepthEstimatorOutput:
        """Predict depth, and the loss where `labels` are given.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised.
            labels: `(B, H', W')`, metres, 0 where unknown.

        Returns:
            `predicted_depth` is `(B, H, W)`, or `(B, H', W')` with labels, in metres; `loss` as in [`silog_loss`].
        """
        padded = pad_to_divisor(pixel_values, self.image_encoder)
        depth = self.decoder(self.pyramid(self.image_encoder, padded))
        if padded.shape != pixel_values.shape:
            height, width = pixel_values.shape[-2:]
            depth = _resize(depth, padded.shape[-2:])[..., :height, :width]
        depth = _resize(depth, pixel_values.shape[-2:] if labels is None else labels.shape[-2:])[:, 0]
        loss = None
        if labels is not None:
            loss = silog_loss(depth, labels, self.config.silog_epsilon, self.config.silog_mean_weight)
        return DepthEstimatorOutput(loss=loss, predicted_depth=depth)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d) and module is getattr(self.decoder, "to_depth", None):
            # starts near half the depth range everywhere: a larger spread saturates the sigmoid
            init.normal_(module.weight, std=0.01)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


def silog_loss(
    prediction: torch.Tensor, target: torch.Tensor, epsilon: float = 1e-3, mean_weight: float = 0.15
) -> torch.Tensor:
    """Scale-invariant log loss of the published recipe (`sigloss.py`).

    With g = ln(prediction + epsilon) - ln(target + epsilon) over all pixels of the batch whose target is above 0,
    `sqrt(Var(g) + mean_weight * mean(g)²)`, the variance unbiased. 0 where the batch has fewer than two such pixels.

    Args:
        prediction, target: metres, same shape; computed in float32 at least.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    prediction, target = prediction.to(dtype), target.to(dtype)
    valid = target > 0
    g = torch.where(valid, torch.log(prediction + epsilon) - torch.log(target.clamp(min=0) + epsilon), 0)
    count = valid.sum()
    mean = g.sum() / count.clamp(min=1)
    variance = torch.where(valid, g - mean, 0).square().sum() / (count - 1).clamp(min=1)
    squared = variance + mean_weight * mean.square()
    # the square root has no finite gradient at 0; what is no number must stay none
    zero = (count < 2) | (squared <= 0)
    return torch.where(zero, 1, squared).sqrt() * ~zero


def _resize(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear with aligned corners, as the recipe does."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return nn.functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


SimIPUForDepthEstimation.register_for_auto_class("AutoModelForDepthEstimation")
