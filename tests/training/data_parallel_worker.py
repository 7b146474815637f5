"""What test_data_parallel.py runs in one process and in two; no test itself.

accelerate launch --num_processes 2 data_parallel_worker.py OUT 'JSON list of pretrain flags' 'of finetune-depth flags'
"""

import contextlib
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import save_file
from tiny_simipu import tiny_batch, tiny_config

from simipu_hf import pretrain as module
from simipu_hf.errors import SimIPUError, TrainingInterrupted
from simipu_hf.finetune_depth import finetune_depth
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.training.arguments import DepthArguments, PreTrainingArguments, parse_arguments
from simipu_hf.training.checkpoint import TrainingState
from simipu_hf.training.distributed import create_accelerator, on_every_process, on_main_process
from simipu_hf.training.logging import RunLogger
from simipu_hf.training.optimizers import choose_recipe, clip_gradients
from simipu_hf.training.sampling import Steps

ROWS, STEPS = 4, 3
ARCHITECTURES = ("test_resnet", "test_efficientnet")  # timm's own batch norm in the second


def own_part(batch: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    share = ROWS // accelerator.num_processes
    first = accelerator.process_index * share
    return {name: value[first : first + share] for name, value in batch.items()}


def train(architecture: str, accumulation_steps: int, out: Path) -> dict[str, torch.Tensor]:
    """The loop for a few steps in float64; gradients of the first step, and all weights and buffers after the last."""
    arguments = PreTrainingArguments(
        data_dir="none", output_dir=str(out), report_to=["none"], gradient_accumulation_steps=accumulation_steps,
        optimizer="sgd", learning_rate=0.01, lr_decay_per_epoch=0.9, max_grad_norm=1.0,
        point_optimizer="sgd", point_learning_rate=0.001,
    )  # fmt: skip
    accelerator = create_accelerator(arguments)
    indices = range(STEPS * accumulation_steps)
    # some points project beside the image, so that processes differ in valid pairs
    rows = (tiny_batch(ROWS, 32, 96, seed=index, dtype=torch.float64) for index in indices)
    data = [own_part(batch, accelerator) for batch in rows]
    batches = SimpleNamespace(loader=lambda first, last: data, state_dict=dict, load_state_dict=dict)
    torch.manual_seed(0)
    model = SimIPUForPreTraining(tiny_config(architecture=architecture)).double()
    module.prepare_model(accelerator, arguments, model)
    module.try_first_step(accelerator, model, data[0])
    recipe = choose_recipe(arguments, model.simipu.image_encoder, 9)
    optimizer, schedule = module.create_optimization(arguments, recipe, model, steps_per_epoch=2, total_steps=9)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    out.mkdir(exist_ok=True)
    logger = RunLogger(accelerator, arguments, 0, STEPS, record={})
    processor = SimpleNamespace(image_processor=None, save_pretrained=lambda folder: None)
    state = TrainingState(accelerator, wrapped, processor, optimizer, schedule, logger, batches, identity={})
    gradients = {}

    def keep_gradients(*positional):
        if not gradients:
            gradients.update({f"grad.{n}": p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        return clip_gradients(*positional)

    module.clip_gradients, module.to_model_inputs = keep_gradients, lambda batch, image_processor: batch
    with contextlib.closing(logger):
        module.train(accelerator, arguments, state, Steps(0, STEPS), batches, None, None)
    return gradients | {name: value.clone() for name, value in model.state_dict().items()}


def interrupted_runs(flags: list[str], out: Path) -> None:
    """`pretrain` in full; broken off in step 5; with a signal to the last process alone in step 3; both resumed."""

    def run(name: str, *more: str) -> None:
        module.pretrain(parse_arguments(PreTrainingArguments, [*flags, "--output_dir", str(out / name), *more]))

    run("whole")
    calls = []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("killed")
        return clip_gradients(*arguments)

    module.clip_gradients = broken
    with contextlib.suppress(RuntimeError):
        run("broken")
    calls.clear()

    def preempted(*arguments):
        calls.append(1)
        if len(calls) == 3 and PartialState().is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip_gradients(*arguments)

    module.clip_gradients = preempted
    try:
        run("preempted")
    except TrainingInterrupted as interruption:
        (out / f"interruption-{PartialState().process_index}.txt").write_text(str(interruption), encoding="utf-8")
    module.clip_gradients = clip_gradients
    for name in ("broken", "preempted"):
        run(name, "--resume_from_checkpoint", "latest")


def errors_of_one_process(out: Path) -> None:
    """What each process is told where the last one fails, and where the main one does."""
    accelerator, told = Accelerator(), []

    def fail(fails: bool) -> None:
        if fails:
            raise SimIPUError(f"process {accelerator.process_index} failed")

    on_main = partial(on_main_process, accelerator)
    for call, fails in ((on_every_process, accelerator.is_last_process), (on_main, True)):
        try:
            call(fail, fails)
        except SimIPUError as error:
            told.append(str(error))
    (out / f"errors-{accelerator.process_index}.json").write_text(json.dumps(told), encoding="utf-8")


def main() -> None:
    out, flags, depth_flags = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
    finetune_depth(parse_arguments(DepthArguments, depth_flags))
    interrupted_runs(flags, out)
    errors_of_one_process(out)
    for architecture in ARCHITECTURES:
        for accumulation_steps in (1, 2):
            name = f"{architecture}-{accumulation_steps}"
            result = train(architecture, accumulation_steps, out / name)
            if Accelerator().is_main_process:
                contiguous = {key: value.contiguous() for key, value in result.items()}
                save_file(contiguous, out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
