"""Batch norm in training: statistics over all processes, and none counted twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from simipu_hf.modeling.layers import all_reduce_sum


@contextmanager
def kept_running_statistics(model: nn.Module) -> Iterator[None]:
    """Keeps batch-norm buffers as they are while gradient checkpointing runs a forward again in the backward pass."""
    recomputes = any(getattr(module, "grad_checkpointing", False) for module in model.modules())
    norms = [module for module in model.modules() if recomputes and isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    counts = [counter.clone() for counter in counters]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for counter, count in zip(counters, counts, strict=True):
            counter.copy_(count)


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
    return _convert_on_cpu(model) if on_cpu else convert_sync_batchnorm(model)


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
        converted = cls(source.num_features, source.eps, source.momentum)
        converted._parameters, converted._buffers = source._parameters, source._buffers
        converted.drop = getattr(source, "drop", converted.drop)
        converted.act = getattr(source, "act", converted.act)
        return converted.train(source.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` (B, C, ...) -> the same shape."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        if not self.training:
            moments = self.running_mean, self.running_var
            return self.act(self.drop(F.batch_norm(input, *moments, self.weight, self.bias, False, 0.0, self.eps)))
        dims = [d for d in range(input.dim()) if d != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        count = all_reduce_sum(wide.new_tensor(input.numel() // input.shape[1]))
        mean = all_reduce_sum(wide.sum(dims)) / count
        centered = wide - mean.view(shape)
        variance = all_reduce_sum(centered.square().sum(dims)) / count
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.detach().to(self.running_mean), self.momentum)
        self.running_var.lerp_((variance.detach() * count / (count - 1)).to(self.running_var), self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        output = centered * scale.view(shape) + self.bias.view(shape)
        return self.act(self.drop(output.to(input.dtype)))
