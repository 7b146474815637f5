"""One-to-one matching of the points of two views."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

try:
    from scipy.optimize import linear_sum_assignment
except Exception:
    linear_sum_assignment = None


@cache
def _solvers(process: int) -> ThreadPoolExecutor:
    """SciPy releases the GIL while it solves, so the clouds of a batch are solved side by side.

    Each process has threads of its own: a fork takes over none of its parent's. They stay for good, for a thread that
    ends while a loader forks its workers can leave these hanging (CPython 3.11).
    """
    return ThreadPoolExecutor(max_workers=8, thread_name_prefix="assignment")


class PendingMatch:
    """A one-to-one matching of two views, solved in threads while the device goes on.

    Args:
        coordinates: `(B, M, 3)`, metres.
        other: `(B, M, 3)`, in the same frame.
        mask, other_mask: `(B, M)`, false for slots that hold no point.
    """

    def __init__(
        self,
        coordinates: torch.Tensor,
        other: torch.Tensor,
        mask: torch.Tensor | None = None,
        other_mask: torch.Tensor | None = None,
    ) -> None:
        if linear_sum_assignment is None:
            raise ImportError("matching two views needs SciPy: pip install scipy")
        # exact where points coincide
        self._distances = torch.cdist(coordinates, other, compute_mode="donot_use_mm_for_euclid_dist")
        # copies that nobody waits for until a solver needs them; what comes from no CUDA device is waited for at once
        has_event = self._distances.is_cuda
        self._cost = self._distances.to("cpu", non_blocking=has_event)
        self._masks = [m if m is None else m.to("cpu", non_blocking=has_event) for m in (mask, other_mask)]
        self._copied = torch.cuda.Event(blocking=True) if has_event else None  # solvers sleep until then
        if self._copied is not None:
            # of the tensors' device, which need not be the current one
            self._copied.record(torch.cuda.current_stream(self._distances.device))
        self._jobs: list[Future[np.ndarray]] = [
            _solvers(os.getpid()).submit(self._solve, item) for item in range(len(coordinates))
        ]

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Matches `(B, M)` int64 and their distances `(B, M)` in metres, infinite where nothing was matched."""
        match = torch.from_numpy(np.stack([job.result() for job in self._jobs]))
        if self._distances.is_cuda:
            match = match.pin_memory()
        match = match.to(self._distances.device, non_blocking=True)
        distance = self._distances.gather(2, match.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return match.clamp(min=0), distance.masked_fill(match < 0, torch.inf)

    def _solve(self, item: int) -> np.ndarray:
        if self._copied is not None:
            self._copied.synchronize()
        cost = self._cost[item].numpy()
        mask, other_mask = (None if m is None else m[item].numpy() for m in self._masks)
        rows = np.arange(cost.shape[0]) if mask is None else np.flatnonzero(mask)
        columns = np.arange(cost.shape[1]) if other_mask is None else np.flatnonzero(other_mask)
        match = np.full(cost.shape[0], -1, dtype=np.int64)
        solved_rows, solved_columns = linear_sum_assignment(cost[np.ix_(rows, columns)])
        match[rows[solved_rows]] = columns[solved_columns]
        return match
