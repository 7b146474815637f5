"""Every configuration and every preset of SimIPU: the encoders, how their features are compared, depth, detection.

Every difference between the official implementation and the recommended setting is one field here, so that
an ablation is a flag. `SimIPUConfig.from_preset("official")` reproduces the official configuration
(`simipu_kitti.py` of github.com/zhyever/SimIPU); the defaults are the recommended preset.
"""

import copy
from typing import Any, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

Number = float | int


@strict
class SimIPUImageConfig(PreTrainedConfig):
    """The image encoder: any timm model that has `forward_intermediates`.

    Args:
        architecture: timm model name, such as `"resnet50"` or `"vit_small_patch14_dinov2"`.
        out_indices: feature stages sampled for the inter-modal loss, in timm's numbering (for a ResNet 0 is
            the stem and 4 the last stage); negative values count from the end. `None` takes the three coarsest
            resolutions, or three evenly spaced layers of an encoder with one resolution (a plain ViT); the model
            writes down which.
        image_size: height and width for which an encoder with position embeddings or fixed windows is built;
            `None` takes the architecture's own.
        model_args: further keyword arguments of `timm.create_model`, such as `{"drop_path_rate": 0.1}`, but for
            the 3 input channels and the head, which it lacks.
        frozen: modules or parameters of the encoder, by timm's names (`conv1`, `layer1`, `blocks.0`), that are not
            trained: no gradient, evaluation mode.
        feature_grids: where the cells of each stage look, in pixels: `[stride_y, stride_x, offset_y, offset_x]` a
            stage, `None` for one whose cells lie on no grid. `None` lets the model measure them and write them down.
        batch_norm_eps: epsilon of every batch norm; `None` keeps the architecture's own, which is the only
            one that timm, torchvision and transformers can express (official: 1e-3).
        batch_norm_momentum: momentum of every batch norm; `None` keeps the architecture's (official: 0.01).
    """

    model_type = "simipu_image_encoder"
    base_config_key = "image_config"

    architecture: str = "resnet50"
    out_indices: list[int] | tuple[int, ...] | None = None
    image_size: list[int] | tuple[int, ...] | None = None
    model_args: dict[str, Any] | None = None
    frozen: list[str] | tuple[str, ...] = ()
    feature_grids: list | tuple | None = None
    batch_norm_eps: Number | None = None
    batch_norm_momentum: Number | None = None

    @property
    def stages(self) -> list[int]:
        """`out_indices` of a configuration whose encoder was built: counted from the front, finest first."""
        if self.out_indices is None:
            raise ValueError("image_config.out_indices: build the encoder first, it chooses its default stages")
        return list(self.out_indices)

    def validate_architecture(self) -> None:
        if self.out_indices is not None and not self.out_indices:
            raise ValueError("image_config.out_indices is empty: name at least one stage, such as [-1]")
        fixed = {"in_chans", "num_classes", "pretrained", "features_only"} & set(self.model_args or ())
        if fixed:
            raise ValueError(
                f"image_config.model_args: {', '.join(sorted(fixed))} cannot be chosen: 3 channels, no head"
            )
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ValueError(f"image_config.image_size: expected height and width, found {list(self.image_size)}")
        if any(grid is not None and (len(grid) != 4 or min(grid[:2]) <= 0) for grid in self.feature_grids or ()):
            raise ValueError(
                "image_config.feature_grids: expected stride_y, stride_x, offset_y and offset_x of each stage, found "
                f"{self.feature_grids}"
            )


