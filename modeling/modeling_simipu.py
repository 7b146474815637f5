"""SimIPU (Li et al., AAAI 2022): spatial-aware visual features from unlabelled camera + LiDAR pairs."""

import os
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .configuration_simipu import PointConfig, SimIPUConfig, SimIPUPointNet2Config
from .geometry import (
    inside_image,
    invert_transform,
    project_points,
    sample_feature_maps,
    transform_points,
)
from .image_encoder import build_image_encoder, feature_channels, image_feature_maps
from .layers import LinearBlock, ProjectionHead, WeightedBatchNorm, linear, run_blocks
from .losses import ContrastiveResult, contrastive_loss
from .matching import PendingMatch
from .outputs_simipu import PointEncoderOutput, SimIPUForPreTrainingOutput, SimIPUModelOutput
from .pointnet2 import PointNet2Encoder, gather_rows


class SimIPUPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the SimIPU models."""

    config: SimIPUConfig
    base_model_prefix = "simipu"
    main_input_name = "pixel_values"
    input_modalities = ["image", "point_cloud"]  # noqa: RUF012
    supports_gradient_checkpointing = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's default for linear layers, as the official code; He et al. (2015) for convolutions.

        A timm model built outside the meta device keeps timm's own initialisation. transformers only comes here
        with modules that hold parameters or buffers themselves.
        """
        init_buffers = getattr(module, "init_non_persistent_buffers", None)
        if init_buffers is not None:
            init_buffers()
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, WeightedBatchNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif type(module).__module__.startswith("spconv."):
            from .sparse_encoder import init_sparse_conv_weights

            init_sparse_conv_weights(module)
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        # one folder serves both classes, whichever of them saved it
        self.config.auto_map = {
            "AutoModel": "modeling_simipu.SimIPUModel",
            "AutoModelForPreTraining": "modeling_simipu.SimIPUForPreTraining",
        }
        super().save_pretrained(save_directory, *args, **kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        cast("SimIPUModel", self.base_model).image_encoder.set_grad_checkpointing(enable)


class SimIPUModel(SimIPUPreTrainedModel):
    """The two encoders, without the pre-training heads.

    Attributes:
        image_encoder: a plain timm model; what the pre-training is for.
        point_encoder: PointNet++ or a sparse convolution network.
    """

    _keys_to_ignore_on_load_unexpected = [r"^(intra_point|inter_image|inter_point)_head\."]  # noqa: RUF012

    def __init__(self, config: SimIPUConfig) -> None:
        super().__init__(config)
        self.image_encoder = build_image_encoder(config.image_encoder_config)
        self.point_encoder = build_point_encoder(config.point_encoder_config)
        keep_initialization(self.image_encoder)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Feature maps of the configured stages, finest first.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised by the processor.

        Returns:
            One `(B, C_s, H_s, W_s)` a stage.
        """
        return image_feature_maps(self.image_encoder, pixel_values, self.config.image_encoder_config.out_indices)

    def get_point_features(self, points: torch.Tensor) -> PointEncoderOutput:
        """Features of the points that the point encoder keeps.

        Args:
            points: `(B, N, 4)`, x y z in metres and reflectance.
        """
        return self.point_encoder(points)

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, points: torch.Tensor | None = None, **kwargs: Any
    ) -> SimIPUModelOutput | tuple:
        """Encodes images, clouds, or both.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised by the processor.
            points: `(B, N, 4)`, x y z in metres and reflectance.

        Raises:
            ValueError: neither input is given.
        """
        if pixel_values is None and points is None:
            raise ValueError("SimIPUModel needs pixel_values, points, or both; both are missing")
        return SimIPUModelOutput(
            image_features=None if pixel_values is None else self.get_image_features(pixel_values),
            point_output=None if points is None else self.get_point_features(points),
        )


class SimIPUForPreTraining(SimIPUPreTrainedModel):
    """SimIPU with its projection heads and both losses.

    Let f be the features of M points at x in the un-augmented view, f' those at x' in the augmented one.

    * Intra-modal: bring x' back, match x to it one-to-one (Hungarian), and pull g(f) to g(f') of its match.
    * Inter-modal: project x into the image, sample the image features there, and pull them to h(f).

    Every other point of the batch is a negative. Source: Li et al. (2022) and the official
    `inter_intro_decorator_moco_better.py`.
    """

    def __init__(self, config: SimIPUConfig) -> None:
        super().__init__(config)
        self.simipu = SimIPUModel(config)
        image_channels = sum(feature_channels(self.simipu.image_encoder, config.image_encoder_config.out_indices))
        point_channels = config.point_encoder_config.output_channels
        widths = (config.projection_dim, config.projection_hidden_dim)
        self.intra_point_head = ProjectionHead(point_channels, *widths)
        self.inter_image_head = ProjectionHead(image_channels, *widths)
        self.inter_point_head = ProjectionHead(point_channels, *widths)
        if config.inter_modal_point_gradient == "none":
            self.inter_point_head.requires_grad_(False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        points: torch.Tensor,
        points_aug: torch.Tensor,
        lidar_to_aug: torch.Tensor,
        lidar_to_pixel: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SimIPUForPreTrainingOutput | tuple:
        """One pre-training step's losses.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised, padded at the bottom and right to the batch's largest.
            points: `(B, N, 4)`, the un-augmented view: x y z in metres, reflectance.
            points_aug: `(B, N, 4)`, the augmented view.
            lidar_to_aug: `(B, 4, 4)`, un-augmented to augmented coordinates.
            lidar_to_pixel: `(B, 3, 4)`, un-augmented coordinates to pixels of `pixel_values`.
            image_sizes: `(B, 2)` int, height and width of each image before padding; the whole of
                `pixel_values` where omitted.
        """
        point_output = self.simipu.get_point_features(points)
        # the augmented view only yields detached keys: without gradient it costs a third and changes nothing
        with torch.no_grad():
            point_aug_output = self.simipu.get_point_features(points_aug)
            pending_match = self._start_matching(point_output, point_aug_output, lidar_to_aug)

        image_features = self.simipu.get_image_features(pixel_values)
        padded_sizes = _padded_sizes(pixel_values)
        inter, in_image, image_embeds, point_embeds = self._inter_modal(
            image_features,
            point_output,
            lidar_to_pixel,
            padded_sizes,
            padded_sizes if image_sizes is None else image_sizes,
        )
        match, distance = pending_match.result()
        intra = self._intra_modal(point_output, point_aug_output, match, distance)

        config = self.config
        return SimIPUForPreTrainingOutput(
            loss=config.intra_modal_weight * intra.loss + config.inter_modal_weight * inter.loss,
            intra_modal_loss=intra.loss,
            inter_modal_loss=inter.loss,
            intra_modal_chance=intra.chance,
            inter_modal_chance=inter.chance,
            intra_modal_top1=intra.accuracy(1),
            intra_modal_top5=intra.accuracy(5),
            inter_modal_top1=inter.accuracy(1),
            inter_modal_top5=inter.accuracy(5),
            inter_modal_top10_percent=inter.accuracy_percent(10),
            inter_modal_top50_percent=inter.accuracy_percent(50),
            match_distance=_masked_mean(distance, distance.isfinite()),
            pairs_in_image=_masked_mean(in_image.float(), _slots(point_output)),
            image_embeds=image_embeds,
            point_embeds=point_embeds,
            match=match,
            image_features=image_features,
            point_output=point_output,
            point_aug_output=point_aug_output,
        )

    def _start_matching(
        self, view: PointEncoderOutput, augmented: PointEncoderOutput, lidar_to_aug: torch.Tensor
    ) -> PendingMatch:
        back = invert_transform(lidar_to_aug).to(augmented.coordinates.dtype)
        brought_back = transform_points(augmented.coordinates, back)
        return PendingMatch(view.coordinates, brought_back, view.mask, augmented.mask)

    def _inter_modal(
        self,
        image_features: tuple[torch.Tensor, ...],
        point_output: PointEncoderOutput,
        lidar_to_pixel: torch.Tensor,
        padded_sizes: torch.Tensor,
        image_sizes: torch.Tensor,
    ) -> tuple[ContrastiveResult, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss, which points project into their image `(B, M)`, and both embeddings `(B, M, D)`."""
        config = self.config
        coordinates = point_output.coordinates
        pixels, depth = project_points(coordinates, lidar_to_pixel.to(coordinates.dtype))
        in_image = inside_image(pixels, depth, image_sizes)
        valid = _slots(point_output)
        if config.mask_out_of_image:
            valid = valid & in_image
        per_sample = config.projection_normalization == "sample"
        covered = (image_sizes + 31) // 32 * 32 if per_sample else padded_sizes
        image_embeds = self._project_image(image_features, pixels, covered, valid)
        point_rows = point_output.features
        if config.inter_modal_point_gradient != "encoder":
            point_rows = point_rows.detach()
        point_embeds = _project(self.inter_point_head, point_rows, valid)
        result = contrastive_loss(
            image_embeds.flatten(0, 1),
            point_embeds.flatten(0, 1),
            config.temperature,
            valid.flatten(),
            symmetric=config.symmetric_inter_modal_loss,
            gather=config.gather_negatives,
        )
        return result, in_image, image_embeds, point_embeds

    def _project_image(
        self,
        image_features: tuple[torch.Tensor, ...],
        pixels: torch.Tensor,
        covered: torch.Tensor,
        valid: torch.Tensor,
    ) -> torch.Tensor:
        """Image head `(B, M, D)` on the features sampled at `pixels`, of maps that cover `covered` pixels.

        Sampling is linear: of a map with fewer cells than there are points, the head's first layer runs on the cells.
        """
        first, *others = self.inter_image_head.layers
        assert isinstance(first, LinearBlock)
        weights = first.linear.weight.split([m.shape[1] for m in image_features], dim=1)
        # where points outside are left out, the outer half of the border cells must not fade to zero
        padding_mode = "border" if self.config.mask_out_of_image else "zeros"
        sampling = pixels, covered, self.config.align_corners, padding_mode
        rows: torch.Tensor = first.linear.bias
        for feature_map, weight in zip(image_features, weights, strict=True):
            if feature_map[0, 0].numel() < pixels.shape[1]:
                projected = F.conv2d(feature_map.to(weight.dtype), weight[..., None, None])
                rows = rows + sample_feature_maps([projected], *sampling).flatten(0, 1)
            else:
                sampled = sample_feature_maps([feature_map], *sampling).flatten(0, 1)
                rows = rows + linear(sampled.to(weight.dtype), weight)
        counts = valid.flatten()
        rows = first.normalize(rows.to(first.linear.weight.dtype), counts)
        return run_blocks(others, rows, counts).unflatten(0, valid.shape)

    def _intra_modal(
        self, view: PointEncoderOutput, augmented: PointEncoderOutput, match: torch.Tensor, distance: torch.Tensor
    ) -> ContrastiveResult:
        limit = self.config.max_match_distance
        valid = distance.isfinite() if limit is None else distance <= limit
        queries = _project(self.intra_point_head, view.features, valid)
        with torch.no_grad():
            keys = _project(self.intra_point_head, gather_rows(augmented.features, match), valid)
        return contrastive_loss(
            queries.flatten(0, 1),
            keys.flatten(0, 1),
            self.config.temperature,
            valid.flatten(),
            gather=self.config.gather_negatives,
        )


