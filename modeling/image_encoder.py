"""The image encoder: a plain timm model of any family, its stages read through `forward_intermediates`."""

import difflib
import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_simipu import SimIPUImageConfig
from .feature_grids import measure_feature_grids
from .geometry import FeatureGrid


class TimmModel(nn.Module):
    """What is used of timm's models, for annotations: they have no class in common that declares it."""

    feature_info: Sequence[dict[str, Any]]
    forward_intermediates: Callable[..., Any]
    num_features: int
    pretrained_cfg: dict[str, Any]
    set_grad_checkpointing: Callable[[bool], None]


def build_image_encoder(config: SimIPUImageConfig) -> TimmModel:
    """A timm model without classifier, random weights; what `config` left open is written into it.

    That is `out_indices`, counted from the front, and `feature_grids`.

    Raises:
        ValueError: timm does not know the architecture, it has no such stage, the same stage is named twice,
            `config.feature_grids` are those of another network, or there is no module to freeze of a name in
            `config.frozen`.
    """
    encoder = _create(config.architecture, timm_arguments(config))
    stages = pyramid_stages(encoder, count=3) if config.out_indices is None else config.out_indices
    config.out_indices = _checked_stages(encoder, stages, "image_config.out_indices")
    if config.feature_grids is None:
        # sizes change no place: one measurement for all of them
        arguments = {k: v for k, v in (config.model_args or {}).items() if k not in ("img_size", "dynamic_img_size")}
        grids = _measured_grids(config.architecture, json.dumps(arguments, sort_keys=True))
        config.feature_grids = [grid and list(grid) for grid in grids]
    else:
        _check_strides(encoder, config)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            if config.batch_norm_eps is not None:
                module.eps = config.batch_norm_eps
            if config.batch_norm_momentum is not None:
                module.momentum = config.batch_norm_momentum
    hold_frozen(encoder, config)
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        if not tensor.is_meta:
            # timm has just initialised it by the architecture's own scheme: transformers leaves it as it is
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return encoder


def timm_arguments(config: SimIPUImageConfig) -> dict[str, Any]:
    """The arguments with which `timm.create_model` builds the encoder of `config`, those about image sizes included.

    Where timm can interpolate position embeddings as an image comes, it is told to (`dynamic_img_size`), and the
    weights fit every size. Other encoders with embeddings or windows of a fixed size are built for
    `config.image_size`, rounded up to what they can take (`img_size`).
    """
    arguments = dict(config.model_args or {})
    template = timm_template(config.architecture, arguments)
    return arguments | _size_arguments(template, config.image_size)


def is_built_for_one_size(model_args: Mapping[str, Any]) -> bool:
    """Whether a network of these arguments, as [`timm_arguments`] gives them, takes images of `img_size` alone."""
    return "img_size" in model_args and not model_args.get("dynamic_img_size")


def timm_template(architecture: str, model_args: Mapping[str, Any] | None = None) -> TimmModel:
    """A timm model without memory, to look at its class, stages, names and shapes; always the same object.

    Raises:
        ValueError: timm does not know it, or cannot build it with these arguments.
    """
    return _template(architecture, json.dumps(model_args or {}, sort_keys=True))


def pad_divisor(encoder: nn.Module | str) -> int:
    """What height and width of an image must be multiples of: the encoder's largest stride, a ViT's patch, or the
    patches of cells of a MobileViT, which resamples others.

    Args:
        encoder: a timm model, or the name of one.
    """
    model = timm_template(encoder) if isinstance(encoder, str) else encoder
    blocks: list[Any] = [part for part in model.modules() if type(part).__name__.startswith("MobileVit")]
    patches = [max(block.patch_size) for block in blocks]
    return max(_reductions(cast("TimmModel", model))) * max(patches, default=1)


def feature_grids(encoder: TimmModel, stages: Sequence[int]) -> list[FeatureGrid]:
    """Where the cells of `stages` of a plain timm model look, finest first.

        >>> feature_grids(timm.create_model("resnet18"), [-1])
        [FeatureGrid(stride_y=32.0, stride_x=32.0, offset_y=0.0, offset_x=0.0)]

    Raises:
        ValueError: a model that was made with other strides than its architecture's, or the cells of a stage lie on no
            regular grid.
    """
    architecture = encoder.pretrained_cfg["architecture"]
    own, expected = _reductions(encoder), _reductions(timm_template(architecture))
    if own != expected:
        raise ValueError(f"this {architecture} has strides {own}, not {expected}: where its cells look is not known")
    return _grids_of_stages(architecture, _measured_grids(architecture), sorted_stages(encoder, stages))


