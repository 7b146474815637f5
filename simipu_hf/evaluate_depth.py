"""Evaluate a depth model by the published protocol."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data.depth import DepthDataset, DepthFrame, refuse_small_crop, select_depth_rows
from .data.sources import describe_frames
from .errors import SimIPUError
from .evaluation.depth import METRICS, DepthProtocol, evaluate_frames
from .files import write_json
from .hub.card import add_evaluation, write_model_card
from .hub.sources import load_dense_model
from .modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from .training.arguments import EvaluateDepthArguments
from .visualization.figures import draw_depth
from .visualization.style import PictureFolder


def evaluate_depth(arguments: EvaluateDepthArguments) -> dict[str, Any]:
    """Evaluate a saved depth model at the resolution of the ground truth, per image and then averaged.

    evaluate_depth(EvaluateDepthArguments(model="DEPTH", test_frames=["KITTI#val"]))["metrics"]["abs_rel"]

    What is evaluated is what `pipeline("depth-estimation")` returns for the images (with `flip_test` its mean with
    that of the mirror images): the model's image processor decides what the model sees.

    Returns:
        As `evaluate_maps`, with `model`.

    Raises:
        SimIPUError: no such model or frames, or frames that cannot be used.
    """
    network, processor = load_dense_model(SimIPUForDepthEstimation, arguments.model, arguments.device)
    if processor.crop_size is not None and not arguments.kb_crop:
        raise SimIPUError(f"{arguments.model} predicts the KITTI crop alone: evaluate it without --no_kb_crop")
    rows = select_depth_rows(
        arguments.test_frames, arguments.test_list, arguments.image_dir, arguments.depth_dir, arguments.on_bad_row
    )
    output_dir = None if arguments.output_dir is None else Path(arguments.output_dir)
    dataset = DepthDataset(rows, processor, on_bad_row=arguments.on_bad_row)
    if processor.crop_size is None and arguments.kb_crop:
        refuse_small_crop(dataset.frame(0))
    result = evaluate_frames(
        network,
        dataset.usable_frames(),
        processor,
        DepthProtocol.from_arguments(arguments),
        show=PictureWriter(None if output_dir is None else output_dir / "pictures", arguments.num_pictures),
    )
    result = {"model": arguments.model, **result}
    if output_dir is not None:
        write_json(output_dir / "depth_evaluation.json", result)
    if arguments.update_card:
        record_in_card(Path(arguments.model), arguments.test_frames or [str(arguments.test_list)], result)
        write_model_card(arguments.model)
    if not arguments.json:
        print(format_table(result))
    return result


class PictureWriter(PictureFolder):
    """Draws image, prediction and ground truth of the frames that it is called with."""

    def __call__(self, frame: DepthFrame, prediction: np.ndarray) -> None:
        top, left, height, width = frame.window
        seen = (slice(top, top + height), slice(left, left + width))
        maps = {"ground truth": frame.depth[seen], "predicted": prediction[seen]}
        self.add(frame.frame_id, lambda: draw_depth(frame.frame_id, frame.image, maps))


def format_table(result: dict[str, Any]) -> str:
    """What was counted, and the nine metrics, as three lines of text."""
    names = "  ".join(f"{name:>8}" for name in METRICS)
    values = "  ".join(f"{result['metrics'][name]:8.4f}" for name in METRICS)
    return f"{describe_protocol(result)}\n{names}\n{values}"


def record_in_card(folder: Path, frames: Sequence[str], result: dict[str, Any]) -> None:
    """Keep a result where the model card takes its `model-index` from; paths are reduced to their last part."""
    text = describe_protocol(result)
    add_evaluation(folder, "depth-estimation", *describe_frames(frames), result["metrics"], text, frames)


def describe_protocol(result: dict[str, Any]) -> str:
    """What was counted, and how."""
    protocol, num_images = result["protocol"], result["num_images"]
    num_counted = num_images - result["num_images_without_target"]
    count = f"{num_counted} of {num_images}" if num_counted < num_images else num_images
    return (
        f"{count} images{', KB crop 352 x 1216' if protocol['kb_crop'] else ''}, {protocol['crop']} "
        f"crop, {protocol['min_depth']:g} to {protocol['max_depth']:g} m, "
        f"{'flip test' if protocol['flip_test'] else 'no flip test'}, no median scaling, per image and then averaged"
    )
