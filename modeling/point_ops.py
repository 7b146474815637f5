"""Index operations on point clouds: furthest point sampling, ball query, and the maximum over groups.

Each operation has one definition in plain PyTorch (backend `"torch"`), which works for every dtype and device,
and faster backends that compute the same function. `"auto"` picks the fastest that is installed and applies, and tries
a Triton kernel once on the device before it relies on it; a backend asked for by name raises ImportError where its
package is missing and ValueError where it does not apply.
No gradient flows through indices; half precision inputs are compared in float32. On CUDA nothing waits for the device.

Shapes: B clouds, N points each, M samples or centres, K slots of a group, G = B * M groups.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .point_ops_numba import GroupMax, numba
from .point_ops_numba import ball_query as numba_ball_query
from .point_ops_numba import furthest_point_sample as numba_sample
from .point_ops_numba import furthest_point_sample_features as numba_sample_features
from .point_ops_triton import ball_query_padded as triton_ball_query_padded
from .point_ops_triton import furthest_point_sample as triton_sample
from .point_ops_triton import furthest_point_sample_features as triton_sample_features
from .point_ops_triton import triton


class Neighbors(NamedTuple):
    """The members of G groups, as a ragged list of E entries.

    An entry may stand for several of its group's K slots (its weight): the official form fills free slots with the
    first hit. Whether such repetitions are listed or counted differs between backends and is the same function
    of the groups: maxima ignore them, weighted statistics count them. Weights of a group sum to K.

    Args:
        index (`(E,)`, int64): rows into the flattened (B * N) points.
        weight (`(E,)`, dtype of the points, at least float32): how many slots of its group the entry holds.
        offsets (`(G + 1,)`, int64): group g owns entries `offsets[g]:offsets[g + 1]`, at least one.
    """

    index: Tensor  # type: ignore[assignment]  # hides the tuple's method of this name, which nobody calls
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
        backend: `"auto"`, `"torch"`, `"numba"` (CPU) or `"triton"` (CUDA, at most float32); the last two take C = 3.

    Returns:
        (B, M) int64, rows of each cloud.

    Source: official `furthest_point_sample_cuda.cu`, whose order among equals depends on its thread count.
    """
    _check_sampling(points, num_samples)
    values = _at_least_float32(points).contiguous()
    obstacles = _obstacles(values, "3 coordinates", applies=values.shape[2] == 3)
    backend = _choose("furthest_point_sample", backend, **obstacles)
    if backend == "triton":
        return triton_sample(values, num_samples)
    if backend == "numba":
        return numba_sample(values, num_samples)

    axes = values.permute(2, 0, 1).contiguous()  # (C, B, N)

    def distances(last: Tensor) -> Tensor:
        return _sum_of_squares(axes - axes.gather(2, last.expand(len(axes), -1, -1)))

    return _sample(distances, axes[0], num_samples)


