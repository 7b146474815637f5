"""Where a model or an image encoder can lie: the one place that resolves what people give as a source."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from PIL.Image import Resampling
from safetensors import SafetensorError, safe_open

from simipu_hf.data.sources import listed
from simipu_hf.errors import SimIPUError, first_line
from simipu_hf.hub.official import read_checkpoint
from simipu_hf.hub.weights import (
    ChannelOrder,
    EncoderWeights,
    InputConvention,
    StateDict,
    batch_norm_eps,
    fold_batch_norm_eps,
    read_json,
    read_safetensors,
    timm_template,
    untrained_layers,
)
from simipu_hf.modeling.configuration_simipu import SimIPUImageConfig
from simipu_hf.modeling.image_encoder import TimmModel, sorted_stages, timm_arguments
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.training.checkpoint import newest_checkpoint
from simipu_hf.training.distributed import choose_device

TRAINED_STATISTICS = "trained_running_var.safetensors"
"""File beside a timm export whose `running_var` carries an epsilon: the statistics as trained, for a way back."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PREFIXES = ("simipu.image_encoder.", "image_encoder.")


def load_image_encoder(
    source: str | os.PathLike[str],
    features_only: bool = False,
    revision: str | None = None,
    channel_order: ChannelOrder | None = None,
    verbose: bool = True,
    **kwargs: Any,
) -> tuple[TimmModel, dict[str, Any]]:
    """An image encoder as a timm model in training mode, and its data configuration.

    encoder, data_config = load_image_encoder("RUN", features_only=True)
    transform = timm.data.create_transform(**data_config)

    Args:
        source: a run folder (its final model, else its newest complete checkpoint), a checkpoint in it, an encoder
            folder, a Hub id of either kind (`user/name`), an official or exported `.pth` file, a timm name with its
            published weights (`timm:resnet50`, `resnet50`), or a timm name with random ones (`random:resnet50`).
        features_only: return the pyramid network of `timm.create_model(…, features_only=True)`.
        revision: branch, tag or commit of a Hub id.
        channel_order: reorder the first convolution for `"rgb"` (or `"bgr"`) tensors; `None` leaves it as trained,
            which for official checkpoints is BGR.
        verbose: say on standard error what was found.
        kwargs: further arguments of `timm.create_model`, such as `out_indices`, `in_chans`, `drop_path_rate`.

    Returns:
        The model, and `timm.data.create_transform`'s arguments for it.

    Raises:
        SimIPUError: nothing there, or something else than an image encoder; the message says what was found.
    """
    # timm's pyramid networks do not take num_classes
    kwargs = {"features_only": True, **kwargs} if features_only else {"num_classes": 0, **kwargs}
    if (name := _timm_name(source)) and channel_order in (None, "rgb"):
        architecture, description = name, _describe_timm(source)
        kwargs["pretrained"] = not str(source).startswith("random:")
    else:
        weights = find_image_encoder(source, revision).with_channel_order(channel_order).with_own_eps()
        architecture, description = weights.architecture, weights.description
        if weights.input.channel_order == "bgr":
            description += f"\nIt takes {weights.input}, which a data configuration cannot say: channel_order='rgb'"
        overlay = {"state_dict": dict(weights.state_dict), "num_classes": 0, "custom_load": False, "tag": "simipu"}
        overlay |= weights.input.data_config()
        kwargs = {**weights.model_args, **kwargs, "pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        model = cast("TimmModel", timm.create_model(architecture, **kwargs))
    except Exception as error:
        found = f"timm cannot build {architecture} with these weights (random:{architecture} has random ones)"
        raise SimIPUError(f"{source}: {found}: {error}") from error
    for network in (model, getattr(model, "model", model)):  # of a wrapper for its features as well
        network.pretrained_cfg.pop("state_dict", None)  # else the model would hold its initial weights for ever
    if verbose:
        print(description, file=sys.stderr)
    return model, timm.data.resolve_model_data_config(model)


def find_image_encoder(source: str | os.PathLike[str], revision: str | None = None) -> EncoderWeights:
    """The image encoder at `source` (see [`load_image_encoder`]) as it was trained."""
    if name := _timm_name(source):
        random = str(source).startswith("random:")
        encoder = timm_template(name) if random else load_image_encoder(name, verbose=False)[0]
        convention = InputConvention.from_data_config(timm.data.resolve_model_data_config(encoder))
        state = {} if random else encoder.state_dict()
        return EncoderWeights(name, state, batch_norm_eps(encoder), {}, convention, _describe_timm(source))
    path = Path(source)
    if path.is_file() and not _is_of_folder(path):
        return read_checkpoint(path)[0]
    folder = model_folder(source, revision, encoder_only=True)
    return _from_folder(folder, str(source) if folder.parent != path else str(folder))


def model_folder(source: str | os.PathLike[str], revision: str | None = None, encoder_only: bool = False) -> Path:
    """The folder with the model that `source` names: a run's final model or its newest complete checkpoint, or a Hub
    repository in the cache (with `encoder_only`, without what is not its image encoder).

    Raises:
        SimIPUError: nothing there; the message says what was found.
    """
    path = Path(source)
    if path.is_file() and not _is_of_folder(path):
        raise SimIPUError(f"{path}: expected a folder, or the model.safetensors of one with a config.json")
    path = path.parent if path.is_file() else path
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        damaged: list[str] = []
        if newest := newest_checkpoint(path, on_damaged=damaged.append):
            return newest
        found = "; ".join(damaged) or listed(path)
        raise SimIPUError(f"{path}: expected config.json or a complete checkpoint-<step>, found {found}")
    if not HUB_ID.fullmatch(str(source)):
        raise SimIPUError(f"{source}: no such file or folder, no Hub id (user/name), and no timm model of that name")
    try:
        for patterns in (["*.json", "image_encoder/*"], ["*.json", "*.safetensors"]):
            kept: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": "last-checkpoint/*"}
            folder = Path(snapshot_download(str(source), revision=revision, **kept))
            if encoder_only and (folder / "image_encoder" / "config.json").is_file():
                break
        return folder
    except Exception as error:
        raise hub_error(error, str(source)) from error


def _is_of_folder(file: Path) -> bool:
    """Whether these weights are what their folder's config.json is about, and not others that lie there."""
    return file.name in ("config.json", "model.safetensors") and (file.parent / "config.json").is_file()


def hub_error(error: BaseException, repo_id: str) -> SimIPUError:
    """What the Hub's client says, on one line behind the repository's name."""
    silent = "no answer" if isinstance(error, TimeoutError) else type(error).__name__
    said = " ".join(str(error).split()) or silent
    return error if isinstance(error, SimIPUError) else SimIPUError(f"Hub repository {repo_id}: {said}")


def _timm_name(source: str | os.PathLike[str]) -> str | None:
    """The timm name that `source` is, `None` for anything else."""
    name = re.sub(r"^(timm|random):", "", str(source))
    if name == str(source) and (Path(source).exists() or not timm.is_model(name)):
        return None
    if not timm.is_model(name):
        raise SimIPUError(f"{source}: timm {timm.__version__} has no model named {name!r}")
    return name


def _describe_timm(source: str | os.PathLike[str]) -> str:
    kind = "random" if str(source).startswith("random:") else "its published"
    return f"timm model {_timm_name(source)} with {kind} weights"


def _from_folder(folder: Path, where: str) -> EncoderWeights:
    config = read_json(folder / "config.json")
    if "image_config" in config:
        return _from_simipu(folder, config, where)
    if "architecture" in config:
        return _from_timm_folder(folder, config, where)
    raise SimIPUError(
        f"{where}: config.json is of a {config.get('model_type', 'nameless')!r} model; expected a SimIPU model "
        "(image_config) or a timm encoder (architecture)"
    )


def _from_simipu(folder: Path, config: dict[str, Any], where: str) -> EncoderWeights:
    """From a SimIPU (or depth) model; its `image_encoder/` folder is used where its own weights are absent."""
    file = folder / "model.safetensors"
    if not file.is_file():
        if (folder / "image_encoder" / "config.json").is_file():
            return _from_folder(folder / "image_encoder", f"{where}, image_encoder/")
        raise SimIPUError(f"{where}: expected {file.name}, found {listed(folder)}")
    try:
        image_config = SimIPUImageConfig(**config["image_config"])
        model_args = timm_arguments(image_config)
    except (TypeError, ValueError) as error:
        raise SimIPUError(f"{where}: config.json: image_config: {error}") from error
    architecture = image_config.architecture
    state = next((found for prefix in PREFIXES if (found := read_safetensors(file, prefix))), {})
    template = timm_template(architecture, model_args)
    eps = batch_norm_eps(template)
    if image_config.batch_norm_eps is not None:
        eps = dict.fromkeys(eps, float(image_config.batch_norm_eps))
    description = f"{where}: image encoder ({architecture}) of a {config.get('model_type', 'SimIPU')} model"
    convention = read_input_convention(folder)
    # those that features were sampled from, or that a depth or detection model was trained on
    stages = (config["image_config"] if config.get("model_type") == "simipu" else config).get("out_indices") or [-1]
    untrained = untrained_layers(template, sorted_stages(template, stages)[-1])
    return EncoderWeights(architecture, state, eps, model_args, convention, description, untrained).check(where)


def _from_timm_folder(folder: Path, config: dict[str, Any], where: str) -> EncoderWeights:
    file = folder / "model.safetensors"
    if not file.is_file():
        raise SimIPUError(
            f"{where}: expected model.safetensors (pickled weights are not read), found {listed(folder)}"
        )
    pretrained_cfg, model_args = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    if not isinstance(pretrained_cfg, dict) or not isinstance(model_args, dict):
        raise SimIPUError(f"{where}: config.json: pretrained_cfg and model_args must be objects")
    state = read_safetensors(file)
    template = timm_template(config["architecture"], model_args)
    state, eps = _as_trained(folder / TRAINED_STATISTICS, state, batch_norm_eps(template))
    keys, declared = template.state_dict().keys(), template.pretrained_cfg.get("classifier") or ()
    classifiers = {"fc", "head", "classifier", *([declared] if isinstance(declared, str) else declared)}
    if all(name.split(".")[0] in classifiers for name in state.keys() - keys):
        state = {name: value for name, value in state.items() if name in keys}
    ours, architecture = config.get("simipu") or {}, config["architecture"]
    convention = InputConvention.from_data_config(pretrained_cfg, ours.get("channel_order", "rgb"))
    description = f"{where}: timm encoder {architecture} ({pretrained_cfg.get('tag') or 'untagged'} weights)"
    about = (model_args, convention, description, ours.get("untrained") or [])
    return EncoderWeights(architecture, state, eps, *about).check(where)


def _as_trained(file: Path, state: StateDict, own_eps: dict[str, float]) -> tuple[StateDict, dict[str, float]]:
    """State and epsilons as trained, if `file` holds what `state` was folded from and `state` is still that."""
    if not file.is_file():
        return state, own_eps
    raw = read_safetensors(file)
    try:
        with safe_open(file, framework="pt") as opened:
            eps = {name: float(value) for name, value in json.loads(opened.metadata()["eps"]).items()}
        folded = fold_batch_norm_eps({**state, **raw}, eps, own_eps)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SimIPUError(f"{file}: expected running variances and their epsilons: {error!r}") from error
    unchanged = folded.keys() == state.keys() and all(torch.equal(folded[name], state[name]) for name in raw)
    return ({**state, **raw}, eps) if unchanged else (state, own_eps)


def read_input_convention(folder: Path) -> InputConvention:
    """What the processor files of a SimIPU folder say about the encoder's input; ImageNet's if there are none.

    Raises:
        SimIPUError: they cannot be read.
    """
    names = ("processor_config.json", "preprocessor_config.json")
    if not any((folder / name).is_file() for name in names):
        return InputConvention()
    try:
        image = SimIPUImageProcessor.from_pretrained(folder)
    except (ValueError, OSError, AttributeError, TypeError) as error:
        raise SimIPUError(f"{folder}: its image processor cannot be read ({first_line(error)})") from error
    # the processor normalises value * factor; here values run from 0 to 1
    scale = 1 / (255 * image.rescale_factor) if image.do_rescale else 1 / 255
    mean, std = (image.image_mean, image.image_std) if image.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    return InputConvention(
        "bgr" if image.do_flip_channel_order else "rgb",
        tuple(round(float(value) * scale, 12) for value in mean),
        tuple(round(float(value) * scale, 12) for value in std),
        (image.size.height, image.size.width),
        "border" if image.keep_aspect_ratio else "squash",
        interpolation=Resampling(image.resample).name.lower(),
    )


def load_processor(folder: Path) -> SimIPUProcessor:
    """The processor saved with a SimIPU model, by this package's code alone.

    Raises:
        SimIPUError: there is none, it is damaged, of an earlier version, or of somebody else's code.
    """
    try:
        return SimIPUProcessor.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, AttributeError, TypeError) as error:
        raise SimIPUError(
            f"{folder}: its processor cannot be loaded; one of an earlier version, or with code of its own, is "
            f"refused ({first_line(error)})"
        ) from error


def load_dense_model(
    model_class: Any, source: str | os.PathLike[str], device: str | None = None
) -> tuple[Any, SimIPUImageProcessor]:
    """A saved fine-tuned model, in single precision, and its image processor.

    Args:
        model_class: a [`SimIPUDenseModel`].
        source: its folder or Hub id.
        device: of the model; a GPU where there is one if `None`.

    Raises:
        SimIPUError: no model of this class there, or no image processor beside it.
    """
    wanted = model_class.config_class.model_type
    try:
        fields, _ = model_class.config_class.get_config_dict(source)
        if fields.get("model_type") != wanted:
            raise SimIPUError(
                f"{source}: expected a {wanted!r} model, found {fields.get('model_type')!r}; make one with "
                f"simipu-hf finetune-{wanted.removeprefix('simipu_')}"
            )
        # weights that were saved in half precision, too: evaluation and training count in single
        model = model_class.from_pretrained(source, dtype=torch.float32)
        processor = SimIPUImageProcessor.from_pretrained(source)
    except SimIPUError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise SimIPUError(f"{source}: no {wanted!r} model with its image processor ({error})") from error
    return model.to(choose_device(device)), processor
