"""InfoNCE between two sets of paired rows, with masks and negatives from every process."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .collectives import all_gather_rows, all_reduce_sum, rank, world_size

# logit of a candidate that does not count: its exponential is 0, and unlike -inf it leaves no NaN in gradients
NEVER = -1e4


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

    with torch.autocast(anchors.device.type, enabled=False):
        candidates = all_gather_rows(positives) if gather else positives
        logits = _masked_logits(anchors, candidates, temperature, candidate_valid)
        loss = _mean_cross_entropy(logits, own, valid)
        if symmetric:
            exchanged = all_gather_rows(anchors) if gather else anchors
            reverse = _masked_logits(positives, exchanged, temperature, candidate_valid)
            loss = (loss + _mean_cross_entropy(reverse, own, valid)) / 2
    with torch.no_grad():
        positions = _positions(logits, own)
    return ContrastiveResult(loss, positions, valid, candidate_valid.sum())


def _positions(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    target_logits = logits.gather(1, targets.unsqueeze(1))
    earlier = torch.arange(logits.shape[1], device=logits.device) < targets.unsqueeze(1)
    # equal logits are common: official clouds hold the same centre several times
    return torch.where(earlier, logits >= target_logits, logits > target_logits).sum(1)


def _masked_logits(
    rows: torch.Tensor, candidates: torch.Tensor, temperature: float, valid: torch.Tensor
) -> torch.Tensor:
    logits = rows @ candidates.T / temperature
    return logits.masked_fill(~valid, NEVER)


def _mean_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the valid rows of all processes, as this process's share of an average over processes."""
    per_row = torch.logsumexp(logits, dim=1) - logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    per_row = torch.where(valid, per_row, 0.0)
    count = valid.sum().to(per_row.dtype)
    mean_count = all_reduce_sum(count) / world_size()
    return per_row.sum() / mean_count.clamp(min=1)
