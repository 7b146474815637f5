"""Monocular depth by the published protocol (Eigen et al. 2014; `metrics.py` and `kitti.py` of the depth toolbox).

A depth map holds metres along the camera's optical axis; 0 marks pixels without ground truth. Metrics are
computed in float64 for each image, then averaged over images, so that every image counts the same however many
of its pixels are valid. No median scaling: the predictions are metric.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data.depth_samples import DepthFrame, DepthPreprocessing
from ..errors import SimIPUError
from ..modeling.configuration_simipu_depth import SimIPUDepthConfig
from ..modeling.image_processing_simipu import SimIPUImageProcessor
from ..modeling.modeling_simipu_depth import SimIPUForDepthEstimation

METRICS = ("a1", "a2", "a3", "abs_rel", "rmse", "log10", "rmse_log", "silog", "sq_rel")
HIGHER_IS_BETTER = ("a1", "a2", "a3")

Crop = Literal["garg", "eigen", "none"]

# top, bottom, left, right as shares of the ground truth's height and width
CROPS: dict[str, tuple[float, float, float, float]] = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "none": (0.0, 1.0, 0.0, 1.0),
}


def crop_box(crop: Crop, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right pixel of an evaluation crop; bottom and right are exclusive.

    Args:
        crop: `"garg"` (Garg et al. 2016, the KITTI default), `"eigen"` (Eigen et al. 2014) or `"none"`.
        height, width: size of the ground truth, 352 x 1216 in the published protocol.

    Raises:
        SimIPUError: an unknown crop.
    """
    if crop not in CROPS:
        raise SimIPUError(f"unknown evaluation crop {crop!r}: choose from {', '.join(CROPS)}")
    top, bottom, left, right = CROPS[crop]
    return int(top * height), int(bottom * height), int(left * width), int(right * width)


