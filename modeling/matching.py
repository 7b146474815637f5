"""One-to-one matching of the points of two views."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from .geometry import invert_transform, transform_points
from .outputs_simipu import PointEncoderOutput

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
    """A one-to-one matching of the points of two views, solved in threads while the device goes on.

    Args:
        view, augmented: B clouds of M points each; slots that hold no point are not matched.
        lidar_to_aug: `(B, 4, 4)`, from the view's coordinates to the augmented ones.
    """

    def __init__(self, view: PointEncoderOutput, augmented: PointEncoderOutput, lidar_to_aug: torch.Tensor) -> None:
        if linear_sum_assignment is None:
            raise ImportError("matching two views needs SciPy: pip install scipy")
        back = invert_transform(lidar_to_aug).to(augmented.coordinates.dtype)
        brought_back = transform_points(augmented.coordinates, back)
        # exact where points coincide
        self._distances = torch.cdist(view.coordinates, brought_back, compute_mode="donot_use_mm_for_euclid_dist")
        # copies that nobody waits for until a solver needs them; what comes from no CUDA device is waited for at once
        has_event = self._distances.is_cuda
        self._cost = self._distances.to("cpu", non_blocking=has_event)
        self._masks = [points.mask.to("cpu", non_blocking=has_event) for points in (view, augmented)]
        self._copied = torch.cuda.Event(blocking=True) if has_event else None  # solvers sleep until then
        if self._copied is not None:
            # of the tensors' device, which need not be the current one
            self._copied.record(torch.cuda.current_stream(self._distances.device))
        self._jobs: list[Future[np.ndarray]] = [
            _solvers(os.getpid()).submit(self._solve, item) for item in range(len(self._cost))
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
        rows, columns = (np.flatnonzero(mask[item].numpy()) for mask in self._masks)
        match = np.full(cost.shape[0], -1, dtype=np.int64)
        solved_rows, solved_columns = linear_sum_assignment(cost[np.ix_(rows, columns)])
        match[rows[solved_rows]] = columns[solved_columns]
        return match
