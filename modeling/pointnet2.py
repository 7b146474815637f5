"""PointNet++ with multi-scale set abstraction (Qi et al., 2017; levels and samplers as in 3DSSD, Yang et al., 2020).

PointNet++ groups first and computes after: 4096 groups of 128 neighbours run 524,288 rows through the MLPs for
a cloud of 16,384 points. The same function is computed here for a fraction of that:

* without `use_xyz` a grouped row is a copy of its point's features, and a pointwise MLP commutes with copying,
  so the MLP runs once per point; batch-norm statistics over the copies are statistics over points weighted by
  how often each occurs; the groups are formed only inside the max pooling;
* with `use_xyz` in the last layer all others run per point as before; the last one is linear in [offset from the
  centre, features], its batch norm is an affine map whose moments follow from those of points and offsets, and
  what depends on the centre alone can be taken out of the maximum;
* with `use_xyz` in the first layer its wide part runs once per point; what follows runs once per distinct
  (centre, neighbour) pair, weighted by its repetitions, instead of once per slot of a group.

All equal the grouped definition up to rounding, in forward, backward and running statistics.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_simipu import SimIPUPointNet2Config
from .layers import LinearBlock, linear, run_blocks
from .outputs_simipu import PointEncoderOutput
from .point_ops import (
    Neighbors,
    ball_query,
    furthest_point_sample,
    furthest_point_sample_features,
    group_max,
)


class SetAbstraction(nn.Module):
    """One level: draw centres, group their neighbours at several radii, and summarise each group.

    Args:
        config: the encoder's configuration.
        level: which entry of the configuration's lists this is.
        in_channels: width of the incoming features.
    """

    def __init__(self, config: SimIPUPointNet2Config, level: int, in_channels: int) -> None:
        super().__init__()
        self.num_points = config.num_points[level]
        self.fps_mods = config.fps_mods[level]
        self.fps_sample_ranges = config.fps_sample_ranges[level]
        self.num_samples = config.num_samples[level]
        self.xyz_layer = config.xyz_layer if config.use_xyz else None
        self.sampling_backend = config.sampling_backend
        self.grouping_backend = config.grouping_backend
        # Triton has the query alone
        self.pooling_backend = "auto" if config.grouping_backend == "triton" else config.grouping_backend
        outer = list(config.radii[level])
        inner = [0.0, *outer[:-1]] if config.dilated_group else [0.0] * len(outer)
        self.radii = list(zip(inner, outer, strict=True))

        self.mlps = nn.ModuleList(
            self._build_mlp(config, in_channels, widths) for widths in config.mlp_channels[level]
        )
        pooled = sum(widths[-1] for widths in config.mlp_channels[level])
        self.aggregation = LinearBlock(pooled, config.aggregation_channels[level])

    @staticmethod
    def _build_mlp(config: SimIPUPointNet2Config, in_channels: int, widths: Sequence[int]) -> nn.ModuleList:
        inputs = [in_channels, *widths[:-1]]
        if config.use_xyz:
            inputs[0 if config.xyz_layer == "first" else -1] += 3
        return nn.ModuleList(
            LinearBlock(a, b, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)
            for a, b in zip(inputs, widths, strict=True)
        )

    def forward(
        self, coordinates: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Summarises a cloud.

        Args:
            coordinates: `(B, N, 3)`, metres.
            features: `(B, N, C)`.

        Returns:
            Centres `(B, M, 3)`, their features `(B, M, C_out)` and their rows in the cloud `(B, M)`.
        """
        indices = self.draw_centers(coordinates, features)
        centers = coordinates.take_along_dim(indices[..., None], 1)
        groups = ball_query(coordinates, centers, self.radii, self.num_samples, backend=self.grouping_backend)
        rows = features.flatten(0, 1)
        scale: Callable[..., torch.Tensor] = self._scale_without_xyz
        if self.xyz_layer is not None:
            scale = self._scale_xyz_last if self.xyz_layer == "last" else self._scale_xyz_first
        pooled = [
            scale(blocks, neighbors, rows, coordinates.flatten(0, 1), centers.flatten(0, 1))
            for blocks, neighbors in zip(self.mlps, groups, strict=True)
        ]
        summary = self.aggregation(torch.cat(pooled, dim=1))
        return centers, summary.unflatten(0, indices.shape), indices

    @torch.no_grad()
    def draw_centers(self, coordinates: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Rows `(B, M)` of the centres, each sampler seeing its own range of the cloud."""
        drawn = [
            start + sample(values, count, self.sampling_backend)
            for sample, values, count, start in self.samplers(coordinates, features)
        ]
        return torch.cat(drawn, dim=1)

    def samplers(
        self, coordinates: torch.Tensor, features: torch.Tensor
    ) -> Iterator[tuple[Callable[..., torch.Tensor], torch.Tensor, int, int]]:
        """Each sampler, the values `(B, n, C)` that it sees, how many points it draws, and the row of its first."""
        start = 0
        for num_points, mod, sample_range in zip(self.num_points, self.fps_mods, self.fps_sample_ranges, strict=True):
            stop = coordinates.shape[1] if sample_range == -1 else start + sample_range
            xyz = coordinates[:, start:stop]
            if num_points > xyz.shape[1]:
                raise ValueError(
                    f"{mod} has to draw {num_points} points from {xyz.shape[1]}: give the encoder larger clouds "
                    "(num_points of the processor) or lower point_config.num_points and fps_sample_ranges"
                )
            if mod in ("F-FPS", "FS"):
                joint = torch.cat([xyz, features[:, start:stop].to(xyz.dtype)], dim=-1)
                yield furthest_point_sample_features, joint, num_points, start
            if mod in ("D-FPS", "FS"):
                yield furthest_point_sample, xyz, num_points, start
            start = stop

    def _scale_without_xyz(
        self, blocks: Iterable[LinearBlock], neighbors: Neighbors, rows: torch.Tensor, *_: torch.Tensor
    ) -> torch.Tensor:
        """The MLP per point `(B*N, C)`, each counting as often as it occurs in the groups; pooled `(B*M, C')`."""
        return group_max(run_blocks(blocks, rows, _occurrences(neighbors, rows)), neighbors, self.pooling_backend)

    def _scale_xyz_last(
        self,
        blocks: Iterable[LinearBlock],
        neighbors: Neighbors,
        rows: torch.Tensor,
        coordinates: torch.Tensor,
        centers: torch.Tensor,
    ) -> torch.Tensor:
        """The MLP per point, whose last layer sees u_j + W (x_j - c_i) for neighbour j of centre i.

        Batch norm makes it s * (u_j + W x_j) - s * W c_i + t. Of its first part u_j + W x_j is pooled per group, which
        is fewer rows to scale, with the signs of channels turned whose s is negative: there the least one counts.
        """
        *earlier, last = blocks
        occurrences = _occurrences(neighbors, rows)
        rows = run_blocks(earlier, rows, occurrences)
        # coordinates are large and offsets small: a model in half precision still needs their digits
        dtype = torch.promote_types(rows.dtype, torch.float32)
        coordinates, centers = coordinates.to(dtype), centers.to(dtype)
        sign = torch.where(last.norm.weight < 0, -1.0, 1.0).to(dtype)
        xyz_weight, feature_weight = (last.linear.weight * sign[:, None]).to(dtype).split([3, rows.shape[1]], dim=1)
        per_point = linear(rows.to(dtype), feature_weight, last.linear.bias.to(dtype) * sign)
        if last.norm.training:
            offset = coordinates[neighbors.index] - centers[_group_of_entry(neighbors)]
            counts = occurrences.to(dtype)
            mean, *moments = _pair_moments(per_point, offset, xyz_weight, neighbors, counts, last.norm.reduce)
            scale, shift = last.norm.affine_map(mean * sign, *moments)
        else:
            scale, shift = last.norm.running_affine_map()
        point_part = torch.addmm(per_point, coordinates, xyz_weight.T)
        pooled = group_max(point_part, neighbors, self.pooling_backend).addmm(centers, xyz_weight.T, alpha=-1)
        return F.relu(torch.addcmul(shift, pooled, scale * sign)).to(rows.dtype)

    def _scale_xyz_first(
        self,
        blocks: Iterable[LinearBlock],
        neighbors: Neighbors,
        rows: torch.Tensor,
        coordinates: torch.Tensor,
        centers: torch.Tensor,
    ) -> torch.Tensor:
        """The MLP per (group, neighbour) pair, but for the wide part of its first layer, which is per point."""
        index, weight, offsets = neighbors
        first, *later = blocks
        xyz_weight, feature_weight = first.linear.weight.split([3, rows.shape[1]], dim=1)
        per_point = linear(rows, feature_weight, first.linear.bias)
        # the offset is taken before any low-precision arithmetic: coordinates are large, offsets are small
        offset = (coordinates[index] - centers[_group_of_entry(neighbors)]).to(per_point.dtype)
        pairs = first.normalize(per_point[index] + F.linear(offset, xyz_weight), weight)
        pairs = run_blocks(later, pairs, weight)
        in_order = Neighbors(torch.arange(len(index), device=index.device), weight, offsets)
        return group_max(pairs, in_order, self.pooling_backend)


def _occurrences(neighbors: Neighbors, rows: torch.Tensor) -> torch.Tensor:
    """`(R,)`, how many slots of all groups hold each row."""
    return neighbors.weight.new_zeros(rows.shape[0]).index_add_(0, neighbors.index, neighbors.weight)


def _group_of_entry(neighbors: Neighbors) -> torch.Tensor:
    """`(E,)` int64, the group that each entry belongs to."""
    groups = torch.arange(len(neighbors.offsets) - 1, device=neighbors.offsets.device)
    return groups.repeat_interleave(neighbors.offsets.diff(), output_size=len(neighbors.index))


def _pair_moments(
    per_point: torch.Tensor,
    offset: torch.Tensor,
    xyz_weight: torch.Tensor,
    neighbors: Neighbors,
    occurrences: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean `(C,)`, biased variance `(C,)` and number of u_j + W d_e over all slots, without forming them.

    With everything centred, Var(u + W d) = Var(u) + W Cov(d) Wᵀ + 2 W Cov(d, u), and the sums over slots that
    hold point j need only the sum of its offsets. `per_point` `(R, C)` is u, `offset` `(E, 3)` d, `xyz_weight`
    `(C, 3)` W, and `occurrences` `(R,)` are slots per point; `reduce` sums over the processes that share statistics.
    """
    slots = neighbors.weight.to(offset)
    count = reduce(slots.sum())
    mean_d = reduce(slots @ offset) / count
    d = offset - mean_d
    weighted = d * slots[:, None]
    offset_sum = d.new_zeros(len(per_point), 3).index_add_(0, neighbors.index, weighted)
    covariance_d = reduce(weighted.T @ d)
    mean_u, variance_u, covariance_du = _PointMoments.apply(per_point, occurrences, offset_sum, count, reduce)
    variance_wd = ((xyz_weight @ covariance_d) * xyz_weight).sum(1)
    variance = (variance_u + variance_wd + 2 * (xyz_weight * covariance_du.T).sum(1)) / count
    return mean_u + xyz_weight @ mean_d, variance.clamp(min=0), count


class _PointMoments(torch.autograd.Function):
    """Mean (C,) of rows (R, C), each counted `weight[r]` times, and sums over all rows of the squares (C,) and of the
    products with `offset_sum` (3, C) of what they differ from it; keeps its input alone for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        offset_sum: torch.Tensor,
        count: torch.Tensor,
        reduce: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean = reduce(weight @ rows) / count
        centered = rows - mean
        products = offset_sum.T @ centered
        sums = reduce(torch.vstack([weight @ centered.square_(), products]))
        ctx.save_for_backward(rows, weight, offset_sum, count, mean)
        ctx.reduce = reduce
        return mean, sums[0], sums[1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_mean: torch.Tensor, grad_squares: torch.Tensor, grad_products: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        rows, weight, offset_sum, count, mean = ctx.saved_tensors
        grads = ctx.reduce(torch.vstack([grad_mean / count, 2 * grad_squares, grad_products]))
        centered = rows - mean
        grad_offsets = centered @ grads[2:].T if ctx.needs_input_grad[2] else None
        grad = torch.addcmul(grads[0], centered, grads[1]).mul_(weight[:, None])
        return grad.addmm_(offset_sum, grads[2:]), None, grad_offsets, None, None


class PointNet2Encoder(nn.Module):
    """Points `(B, N, 4)` -> M points with `config.output_channels` features each.

    The first level sees reflectance alone (and, with `use_xyz`, offsets from the group's centre).
    """

    def __init__(self, config: SimIPUPointNet2Config) -> None:
        super().__init__()
        self.config = config
        in_channels = [1, *config.aggregation_channels[:-1]]
        self.levels = nn.ModuleList(
            SetAbstraction(config, level, channels) for level, channels in enumerate(in_channels)
        )

    def forward(self, points: torch.Tensor) -> PointEncoderOutput:
        """Encodes clouds, outside autocast: which points are drawn must not depend on the precision of the features.

        Args:
            points: `(B, N, 4)`, x y z in metres and reflectance.

        Raises:
            ValueError: another shape.
        """
        if points.ndim != 3 or points.shape[-1] != 4:
            raise ValueError(f"points must be (B, N, 4), found {tuple(points.shape)}")
        coordinates, features = points[..., :3], points[..., 3:]
        features = features.to(cast("SetAbstraction", self.levels[0]).aggregation.linear.weight.dtype)
        indices = None
        with torch.autocast(points.device.type, enabled=False):
            for level in self.levels:
                coordinates, features, drawn = level(coordinates, features)
                indices = drawn if indices is None else indices.gather(1, drawn)
        mask = torch.ones(coordinates.shape[:2], dtype=torch.bool, device=coordinates.device)
        return PointEncoderOutput(coordinates=coordinates, features=features, indices=indices, mask=mask)
