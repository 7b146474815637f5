"""The trained image encoder in the forms that other people's code loads, and official checkpoints as our folders."""

import importlib.util
import io
import json
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from PIL.Image import Resampling
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

from simipu_hf.errors import SimIPUError, first_line
from simipu_hf.files import atomic_folder, atomic_path, check_apart, check_target
from simipu_hf.hub.official import (
    ConversionReport,
    official_fields,
    official_name,
    read_checkpoint,
    to_official_state_dict,
)
from simipu_hf.hub.sources import TRAINED_STATISTICS, find_image_encoder
from simipu_hf.hub.weights import (
    ChannelOrder,
    EncoderWeights,
    InputConvention,
    StateDict,
    batch_norm_eps,
    check_state_dict,
    read_json,
    read_safetensors,
    read_weights,
)
from simipu_hf.modeling.configuration_simipu import SimIPUConfig, SimIPUImageConfig
from simipu_hf.modeling.image_encoder import (
    TimmModel,
    build_image_encoder,
    image_feature_maps,
    is_built_for_one_size,
    pad_divisor,
    pyramid_stages,
)
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.training.arguments import Size, check_value

Format = Literal["timm", "transformers", "torchvision", "mmdet", "official", "onnx"]
RESNET_FORMS = ("transformers", "torchvision", "mmdet", "official")  # take these architectures alone
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

# What an architecture's `pretrained_cfg` says of the network, not of the weights that timm publishes for it.
ARCHITECTURE_FIELDS = ("first_conv", "classifier", "fixed_input_size", "min_input_size")
ONNX_TOLERANCE = 1e-4  # of the largest feature
ONNX_LIMIT = 1536 * 2**20  # bytes of weights: PyTorch writes more of them into a second file


@dataclass
class ExportReport:
    """What was written where, and how to feed it; `norm_cfg` is for an mmdetection config (mmdet, official form)."""

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
    image_size: tuple[int, int] | None = None,
) -> ExportReport:
    """Write the image encoder of `model` in another form.

    export_image_encoder("RUN", "encoder")
    export_image_encoder("RUN", "encoder.pth", format="mmdet", prefix="img_backbone")

    Evaluation-mode features are those of the trained encoder for the same input tensor. An encoder whose batch
    norms have another epsilon than its architecture (the official one: 1e-3 instead of 1e-5) gets the difference
    added to `running_var`, except in the mmdet form, which keeps the values as trained and names the epsilon.

    Args:
        model: whatever [`load_image_encoder`] takes: a run, a checkpoint, an encoder folder, a Hub id, a `.pth`.
        output_dir: folder to create; forms that are one file put `image_encoder.pth` (or `.onnx`) into it, or are
            written to `output_dir` itself if that has the suffix.
        format: `"timm"`, a folder that timm and plain transformers load; `"transformers"`, a native `ResNetModel`;
            `"torchvision"`, a state dict for torchvision's ResNet without `fc`; `"mmdet"`, a checkpoint for
            `load_from` and `init_cfg` of OpenMMLab configs; `"official"`, the whole pre-training model (which
            `model` must then be) under the names of the official code; `"onnx"`, the feature pyramid as a graph.
        prefix: of the names in the mmdet form, such as `"img_backbone"` or `"backbone"`; empty for none.
        channel_order: reorder the first convolution's input channels so that the encoder takes `"rgb"` (or
            `"bgr"`) tensors; `None` leaves the order it was trained with.
        overwrite: replace an earlier output of the same kind; nothing else is ever replaced.
        image_size: height, width in pixels of the ONNX graph, where the network fixes them; the size it was trained
            at if `None`.

    Raises:
        SimIPUError: nothing usable at `model`, an unknown format, an architecture that the form cannot express, or
            `output_dir` is occupied, holds `model` or lies in it.
    """
    writers: dict[str, Callable[[EncoderWeights, Path], list[str] | None]] = {
        "timm": write_timm,
        "transformers": write_transformers,
        "torchvision": write_torchvision,
        "mmdet": lambda weights, target: write_mmdet(weights, target, prefix),
        "official": lambda weights, target: write_official(weights, target, Path(model)),
        "onnx": lambda weights, target: write_onnx(weights, target, image_size),
    }
    if format not in writers:
        raise SimIPUError(f"unknown export format {format!r}: choose from {', '.join(writers)}")
    target = Path(output_dir)
    check_apart(model, target)
    weights = find_image_encoder(model).with_channel_order(channel_order)
    if not weights.state_dict:
        raise SimIPUError(f"{model}: random weights are not exported")
    if format in RESNET_FORMS and (weights.architecture not in RESNETS or weights.model_args):
        raise SimIPUError(
            f"the {format} form takes resnet18, 34, 50, 101 and 152; this encoder is {weights.architecture}, made "
            f"with {weights.model_args or 'no arguments'}: use the timm or the onnx form"
        )
    if format in ("timm", "transformers"):
        with atomic_folder(target, overwrite=overwrite, is_earlier_output=is_export) as path:
            notes = writers[format](weights, path)
    else:
        suffix = ".onnx" if format == "onnx" else ".pth"
        target = target if target.suffix == suffix else target / f"image_encoder{suffix}"
        check_target(target, overwrite, is_export)
        with atomic_path(target) as path:
            notes = writers[format](weights, path)
    norm_cfg = None
    if format in ("mmdet", "official"):
        norm_cfg = {"type": "BN", "eps": _note(weights)["batch_norm_eps"], "requires_grad": True}
    notes = [*(notes or []), *_notes(weights, folded=norm_cfg is None)]
    return ExportReport(format, target, weights.architecture, weights.input, weights.description, notes, norm_cfg)


