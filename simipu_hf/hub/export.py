"""The trained image encoder in the forms that other people's code loads."""

import json
import re
from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from torch import nn

from simipu_hf.errors import SimIPUError
from simipu_hf.hub.files import written_aside
from simipu_hf.hub.weights import ChannelOrder, EncoderWeights, InputConvention, batch_norm_eps, read_safetensors
from simipu_hf.modeling.image_encoder import TimmModel

Format = Literal["timm", "transformers", "torchvision", "mmdet", "official"]

TRAINED_STATISTICS = "trained_running_var.safetensors"
"""File beside a timm export whose `running_var` carries an epsilon: the statistics as trained, for a way back."""


@dataclass
class ExportReport:
    """What was written where, and how to feed it.

    Args:
        path: the folder, or the `.pth` file.
        norm_cfg: batch-norm setting for an mmdetection config (mmdet form only).
    """

    format: str
    path: Path
    architecture: str
    input: InputConvention
    source: str
    notes: list[str]
    norm_cfg: dict[str, Any] | None = None

    def __str__(self) -> str:
        lines = [
            f"read    {self.source}",
            f"wrote   {self.path} ({self.architecture}, {self.format} form)",
            f"input   {self.input}",
            *(f"note    {note}" for note in self.notes),
        ]
        if self.norm_cfg is not None:
            lines.append(f"config  norm_cfg=dict({', '.join(f'{k}={v!r}' for k, v in self.norm_cfg.items())})")
        return "\n".join(lines)


