"""Official checkpoints in and out: the names of github.com/zhyever/SimIPU and those of this package."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from simipu_hf.errors import SimIPUError
from simipu_hf.hub.export import write_timm
from simipu_hf.hub.files import written_aside
from simipu_hf.hub.weights import (
    OFFICIAL_BATCH_NORM_EPS,
    OFFICIAL_INPUT,
    EncoderWeights,
    InputConvention,
    StateDict,
    batch_norm_eps,
    check_state_dict,
    read_weights,
    resnet_architecture,
    timm_template,
)

if TYPE_CHECKING:
    from simipu_hf.modeling.configuration_simipu import SimIPUConfig

HEADS = {
    "mlp_cross_points": "inter_point_head",
    "mlp_cross_img": "inter_image_head",
    "mlp_intro_points": "intra_point_head",
}

IGNORED = {
    r"img_conv1x1_\d\.": "never used by the official forward pass",
    r"queue(_ptr)?$": "negatives of the MoCo branch",
    r"\w+_k\.": "momentum copy of the MoCo branch",
    r"mlp_cross_(img|pts)_pred\.": "predictor of the SimSiam branch",
    r"fc\.": "classifier",
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
        parts = Counter(name.split(".")[0] for name in self.mapped)
        lines = [
            f"found    {self.kind}, {self.architecture}",
            f"mapped   {len(self.mapped)} entries ({', '.join(f'{n} {part}' for part, n in parts.items())})"
            if self.kind == "pre-training model"
            else f"mapped   {len(self.mapped)} entries",
        ]
        for reason, count in Counter(self.ignored.values()).items():
            names = [name for name, why in self.ignored.items() if why == reason]
            lines.append(f"ignored  {count} entries: {reason} ({', '.join(names[:3])}{', …' * (count > 3)})")
        lines.append(f"missing  {len(self.missing)} entries{': ' * bool(self.missing)}{', '.join(self.missing[:5])}")
        lines += [f"note     {note}" for note in self.notes]
        if self.output_dir is not None:
            lines.append(f"wrote    {self.output_dir}")
        return "\n".join(lines)


def convert_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    batch_norm_eps: float | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Convert an official checkpoint: the full pre-training model, or the image encoder alone.

    The full model becomes a `SimIPUForPreTraining` folder with the official preset, its processor, and the encoder
    as `image_encoder/`; an encoder alone becomes a timm folder. Tensors keep their type. Names may carry the
    prefixes `module.`, `img_backbone.`, `backbone.`, or none.

    Args:
        checkpoint: a `.pth` file (or `.safetensors` with the same names); nothing but tensors is unpickled.
        output_dir: folder to create.
        batch_norm_eps: epsilon with which the image encoder was trained; `None` takes what the file says of itself,
            1e-5 for a file that has a classifier, else the official 1e-3.
        overwrite: replace what is at `output_dir`.

    Raises:
        SimIPUError: unreadable or unsafe file, another network, incomplete encoder, occupied `output_dir`.
    """
    state, notes = _read(checkpoint)
    weights, report = _image_encoder(state, notes, checkpoint, batch_norm_eps)
    folder = report.output_dir = Path(output_dir)
    if any(name.startswith("pts_backbone.SA_modules.") for name in state):
        _convert_pretraining_model(state, weights, report, checkpoint, folder, overwrite)
    else:
        with written_aside(folder, overwrite) as path:
            write_timm(weights, path)
    return report


def encoder_from_checkpoint(checkpoint: str | Path, batch_norm_eps: float | None = None) -> EncoderWeights:
    """The image encoder of a checkpoint, as it was trained (see [`convert_checkpoint`])."""
    state, notes = _read(checkpoint)
    return _image_encoder(state, notes, checkpoint, batch_norm_eps)[0]


def _read(checkpoint: str | Path) -> tuple[StateDict, dict[str, Any]]:
    state, notes = read_weights(checkpoint)
    return {name.removeprefix("module."): value for name, value in state.items()}, notes


