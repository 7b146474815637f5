"""Point operations on CUDA, written in Triton. Same functions as their definitions in `point_ops`.

Inputs are contiguous float32 tensors. Nothing here waits for the device. Products and sums are not fused
(`enable_fp_fusion=False`), so that coordinates round as in the definition. Triton launches on the current device,
so each launch makes the tensors' own the current one.
"""

# ruff: noqa: N803 (capital letters for compile-time constants)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except Exception:
    triton = None


def furthest_point_sample(points: Tensor, num_samples: int) -> Tensor:
    """(B, N, 3) -> (B, M) int64, one program per cloud."""
    axes = points.transpose(1, 2).contiguous()  # (B, 3, N)
    return _sample(axes, num_samples, _sample_coordinates)


def furthest_point_sample_features(features: Tensor, num_samples: int) -> Tensor:
    """(B, N, C) -> (B, M) int64, through the full (B, N, N) matrix of squared distances.

    The matrix is formed in full float32, whatever PyTorch's setting for TF32: coordinates of tens of metres leave
    a² + b² - 2ab no bits to spare.
    """
    batch, n, channels = features.shape
    norms = features.square().sum(-1)
    squared = features.new_empty(batch, n, n)
    tile = 64
    grid = (batch, triton.cdiv(n, tile), triton.cdiv(n, tile))
    with torch.cuda.device_of(features):
        _pairwise[grid](features, norms, squared, n, channels, TILE=tile, CHANNELS=32, enable_fp_fusion=False)
    return _sample(squared, num_samples, _sample_distances)


