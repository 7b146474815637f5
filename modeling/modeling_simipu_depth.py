"""Monocular depth from any timm image encoder: a DenseDepth-style decoder on its pyramid.

Recipe of the published fine-tuning (`densedepth_head.py` and `sigloss.py` of the depth toolbox, after Alhashim and
Wonka 2018 and Eigen et al. 2014).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import DepthEstimatorOutput
from transformers.utils import can_return_tuple

from .configuration_simipu import SimIPUImageConfig
from .configuration_simipu_depth import SimIPUDepthConfig
from .image_encoder import TimmModel, build_image_encoder, feature_channels, image_feature_maps


class UpSample(nn.Module):
    """Enlarge the coarser map to the finer one, concatenate, two 3 x 3 convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels + skip_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, hidden: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        hidden = torch.cat([_resize(hidden, skip.shape[-2:]), skip], dim=1)
        return self.conv2(self.conv1(hidden).relu()).relu()


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
        self.to_depth = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, pyramid: Sequence[torch.Tensor]) -> torch.Tensor:
        """`(B, 1, H_0, W_0)`, metres."""
        hidden = self.project(pyramid[-1])
        for block, skip in zip(self.blocks, reversed(pyramid[:-1]), strict=True):
            hidden = block(hidden, skip)
        return torch.sigmoid(self.to_depth(hidden)) * self.max_depth


class SimIPUForDepthEstimation(PreTrainedModel):
    """An image encoder and a depth decoder.

    Attributes:
        image_encoder: the plain timm model, as in pre-training.
        decoder: [`DenseDepthDecoder`].
        out_indices: the stages given to the decoder, counted from the front.

    Raises:
        ValueError: the configuration names stages or decoder widths that do not fit the encoder.
    """

    config: SimIPUDepthConfig
    base_model_prefix = "simipu_depth"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True

    def __init__(self, config: SimIPUDepthConfig):
        super().__init__(config)
        self.image_encoder = build_image_encoder(config.image_encoder_config)
        if next(self.image_encoder.parameters()).device.type != "meta":
            # timm has just initialised it by the architecture's own scheme: post_init leaves it as it is
            for module in self.image_encoder.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # transformers' own mark
        self.out_indices = (
            pyramid_stages(self.image_encoder)
            if config.out_indices is None
            else sorted(index % len(self.image_encoder.feature_info) for index in config.out_indices)
        )
        in_channels = feature_channels(self.image_encoder, self.out_indices)
        channels = config.decoder_channels
        if channels is None:
            channels = [max(in_channels[-1] // 2**step, 16) for step in range(1, len(in_channels))]
        if len(channels) != len(in_channels) - 1:
            raise ValueError(
                f"decoder_channels has {len(channels)} entries for {len(in_channels)} stages: "
                "give one fewer than stages"
            )
        self.decoder = DenseDepthDecoder(in_channels, channels, config.max_depth)
        self._freeze = False
        self.post_init()

    @classmethod
    def from_image_encoder(cls, image_encoder: nn.Module, **config_fields: Any) -> "SimIPUForDepthEstimation":
        """A depth model with the weights of a timm model and a new decoder.

        Args:
            image_encoder: a plain timm model, such as `timm.create_model("resnet50", pretrained=True)`.
            config_fields: fields of [`SimIPUDepthConfig`]; `image_config` adds `model_args` where the timm model was
                created with some.

        Raises:
            ValueError: not a timm model, or its weights do not fit a newly built model of its architecture.
        """
        timm_config = getattr(image_encoder, "pretrained_cfg", None) or {}
        if "architecture" not in timm_config:
            raise ValueError(f"expected a model made by timm.create_model, found {type(image_encoder).__name__}")
        norms = [module for module in image_encoder.modules() if isinstance(module, nn.BatchNorm2d)]
        image_fields = {
            "architecture": timm_config["architecture"],
            # the weights were trained with these, which need not be the architecture's defaults
            "batch_norm_eps": norms[0].eps if norms else None,
            "batch_norm_momentum": norms[0].momentum if norms else None,
            **config_fields.pop("image_config", {}),
        }
        model = cls(SimIPUDepthConfig(image_config=SimIPUImageConfig(**image_fields), **config_fields))
        weights = image_encoder.state_dict()
        expected = model.image_encoder.state_dict()
        # a classifier is no part of the encoder
        surplus = {name for name in weights if name not in expected}
        missing = [name for name in expected if name not in weights]
        if missing or any(not name.startswith(("fc.", "head.", "classifier.")) for name in surplus):
            raise ValueError(
                f"the weights do not fit {timm_config['architecture']}: missing {missing[:3]}, unexpected "
                f"{sorted(surplus)[:3]}; pass the model_args it was created with as image_config"
            )
        model.image_encoder.load_state_dict({name: weights[name] for name in expected})
        return model

    def freeze_image_encoder(self, freeze: bool = True) -> None:
        """Train the decoder alone: the encoder gets no gradient and stays in evaluation mode (a probe)."""
        self._freeze = freeze
        self.image_encoder.requires_grad_(not freeze)
        self.train(self.training)

    def train(self, mode: bool = True) -> "SimIPUForDepthEstimation":
        super().train(mode)
        if self._freeze:
            self.image_encoder.eval()
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DepthEstimatorOutput:
        """Predict depth, and the loss where `labels` are given.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised.
            labels: `(B, H', W')`, metres, 0 where unknown.

        Returns:
            `predicted_depth` is `(B, H, W)`, or `(B, H', W')` with labels, in metres; `loss` as in [`silog_loss`].
        """
        pyramid = image_feature_maps(self.image_encoder, pixel_values, self.out_indices)
        size = pixel_values.shape[-2:] if labels is None else labels.shape[-2:]
        depth = _resize(self.decoder(pyramid), size)[:, 0]
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
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        init_buffers = getattr(module, "init_non_persistent_buffers", None)
        if init_buffers is not None:
            init_buffers()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.image_encoder.set_grad_checkpointing(enable)


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
    # the square root has no finite gradient at 0
    return torch.where((count > 1) & (squared > 0), squared, 1).sqrt() * ((count > 1) & (squared > 0))


def pyramid_stages(encoder: TimmModel) -> list[int]:
    """Stages of a timm model that make a pyramid: the last of every resolution, finest first.

    Four evenly spaced stages, the last among them, where all have one resolution.
    """
    reductions = [stage["reduction"] for stage in encoder.feature_info]
    stages = [i for i, reduction in enumerate(reductions) if reduction not in reductions[i + 1 :]]
    if len(stages) > 1:
        return stages
    count = min(4, len(reductions))
    return [len(reductions) * (step + 1) // count - 1 for step in range(count)]


def _resize(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear with aligned corners, as the recipe does."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return nn.functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


SimIPUForDepthEstimation.register_for_auto_class("AutoModelForDepthEstimation")