def _image_encoder(
    state: StateDict, notes: dict[str, Any], checkpoint: str | Path, eps: float | None
) -> tuple[EncoderWeights, ConversionReport]:
    prefix = next((p for p in ("img_backbone.", "backbone.", "") if f"{p}conv1.weight" in state), None)
    encoder = {
        name.removeprefix(prefix or ""): value for name, value in state.items() if name.startswith(prefix or "")
    }
    architecture = resnet_architecture(encoder)
    if prefix is None or architecture is None:
        raise SimIPUError(
            f"{checkpoint}: nothing in it matches the image encoder of SimIPU, a ResNet named "
            "img_backbone.conv1.weight, backbone.conv1.weight or conv1.weight and so on; "
            f"found {len(state)} entries: {', '.join(list(state)[:5])}"
        )
    template = timm_template(architecture)
    expected = template.state_dict()
    found = {name: value for name, value in encoder.items() if name in expected}
    report = ConversionReport("image encoder", architecture)
    report.mapped = {prefix + name: name for name in found}
    report.ignored = {name: _why_ignored(name) for name in state if name not in report.mapped}
    counters = [name for name in expected if name not in found and name.endswith("num_batches_tracked")]
    if counters:
        found |= {name: torch.tensor(0) for name in counters}
        report.notes.append(f"{len(counters)} batch counters were absent and are set to 0")
    check_state_dict(found, expected, f"{checkpoint}: as {architecture}")
    stated = notes.get("batch_norm_eps")
    if eps is None:
        eps = stated or (1e-5 if "fc.weight" in encoder else OFFICIAL_BATCH_NORM_EPS)
        said = (
            "as the file says" if stated else "assumed (the official pre-training's is 0.001, ImageNet models' 1e-05)"
        )
        report.notes.append(f"batch-norm epsilon of the image encoder: {eps:g}, {said}")
    weights = EncoderWeights(
        architecture,
        {name: found[name] for name in expected},
        dict.fromkeys(batch_norm_eps(template), float(eps)),
        input=_input_convention(notes, imagenet="fc.weight" in encoder),
        description=f"{checkpoint}: {architecture}, {len(found)} entries under {prefix + 'conv1.weight'!r} and so on, "
        f"batch-norm epsilon {eps:g}",
    )
    report.notes.append(f"input of the image encoder: {weights.input}")
    return weights, report


def _input_convention(notes: dict[str, Any], imagenet: bool) -> InputConvention:
    if "channel_order" not in notes:
        return InputConvention() if imagenet else OFFICIAL_INPUT
    size = notes.get("size")
    return InputConvention(
        notes["channel_order"],
        tuple(notes["mean"]),
        tuple(notes["std"]),
        tuple(size) if size else None,
        notes["keep_aspect_ratio"],
    )


def _why_ignored(name: str) -> str:
    for pattern, reason in IGNORED.items():
        if re.match(pattern, name):
            return reason
    return "no part of the official pre-training model"


def _convert_pretraining_model(
    state: StateDict,
    weights: EncoderWeights,
    report: ConversionReport,
    checkpoint: str | Path,
    output_dir: Path,
    overwrite: bool,
) -> None:
    from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
    from simipu_hf.modeling.processing_simipu import SimIPUProcessor

    converted = {f"simipu.image_encoder.{name}": value for name, value in weights.state_dict.items()}
    report.kind = "pre-training model"
    report.mapped = {name: f"simipu.image_encoder.{ours}" for name, ours in report.mapped.items()}
    for name, value in state.items():
        if (ours := simipu_name(name)) is not None:
            report.mapped[name] = ours
            report.ignored.pop(name, None)
            converted[ours] = value.flatten(1) if name.endswith("conv.weight") else value
    config = official_config(state, weights, checkpoint)
    with torch.device("meta"):
        model = SimIPUForPreTraining(config)
    expected = model.state_dict()
    report.missing = [name for name in expected if name not in converted]
    if report.missing:
        report.notes.append("from_pretrained initialises the missing entries afresh")
    check_state_dict(
        converted, {k: v for k, v in expected.items() if k in converted}, f"{checkpoint}: as the official model"
    )
    with written_aside(output_dir, overwrite) as path:
        model.load_state_dict(converted, strict=False, assign=True)
        model.config.dtype = next(value.dtype for value in converted.values() if value.is_floating_point())
        model.save_pretrained(path, state_dict=converted)
        SimIPUProcessor.from_preset("official").save_pretrained(path)
        write_timm(weights, path / "image_encoder", tag="simipu_official")


