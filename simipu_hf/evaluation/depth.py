"""Monocular depth by the published protocol (Eigen et al. 2014; `metrics.py` and `kitti.py` of the depth toolbox).

A depth map holds metres along the camera's optical axis; 0 marks pixels without ground truth. Metrics are
computed in float64 for each image, then averaged over images, so that every image counts the same however many
of its pixels are valid. No median scaling: the predictions are metric.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import DepthEstimatorOutput

from ..data.depth import KB_CROP, DepthFrame
from ..data.frames import crop_window, to_pixel_values
from ..errors import SimIPUError
from ..modeling.image_processing_simipu import SimIPUImageProcessor
from ..training.arguments import DepthTaskArguments, EvaluateDepthArguments

METRICS = ("a1", "a2", "a3", "abs_rel", "rmse", "log10", "rmse_log", "silog", "sq_rel")
HIGHER_IS_BETTER = ("a1", "a2", "a3")
# metres; one more, up to the depth that counts at most, where that is beyond them
RANGES = ((0.0, 20.0), (20.0, 40.0), (40.0, 60.0), (60.0, 80.0))

# top, bottom, left, right as shares of the ground truth's height and width
CROPS: dict[str, tuple[float, float, float, float]] = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "none": (0.0, 1.0, 0.0, 1.0),
}


@dataclass(frozen=True)
class DepthProtocol:
    """Which pixels count, and how they are predicted.

    Args:
        crop: `"garg"` (Garg et al. 2016, the KITTI default), `"eigen"` (Eigen et al. 2014) or `"none"`.
        min_depth, max_depth: metres; ground truth strictly between them counts, predictions are clamped to them.
        kb_crop: only the bottom centre of 352 x 1216 pixels counts, and `crop` is a part of that, as published.
        flip_test: predictions are the mean of those for the image and for its mirror image, as published.
    """

    crop: Literal["garg", "eigen", "none"] = "garg"
    min_depth: float = 1e-3
    max_depth: float = 80.0
    kb_crop: bool = False
    flip_test: bool = False

    @classmethod
    def from_arguments(cls, arguments: DepthTaskArguments | EvaluateDepthArguments) -> "DepthProtocol":
        """The protocol that a command's flags describe."""
        min_depth = getattr(arguments, "min_depth", cls.min_depth)
        return cls(arguments.evaluation_crop, min_depth, arguments.max_depth, arguments.kb_crop, arguments.flip_test)

    def mask(self, target: np.ndarray, name: str = "the image") -> np.ndarray:
        """Which pixels of a ground truth (`(H, W)`, metres) count.

        Raises:
            SimIPUError: the image is smaller than the KITTI crop; `name` says which.
        """
        kept = {"height": KB_CROP[0], "width": KB_CROP[1]} if self.kb_crop else None
        first_row, first_column, height, width = crop_window(SimIPUImageProcessor(crop_size=kept), target.shape, name)
        top, bottom, left, right = CROPS[self.crop]
        inside = np.zeros(target.shape, dtype=bool)
        window = inside[first_row : first_row + height, first_column : first_column + width]
        window[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = True
        return inside & (target > self.min_depth) & (target < self.max_depth)


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


def map_metrics(
    name: str, prediction: np.ndarray, target: np.ndarray, protocol: DepthProtocol
) -> dict[str, dict[str, float]]:
    """[`depth_metrics`] of one image: of all its pixels that count (`"all"`), and of each range of true depth.

    Args:
        name: what errors call the image.
        prediction, target (`(H, W)`): metres; the target is 0 where there is no ground truth.

    Raises:
        SimIPUError: the shapes differ, or the prediction holds NaN where it counts.
    """
    if prediction.shape != target.shape:
        raise SimIPUError(f"{name}: predicted depth has shape {prediction.shape}, ground truth {target.shape}")
    mask = protocol.mask(target, name)
    predicted, true = prediction[mask].astype(np.float64), target[mask]
    if np.isnan(predicted).any():
        raise SimIPUError(f"{name}: the predicted depth is NaN at {int(np.isnan(predicted).sum())} evaluated pixels")
    predicted = predicted.clip(protocol.min_depth, protocol.max_depth)
    metrics = {"all": depth_metrics(predicted, true)}
    farther = [(RANGES[-1][1], protocol.max_depth)] if protocol.max_depth > RANGES[-1][1] else []
    for low, high in (*RANGES, *farther):
        part = (true >= low) & (true < high)
        metrics[f"{low:g}-{high:g} m"] = depth_metrics(predicted[part], true[part])
    return metrics


def mean_metrics(per_image: Iterable[dict[str, float]]) -> dict[str, float]:
    """Mean over images, leaving out images without a valid pixel; NaN where no image has one."""
    valid = [metrics for metrics in per_image if not np.isnan(metrics["abs_rel"])]
    return {name: float(np.mean([m[name] for m in valid])) if valid else float("nan") for name in METRICS}


def evaluate_maps(
    maps: Iterable[tuple[str, np.ndarray, np.ndarray]],
    protocol: DepthProtocol | None = None,
    gather: Callable[[list], list] = lambda results: results,
) -> dict[str, Any]:
    """Evaluate predicted depth maps against their ground truth.

    evaluate_maps([("000001", prediction, target)])["metrics"]["abs_rel"]

    Args:
        maps: frame name, prediction and target of each image, both `(H, W)` in metres.
        protocol: which pixels count.
        gather: collects the results of all processes, where each has a share of the images.

    Returns:
        A dictionary ready for JSON: `metrics` (means over images), `per_range`, `per_image`, `num_images`,
        `num_images_without_target` and the `protocol`.

    Raises:
        SimIPUError: no image has a valid pixel, shapes differ, or a prediction is NaN.
    """
    protocol = protocol or DepthProtocol()
    results = gather([(name, map_metrics(name, prediction, target, protocol)) for name, prediction, target in maps])
    without_target = sum(np.isnan(metrics["all"]["abs_rel"]) for _, metrics in results)
    if without_target == len(results):
        raise SimIPUError(
            f"none of {len(results)} images has a target within {protocol.min_depth} to {protocol.max_depth} m in the "
            f"{protocol.crop} crop"
        )
    parts = {part: mean_metrics(metrics[part] for _, metrics in results) for part in results[0][1]}
    return {
        "metrics": parts.pop("all"),
        "per_range": parts,
        "num_images": len(results),
        "num_images_without_target": int(without_target),
        "protocol": {**asdict(protocol), "average": "per image, then mean"},
        "per_image": [{"frame_id": name, **metrics["all"]} for name, metrics in results],
    }


@torch.no_grad()
def predict_depth(
    model: nn.Module, frame: DepthFrame, processor: SimIPUImageProcessor, flip_test: bool = False
) -> np.ndarray:
    """Predicted depth of a frame's original image, `(H, W)` float32, metres: what the depth pipeline returns for it.

    Args:
        model: maps `pixel_values` to an output with `predicted_depth`.
        flip_test: the mean of the predictions for the image and its mirror image.
    """
    pixel_values = to_pixel_values([frame.image], processor).to(next(model.parameters()).device)
    depth = model(pixel_values=pixel_values).predicted_depth
    if flip_test:
        depth = (depth + model(pixel_values=pixel_values.flip(-1)).predicted_depth.flip(-1)) / 2
    output = DepthEstimatorOutput(predicted_depth=depth)
    unpadded = processor.with_settings(do_pad=False)  # as `to_pixel_values` makes them
    (result,) = unpadded.post_process_depth_estimation(output, [frame.depth.shape])
    return result["predicted_depth"].float().cpu().numpy()


def evaluate_frames(
    model: nn.Module,
    frames: Iterable[DepthFrame],
    processor: SimIPUImageProcessor,
    protocol: DepthProtocol,
    gather: Callable[[list], list] = lambda results: results,
    show: Callable[[DepthFrame, np.ndarray], None] = lambda frame, prediction: None,
) -> dict[str, Any]:
    """Evaluate a model on frames, at the resolution of their ground truth; as [`evaluate_maps`].

    Args:
        model: maps `pixel_values` to an output with `predicted_depth`; it is left in the mode it was in.
        frames: prepared with `processor`, the model's.
        protocol: which pixels count, and whether predictions are averaged with those of the mirror image.
        gather: see [`evaluate_maps`].
        show: is given every frame and its predicted depth, for pictures.
    """

    def maps() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for frame in frames:
            prediction = predict_depth(model, frame, processor, protocol.flip_test)
            show(frame, prediction)
            yield frame.frame_id, prediction, frame.depth

    was_training = model.training
    model.eval()
    try:
        return evaluate_maps(maps(), protocol, gather)
    finally:
        model.train(was_training)