def configured_grids(config: SimIPUImageConfig) -> list[FeatureGrid]:
    """The same of the stages `config.out_indices` of an encoder built by [`build_image_encoder`]."""
    assert config.feature_grids is not None
    return _grids_of_stages(config.architecture, config.feature_grids, config.stages)


def feature_channels(encoder: TimmModel, stages: Sequence[int]) -> list[int]:
    """Channels of each of `stages`, in their order."""
    return [encoder.feature_info[stage]["num_chs"] for stage in sorted_stages(encoder, stages)]


def image_feature_maps(encoder: TimmModel, pixel_values: Tensor, stages: Sequence[int]) -> tuple[Tensor, ...]:
    """Feature maps `(B, C_s, H_s, W_s)` of `stages`, finest first; what lies behind the last of them does not run.

    Args:
        pixel_values: `(B, 3, H, W)`, normalised.
    """
    indices = sorted_stages(encoder, stages)
    maps = encoder.forward_intermediates(pixel_values, indices=indices, intermediates_only=True, stop_early=True)
    return tuple(maps)


def pad_to_divisor(pixel_values: Tensor, encoder: nn.Module) -> Tensor:
    """Zeros at the bottom and on the right up to a size `(B, 3, H, W)` that the encoder takes; nothing moves."""
    divisor = pad_divisor(encoder)
    height, width = pixel_values.shape[-2:]
    # not -width % divisor, which torch.compile cannot express for sizes that change
    right, bottom = (divisor - width % divisor) % divisor, (divisor - height % divisor) % divisor
    return nn.functional.pad(pixel_values, (0, right, 0, bottom))


def sorted_stages(encoder: TimmModel, stages: Sequence[int]) -> list[int]:
    """`stages` counted from the front, in the order in which timm returns them."""
    return sorted(stage % len(encoder.feature_info) for stage in stages)