def export_image_encoder(
    model: str | Path,
    output_dir: str | Path,
    format: Format = "timm",
    prefix: str = "img_backbone",
    channel_order: ChannelOrder | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write the image encoder of `model` in another form.

    Evaluation-mode features are those of the trained encoder for the same input tensor. An encoder whose batch
    norms have another epsilon than its architecture (the official one: 1e-3 instead of 1e-5) gets the difference
    added to `running_var`, except in the mmdet form, which keeps the values as trained and names the epsilon.

    Args:
        model: whatever [`load_image_encoder`] takes: a run, a checkpoint, an encoder folder, a Hub id, a `.pth`.
        output_dir: folder to create; the torchvision and mmdet forms put `image_encoder.pth` into it, or are
            written to `output_dir` itself if that ends in `.pth`.
        format: `"timm"`, a folder that timm and plain transformers load; `"transformers"`, a native `ResNetModel`;
            `"torchvision"`, a state dict for torchvision's ResNet without `fc`; `"mmdet"`, a checkpoint for
            `load_from` and `init_cfg` of OpenMMLab configs; `"official"`, the whole pre-training model (which
            `model` must then be) under the names of the official code.
        prefix: of the names in the mmdet form, such as `"img_backbone"` or `"backbone"`; empty for none.
        channel_order: reorder the first convolution's input channels so that the encoder takes `"rgb"` (or
            `"bgr"`) tensors; `None` leaves the order it was trained with.
        overwrite: replace what is at `output_dir`.

    Raises:
        SimIPUError: nothing usable at `model`, an unknown format, an architecture that the form cannot express, or
            `output_dir` is occupied.
    """
    from simipu_hf.hub.image_encoder import find_image_encoder

    writers = {
        "timm": write_timm,
        "transformers": write_transformers,
        "torchvision": write_torchvision,
        "mmdet": lambda weights, target: write_mmdet(weights, target, prefix),
    }
    if format == "official":
        writers[format] = lambda weights, target: write_official(weights, target, Path(model))
    if format not in writers:
        raise SimIPUError(f"unknown export format {format!r}: choose from {', '.join(writers)}, official")
    weights = find_image_encoder(model)
    if channel_order is not None:
        weights = weights.with_channel_order(channel_order)
    target = Path(output_dir)
    if format in ("torchvision", "mmdet", "official") and target.suffix != ".pth":
        target = target / "image_encoder.pth"
    with written_aside(target, overwrite) as path:
        writers[format](weights, path)
    notes, norm_cfg = [], None
    if format in ("mmdet", "official"):
        norm_cfg = _norm_cfg(weights)
    elif weights.batch_norm_eps != batch_norm_eps(weights.template()):
        notes.append("the trained batch-norm epsilon is folded into running_var: equal in evaluation mode")
    if weights.input.channel_order == "bgr":
        notes.append(
            "the first convolution expects BGR, and no loader reorders channels by itself: "
            "pass image[:, [2, 1, 0]], or export with channel_order='rgb'"
        )
    return ExportReport(format, target, weights.architecture, weights.input, weights.description, notes, norm_cfg)


def export_timm(
    encoder: nn.Module,
    output_dir: str | Path,
    data_config: dict[str, Any] | None = None,
    tag: str = "simipu",
    overwrite: bool = False,
) -> Path:
    """Write a timm model as a folder for `timm.create_model("local-dir:…")` and plain transformers.

    Args:
        encoder: a plain timm model, made with `num_classes=0`, whose batch norms may have any epsilon.
        data_config: `mean`, `std`, `input_size` (3, H, W), `crop_pct`, `crop_mode`, `interpolation`, `notes`.
        tag: name of the weights beside the architecture's.
    """
    weights = weights_of(encoder)
    with written_aside(output_dir, overwrite) as path:
        write_timm(weights, path, data_config=data_config, tag=tag)
    return Path(output_dir)


def weights_of(encoder: nn.Module, model_args: dict[str, Any] | None = None, **about: Any) -> EncoderWeights:
    """The weights of a live timm model, on the CPU."""
    config = getattr(encoder, "pretrained_cfg", None)
    if not config or not hasattr(encoder, "forward_intermediates"):
        raise SimIPUError(f"expected a plain timm model, found {type(encoder).__name__}")
    if model_args is None:
        model_args = getattr(encoder, "_model_args", {})  # recorded by timm's factory; older versions do not
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    weights = EncoderWeights(config["architecture"], state, batch_norm_eps(encoder), model_args, **about)
    return weights.check("the encoder")


def write_timm(
    weights: EncoderWeights, path: Path, data_config: dict[str, Any] | None = None, tag: str = "simipu"
) -> None:
    """`config.json` and `model.safetensors` in a new folder `path`."""
    plain = weights.with_own_eps()
    path.mkdir(parents=True)
    save_file(_contiguous(plain.state_dict), path / "model.safetensors", metadata={"format": "pt"})
    changed = {
        name: value for name, value in weights.state_dict.items() if not torch.equal(value, plain.state_dict[name])
    }
    if changed:
        save_file(changed, path / TRAINED_STATISTICS, metadata={"eps": json.dumps(weights.batch_norm_eps)})
    template = weights.template()
    pretrained_cfg = _pretrained_cfg(template, {**weights.input.data_config(), **(data_config or {})}, tag)
    if weights.input.channel_order == "bgr":
        pretrained_cfg["notes"] = ["tensor channels are B, G, R; mean and std are in that order"]
    config = {
        "architecture": weights.architecture,
        "num_classes": 0,
        "num_features": template.num_features,
        # present even when empty: transformers passes it on together with its own num_classes
        "model_args": weights.model_args,
        "pretrained_cfg": pretrained_cfg,
        "simipu": {"channel_order": weights.input.channel_order},
    }
    _write_json(path / "config.json", config)


def write_torchvision(weights: EncoderWeights, path: Path) -> None:
    """A state dict for torchvision's ResNet of the same depth, without `fc`."""
    plain = weights.with_own_eps()
    _check_resnet(weights, "torchvision")
    state = OrderedDict(plain.state_dict)
    # where PyTorch keeps the versions of a state dict: loaders skip names that are no modules
    metadata = OrderedDict({"": {"version": 1}, "simipu_hf": _note(plain)})
    state._metadata = metadata  # type: ignore[attr-defined]  # PyTorch's own attribute of an OrderedDict
    torch.save(state, path)


def write_mmdet(weights: EncoderWeights, path: Path, prefix: str = "img_backbone") -> None:
    """A checkpoint with `prefix.` before every name and `running_var` as trained."""
    _check_resnet(weights, "mmdet")
    prefix = f"{prefix.rstrip('.')}." if prefix else ""
    state = OrderedDict((prefix + name, value) for name, value in weights.state_dict.items())
    torch.save({"meta": {"simipu_hf": _note(weights)}, "state_dict": state}, path)


def write_official(weights: EncoderWeights, path: Path, model: Path) -> None:
    """A checkpoint of the whole pre-training model of the folder `model`, as the official code names it."""
    from simipu_hf.hub.convert import to_official_state_dict

    file = model / "model.safetensors"
    if not file.is_file():
        raise SimIPUError(f"{model}: the official form takes a pre-training model's folder; found no {file.name}")
    state = read_safetensors(file)
    encoder = {f"simipu.image_encoder.{name}": value for name, value in weights.state_dict.items()}
    if not encoder.keys() <= state.keys():
        raise SimIPUError(f"{file}: the official form takes a SimIPUForPreTraining model, which this is not")
    torch.save({"meta": {"simipu_hf": _note(weights)}, "state_dict": to_official_state_dict(state | encoder)}, path)


