"""Finds the model to draw: SimIPU with its heads, or an image encoder alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from simipu_hf.errors import SimIPUError
from simipu_hf.hub.image_encoder import HUB_ID, load_image_encoder
from simipu_hf.hub.weights import read_json
from simipu_hf.modeling.configuration_simipu import SimIPUConfig
from simipu_hf.modeling.feature_extraction_simipu import SimIPUFeatureExtractor
from simipu_hf.modeling.image_encoder import TimmModel
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.training.checkpoint import newest_checkpoint

LAST_STAGES = (-3, -2, -1)
LONG_EDGE = 1248  # pixels, for an image encoder that takes any size; a multiple of 32


@dataclass
class LoadedModel:
    """A model in evaluation mode.

    Args:
        encoder: its image encoder, a timm model.
        image_processor: of that encoder.
        stages: of the image encoder, to draw.
        simipu, processor: `None` where there is only an image encoder.
    """

    encoder: TimmModel
    image_processor: SimIPUImageProcessor
    stages: Sequence[int] = LAST_STAGES
    simipu: SimIPUForPreTraining | None = None
    processor: SimIPUProcessor | None = None


def load_model(source: str | os.PathLike, device: str | None = None) -> LoadedModel:
    """A SimIPU model with its heads, or else the image encoder at `source`.

    Args:
        source: a run, a checkpoint, a Hub id, or anything else that `load_image_encoder` reads.
        device: `None`: a GPU if there is one.

    Raises:
        SimIPUError: there is no model.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = Path(source)
    if place.is_dir() and not (place / "config.json").is_file():
        place = newest_checkpoint(place) or place
    where = str(place) if place.is_dir() else str(source)
    simipu = _load_simipu(where) if _model_type(where) == SimIPUConfig.model_type else None
    if simipu is None:
        encoder = load_image_encoder(source, channel_order="rgb", verbose=False)[0].to(device).eval()
        return LoadedModel(encoder, _image_processor(encoder))
    processor = _load_processor(where)
    simipu.to(device).eval()  # type: ignore[arg-type]  # transformers' decorator hides the method
    stages = simipu.config.image_encoder_config.out_indices
    return LoadedModel(simipu.simipu.image_encoder, processor.image_processor, stages, simipu, processor)


def _model_type(where: str) -> str | None:
    """`model_type` of the configuration in a folder or Hub repository; `None` where there is none."""
    path = Path(where) / "config.json"
    if path.is_file():
        return read_json(path).get("model_type")
    if Path(where).exists() or not HUB_ID.fullmatch(where):
        return None
    try:
        return PreTrainedConfig.get_config_dict(where)[0].get("model_type")
    except OSError as error:
        raise SimIPUError(f"{where}: {error}") from error


def _load_simipu(where: str) -> SimIPUForPreTraining | None:
    """`None` if it was saved without its heads, without which nothing can be compared."""
    try:
        loaded: Any = SimIPUForPreTraining.from_pretrained(where, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise SimIPUError(f"{where}: the model cannot be loaded ({error})") from error
    model, info = loaded
    return None if info["missing_keys"] else model


def _load_processor(where: str) -> SimIPUProcessor:
    try:
        return SimIPUProcessor(
            SimIPUImageProcessor.from_pretrained(where), SimIPUFeatureExtractor.from_pretrained(where)
        )
    except (OSError, ValueError) as error:
        raise SimIPUError(f"{where}: the processor cannot be loaded ({error})") from error


def _image_processor(encoder: TimmModel) -> SimIPUImageProcessor:
    """For an encoder alone: the size it was trained at where it says so, else the image's, reduced if large."""
    trained = encoder.pretrained_cfg
    has_size = trained.get("fixed_input_size") or trained.get("crop_mode") == "squash"
    height, width = trained["input_size"][1:] if has_size else (LONG_EDGE, LONG_EDGE)
    return SimIPUImageProcessor(
        size={"height": height, "width": width},
        keep_aspect_ratio=not has_size,
        image_mean=trained["mean"],
        image_std=trained["std"],
    )