def pyramid_stages(encoder: TimmModel, count: int | None = None) -> list[int]:
    """Stages of a timm model that make a pyramid: the last of every resolution, finest first.

    Where all have one resolution, as in a plain ViT, `count` (or four) evenly spaced ones, the last among them.

    Args:
        count: keep the coarsest so many.
    """
    reductions = _reductions(encoder)
    stages = [i for i, reduction in enumerate(reductions) if reduction not in reductions[i + 1 :]]
    if len(stages) == 1:
        count = min(count or 4, len(reductions))
        stages = [len(reductions) * (step + 1) // count - 1 for step in range(count)]
    return stages[-(count or 0) :]


class FeaturePyramid(nn.Module):
    """An encoder's stages as feature maps of growing strides, finest first.

    A plain ViT has one stride s: its maps are brought to s / 4, s / 2, s and 2 s by transposed convolutions and a
    maximum, as in ViTDet's simple pyramid (Li et al., ECCV 2022), but from evenly spaced layers.

    Args:
        encoder: a timm model.
        out_indices: stages, in timm's numbering.

    Raises:
        ValueError: a stage that the encoder does not have, or one that is named twice.

    Attributes:
        stages: counted from the front.
        channels, strides: of each map.
    """

    def __init__(self, encoder: TimmModel, out_indices: Sequence[int]) -> None:
        super().__init__()
        self.stages = _checked_stages(encoder, out_indices)
        self.channels = feature_channels(encoder, self.stages)
        strides = [_reductions(encoder)[stage] for stage in self.stages]
        single = len(strides) > 1 and len(set(strides)) == 1
        levels = range(2, 2 - len(strides), -1) if single else [0] * len(strides)
        self.strides = [stride * 2.0**-level for stride, level in zip(strides, levels, strict=True)]
        self.resample = nn.ModuleList(map(_resample, self.channels, levels))

    def forward(self, encoder: TimmModel, pixel_values: Tensor) -> list[Tensor]:
        """`(B, C_s, H / stride_s, W / stride_s)` each."""
        maps = image_feature_maps(encoder, pixel_values, self.stages)
        return [resample(feature_map) for resample, feature_map in zip(self.resample, maps, strict=True)]


def _resample(channels: int, level: int) -> nn.Module:
    """Enlarge a map 2^level times, or reduce it where `level` is negative."""
    if level < 0:
        return nn.MaxPool2d(2**-level, ceil_mode=True)
    layers: list[nn.Module] = []
    for step in range(level):
        layers += [nn.GELU()] if step else []
        layers.append(nn.ConvTranspose2d(channels, channels, 2, stride=2))
    return nn.Sequential(*layers)


def with_image_size(encoder: TimmModel, config: SimIPUImageConfig, image_size: Sequence[int]) -> TimmModel:
    """The encoder for images of another size, its position embeddings interpolated; the size is written to `config`.

    Where it is a new one it is in training mode, and `config.frozen` alone is frozen.

    Args:
        encoder: built from `config`; it may be changed in place.
        image_size: height and width.

    Raises:
        ValueError: an encoder of a fixed size that cannot be changed.
    """
    before = timm_arguments(config).get("img_size")
    config.image_size = list(image_size)
    size = timm_arguments(config).get("img_size")
    if size == before:  # also of an encoder that takes any size
        return encoder
    if hasattr(encoder, "set_input_size"):
        encoder.set_input_size(img_size=size)  # type: ignore[operator]
        return encoder
    resized, state = build_image_encoder(config), encoder.state_dict()
    for name, value in resized.state_dict().items():
        if state[name].shape != value.shape:
            if name != "pos_embed" or not hasattr(encoder, "tokens_spatial_shape"):
                raise ValueError(f"{config.architecture} cannot change its image size: {name} depends on it")
            grids = (model.tokens_spatial_shape for model in (resized, encoder))  # Hiera's, which timm leaves to us
            state[name] = resample_abs_pos_embed(state[name], *grids, num_prefix_tokens=0)
    resized.load_state_dict(state)
    return resized.to(next(encoder.parameters()))  # device and data type


def load_image_encoder_weights(encoder: TimmModel, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load the weights of a timm model of the same architecture and size, without a classifier.

    Args:
        source: what they come from, for the message.

    Raises:
        ValueError: they do not fit.
    """
    if problem := weights_misfit(state_dict, encoder.state_dict()):
        architecture = encoder.pretrained_cfg["architecture"]
        raise ValueError(f"{source}: the weights do not fit {architecture}: {problem}; give model_args and image_size")
    encoder.load_state_dict(state_dict)


def weights_misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """How names and shapes of a state dictionary differ from those of another, in words; empty where they do not."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "not expected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} is {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in expected
            if name in found and found[name].shape != expected[name].shape
        ],
    }
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
        for what, names in problems.items()
        if names
    )


def hold_frozen(encoder: TimmModel, config: SimIPUImageConfig) -> None:
    """Give the frozen parts no gradient, and put them into evaluation mode.

    Again after `train()`, with which `from_pretrained` ends: transformers makes new parameters of loaded weights.
    """
    modules, parameters = dict(encoder.named_modules()), dict(encoder.named_parameters())
    for name in config.frozen:
        if name and name in modules:
            modules[name].requires_grad_(False).eval()
        elif name in parameters:
            parameters[name].requires_grad_(False)
        else:
            raise ValueError(
                f"image_config.frozen: {encoder.pretrained_cfg['architecture']} has no module {name!r}; it has "
                f"{', '.join(child for child, _ in encoder.named_children())} and their parts"
            )


class ImageEncoderModel(PreTrainedModel):
    """A model whose `base_model` has an `image_encoder`."""

    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # Trainer: the loss is a mean over the batch, to be divided by the accumulation steps
    accepts_loss_kwargs = False

    def train(self, mode: bool = True) -> "ImageEncoderModel":
        super().train(mode)
        base: Any = self.base_model
        hold_frozen(base.image_encoder, self.config.image_config)
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """He et al. (2015) for convolutions; transformers' default for what it knows."""
        init_buffers = getattr(module, "init_non_persistent_buffers", None)
        if init_buffers is not None:
            init_buffers()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        base: Any = self.base_model
        base.image_encoder.set_grad_checkpointing(enable)


@functools.cache
def _template(architecture: str, model_args: str = "{}") -> TimmModel:
    with torch.device("meta"):
        return _create(architecture, json.loads(model_args))


