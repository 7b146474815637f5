"""Evaluate a 3-D detector, or a folder of detections, by KITTI's protocol."""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .data.detection import DetectionDataset, DetectionFrame, select_labelled
from .data.kitti_objects import KittiObjects, read_objects_folder, write_objects_folder
from .data.sources import describe_frames
from .errors import SimIPUError
from .evaluation.detection import DIFFICULTIES, MIN_OVERLAP, label_roles
from .evaluation.detection import evaluate_detection as average_precision
from .evaluation.detection_numba import COUNTED
from .files import write_json
from .hub.card import add_evaluation, write_model_card
from .hub.sources import load_dense_model
from .modeling.image_processing_simipu import SimIPUImageProcessor
from .modeling.modeling_simipu_detection import SimIPUForMonocular3DDetection
from .training.arguments import EvaluateDetectionArguments
from .visualization.figures import draw_objects
from .visualization.style import PictureFolder

MEANS = ("ap_3d", "ap_bev", "ap_2d")
MIN_DRAWN_SCORE = 0.2


class Found(NamedTuple):
    """What was found in a frame, and its labels."""

    frame_id: str
    predictions: KittiObjects
    labels: KittiObjects


def evaluate_detection(arguments: EvaluateDetectionArguments) -> dict[str, Any]:
    """Evaluate a saved detector on the original images, or detections in KITTI's text format.

    evaluate_detection(EvaluateDetectionArguments(model="RUN", test_frames=["KITTI#val"]))["metrics"]["ap_3d"]

    Returns:
        As [`score`], with `model` or `predictions`.

    Raises:
        SimIPUError: no such model, frames or folders, or frames that cannot be used.
    """
    output_dir = None if arguments.output_dir is None else Path(arguments.output_dir)
    if arguments.model is None:
        found, classes = read_folders(str(arguments.predictions), str(arguments.labels)), tuple(MIN_OVERLAP)
        result = {"predictions": arguments.predictions}
    else:
        network, processor = load_dense_model(SimIPUForMonocular3DDetection, arguments.model, arguments.device)
        rows, classes = select_labelled(arguments.test_frames), tuple(network.config.classes)
        frames = DetectionDataset(rows, processor, on_bad_row=arguments.on_bad_row, classes=classes).usable_frames()
        pictures = PictureFolder(output_dir and output_dir / "pictures", arguments.num_pictures)
        found = detect_frames(network, frames, processor, pictures)
        result = {"model": arguments.model}
    result |= score(found, classes, arguments.min_overlap)
    if output_dir is not None:
        write_json(output_dir / "detection_evaluation.json", result)
        if arguments.model is not None:
            write_predictions(output_dir / "predictions", found)
    if arguments.update_card:
        record_in_card(Path(str(arguments.model)), arguments.test_frames, result)
        write_model_card(str(arguments.model))
    if not arguments.json:
        print(format_table(result))
    return result


def detect_frames(
    model: SimIPUForMonocular3DDetection,
    frames: Iterable[DetectionFrame],
    processor: SimIPUImageProcessor,
    pictures: PictureFolder,
) -> list[Found]:
    """What a model finds in frames, drawn into `pictures`."""
    found = []
    for frame in frames:
        predictions = detect(model, frame.image, frame.camera_projection, processor)
        found.append(Found(frame.frame_id, predictions, frame.objects))
        pictures.add(frame.frame_id, partial(draw_frame, frame, predictions))
    return found


@torch.no_grad()
def detect(
    model: SimIPUForMonocular3DDetection,
    image: np.ndarray,
    camera_projection: np.ndarray,
    processor: SimIPUImageProcessor,
) -> KittiObjects:
    """What a model finds in an image, best first.

    Args:
        image: `(H, W, 3)` uint8 RGB.
        camera_projection: (3, 4), rectified camera frame to pixels of `image`.
    """
    height, width = image.shape[:2]
    pixel_values = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"].to(model.device)
    projection = torch.from_numpy(processor.pixel_transform((height, width)) @ camera_projection).float()
    outputs = model.eval()(pixel_values, projection[None].to(model.device))
    (found,) = processor.post_process_3d_object_detection(
        outputs, [camera_projection], [(height, width)], threshold=0.0
    )
    values = {name: value.cpu().double().numpy() for name, value in found.items()}
    unknown = np.full(len(values["scores"]), -1.0)
    return KittiObjects(
        type=np.array([model.config.classes[int(label)] for label in values["labels"]], dtype="U14"),
        truncated=unknown,
        occluded=unknown,
        alpha=values["alpha"],
        bbox=values["boxes"],
        dimensions=values["boxes_3d"][:, 3:6],
        location=values["boxes_3d"][:, :3],
        rotation_y=values["boxes_3d"][:, 6],
        score=values["scores"],
    )


def draw_frame(frame: DetectionFrame, predictions: KittiObjects) -> Any:
    """Figure of the surer ones of a frame's predictions, with its labels."""
    assert predictions.score is not None
    sure = predictions[predictions.score >= MIN_DRAWN_SCORE]
    title = f"{frame.frame_id}: {len(sure)} predictions with a score of at least {MIN_DRAWN_SCORE}"
    return draw_objects(title, frame.image, frame.camera_projection, frame.objects, sure)