@strict
class SimIPUPointNet2Config(PreTrainedConfig):
    """PointNet++ with multi-scale grouping; every list has one entry per set-abstraction level.

    Field names are those of mmdetection3d's `PointNet2SAMSG`. The defaults are the official network with `use_xyz` and
    a quarter of its samples, 256 points a cloud, for a fraction of its cost.

    Args:
        num_points: points drawn by each sampler of each level.
        fps_mods: sampler of each draw: `"D-FPS"` (distance between coordinates), `"F-FPS"` (distance between
            coordinates and features together), `"FS"` (F-FPS, then D-FPS, both over the same points).
        fps_sample_ranges: how many of the level's points each sampler sees, in order; -1 means the rest.
        radii: outer radius of each scale in metres; with `dilated_group` each scale is the ring beyond the
            previous one.
        num_samples: slots of a group of each scale.
        mlp_channels: output widths of the pointwise MLP of each scale.
        aggregation_channels: width after the scales are concatenated.
        dilated_group: rings instead of balls.
        use_xyz: append the offset from the group's centre to the neighbour's features (the official
            configuration sees reflectance alone).
        xyz_layer: the layer of each scale's MLP that sees the offset: `"first"`, as PointNet++ has it, whose every
            later layer then runs per (centre, neighbour) pair, or `"last"`, which costs little more than no offset.
        batch_norm_eps, batch_norm_momentum: of the MLPs; the aggregation keeps PyTorch's 1e-5 and 0.1.
        sampling_backend, grouping_backend: `"auto"`, `"torch"`, `"numba"` or `"triton"`.
    """

    model_type = "simipu_pointnet2"
    base_config_key = "point_config"

    num_points: list | tuple = ((1024,), (256,), (128, 128))
    fps_mods: list | tuple = (("D-FPS",), ("FS",), ("F-FPS", "D-FPS"))
    fps_sample_ranges: list | tuple = ((-1,), (-1,), (128, -1))
    radii: list | tuple = ((0.2, 0.4, 0.8), (0.4, 0.8, 1.6), (1.6, 3.2, 4.8))
    num_samples: list | tuple = ((32, 32, 64), (32, 32, 64), (16, 16, 16))
    mlp_channels: list | tuple = (
        ((32, 32, 64), (32, 32, 64), (64, 64, 128)),
        ((64, 64, 128), (64, 64, 128), (128, 128, 256)),
        ((128, 128, 256), (128, 128, 256), (256, 256, 512)),
    )
    aggregation_channels: list | tuple = (128, 256, 1024)
    dilated_group: bool = True
    use_xyz: bool = True
    xyz_layer: Literal["first", "last"] = "last"
    batch_norm_eps: Number = 1e-3
    batch_norm_momentum: Number = 0.1
    sampling_backend: Literal["auto", "torch", "numba", "triton"] = "auto"
    grouping_backend: Literal["auto", "torch", "numba", "triton"] = "auto"

    @property
    def output_channels(self) -> int:
        return self.aggregation_channels[-1]

    def validate_architecture(self) -> None:
        per_sampler = "num_points", "fps_mods", "fps_sample_ranges"
        per_scale = "radii", "num_samples", "mlp_channels"
        for name in (*per_sampler, *per_scale):
            if not all(isinstance(level, (list, tuple)) for level in getattr(self, name)):
                raise ValueError(
                    f"point_config.{name}: expected a list for each set-abstraction level, found {getattr(self, name)}"
                )
        for name in (*per_sampler, *per_scale, "aggregation_channels"):
            if len(getattr(self, name)) != len(self.num_points):
                raise ValueError(
                    f"point_config.{name} has {len(getattr(self, name))} levels, num_points has "
                    f"{len(self.num_points)}: give one entry per set-abstraction level"
                )
        for level, (radii, mods) in enumerate(zip(self.radii, self.fps_mods, strict=True)):
            for names, entries, what in ((per_sampler, mods, "sampler"), (per_scale, radii, "scale")):
                found = [getattr(self, name)[level] for name in names]
                if not entries or any(len(values) != len(entries) for values in found):
                    raise ValueError(
                        f"point_config level {level}: {', '.join(names)} must have one entry per {what}, found {found}"
                    )
            unknown = set(mods) - {"D-FPS", "F-FPS", "FS"}
            if unknown:
                raise ValueError(f"point_config.fps_mods: unknown {sorted(unknown)}; choose from D-FPS, F-FPS, FS")
            if list(radii) != sorted(set(radii)) or radii[0] <= 0:
                raise ValueError(f"point_config.radii of level {level} must grow from above 0, found {radii}")