def convert_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    batch_norm_eps: float | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Convert an official checkpoint: the full pre-training model, or the image encoder alone.

    report = convert_checkpoint("SimIPU_kitti_50e.pth", "encoder")

    The full model becomes a `SimIPUForPreTraining` folder with the official preset, its processor, and the encoder
    as `image_encoder/`; an encoder alone becomes a timm folder. Tensors keep their type.

    Args:
        checkpoint, batch_norm_eps: see [`read_checkpoint`].
        output_dir: folder to create.
        overwrite: replace an earlier output of the same kind; nothing else is ever replaced.

    Raises:
        SimIPUError: unreadable or unsafe file, another network, incomplete encoder, occupied `output_dir`.
    """
    check_apart(checkpoint, output_dir)
    weights, state, report = read_checkpoint(checkpoint, batch_norm_eps)
    report.output_dir = Path(output_dir)
    whole = any(name.startswith("pts_backbone.SA_modules.") for name in state)
    earlier = partial(is_export, whole_model=whole)
    with atomic_folder(output_dir, overwrite=overwrite, is_earlier_output=earlier) as path:
        if whole:
            _write_pretraining_model(weights, state, report, path, checkpoint)
        else:
            write_timm(weights, path)
    return report


def _write_pretraining_model(
    weights: EncoderWeights, state: StateDict, report: ConversionReport, path: Path, checkpoint: str | Path
) -> None:
    model = _official_network(state, weights)
    expected = model.state_dict()
    converted = {f"simipu.image_encoder.{name}": value for name, value in weights.state_dict.items()}
    report.kind = "pre-training model"
    report.mapped = {name: f"simipu.image_encoder.{ours}" for name, ours in report.mapped.items()}
    for ours in expected.keys() - converted.keys():
        theirs = official_name(ours) or ""
        if theirs in state:
            # the official code's linear layers are 1 x 1 convolutions
            converted[ours] = state[theirs].flatten(1) if theirs.endswith("conv.weight") else state[theirs]
            report.mapped[theirs] = ours
            report.ignored.pop(theirs)
    report.missing = [name for name in expected if name not in converted]
    if report.missing:
        report.notes.append("from_pretrained initialises the missing entries afresh")
    there = {name: value for name, value in expected.items() if name in converted}
    check_state_dict(converted, there, f"{checkpoint}: as the official model")
    model.load_state_dict(converted, strict=False, assign=True)
    model.config.dtype = next(value.dtype for value in converted.values() if value.is_floating_point())
    model.save_pretrained(path, state_dict=converted)
    SimIPUProcessor.from_preset("official").save_pretrained(path)
    write_timm(weights, path / "image_encoder", tag="simipu_official")


def write_timm(weights: EncoderWeights, path: Path, tag: str = "simipu") -> None:
    """A folder that timm and plain transformers load; `tag` names the weights beside the architecture."""
    plain, template = weights.with_own_eps(), weights.template()
    path.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in plain.state_dict.items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    changed = {name: value for name, value in weights.state_dict.items() if not torch.equal(value, state[name])}
    if changed:
        save_file(changed, path / TRAINED_STATISTICS, metadata={"eps": json.dumps(weights.batch_norm_eps)})
    image_config = SimIPUImageConfig(architecture=weights.architecture, model_args=weights.model_args)
    with torch.device("meta"):
        build_image_encoder(image_config)  # writes the grids into it
    kept = {key: template.pretrained_cfg[key] for key in ARCHITECTURE_FIELDS if key in template.pretrained_cfg}
    bgr = weights.input.channel_order == "bgr"
    config = {
        "architecture": weights.architecture,
        "num_classes": 0,
        "num_features": template.num_features,
        # present even when empty: transformers passes it on together with its own num_classes
        "model_args": weights.model_args,
        "pretrained_cfg": {
            **kept,
            "tag": tag,
            "custom_load": False,
            "num_classes": 0,
            "paper_ids": "arXiv:2112.04680",
            "paper_name": "SimIPU",
            **({"notes": ["tensor channels are B, G, R; mean and std are in that order"]} if bgr else {}),
            **weights.input.data_config(),
            "input_size": [3, *taken_size(weights)],
        },
        "simipu": {
            "channel_order": weights.input.channel_order,
            # where the cells of each stage look: [stride_y, stride_x, offset_y, offset_x] in pixels, null: on no grid
            "feature_grids": image_config.feature_grids,
            "untrained": weights.untrained,
        },
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def taken_size(weights: EncoderWeights) -> tuple[int, int]:
    """Height and width of the training images, rounded up to whole patches or windows where the network needs them.

    In training images are padded for that; the loaders of timm and transformers resize to the size they are told.
    """
    size = weights.input.size or weights.template().pretrained_cfg["input_size"][1:]
    needs_whole = weights.model_args.keys() & {"img_size", "dynamic_img_size"}
    divisor = pad_divisor(weights.architecture) if needs_whole else 1
    height, width = (math.ceil(length / divisor) * divisor for length in size)
    return height, width


def _save(content: Any, path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # on a full disk, without saying so
        raise OSError(f"{first_line(error)} (is the disk full?)") from error


def write_torchvision(weights: EncoderWeights, path: Path) -> None:
    """A state dict for torchvision's ResNet of the same depth, without `fc`."""
    plain = weights.with_own_eps()
    state = OrderedDict(plain.state_dict)
    # where PyTorch keeps the versions of a state dict: loaders skip names that are no modules
    metadata = OrderedDict({"": {"version": 1}, "simipu_hf": _note(plain)})
    state._metadata = metadata  # type: ignore[attr-defined]  # PyTorch's own attribute of an OrderedDict
    _save(state, path)


