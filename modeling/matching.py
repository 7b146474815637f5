"""What corresponds to what: points of one view to points of the other, and points to pixels."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

try:
    from scipy.optimize import linear_sum_assignment
except Exception:
    linear_sum_assignment = None

# SciPy releases the GIL while it solves, so the clouds of a batch are solved side by side
_SOLVERS = ThreadPoolExecutor(max_workers=8, thread_name_prefix="assignment")


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
        self._cost = torch.cdist(coordinates, other, compute_mode="donot_use_mm_for_euclid_dist")
        host = _HostCopy(self._cost, mask, other_mask)
        self._jobs: list[Future[np.ndarray]] = [
            _SOLVERS.submit(_solve, host, item) for item in range(len(coordinates))
        ]

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Matches `(B, M)` int64 and their distances `(B, M)` in metres, infinite where nothing was matched."""
        match = torch.from_numpy(np.stack([job.result() for job in self._jobs]))
        match = match.to(self._cost.device, non_blocking=True)
        distance = self._cost.gather(2, match.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return match.clamp(min=0), distance.masked_fill(match < 0, torch.inf)


class _HostCopy:
    """Copies of costs and masks on the CPU that nobody waits for until a solver needs them."""

    def __init__(self, cost: torch.Tensor, *masks: torch.Tensor | None) -> None:
        self._cost = cost.to("cpu", non_blocking=True)
        self._masks = [None if mask is None else mask.to("cpu", non_blocking=True) for mask in masks]
        self._copied = None
        if cost.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def item(self, index: int) -> tuple[np.ndarray, list[np.ndarray | None]]:
        if self._copied is not None:
            self._copied.synchronize()
        masks = [None if mask is None else mask[index].numpy() for mask in self._masks]
        return self._cost[index].numpy(), masks


def _solve(host: _HostCopy, item: int) -> np.ndarray:
    cost, (mask, other_mask) = host.item(item)
    rows = np.arange(cost.shape[0]) if mask is None else np.flatnonzero(mask)
    columns = np.arange(cost.shape[1]) if other_mask is None else np.flatnonzero(other_mask)
    match = np.full(cost.shape[0], -1, dtype=np.int64)
    solved_rows, solved_columns = linear_sum_assignment(cost[np.ix_(rows, columns)])
    match[rows[solved_rows]] = columns[solved_columns]
    return match


def transform_points(points: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Applies homogeneous maps `(B, 4, 4)` to points `(B, M, 3)`."""
    return points @ matrix[:, :3, :3].transpose(1, 2) + matrix[:, None, :3, 3]


def invert_transform(matrix: torch.Tensor) -> torch.Tensor:
    """Inverse of `(B, 4, 4)` in float64, without the device synchronisation of `torch.linalg.inv`."""
    return torch.linalg.inv_ex(matrix.double()).inverse


def project_points(points: torch.Tensor, lidar_to_pixel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Projects points `(B, M, 3)` with `(B, 3, 4)`: pixels `(B, M, 2)` (x, y) and depths `(B, M)` in metres.

    Depths are clamped to 1e-5 before the division, as in the official code.
    """
    homogeneous = points @ lidar_to_pixel[:, :, :3].transpose(1, 2) + lidar_to_pixel[:, None, :, 3]
    depth = homogeneous[..., 2]
    return homogeneous[..., :2] / depth.clamp(min=1e-5).unsqueeze(-1), depth


def inside_image(pixels: torch.Tensor, depth: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
    """Whether pixels `(B, M, 2)` lie in front of the camera and within images `(B, 2)` (height, width)."""
    width_height = image_sizes.flip(-1).unsqueeze(1)
    within = (pixels >= -0.5) & (pixels < width_height - 0.5)
    return within.all(-1) & (depth > 1e-5)


def sample_feature_maps(
    maps: Sequence[torch.Tensor],
    pixels: torch.Tensor,
    sizes: torch.Tensor,
    align_corners: bool,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """Bilinear samples of several feature maps, concatenated: `(B, M, sum of C_s)`.

    Args:
        maps: `(B, C_s, H_s, W_s)` each.
        pixels: `(B, M, 2)`, x and y in pixels of the image.
        sizes: `(B, 2)`, the height and width in pixels that the maps are taken to cover.
        align_corners: true maps 0 and `sizes` to the outermost cell centres; false takes integer pixels as pixel
            centres and samples cells at theirs.
        padding_mode: `"zeros"` outside the outermost cell centres, or `"border"`, the nearest cell.
    """
    width_height = sizes.flip(-1).unsqueeze(1).to(pixels.dtype)
    grid = (pixels if align_corners else pixels + 0.5) / width_height * 2 - 1
    sampled = [
        F.grid_sample(
            m.to(grid.dtype), grid.unsqueeze(2), padding_mode=padding_mode, align_corners=align_corners
        ).squeeze(-1)
        for m in maps
    ]
    return torch.cat(sampled, dim=1).transpose(1, 2)