@strict
class SimIPUSparseConvConfig(PreTrainedConfig):
    """SECOND-style sparse convolution encoder (needs spconv: `pip install "simipu-hf[spconv]"`).

    Args:
        voxel_size: edge lengths x, y, z in metres.
        point_cloud_range: x, y, z minimum, then maximum, in metres, in the frame of the points (camera-aligned in
            the recommended preset); points outside are dropped. It covers the augmented view as well, which is
            rotated about the camera by up to 90 degrees.
        channels: width of each stage; every stage after the first halves the resolution.
        blocks_per_stage: submanifold blocks in each stage.
        residual: residual blocks (two convolutions and a shortcut) instead of plain ones.
        num_output_points: output sites handed to the losses per cloud.
        output_channels: width of the features handed to the losses.
        batch_norm_eps, batch_norm_momentum: of every batch norm (SECOND: 1e-3, 0.01).
    """

    model_type = "simipu_sparse_conv"
    base_config_key = "point_config"

    voxel_size: list[Number] | tuple[Number, ...] = (0.1, 0.1, 0.2)
    point_cloud_range: list[Number] | tuple[Number, ...] = (-80.0, -80.0, -6.0, 80.0, 80.0, 12.0)
    channels: list[int] | tuple[int, ...] = (16, 32, 64, 128)
    blocks_per_stage: list[int] | tuple[int, ...] = (1, 2, 2, 2)
    residual: bool = True
    num_output_points: int = 1024
    output_channels: int = 256
    batch_norm_eps: Number = 1e-3
    batch_norm_momentum: Number = 0.01

    def validate_architecture(self) -> None:
        low, high = self.point_cloud_range[:3], self.point_cloud_range[3:]
        if len(self.voxel_size) != 3 or len(self.point_cloud_range) != 6:
            raise ValueError("point_config: voxel_size takes 3 numbers and point_cloud_range 6 (minimum, maximum)")
        if any(v <= 0 for v in self.voxel_size) or any(a >= b for a, b in zip(low, high, strict=True)):
            raise ValueError(
                f"point_config: voxel_size {self.voxel_size} must be positive and point_cloud_range "
                f"{self.point_cloud_range} must grow from its minimum to its maximum"
            )
        if len(self.channels) != len(self.blocks_per_stage):
            raise ValueError("point_config: channels and blocks_per_stage must have one entry per stage")


PointConfig = SimIPUPointNet2Config | SimIPUSparseConvConfig

POINT_CONFIGS: dict[str, type[PointConfig]] = {
    "pointnet2": SimIPUPointNet2Config,
    "sparse_conv": SimIPUSparseConvConfig,
}

# Only what differs from the defaults of each class; the defaults are the recommended preset. `model` goes to
# SimIPUConfig, the others to SimIPUImageProcessor, SimIPUFeatureExtractor and TwoViewAugmentation.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "recommended": {"model": {}, "image_processor": {}, "feature_extractor": {}, "augmentation": {}},
    "official": {
        "model": {
            "image_config": {"out_indices": (-1,), "batch_norm_eps": 1e-3, "batch_norm_momentum": 0.01},
            "point_config": {
                "num_points": ((4096,), (1024,), (512, 512)),
                "fps_sample_ranges": ((-1,), (-1,), (512, -1)),
                "use_xyz": False,
            },
            "projection_hidden_dim": None,
            "max_match_distance": None,
            "mask_out_of_image": False,
            "projection_normalization": "sample",
            "cell_sampling": "aligned_corners",
            "inter_modal_point_gradient": "none",
            "symmetric_inter_modal_loss": False,
            "gather_negatives": False,
        },
        "image_processor": {
            "size": {"height": 384, "width": 1280},
            "keep_aspect_ratio": True,
            "do_flip_channel_order": True,
            "do_rescale": False,
            "image_mean": [103.53, 116.28, 123.675],
            "image_std": [1.0, 1.0, 1.0],
            "half_pixel_centers": False,
        },
        "feature_extractor": {
            "frame": "lidar",
            "depth_range": None,
            "point_cloud_range": (0.0, -40.0, -3.0, 70.4, 40.0, 1.0),
        },
        "augmentation": {"rotation_center": (35.2, 0.0, -1.0), "random_resize": ((640, 192), (2400, 720))},
    },
}


