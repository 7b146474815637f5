"""Building blocks on rows `(R, C)` of the point branch and of the projection heads, and collectives over processes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

Reduce = Callable[[torch.Tensor], torch.Tensor]


class WeightedBatchNorm(nn.Module):
    """Batch norm over rows `(R, C)` in which row r counts `weight[r]` times.

    With integer weights it equals batch norm over rows repeated that often, statistics, gradients and running
    buffers included, without ever repeating them. Parameter and buffer names are `nn.BatchNorm1d`'s.

    Args:
        num_features: C.
        eps, momentum: as in `nn.BatchNorm1d`.

    Set `synchronize` to take the statistics over all processes.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.synchronize = False
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the processes that share statistics; `tensor` itself where none do."""
        return all_reduce_sum(tensor) if self.synchronize else tensor

    def forward(self, rows: torch.Tensor, weight: torch.Tensor | None = None, relu: bool = False) -> torch.Tensor:
        """Normalises `rows` `(R, C)`; `weight` is `(R,)`, all ones where omitted; `relu` applies it to the result."""
        if not self.training:
            scale, shift = self.running_affine_map()
            return _activate(torch.addcmul(shift, rows, scale).to(rows.dtype), relu)
        self.num_batches_tracked.add_(1)
        if weight is None and not (self.synchronize and world_size() > 1):
            buffers = self.running_mean, self.running_var
            normalized = F.batch_norm(rows, *buffers, self.weight, self.bias, True, self.momentum, self.eps)
            return _activate(normalized, relu)
        if weight is None:
            weight = rows.new_ones(rows.shape[0])
        result, *moments = _WeightedNormalize.apply(rows, weight, self.weight, self.bias, self.eps, relu, self.reduce)
        self._update_running(*moments)
        return result

    def affine_map(
        self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift `(C,)` of this batch norm in training, for callers that know the batch's moments.

        Updates the running buffers.

        Args:
            mean, variance: `(C,)`, differentiable; the variance is the biased one.
            count: scalar tensor, how many rows they were taken over.
        """
        self.num_batches_tracked.add_(1)
        self._update_running(mean.detach(), variance.detach(), count)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return scale, self.bias - mean * scale

    def running_affine_map(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift `(C,)` of this batch norm in evaluation."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    @torch.no_grad()
    def _update_running(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        unbiased = variance * (count / (count - 1).clamp(min=1))
        momentum = self.momentum * (count >= 1).to(self.running_mean)  # no row, no statistics
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), momentum)


class _WeightedNormalize(torch.autograd.Function):
    """Batch norm with weighted statistics, and ReLU, keeping only its input for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        eps: float,
        relu: bool,
        reduce: Reduce,
    ) -> tuple[torch.Tensor, ...]:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        weight = weight.to(wide)
        count = reduce(weight.sum()).clamp(min=torch.finfo(wide.dtype).tiny)  # 0 where no row counts
        with torch.autocast(rows.device.type, enabled=False):  # statistics never in half precision
            mean = reduce(weight @ wide) / count
            variance = reduce(weight @ (wide - mean).square_()) / count
        inverse_std = torch.rsqrt(variance + eps)
        scale = gamma * inverse_std
        shift = beta - mean * scale
        ctx.save_for_backward(rows, mean, inverse_std, scale, shift, weight / count)
        ctx.relu, ctx.reduce = relu, reduce
        ctx.mark_non_differentiable(mean, variance, count)
        return _activate(torch.addcmul(shift, wide, scale).to(rows.dtype), relu), mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        rows, mean, inverse_std, scale, shift, share = ctx.saved_tensors
        wide, grad = rows.to(mean.dtype), grad.to(mean.dtype)
        if ctx.relu:  # one pass; masked_fill takes several times as long
            grad = torch.ops.aten.threshold_backward(grad, torch.addcmul(shift, wide, scale), 0)
        centered = wide - mean
        sums = torch.stack([grad.sum(0), torch.linalg.vecdot(grad, centered, dim=0) * inverse_std])
        grad_beta, grad_gamma = sums
        total_sum, total_dot = ctx.reduce(sums) * scale
        correction = torch.addcmul(total_sum, centered, total_dot * inverse_std).mul_(share[:, None])
        grad_rows = (grad * scale).sub_(correction).to(rows.dtype)
        return grad_rows, None, grad_gamma, grad_beta, None, None, None


def _activate(rows: torch.Tensor, relu: bool) -> torch.Tensor:
    return F.relu(rows, inplace=True) if relu else rows


class AffineMap(nn.Module):
    """Weight `(out, in)` and bias `(out,)` of a linear layer whose product its owner computes, often in parts.

    No `nn.Linear`: adapters and quantizers replace the forward of those, which would never be called.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        start = nn.Linear(in_features, out_features)
        self.weight, self.bias = start.weight, start.bias


