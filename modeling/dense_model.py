"""What the models that fine-tune an image encoder share: the encoder, its pyramid, and how both are handled."""

from collections.abc import Sequence

from .configuration_simipu import SimIPUDenseConfig
from .image_encoder import FeaturePyramid, ImageEncoderModel, build_image_encoder, pyramid_stages, with_image_size


class SimIPUDenseModel(ImageEncoderModel):
    """An image encoder whose stages at several resolutions are read by something that predicts for every pixel.

    Attributes:
        image_encoder: the plain timm model, as in pre-training.
        pyramid: [`FeaturePyramid`], its stages at several resolutions.

    Raises:
        ValueError: the configuration names stages that the encoder does not have.
    """

    config: SimIPUDenseConfig
    input_modalities = "image"
    # the finest resolution that is read where `config.out_indices` names no stages
    finest_stride = 1

    def __init__(self, config: SimIPUDenseConfig):
        super().__init__(config)
        self.image_encoder = build_image_encoder(config.image_encoder_config)
        stages = config.out_indices
        if stages is None:
            info, usual = self.image_encoder.feature_info, pyramid_stages(self.image_encoder)
            stages = [stage for stage in usual if info[stage]["reduction"] >= self.finest_stride]
        self.pyramid = FeaturePyramid(self.image_encoder, stages)
        self._freeze = False

    def set_image_size(self, image_size: Sequence[int]) -> None:
        """Make the encoder take images of another height and width, its position embeddings interpolated."""
        self.image_encoder = with_image_size(self.image_encoder, self.config.image_encoder_config, image_size)
        self.train(self.training)

    def freeze_image_encoder(self, freeze: bool = True) -> None:
        """Train everything but the encoder: it gets no gradient and stays in evaluation mode (a probe)."""
        self._freeze = freeze
        self.image_encoder.requires_grad_(not freeze)
        self.train(self.training)

    def train(self, mode: bool = True) -> "SimIPUDenseModel":
        super().train(mode)
        if self._freeze:
            self.image_encoder.eval().requires_grad_(False)
        return self