@functools.cache
def _measured_grids(architecture: str, model_args: str = "{}") -> tuple[FeatureGrid | None, ...]:
    template = _template(architecture, model_args)
    own_size = tuple(template.pretrained_cfg["input_size"][1:])
    side = 7 * pad_divisor(template)  # so many cells of the coarsest stage
    takes_any = not template.pretrained_cfg.get("fixed_input_size") or _size_arguments(template, own_size)
    problem: Exception | None = None
    for size in ((side, side), own_size) if takes_any else (own_size,):
        try:
            # whatever device, mode and random state the caller builds its own model with
            with torch.inference_mode(False), torch.device("cpu"), torch.random.fork_rng(devices=[]):
                arguments = json.loads(model_args) | _size_arguments(template, size)
                return measure_feature_grids(_create(architecture, arguments), size)
        except (AssertionError, RuntimeError, ValueError) as error:  # such as windows that do not divide the size
            problem = error
    raise ValueError(f"{architecture}: where its cells look cannot be measured: {problem}") from problem


def _grids_of_stages(
    architecture: str, grids: Sequence[Sequence[float] | None], stages: Sequence[int]
) -> list[FeatureGrid]:
    chosen = []
    for stage in stages:
        grid = grids[stage]
        if grid is None:
            raise ValueError(
                f"the cells of stage {stage} of {architecture} do not lie on a regular grid of pixels, so no pixel "
                "can be looked up in it: choose other stages (out_indices) or another encoder"
            )
        chosen.append(FeatureGrid(*grid))
    return chosen


def _size_arguments(template: TimmModel, image_size: Sequence[int] | None) -> dict[str, Any]:
    parameters: dict[str, inspect.Parameter] = {}
    for base in type(template).__mro__:  # a distilled network hands its arguments on to its base class
        own = inspect.signature(base).parameters
        parameters |= own
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own.values()):
            break
    if "dynamic_img_size" in parameters:
        return {"dynamic_img_size": True}
    if image_size is None or "img_size" not in parameters or not template.pretrained_cfg.get("fixed_input_size"):
        return {}
    divisor = pad_divisor(template)
    return {"img_size": tuple(math.ceil(length / divisor) * divisor for length in image_size)}


def _reductions(encoder: TimmModel) -> list[int]:
    return [stage["reduction"] for stage in encoder.feature_info]


def _check_strides(encoder: TimmModel, config: SimIPUImageConfig) -> None:
    assert config.feature_grids is not None
    reductions, grids = _reductions(encoder), config.feature_grids
    given = [grid and list(grid[:2]) for grid in grids]
    expected = [[stride, stride] if grid else None for stride, grid in zip(reductions, grids, strict=False)]
    if given != expected or len(grids) != len(reductions):
        raise ValueError(
            f"image_config.feature_grids: the stages of this {config.architecture} have strides {reductions}, found "
            f"{given}; set them to null to have them measured"
        )


def _create(architecture: str, arguments: Mapping[str, Any]) -> TimmModel:
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"timm {timm.__version__} has no model named {architecture!r}{hint}")
    try:
        encoder = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
    except Exception as error:  # whatever the network's own code raises
        raise ValueError(f"timm cannot build {architecture} with {dict(arguments)}: {error}") from error
    if not hasattr(encoder, "forward_intermediates"):
        raise ValueError(f"timm model {architecture!r} has no forward_intermediates: choose another encoder")
    if len(list(encoder.parameters())) < len(list(encoder.named_parameters(remove_duplicate=False))):
        raise ValueError(f"timm model {architecture!r} shares weights between layers, which cannot be saved")
    return cast("TimmModel", encoder)


def _checked_stages(encoder: TimmModel, out_indices: Sequence[int], name: str = "out_indices") -> list[int]:
    """Stages counted from the front, in order, checked; `name` is theirs in messages."""
    count = len(encoder.feature_info)
    for index in out_indices:
        if not -count <= index < count:
            raise ValueError(
                f"{name}: {encoder.pretrained_cfg['architecture']} has stages 0 to {count - 1} "
                f"(or -{count} to -1), found {index}"
            )
    stages = sorted_stages(encoder, out_indices)
    if len(set(stages)) != len(stages):
        raise ValueError(f"{name}: {list(out_indices)} names a stage twice: counted from the front, {stages}")
    return stages