class LinearBlock(nn.Module):
    """Linear, batch norm, and ReLU where `activation` is set, on rows `(R, in)` -> `(R, out)`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.linear = AffineMap(in_features, out_features)
        self.norm = WeightedBatchNorm(out_features, eps=eps, momentum=momentum)
        self.activation = activation

    def forward(self, rows: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        return self.normalize(linear(rows, self.linear.weight, self.linear.bias), weight)

    def normalize(self, rows: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The block without its linear part, for callers that compute that part more cheaply."""
        return self.norm(rows, weight, relu=self.activation)


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, for wide layers through oneDNN where that is the faster of PyTorch's two CPU libraries.

    PyTorch multiplies single-precision matrices with MKL, which takes twice the time on AMD processors.
    """
    # compiled code cannot trace what follows, and anomalies cannot be looked for in oneDNN's own layout
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or torch.is_anomaly_enabled():
        return F.linear(rows, weight, bias)
    single = rows.dtype == weight.dtype == torch.float32
    on_cpu = rows.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not (single and on_cpu and min(weight.shape) >= 128):
        return F.linear(rows, weight, bias)
    return F.linear(rows.to_mkldnn(), weight, bias).to_dense()


def run_blocks(blocks: Iterable[nn.Module], rows: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Runs `blocks` (each a `LinearBlock`) one after another on rows `(R, C)` with row weights `(R,)`."""
    for block in blocks:
        rows = block(rows, weight)
    return rows


class ProjectionHead(nn.Module):
    """Three linear layers with batch norm, ReLU after the first two: `(R, in)` -> `(R, out)`.

    Inside it is as wide as its input where `hidden_features` is omitted.
    """

    def __init__(self, in_features: int, out_features: int, hidden_features: int | None = None) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.layers = nn.ModuleList(
            [
                LinearBlock(in_features, hidden_features),
                LinearBlock(hidden_features, hidden_features),
                LinearBlock(hidden_features, out_features, activation=False),
            ]
        )

    def forward(self, rows: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """`weight` `(R,)` says how much each row counts in the batch statistics."""
        return run_blocks(self.layers, rows, weight)


def world_size() -> int:
    """Number of processes that take part in collectives."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process among them."""
    return dist.get_rank() if world_size() > 1 else 0


# The gradient of a gathered or reduced tensor is summed over the processes, so that a loss averaged over processes (as
# DistributedDataParallel averages gradients) has the gradient of the same loss on one process.


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(grad)


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.rows = tensor.shape[0]
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(grad).narrow(0, rank() * ctx.rows, ctx.rows)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` over all processes, differentiable."""
    return _AllReduceSum.apply(tensor) if world_size() > 1 else tensor


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`(R, ...)` of every process, concatenated in rank order to `(world_size * R, ...)`, differentiable.

    Every process must bring the same shape.
    """
    return _AllGatherRows.apply(tensor) if world_size() > 1 else tensor
