"""Does pre-training help here? Depth fine-tuning from several image encoders, all else being equal.

    python -m simipu_hf.compare_depth --image_encoders simipu=RUN imagenet=resnet18 \
        --train_frames KITTI#train --test_frames KITTI#val --image_size 96 320 --output_dir OUT

The comparison itself is `simipu_hf.compare`. Frames are decoded and resized once and kept in memory.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainingArguments

from .compare import TABLE_FILE, FineTuningTask, compare
from .data.depth import (
    KB_CROP,
    DepthAugmentation,
    DepthDataset,
    default_crop_size,
    select_frames,
    usable_frames,
)
from .data.overlap import refuse_shared_frames
from .errors import exit_code_of
from .evaluation.depth import HIGHER_IS_BETTER, METRICS, DepthProtocol
from .finetune_depth import DepthTrainer, create_depth_model, create_image_processor
from .hub.weights import EncoderWeights
from .training.arguments import CompareDepthArguments, parse_arguments


class DepthTask(FineTuningTask):
    """Monocular depth as a task of `simipu_hf.compare`; the claims are about AbsRel.

    Raises:
        SimIPUError: frames that cannot be used, or that stand on both sides.
    """

    metrics: tuple[str, ...] = METRICS
    shown: tuple[str, ...] = ("abs_rel", "rmse", "silog", "a1")
    higher_is_better: tuple[str, ...] = HIGHER_IS_BETTER
    arguments: CompareDepthArguments

    def __init__(self, arguments: CompareDepthArguments):
        train_rows, test_rows = select_frames(arguments.train_frames), select_frames(arguments.test_frames)
        refuse_shared_frames(train_rows, test_rows, "test frames")
        processor = create_image_processor(arguments)
        train_frames, test_frames = (
            list(usable_frames(rows, processor, arguments.on_bad_row, tqdm(range(len(rows)), what, leave=False)))
            for what, rows in (("training frames", train_rows), ("test frames", test_rows))
        )
        super().__init__(arguments, train_frames, test_frames)

    def create_trainer(
        self, encoder: EncoderWeights, frames: Sequence[Any], seed: int, settings: TrainingArguments, **recipe: Any
    ) -> DepthTrainer:
        arguments = self.arguments
        processor = create_image_processor(arguments, encoder.input)
        augmentation = DepthAugmentation(crop_size=arguments.crop_size or default_crop_size(arguments.image_size))
        return DepthTrainer(
            create_depth_model(encoder, arguments.image_size or KB_CROP, seed, max_depth=arguments.max_depth),
            settings,
            train_dataset=DepthDataset(frames, processor, augmentation, seed),
            eval_dataset=DepthDataset(self.test_frames, processor),
            processing_class=processor,
            protocol=DepthProtocol.from_arguments(arguments),
            **recipe,
        )


def compare_depth(arguments: CompareDepthArguments) -> dict[str, Any]:
    """Fine-tune for depth from every encoder, and compare; see [`simipu_hf.compare.compare`].

    compare_depth(CompareDepthArguments(image_encoders=["simipu=OUT"], train_frames=["KITTI#train"],
                                        test_frames=["KITTI#val"], output_dir="COMPARISON"))

    Raises:
        SimIPUError: unusable arguments, encoders or frames, or a frame on both sides.
    """
    result = compare(arguments, DepthTask(arguments))
    if not arguments.json:
        print((Path(arguments.output_dir) / TABLE_FILE).read_text(encoding="utf-8"))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command: parse the flags and run; returns the exit code."""
    return exit_code_of(lambda: compare_depth(parse_arguments(CompareDepthArguments, argv, "simipu-hf compare-depth")))


if __name__ == "__main__":
    sys.exit(main())
