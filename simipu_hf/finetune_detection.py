"""Fine-tune an image encoder for monocular 3-D detection, on the stock `transformers.Trainer`.

What is detection's own is here: model, data and evaluation. Recipe, Trainer and run folder are those of every task, in
`simipu_hf.finetuning`.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from .data.detection import DetectionAugmentation, DetectionDataset, collate_detection, read_labels, select_labelled
from .data.frames import FrameDataset
from .data.kitti_objects import KittiObjects
from .data.overlap import refuse_shared_frames
from .errors import SimIPUError, exit_code_of
from .evaluate_detection import detect_frames, format_table, record_in_card, score
from .finetuning import (
    FineTuningTrainer,
    announce,
    create_image_processor,
    create_model,
    find_rgb_encoder,
    fine_tune,
)
from .hub.weights import EncoderWeights
from .modeling.configuration_simipu import SimIPUDetectionConfig
from .modeling.modeling_simipu_detection import SimIPUForMonocular3DDetection
from .training.arguments import DetectionArguments, DetectionTaskArguments, parse_arguments
from .visualization.style import PictureFolder


class DetectionTrainer(FineTuningTrainer):
    """[`FineTuningTrainer`] with KITTI's average precision; both data sets are [`DetectionDataset`]s.

    trainer = DetectionTrainer(model, recipe("OUT", max_steps=500), train_dataset=DetectionDataset(...))
    trainer.train()

    Args:
        min_overlap: of `evaluate`, see [`simipu_hf.evaluate_detection.score`].
    """

    task = "detection"

    def __init__(self, *args: Any, min_overlap: float | None = None, **kwargs: Any):
        super().__init__(*args, data_collator=collate_detection, **kwargs)
        self.min_overlap = min_overlap

    def evaluate_frames(self, dataset: FrameDataset, picture_dir: Path | None = None) -> dict[str, Any]:
        """Evaluate on a [`DetectionDataset`], every process on its share of the frames; as [`score`]."""
        pictures = PictureFolder(picture_dir if self.is_world_process_zero() else None)
        found = gather_object(detect_frames(self.model, self.own_frames(dataset), dataset.processor, pictures))
        return score(found, self.model.config.classes, self.min_overlap)


def mean_dimensions(labels: Iterable[KittiObjects], classes: Sequence[str]) -> list[list[float]]:
    """Height, width and length in metres of an average object of each class: where the head's sizes start from.

    KITTI's own for the three classes of its benchmark, those of the labels for others.

    Raises:
        SimIPUError: no label of any of the classes, or none of one that the benchmark does not have.
    """
    labels, default = list(labels), SimIPUDetectionConfig()
    usual = dict(zip(default.classes, default.mean_dimensions, strict=True))
    sizes = {name: np.concatenate([o.dimensions[o.type == name] for o in labels] or [[]]) for name in classes}
    known = {name: size[(size > 0).all(axis=1)] for name, size in sizes.items() if len(size)}
    missing = [name for name in classes if not len(known.get(name, ())) and name not in usual]
    if missing or not any(map(len, known.values())):
        raise SimIPUError(f"--train_frames: expected labels of {', '.join(missing or classes)}, found none")
    empty = sum(not np.isin(of_frame.type, list(classes)).any() for of_frame in labels)
    counts = ", ".join(f"{len(size)} {name}" for name, size in known.items())
    announce(f"labels: {counts}; {empty} of {len(labels)} frames have none of them")
    return [list(usual[name]) if name in usual else known[name].mean(axis=0).tolist() for name in classes]


def trainer_parts(
    arguments: DetectionTaskArguments,
    encoder: EncoderWeights,
    sizes: list[list[float]],
    train_rows: Any,
    test_rows: Any,
    seed: int,
    keep_frames: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of [`DetectionTrainer`], from the `sizes` of [`mean_dimensions`] and rows or frames to train
    and, where not `None`, to evaluate on."""
    classes, processor = list(arguments.classes), create_image_processor(arguments.image_size, encoder.input)
    fields = {"classes": classes, "mean_dimensions": sizes, "hidden_size": arguments.hidden_size}
    model = create_model(SimIPUForMonocular3DDetection, encoder, arguments.image_size, seed, **fields)
    augmentation = DetectionAugmentation(zoom=arguments.zoom)
    about: dict[str, Any] = {"on_bad_row": arguments.on_bad_row, "classes": classes}
    return {
        "model": model,
        "train_dataset": DetectionDataset(train_rows, processor, augmentation, seed, keep_frames, **about),
        "eval_dataset": None if test_rows is None else DetectionDataset(test_rows, processor, **about),
        "min_overlap": arguments.min_overlap,
    }


def create_trainer(arguments: DetectionArguments) -> DetectionTrainer:
    """The trainer of `finetune_detection`, for use from Python.

    Raises:
        SimIPUError: unusable arguments, encoder, frames or labels, or a frame that is trained and tested on.
    """
    train_rows = select_labelled(arguments.train_frames)
    test_rows = select_labelled(arguments.test_frames) if arguments.test_frames else None
    if test_rows is not None:
        refuse_shared_frames(train_rows, test_rows, "--test_frames")
        read_labels(test_rows, arguments.on_bad_row)
    encoder = find_rgb_encoder(arguments.image_encoder)
    announce(f"image encoder: {encoder.description}")
    sizes = mean_dimensions(read_labels(train_rows, arguments.on_bad_row), arguments.classes)
    parts = trainer_parts(arguments, encoder, sizes, train_rows, test_rows, arguments.seed, arguments.keep_frames)
    return DetectionTrainer.from_arguments(arguments, **parts)


def finetune_detection(arguments: DetectionArguments) -> Path:
    """Fine-tune as the arguments say, in as many processes as were launched, and evaluate.

    finetune_detection(DetectionArguments(image_encoder="OUT", train_frames=["KITTI#train"], output_dir="DETECTOR"))

    Returns:
        The output folder, which `AutoModel.from_pretrained(..., trust_remote_code=True)` loads; see [`fine_tune`],
        also for errors.
    """
    return fine_tune(arguments, lambda: create_trainer(arguments), record_in_card, format_table)


if __name__ == "__main__":
    command = "simipu-hf finetune-detection"
    sys.exit(exit_code_of(lambda: finetune_detection(parse_arguments(DetectionArguments, prog=command))))
