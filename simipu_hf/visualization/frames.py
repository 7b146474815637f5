"""`visualize`: all pictures of chosen frames of a data set and of what a model makes of them."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from matplotlib.figure import Figure
from safetensors import SafetensorError
from tqdm.auto import tqdm

from simipu_hf.data.loading import load_pretraining_dataset
from simipu_hf.data.rows import Frame, calibration_from_row, image_from_row
from simipu_hf.data.sources import given_sources, refuse_second_split, undecoded
from simipu_hf.data.two_views import TwoViewAugmentation
from simipu_hf.errors import SimIPUError
from simipu_hf.files import atomic_write
from simipu_hf.hub.card import CURVES
from simipu_hf.hub.sources import load_image_encoder, load_processor, model_folder
from simipu_hf.hub.weights import read_json
from simipu_hf.modeling.configuration_simipu import SimIPUConfig
from simipu_hf.modeling.geometry import camera_aligned_frame, transform_cloud
from simipu_hf.modeling.image_encoder import TimmModel, pad_divisor
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.training.distributed import choose_device
from simipu_hf.training.logging import METRICS_FILE, read_metrics

from .features import embed_frame, encode_image, match_views
from .figures import (
    draw_image_features,
    draw_matches,
    draw_points_on_image,
    draw_retrieval,
    draw_shared_features,
    draw_training_curves,
)
from .scene import scene_html
from .style import save_figure

LAST_STAGES = (-3, -2, -1)
LONG_EDGE = 1248  # pixels, for an image encoder that takes any size; a multiple of 32
# a SimIPU model with its heads and its processor, or an image encoder alone
Model: TypeAlias = tuple[SimIPUForPreTraining, SimIPUProcessor] | TimmModel


def visualize(
    output_dir: str | os.PathLike,
    model: str | os.PathLike | None = None,
    frames: Sequence[int] = (0,),
    device: str | None = None,
    **source: Any,
) -> list[Path]:
    """Draws chosen frames, and what a model makes of them.

    >>> visualize("pictures", model="RUN", data_dir="KITTI", split="val", frames=[0, 3])

    For each frame, named by its `frame_id`, and by its row too where an earlier one has that name: `*_points.png`, the
    points over the image; with a SimIPU model also `*_matches.png`, two views with their matches,
    `*_shared_features.png`, image and point features as colours, and `*_retrieval.png`, where in the image the
    features of some points are found; with any model `*_image_features.png`, the features of its image encoder as
    colours; and `*_scene.html`, the points in 3-D to turn and zoom. If the model's run left a `metrics.jsonl`,
    `training_curves.png` too.

    Args:
        output_dir: folder for the pictures; those of an earlier call are replaced.
        model: a run (its final model, else its newest checkpoint), a checkpoint, a Hub id, or anything else that
            `simipu_hf.hub.sources.load_image_encoder` reads, such as an image encoder alone. `None`: only the
            data are drawn.
        frames: indices of rows of the split.
        device: such as `"cuda"`; `None`: a GPU if there is one.
        source: the rows, by the arguments of `load_pretraining_dataset`, such as `data_dir` and `split`.

    Returns:
        The files written.

    Raises:
        SimIPUError: no such data set, frame or model, or the pictures cannot be written.
    """
    refuse_second_split(source.get("split"), *given_sources(source.get("dataset_name"), source.get("data_dir")))
    rows = undecoded(load_pretraining_dataset(**source))  # datasets would turn an image by its EXIF orientation
    for index in frames:
        if not 0 <= index < len(rows):
            raise SimIPUError(f"frames: the split has rows 0 to {len(rows) - 1}, found {index}")
    loaded = None if model is None else load_model(model, device)
    folder, written = Path(output_dir), []
    for index in tqdm(frames, desc="Drawing", unit="frame"):
        row = rows[index]
        row["image"] = image_from_row(row)
        figures, html = draw_frame(row, loaded)
        name = re.sub(r"[^\w.-]+", "_", str(row["frame_id"]))
        if folder / f"{name}_scene.html" in written:
            name = f"{name}_row{index}"
        written += [save_figure(figure, folder / f"{name}_{kind}.png") for kind, figure in figures.items()]
        written.append(folder / f"{name}_scene.html")
        with atomic_write(written[-1]) as stream:
            stream.write(html)
    runs: list[Path] = []
    if model is not None and (Path(model).is_dir() or Path(model).suffix == ".safetensors"):  # no timm name, no .pth
        runs = [Path(model), Path(model).parent]
    logged = next((run for run in runs if (run / METRICS_FILE).is_file()), None)
    return written if logged is None else [*written, *draw_curves(logged, folder)]


def draw_curves(run: Path, folder: Path) -> list[Path]:
    """The losses of a run so far, drawn into `folder` as the model card shows them; nothing where none was logged."""
    figure = draw_training_curves(read_metrics(run / METRICS_FILE))
    return [] if figure is None else [save_figure(figure, folder / CURVES)]


def load_model(source: str | os.PathLike, device: str | None = None) -> Model:
    """What `model` of [`visualize`] names, in evaluation mode."""
    if simipu := _load_simipu(source):
        simipu[0].to(choose_device(device)).eval()  # type: ignore[arg-type]  # transformers' decorator hides the method
        return simipu
    encoder = load_image_encoder(source, channel_order="rgb", verbose=False)[0]
    return encoder.to(choose_device(device)).eval()


def _load_simipu(source: str | os.PathLike) -> tuple[SimIPUForPreTraining, SimIPUProcessor] | None:
    """`None` for an image encoder alone, or a model saved without the heads that compare images with points."""
    try:
        folder = model_folder(source)
    except SimIPUError:  # a timm name or a file of weights; or nothing, which load_image_encoder explains
        return None
    if read_json(folder / "config.json").get("model_type") != SimIPUConfig.model_type:
        return None
    try:
        loaded: Any = SimIPUForPreTraining.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        model, info = loaded
        return None if info["missing_keys"] else (model, load_processor(folder))
    except SimIPUError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise SimIPUError(f"{folder}: the model cannot be loaded ({error})") from error


def _image_processor(encoder: TimmModel, image_size: tuple[int, ...]) -> SimIPUImageProcessor:
    """For an encoder alone: the size it was trained at where it says so, else the image's, reduced to `LONG_EDGE`."""
    trained = encoder.pretrained_cfg
    has_size = trained.get("fixed_input_size") or trained.get("crop_mode") == "squash"
    edge = min(LONG_EDGE, max(image_size))
    height, width = trained["input_size"][1:] if has_size else (edge, edge)
    return SimIPUImageProcessor(
        size={"height": height, "width": width},
        keep_aspect_ratio=not has_size,
        image_mean=trained["mean"],
        image_std=trained["std"],
        pad_size_divisor=pad_divisor(encoder),
    )


