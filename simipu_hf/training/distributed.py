"""What several processes need beyond accelerate: synchronised batch norm, also on the CPU, and agreement."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.collectives import all_reduce_sum

T = TypeVar("T")


def check_processes(accelerator: Accelerator) -> None:
    """Refuse launches that start other processes than they say, or that shard the model.

    Raises:
        SimIPUError: several processes that do not know of each other, or a strategy other than data parallelism.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise SimIPUError(
            f"the launcher started {launched} processes but accelerate joined {accelerator.num_processes}: each would "
            "train alone into the same folder. Without a GPU, launch with ACCELERATE_USE_CPU=true accelerate launch "
            f"--multi_gpu --num_processes {launched}"
        )
    strategy = accelerator.distributed_type.value
    if strategy not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU"):
        raise SimIPUError(f"{strategy} is not supported: launch with plain data parallelism (--multi_gpu)")


def use_all_cores(accelerator: Accelerator) -> None:
    """Let a single CPU process that `accelerate launch` started use every core.

    The launcher sets OMP_NUM_THREADS to 1 unless it is told otherwise, which suits one process per core.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and accelerator.num_processes == 1 and accelerator.device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)


def sum_over_processes(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The element-wise sum of `values` over all processes, in float64. Every process gets the same answer."""
    if accelerator.num_processes == 1:
        return list(values)
    # MPS has no float64 and no several processes either
    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(total, reduction="sum").tolist()


def on_main_process(accelerator: Accelerator, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `function` on the main process alone; every process gets its result, or its `SimIPUError`.

    Without the second half the other processes would wait for a main process that has given up.
    """
    if accelerator.num_processes == 1:
        return function(*args, **kwargs)
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function(*args, **kwargs)
        except SimIPUError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise SimIPUError(outcome[1])
    return outcome[0]


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Make every batch norm of `model` use the statistics of all processes' batches. In place; returns `model`.

    Modules with an attribute `synchronize` (the point encoder's weighted batch norm, the projection heads') are
    told to; PyTorch's and timm's own are exchanged: for `SyncBatchNorm` on an accelerator, on the CPU, where that
    one refuses to run, for an equivalent of ours. Names and shapes in the state dictionary stay as they are.
    """
    for module in model.modules():
        if hasattr(module, "synchronize"):
            module.synchronize = True  # type: ignore[assignment]  # torch types attributes as tensors or modules
    on_cpu = next(model.parameters()).device.type == "cpu"
    return _convert_on_cpu(model) if on_cpu else _convert_on_accelerator(model)


def _convert_on_accelerator(model: nn.Module) -> nn.Module:
    from timm.layers import convert_sync_batchnorm  # keeps the activation that timm fuses into its batch norm

    return convert_sync_batchnorm(model)


def _convert_on_cpu(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _convert_on_cpu(child))
    is_own = hasattr(module, "synchronize") or isinstance(module, ReducedBatchNorm)
    return ReducedBatchNorm.from_batch_norm(module) if isinstance(module, _BatchNorm) and not is_own else module


class ReducedBatchNorm(_BatchNorm):
    """Batch norm over the batches of all processes, on any device, with the exact gradient.

    Takes the place of `nn.BatchNorm1d/2d` and of timm's `BatchNormAct2d`, whose activation it keeps. Two passes
    (mean, then squared distances from it), so that it loses no digits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    @classmethod
    def from_batch_norm(cls, source: _BatchNorm) -> "ReducedBatchNorm":
        converted = cls(source.num_features, source.eps, source.momentum, source.affine, source.track_running_stats)
        converted._parameters, converted._buffers = source._parameters, source._buffers
        converted.drop = getattr(source, "drop", converted.drop)
        converted.act = getattr(source, "act", converted.act)
        return converted.train(source.training)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, found {input.dim()}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` (B, C, ...) -> the same shape."""
        self._check_input_dim(input)
        if not (self.training or self.running_mean is None):
            output = F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
            return self.act(self.drop(output))
        dims = [d for d in range(input.dim()) if d != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        count = all_reduce_sum(wide.new_tensor(input.numel() // input.shape[1]))
        mean = all_reduce_sum(wide.sum(dims)) / count
        centered = wide - mean.view(shape)
        variance = all_reduce_sum(centered.square().sum(dims)) / count
        if self.training and self.track_running_stats:
            self._update_running_statistics(mean.detach(), variance.detach() * count / (count - 1))
        output = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return self.act(self.drop(output.to(input.dtype)))

    def _update_running_statistics(self, mean: torch.Tensor, unbiased_variance: torch.Tensor) -> None:
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), factor)
