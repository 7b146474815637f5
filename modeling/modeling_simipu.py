"""SimIPU (Li et al., AAAI 2022): spatial-aware visual features from unlabelled camera + LiDAR pairs."""

import copy
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .configuration_simipu import PointConfig, SimIPUConfig, SimIPUPointNet2Config
from .geometry import (
    FeatureGrid,
    aligned_corners_grid,
    inside_image,
    project_points,
    sample_feature_map,
)
from .image_encoder import (
    ImageEncoderModel,
    TimmModel,
    build_image_encoder,
    configured_grids,
    feature_channels,
    image_feature_maps,
    pad_divisor,
)
from .layers import AffineMap, LinearBlock, ProjectionHead, WeightedBatchNorm, linear, run_blocks
from .losses import ContrastiveResult, contrastive_loss
from .matching import PendingMatch
from .outputs_simipu import PointEncoderOutput, SimIPUForPreTrainingOutput, SimIPUModelOutput
from .pointnet2 import PointNet2Encoder


class SimIPUPreTrainedModel(ImageEncoderModel):
    """Loading, saving and initialisation shared by the SimIPU models."""

    config: SimIPUConfig
    base_model_prefix = "simipu"
    input_modalities = ["image", "point_cloud"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's default for linear layers, as the official code.

        A timm model built outside the meta device keeps timm's own initialisation. transformers only comes here
        with modules that hold parameters or buffers themselves.
        """
        if isinstance(module, (nn.Linear, AffineMap)):
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, WeightedBatchNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif type(module).__module__.startswith("spconv."):
            # the fan-in reads spconv's layout (out, z, y, x, in) rightly
            init.kaiming_normal_(module.get_parameter("weight"), mode="fan_in", nonlinearity="relu")
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        # one folder serves both classes, whichever of them saved it
        self.config.auto_map = {
            "AutoModel": "modeling_simipu.SimIPUModel",
            "AutoModelForPreTraining": "modeling_simipu.SimIPUForPreTraining",
        }
        super().save_pretrained(save_directory, *args, **kwargs)


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
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Feature maps `(B, C_s, H_s, W_s)` of the configured stages, finest first."""
        return image_feature_maps(self.image_encoder, pixel_values, self.config.image_encoder_config.stages)

    def get_point_features(self, points: torch.Tensor) -> PointEncoderOutput:
        """Features of the points that the point encoder keeps."""
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

        >>> model = SimIPUForPreTraining(SimIPUConfig.from_preset("recommended"))
        >>> model(**batch).loss.backward()
    """

    _anchor: TimmModel | None

    def __init__(self, config: SimIPUConfig) -> None:
        super().__init__(config)
        self.simipu = SimIPUModel(config)
        image_channels = feature_channels(self.simipu.image_encoder, config.image_encoder_config.stages)
        point_channels = config.point_encoder_config.output_channels
        widths = (config.projection_dim, config.projection_hidden_dim)
        self.intra_point_head = ProjectionHead(point_channels, *widths)
        self.inter_point_head = ProjectionHead(point_channels, *widths)
        self.inter_image_head = FeatureMapHead(sum(image_channels), *widths)
        if config.cell_sampling == "grid":
            configured_grids(config.image_encoder_config)  # refuses stages without one before the first step
        # the encoder that training started from is no part of the model: neither saved nor trained
        object.__setattr__(self, "_anchor", None)
        self.post_init()
        self.train(self.training)

    def train(self, mode: bool = True) -> "SimIPUForPreTraining":
        super().train(mode)
        if self.config.inter_modal_point_gradient == "none":  # again after loading, as in `hold_frozen`
            self.inter_point_head.requires_grad_(False)
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        points: torch.Tensor,
        points_aug: torch.Tensor,
        lidar_to_aug: torch.Tensor,
        lidar_to_pixel: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        return_metrics: bool = False,
        return_loss: bool = True,
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
            return_metrics: compute the accuracies as well, which need the rank of every positive.
            return_loss: without effect; its default tells transformers' Trainer that there is a loss to evaluate.
        """
        shapes = tuple(lidar_to_aug.shape), tuple(lidar_to_pixel.shape)
        if shapes != ((len(points), 4, 4), (len(points), 3, 4)):  # others would broadcast
            raise ValueError(f"lidar_to_aug, lidar_to_pixel: expected (B, 4, 4) and (B, 3, 4), found {shapes}")
        # distances between points need single precision, whatever a batch was converted to
        wide = torch.promote_types(points.dtype, torch.float32)
        points, points_aug, lidar_to_aug = points.to(wide), points_aug.to(wide), lidar_to_aug.to(wide)
        view = self.simipu.get_point_features(points)
        # the augmented view only yields detached keys: without gradient it costs a third and changes nothing
        with torch.no_grad():
            augmented = self.simipu.get_point_features(points_aug)
            pending_match = PendingMatch(view, augmented, lidar_to_aug)

        image_features = self.simipu.get_image_features(pixel_values)
        padded_size = (pixel_values.shape[-2], pixel_values.shape[-1])
        if image_sizes is None:
            # not `new_tensor` of the two, which would wait for the device
            image_sizes = torch.full((len(pixel_values), 2), padded_size[0], device=pixel_values.device)
            image_sizes[:, 1] = padded_size[1]
        pixels, depth = project_points(view.coordinates, lidar_to_pixel.to(view.coordinates.dtype))
        in_image = inside_image(pixels, depth, image_sizes)
        inter, image_embeds, point_embeds = self._inter_modal(
            image_features, view, pixels, in_image, image_sizes, padded_size, return_metrics
        )

        match, match_distance = pending_match.result()
        intra = self._intra_modal(view, augmented, match, match_distance, return_metrics)

        config = self.config
        loss = config.intra_modal_weight * intra.loss + config.inter_modal_weight * inter.loss
        anchor_loss = None
        if config.anchor_weight > 0 and (self.training or self._anchor is not None):
            anchor_loss = self._anchor_loss(pixel_values, image_features)
            loss = loss + config.anchor_weight * anchor_loss
        return SimIPUForPreTrainingOutput(
            loss=loss,
            intra_modal_loss=intra.loss,
            inter_modal_loss=inter.loss,
            anchor_loss=anchor_loss,
            intra_modal_chance=intra.chance,
            inter_modal_chance=inter.chance,
            intra_modal_top1=intra.accuracy(1),
            intra_modal_top5=intra.accuracy(5),
            inter_modal_top1=inter.accuracy(1),
            inter_modal_top5=inter.accuracy(5),
            inter_modal_top10_percent=inter.accuracy_percent(10),
            inter_modal_top50_percent=inter.accuracy_percent(50),
            match_distance=_masked_mean(match_distance, match_distance.isfinite()),
            pairs_in_image=_masked_mean(in_image.float(), view.mask),
            image_embeds=image_embeds,
            point_embeds=point_embeds,
            match=match,
            image_features=image_features,
            point_output=view,
            point_aug_output=augmented,
        )

    def _intra_modal(
        self,
        view: PointEncoderOutput,
        augmented: PointEncoderOutput,
        match: torch.Tensor,
        distance: torch.Tensor,
        return_metrics: bool,
    ) -> ContrastiveResult:
        config = self.config
        limit = config.max_match_distance
        valid = distance.isfinite() if limit is None else distance <= limit
        queries = _project(self.intra_point_head, view.features, valid)
        with torch.no_grad():
            keys = _project(self.intra_point_head, augmented.features.take_along_dim(match[..., None], 1), valid)
        return contrastive_loss(
            queries, keys, config.temperature, valid, gather=config.gather_negatives, return_positions=return_metrics
        )

    def _inter_modal(
        self,
        image_features: tuple[torch.Tensor, ...],
        view: PointEncoderOutput,
        pixels: torch.Tensor,
        in_image: torch.Tensor,
        image_sizes: torch.Tensor,
        padded_size: tuple[int, int],
        return_metrics: bool,
    ) -> tuple[ContrastiveResult, torch.Tensor, torch.Tensor]:
        """The loss and both embeddings `(B, M, D)`."""
        config = self.config
        valid = view.mask
        if config.mask_out_of_image:
            valid = valid & in_image
        if config.projection_normalization == "sample":
            divisor = pad_divisor(self.simipu.image_encoder)
            covered = ((image_sizes + divisor - 1) // divisor * divisor).to(pixels.dtype)
            stretch = torch.stack([padded_size[1] / covered[:, 1], padded_size[0] / covered[:, 0]], dim=-1)
            pixels = pixels * stretch[:, None]
        image_embeds = self.embed_pixels(image_features, pixels, padded_size, valid)
        point_rows = view.features if config.inter_modal_point_gradient == "encoder" else view.features.detach()
        point_embeds = _project(self.inter_point_head, point_rows, valid)
        result = contrastive_loss(
            image_embeds,
            point_embeds,
            config.temperature,
            valid,
            symmetric=config.symmetric_inter_modal_loss,
            gather=config.gather_negatives,
            return_positions=return_metrics,
        )
        return result, image_embeds, point_embeds

    def stage_grids(self, image_features: tuple[torch.Tensor, ...], padded_size: tuple[int, int]) -> list[FeatureGrid]:
        """Where the model takes the cells of each of `image_features` to look, in pixels of `pixel_values`.

        Args:
            padded_size: height and width of `pixel_values`.
        """
        if self.config.cell_sampling == "grid":
            return configured_grids(self.config.image_encoder_config)
        return [aligned_corners_grid(feature.shape[-2:], padded_size) for feature in image_features]

    def embed_pixels(
        self,
        image_features: tuple[torch.Tensor, ...],
        pixels: torch.Tensor,
        padded_size: tuple[int, int],
        valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The inter-modal image projection at any pixels, `(B, K, projection_dim)`, not normalised.

        Args:
            image_features: of this model's output.
            pixels: `(B, K, 2)`, x and y.
            padded_size: height and width of `pixel_values`.
            valid: `(B, K)` bool, which count in the head's batch statistics; all where omitted.
        """
        if valid is None:
            valid = torch.ones(pixels.shape[:2], dtype=torch.bool, device=pixels.device)
        cells = [grid.cells(pixels) for grid in self.stage_grids(image_features, padded_size)]
        # where points outside are left out, the outer half of the border cells must not fade to zero
        padding_mode = "border" if self.config.mask_out_of_image else "zeros"
        return self.inter_image_head(image_features, cells, valid, padding_mode)

    def anchor_image_encoder(self) -> None:
        """Keep a frozen copy of the image encoder as it is now, for the term of `config.anchor_weight`.

        The copy is in no state dictionary: call this before the first step and, when training is resumed, after the
        same start weights are in place and before the checkpoint is loaded.
        """
        anchor = copy.deepcopy(self.simipu.image_encoder).eval().requires_grad_(False)
        object.__setattr__(self, "_anchor", anchor)

    def _anchor_loss(self, pixel_values: torch.Tensor, image_features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """1 - cosine similarity to the features of the start, averaged over cells and stages."""
        if self._anchor is None:
            raise ValueError("anchor_weight is set: call anchor_image_encoder() on the model with its start weights")
        self._anchor.to(pixel_values.device, next(self.simipu.image_encoder.parameters()).dtype)
        with torch.no_grad():
            targets = image_feature_maps(self._anchor, pixel_values, self.config.image_encoder_config.stages)
        similar = [F.cosine_similarity(a.float(), b.float()) for a, b in zip(image_features, targets, strict=True)]
        return torch.stack([1 - stage.mean() for stage in similar]).mean()


class FeatureMapHead(ProjectionHead):
    """A projection head on image features sampled from one or several maps, their channels concatenated."""

    def forward(  # type: ignore[override]
        self,
        feature_maps: Sequence[torch.Tensor],
        cells: Sequence[torch.Tensor],
        valid: torch.Tensor,
        padding_mode: str,
    ) -> torch.Tensor:
        """`(B, M, D)`.

        Sampling is linear: of a map with fewer cells than there are points, the first layer runs on the cells.

        Args:
            feature_maps: `(B, C_s, H_s, W_s)` each.
            cells: `(B, M, 2)` each, where to sample that map.
            valid: `(B, M)` bool, which rows count in the batch statistics.
            padding_mode: see [`sample_feature_map`].
        """
        first, *others = self.layers
        assert isinstance(first, LinearBlock)
        weights = first.linear.weight.split([feature_map.shape[1] for feature_map in feature_maps], dim=1)
        rows: torch.Tensor = first.linear.bias
        for feature_map, where, weight in zip(feature_maps, cells, weights, strict=True):
            if feature_map[0, 0].numel() < where.shape[1]:
                projected = F.conv2d(feature_map.to(weight.dtype), weight[..., None, None])
                rows = rows + sample_feature_map(projected, where, padding_mode).flatten(0, 1)
            else:
                sampled = sample_feature_map(feature_map, where, padding_mode).flatten(0, 1)
                rows = rows + linear(sampled.to(weight.dtype), weight)
        counts = valid.flatten()
        rows = first.normalize(rows.to(first.linear.weight.dtype), counts)
        return run_blocks(others, rows, counts).unflatten(0, valid.shape)


def build_point_encoder(config: PointConfig) -> nn.Module:
    """The point encoder of a configuration.

    Chosen by `model_type`, not by class: remote code loaded from a folder has its own copies of the classes.

    Raises:
        ImportError: the sparse encoder is asked for and spconv is not installed.
    """
    if config.model_type == "simipu_sparse_conv":
        from .sparse_encoder import SparseConvEncoder  # importing spconv takes seconds

        return SparseConvEncoder(config)
    return PointNet2Encoder(cast("SimIPUPointNet2Config", config))


def _project(head: ProjectionHead, features: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Runs a head on `(B, M, C)`; rows that are not valid do not count in its batch statistics."""
    first = cast("LinearBlock", head.layers[0])
    rows = head(features.flatten(0, 1).to(first.linear.weight.dtype), valid.flatten())
    return rows.unflatten(0, valid.shape)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


SimIPUModel.register_for_auto_class("AutoModel")
SimIPUForPreTraining.register_for_auto_class("AutoModelForPreTraining")