def build_point_encoder(config: PointConfig) -> nn.Module:
    """The point encoder of a configuration.

    It is told by its `model_type`: remote code loaded from a folder has its own copies of the classes.

    Raises:
        ImportError: the sparse encoder is asked for and spconv is not installed.
    """
    if config.model_type == "simipu_sparse_conv":
        from .sparse_encoder import SparseConvEncoder  # importing spconv takes seconds

        return SparseConvEncoder(config)
    return PointNet2Encoder(cast("SimIPUPointNet2Config", config))


def keep_initialization(module: nn.Module) -> None:
    """Marks the tensors of `module` as initialised, unless it was built on the meta device."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' own mark


def _slots(point_output: PointEncoderOutput) -> torch.Tensor:
    """`(B, M)` bool, which slots hold a point."""
    if point_output.mask is not None:
        return point_output.mask
    return torch.ones(point_output.features.shape[:2], dtype=torch.bool, device=point_output.features.device)


def _padded_sizes(pixel_values: torch.Tensor) -> torch.Tensor:
    """`(B, 2)`, the height and width of `pixel_values` for each image."""
    batch, _, height, width = pixel_values.shape
    size = torch.full((batch, 2), height, device=pixel_values.device)
    size[:, 1] = width
    return size


def _project(head: ProjectionHead, features: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Runs a head on `(B, M, C)`; rows that are not valid do not count in its batch statistics."""
    dtype = next(head.parameters()).dtype
    rows = head(features.flatten(0, 1).to(dtype), valid.flatten())
    return rows.unflatten(0, valid.shape)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


SimIPUModel.register_for_auto_class("AutoModel")
SimIPUForPreTraining.register_for_auto_class("AutoModelForPreTraining")
