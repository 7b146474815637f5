"""PointNet++ as the textbook has it: group first, compute after. For comparison only.

This is the definition that `simipu_hf.modeling.pointnet2` computes for a fraction of the cost: every neighbour of
every centre is copied into a tensor (B, C, M, K), which runs through the MLPs and is then pooled over K.
"""

import torch
import torch.nn.functional as F
from torch import nn

from simipu_hf.modeling.layers import LinearBlock
from simipu_hf.modeling.outputs_simipu import PointEncoderOutput
from simipu_hf.modeling.point_ops import ball_query_padded, furthest_point_sample, furthest_point_sample_features
from simipu_hf.modeling.pointnet2 import PointNet2Encoder, SetAbstraction


class GroupedPointNet2(nn.Module):
    """Runs the weights of a `PointNet2Encoder` the grouped way, with plain PyTorch index operations.

    Weights, gradients and running statistics are the encoder's own: compare on a copy of it.

    Source: official `PointNet2SAMSG`, `BasePointSAModule` and `QueryAndGroup` of mmdetection3d.
    """

    def __init__(self, encoder: PointNet2Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, points: torch.Tensor) -> PointEncoderOutput:
        """Encodes clouds `(B, N, 4)`, x y z in metres and reflectance."""
        coordinates, features = points[..., :3], points[..., 3:].transpose(1, 2)
        indices = None
        for level in self.encoder.levels:
            assert isinstance(level, SetAbstraction)
            drawn = draw_centers(level, coordinates, features)
            centers = coordinates.take_along_dim(drawn[..., None], 1)
            features = summarize_groups(level, coordinates, features, centers)
            coordinates = centers
            indices = drawn if indices is None else indices.gather(1, drawn)
        return PointEncoderOutput(coordinates=coordinates, features=features.transpose(1, 2), indices=indices)


@torch.no_grad()
def draw_centers(level: SetAbstraction, coordinates: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Rows `(B, M)` of the centres that the samplers of a level draw from `(B, N, 3)` and `(B, C, N)`."""
    drawn, start = [], 0
    for num_points, mod, sample_range in zip(level.num_points, level.fps_mods, level.fps_sample_ranges, strict=True):
        stop = coordinates.shape[1] if sample_range == -1 else start + sample_range
        xyz = coordinates[:, start:stop]
        if mod in ("F-FPS", "FS"):
            joint = torch.cat([xyz, features[..., start:stop].transpose(1, 2).to(xyz.dtype)], dim=2)
            drawn.append(start + furthest_point_sample_features(joint, num_points, backend="torch"))
        if mod in ("D-FPS", "FS"):
            drawn.append(start + furthest_point_sample(xyz, num_points, backend="torch"))
        start = stop
    return torch.cat(drawn, dim=1)


def summarize_groups(
    level: SetAbstraction, coordinates: torch.Tensor, features: torch.Tensor, centers: torch.Tensor
) -> torch.Tensor:
    """Features `(B, C_out, M)` of the groups around centres `(B, M, 3)`, from `(B, N, 3)` and `(B, C, N)`."""
    pooled = []
    for blocks, index in zip(
        level.mlps, ball_query_padded(coordinates, centers, level.radii, level.num_samples), strict=True
    ):
        assert isinstance(blocks, nn.ModuleList)
        grouped = group(features, index)
        offset = (group(coordinates.transpose(1, 2), index) - centers.transpose(1, 2)[..., None]).to(grouped.dtype)
        sees_offset = {None: None, "first": 0, "last": len(blocks) - 1}[level.xyz_layer]
        for layer, block in enumerate(blocks):
            if layer == sees_offset:
                grouped = torch.cat([offset, grouped], dim=1)
            assert isinstance(block, LinearBlock)
            grouped = run_block(block, grouped)
        pooled.append(F.max_pool2d(grouped, (1, grouped.shape[3])))
    return run_block(level.aggregation, torch.cat(pooled, dim=1)).squeeze(3)


def group(features: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Copies `(B, C, N)` to `(B, C, M, K)` by rows `index` `(B, M, K)`."""
    copies = index.flatten(1).unsqueeze(1).expand(-1, features.shape[1], -1)
    return features.gather(2, copies).unflatten(2, index.shape[1:])


def run_block(block: LinearBlock, grouped: torch.Tensor) -> torch.Tensor:
    """1 x 1 convolution, batch norm and ReLU on `(B, C, M, K)`."""
    linear, norm = block.linear, block.norm
    grouped = F.conv2d(grouped, linear.weight[:, :, None, None], linear.bias)
    if norm.training:
        norm.num_batches_tracked += 1
    state = norm.running_mean, norm.running_var, norm.weight, norm.bias
    grouped = F.batch_norm(grouped, *state, norm.training, norm.momentum, norm.eps)
    return F.relu(grouped, inplace=True)
