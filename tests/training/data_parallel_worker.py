"""What test_data_parallel.py runs in one process and in two; no test itself.

torchrun --nproc_per_node 2 data_parallel_worker.py OUT 'JSON list of pretrain flags'
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file

from simipu_hf.modeling.configuration_simipu import SimIPUConfig
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.training.distributed import check_processes, synchronize_batch_norm
from simipu_hf.training.loop import accumulate_gradients
from simipu_hf.training.optimization import Optimization, OptimizerSettings, create_optimizer, create_schedule

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


def train(architecture: str, accumulation_steps: int) -> dict[str, torch.Tensor]:
    """A few optimizer steps; gradients of the first, and all weights and buffers after the last."""
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation_steps, kwargs_handlers=[kwargs])
    check_processes(accelerator)
    model = create_model(architecture)
    if accelerator.num_processes > 1:
        synchronize_batch_norm(model)
    optimizers = [
        create_optimizer(OptimizerSettings("sgd", 0.01, 1e-4), {"images": model.simipu.image_encoder.parameters()}),
        create_optimizer(
            OptimizerSettings("sgd", 0.001, 0.01, (0.95, 0.99)),
            {"points": [p for name, p in model.named_parameters() if "image_encoder" not in name]},
        ),
    ]
    schedules = [
        create_schedule("exponential", o, warmup_steps=0, total_steps=9, steps_per_epoch=2, decay_per_epoch=0.9)
        for o in optimizers
    ]
    optimization = Optimization(accelerator, optimizers, schedules, max_grad_norm=1.0)
    prepared = accelerator.prepare(model)
    batches = (own_part(create_batch(i), accelerator) for i in range(STEPS * accumulation_steps))
    result = {}
    for step in range(STEPS):
        accumulate_gradients(accelerator, prepared, lambda m, b: (m(**b).loss, {"x": torch.zeros(())}), batches)
        if step == 0:
            result = {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimization.gradient_norms()
        optimization.step()
    return result | {name: value.clone() for name, value in model.state_dict().items()}


def interrupted_run(flags: list[str], out: Path) -> None:
    """`pretrain` in full, and broken off in step 5 and resumed, in these processes."""
    from simipu_hf.pretrain import pretrain
    from simipu_hf.training import loop
    from simipu_hf.training.legacy_arguments import parse_pretraining_arguments

    def run(name: str, *more: str) -> None:
        pretrain(parse_pretraining_arguments([*flags, "--output_dir", str(out / name), *more]))

    run("whole")
    original, calls = loop.accumulate_gradients, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("killed")
        return original(*arguments)

    loop.accumulate_gradients = broken
    with contextlib.suppress(RuntimeError):
        run("broken")
    loop.accumulate_gradients = original
    run("broken", "--resume_from_checkpoint", "latest")


def main() -> None:
    out, flags = Path(sys.argv[1]), json.loads(sys.argv[2])
    for architecture in ARCHITECTURES:
        for accumulation_steps in (1, 2):
            result = train(architecture, accumulation_steps)
            if Accelerator(cpu=True).is_main_process:
                contiguous = {key: value.contiguous() for key, value in result.items()}
                save_file(contiguous, out / f"{architecture}-{accumulation_steps}.safetensors")
    interrupted_run(flags, out)


if __name__ == "__main__":
    main()
