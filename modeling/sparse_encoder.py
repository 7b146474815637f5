"""SECOND-style sparse convolution encoder: voxels of the cloud in, the occupied sites of the last stage out.

Needs spconv, an optional package. Letters in shapes: B clouds of N points, M slots per cloud; of all clouds
together, P points inside the range, S cells that hold some. A cell is (cloud, z, y, x), spconv's order.

Source: SECOND (Yan et al., Sensors 2018); the residual blocks are CenterPoint's (Yin et al., CVPR 2021).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .layers import WeightedBatchNorm
from .outputs_simipu import PointEncoderOutput
from .point_ops import furthest_point_sample

try:
    import spconv.pytorch as spconv
except Exception:
    spconv = None


class SparseConvEncoder(nn.Module):
    """Voxelises a cloud, convolves it sparsely, and returns at most M of the sites that hold points.

    A voxel carries the mean x, y, z (scaled so that the range spans -1 to 1) and reflectance of its points. The
    first stage is submanifold; every later one begins with a convolution of stride 2. Strided convolutions also
    activate sites without points; these take part in later convolutions but are not returned, so that every
    returned position lies on a measured surface.

    Where a cloud has more than M such sites, furthest point sampling chooses among them: it is deterministic and
    covers near and far alike, so that two views of one scene keep sites close to each other.

    spconv has no bfloat16 on the CPU and would compute in float16 under any CUDA autocast, so the convolutions
    run in at least float32, outside autocast. The projection follows autocast.

    Args:
        config: a `SimIPUSparseConvConfig`.

    Raises:
        ImportError: spconv is not installed.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        if spconv is None:
            raise ImportError('point_encoder="sparse_conv" needs spconv: pip install "simipu-hf[spconv]"')
        if not torch.cuda.is_available():
            # its backward on the CPU asks for the current CUDA stream, which it does not use, and which raises here
            spconv.ops.get_current_stream = lambda: 0
        self.num_output_points = config.num_output_points
        # minimum, maximum and voxel size of x, y, z: plain numbers, because building a tensor of them on a GPU would
        # wait for it, and because a buffer would not survive construction on the meta device
        self.axes = tuple(
            zip(config.point_cloud_range[:3], config.point_cloud_range[3:], config.voxel_size, strict=True)
        )
        self.stride = 2 ** (len(config.channels) - 1)
        self.stages = nn.Sequential(*_stages(config))
        self.projection = nn.Linear(config.channels[-1], config.output_channels)

    def forward(self, points: Tensor) -> PointEncoderOutput:
        """Encodes a batch of clouds.

        Args:
            points: (B, N, 4), x y z in metres, reflectance. Points outside `point_cloud_range` are dropped.

        Returns:
            `PointEncoderOutput`: `coordinates` (B, M, 3), the mean of the raw points in each site, metres, in the
            cloud's frame; `features` (B, M, output_channels); `mask` (B, M), false (and the other two zero) in
            the slots that a cloud has no site for, which come last; `indices` is `None`.

        Raises:
            ValueError: wrong shape, a cloud without a point in range, or a batch too large for spconv on the CPU.
        """
        if points.ndim != 3 or points.shape[-1] != 4:
            raise ValueError(f"points must be (B, N, 4), found {tuple(points.shape)}")
        grid = self._grid(points)
        with torch.autocast(points.device.type, enabled=False):
            points, cells = self._points_in_range(points, grid)
            voxels = _mean_per_cell(points, cells, grid)
            output = self.stages(
                spconv.SparseConvTensor(self._scale(voxels.mean), voxels.cells.int(), grid[1:], grid[0])
            )
            cells = torch.cat([cells[:, :1], cells[:, 1:] // self.stride], dim=1)
            sites = _mean_per_cell(points, cells, (grid[0], *output.spatial_shape))
            features = output.features[_find_cells(sites, output.indices)]
            slots, mask = _choose_sites(sites, self.num_output_points)
        unused = ~mask[..., None]
        return PointEncoderOutput(
            coordinates=sites.mean[slots, :3].masked_fill(unused, 0),
            features=self.projection(features[slots]).masked_fill(unused, 0),
            mask=mask,
        )

    def _grid(self, points: Tensor) -> tuple[int, int, int, int]:
        """Shape (B, Z, Y, X) of the voxel grid of a batch."""
        # the small term keeps rounding, as of 144 / 0.1, from adding an empty layer
        sizes = [math.ceil((high - low) / size - 1e-6) for low, high, size in self.axes]
        grid = (len(points), *reversed(sizes))
        if points.device.type == "cpu" and math.prod(grid) > 2**32:
            raise ValueError(
                f"{grid[0]} clouds of {sizes[0]} x {sizes[1]} x {sizes[2]} voxels are more than spconv tells apart on "
                f"the CPU: give it at most {2**32 // math.prod(sizes)} clouds at once, or larger voxels"
            )
        return grid

    def _points_in_range(self, points: Tensor, grid: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        """The points inside the range (P, 4), in at least float32, and the voxel of each (P, 4)."""
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        inside = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
        cells = [torch.arange(len(points), device=points.device)[:, None].expand_as(inside)]
        for axis in (2, 1, 0):
            low, high, size = self.axes[axis]
            values = points[..., axis]
            inside &= (values >= low) & (values < high)
            cells.append(((values - low) / size).long().clamp(0, grid[3 - axis] - 1))
        empty = (~inside.any(1)).nonzero().flatten().tolist()
        if empty:
            low, high, _ = zip(*self.axes, strict=True)
            raise ValueError(
                f"points[{empty[0]}]: none of its {points.shape[1]} points lies in point_cloud_range, from {low} to "
                f"{high} metres"
            )
        return points[inside], torch.stack(cells, dim=-1)[inside]

    def _scale(self, means: Tensor) -> Tensor:
        """Mean points (S, 4) with x, y, z mapped from the range to [-1, 1]."""
        columns = [
            2 * (column - low) / (high - low) - 1
            for column, (low, high, _) in zip(means[:, :3].unbind(1), self.axes, strict=True)
        ]
        return torch.stack([*columns, means[:, 3]], dim=1)


class SparseConvBlock(nn.Module):
    """Convolution, batch norm, ReLU on a `SparseConvTensor`: submanifold, or of stride 2.

    Args:
        in_channels, out_channels: widths.
        eps, momentum: of the batch norm.
        indice_key: submanifold convolutions of the same sites share their neighbour table under this name;
            `None` makes the convolution a strided one.
    """

    def __init__(
        self, in_channels: int, out_channels: int, eps: float, momentum: float, indice_key: str | None = None
    ) -> None:
        super().__init__()
        if indice_key is None:
            self.conv = spconv.SparseConv3d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        else:
            self.conv = _submanifold(in_channels, out_channels, indice_key)
        self.norm = WeightedBatchNorm(out_channels, eps=eps, momentum=momentum)

    def forward(self, x: "spconv.SparseConvTensor") -> "spconv.SparseConvTensor":
        x = _convolve(self.conv, x)
        return x.replace_feature(F.relu(self.norm(x.features)))


class SparseResidualBlock(nn.Module):
    """Two submanifold convolutions with batch norm and a shortcut, on a `SparseConvTensor`; widths stay."""

    def __init__(self, channels: int, eps: float, momentum: float, indice_key: str) -> None:
        super().__init__()
        self.conv1 = _submanifold(channels, channels, indice_key)
        self.norm1 = WeightedBatchNorm(channels, eps=eps, momentum=momentum)
        self.conv2 = _submanifold(channels, channels, indice_key)
        self.norm2 = WeightedBatchNorm(channels, eps=eps, momentum=momentum)

    def forward(self, x: "spconv.SparseConvTensor") -> "spconv.SparseConvTensor":
        shortcut = x.features
        x = _convolve(self.conv1, x)
        x = _convolve(self.conv2, x.replace_feature(F.relu(self.norm1(x.features))))
        return x.replace_feature(F.relu(self.norm2(x.features) + shortcut))


class CellMeans(NamedTuple):
    """The cells that hold points, ordered by cloud, then z, y, x.

    Args:
        cells (`(S, 4)`, int64): cloud, z, y, x.
        mean (`(S, 4)`): mean x y z reflectance of the points in each.
        grid: the shape (B, Z, Y, X) that `cells` index.
    """

    cells: Tensor
    mean: Tensor
    grid: tuple[int, int, int, int]


def _stages(config: PreTrainedConfig) -> list[nn.Sequential]:
    norm = {"eps": config.batch_norm_eps, "momentum": config.batch_norm_momentum}
    stages, in_channels = [], 4
    for index, (channels, num_blocks) in enumerate(zip(config.channels, config.blocks_per_stage, strict=True)):
        key = f"stage{index}"
        blocks: list[nn.Module] = [SparseConvBlock(in_channels, channels, indice_key=None if index else key, **norm)]
        for _ in range(num_blocks):
            if config.residual:
                blocks.append(SparseResidualBlock(channels, indice_key=key, **norm))
            else:
                blocks.append(SparseConvBlock(channels, channels, indice_key=key, **norm))
        stages.append(nn.Sequential(*blocks))
        in_channels = channels
    return stages


def _submanifold(in_channels: int, out_channels: int, indice_key: str) -> "spconv.SubMConv3d":
    return spconv.SubMConv3d(in_channels, out_channels, 3, padding=1, bias=False, indice_key=indice_key)


def _convolve(conv: "spconv.conv.SparseConvolution", x: "spconv.SparseConvTensor") -> "spconv.SparseConvTensor":
    """Runs a spconv layer with the algorithm the device has, in float32 or wider; keeps the weights' dtype."""
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    # implicit GEMM exists on CUDA only, and in eval mode it silently records no gradient
    implicit_gemm = x.features.is_cuda and (conv.training or not torch.is_grad_enabled())
    conv.algo = spconv.ConvAlgo.MaskImplicitGemm if implicit_gemm else spconv.ConvAlgo.Native
    x = x.replace_feature(x.features.to(dtype))
    x = torch.func.functional_call(conv, {"weight": conv.weight.to(dtype)}, (x,))
    return x.replace_feature(x.features.to(conv.weight.dtype))


def _mean_per_cell(points: Tensor, cells: Tensor, grid: tuple[int, int, int, int]) -> CellMeans:
    """Means of `points` (P, 4) over those that share a cell; `cells` (P, 4) index `grid`."""
    keys, index = torch.unique(_cell_keys(cells, grid), return_inverse=True)
    rows = torch.cat([points, torch.ones_like(points[:, :1])], dim=1)
    sums = points.new_zeros(len(keys), 5).index_add_(0, index, rows)
    return CellMeans(torch.stack(torch.unravel_index(keys, grid), dim=1), sums[:, :4] / sums[:, 4:], grid)


def _find_cells(sites: CellMeans, cells: Tensor) -> Tensor:
    """For each of `sites` its row in `cells` (R, 4), which holds them all in any order: (S,) int64."""
    keys, order = _cell_keys(cells.long(), sites.grid).sort()
    return order[torch.searchsorted(keys, _cell_keys(sites.cells, sites.grid))]


def _cell_keys(cells: Tensor, grid: tuple[int, int, int, int]) -> Tensor:
    """Row-major number of each cell in the grid: (..., 4) int64 -> (...,) int64."""
    cloud, z, y, x = cells.unbind(-1)
    return ((cloud * grid[1] + z) * grid[2] + y) * grid[3] + x


def _choose_sites(sites: CellMeans, num_slots: int) -> tuple[Tensor, Tensor]:
    """Rows of `sites` for every slot (B, M) int64, and which slots of each cloud are in use (B, M) bool."""
    cloud = sites.cells[:, 0].contiguous()
    bounds = torch.searchsorted(cloud, torch.arange(sites.grid[0] + 1, device=cloud.device))
    counts = bounds.diff()[:, None]
    # clouds are padded with copies of their last site, which sampling takes only when nothing else is left
    position = torch.arange(int(counts.max()), device=cloud.device).minimum(counts - 1)
    rows = bounds[:-1, None] + position
    chosen = furthest_point_sample(sites.mean[rows, :3], num_slots)
    return rows.gather(1, chosen), torch.arange(num_slots, device=cloud.device) < counts
