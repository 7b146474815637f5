"""What test_data_parallel.py runs in one process and in two; no test itself.

accelerate launch --num_processes 2 data_parallel_worker.py OUT, the folder of the frames and of the results
"""

import contextlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate import Accelerator, PartialState
from tiny_run import arguments, stopping

from simipu_hf import pretrain as module
from simipu_hf.errors import SimIPUError, TrainingInterrupted
from simipu_hf.finetune_depth import finetune_depth
from simipu_hf.pretrain import create_model, to_model_inputs
from simipu_hf.training.arguments import DepthArguments, parse_arguments
from simipu_hf.training.distributed import on_every_process, on_main_process

ROWS = 4  # of all processes
ARCHITECTURES = ("test_resnet", "test_efficientnet")  # timm's own batch norm in the second


def pretrain(out: Path, name: str, *flags: str, **changes: Any) -> None:
    """On the frames of `out`, into the folder of a name in it; `changes` are of functions that `pretrain` calls."""
    with mock.patch.multiple(module, **changes) if changes else contextlib.nullcontext():
        module.pretrain(arguments(out / "frames", out / name, *flags))


def train(out: Path, name: str, architecture: str, accumulation_steps: int) -> None:
    """Three steps in float64."""

    def create_double(given):
        model, processor = create_model(given)
        return model.double(), processor

    def to_double(batch, image_processor):
        inputs = to_model_inputs(batch, image_processor)
        return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}

    flags = [
        *("--image_encoder", architecture, "--max_steps", "3", "--logging_steps", "1", "--max_grad_norm", "1"),
        *("--per_device_train_batch_size", str(ROWS // int(os.environ.get("WORLD_SIZE", 1)))),
        *("--gradient_accumulation_steps", str(accumulation_steps), "--lr_decay_per_epoch", "0.9"),
        *("--optimizer", "sgd", "--learning_rate", "0.01"),
        *("--point_optimizer", "sgd", "--point_learning_rate", "0.001"),
        # some points project beside the image, so that processes differ in valid pairs
        *("--augmentation_overrides", "random_zoom=[1,2]"),
    ]
    double = {"create_model": create_double, "to_model_inputs": to_double, "draw_features": lambda *_: None}
    pretrain(out, name, *flags, **double)


def interrupted_runs(out: Path) -> None:
    """`pretrain` in full; broken off in step 5; with a signal to the last process alone in step 3; both resumed."""
    flags = [
        *("--max_steps", "6", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"),
        *("--logging_steps", "3", "--checkpointing_steps", "2", "--eval_steps", "3", "--dataloader_num_workers", "1"),
    ]
    pretrain(out, "whole", *flags)
    with contextlib.suppress(RuntimeError):
        pretrain(out, "broken", *flags, clip_gradients=stopping(5, RuntimeError("killed")))
    try:
        pretrain(out, "preempted", *flags, clip_gradients=stopping(3 if PartialState().is_last_process else 0))
    except TrainingInterrupted as interruption:
        (out / f"interruption-{PartialState().process_index}.txt").write_text(str(interruption), encoding="utf-8")
    for name in ("broken", "preempted"):
        pretrain(out, name, *flags, "--resume_from_checkpoint", "latest")


def errors_of_one_process(out: Path) -> None:
    """What each process is told where the last one fails, and where the main one does."""
    accelerator, told = Accelerator(), []

    def fail(fails: bool) -> None:
        if fails:
            raise SimIPUError(f"process {accelerator.process_index} failed")

    on_main = partial(on_main_process, accelerator)
    for call, fails in ((on_every_process, accelerator.is_last_process), (on_main, True)):
        try:
            call(partial(fail, fails))
        except SimIPUError as error:
            told.append(str(error))
    (out / f"errors-{accelerator.process_index}.json").write_text(json.dumps(told), encoding="utf-8")


def main() -> None:
    out = Path(sys.argv[1])
    depth_flags = [
        *("--image_encoder", "random:test_resnet", "--output_dir", str(out / "depth"), "--no_kb_crop"),
        *("--train_frames", str(out / "rows"), "--test_frames", f"{out / 'rows'}#test", "--image_size", "32", "64"),
        *("--max_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--no_flip_test"),
        *("--dataloader_num_workers", "0", "--report_to", "none"),
    ]
    finetune_depth(parse_arguments(DepthArguments, depth_flags))
    interrupted_runs(out)
    errors_of_one_process(out)
    for architecture in ARCHITECTURES:
        for accumulation_steps in (1, 2):
            train(out, f"{architecture}-{accumulation_steps}", architecture, accumulation_steps)


if __name__ == "__main__":
    main()
