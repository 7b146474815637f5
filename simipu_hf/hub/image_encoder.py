"""`load_image_encoder`: one call for every place where a trained image encoder can lie."""

import json
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import safe_open
from timm.models import PretrainedCfg

from simipu_hf.errors import SimIPUError
from simipu_hf.hub.convert import encoder_from_checkpoint
from simipu_hf.hub.export import TRAINED_STATISTICS
from simipu_hf.hub.weights import (
    ChannelOrder,
    EncoderWeights,
    InputConvention,
    batch_norm_eps,
    fold_batch_norm_eps,
    read_json,
    read_safetensors,
    timm_template,
)
from simipu_hf.modeling.image_encoder import TimmModel
from simipu_hf.training.checkpoint import newest_checkpoint

PREFIXES = ("simipu.image_encoder.", "image_encoder.")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_image_encoder(
    source: str | os.PathLike[str],
    features_only: bool = False,
    revision: str | None = None,
    channel_order: ChannelOrder | None = None,
    verbose: bool = True,
    **kwargs: Any,
) -> tuple[TimmModel, dict[str, Any]]:
    """An image encoder as a timm model in training mode, and its data configuration.

    Args:
        source: a run folder (its final model, else its newest complete checkpoint), a checkpoint in it, an encoder
            folder, a Hub id of either kind (`user/name`), an official or exported `.pth` file, or a timm name
            (`timm:resnet50`, `resnet50`), whose ImageNet weights are taken unless `pretrained=False`.
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
    name = str(source).removeprefix("timm:")
    if str(source).startswith("timm:") or (not Path(source).exists() and timm.is_model(name)):
        return _timm_model(name, features_only, verbose, **kwargs)
    weights = find_image_encoder(source, revision)
    if channel_order is not None:
        weights = weights.with_channel_order(channel_order)
    if verbose:
        print(weights.description, file=sys.stderr)
        if weights.input.channel_order == "bgr":
            print(
                f"It takes {weights.input}, which a data configuration cannot say; channel_order='rgb' reorders it",
                file=sys.stderr,
            )
    plain = weights.with_own_eps()
    if features_only:
        kwargs["features_only"] = True
    else:
        kwargs.setdefault("num_classes", 0)
    overlay = {"state_dict": dict(plain.state_dict), "num_classes": 0, "custom_load": False, "tag": "simipu"}
    overlay |= plain.input.data_config()
    try:
        model = timm.create_model(
            plain.architecture,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            **{**plain.model_args, **kwargs},
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise SimIPUError(f"{source}: timm cannot build {plain.architecture} from it: {error}") from error
    model = cast("TimmModel", model)
    model.pretrained_cfg.pop("state_dict", None)  # else the model would hold its initial weights for ever
    return model, timm.data.resolve_model_data_config(model)


def find_image_encoder(source: str | os.PathLike[str], revision: str | None = None) -> EncoderWeights:
    """The image encoder at `source` (see [`load_image_encoder`]; timm names excepted) as it was trained."""
    path = Path(source)
    if path.suffix == ".safetensors" and (path.parent / "config.json").is_file():
        path = path.parent  # the weights of a folder that says what they are
    if path.is_file():
        return encoder_from_checkpoint(path)
    if path.is_dir():
        return _from_folder(path, str(path))
    if HUB_ID.fullmatch(str(source)):
        return _from_folder(_download(str(source), revision), f"Hub repository {source}")
    raise SimIPUError(f"{source}: no such file or folder, no Hub id (user/name), and no timm model of that name")


def _from_folder(folder: Path, where: str) -> EncoderWeights:
    if not (folder / "config.json").is_file():
        return _from_newest_checkpoint(folder, where)
    config = read_json(folder / "config.json")
    if "image_config" in config:
        return _from_simipu(folder, config, where)
    if "architecture" in config:
        return _from_timm_folder(folder, config, where)
    raise SimIPUError(
        f"{where}: config.json is of a {config.get('model_type', 'nameless')!r} model; expected a SimIPU model "
        "(image_config) or a timm encoder (architecture)"
    )


def _from_newest_checkpoint(folder: Path, where: str) -> EncoderWeights:
    damaged: list[str] = []
    newest = newest_checkpoint(folder, on_damaged=damaged.append)
    if newest is None:
        found = "; ".join(damaged) or _listing(folder)
        raise SimIPUError(f"{where}: expected config.json or a complete checkpoint-<step>, found {found or 'nothing'}")
    return _from_folder(newest, f"{where} (no final model yet), {newest.name}")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a transformers folder: one, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(read_json(index).get("weight_map", {}).values())
        if any(Path(name).name != name for name in names):
            raise SimIPUError(f"{index}: names weight files outside its folder")
        return [folder / name for name in sorted(names)]
    return [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []


def _from_simipu(folder: Path, config: dict[str, Any], where: str) -> EncoderWeights:
    """From a SimIPU (or depth) model; its `image_encoder/` folder is used where its own weights are absent."""
    files = _weight_files(folder)
    if not files:
        if (folder / "image_encoder" / "config.json").is_file():
            return _from_folder(folder / "image_encoder", f"{where}, image_encoder/")
        raise SimIPUError(f"{where}: expected model.safetensors, found {_listing(folder)}")
    image_config = config["image_config"]
    if not isinstance(image_config, dict) or not isinstance(image_config.get("architecture"), str):
        raise SimIPUError(f"{where}: config.json names no image_config.architecture")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        for prefix in PREFIXES:
            if found := read_safetensors(file, prefix):
                state |= found
                break
    model_args = image_config.get("model_args") or {}
    eps = batch_norm_eps(timm_template(image_config["architecture"], model_args))
    if image_config.get("batch_norm_eps") is not None:
        eps = dict.fromkeys(eps, float(image_config["batch_norm_eps"]))
    weights = EncoderWeights(
        image_config["architecture"],
        state,
        eps,
        model_args,
        read_input_convention(folder),
        f"{where}: image encoder ({image_config['architecture']}) of a {config.get('model_type', 'SimIPU')} model",
    )
    return weights.check(where)


def _from_timm_folder(folder: Path, config: dict[str, Any], where: str) -> EncoderWeights:
    file = folder / "model.safetensors"
    if not file.is_file():
        raise SimIPUError(
            f"{where}: expected model.safetensors (pickled weights are not read), found {_listing(folder)}"
        )
    _check_fields(config, where)
    state = read_safetensors(file)
    pretrained_cfg, model_args = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    template = timm_template(config["architecture"], {k: v for k, v in model_args.items() if k != "num_classes"})
    eps = batch_norm_eps(template)
    trained = _trained_statistics(folder / TRAINED_STATISTICS, state, eps)
    if trained is not None:
        state, eps = trained
    keys = set(template.state_dict())
    classifier = {name for name in state if name not in keys}
    if classifier and all(name.split(".")[0] in ("fc", "head", "classifier") for name in classifier):
        state = {name: value for name, value in state.items() if name in keys}
    size = pretrained_cfg.get("input_size")
    convention = InputConvention(
        (config.get("simipu") or {}).get("channel_order", "rgb"),
        tuple(pretrained_cfg.get("mean", InputConvention.mean)),
        tuple(pretrained_cfg.get("std", InputConvention.std)),
        tuple(size[1:]) if size else None,
        pretrained_cfg.get("crop_mode") != "squash",
    )
    description = f"{where}: timm encoder {config['architecture']} ({pretrained_cfg.get('tag') or 'untagged'} weights)"
    return EncoderWeights(config["architecture"], state, eps, model_args, convention, description).check(where)


def _trained_statistics(
    file: Path, state: dict[str, torch.Tensor], own_eps: dict[str, float]
) -> tuple[dict[str, torch.Tensor], dict[str, float]] | None:
    """State and epsilons as trained, if `file` holds what `state` was folded from; `None` if it was changed since."""
    if not file.is_file():
        return None
    raw = read_safetensors(file)
    try:
        with safe_open(file, framework="pt") as opened:
            eps = {name: float(value) for name, value in json.loads(opened.metadata()["eps"]).items()}
        folded = fold_batch_norm_eps({**state, **raw}, eps, own_eps)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SimIPUError(f"{file}: expected running variances and their epsilons: {error!r}") from error
    unchanged = folded.keys() == state.keys() and all(torch.equal(folded[name], state[name]) for name in raw)
    return ({**state, **raw}, eps) if unchanged else None


def _check_fields(config: dict[str, Any], where: str) -> None:
    """Refuse a timm configuration with fields that timm does not write."""
    known = {"architecture", "num_classes", "num_features", "global_pool", "model_args", "pretrained_cfg", "simipu"}
    known |= {"label_names", "label_descriptions"}
    # what transformers writes, when it saved the folder again, depends on its version
    unknown = [] if "model_type" in config else [key for key in config if key not in known]
    pretrained_cfg = config.get("pretrained_cfg") or {}
    if not isinstance(pretrained_cfg, dict) or not isinstance(config.get("model_args") or {}, dict):
        raise SimIPUError(f"{where}: config.json: pretrained_cfg and model_args must be objects")
    known_to_timm = {field.name for field in fields(PretrainedCfg)}
    unknown += [f"pretrained_cfg.{key}" for key in pretrained_cfg if key not in known_to_timm]
    if unknown:
        raise SimIPUError(f"{where}: config.json has fields that timm does not know: {', '.join(unknown)}")


def read_input_convention(folder: Path) -> InputConvention:
    """What the processor files of a SimIPU folder say about the encoder's input; ImageNet's if there are none."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            image = content.get("image_processor", content)
            break
    else:
        return InputConvention()
    mean, std = tuple(image.get("image_mean") or (0.0,) * 3), tuple(image.get("image_std") or (1.0,) * 3)
    if not image.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    # the processor normalises value * factor; here values run from 0 to 1
    factor = image.get("rescale_factor", 1 / 255) if image.get("do_rescale", True) else 1.0
    scale = 1 / (255 * factor)
    size = image.get("size") or {}
    return InputConvention(
        "bgr" if image.get("do_flip_channel_order") else "rgb",
        tuple(round(float(value) * scale, 12) for value in mean),
        tuple(round(float(value) * scale, 12) for value in std),
        (int(size["height"]), int(size["width"])) if {"height", "width"} <= set(size) else None,
        bool(image.get("keep_aspect_ratio", False)),
    )