def preset_values(preset: str, part: str) -> dict[str, Any]:
    """A copy of the values of one part of a preset: `"model"`, `"image_processor"`, and so on.

    Raises:
        ValueError: an unknown preset; the message lists the known ones.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    return copy.deepcopy(PRESETS[preset][part])


@strict
class SimIPUConfig(PreTrainedConfig):
    """Configuration of [`SimIPUModel`] and [`SimIPUForPreTraining`].

    Args:
        preset: the preset that these values started from, by which processor and augmentation are chosen. It sets no
            other field: [`from_preset`] does.
        image_config: `SimIPUImageConfig` or a dictionary of its fields.
        point_config: `SimIPUPointNet2Config`, `SimIPUSparseConvConfig`, or a dictionary of the fields of one,
            chosen by its `model_type` (PointNet++ where it names none).
        projection_dim: width of the space in which features are compared.
        projection_hidden_dim: width inside the projection heads; `None` takes the width of their input.
        temperature: of both contrastive losses.
        intra_modal_weight, inter_modal_weight: weights of the two losses in the total.
        max_match_distance: matches between the two views farther apart than this, in metres, are dropped;
            `None` keeps every match, however far.
        mask_out_of_image: leave points that project outside the image out of the inter-modal pairs; if
            false they stay, with a zero image feature, as positives and as negatives, and features fade to
            zero over the outer half of the border cells.
        cell_sampling: where the cells of a feature map lie: `"grid"`, where the encoder's cells look
            (`image_config.feature_grids`), integer pixel coordinates being pixel centres; `"aligned_corners"`, pixel
            0 and the image width at the outermost cells, whatever the encoder.
        projection_normalization: the size that pixel coordinates are relative to: `"batch"`, the padded size that
            the image encoder really saw; `"sample"`, each image's own size rounded up to what the encoder divides by
            (32 for a ResNet), which stretches every image but the batch's largest.
        inter_modal_point_gradient: how far the inter-modal loss reaches into the point branch: `"none"` (the
            point projection head stays at its initialisation), `"head"` (the head learns), `"encoder"`.
        symmetric_inter_modal_loss: average the image-to-point and point-to-image directions.
        gather_negatives: take negatives from every process instead of this one's batch alone.
        anchor_weight: weight of a term that keeps the image features close to those of the encoder that the training
            started from (1 - cosine similarity, averaged over cells); see
            [`SimIPUForPreTraining.anchor_image_encoder`].
    """

    model_type = "simipu"
    sub_configs_defaults = {  # noqa: RUF012
        "image_config": SimIPUImageConfig,  # type: ignore[dict-item]  # transformers takes the class alone, too
        "point_config": SimIPUPointNet2Config,  # type: ignore[dict-item]
    }

    preset: Literal["recommended", "official"] = "recommended"
    image_config: dict | PreTrainedConfig | None = None
    point_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 128
    projection_hidden_dim: int | None = 512
    temperature: Number = 0.07
    intra_modal_weight: Number = 1.0
    inter_modal_weight: Number = 1.0
    max_match_distance: Number | None = 2.0
    mask_out_of_image: bool = True
    cell_sampling: Literal["grid", "aligned_corners"] = "grid"
    projection_normalization: Literal["batch", "sample"] = "batch"
    inter_modal_point_gradient: Literal["none", "head", "encoder"] = "head"
    symmetric_inter_modal_loss: bool = True
    gather_negatives: bool = True
    anchor_weight: Number = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.point_config, dict):
            fields, known = dict(self.point_config), {kind.model_type: kind for kind in POINT_CONFIGS.values()}
            model_type = fields.pop("model_type", SimIPUPointNet2Config.model_type)
            if model_type not in known:
                raise ValueError(f"point_config: unknown model_type {model_type!r}; choose from {', '.join(known)}")
            self.point_config = known[model_type](**fields)
        super().__post_init__(**kwargs)

    @property
    def image_encoder_config(self) -> SimIPUImageConfig:
        """`image_config`, whatever form it was given in."""
        return cast("SimIPUImageConfig", self.image_config)

    @property
    def point_encoder_config(self) -> PointConfig:
        """`point_config`, whatever form it was given in."""
        return cast("PointConfig", self.point_config)

    def validate_architecture(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, found {self.temperature}")
        for name in ("projection_dim", "projection_hidden_dim"):
            width = getattr(self, name)
            if width is not None and width < 1:
                raise ValueError(f"{name} must be at least 1, found {width}")
        for name in ("intra_modal_weight", "inter_modal_weight", "anchor_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")
        limit = self.max_match_distance
        if limit is not None and limit <= 0:
            raise ValueError(f"max_match_distance must be above 0 metres, found {limit}; use None for no limit")

    @classmethod
    def from_preset(
        cls, preset: str = "recommended", point_encoder: str = "pointnet2", **overrides: Any
    ) -> "SimIPUConfig":
        """The configuration of a preset, `"recommended"` or `"official"`.

        Args:
            preset: the preset's name.
            point_encoder: `"pointnet2"` or `"sparse_conv"`.
            overrides: fields to change; `image_config` and `point_config` take dictionaries that are merged
                into the preset's.

        Raises:
            ValueError: an unknown preset or point encoder; the message lists the known ones.
        """
        fields = preset_values(preset, "model")
        if point_encoder not in POINT_CONFIGS:
            raise ValueError(f"unknown point encoder {point_encoder!r}: choose from {', '.join(POINT_CONFIGS)}")
        image_fields, point_fields = fields.pop("image_config", {}), fields.pop("point_config", {})
        if point_encoder != "pointnet2":  # whose fields the presets' are
            point_fields = {}
        point_fields["model_type"] = POINT_CONFIGS[point_encoder].model_type
        return cls(
            image_config={**image_fields, **overrides.pop("image_config", {})},
            point_config={**point_fields, **overrides.pop("point_config", {})},
            **{"preset": preset, **fields, **overrides},
        )


@strict
class SimIPUDenseConfig(PreTrainedConfig):
    """What the configurations of the models that fine-tune an image encoder have in common.

    Args:
        image_config: `SimIPUImageConfig` or a dictionary of its fields; its `out_indices` concern pre-training
            and are not used here.
        out_indices: stages given to the decoder, in timm's numbering; `None` takes the last stage of every resolution
            that the model reads, or four evenly spaced ones where the encoder has a single one (a plain ViT).
    """

    sub_configs_defaults = {  # noqa: RUF012
        "image_config": SimIPUImageConfig,  # type: ignore[dict-item]  # transformers takes the class alone, too
    }

    image_config: dict | PreTrainedConfig | None = None
    out_indices: list[int] | tuple[int, ...] | None = None

    @property
    def image_encoder_config(self) -> SimIPUImageConfig:
        """`image_config`, whatever form it was given in."""
        return cast("SimIPUImageConfig", self.image_config)

    def validate_out_indices(self) -> None:
        if self.out_indices is not None and not self.out_indices:
            raise ValueError("out_indices is empty: expected at least one stage, or None")


@strict
class SimIPUDepthConfig(SimIPUDenseConfig):
    """Configuration of [`SimIPUForDepthEstimation`].

    Args:
        image_config, out_indices: as in [`SimIPUDenseConfig`], from the finest resolution on.
        decoder_channels: widths of the decoder's upsampling blocks, one fewer than stages; `None` halves the last
            stage's width at each block (2048 of a ResNet-50: 1024, 512, 256, 128), never below 16.
        max_depth: the largest depth that can be predicted, in metres (80 for KITTI, 10 for indoors).
        silog_epsilon: added to both depths before the logarithm, in metres.
        silog_mean_weight: weight of the squared mean log error in the loss; 0 makes it fully scale-invariant.
    """

    model_type = "simipu_depth"
    decoder_channels: list[int] | tuple[int, ...] | None = None
    max_depth: Number = 80.0
    silog_epsilon: Number = 1e-3
    silog_mean_weight: Number = 0.15

    def validate_architecture(self) -> None:
        if self.max_depth <= 0:
            raise ValueError(f"max_depth must be above 0 metres, found {self.max_depth}")
        if self.silog_epsilon <= 0 or self.silog_mean_weight < 0:
            raise ValueError(
                f"silog_epsilon must be above 0 and silog_mean_weight not negative, found {self.silog_epsilon} "
                f"and {self.silog_mean_weight}"
            )


@strict
class SimIPUDetectionConfig(SimIPUDenseConfig):
    """Configuration of [`SimIPUForMonocular3DDetection`].

    Args:
        image_config, out_indices: as in [`SimIPUDenseConfig`], from stride 4 on.
        classes: names of what is detected.
        mean_dimensions: height, width and length in metres of an average object of each class.
        hidden_size: width of the feature pyramid and of the head.
        log_depth_per_focal: logarithm of a typical depth (metres) over the focal length (pixels): where the prediction
            of depth starts.
        max_detections: boxes returned for an image.
    """

    model_type = "simipu_detection"
    classes: list[str] | tuple[str, ...] = ("Car", "Pedestrian", "Cyclist")
    mean_dimensions: list | tuple = ((1.53, 1.63, 3.88), (1.76, 0.66, 0.84), (1.74, 0.60, 1.76))
    hidden_size: int = 128
    log_depth_per_focal: Number = -3.4
    max_detections: int = 50

    def validate_architecture(self) -> None:
        if not self.classes:
            raise ValueError("classes is empty: expected at least one name of what is detected")
        if len(self.mean_dimensions) != len(self.classes) or any(
            len(size) != 3 or min(size) <= 0 for size in self.mean_dimensions
        ):
            raise ValueError(
                f"mean_dimensions: expected height, width and length above 0 of each of {list(self.classes)}, found "
                f"{self.mean_dimensions}"
            )
        if min(self.hidden_size, self.max_detections) < 1:
            raise ValueError(
                f"hidden_size and max_detections must be at least 1, found {self.hidden_size} and "
                f"{self.max_detections}"
            )


SimIPUConfig.register_for_auto_class()
SimIPUDepthConfig.register_for_auto_class()
SimIPUDetectionConfig.register_for_auto_class()
