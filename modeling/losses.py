"""InfoNCE between two sets of paired rows, with masks and negatives from every process."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .collectives import all_gather_rows, all_reduce_sum, rank, world_size

# logit of a candidate that does not count: its exponential is 0, and unlike -inf it leaves no NaN in gradients
NEVER = -1e4
# similarities held at a time: 16 MiB in single precision
MAX_SIMILARITIES = 2**22


@dataclass
class ContrastiveResult:
    """What `contrastive_loss` computes besides the loss; all without gradient but `loss`.

    Args:
        loss: scalar.
        positions (`(R,)`): how many candidates rank before each anchor's positive; 0 is best. Equally similar
            candidates rank by index, as in a stable sort.
        valid (`(R,)`): which anchors count.
        num_candidates: scalar tensor, how many candidates each anchor chose from.
    """

    loss: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor
    num_candidates: torch.Tensor

    @property
    def chance(self) -> torch.Tensor:
        """The loss of a uniform guess."""
        return self.num_candidates.float().log()

    def accuracy(self, k: int | torch.Tensor) -> torch.Tensor:
        """Share of valid anchors, 0 to 1, whose positive is among the k most similar candidates."""
        hits = (self.positions < k) & self.valid
        return hits.sum() / self.valid.sum().clamp(min=1)

    def accuracy_percent(self, percent: float) -> torch.Tensor:
        """The same for the most similar `percent` % of the candidates."""
        return self.accuracy((self.num_candidates * percent / 100).floor())


def contrastive_loss(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    temperature: float,
    valid: torch.Tensor,
    symmetric: bool = False,
    gather: bool = False,
) -> ContrastiveResult:
    """Mean cross-entropy of picking each anchor's positive among the positives of all rows.

    `mean_i CE(a_i · p_j / T, j = i)` over valid rows i and j, rows L2-normalised.

    Args:
        anchors: `(R, D)`.
        positives: `(R, D)`, row i belongs to anchor i. Detach it where it must not learn.
        temperature: T.
        valid: `(R,)` bool; rows that are false are neither anchors nor candidates.
        symmetric: average with the loss of anchors and positives exchanged.
        gather: candidates come from every process. Each process must bring the same R.
    """
    precision = torch.promote_types(anchors.dtype, torch.float32)
    anchors = F.normalize(anchors.to(precision), dim=1)
    positives = F.normalize(positives.to(precision), dim=1)
    gather = gather and world_size() > 1
    candidate_valid = all_gather_rows(valid.to(torch.uint8)).bool() if gather else valid
    first = rank() * len(anchors) if gather else 0
    own = torch.arange(first, first + len(anchors), device=anchors.device)

    penalty = torch.where(candidate_valid, 0.0, NEVER).to(precision)

    with torch.autocast(anchors.device.type, enabled=False):
        candidates = all_gather_rows(positives) if gather else positives
        per_row, positions = _InfoNCE.apply(anchors / temperature, candidates, penalty, own)
        loss = _mean_over_valid(per_row, valid)
        if symmetric:
            exchanged = all_gather_rows(anchors) if gather else anchors
            reverse, _ = _InfoNCE.apply(positives / temperature, exchanged, penalty, own)
            loss = (loss + _mean_over_valid(reverse, valid)) / 2
    return ContrastiveResult(loss, positions, valid, candidate_valid.sum())


class _InfoNCE(torch.autograd.Function):
    """Cross-entropy and position of each anchor's positive, without ever holding all similarities.

    They are formed for some anchors at a time, and again in the backward pass, so that memory grows linearly with
    the number of candidates; with every process's points as candidates the full matrix would be the largest tensor.

    Args:
        anchors: `(R, D)`, divided by the temperature.
        candidates: `(N, D)`.
        penalty: `(N,)`, added to each candidate's logit.
        targets: `(R,)` int64, which candidate is each anchor's positive.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors: torch.Tensor, candidates: torch.Tensor, penalty: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses, ranks, normalizers = [], [], []
        index = torch.arange(len(candidates), device=candidates.device)
        for some, own in zip(*_chunks(len(candidates), anchors, targets), strict=True):
            logits = torch.addmm(penalty, some, candidates.T)
            positive = logits.gather(1, own.unsqueeze(1))
            normalizers.append(logits.logsumexp(1))
            losses.append(normalizers[-1] - positive.squeeze(1))
            # equal logits are common: official clouds hold the same centre several times
            earlier = torch.where(index < own.unsqueeze(1), logits >= positive, logits > positive)
            ranks.append(earlier.sum(1))
        ctx.save_for_backward(anchors, candidates, penalty, targets, torch.cat(normalizers))
        positions = torch.cat(ranks)
        ctx.mark_non_differentiable(positions)
        return torch.cat(losses), positions

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        anchors, candidates, penalty, targets, normalizers = ctx.saved_tensors
        anchor_grads, candidate_grad = [], torch.zeros_like(candidates)
        for some, own, normalizer, upstream in zip(
            *_chunks(len(candidates), anchors, targets, normalizers.unsqueeze(1), grad.unsqueeze(1)), strict=True
        ):
            slopes = torch.addmm(penalty, some, candidates.T).sub_(normalizer).exp_().mul_(upstream)
            slopes.scatter_add_(1, own.unsqueeze(1), -upstream)
            anchor_grads.append(slopes @ candidates)
            if ctx.needs_input_grad[1]:
                candidate_grad.addmm_(slopes.T, some)
        return torch.cat(anchor_grads), candidate_grad if ctx.needs_input_grad[1] else None, None, None


def _chunks(num_candidates: int, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Each tensor `(R, ...)` in parts of so many rows that a part's similarities stay small."""
    rows = max(1, MAX_SIMILARITIES // max(1, num_candidates))
    return [tensor.split(rows) for tensor in tensors]


def _mean_over_valid(per_row: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the valid rows of all processes, as this process's share of an average over processes."""
    count = valid.sum().to(per_row.dtype)
    mean_count = all_reduce_sum(count) / world_size()
    return torch.where(valid, per_row, 0.0).sum() / mean_count.clamp(min=1)