def write_mmdet(weights: EncoderWeights, path: Path, prefix: str = "img_backbone") -> None:
    """A checkpoint with `prefix.` before every name and `running_var` as trained."""
    prefix = f"{prefix.rstrip('.')}." if prefix else ""
    state = OrderedDict((prefix + name, value) for name, value in weights.state_dict.items())
    _save({"meta": {"simipu_hf": _note(weights)}, "state_dict": state}, path)


def write_official(weights: EncoderWeights, path: Path, model: Path) -> None:
    """A checkpoint of the whole pre-training model of the folder `model`, as the official code names it.

    The official code builds the preset's point encoder and heads alone, so a model with others is refused.
    """
    file = model / "model.safetensors"
    if not file.is_file():
        raise SimIPUError(f"{model}: the official form takes a pre-training model's folder; found no {file.name}")
    state = read_safetensors(file)
    encoder = {f"simipu.image_encoder.{name}": value for name, value in weights.state_dict.items()}
    if not encoder.keys() <= state.keys():
        raise SimIPUError(f"{file}: the official form takes a SimIPUForPreTraining model, which this is not")
    official = to_official_state_dict(state | encoder)
    expected = _official_network(official, weights).state_dict()
    check_state_dict(state, expected, f"{file}: the official network has other point encoders and heads,")
    _save({"meta": {"simipu_hf": _note(weights)}, "state_dict": official}, path)


