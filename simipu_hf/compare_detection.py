"""Does pre-training help here? 3-D detection from several image encoders, all else being equal.

    python -m simipu_hf.compare_detection --image_encoders simipu=RUN imagenet=resnet18 \
        --train_frames KITTI#train --test_frames KITTI#val --image_size 192 640 --output_dir OUT

The comparison itself is `simipu_hf.compare`. Frames are decoded once and kept in memory.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainingArguments

from .compare import TABLE_FILE, FineTuningTask, compare
from .data.detection import DetectionAugmentation, DetectionDataset, labelled_frames, read_labels, select_labelled
from .data.overlap import refuse_shared_frames
from .errors import exit_code_of
from .evaluate_detection import MEANS
from .finetune_detection import DetectionTrainer, create_image_processor, mean_dimensions
from .finetuning import create_model
from .hub.weights import EncoderWeights
from .modeling.modeling_simipu_detection import SimIPUForMonocular3DDetection
from .training.arguments import CompareDetectionArguments, parse_arguments


class DetectionTask(FineTuningTask):
    """Monocular 3-D detection as a task of `simipu_hf.compare`; the claims are about `ap_3d`, the mean over classes of
    the moderate average precision in space.

    Raises:
        SimIPUError: frames or labels that cannot be used, or frames that stand on both sides.
    """

    shown: tuple[str, ...] = MEANS
    arguments: CompareDetectionArguments

    def __init__(self, arguments: CompareDetectionArguments):
        train_rows, test_rows = select_labelled(arguments.train_frames), select_labelled(arguments.test_frames)
        refuse_shared_frames(train_rows, test_rows, "--test_frames")
        self.mean_dimensions = mean_dimensions(read_labels(train_rows, arguments.on_bad_row), arguments.classes)
        train_frames, test_frames = (
            list(labelled_frames(rows, arguments.on_bad_row, tqdm(range(len(rows)), what, leave=False)))
            for what, rows in (("training frames", train_rows), ("test frames", test_rows))
        )
        super().__init__(arguments, train_frames, test_frames)
        self.metrics = (*MEANS, *(f"{name}_3d_moderate" for name in arguments.classes))
        self.higher_is_better = self.metrics

    def create_trainer(
        self, encoder: EncoderWeights, frames: Sequence[Any], seed: int, settings: TrainingArguments, **recipe: Any
    ) -> DetectionTrainer:
        arguments = self.arguments
        processor, classes = create_image_processor(arguments, encoder.input), list(arguments.classes)
        model = create_model(
            SimIPUForMonocular3DDetection,
            encoder,
            arguments.image_size,
            seed,
            classes=classes,
            mean_dimensions=self.mean_dimensions,
        )
        augmentation = DetectionAugmentation(zoom=arguments.zoom)
        return DetectionTrainer(
            model,
            settings,
            train_dataset=DetectionDataset(frames, processor, classes, augmentation, seed),
            eval_dataset=DetectionDataset(self.test_frames, processor, classes),
            processing_class=processor,
            min_overlap=arguments.min_overlap,
            **recipe,
        )


def compare_detection(arguments: CompareDetectionArguments) -> dict[str, Any]:
    """Fine-tune for 3-D detection from every encoder, and compare; see [`simipu_hf.compare.compare`].

    compare_detection(CompareDetectionArguments(image_encoders=["simipu=OUT"], train_frames=["KITTI#train"],
                                                test_frames=["KITTI#val"], output_dir="COMPARISON"))

    Raises:
        SimIPUError: unusable arguments, encoders, frames or labels, or a frame on both sides.
    """
    result = compare(arguments, DetectionTask(arguments))
    if not arguments.json:
        print((Path(arguments.output_dir) / TABLE_FILE).read_text(encoding="utf-8"))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command: parse the flags and run; returns the exit code."""
    return exit_code_of(
        lambda: compare_detection(parse_arguments(CompareDetectionArguments, argv, "simipu-hf compare-detection"))
    )


if __name__ == "__main__":
    sys.exit(main())