def _timm_model(name: str, features_only: bool, verbose: bool, **kwargs: Any) -> tuple[TimmModel, dict[str, Any]]:
    pretrained = kwargs.pop("pretrained", True)
    if features_only:
        kwargs["features_only"] = True
    else:
        kwargs.setdefault("num_classes", 0)
    try:
        model = cast("TimmModel", timm.create_model(name, pretrained=pretrained, **kwargs))
    except Exception as error:
        raise SimIPUError(f"timm model {name!r} ({'its own' if pretrained else 'random'} weights): {error}") from error
    if verbose:
        kind = f"its published weights ({model.pretrained_cfg.get('tag')})" if pretrained else "random weights"
        print(f"timm model {name} with {kind}", file=sys.stderr)
    return model, timm.data.resolve_model_data_config(model)


def _download(repo_id: str, revision: str | None) -> Path:
    """Configuration and encoder of a repository, in the Hub's cache: the encoder folder where there is one."""
    from huggingface_hub import snapshot_download

    from simipu_hf.hub.push import explain_hub_error

    small = ["config.json", "processor_config.json", "preprocessor_config.json", "image_encoder/*.json"]
    small += ["image_encoder/*.safetensors"]
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=small))
        if not (folder / "image_encoder" / "config.json").is_file():
            weights = ["*.safetensors", "*.safetensors.index.json"]
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=small + weights))
    except Exception as error:
        raise explain_hub_error(error, repo_id, revision) from error
    return folder


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
