"""Does pre-training help here? Depth fine-tuning from several image encoders, all else being equal.

    python -m simipu_hf.compare_depth --image_encoders simipu=RUN imagenet=resnet18 \
        --train_frames KITTI#train --test_frames KITTI#val --image_size 96 320 --output_dir OUT

The comparison itself is `simipu_hf.compare`, every run of it a `DepthTrainer` without a run folder. Frames are decoded
and resized once and kept in memory.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback

from .compare import TABLE_FILE, compare, label_subset
from .data.depth import (
    KB_CROP,
    DepthAugmentation,
    DepthDataset,
    DepthFrame,
    default_crop_size,
    select_frames,
    to_pixel_values,
    usable_frames,
)
from .data.overlap import refuse_shared_frames
from .errors import exit_code_of
from .evaluation.depth import HIGHER_IS_BETTER, METRICS, DepthProtocol
from .finetune_depth import DepthTrainer, create_depth_model, create_image_processor, recipe
from .hub.weights import EncoderWeights
from .modeling.image_processing_simipu import SimIPUImageProcessor
from .modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from .training.arguments import CompareDepthArguments, parse_arguments


class DepthTask:
    """Monocular depth as a task of `simipu_hf.compare`; the claims are about AbsRel.

    Raises:
        SimIPUError: frames that cannot be used, or that stand on both sides.
    """

    metrics: tuple[str, ...] = METRICS
    shown: tuple[str, ...] = ("abs_rel", "rmse", "silog", "a1")
    higher_is_better: tuple[str, ...] = HIGHER_IS_BETTER

    def __init__(self, arguments: CompareDepthArguments):
        self.arguments = arguments
        train_rows, test_rows = select_frames(arguments.train_frames), select_frames(arguments.test_frames)
        refuse_shared_frames(train_rows, test_rows, "test frames")
        processor = create_image_processor(arguments)
        self.train_frames, self.test_frames = (
            list(usable_frames(rows, processor, arguments.on_bad_row, tqdm(range(len(rows)), what, leave=False)))
            for what, rows in (("training frames", train_rows), ("test frames", test_rows))
        )
        self.num_test_frames = len(self.test_frames)
        self.protocol = DepthProtocol.from_arguments(arguments)

    def run(self, encoder: EncoderWeights, mode: str, fraction: float, seed: int) -> dict[str, Any]:
        """One fine-tuning run and its evaluations."""
        arguments, started = self.arguments, time.perf_counter()
        labelled = [self.train_frames[index] for index in label_subset(len(self.train_frames), fraction, seed)]
        processor = create_image_processor(arguments, encoder.input)
        size = arguments.image_size or KB_CROP
        model = create_depth_model(encoder, size, seed, max_depth=arguments.max_depth)
        if mode == "frozen":
            if not encoder.state_dict:
                estimate_batch_norm(model, labelled, processor)
            model.freeze_image_encoder()
        augmentation = DepthAugmentation(crop_size=arguments.crop_size or default_crop_size(arguments.image_size))
        with TemporaryDirectory() as folder:
            trainer = DepthTrainer(
                model,
                self.settings(folder, len(labelled), seed),
                train_dataset=DepthDataset(labelled, processor, augmentation, seed),
                eval_dataset=DepthDataset(self.test_frames, processor),
                processing_class=processor,
                callbacks=[EvaluateEvenly(arguments.num_evaluations)],
                protocol=self.protocol,
                encoder_learning_rate=arguments.encoder_learning_rate,
                decoder_first=arguments.decoder_first if mode == "full" else 0.0,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        history = trainer.state.log_history
        return {
            "metrics": trainer.evaluation["metrics"],
            "per_range": {name: values["abs_rel"] for name, values in trainer.evaluation["per_range"].items()},
            "curve": [{"step": e["step"], "abs_rel": e["eval_abs_rel"]} for e in history if "eval_abs_rel" in e],
            "num_frames": len(labelled),
            "train_loss": next(entry["loss"] for entry in reversed(history) if "loss" in entry),
            "seconds": time.perf_counter() - started,
        }

    def settings(self, folder: str, num_frames: int, seed: int) -> Any:
        """Arguments of the Trainer that writes nothing."""
        arguments = self.arguments
        if arguments.device is not None and arguments.device.startswith("cuda"):
            torch.cuda.set_device(torch.device(arguments.device))
        return recipe(
            folder,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=min(arguments.batch_size, num_frames),
            learning_rate=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            warmup_steps=arguments.warmup_ratio,
            seed=seed,
            use_cpu=arguments.device == "cpu",
            save_strategy="no",
            logging_steps=max(1, arguments.max_steps // 10),
            disable_tqdm=True,
        )


class EvaluateEvenly(TrainerCallback):
    """Evaluates `times` times, evenly over the run, the last time at its end."""

    def __init__(self, times: int):
        self.times = times

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        at = {math.ceil(state.max_steps * (k + 1) / self.times) for k in range(self.times)}
        control.should_evaluate = state.global_step in at


def estimate_batch_norm(
    model: SimIPUForDepthEstimation, frames: Sequence[DepthFrame], processor: SimIPUImageProcessor
) -> None:
    """Set the running statistics of the image encoder's batch norms to those of the frames.

    Random weights come with statistics that fit nothing; frozen like that they would be an unfairly weak baseline.
    """
    images = [frame.image for frame in frames]
    update_bn((to_pixel_values(images[i : i + 8], processor) for i in range(0, len(images), 8)), model.image_encoder)


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