@torch.no_grad()
def furthest_point_sample_features(features: Tensor, num_samples: int, backend: str = "auto") -> Tensor:
    """Furthest point sampling on features (F-FPS).

    As `furthest_point_sample`, with the squared distance expanded to a² + b² - 2ab, which rounding can make
    slightly negative. Products are never formed in less than float32, neither under autocast nor with TF32 on:
    coordinates of tens of metres leave no bits to spare.

    Args:
        features: (B, N, C); the official network passes coordinates and features side by side.
        num_samples: M.
        backend: `"auto"`, `"torch"`, `"numba"` (CPU) or `"triton"` (CUDA, at most float32).

    Returns:
        (B, M) int64, rows of each cloud.

    Source: official `calc_square_dist(norm=False)` and `furthest_point_sample_with_dist`.
    """
    _check_sampling(features, num_samples)
    values = _at_least_float32(features).contiguous()
    backend = _choose("furthest_point_sample_features", backend, **_obstacles(values, "features"))
    if backend == "triton":
        return triton_sample_features(values, num_samples)
    if backend == "numba":
        return numba_sample_features(values, num_samples)

    norms = values.square().sum(-1)

    def distances(last: Tensor) -> Tensor:
        products = (values * values.take_along_dim(last[0, :, :, None], 1)).sum(-1)
        return norms + norms.gather(1, last[0]) - 2 * products

    return _sample(distances, norms, num_samples)


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
        backend: `"auto"`, `"torch"`, `"numba"` (CPU) or `"triton"` (CUDA, at most float32).

    Returns:
        One `Neighbors` per ring, group b * M + m around `centers[b, m]`. `"numba"` counts repetitions of the first
        hit, the others list every slot (E = B * M * K), so that no size depends on the data.

    Source: official `ball_query_cuda.cu`.
    """
    _check_sampling(points, min(num_samples))
    points, centers = _at_least_float32(points).contiguous(), _at_least_float32(centers).contiguous()
    backend = _choose("ball_query", backend, **_obstacles(points, "points"))
    if backend == "numba":
        rings = numba_ball_query(points, centers, _squared_radii(radii, points.dtype), num_samples)
        return [Neighbors(*ring) for ring in rings]
    if backend == "triton":
        padded = triton_ball_query_padded(points, centers, _squared_radii(radii, points.dtype), num_samples)
    else:
        padded = ball_query_padded(points, centers, radii, num_samples)
    first_row = torch.arange(len(points), device=points.device)[:, None, None] * points.shape[1]
    return [
        Neighbors(
            index=(index + first_row).flatten(),
            weight=torch.ones(index.numel(), dtype=points.dtype, device=index.device),
            offsets=torch.arange(0, index.numel() + 1, index.shape[-1], device=index.device),
        )
        for index in padded
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
        for part, (low, high), k in zip(parts, _squared_radii(radii, axes.dtype), num_samples, strict=True):
            part.append(_first_hits(((squared >= low) & (squared < high)) | (squared == 0), k))
    return [torch.cat(part, dim=1) for part in parts]


def group_max(rows: Tensor, neighbors: Neighbors, backend: str = "auto") -> Tensor:
    """Maximum over the entries of each group, channel by channel; differentiable in `rows`.

    Nothing of size (G, K, C) is formed.

    Args:
        rows: (R, C); entry e of `neighbors` stands for row `neighbors.index[e]`.
        neighbors: the groups; weights do not matter.
        backend: `"auto"`, `"torch"` or `"numba"` (CPU).

    Returns:
        (G, C). The gradient goes to the first entry that attains the maximum.
    """
    backend = _choose("group_max", backend, numba=_obstacles(rows, "rows")["numba"], torch=None)
    if backend == "numba":
        values = _at_least_float32(rows).contiguous()
        return GroupMax.apply(values, neighbors.index, neighbors.offsets).to(rows.dtype)
    return F.embedding_bag(neighbors.index, rows, neighbors.offsets, mode="max", include_last_offset=True)


def _sample(distances: Callable[[Tensor], Tensor], like: Tensor, num_samples: int) -> Tensor:
    """The loop of furthest point sampling; `distances` maps the last samples (1, B, 1) to distances `like` (B, N)."""
    samples = torch.zeros(len(like), num_samples, dtype=torch.long, device=like.device)
    nearest = torch.full_like(like, 1e10)
    for m in range(1, num_samples):
        nearest = torch.minimum(nearest, distances(samples[None, :, m - 1 : m]))
        samples[:, m] = nearest.argmax(1)
    return samples


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


def _squared_radii(radii: Sequence[tuple[float, float]], dtype: torch.dtype) -> list[tuple[float, float]]:
    """The squares as the official kernel forms them: rounded to the points' precision before and after."""
    return [tuple(ring) for ring in torch.tensor(radii, dtype=dtype, device="cpu").square().tolist()]


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _check_sampling(points: Tensor, num_samples: int) -> None:
    if points.dim() != 3 or points.shape[1] == 0 or num_samples < 1:
        raise ValueError(
            f"sampling takes (B, N, C) with at least one point and at least one sample, "
            f"found {tuple(points.shape)} and {num_samples} samples"
        )


def _obstacles(values: Tensor, takes: str, applies: bool = True) -> dict[str, Exception | None]:
    """Why each backend cannot be used for `values`, if so, the fastest first."""
    obstacles: dict[str, Exception | None] = {}
    for name, package, fits, where in (
        ("triton", triton, values.is_cuda and values.dtype == torch.float32, "in float32 on CUDA"),
        ("numba", numba, values.device.type == "cpu" and not torch.compiler.is_compiling(), "on the CPU, uncompiled"),
    ):
        obstacles[name] = None if fits and applies else ValueError(f"this backend takes {takes} {where}")
        if package is None:
            obstacles[name] = ImportError(f"this backend needs {name}, which cannot be imported: pip install {name}")
    return {**obstacles, "torch": None}


@functools.cache
def triton_works(operation: str, device: str = "cuda") -> bool:
    """Whether the Triton kernel of an operation compiles, runs and agrees with the definition on a few points.

    Warns where it does not; a kernel that cannot run must not end a training that `"auto"` chose it for.
    """
    points = (torch.arange(48, dtype=torch.float32).square() % 17).view(1, 16, 3).to(device)
    run: Callable[[str], Tensor] = {
        "furthest_point_sample": lambda backend: furthest_point_sample(points, 8, backend),
        "furthest_point_sample_features": lambda backend: furthest_point_sample_features(points, 8, backend),
        "ball_query": lambda backend: ball_query(points, points, [(0.0, 5.0)], [4], backend)[0].index,
    }[operation]
    try:
        problem = "" if torch.equal(run("triton"), run("torch")) else "its result is not the definition's"
    except Exception as error:  # compilers fail in many ways
        problem = f"{type(error).__name__}: {error}"
    if problem:
        warnings.warn(
            f"{operation}: the Triton kernel does not work on this device ({problem}); plain PyTorch is used, which "
            "gives the same result many times slower. `simipu-hf check` says more.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not problem


def _choose(operation: str, backend: str, **obstacles: Exception | None) -> str:
    """The backend to run. `obstacles` name the known ones, the fastest first."""
    if backend == "auto":
        possible = [name for name, obstacle in obstacles.items() if obstacle is None]
        return next(name for name in possible if name != "triton" or triton_works(operation))
    if backend not in obstacles:
        raise ValueError(f"unknown backend {backend!r}: choose from auto, {', '.join(obstacles)}")
    obstacle = obstacles[backend]
    if obstacle is not None:
        raise type(obstacle)(f"backend {backend!r}: {obstacle}")
    return backend
