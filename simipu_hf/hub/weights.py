"""Image-encoder weights: read safely, checked, and carried over to another batch-norm epsilon."""

import copy
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import safe_open
from torch import nn

from simipu_hf.errors import SimIPUError, first_line
from simipu_hf.modeling import image_encoder
from simipu_hf.modeling.image_encoder import TimmModel

StateDict = dict[str, torch.Tensor]
ChannelOrder = Literal["rgb", "bgr"]

# Arguments that belong to whoever builds the network, not to the weights.
CALLER_ARGS = ("num_classes", "pretrained", "in_chans", "global_pool", "features_only", "out_indices")


@dataclass(frozen=True)
class InputConvention:
    """What the image encoder was fed with: `(value / 255 - mean) / std` per channel.

    Args:
        channel_order: of the tensor's channels.
        mean, std: for pixel values from 0 to 1, in the order of the tensor's channels.
        size: height, width in pixels of the training images, where they had one size.
        crop_mode, crop_pct, interpolation: how images become that size, in timm's words: `"squash"` changes their
            shape, `"border"` pads them, `"center"` cuts them.
    """

    channel_order: ChannelOrder = "rgb"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size: tuple[int, int] | None = None
    crop_mode: str = "squash"
    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    def __str__(self) -> str:
        mean, std = ([round(255 * value, 4) for value in values] for values in (self.mean, self.std))
        return f"{self.channel_order.upper()} channels, (value from 0 to 255 - {mean}) / {std}"

    def data_config(self) -> dict[str, Any]:
        """The part of it that timm's `pretrained_cfg` can say, which is all but the channel order."""
        size = {} if self.size is None else {"input_size": (3, *self.size)}
        names = ("mean", "std", "crop_mode", "crop_pct", "interpolation")
        return {**size, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_data_config(cls, config: Mapping[str, Any], channel_order: ChannelOrder = "rgb") -> "InputConvention":
        """The inverse of [`data_config`], from a `pretrained_cfg`; what it lacks is timm's default."""
        size = config.get("input_size")
        return cls(
            channel_order,
            tuple(config.get("mean", cls.mean)),
            tuple(config.get("std", cls.std)),
            tuple(size[1:]) if size else None,
            config.get("crop_mode", "center"),
            config.get("crop_pct", timm.data.DEFAULT_CROP_PCT),
            config.get("interpolation", "bicubic"),
        )


@dataclass
class EncoderWeights:
    """An image encoder as it was trained.

    Args:
        architecture: timm model name.
        state_dict: under timm's names, `running_var` as trained; empty for random weights, which whoever builds the
            network draws.
        batch_norm_eps: epsilon of every batch norm, by module name.
        model_args: further arguments of `timm.create_model`.
        input: what it was fed with.
        description: one line that says what was found, and where.
        untrained: layers that keep the weights of the start, see [`untrained_layers`].
    """

    architecture: str
    state_dict: StateDict
    batch_norm_eps: dict[str, float]
    model_args: dict[str, Any] = field(default_factory=dict)
    input: InputConvention = field(default_factory=InputConvention)
    description: str = ""
    untrained: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.architecture = self.architecture.split(".")[0]  # timm's tag names weights, not the network
        self.model_args = {
            key: value
            for key, value in self.model_args.items()
            if key not in CALLER_ARGS and not key.endswith("drop_rate") and not key.startswith("drop_")
        }
        if self.model_args.get("dynamic_img_size") and "img_size" not in self.model_args:
            # else timm builds a network from a folder for 224 x 224, and interpolates the position embeddings twice
            self.model_args["img_size"] = list(getattr(self.template(), "patch_embed").img_size)  # noqa: B009

    def template(self) -> TimmModel:
        """The timm model of this architecture on the meta device: names, shapes and constants without memory."""
        return timm_template(self.architecture, self.model_args)

    def with_own_eps(self) -> "EncoderWeights":
        """The same function in evaluation mode, for the architecture's own epsilon.

        Batch norm divides by `sqrt(running_var + eps)`, so `running_var + eps_trained - eps_own` carries the
        difference. Weights whose epsilon is the architecture's own are returned as they are.
        """
        own_eps = batch_norm_eps(self.template())
        state = fold_batch_norm_eps(self.state_dict, self.batch_norm_eps, own_eps)
        return replace(self, state_dict=state, batch_norm_eps=own_eps)

    def with_channel_order(self, channel_order: ChannelOrder | None) -> "EncoderWeights":
        """The same function of the same picture, for tensors whose channels are in `channel_order` (`None`: as is)."""
        if channel_order not in ("rgb", "bgr", None):
            raise SimIPUError(f"channel_order must be 'rgb' or 'bgr', found {channel_order!r}")
        if channel_order in (None, self.input.channel_order):
            return self
        if not self.state_dict:
            raise SimIPUError(f"{self.description}: random weights are of no channel order")
        first = self.template().pretrained_cfg.get("first_conv")
        weight = self.state_dict.get(f"{first}.weight")
        if weight is None or weight.ndim != 4 or weight.shape[1] != 3:  # some fold pixels into channels before it
            raise SimIPUError(f"{self.architecture} has no single first convolution whose channels could be reordered")
        weight = weight.flip(1).contiguous()
        mean, std = self.input.mean[::-1], self.input.std[::-1]
        flipped = replace(self.input, channel_order=channel_order, mean=mean, std=std)
        return replace(self, state_dict={**self.state_dict, f"{first}.weight": weight}, input=flipped)

    def check(self, where: str) -> "EncoderWeights":
        """These weights, or a SimIPUError if they are not exactly those of the architecture."""
        check_state_dict(self.state_dict, self.template().state_dict(), f"{where}: as timm's {self.architecture}")
        return self


def timm_template(architecture: str, model_args: Mapping[str, Any] | None = None) -> TimmModel:
    """A timm model without classifier on the meta device; always the same object."""
    try:
        kept = {name: value for name, value in (model_args or {}).items() if name not in CALLER_ARGS}
        return image_encoder.timm_template(architecture, kept)
    except ValueError as error:
        raise SimIPUError(str(error)) from error


def untrained_layers(template: TimmModel, last_stage: int) -> list[str]:
    """What lies behind a stage, counted from the front: the outermost modules, norms alone left out."""
    pruned: Any = copy.deepcopy(template)
    pruned.prune_intermediate_layers([last_stage], prune_norm=True, prune_head=True)
    whole, kept = template.state_dict(), pruned.state_dict().keys()
    found = set()
    for name in (name for name in whole.keys() - kept if whole[name].ndim > 1):
        parts = name.split(".")
        modules = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        found.add(next((module for module in modules if not any(k.startswith(f"{module}.") for k in kept)), name))
    return sorted(found)


def batch_norm_eps(model: nn.Module) -> dict[str, float]:
    """Epsilon of every batch norm of `model`, by module name."""
    return {
        name: module.eps for name, module in model.named_modules() if getattr(module, "running_var", None) is not None
    }


def fold_batch_norm_eps(state_dict: StateDict, trained: Mapping[str, float], target: Mapping[str, float]) -> StateDict:
    """`state_dict` with `running_var + trained eps - target eps`, computed in float64 and kept in the data type of the
    weights, where the two differ."""
    state = dict(state_dict)
    for name, eps in trained.items():
        if eps != target[name]:
            variance = state[f"{name}.running_var"]
            state[f"{name}.running_var"] = (variance.double() + eps - target[name]).to(variance.dtype)
    return state


def check_state_dict(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise a SimIPUError unless both have the same names and shapes."""
    if problem := image_encoder.weights_misfit(found, expected):
        raise SimIPUError(f"{where} the weights do not fit: {problem}")


def read_weights(path: str | Path) -> tuple[StateDict, dict[str, Any]]:
    """The tensors of a `.safetensors` file or of a PyTorch checkpoint, and what this package noted in the latter.

    Nothing is unpickled but tensors and plain containers (`torch.load(weights_only=True)`). A checkpoint may
    hold its tensors in `state_dict`, `model`, or at the top.

    Raises:
        SimIPUError: no such file, a damaged one, one without tensors, one that needs more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise SimIPUError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return read_safetensors(path), {}
    loaded = _load_tensors_only(path)
    if not isinstance(loaded, Mapping):
        loaded = {}
    notes: dict[str, Any] = {}
    # a bare state dict keeps the note where PyTorch keeps version numbers
    for holder in (loaded.get("meta"), getattr(loaded, "_metadata", None)):
        if isinstance(holder, Mapping) and isinstance(holder.get("simipu_hf"), Mapping):
            notes = dict(holder["simipu_hf"])
    inside = next((loaded[key] for key in ("state_dict", "model") if isinstance(loaded.get(key), Mapping)), loaded)
    tensors = {name: value for name, value in inside.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise SimIPUError(f"{path}: expected a dictionary of named tensors, found none")
    return tensors, notes


def read_safetensors(path: Path, prefix: str = "") -> StateDict:
    """The tensors of a safetensors file whose names start with `prefix`, without it."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except Exception as error:
        raise SimIPUError(
            f"{path}: no readable safetensors file (damaged, or something else renamed): {error}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        SimIPUError: no such file, no JSON, or something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise SimIPUError(f"{path}: no readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise SimIPUError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _load_tensors_only(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        needs = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if needs is None:
            reason = first_line(error)
            raise SimIPUError(f"{path}: no PyTorch checkpoint, or a damaged one: {reason}") from error
        raise SimIPUError(
            f"{path}: refused, because reading it would run code of {needs[1]}, which the file names beside its "
            "tensors. If you trust whoever made it, save its tensors alone: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pth')"
        ) from error
