"""What test_data_parallel.py runs in one process and in two; no test itself.

accelerate launch --num_processes 2 data_parallel_worker.py OUT 'JSON list of pretrain flags' 'of finetune-depth flags'
"""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from simipu_hf import pretrain as module
from simipu_hf.finetune_depth import finetune_depth
from simipu_hf.modeling.configuration_simipu import SimIPUConfig
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.training.arguments import DepthArguments, PreTrainingArguments, parse_arguments
from simipu_hf.training.checkpoint import TrainingState
from simipu_hf.training.distributed import create_accelerator
from simipu_hf.training.logging import RunLogger
from simipu_hf.training.optimizers import choose_recipe, clip_gradients
from simipu_hf.training.sampling import Steps

ROWS, STEPS = 4, 3
ARCHITECTURES = ("test_resnet", "test_efficientnet")  # timm's own batch norm in the second


def create_model(architecture: str) -> SimIPUForPreTraining:
    torch.manual_seed(0)
    point_config = {
        "num_points": [[64], [32], [16, 16]],
        "fps_sample_ranges": [[-1], [-1], [16, -1]],
        "radii": [[2.0], [4.0], [8.0]],
        "num_samples": [[8], [8], [8]],
        "mlp_channels": [[[8]], [[8]], [[8]]],
        "aggregation_channels": [8, 8, 8],
    }
    config = SimIPUConfig(image_config={"architecture": architecture}, point_config=point_config, projection_dim=8)
    return SimIPUForPreTraining(config).double()


def create_batch(step: int) -> dict[str, torch.Tensor]:
    """`ROWS` rows of step `step`; some points project beside the image, so that processes differ in valid pairs."""
    generator = torch.Generator().manual_seed(step)
    points = torch.rand(ROWS, 200, 4, generator=generator, dtype=torch.float64) * 10
    points[..., 0] += 3
    points[..., 1:3] -= 5
    points[: ROWS // 2, :, 1] *= 0.3
    lidar_to_pixel = torch.tensor([[48.0, -60, 0, 0], [16, 0, -60, 0], [1, 0, 0, 0]], dtype=torch.float64)
    permutation = torch.randperm(200, generator=generator)
    return {
        "pixel_values": torch.randn(ROWS, 3, 32, 96, generator=generator, dtype=torch.float64),
        "points": points,
        "points_aug": points[:, permutation],
        "lidar_to_aug": torch.eye(4, dtype=torch.float64).repeat(ROWS, 1, 1),
        "lidar_to_pixel": lidar_to_pixel.repeat(ROWS, 1, 1),
    }


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
    data = [own_part(create_batch(i), accelerator) for i in range(STEPS * accumulation_steps)]
    batches = SimpleNamespace(loader=lambda first, last: data, state_dict=dict, load_state_dict=dict)
    model = create_model(architecture)
    module.prepare_model(accelerator, arguments, model)
    module.try_first_step(accelerator, model, data[0])
    recipe = choose_recipe(arguments, model.simipu.image_encoder, 9)
    optimizer, schedule = module.create_optimization(arguments, recipe, model, steps_per_epoch=2, total_steps=9)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    out.mkdir(exist_ok=True)
    logger = RunLogger(accelerator, out, total_steps=STEPS, first_step=0, rows_per_step=ROWS, show={}, record={})
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


def interrupted_run(flags: list[str], out: Path) -> None:
    """`pretrain` in full, and broken off in step 5 and resumed, in these processes."""

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
    module.clip_gradients = clip_gradients
    run("broken", "--resume_from_checkpoint", "latest")


def main() -> None:
    out, flags, depth_flags = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
    finetune_depth(parse_arguments(DepthArguments, depth_flags))
    interrupted_run(flags, out)
    for architecture in ARCHITECTURES:
        for accumulation_steps in (1, 2):
            name = f"{architecture}-{accumulation_steps}"
            result = train(architecture, accumulation_steps, out / name)
            if Accelerator().is_main_process:
                contiguous = {key: value.contiguous() for key, value in result.items()}
                save_file(contiguous, out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
