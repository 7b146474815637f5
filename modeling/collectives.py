"""Collectives over all processes with exact gradients; the identity where there is only one process.

The gradient of a gathered or reduced tensor is summed over the processes, so that a loss averaged over
processes (as DistributedDataParallel averages gradients) has the gradient of the same loss on one process.
"""

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of processes that take part in collectives."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process among them."""
    return dist.get_rank() if world_size() > 1 else 0


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.rows = tensor.shape[0]
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad.narrow(0, rank() * ctx.rows, ctx.rows)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` over all processes, differentiable."""
    return _AllReduceSum.apply(tensor) if world_size() > 1 else tensor


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`(R, ...)` of every process, concatenated in rank order to `(world_size * R, ...)`, differentiable.

    Every process must bring the same shape.
    """
    return _AllGatherRows.apply(tensor) if world_size() > 1 else tensor
