"""The official code's checkpoints (github.com/zhyever/SimIPU) and files like them: their names and ours."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from simipu_hf.errors import SimIPUError
from simipu_hf.hub.weights import (
    EncoderWeights,
    InputConvention,
    StateDict,
    batch_norm_eps,
    check_state_dict,
    read_weights,
    timm_template,
)

OFFICIAL_BATCH_NORM_EPS = 1e-3
OFFICIAL_INPUT = InputConvention("bgr", (0.406, 0.456, 0.485), (round(1 / 255, 12),) * 3, None, "border")

# blocks, whether they are bottlenecks -> timm name
RESNETS = {
    (8, False): "resnet18",
    (16, False): "resnet34",
    (8, True): "resnet26",
    (16, True): "resnet50",
    (33, True): "resnet101",
    (50, True): "resnet152",
}
HEADS = {
    "inter_point_head": "mlp_cross_points",
    "inter_image_head": "mlp_cross_img",
    "intra_point_head": "mlp_intro_points",
}
IGNORED = {
    r"img_conv1x1_\d\.": "never used by the official forward pass",
    r"queue(_ptr)?$": "negatives of the MoCo branch",
    r"\w+_k\.": "momentum copy of the MoCo branch",
    r"mlp_cross_(img|pts)_pred\.": "predictor of the SimSiam branch",
    r"fc\.": "classifier",
    r"": "no part of the official pre-training model",
}


@dataclass
class ConversionReport:
    """What became of every entry of a checkpoint.

    Args:
        kind: `"pre-training model"` or `"image encoder"`.
        mapped: name in the checkpoint -> name in the folder's `model.safetensors`.
        ignored: name in the checkpoint -> reason.
        missing: names that the converted model has and the checkpoint lacks; `from_pretrained` initialises them.
        notes: what had to be assumed.
    """

    kind: Literal["pre-training model", "image encoder"]
    architecture: str
    output_dir: Path | None = None
    mapped: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"found    {self.kind}, {self.architecture}", f"mapped   {len(self.mapped)} entries"]
        for reason, count in Counter(self.ignored.values()).items():
            names = [name for name, why in self.ignored.items() if why == reason]
            lines.append(f"ignored  {count} entries: {reason} ({', '.join(names[:3])}{', …' * (count > 3)})")
        lines.append(f"missing  {len(self.missing)} entries{': ' * bool(self.missing)}{', '.join(self.missing[:5])}")
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes), f"wrote    {self.output_dir}"])


def read_checkpoint(
    checkpoint: str | Path, eps: float | None = None
) -> tuple[EncoderWeights, StateDict, ConversionReport]:
    """The image encoder of a checkpoint as it was trained, the whole checkpoint, and what becomes of its entries.

    The names of the image encoder, a ResNet, may carry the prefixes `module.`, `img_backbone.`, `backbone.`, or none.

    Args:
        checkpoint: `.pth` or `.safetensors`; nothing but tensors is unpickled.
        eps: of the image encoder's batch norms; `None` takes what the file says of itself, 1e-5 for a file that has a
            classifier, else the official 1e-3.

    Raises:
        SimIPUError: unreadable or unsafe file, another network, an incomplete encoder.
    """
    state, notes = read_weights(checkpoint)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    prefix = next((p for p in ("img_backbone.", "backbone.") if f"{p}conv1.weight" in state), "")
    encoder = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    blocks = [name for name in encoder if re.fullmatch(r"layer\d\.\d+\.conv1\.weight", name)]
    architecture = RESNETS.get((len(blocks), "layer1.0.conv3.weight" in encoder))
    if architecture is None:
        raise SimIPUError(
            f"{checkpoint}: nothing in it matches the image encoder of SimIPU, a ResNet named "
            "img_backbone.conv1.weight, backbone.conv1.weight or conv1.weight and so on; "
            f"found {len(state)} entries: {', '.join(list(state)[:5])}"
        )
    template = timm_template(architecture)
    expected = template.state_dict()
    report = ConversionReport("image encoder", architecture)
    report.mapped = {prefix + name: name for name in encoder if name in expected}
    for name in state.keys() - report.mapped.keys():
        report.ignored[name] = next(reason for pattern, reason in IGNORED.items() if re.match(pattern, name))
    if counters := [name for name in expected if name not in encoder and name.endswith("num_batches_tracked")]:
        encoder |= {name: torch.tensor(0) for name in counters}
        report.notes.append(f"{len(counters)} batch counters were absent and are set to 0")
    found = {name: encoder[name] for name in expected if name in encoder}
    check_state_dict(found, expected, f"{checkpoint}: as {architecture}")
    imagenet = "fc.weight" in encoder
    stated = eps or notes.get("batch_norm_eps")
    eps = float(stated or (1e-5 if imagenet else OFFICIAL_BATCH_NORM_EPS))
    why = "as stated" if stated else "assumed (the official pre-training's is 0.001, ImageNet models' 1e-05)"
    convention = _input_convention(notes, imagenet)
    report.notes.append(f"batch-norm epsilon of the image encoder: {eps:g}, {why}")
    report.notes.append(f"input of the image encoder: {convention}")
    description = f"{checkpoint}: {architecture} under {prefix + 'conv1.weight'!r} …, batch-norm epsilon {eps:g}"
    all_eps = dict.fromkeys(batch_norm_eps(template), eps)
    about = (convention, description, notes.get("untrained") or [])
    return EncoderWeights(architecture, found, all_eps, {}, *about), state, report


def _input_convention(notes: dict[str, Any], imagenet: bool) -> InputConvention:
    if "channel_order" not in notes:
        return InputConvention() if imagenet else OFFICIAL_INPUT
    return InputConvention(**{name: notes[name] for name in InputConvention.__dataclass_fields__})


def official_fields(state: StateDict, weights: EncoderWeights) -> dict[str, Any]:
    """What an official checkpoint says of its configuration, as fields of `SimIPUConfig` beside the preset's."""
    first, head = "pts_backbone.SA_modules.0.mlps.0.layer0.conv.weight", "mlp_cross_img.layer3.0.weight"
    eps = set(weights.batch_norm_eps.values()).pop()
    return {
        "image_config": {"architecture": weights.architecture, "batch_norm_eps": eps},
        # a point's features are its reflectance alone, or the offset from the group's centre as well
        "point_config": {"use_xyz": first in state and state[first].shape[1] == 4, "xyz_layer": "first"},
        **({"projection_dim": len(state[head])} if head in state else {}),
    }


