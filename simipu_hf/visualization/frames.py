"""`visualize`: all pictures of chosen frames of a data set and of what a model makes of them."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from simipu_hf.data.augmentation import TwoViewAugmentation
from simipu_hf.data.loading import load_pretraining_dataset
from simipu_hf.data.rows import Frame
from simipu_hf.errors import SimIPUError
from simipu_hf.hub.card import CURVES
from simipu_hf.hub.files import written_aside
from simipu_hf.training.metrics import METRICS_FILE, read_metrics

from .curves import draw_training_curves
from .features import FrameEmbeds, Principal, embed_frame, encode_image, match_views, similarities
from .figures import draw_image_features, draw_matches, draw_points_on_image, draw_retrieval, draw_shared_features
from .models import LoadedModel, load_model
from .scene import scene_html
from .style import save_figure


def visualize(
    output_dir: str | os.PathLike,
    model: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str | None = None,
    frames: Sequence[int] = (0,),
    point: int | None = None,
    device: str | None = None,
) -> list[Path]:
    """Draws chosen frames, and what a model makes of them.

    For each frame, named by its `frame_id`: `*_points.png`, the points over the image; with a SimIPU model also
    `*_matches.png`, two views with their matches, `*_shared_features.png`, image and point features as colours, and
    `*_retrieval.png`, where in the image the features of some points are found; with any model `*_image_features.png`,
    the features of its image encoder as colours; and `*_scene.html`, the points in 3-D to turn and zoom. If the
    model's run left a `metrics.jsonl`, `training_curves.png` too.

    Args:
        output_dir: folder for the pictures; those of an earlier call are replaced.
        model: a run (its final model, else its newest checkpoint), a checkpoint, a Hub id, or anything else that
            `simipu_hf.hub.image_encoder.load_image_encoder` reads, such as an image encoder alone. `None`: only the
            data are drawn.
        data_dir, dataset_name, dataset_config_name, split: as `load_pretraining_dataset`.
        frames: indices of rows of the split.
        point: which of the points that the model keeps to look for in the image, by index; `None`: a near, a middle
            and a far one.
        device: such as `"cuda"`; `None`: a GPU if there is one.

    Returns:
        The files written.

    Raises:
        SimIPUError: no such data set, frame, model or point, or the pictures cannot be written.
    """
    rows = load_pretraining_dataset(dataset_name, data_dir, dataset_config_name, split)
    for index in frames:
        if not 0 <= index < len(rows):
            raise SimIPUError(f"frames: the split has rows 0 to {len(rows) - 1}, found {index}")
    loaded = None if model is None else load_model(model, device)
    folder, written = Path(output_dir), []
    for index in tqdm(frames, desc="Drawing", unit="frame"):
        row = rows[index]
        figures, html = draw_frame(row, loaded, point)
        name = re.sub(r"[^\w.-]+", "_", str(row["frame_id"]))
        written += [save_figure(figure, folder / f"{name}_{kind}.png") for kind, figure in figures.items()]
        written.append(folder / f"{name}_scene.html")
        with written_aside(written[-1], overwrite=True) as aside:
            aside.write_text(html, encoding="utf-8")
    curves = None if model is None else _training_curves(Path(model))
    if curves is not None:
        written.append(save_figure(curves, folder / CURVES))
    return written


def draw_frame(
    row: Mapping[str, Any], model: LoadedModel | None = None, point: int | None = None
) -> tuple[dict[str, Figure], str]:
    """All pictures of one row: figures by the name of their kind, and the HTML of the 3-D page.

    Raises:
        SimIPUError: the row cannot be used, or there is no such point in the image.
    """
    frame = Frame.from_row(row)
    figures = {"points": draw_points_on_image(frame)}
    if model is None:
        return figures, scene_html(frame)
    figures["image_features"] = draw_image_features(
        frame, encode_image(model.encoder, model.image_processor, frame, model.stages)
    )
    if model.simipu is None or model.processor is None:
        return figures, scene_html(frame)
    try:
        matches = match_views(model.simipu, model.processor, row, TwoViewAugmentation())
        embeds = embed_frame(model.simipu, model.processor, row)
    except ValueError as error:
        raise SimIPUError(f"frame {frame.frame_id}: {error}") from error
    colors = Principal.fit(embeds.cells.values[embeds.cells.inside])
    chosen = choose_points(frame, embeds.coordinates) if point is None else [_checked(frame, embeds, point)]
    figures |= {
        "matches": draw_matches(matches, model.simipu.config.max_match_distance, frame.frame_id),
        "shared_features": draw_shared_features(frame, embeds, colors),
        "retrieval": draw_retrieval(
            frame,
            embeds.coordinates[chosen],
            [similarities(embeds, index) for index in chosen],
            [f"point {index}" for index in chosen],
        ),
    }
    return figures, scene_html(frame, embeds, colors)


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


def _checked(frame: Frame, embeds: FrameEmbeds, point: int) -> int:
    if not 0 <= point < len(embeds.coordinates):
        raise SimIPUError(f"point: the model keeps points 0 to {len(embeds.coordinates) - 1}, found {point}")
    if not frame.project(embeds.coordinates[[point]])[2][0]:
        raise SimIPUError(f"point: {point} of frame {frame.frame_id} lies outside the image; choose another")
    return point


def _training_curves(model: Path) -> Figure | None:
    """Of the run that `model` is, or is a checkpoint of."""
    path = next((p / METRICS_FILE for p in (model, model.parent) if (p / METRICS_FILE).is_file()), None)
    return None if path is None else draw_training_curves(read_metrics(path))
