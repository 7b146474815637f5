"""Point operations on the CPU, compiled by Numba. Same functions as their definitions in `point_ops`.

Kernels release the interpreter lock and run in plain Python threads, as many as `torch.get_num_threads()` allows:
unlike Numba's own parallel loops they survive `fork` (data workers) and concurrent callers. Inputs are contiguous CPU
tensors of float32 or float64.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import numba
except Exception:
    numba = None  # type: ignore[assignment]  # where it is not installed

BUCKET_SIZE = 128  # points of a bucket in furthest point sampling
GRID_SIZE = 128  # at most so many cells along x and along y in the ball query
WORK_PER_THREAD = 2**23  # iterations, some three milliseconds


def furthest_point_sample(points: Tensor, num_samples: int) -> Tensor:
    """(B, N, 3) -> (B, M) int64. Exact, equals included, within 50 km.

    Points are put into buckets by a k-d tree; a bucket whose bounding box lies farther from the new sample than all
    its points lie from their nearest samples cannot change and is skipped (the idea of QuickFPS, Han et al., TCAD
    2023). Rounding is monotonic, so the bound holds for the rounded distances as well.
    """
    samples = torch.empty(len(points), num_samples, dtype=torch.int64)
    threads = _threads(points.shape[0] * points.shape[1] * num_samples)
    _in_threads(_sample_coordinates, zip(points.numpy(), samples.numpy(), strict=True), threads)
    return samples


def furthest_point_sample_features(features: Tensor, num_samples: int) -> Tensor:
    """(B, N, C) -> (B, M) int64."""
    samples = torch.empty(len(features), num_samples, dtype=torch.int64)
    threads = _threads(features.numel() * num_samples)
    _in_threads(_sample_features, zip(features.numpy(), samples.numpy(), strict=True), threads)
    return samples


def ball_query(
    points: Tensor, centers: Tensor, radii_squared: Sequence[tuple[float, float]], num_samples: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(B, N, 3), (B, M, 3) -> per ring index, weight and offsets of `Neighbors`, every point listed once.

    Points are sorted into a grid over x and y with cells no smaller than the largest radius, so that the neighbours
    of a centre lie in 3 x 3 cells.
    """
    low, high = np.asarray(radii_squared, dtype=points.numpy().dtype).T.copy()
    slots = np.asarray(num_samples)
    threads = _threads(points.shape[0] * points.shape[1] * centers.shape[1])
    parts_per_cloud = -(-threads // max(1, len(points)))
    calls = []
    for b in range(len(points)):
        for start, end in _split(centers.shape[1], parts_per_cloud):
            # allocated here and not in the threads, where every call would map and unmap its pages anew
            index = np.empty((end - start) * slots.sum(), np.int64)
            count = np.empty((len(slots), end - start), np.int64)
            cloud, some = points[b].numpy(), centers[b, start:end].numpy()
            calls.append((cloud, some, low, high, slots, b * points.shape[1], index, count))
    _in_threads(_query, calls, threads)

    rings = []
    for s, k in enumerate(num_samples):
        parts = [(index[slots[:s].sum() * count.shape[1] :], count[s]) for *_, index, count in calls]
        index = np.concatenate([index[: count.sum()] for index, count in parts])
        count = np.concatenate([count for _, count in parts])
        offsets = np.concatenate([[0], count.cumsum()])
        weight = np.ones(len(index), low.dtype)
        weight[offsets[:-1]] += k - count
        rings.append((torch.from_numpy(index), torch.from_numpy(weight), torch.from_numpy(offsets)))
    return rings


class GroupMax(torch.autograd.Function):
    """`GroupMax.apply(rows (R, C), index (E,), offsets (G + 1,)) -> (G, C)`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
        maximum = rows.new_empty(len(offsets) - 1, rows.shape[1])
        argument = torch.empty(maximum.shape, dtype=torch.int32)
        arrays = [tensor.detach().numpy() for tensor in (rows, index, offsets, maximum, argument)]
        threads = _threads(2 * index.numel() * rows.shape[1])
        parts = _split(len(maximum), threads)
        _in_threads(_gather_max, [(*arrays, start, end) for start, end in parts], threads)
        ctx.save_for_backward(argument)
        ctx.num_rows = len(rows)
        return maximum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (argument,) = ctx.saved_tensors
        rows_gradient = gradient.new_zeros(ctx.num_rows, gradient.shape[1])
        # a row can win in several groups, but every channel is its own: threads share the channels
        arrays = [tensor.numpy() for tensor in (gradient.contiguous(), argument, rows_gradient)]
        threads = _threads(16 * gradient.numel())  # each addition waits for a place of its own in memory
        parts = _split(gradient.shape[1], threads)
        _in_threads(_scatter_add, [(*arrays, start, end) for start, end in parts], threads)
        return rows_gradient, None, None


def _split(length: int, parts: int) -> list[tuple[int, int]]:
    """Start and end of about equal parts of a range."""
    step = max(1, -(-length // parts))
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _threads(work: int) -> int:
    """How many threads pay for `work`, iterations of the innermost loop.

    Starting them costs time, and PyTorch's own keep the other cores busy for a while after each of its operations.
    """
    return min(torch.get_num_threads(), 1 + work // WORK_PER_THREAD)


def _in_threads(function: Callable, calls: Iterable[tuple], threads: int) -> None:
    """`function(*call)` for each of `calls`."""
    if threads == 1:
        for call in calls:
            function(*call)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda call: function(*call), calls))  # the list raises what a call raised


def jit(**options: Any) -> Callable:
    """Compile on first use and keep the result on disk; without Numba leave the function as it is."""

    def compiled(function: Callable) -> Callable:
        if numba is None:
            return function
        options.update(nogil=True, error_model="numpy")
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's cache folder is writable
            return numba.njit(**options)(function)

    return compiled


@jit()
def _sample_coordinates(points, samples):
    n = len(points)
    order, starts = _buckets(points)
    num_buckets = len(starts) - 1
    x, y, z = points[order, 0], points[order, 1], points[order, 2]
    low, high = np.empty((num_buckets, 3), points.dtype), np.empty((num_buckets, 3), points.dtype)
    for b in range(num_buckets):
        for axis in range(3):
            low[b, axis], high[b, axis] = _extent(points, axis, order, starts[b], starts[b + 1])

    zero = points.dtype.type(0)
    nearest = np.full(n, 1e10, points.dtype)  # squared distance of every point to its nearest sample
    farthest = np.full(num_buckets, 1e10, points.dtype)  # the largest of each bucket, and the point it belongs to
    farthest_point = order[starts[:-1]]
    bound = np.empty(num_buckets, points.dtype)
    samples[0] = 0
    for m in range(1, len(samples)):
        px, py, pz = points[samples[m - 1]]
        for b in range(num_buckets):
            dx = max(max(low[b, 0] - px, px - high[b, 0]), zero)
            dy = max(max(low[b, 1] - py, py - high[b, 1]), zero)
            dz = max(max(low[b, 2] - pz, pz - high[b, 2]), zero)
            bound[b] = dx * dx + dy * dy + dz * dz
        for b in range(num_buckets):
            if bound[b] < farthest[b]:
                for i in range(starts[b], starts[b + 1]):
                    dx, dy, dz = x[i] - px, y[i] - py, z[i] - pz
                    distance = dx * dx + dy * dy + dz * dz
                    nearest[i] = distance if distance < nearest[i] else nearest[i]
                best = starts[b]
                for i in range(starts[b] + 1, starts[b + 1]):
                    if nearest[i] >= nearest[best] and (nearest[i] > nearest[best] or order[i] < order[best]):
                        best = i
                farthest[b], farthest_point[b] = nearest[best], order[best]
        best = 0
        for b in range(1, num_buckets):
            if farthest[b] >= farthest[best] and (
                farthest[b] > farthest[best] or farthest_point[b] < farthest_point[best]
            ):
                best = b
        samples[m] = farthest_point[best]


@jit()
def _buckets(points):
    """A balanced k-d tree: point indices by bucket, and where each bucket starts (the end included)."""
    order = np.arange(len(points))
    starts = np.array([0, len(points)])
    while starts[1] > BUCKET_SIZE:
        halves = np.empty(2 * len(starts) - 1, np.int64)
        for b in range(len(starts) - 1):
            start, end = starts[b], starts[b + 1]
            widest, axis = points.dtype.type(-1), 0
            for candidate in range(3):
                low, high = _extent(points, candidate, order, start, end)
                if high - low > widest:
                    widest, axis = high - low, candidate
            middle = (start + end) // 2
            halves[2 * b], halves[2 * b + 1] = start, middle
            if widest > 0:  # equal points need no halving, which takes long
                bucket = order[start:end]
                bucket[:] = bucket[np.argpartition(points[bucket, axis], middle - start)]
        halves[-1] = len(points)
        starts = halves
    return order, starts


@jit()
def _extent(points, axis, order, start, end):
    low = high = points[order[start], axis]
    for i in range(start + 1, end):
        value = points[order[i], axis]
        low, high = min(low, value), max(high, value)
    return low, high


@jit()
def _sample_features(features, samples):
    samples[:] = 0
    norms, nearest = np.empty((2, len(features)), features.dtype)
    for i in range(len(features)):
        norms[i] = _dot(features[i], features[i])
    nearest[:] = 1e10  # squared distance to the nearest sample so far
    for m in range(1, len(samples)):
        last = samples[m - 1]
        for i in range(len(features)):
            product = _dot(features[i], features[last])
            nearest[i] = min(nearest[i], norms[i] + norms[last] - (product + product))
        samples[m] = nearest.argmax()


@jit(fastmath={"reassoc", "nsz", "contract"})  # lets the sum run in several lanes
def _dot(a, b):
    total = a.dtype.type(0)
    for c in range(len(a)):
        total += a[c] * b[c]
    return total


@jit()
def _query(points, centers, low, high, slots, first_row, index, count):
    """Fill `count` (rings, centres) and `index`: ring s from slot centres * sum(slots[:s]) on, without gaps."""
    num_rings = len(slots)
    farthest = high.max()
    radius = 1.001 * np.sqrt(np.float64(farthest))  # nothing that rounding puts inside lies beyond
    order, starts, origin, size = _grid(points, radius)
    n = len(points)
    x, y, z = points[order, 0], points[order, 1], points[order, 2]

    written = np.zeros(num_rings, np.int64)
    for s in range(1, num_rings):
        written[s] = written[s - 1] + len(centers) * slots[s - 1]
    members = np.empty((num_rings, slots.max()), np.int64)  # of the centre at hand, in index order
    found = np.empty(num_rings, np.int64)
    squared = np.empty(n, points.dtype)
    for m in range(len(centers)):
        cx, cy, cz = centers[m]
        found[:] = 0
        first_y, last_y = _cell(cy - radius, origin[1], size[1]), _cell(cy + radius, origin[1], size[1])
        for cell_x in range(_cell(cx - radius, origin[0], size[0]), _cell(cx + radius, origin[0], size[0]) + 1):
            start, end = starts[cell_x * GRID_SIZE + first_y], starts[cell_x * GRID_SIZE + last_y + 1]
            for i in range(start, end):
                dx, dy, dz = cx - x[i], cy - y[i], cz - z[i]
                squared[i] = dx * dx + dy * dy + dz * dz
            for i in range(start, end):
                if squared[i] < farthest or squared[i] == 0:
                    for s in range(num_rings):
                        if low[s] <= squared[i] < high[s] or squared[i] == 0:
                            found[s] = _insert(members[s], found[s], slots[s], order[i])
        for s in range(num_rings):
            if found[s] == 0:
                members[s, 0], found[s] = 0, 1
            for j in range(found[s]):
                index[written[s] + j] = first_row + members[s, j]
            written[s] += found[s]
            count[s, m] = found[s]


@jit()
def _insert(members, found, slots, point):
    """Insert into a sorted list that keeps the `slots` smallest; returns its length."""
    if found == slots:
        if members[slots - 1] < point:
            return found
        found -= 1
    j = found
    while j > 0 and members[j - 1] > point:
        members[j] = members[j - 1]
        j -= 1
    members[j] = point
    return found + 1


@jit()
def _grid(points, radius):
    """Counting sort by cell: point indices by cell, where each cell starts, and the grid's origin and cell size."""
    origin, size = np.empty(2), np.empty(2)
    for axis in range(2):
        low, high = _extent(points, axis, np.arange(len(points)), 0, len(points))
        origin[axis], size[axis] = low, max(radius, (np.float64(high) - low) / GRID_SIZE)
    cells = np.empty(len(points), np.int64)
    starts = np.zeros(GRID_SIZE * GRID_SIZE + 1, np.int64)
    for i in range(len(points)):
        cell_x, cell_y = _cell(points[i, 0], origin[0], size[0]), _cell(points[i, 1], origin[1], size[1])
        cells[i] = cell_x * GRID_SIZE + cell_y
        starts[cells[i] + 1] += 1
    starts = np.cumsum(starts)
    order, free = np.empty(len(points), np.int64), starts.copy()
    for i in range(len(points)):
        order[free[cells[i]]] = i
        free[cells[i]] += 1
    return order, starts, origin, size


@jit()
def _cell(value, origin, size):
    cell = (value - origin) / size
    if not cell > 0:  # also where it is not a number
        return 0
    return int(min(cell, GRID_SIZE - 1.0))


@jit()
def _gather_max(rows, index, offsets, maximum, argument, first, last):
    for g in range(first, last):
        best, best_row = maximum[g], argument[g]
        best[:] = rows[index[offsets[g]]]
        best_row[:] = index[offsets[g]]
        for e in range(offsets[g] + 1, offsets[g + 1]):
            row, values = np.int32(index[e]), rows[index[e]]
            for c in range(len(best)):  # two selections instead of a branch, so that it runs in vector lanes
                better = values[c] > best[c]
                best[c] = values[c] if better else best[c]
                best_row[c] = row if better else best_row[c]


@jit()
def _scatter_add(gradient, argument, rows_gradient, first, last):
    for g in range(len(gradient)):
        for c in range(first, last):
            rows_gradient[argument[g, c], c] += gradient[g, c]