def official_name(ours: str) -> str | None:
    """The official code's name of an entry of `SimIPUForPreTraining`; `None` if it has none."""
    conv = {"linear": "conv", "norm": "bn"}
    if ours.startswith("simipu.image_encoder."):
        return ours.replace("simipu.image_encoder.", "img_backbone.", 1)
    if match := re.fullmatch(r"simipu\.point_encoder\.levels\.(\d)\.mlps\.(\d)\.(\d)\.(linear|norm)\.(\w+)", ours):
        level, scale, layer, kind, rest = match.groups()
        return f"pts_backbone.SA_modules.{level}.mlps.{scale}.layer{layer}.{conv[kind]}.{rest}"
    if match := re.fullmatch(r"simipu\.point_encoder\.levels\.(\d)\.aggregation\.(linear|norm)\.(\w+)", ours):
        level, kind, rest = match.groups()
        return f"pts_backbone.aggregation_mlps.{level}.{conv[kind]}.{rest}"
    if match := re.fullmatch(rf"({'|'.join(HEADS)})\.layers\.([012])\.(linear|norm)\.(\w+)", ours):
        head, layer, kind, rest = match.groups()
        return f"{HEADS[head]}.layer{int(layer) + 1}.{'0' if kind == 'linear' else '1'}.{rest}"
    return None


def to_official_state_dict(state_dict: StateDict) -> StateDict:
    """The entries of a `SimIPUForPreTraining` under official names and in official shapes (1 x 1 convolutions)."""
    official = {}
    for ours, value in state_dict.items():
        name = official_name(ours)
        if name is None:
            raise SimIPUError(f"{ours} has no place in the official network")
        if name.endswith("conv.weight") and name.startswith("pts_backbone."):
            value = value.reshape(*value.shape, *(1,) * (1 if "aggregation" in name else 2))
        official[name] = value
    return official
