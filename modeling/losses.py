"""InfoNCE between two sets of paired rows, with masks and negatives from every process."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import all_gather_rows, all_reduce_sum, linear, rank, world_size

# logit of a pair that does not count: its exponential is 0, and unlike -inf it leaves no NaN in gradients
NEVER = -1e4
# similarities held at a time: 16 MiB in single precision
MAX_SIMILARITIES = 2**22


@dataclass
class ContrastiveResult:
    """What `contrastive_loss` computes besides the loss; all without gradient but `loss`.

    Args:
        loss: scalar.
        chance: the loss of a uniform guess, ln(number of candidates).
        valid (`(R,)`): which anchors count.
        num_candidates: scalar tensor, how many rows anchors choose from.
        positions (`(R,)`, *optional*): how many candidates rank before each anchor's positive; 0 is best. Candidates
            of one similarity, to rounding, rank by index, as in a stable sort.
    """

    loss: Tensor
    chance: Tensor
    valid: Tensor
    num_candidates: Tensor
    positions: Tensor | None = None

    def accuracy(self, k: int | Tensor) -> Tensor | None:
        """Share of valid anchors, 0 to 1, whose positive is among the k most similar candidates."""
        if self.positions is None:
            return None
        hits = (self.positions < k) & self.valid
        return hits.sum() / self.valid.sum().clamp(min=1)

    def accuracy_percent(self, percent: float) -> Tensor | None:
        """The same for the most similar `percent` % of the candidates."""
        return self.accuracy((self.num_candidates * percent / 100).floor())


def contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    temperature: float,
    valid: Tensor,
    symmetric: bool = False,
    gather: bool = False,
    return_positions: bool = False,
) -> ContrastiveResult:
    """Mean cross-entropy of picking each anchor's positive among the positives of all rows.

    `mean_i CE(a_i · p_j / T, j = i)` over valid rows i and j, rows L2-normalised.

    Args:
        anchors: `(..., D)`, R rows in all.
        positives: `(..., D)`, row i belongs to anchor i. Detach it where it must not learn.
        temperature: T.
        valid: `(...)` bool; rows that are false are neither anchors nor candidates.
        symmetric: average with the loss of anchors and positives exchanged, from the same similarities.
        gather: candidates come from every process. Each process must bring the same R.
        return_positions: rank the positives as well, which costs another pass over all similarities.
    """
    # exp(similarity / T - 1 / T) is formed, which single precision holds down to -80
    precision = torch.promote_types(anchors.dtype, torch.float32 if temperature > 2 / 80 else torch.float64)
    anchors = F.normalize(anchors.flatten(0, -2).to(precision), dim=1)
    positives = F.normalize(positives.flatten(0, -2).to(precision), dim=1)
    valid = valid.flatten()
    gather = gather and world_size() > 1
    candidates = all_gather_rows(positives) if gather else positives
    candidate_valid = all_gather_rows(valid.to(torch.uint8)).bool() if gather else valid
    with torch.autocast(anchors.device.type, enabled=False):
        forward, reverse, positions = _InfoNCE.apply(
            anchors, candidates, valid, candidate_valid, temperature, symmetric, gather, return_positions
        )
    loss = _mean_over_valid(forward, valid)
    if symmetric:
        loss = (loss + _mean_over_valid(reverse, valid)) / 2
    count = candidate_valid.sum()
    chance = count.clamp(min=1).to(precision).log()
    return ContrastiveResult(loss, chance, valid, count, positions)


class _InfoNCE(torch.autograd.Function):
    """Cross-entropies of each anchor's positive, and of each positive's anchor.

    Similarities are formed for `MAX_SIMILARITIES` pairs at a time. Unless these are all, they are formed again in the
    backward pass, so that memory grows linearly with the number of candidates; with every process's points as
    candidates the full matrix would be the largest tensor.

    Anchors `(R, D)` and candidates `(N, D)` have unit length; from row `rank * R` on, candidates are the anchors'
    positives; `valid` `(R,)` and `candidate_valid` `(N,)` are bool. Returns losses of the anchors `(R,)`, of their
    positives `(R,)` (zeros unless symmetric), and positions `(R,)` or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        valid: Tensor,
        candidate_valid: Tensor,
        temperature: float,
        symmetric: bool,
        gathered: bool,
        rank_positives: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.first = rank() * len(anchors) if gathered else 0
        ctx.temperature, ctx.symmetric, ctx.gathered = temperature, symmetric, gathered
        left = torch.cat([anchors / temperature, _penalty(valid, anchors), torch.ones_like(anchors[:, :1])], dim=1)
        right = torch.cat([candidates, torch.ones_like(candidates[:, :1]), _penalty(candidate_valid, candidates)], 1)
        row_sums, positives, positions, kept = [], [], [], []
        column_sums = right.new_zeros(len(right))
        for rows, logits in _logits_in_parts(left, right):
            own = _positive_columns(rows, ctx.first, right)
            positive = logits.gather(1, own)
            positives.append(positive.squeeze(1))
            if rank_positives:
                positions.append(_positions(logits, positive, own))
            exponentials = logits.sub_(1 / temperature).exp_()
            if len(logits) == len(left):
                kept = [exponentials]
            row_sums.append(exponentials.sum(1))
            if symmetric:
                column_sums += exponentials.sum(0)
        tiny = torch.finfo(right.dtype).tiny  # what invalid rows are left with
        row_sum, positive = torch.cat(row_sums).clamp(min=tiny), torch.cat(positives)
        if gathered and symmetric:
            column_sums = all_reduce_sum(column_sums)
        column_sums = column_sums.clamp(min=tiny)
        ctx.save_for_backward(left, right, row_sum, column_sums, *kept)
        forward = row_sum.log() + 1 / temperature - positive
        reverse = torch.zeros_like(forward)
        if symmetric:
            reverse = column_sums.narrow(0, ctx.first, len(left)).log() + 1 / temperature - positive
        if not rank_positives:
            return forward, reverse, None
        ranks = torch.cat(positions)
        ctx.mark_non_differentiable(ranks)
        return forward, reverse, ranks

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, forward_grad: Tensor, reverse_grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        left, right, row_sum, column_sums, *kept = ctx.saved_tensors
        # a backward pass that is run under autocast would form products in half precision
        with torch.autocast(left.device.type, enabled=False):
            row_slopes = forward_grad / row_sum
            column_grad = all_gather_rows(reverse_grad) if ctx.gathered and ctx.symmetric else reverse_grad
            own_grad = forward_grad + reverse_grad if ctx.symmetric else forward_grad
            width = left.shape[1] - 2
            anchor_grads, candidate_grad = [], torch.zeros_like(right[:, :width])
            parts = ((r, logits.sub_(1 / ctx.temperature).exp_()) for r, logits in _logits_in_parts(left, right))
            for rows, exponentials in [(slice(0, len(left)), kept[0])] if kept else parts:
                slopes = row_slopes[rows, None]
                if ctx.symmetric:
                    slopes = slopes + column_grad / column_sums
                weights = exponentials * slopes if kept else exponentials.mul_(slopes)
                weights.scatter_add_(1, _positive_columns(rows, ctx.first, right), -own_grad[rows, None])
                anchor_grads.append(linear(weights, right[:, :width].T))
                if ctx.needs_input_grad[1]:
                    candidate_grad.addmm_(weights.T, left[rows, :width])
            anchor_grad = torch.cat(anchor_grads) / ctx.temperature
        return anchor_grad, candidate_grad if ctx.needs_input_grad[1] else None, *[None] * 6


