"""Index operations on point clouds: furthest point sampling, ball query, and the maximum over groups.

Each operation has one definition in plain PyTorch (backend `"torch"`), which works for every dtype and device,
and faster backends that compute the same function. `"auto"` picks the fastest that is installed and applies.
No gradient flows through indices; half precision inputs are compared in float32.

Shapes: B clouds, N points each, M samples or centres, K slots of a group, G = B * M groups.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Neighbors(NamedTuple):
    """The members of G groups, as a ragged list of E entries.

    An entry may stand for several of its group's K slots (its weight): the official form fills free slots with the
    first hit. Whether such repetitions are listed or counted differs between backends and is the same function
    of the groups: maxima ignore them, weighted statistics count them. Weights of a group sum to K.

    Args:
        index (`(E,)`, int64): rows into the flattened (B * N) points.
        weight (`(E,)`, dtype of the points): how many slots of its group the entry holds.
        offsets (`(G + 1,)`, int64): group g owns entries `offsets[g]:offsets[g + 1]`, at least one.
    """

    index: Tensor
    weight: Tensor
    offsets: Tensor


@torch.no_grad()
def furthest_point_sample(points: Tensor, num_samples: int, backend: str = "auto") -> Tensor:
    """Furthest point sampling on coordinates (D-FPS).

    Starts at index 0; every next sample is the point with the largest squared distance to its nearest sample,
    the lowest index among equals.

    Args:
        points: (B, N, C), metres, any frame.
        num_samples: M. If M > N all distances end at zero and index 0 repeats.
        backend: `"auto"` or `"torch"`.

    Returns:
        (B, M) int64, rows of each cloud.

    Source: official `furthest_point_sample_cuda.cu`, whose order among equals depends on its thread count.
    """
    _check_backend(backend, ("torch",))
    axes = _at_least_float32(points).permute(2, 0, 1).contiguous()  # (C, B, N)
    samples = torch.zeros(points.shape[0], num_samples, dtype=torch.long, device=points.device)
    nearest = torch.full(points.shape[:2], 1e10, dtype=axes.dtype, device=points.device)
    for m in range(1, num_samples):
        last = samples[None, :, m - 1, None].expand(axes.shape[0], -1, -1)
        nearest = torch.minimum(nearest, _sum_of_squares(axes - axes.gather(2, last)))
        samples[:, m] = nearest.argmax(1)
    return samples


@torch.no_grad()
def furthest_point_sample_features(features: Tensor, num_samples: int, backend: str = "auto") -> Tensor:
    """Furthest point sampling on features (F-FPS).

    As `furthest_point_sample`, with the squared distance expanded to a² + b² - 2ab, which rounding can make
    slightly negative.

    Args:
        features: (B, N, C), the official network passes coordinates and features side by side.
        num_samples: M.
        backend: `"auto"` or `"torch"`.

    Returns:
        (B, M) int64, rows of each cloud.

    Source: official `calc_square_dist(norm=False)` and `furthest_point_sample_with_dist`.
    """
    _check_backend(backend, ("torch",))
    features = _at_least_float32(features)
    batch = torch.arange(features.shape[0], device=features.device)
    samples = torch.zeros(features.shape[0], num_samples, dtype=torch.long, device=features.device)
    with torch.autocast(features.device.type, enabled=False):
        norms = features.square().sum(-1)
        nearest = torch.full_like(norms, 1e10)
        for m in range(1, num_samples):
            last = samples[:, m - 1]
            products = torch.bmm(features, features[batch, last, :, None]).squeeze(-1)
            nearest = torch.minimum(nearest, norms + norms[batch, last, None] - 2 * products)
            samples[:, m] = nearest.argmax(1)
    return samples


@torch.no_grad()
def ball_query(
    points: Tensor,
    centers: Tensor,
    radii: Sequence[tuple[float, float]],
    num_samples: Sequence[int],
    backend: str = "auto",
) -> list[Neighbors]:
    """Groups of points around centres, for several rings in one pass.

    A group holds the first K points, in index order, at squared distance d² with min² <= d² < max² or d² = 0. Free
    slots repeat the first hit; without any hit the group holds point 0.

    Args:
        points: (B, N, 3), metres.
        centers: (B, M, 3), same frame.
        radii: (min, max) of each ring, metres.
        num_samples: K of each ring.
        backend: `"auto"` or `"torch"`.

    Returns:
        One `Neighbors` per ring, group b * M + m around `centers[b, m]`.

    Source: official `ball_query_cuda.cu`.
    """
    _check_backend(backend, ("torch",))
    first_row = torch.arange(len(points), device=points.device)[:, None, None] * points.shape[1]
    return [
        Neighbors(
            index=(index + first_row).flatten(),
            weight=points.new_ones(index.numel()),
            offsets=torch.arange(0, index.numel() + 1, index.shape[-1], device=points.device),
        )
        for index in ball_query_padded(points, centers, radii, num_samples)
    ]


@torch.no_grad()
def ball_query_padded(
    points: Tensor, centers: Tensor, radii: Sequence[tuple[float, float]], num_samples: Sequence[int]
) -> list[Tensor]:
    """The definition of `ball_query` in the official form: per ring (B, M, K) int64, rows of each cloud.

    Distances are computed for some centres at a time, so that memory grows with neither M nor B * M * N.
    """
    axes = _at_least_float32(points).permute(2, 0, 1)[:, :, None]  # (3, B, 1, N)
    chunk = max(1, 2**21 // max(1, axes[0].numel()))
    parts: list[list[Tensor]] = [[] for _ in radii]
    for some in _at_least_float32(centers).permute(2, 0, 1)[..., None].split(chunk, dim=2):
        squared = _sum_of_squares(some - axes)
        for part, (low, high), k in zip(parts, radii, num_samples, strict=True):
            inside = (squared >= _squared_radius(low, squared.dtype)) & (
                squared < _squared_radius(high, squared.dtype)
            )
            part.append(_first_hits(inside | (squared == 0), k))
    return [torch.cat(part, dim=1) for part in parts]


def group_max(rows: Tensor, neighbors: Neighbors) -> Tensor:
    """Maximum over the entries of each group, channel by channel; differentiable in `rows`.

    Args:
        rows: (R, C); entry e of `neighbors` stands for row `neighbors.index[e]`.

    Returns:
        (G, C). The gradient goes to the first entry that attains the maximum.
    """
    return F.embedding_bag(neighbors.index, rows, neighbors.offsets, mode="max", include_last_offset=True)


def _first_hits(hits: Tensor, k: int) -> Tensor:
    """(..., N) bool -> (..., k) int64: the first k true positions, then the first one again; 0 where none is."""
    rank = hits.cumsum(-1, dtype=torch.int32)
    # everything that is no hit, or comes after the first k, goes to a slot k that is cut off again
    slot = torch.where(hits & (rank <= k), rank - 1, k).long()
    position = torch.arange(hits.shape[-1], device=hits.device).expand_as(slot)
    index = slot.new_zeros(*hits.shape[:-1], k + 1).scatter_(-1, slot, position)[..., :k]
    filled = torch.arange(k, device=hits.device) < rank[..., -1:]
    return torch.where(filled, index, index[..., :1])


def _sum_of_squares(axes: Tensor) -> Tensor:
    """Sum over the first dimension, term after term, so that every backend can round alike."""
    return sum(axis * axis for axis in axes)


def _squared_radius(radius: float, dtype: torch.dtype) -> float:
    """The square as the kernels form it: rounded to the points' precision before and after."""
    return torch.tensor(radius, dtype=dtype).square().item()


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _check_backend(backend: str, known: Sequence[str]) -> None:
    if backend not in ("auto", *known):
        raise ValueError(f"unknown backend {backend!r}: choose from {', '.join(('auto', *known))}")