def read_folders(predictions: str, labels: str) -> list[Found]:
    """Detections and labels of the same frames, from text files; frames without a file of detections do not count.

    Raises:
        SimIPUError: a damaged line, or detections of a frame that has no labels.
    """
    found, truth = read_objects_folder(predictions, with_scores=True), read_objects_folder(labels)
    for name in found:
        if name not in truth:
            raise SimIPUError(f"{labels}: expected labels of every frame in {predictions}, found no {name}.txt")
    return [Found(name, objects, truth[name]) for name, objects in found.items()]


def write_predictions(folder: Path, found: Sequence[Found]) -> None:
    """A folder in KITTI's text format, in the place of an earlier one; slashes of names become underscores."""
    objects: dict[str, KittiObjects] = {}
    for frame in found:
        name = re.sub(r"[^\w.-]", "_", frame.frame_id)
        if name in objects:
            raise SimIPUError(f"{folder}: expected frames of different names, found {name} twice: evaluate them apart")
        objects[name] = frame.predictions
    write_objects_folder(folder, objects, overwrite=True)


def score(found: Sequence[Found], classes: Sequence[str], min_overlap: float | None = None) -> dict[str, Any]:
    """KITTI's figures for what was found.

    Args:
        classes: to evaluate.
        min_overlap: intersection over union that a match exceeds; KITTI's own where `None`.

    Returns:
        `average_precision`: percent by class, `2d`, `bev`, `3d` and `aos`, and difficulty; `metrics`: the same by
        names such as `Car_3d_moderate`, and `ap_3d`, `ap_bev` and `ap_2d`, the moderate ones' means over `mean_over`,
        the classes with a label that counts at moderate (NaN where no class has one); `num_frames`; `num_labels` of
        each class; `min_overlap` of each class.
    """
    overlaps = {name: min_overlap or MIN_OVERLAP.get(name, 0.5) for name in classes}
    precision = average_precision(
        [frame.predictions for frame in found], [frame.labels for frame in found], classes, overlaps
    )
    counts = {name: sum(int((frame.labels.type == name).sum()) for frame in found) for name in classes}
    mean_over = [name for name in classes if any(counts_at_moderate(frame.labels, name) for frame in found)]
    means = {
        f"ap_{kind}": np.mean([precision[name][kind]["moderate"] for name in mean_over]) if mean_over else np.nan
        for kind in ("3d", "bev", "2d")
    }
    single = {
        f"{name}_{kind}_{difficulty}": value
        for name, kinds in precision.items()
        for kind, values in kinds.items()
        for difficulty, value in values.items()
    }
    return {
        "num_frames": len(found),
        "num_labels": counts,
        "min_overlap": overlaps,
        "average_precision": precision,
        "mean_over": mean_over,
        "metrics": {name: float(value) for name, value in (means | single).items()},
    }


def counts_at_moderate(labels: KittiObjects, name: str) -> bool:
    """Whether a frame has a label of a class that is to be found at moderate difficulty."""
    return bool((label_roles(labels, name, DIFFICULTIES.index("moderate")) == COUNTED).any())


def format_table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [f"{'AP, 40 recall positions':28}" + "".join(f"{name:>10}" for name in DIFFICULTIES)]
    for name, kinds in result["average_precision"].items():
        for kind, values in kinds.items():
            head = f"{name} {kind}" + ("" if kind == "aos" else f" @ {result['min_overlap'][name]:g}")
            lines.append(f"{head:28}" + "".join(f"{values[difficulty]:10.2f}" for difficulty in DIFFICULTIES))
    means = ", ".join(f"{name} {result['metrics'][name]:.2f}" for name in MEANS)
    lines.append(f"{describe_mean(result)}: {means}" if result["mean_over"] else describe_mean(result))
    counts = ", ".join(f"{count} {name}" for name, count in result["num_labels"].items())
    return "\n".join([*lines, f"{result['num_frames']} frames, labels: {counts}"])


def describe_mean(result: dict[str, Any]) -> str:
    """Over which classes `ap_3d`, `ap_bev` and `ap_2d` are means."""
    if not result["mean_over"]:
        return "no mean at moderate, as no class has a label that counts"
    return f"moderate, mean over {', '.join(result['mean_over'])}"


def record_in_card(folder: Path, frames: Sequence[str], result: dict[str, Any]) -> None:
    """Keep a result where the model card takes its `model-index` from."""
    overlaps = ", ".join(f"{name} {value:g}" for name, value in result["min_overlap"].items())
    text = (
        f"{result['num_frames']} frames, KITTI's protocol: average precision (%) at 40 recall positions, intersection "
        f"over union above {overlaps}; ap_*: {describe_mean(result)}"
    )
    shown = {name: value for name, value in result["metrics"].items() if name in MEANS or name.endswith("3d_moderate")}
    add_evaluation(folder, "object-detection", *describe_frames(frames), shown, text, frames)