def evaluation_mask(
    target: np.ndarray, crop: Crop = "garg", min_depth: float = 1e-3, max_depth: float = 80.0
) -> np.ndarray:
    """Which pixels of a ground truth (`(H, W)`, metres) count: inside the crop and strictly within the range."""
    top, bottom, left, right = crop_box(crop, *target.shape)
    mask = np.zeros(target.shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask & (target > min_depth) & (target < max_depth)


def depth_metrics(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The nine metrics over the given pixels, in float64.

    With p the prediction and t the target, both of shape `(N,)` and above 0: a1, a2, a3 are the shares of pixels
    with max(p/t, t/p) below 1.25, 1.25², 1.25³; abs_rel = mean |p-t|/t; sq_rel = mean (p-t)²/t in metres;
    rmse in metres; rmse_log = root mean square of ln p - ln t; silog = 100 times the standard deviation of
    ln p - ln t (Eigen et al. 2014); log10 = mean |log10 p - log10 t|.

    Returns:
        One number for each name in `METRICS`; NaN for each where no pixel is given.
    """
    if target.size == 0:
        return dict.fromkeys(METRICS, float("nan"))
    prediction, target = prediction.astype(np.float64), target.astype(np.float64)
    ratio = np.maximum(prediction / target, target / prediction)
    difference = prediction - target
    log_difference = np.log(prediction) - np.log(target)
    values = {
        "a1": np.mean(ratio < 1.25),
        "a2": np.mean(ratio < 1.25**2),
        "a3": np.mean(ratio < 1.25**3),
        "abs_rel": np.mean(np.abs(difference) / target),
        "rmse": np.sqrt(np.mean(difference**2)),
        "log10": np.mean(np.abs(np.log10(prediction) - np.log10(target))),
        "rmse_log": np.sqrt(np.mean(log_difference**2)),
        # np.std subtracts the mean first: no rounding below zero when every error is the same
        "silog": 100.0 * np.std(log_difference),
        "sq_rel": np.mean(difference**2 / target),
    }
    return {name: float(values[name]) for name in METRICS}


def image_metrics(
    prediction: np.ndarray,
    target: np.ndarray,
    crop: Crop = "garg",
    min_depth: float = 1e-3,
    max_depth: float = 80.0,
    name: str = "the image",
) -> dict[str, float]:
    """[`depth_metrics`] of one image, the prediction clamped to the depth range as published.

    Args:
        prediction, target (`(H, W)`): metres; the target is 0 where there is no ground truth.
        crop, min_depth, max_depth: which pixels count, see [`evaluation_mask`].
        name: what errors call the image.

    Raises:
        SimIPUError: the shapes differ, or the prediction holds NaN where it counts.
    """
    if prediction.shape != target.shape:
        raise SimIPUError(f"{name}: predicted depth has shape {prediction.shape}, ground truth {target.shape}")
    mask = evaluation_mask(target, crop, min_depth, max_depth)
    values = prediction[mask]
    if np.isnan(values).any():
        raise SimIPUError(f"{name}: the predicted depth is NaN at {int(np.isnan(values).sum())} evaluated pixels")
    return depth_metrics(np.clip(values.astype(np.float64), min_depth, max_depth), target[mask])


def mean_metrics(per_image: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean over images, leaving out images without a valid pixel; NaN where no image has one."""
    means = {}
    for name in METRICS:
        values = np.array([metrics[name] for metrics in per_image], dtype=np.float64)
        values = values[~np.isnan(values)]
        means[name] = float(values.mean()) if values.size else float("nan")
    return means


def evaluate_maps(
    pairs: Iterable[tuple[str, np.ndarray, np.ndarray]],
    crop: Crop = "garg",
    min_depth: float = 1e-3,
    max_depth: float = 80.0,
    ranges: Sequence[tuple[float, float]] = ((0.0, 20.0), (20.0, 40.0), (40.0, 60.0), (60.0, 80.0)),
) -> dict:
    """Evaluate predicted depth maps against their ground truth.

    Args:
        pairs: frame name, prediction and target of each image, both maps `(H, W)` in metres.
        crop, min_depth, max_depth: the protocol, see [`evaluation_mask`].
        ranges: intervals of true depth, in metres, evaluated on their own as well (lower bound included).

    Returns:
        A dictionary ready for JSON: `metrics` (means over images), `per_range`, `per_image`, `num_images`,
        `num_images_without_target` and the `protocol`.

    Raises:
        SimIPUError: no image has a valid pixel, shapes differ, or a prediction is NaN.
    """
    per_image: list[dict[str, float]] = []
    names: list[str] = []
    per_range: dict[tuple[float, float], list[dict[str, float]]] = {(low, high): [] for low, high in ranges}
    for name, prediction, target in pairs:
        names.append(name)
        per_image.append(image_metrics(prediction, target, crop, min_depth, max_depth, name))
        for (low, high), results in per_range.items():
            part = np.where((target >= low) & (target < high), target, 0)
            results.append(image_metrics(prediction, part, crop, min_depth, max_depth, name))
    without_target = sum(np.isnan(metrics["abs_rel"]) for metrics in per_image)
    if without_target == len(per_image):
        raise SimIPUError(
            f"none of {len(per_image)} images has a target within {min_depth} to {max_depth} m in the {crop} crop"
        )
    return {
        "metrics": mean_metrics(per_image),
        "per_range": {f"{low:g}-{high:g} m": mean_metrics(results) for (low, high), results in per_range.items()},
        "num_images": len(per_image),
        "num_images_without_target": int(without_target),
        "protocol": {"crop": crop, "min_depth": min_depth, "max_depth": max_depth, "average": "per image, then mean"},
        "per_image": [{"frame_id": name, **metrics} for name, metrics in zip(names, per_image, strict=True)],
    }


@torch.no_grad()
def predict_depth(
    model: nn.Module, pixel_values: torch.Tensor, size: tuple[int, int] | None = None, flip_test: bool = True
) -> torch.Tensor:
    """Predicted depth of a batch, averaged with that of the mirrored images if `flip_test`.

    Args:
        model: maps `pixel_values` to an output with `predicted_depth` (`(B, H, W)`, metres).
        pixel_values (`(B, 3, H, W)`): normalised images.
        size: height and width of the result (bilinear); `None` keeps the model's.

    Returns:
        `(B, height, width)`, metres, float32.
    """
    depth = model(pixel_values=pixel_values).predicted_depth.float()
    if flip_test:
        mirrored = model(pixel_values=pixel_values.flip(-1)).predicted_depth.float().flip(-1)
        depth = (depth + mirrored) / 2
    if size is not None and tuple(depth.shape[-2:]) != tuple(size):
        depth = nn.functional.interpolate(depth[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return depth


def evaluate_frames(
    model: nn.Module,
    frames: Iterable[DepthFrame],
    preprocessing: DepthPreprocessing,
    *,
    flip_test: bool = True,
    picture_dir: str | os.PathLike | None = None,
    num_pictures: int = 8,
    **protocol: Any,
) -> dict[str, Any]:
    """Evaluate a model on frames, at the resolution of their ground truth.

    Args:
        model: maps `pixel_values` to an output with `predicted_depth`; it is left in the mode it was in.
        frames: what `preprocessing.load` returns.
        preprocessing: normalises the images.
        flip_test: average with the prediction of the mirrored image, as published.
        picture_dir: write a picture of each of the first `num_pictures` frames there, see [`depth_picture`].
        protocol: `crop`, `min_depth`, `max_depth` and `ranges` of [`evaluate_maps`].

    Returns:
        As [`evaluate_maps`].
    """
    device = next(model.parameters()).device
    max_depth = protocol.get("max_depth", 80.0)

    def pairs() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for number, frame in enumerate(frames):
            pixel_values = preprocessing.normalize(frame.image)[None].to(device)
            prediction = predict_depth(model, pixel_values, frame.full_depth.shape, flip_test)[0].cpu().numpy()
            if picture_dir is not None and number < num_pictures:
                path = Path(picture_dir) / f"{number:03d}_{re.sub(r'[^A-Za-z0-9]+', '_', frame.frame_id)}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                depth_picture(frame.image, prediction, frame.full_depth, max_depth).save(path)
            yield frame.frame_id, prediction, frame.full_depth

    was_training = model.training
    model.eval()
    try:
        result = evaluate_maps(pairs(), **protocol)
    finally:
        model.train(was_training)
    result["protocol"]["flip_test"] = flip_test
    return result


def load_depth_model(
    model: str | os.PathLike, kb_crop: bool = True
) -> tuple[SimIPUForDepthEstimation, DepthPreprocessing]:
    """A saved depth model, and how its frames are prepared: as its image processor says, after the crop.

    Raises:
        SimIPUError: no SimIPU depth model there, or no image processor beside it.
    """
    try:
        fields, _ = SimIPUDepthConfig.get_config_dict(model)
        if fields.get("model_type") != SimIPUDepthConfig.model_type:
            raise SimIPUError(
                f"{model}: expected a {SimIPUDepthConfig.model_type!r} model, found {fields.get('model_type')!r}"
            )
        network = SimIPUForDepthEstimation.from_pretrained(model)
        processor = SimIPUImageProcessor.from_pretrained(model)
    except OSError as error:
        raise SimIPUError(f"{model}: no depth model with its image processor ({error})") from error
    size = (processor.size["height"], processor.size["width"])
    return network, DepthPreprocessing(kb_crop, size, tuple(processor.image_mean), tuple(processor.image_std))


def depth_picture(image: np.ndarray, prediction: np.ndarray, target: np.ndarray, max_depth: float) -> Image.Image:
    """Image, predicted depth, and where the prediction is wrong, one below the other.

    Depth runs from red (near) to blue (`max_depth`) on a logarithmic scale from 1 m; the error map shows the relative
    error at every pixel of the target, from green (0) over yellow (10 %) to red (20 % and more).

    Args:
        image: `(h, w, 3)` uint8.
        prediction, target: `(H, W)`, metres, the target 0 where unknown.
    """
    height, width = prediction.shape
    share = np.log(np.clip(prediction, 1, max_depth)) / np.log(max_depth)
    depth = _hue(share * 170, np.full_like(share, 255))
    known = target > 0
    error = np.abs(prediction - target) / np.where(known, target, 1)
    errors = _hue(85 * (1 - np.clip(error / 0.2, 0, 1)), np.where(known, 255, 0))
    picture = Image.new("RGB", (width, 3 * height))
    for row, panel in enumerate((Image.fromarray(image).resize((width, height)), depth, errors)):
        picture.paste(panel, (0, row * height))
    return picture


def _hue(hue: np.ndarray, value: np.ndarray) -> Image.Image:
    """Fully saturated colours; `hue` from 0 (red) over 85 (green) to 170 (blue), `value` from 0 (black) to 255."""
    channels = np.stack([hue, np.full_like(hue, 255), value], axis=-1)
    return Image.fromarray(channels.astype(np.uint8), mode="HSV").convert("RGB")


def format_metrics(metrics: dict[str, float]) -> str:
    """The nine metrics as two lines of text."""
    names = "  ".join(f"{name:>8}" for name in METRICS)
    return names + "\n" + "  ".join(f"{metrics[name]:8.4f}" for name in METRICS)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all; NaN, which JSON does not have, becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(_without_nan(content), indent=2), encoding="utf-8")
    aside.replace(path)


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