def official_config(state: StateDict, weights: EncoderWeights, where: str | Path = "checkpoint") -> "SimIPUConfig":
    """The official preset with the widths that the tensors of an official checkpoint show."""
    from simipu_hf.modeling.configuration_simipu import SimIPUConfig, SimIPUPointNet2Config

    def width(name: str, axis: int = 0) -> int:
        if name not in state:
            raise SimIPUError(f"{where}: a point encoder without {name} is not the official one")
        return state[name].shape[axis]

    sa = "pts_backbone.SA_modules"
    channels = [
        [
            [width(f"{sa}.{i}.mlps.{s}.layer{k}.conv.weight") for k in range(len(scale))]
            for s, scale in enumerate(level)
        ]
        for i, level in enumerate(SimIPUPointNet2Config().mlp_channels)
    ]
    aggregation = [width(f"pts_backbone.aggregation_mlps.{i}.conv.weight") for i in range(len(channels))]
    point_config = {
        # reflectance alone, or the offset from the group's centre and reflectance
        "use_xyz": width(f"{sa}.0.mlps.0.layer0.conv.weight", axis=1) == 4,
        "xyz_layer": "first",
        "mlp_channels": channels,
        "aggregation_channels": aggregation,
    }
    head = "mlp_cross_img.layer3.0.weight"
    projection: dict[str, Any] = {"projection_dim": state[head].shape[0]} if head in state else {}
    eps = set(weights.batch_norm_eps.values()).pop()
    return SimIPUConfig.from_preset(
        "official",
        image_config={"architecture": weights.architecture, "batch_norm_eps": eps},
        point_config=point_config,
        **projection,
    )


_LEAF = {"conv": "linear", "bn": "norm", "0": "linear", "1": "norm"}


def simipu_name(official: str) -> str | None:
    """Name in `SimIPUForPreTraining` of an official entry outside the image encoder; `None` if it has none."""
    if match := re.fullmatch(r"pts_backbone\.SA_modules\.(\d)\.mlps\.(\d)\.layer(\d)\.(conv|bn)\.(\w+)", official):
        level, scale, layer, kind, rest = match.groups()
        return f"simipu.point_encoder.levels.{level}.mlps.{scale}.{layer}.{_LEAF[kind]}.{rest}"
    if match := re.fullmatch(r"pts_backbone\.aggregation_mlps\.(\d)\.(conv|bn)\.(\w+)", official):
        level, kind, rest = match.groups()
        return f"simipu.point_encoder.levels.{level}.aggregation.{_LEAF[kind]}.{rest}"
    if match := re.fullmatch(rf"({'|'.join(HEADS)})\.layer([123])\.([01])\.(\w+)", official):
        head, layer, kind, rest = match.groups()
        return f"{HEADS[head]}.layers.{int(layer) - 1}.{_LEAF[kind]}.{rest}"
    return None


def official_name(ours: str) -> str | None:
    """Official name of an entry of `SimIPUForPreTraining`: the inverse of the conversion; `None` if it has none."""
    if ours.startswith("simipu.image_encoder."):
        return ours.replace("simipu.image_encoder.", "img_backbone.", 1)
    conv = {"linear": "conv", "norm": "bn"}
    if match := re.fullmatch(r"simipu\.point_encoder\.levels\.(\d)\.mlps\.(\d)\.(\d)\.(linear|norm)\.(\w+)", ours):
        level, scale, layer, kind, rest = match.groups()
        return f"pts_backbone.SA_modules.{level}.mlps.{scale}.layer{layer}.{conv[kind]}.{rest}"
    if match := re.fullmatch(r"simipu\.point_encoder\.levels\.(\d)\.aggregation\.(linear|norm)\.(\w+)", ours):
        level, kind, rest = match.groups()
        return f"pts_backbone.aggregation_mlps.{level}.{conv[kind]}.{rest}"
    heads = {ours_head: theirs for theirs, ours_head in HEADS.items()}
    if match := re.fullmatch(rf"({'|'.join(heads)})\.layers\.([012])\.(linear|norm)\.(\w+)", ours):
        head, layer, kind, rest = match.groups()
        return f"{heads[head]}.layer{int(layer) + 1}.{'0' if kind == 'linear' else '1'}.{rest}"
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