def write_transformers(weights: EncoderWeights, path: Path) -> list[str]:
    """A native `ResNetModel` folder with its image processor."""
    state = weights.with_own_eps().state_dict
    last_norm = "bn3" if "layer1.0.bn3.weight" in state else "bn2"
    fields: dict[str, Any] = {
        "depths": [len({n.split(".")[1] for n in state if n.startswith(f"layer{s}.")}) for s in range(1, 5)],
        "layer_type": "bottleneck" if last_norm == "bn3" else "basic",
        "hidden_sizes": [len(state[f"layer{s}.0.{last_norm}.weight"]) for s in range(1, 5)],
        "embedding_size": len(state["bn1.weight"]),
        "simipu": {"channel_order": weights.input.channel_order},
    }
    config = ResNetConfig(**fields)
    with torch.device("meta"):
        model = ResNetModel(config)
    model.load_state_dict({_transformers_name(name): value for name, value in state.items()}, assign=True)
    model.save_pretrained(path)
    height, width = weights.input.size or (224, 224)
    mean, std = list(weights.input.mean), list(weights.input.std)
    resample = Resampling[weights.input.interpolation.upper()]
    size = {"height": height, "width": width}
    ViTImageProcessor(size=size, resample=resample, image_mean=mean, image_std=std).save_pretrained(path)
    if weights.input.crop_mode == "squash":
        return []
    return [f"its processor changes the shape of images to {height} x {width}; the encoder's own images kept it"]


class _Pyramid(nn.Module):
    """One feature map (B, C, H, W) a resolution, finest first; four evenly spaced layers of a plain ViT."""

    def __init__(self, encoder: TimmModel) -> None:
        super().__init__()
        self.encoder, self.stages = encoder, pyramid_stages(encoder)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return image_feature_maps(self.encoder, pixel_values, self.stages)