def aligned_frame(row: Mapping[str, Any]) -> Frame:
    """A row whose points are in the camera-aligned frame: x forward, y left, z up, whatever axes its LiDAR has.

    Raises:
        SimIPUError: its image, points or calibration are damaged.
    """
    frame = Frame.from_row(row)
    lidar_to_aligned, aligned_to_image = camera_aligned_frame(*calibration_from_row(row))
    return Frame(frame.frame_id, frame.image, transform_cloud(frame.points, lidar_to_aligned), aligned_to_image)


def draw_frame(row: Mapping[str, Any], model: Model | None = None) -> tuple[dict[str, Figure], str]:
    """All pictures of one row: figures by the name of their kind, and the HTML of the 3-D page.

    Raises:
        SimIPUError: the row cannot be used.
    """
    frame = aligned_frame(row)
    figures = {"points": draw_points_on_image(frame)}
    if model is None:
        return figures, scene_html(frame)
    if not isinstance(model, tuple):
        maps = encode_image(model, _image_processor(model, frame.image.shape[:2]), frame, LAST_STAGES)
        return figures | {"image_features": draw_image_features(frame, maps)}, scene_html(frame)
    simipu, processor = model
    stages = simipu.config.image_encoder_config.stages
    maps = encode_image(simipu.simipu.image_encoder, processor.image_processor, frame, stages)
    figures["image_features"] = draw_image_features(frame, maps)
    try:
        augmentation = TwoViewAugmentation.from_preset(simipu.config.preset, random_resize=None)
        matches = match_views(simipu, processor, row, augmentation)
        embeds = embed_frame(simipu, processor, row, frame)
    except ValueError as error:
        raise SimIPUError(f"frame {frame.frame_id}: {error}") from error
    figures |= {
        "matches": draw_matches(frame.frame_id, matches, simipu.config.max_match_distance),
        "shared_features": draw_shared_features(frame, embeds),
        "retrieval": draw_retrieval(frame, embeds, choose_points(frame, embeds.coordinates)),
    }
    return figures, scene_html(frame, embeds)


def choose_points(frame: Frame, coordinates: np.ndarray) -> list[int]:
    """A near, a middle and a far one of the points `(M, 3)` that lie in the image, by index.

    Raises:
        SimIPUError: none lies in it.
    """
    _, depth, inside = frame.project(coordinates)
    near_first = np.flatnonzero(inside)[np.argsort(depth[inside])]
    if len(near_first) == 0:
        raise SimIPUError(f"frame {frame.frame_id}: none of the points that the model keeps lies in the image")
    return list(dict.fromkeys(int(near_first[int(share * (len(near_first) - 1))]) for share in (0.1, 0.5, 0.9)))