def _logits_in_parts(left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some anchors at a time, and their logits `(r, N)`."""
    most = max(1, MAX_SIMILARITIES // max(1, len(right)))
    for start in range(0, len(left), most):
        rows = slice(start, min(start + most, len(left)))
        yield rows, linear(left[rows], right)


def _positive_columns(rows: slice, first: int, like: Tensor) -> Tensor:
    """`(r, 1)`, which candidate is the positive of each of these anchors."""
    return torch.arange(first + rows.start, first + rows.stop, device=like.device)[:, None]


def _positions(logits: Tensor, positive: Tensor, own: Tensor) -> Tensor:
    index = torch.arange(logits.shape[1], device=logits.device)
    # equal logits are common: official clouds hold the same centre several times
    return torch.where(index < own, logits >= positive, logits > positive).sum(1)


def _penalty(valid: Tensor, like: Tensor) -> Tensor:
    """A column `(R, 1)`, added to the logits of each row."""
    return torch.where(valid, 0.0, NEVER).to(like.dtype)[:, None]


def _mean_over_valid(per_row: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid rows of all processes, as this process's share of an average over processes."""
    count = valid.sum().to(per_row.dtype)
    mean_count = all_reduce_sum(count) / world_size()
    return torch.where(valid, per_row, 0.0).sum() / mean_count.clamp(min=1 / world_size())