def write_onnx(weights: EncoderWeights, path: Path, image_size: tuple[int, int] | None = None) -> list[str]:
    """The feature pyramid as an ONNX graph: `pixel_values` (N, 3, H, W) -> `features_0`, …, finest first.

    N is free, and H and W where the network allows it. The graph is run and compared.

    Returns:
        which sizes it takes, and how far its features are from PyTorch's.
    """
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise SimIPUError(f'the onnx form needs {", ".join(missing)}: pip install "simipu-hf[onnx]"')
    plain = weights.with_own_eps()
    if (size := sum(value.nbytes for value in plain.state_dict.values())) > ONNX_LIMIT:
        raise SimIPUError(
            f"the onnx form is one file of at most {ONNX_LIMIT / 1e9:.1f} GB; the weights of this "
            f"{weights.architecture} have {size / 1e9:.1f} GB: use the timm form"
        )
    encoder = cast("TimmModel", timm.create_model(weights.architecture, num_classes=0, **weights.model_args))
    encoder.load_state_dict(plain.state_dict)
    pyramid = _Pyramid(encoder).eval()
    height, width = image_size or taken_size(weights)
    check_value("image_size", (height, width), Size)
    example = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    batch, any_size = {0: torch.export.Dim.DYNAMIC}, {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    # a network built for one size: tracing it for others takes minutes before it fails
    is_fixed = is_built_for_one_size(weights.model_args)
    try:
        program = _onnx_program(pyramid, example, batch if is_fixed else batch | any_size)
    except Exception as error:  # torch names no common class for what it cannot trace
        raise SimIPUError(f"torch cannot express {weights.architecture} in ONNX: {first_line(error)}") from error
    sizes = f"{height} x {width} pixels" if is_fixed else "any size that the network takes"
    program.model.metadata_props["simipu_hf"] = json.dumps(_note(plain))
    program.save(path)
    return [f"takes any number of images of {sizes}", _compare_onnx(path, pyramid, example)]


def _onnx_program(pyramid: _Pyramid, example: torch.Tensor, dynamic: dict[int, Any]) -> torch.onnx.ONNXProgram:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # the exporter prints and warns of its own ways
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            pyramid,
            (example,),
            input_names=["pixel_values"],
            output_names=[f"features_{level}" for level in range(len(pyramid.stages))],
            dynamic_shapes=(dynamic,),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program


@torch.no_grad()
def _compare_onnx(path: Path, pyramid: _Pyramid, example: torch.Tensor) -> str:
    """Run the graph on one image and on several; a SimIPUError where its features are not PyTorch's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    worst = 0.0
    for pixels in (example, example[:1]):
        found = session.run(None, {"pixel_values": pixels.numpy()})
        for actual, expected in zip(found, pyramid(pixels), strict=True):
            difference = (torch.from_numpy(actual) - expected).abs().max() / expected.abs().max()
            worst = max(worst, difference.item())
    if not worst <= ONNX_TOLERANCE:
        raise SimIPUError(f"the ONNX graph is not the network: features differ by {worst:.1e} of the largest")
    return f"onnxruntime computes the same features as PyTorch (difference {worst:.1e} of the largest)"


def is_export(path: Path, whole_model: bool = False) -> bool:
    """Whether something is what an earlier export (or the conversion of a whole model) wrote, and nothing else."""
    try:
        if path.suffix == ".onnx":
            return b"simipu_hf" in path.read_bytes()
        if path.is_file():
            return bool(read_weights(path)[1])
        config = read_json(path / "config.json")
    except (OSError, SimIPUError):
        return False
    own = {"config.json", "model.safetensors", "preprocessor_config.json", TRAINED_STATISTICS}
    if whole_model:
        own |= {"processor_config.json", "image_encoder", *(file.name for file in path.glob("*.py"))}
    marked = config.get("model_type") == "simipu" if whole_model else "simipu" in config
    return marked and {entry.name for entry in path.iterdir()} <= own


def _transformers_name(name: str) -> str:
    """`ResNetModel`'s name for timm's, of a plain ResNet."""
    kind = {"conv": "convolution", "bn": "normalization"}
    name = re.sub(r"^(conv|bn)1\.", lambda m: f"embedder.embedder.{kind[m[1]]}.", name)
    name = re.sub(r"^layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.", name)
    name = re.sub(r"(conv|bn)(\d)\.", lambda m: f"layer.{int(m[2]) - 1}.{kind[m[1]]}.", name)
    return name.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")


def _official_network(state: StateDict, weights: EncoderWeights) -> SimIPUForPreTraining:
    """The network, without memory, that weights under official names belong to."""
    with torch.device("meta"):
        return SimIPUForPreTraining(SimIPUConfig.from_preset("official", **official_fields(state, weights)))


def _note(weights: EncoderWeights) -> dict[str, Any]:
    """What names and tensors do not say, in types that a safe reader accepts."""
    values = set(weights.batch_norm_eps.values())
    return {
        "architecture": weights.architecture,
        "batch_norm_eps": values.pop() if len(values) == 1 else None,
        "untrained": weights.untrained,
        **asdict(weights.input),
    }


def _notes(weights: EncoderWeights, folded: bool) -> list[str]:
    notes = []
    if folded and weights.batch_norm_eps != batch_norm_eps(weights.template()):
        notes.append("the trained batch-norm epsilon is folded into running_var: equal in evaluation mode")
    if weights.untrained:
        notes.append(f"the training did not reach {', '.join(weights.untrained)}: use the features before them")
    if weights.input.channel_order == "bgr":
        notes.append(
            "the first convolution expects BGR, and no loader reorders channels by itself: "
            "pass image[:, [2, 1, 0]], or export with channel_order='rgb'"
        )
    return notes