def write_transformers(weights: EncoderWeights, path: Path) -> None:
    """A native `ResNetModel` folder with its image processor."""
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

    plain = weights.with_own_eps()
    _check_resnet(weights, "transformers")
    state = weights.state_dict
    depths = [len({name.split(".")[1] for name in state if name.startswith(f"layer{s}.")}) for s in range(1, 5)]
    last_norm = "bn3" if "layer1.0.bn3.weight" in state else "bn2"
    config = ResNetConfig(
        depths=depths,
        layer_type="bottleneck" if last_norm == "bn3" else "basic",
        hidden_sizes=[len(state[f"layer{stage}.0.{last_norm}.weight"]) for stage in range(1, 5)],
        embedding_size=len(state["bn1.weight"]),
    )
    with torch.device("meta"):
        model = ResNetModel(config)
    renamed = {_transformers_name(name): value for name, value in plain.state_dict.items()}
    model.load_state_dict(renamed, strict=True, assign=True)
    path.mkdir(parents=True)
    model.save_pretrained(path)
    height, width = weights.input.size or (224, 224)
    ViTImageProcessor(
        size={"height": height, "width": width}, image_mean=list(weights.input.mean), image_std=list(weights.input.std)
    ).save_pretrained(path)


def _transformers_name(name: str) -> str:
    """`ResNetModel`'s name for timm's."""
    leaf = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    if match := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"embedder.embedder.{leaf[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(\w+)", name):
        stage, block, kind, position, rest = match.groups()
        return f"encoder.stages.{int(stage) - 1}.layers.{block}.layer.{int(position) - 1}.{leaf[kind]}.{rest}"
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.downsample\.(\d)\.(\w+)", name):
        stage, block, kind, rest = match.groups()
        return f"encoder.stages.{int(stage) - 1}.layers.{block}.shortcut.{leaf[kind]}.{rest}"
    raise SimIPUError(f"{name} is no name of a plain ResNet")


def _check_resnet(weights: EncoderWeights, form: str) -> None:
    if weights.architecture not in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        raise SimIPUError(
            f"the {form} form takes resnet18, 34, 50, 101 and 152; this encoder is {weights.architecture}: "
            "use the timm form"
        )


def _note(weights: EncoderWeights) -> dict[str, Any]:
    """What names and tensors do not say, in types that a safe reader accepts."""
    values = set(weights.batch_norm_eps.values())
    return {
        "architecture": weights.architecture,
        "batch_norm_eps": values.pop() if len(values) == 1 else None,
        "channel_order": weights.input.channel_order,
        "mean": list(weights.input.mean),
        "std": list(weights.input.std),
        "size": list(weights.input.size) if weights.input.size else None,
        "keep_aspect_ratio": weights.input.keep_aspect_ratio,
    }


def _norm_cfg(weights: EncoderWeights) -> dict[str, Any]:
    return {"type": "BN", "eps": _note(weights)["batch_norm_eps"], "requires_grad": True}


def _pretrained_cfg(template: TimmModel, data_config: dict[str, Any], tag: str) -> dict[str, Any]:
    sources = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture")
    supervised = ("license", "description", "origin_url", "paper_name", "paper_ids", "notes", "label_offset")
    about_labels = ("label_names", "label_descriptions", "test_input_size", "test_crop_pct", "test_pool_size")
    known = {f.name for f in fields(PretrainedCfg)}
    kept = {
        key: value
        for key, value in template.pretrained_cfg.items()
        if key in known and key not in sources + supervised + about_labels
    }
    if unknown := set(data_config) - known:
        raise SimIPUError(f"data_config: timm has no field {', '.join(sorted(unknown))}")
    own: dict[str, Any] = {"tag": tag, "custom_load": False, "num_classes": 0}
    if "input_size" in data_config and tuple(data_config["input_size"]) != tuple(kept.get("input_size", ())):
        own["pool_size"] = None
    paper = {"paper_ids": "arXiv:2112.04680", "paper_name": "SimIPU"}
    return {**kept, **own, **paper, **data_config}


def _contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.contiguous() for name, value in state.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
