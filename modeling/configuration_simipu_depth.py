"""Configuration of the depth model: an image encoder and a DenseDepth-style decoder."""

from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_simipu import Number, SimIPUImageConfig


@strict
class SimIPUDepthConfig(PreTrainedConfig):
    """Configuration of [`SimIPUForDepthEstimation`].

    Args:
        image_config: `SimIPUImageConfig` or a dictionary of its fields; its `out_indices` concern pre-training
            and are not used here.
        out_indices: stages given to the decoder, in timm's numbering; `None` takes the last stage of every
            resolution, or four evenly spaced ones where the encoder has a single resolution (a plain ViT).
        decoder_channels: widths of the decoder's upsampling blocks, one fewer than stages; `None` halves the last
            stage's width at each block (2048 of a ResNet-50: 1024, 512, 256, 128), never below 16.
        max_depth: the largest depth that can be predicted, in metres (80 for KITTI, 10 for indoors).
        silog_epsilon: added to both depths before the logarithm, in metres.
        silog_mean_weight: weight of the squared mean log error in the loss; 0 makes it fully scale-invariant.
    """

    model_type = "simipu_depth"
    sub_configs_defaults = {  # noqa: RUF012
        "image_config": SimIPUImageConfig,  # type: ignore[dict-item]  # transformers takes the class alone, too
    }

    image_config: dict | PreTrainedConfig | None = None
    out_indices: list[int] | tuple[int, ...] | None = None
    decoder_channels: list[int] | tuple[int, ...] | None = None
    max_depth: Number = 80.0
    silog_epsilon: Number = 1e-3
    silog_mean_weight: Number = 0.15

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)

    @property
    def image_encoder_config(self) -> SimIPUImageConfig:
        """`image_config`, whatever form it was given in."""
        return cast("SimIPUImageConfig", self.image_config)

    def validate_architecture(self) -> None:
        if self.max_depth <= 0:
            raise ValueError(f"max_depth must be above 0 metres, found {self.max_depth}")
        if self.out_indices is not None and len(self.out_indices) == 0:
            raise ValueError("out_indices is empty: name the stages given to the decoder, or use None")
        if self.silog_epsilon <= 0 or self.silog_mean_weight < 0:
            raise ValueError(
                f"silog_epsilon must be above 0 and silog_mean_weight not negative, found {self.silog_epsilon} "
                f"and {self.silog_mean_weight}"
            )


SimIPUDepthConfig.register_for_auto_class()