def _sample(source: Tensor, num_samples: int, kernel: Any) -> Tensor:
    batch, _, n = source.shape
    samples = torch.zeros(batch, num_samples, dtype=torch.int64, device=source.device)
    nearest = torch.full((batch, n), 1e10, dtype=source.dtype, device=source.device)
    block = min(triton.next_power_of_2(n), 8192)
    options = {"BLOCK": block, "num_warps": max(1, min(32, block // 256)), "enable_fp_fusion": False}
    with torch.cuda.device_of(source):
        kernel[(batch,)](source, nearest, samples, n, num_samples, **options)
    return samples


def ball_query_padded(
    points: Tensor, centers: Tensor, radii_squared: Sequence[tuple[float, float]], num_samples: Sequence[int]
) -> list[Tensor]:
    """(B, N, 3), (B, M, 3) -> per ring (B, M, K) int64; one launch, a program for some centres of one ring."""
    batch, m, _ = centers.shape
    groups = batch * m
    out = torch.empty(groups * sum(num_samples), dtype=torch.int64, device=points.device)
    tile = 16
    with torch.cuda.device_of(points):
        _query[(batch, triton.cdiv(m, tile), len(num_samples))](
            points.transpose(1, 2).contiguous(),
            centers,
            out,
            points.shape[1],
            m,
            groups,
            LOW=tuple(low for low, _ in radii_squared),
            HIGH=tuple(high for _, high in radii_squared),
            SLOTS=tuple(num_samples),
            MAX_SLOTS=triton.next_power_of_2(max(num_samples)),
            CENTERS=tile,
            POINTS=128,
            enable_fp_fusion=False,
        )
    return [
        ring.view(batch, m, k)
        for ring, k in zip(out.split([groups * k for k in num_samples]), num_samples, strict=True)
    ]


if triton is not None:

    @triton.jit
    def _sample_coordinates(axes, nearest, samples, n, num_samples, BLOCK: tl.constexpr):
        cloud = tl.program_id(0).to(tl.int64)
        axes += cloud * 3 * n
        nearest += cloud * n
        samples += cloud * num_samples
        last = 0
        for m in range(1, num_samples):
            px, py, pz = tl.load(axes + last), tl.load(axes + n + last), tl.load(axes + 2 * n + last)
            best = -float("inf")
            for start in range(0, n, BLOCK):
                i = start + tl.arange(0, BLOCK)
                inside = i < n
                dx = tl.load(axes + i, mask=inside) - px
                dy = tl.load(axes + n + i, mask=inside) - py
                dz = tl.load(axes + 2 * n + i, mask=inside) - pz
                best, last = _keep_nearest(dx * dx + dy * dy + dz * dz, nearest + i, inside, start, best, last)
            tl.store(samples + m, last.to(tl.int64))  # type: ignore[attr-defined]  # a tensor here

    @triton.jit
    def _sample_distances(squared, nearest, samples, n, num_samples, BLOCK: tl.constexpr):
        cloud = tl.program_id(0).to(tl.int64)
        squared += cloud * n * n
        nearest += cloud * n
        samples += cloud * num_samples
        last = 0
        for m in range(1, num_samples):
            row = squared + last.to(tl.int64) * n  # type: ignore[attr-defined]  # a tensor here
            best = -float("inf")
            for start in range(0, n, BLOCK):
                i = start + tl.arange(0, BLOCK)
                inside = i < n
                best, last = _keep_nearest(tl.load(row + i, mask=inside), nearest + i, inside, start, best, last)
            tl.store(samples + m, last.to(tl.int64))  # type: ignore[attr-defined]  # a tensor here

    @triton.jit
    def _keep_nearest(distance, nearest, inside, start, best, last):
        """Update the distances to the nearest sample; the largest so far and its lowest index."""
        distance = tl.minimum(distance, tl.load(nearest, mask=inside))
        tl.store(nearest, distance, mask=inside)
        value, index = tl.max(tl.where(inside, distance, -float("inf")), 0, return_indices=True)
        return tl.maximum(best, value), tl.where(value > best, start + index, last)

    @triton.jit
    def _pairwise(features, norms, squared, n, channels, TILE: tl.constexpr, CHANNELS: tl.constexpr):
        cloud = tl.program_id(0).to(tl.int64)
        features += cloud * n * channels
        norms += cloud * n
        squared += cloud * n * n
        i = tl.program_id(1) * TILE + tl.arange(0, TILE)
        j = tl.program_id(2) * TILE + tl.arange(0, TILE)
        product = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, channels, CHANNELS):
            c = start + tl.arange(0, CHANNELS)
            a = tl.load(features + i[:, None] * channels + c, mask=(i[:, None] < n) & (c < channels), other=0.0)
            b = tl.load(features + j * channels + c[:, None], mask=(j < n) & (c[:, None] < channels), other=0.0)
            product += tl.dot(a, b, input_precision="ieee")
        norm_i = tl.load(norms + i, mask=i < n)[:, None]
        norm_j = tl.load(norms + j, mask=j < n)[None, :]
        inside = (i[:, None] < n) & (j < n)
        tl.store(squared + i[:, None].to(tl.int64) * n + j, norm_i + norm_j - 2 * product, mask=inside)

    @triton.jit
    def _query(
        axes,
        centers,
        out,
        n,
        m,
        groups,
        LOW: tl.constexpr,
        HIGH: tl.constexpr,
        SLOTS: tl.constexpr,
        MAX_SLOTS: tl.constexpr,
        CENTERS: tl.constexpr,
        POINTS: tl.constexpr,
    ):
        cloud = tl.program_id(0).to(tl.int64)
        low, high, slots = 0.0, 0.0, 0
        for s in tl.static_range(len(SLOTS)):
            if tl.program_id(2) == s:
                low, high, slots = LOW[s], HIGH[s], SLOTS[s]
            if tl.program_id(2) > s:
                out += SLOTS[s] * groups

        c = tl.program_id(1) * CENTERS + tl.arange(0, CENTERS)
        c = tl.minimum(c, m - 1)  # the last program repeats the last centre
        centers += (cloud * m + c) * 3
        cx, cy, cz = tl.load(centers)[:, None], tl.load(centers + 1)[:, None], tl.load(centers + 2)[:, None]
        axes += cloud * 3 * n
        members = out + (cloud * m + c)[:, None] * slots
        found = tl.zeros((CENTERS,), tl.int32)
        first = tl.full((CENTERS,), n, tl.int32)
        start = 0
        while (start < n) & (tl.min(found) < slots):
            i = (start + tl.arange(0, POINTS))[None, :]
            dx = cx - tl.load(axes + i, mask=i < n, other=float("nan"))
            dy = cy - tl.load(axes + n + i, mask=i < n, other=float("nan"))
            dz = cz - tl.load(axes + 2 * n + i, mask=i < n, other=float("nan"))
            squared = dx * dx + dy * dy + dz * dz
            hit = ((squared >= low) & (squared < high)) | (squared == 0)
            slot = found[:, None] + tl.cumsum(hit.to(tl.int32), 1) - 1
            tl.store(members + slot, i.to(tl.int64), mask=hit & (slot < slots))
            found += tl.sum(hit.to(tl.int32), 1)
            first = tl.minimum(first, tl.min(tl.where(hit, i, n), 1))
            start += POINTS
        first = tl.where(first < n, first, 0)
        k = tl.arange(0, MAX_SLOTS)[None, :]
        free = (k >= found[:, None]) & (k < slots)
        tl.store(members + k, (first[:, None] + tl.zeros_like(k)).to(tl.int64), mask=free)
