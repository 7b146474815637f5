"""PointNet++ with multi-scale set abstraction (Qi et al., 2017; levels and samplers as in 3DSSD, Yang et al., 2020).

PointNet++ groups first and computes after: 4096 groups of 128 neighbours run 524,288 rows through the MLPs for
a cloud of 16,384 points. The same function is computed here for a fraction of that:

* without `use_xyz` a grouped row is a copy of its point's features, and a pointwise MLP commutes with copying,
  so the MLP runs once per point; batch-norm statistics over the copies are statistics over points weighted by
  how often each occurs; the groups are formed only inside the max pooling;
* with `use_xyz` the first layer is linear in [offset from the centre, features], so its wide part runs once per
  point; what follows runs once per distinct (group, neighbour) pair, weighted by its repetitions, instead of
  once per slot of a group.

Both equal the grouped definition up to rounding, in forward, backward and running statistics.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_simipu import SimIPUPointNet2Config
from .layers import LinearBlock, run_blocks
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
        self.use_xyz = config.use_xyz
        self.sampling_backend = config.sampling_backend
        # quickfps takes coordinates alone
        self.feature_sampling_backend = "auto" if config.sampling_backend == "quickfps" else config.sampling_backend
        self.grouping_backend = config.grouping_backend
        # Triton has the query alone
        self.pooling_backend = "auto" if config.grouping_backend == "triton" else config.grouping_backend
        outer = list(config.radii[level])
        inner = [0.0, *outer[:-1]] if config.dilated_group else [0.0] * len(outer)
        self.radii = list(zip(inner, outer, strict=True))

        first = in_channels + 3 if config.use_xyz else in_channels
        self.mlps = nn.ModuleList(
            nn.ModuleList(
                LinearBlock(a, b, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)
                for a, b in zip([first, *widths[:-1]], widths, strict=True)
            )
            for widths in config.mlp_channels[level]
        )
        pooled = sum(widths[-1] for widths in config.mlp_channels[level])
        self.aggregation = LinearBlock(pooled, config.aggregation_channels[level])

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
        centers = gather_rows(coordinates, indices)
        groups = ball_query(coordinates, centers, self.radii, self.num_samples, backend=self.grouping_backend)
        rows = features.flatten(0, 1)
        scale = self._grouped_scale if self.use_xyz else self._pointwise_scale
        pooled = [
            scale(blocks, neighbors, rows, coordinates.flatten(0, 1), centers.flatten(0, 1))
            for blocks, neighbors in zip(self.mlps, groups, strict=True)
        ]
        summary = self.aggregation(torch.cat(pooled, dim=1))
        return centers, summary.unflatten(0, indices.shape), indices

    @torch.no_grad()
    def draw_centers(self, coordinates: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Rows `(B, M)` of the centres, each sampler seeing its own range of the cloud."""
        drawn, start = [], 0
        for num_points, mod, sample_range in zip(self.num_points, self.fps_mods, self.fps_sample_ranges, strict=True):
            stop = coordinates.shape[1] if sample_range == -1 else start + sample_range
            indices = self._sample(mod, coordinates[:, start:stop], features[:, start:stop], num_points)
            drawn.append(indices + start)
            start = stop
        return torch.cat(drawn, dim=1)

    def _sample(self, mod: str, coordinates: torch.Tensor, features: torch.Tensor, num_points: int) -> torch.Tensor:
        if num_points > coordinates.shape[1]:
            raise ValueError(
                f"{mod} has to draw {num_points} points from {coordinates.shape[1]}: give the encoder larger clouds "
                "(num_points of the processor) or lower point_config.num_points"
            )
        samples = []
        if mod in ("F-FPS", "FS"):
            joint = torch.cat([coordinates, features.to(coordinates.dtype)], dim=-1)
            samples.append(furthest_point_sample_features(joint, num_points, self.feature_sampling_backend))
        if mod in ("D-FPS", "FS"):
            samples.append(furthest_point_sample(coordinates, num_points, self.sampling_backend))
        return torch.cat(samples, dim=1)

    def _pointwise_scale(
        self, blocks: Sequence[LinearBlock], neighbors: Neighbors, rows: torch.Tensor, *_: torch.Tensor
    ) -> torch.Tensor:
        """The MLP per point `(B*N, C)`, each counting as often as it occurs in the groups; pooled `(B*M, C')`."""
        occurrences = neighbors.weight.new_zeros(rows.shape[0]).index_add_(0, neighbors.index, neighbors.weight)
        return group_max(run_blocks(blocks, rows, occurrences), neighbors, backend=self.pooling_backend)

    def _grouped_scale(
        self,
        blocks: Sequence[LinearBlock],
        neighbors: Neighbors,
        rows: torch.Tensor,
        coordinates: torch.Tensor,
        centers: torch.Tensor,
    ) -> torch.Tensor:
        """The MLP per (group, neighbour) pair, but for the wide part of its first layer, which is per point."""
        index, weight, offsets = neighbors
        group = torch.arange(len(centers), device=index.device).repeat_interleave(
            offsets.diff(), output_size=len(index)
        )
        first = blocks[0]
        xyz_weight, feature_weight = first.linear.weight.split([3, rows.shape[1]], dim=1)
        per_point = F.linear(rows, feature_weight, first.linear.bias)
        # the offset is taken before any low-precision arithmetic: coordinates are large, offsets are small
        offset = (coordinates[index] - centers[group]).to(per_point.dtype)
        pairs = first.normalize(per_point[index] + F.linear(offset, xyz_weight), weight)
        pairs = run_blocks(blocks[1:], pairs, weight)
        in_order = Neighbors(torch.arange(len(index), device=index.device), weight, offsets)
        return group_max(pairs, in_order, backend=self.pooling_backend)


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
        """Encodes clouds.

        Args:
            points: `(B, N, 4)`, x y z in metres and reflectance.
        """
        coordinates, features = points[..., :3], points[..., 3:]
        features = features.to(self.levels[0].aggregation.linear.weight.dtype)
        indices = None
        for level in self.levels:
            coordinates, features, drawn = level(coordinates, features)
            indices = drawn if indices is None else indices.gather(1, drawn)
        return PointEncoderOutput(coordinates=coordinates, features=features, indices=indices)


def gather_rows(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows `indices` `(B, M)` of each item of `tensor` `(B, N, C)`: `(B, M, C)`."""
    return tensor.gather(1, indices.unsqueeze(-1).expand(-1, -1, tensor.shape[-1]))
