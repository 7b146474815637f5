"""Monocular 3-D detection from any timm image encoder: a one-stage, centre-based head on its pyramid.

Objects are points, the projections of their 3-D centres (CenterNet, Zhou et al. 2019; SMOKE, Liu et al. 2020); depth
comes with an uncertainty (MonoFlex, Zhang et al. 2021) and follows the focal length, so that a resize, a crop or
another camera stays metric.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_simipu import SimIPUDetectionConfig
from .dense_model import SimIPUDenseModel
from .geometry import FeatureGrid
from .image_encoder import pad_to_divisor

# what is regressed at a cell, and how many numbers it takes
CHANNELS = {"offset": 2, "log_depth": 1, "log_spread": 1, "log_dimensions": 3, "angle": 2}
# share of a box that a Gaussian peak may be off and still overlap the box so much (CornerNet, Law and Deng 2018)
MIN_GAUSSIAN_OVERLAP = 0.5
# a spread of 2 % of the depth: the likelihood of training objects that are known by heart grows without end
MIN_LOG_SPREAD = -4.0


@dataclass
class SimIPUDetectionOutput(ModelOutput):
    """Output of [`SimIPUForMonocular3DDetection`]. K = `max_detections`, h x w cells.

    Args:
        loss: sum of the five losses, with labels.
        losses: each of them by name, with labels.
        logits (`(B, C, h, w)`): heat map of the centres of each class.
        regression (`(B, 9, h, w)`): what `CHANNELS` lists.
        scores (`(B, K)`), labels (`(B, K)`): of the detections, best first.
        boxes_3d (`(B, K, 7)`): x, y, z of the middle of the bottom, height, width, length (metres) and `rotation_y`
            (radians) in the camera's frame, as KITTI has them.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    regression: Tensor | None = None
    scores: Tensor | None = None
    labels: Tensor | None = None
    boxes_3d: Tensor | None = None


class FeatureNeck(nn.Module):
    """Feature pyramid, finest first, to one map at the finest resolution (FPN, Lin et al. 2017)."""

    def __init__(self, in_channels: Sequence[int], channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(math.gcd(32, channels), channels)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """`(B, channels, h, w)`."""
        hidden = self.lateral[-1](pyramid[-1])
        for lateral, finer in zip(reversed(self.lateral[:-1]), reversed(pyramid[:-1]), strict=True):
            hidden = lateral(finer) + F.interpolate(hidden, finer.shape[-2:], mode="bilinear")
        return self.norm(self.smooth(hidden)).relu()


class CenterHead(nn.Module):
    """A feature map to heat maps of centres and to what `CHANNELS` lists, a 3 x 3 and a 1 x 1 convolution each."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        widths = {"heat_map": num_classes, **CHANNELS}
        self.branches = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, width, 1)
                )
                for name, width in widths.items()
            }
        )

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, C, h, w)` and `(B, 9, h, w)`."""
        maps = {name: branch(hidden) for name, branch in self.branches.items()}
        return maps["heat_map"], torch.cat([maps[name] for name in CHANNELS], dim=1)


class SimIPUForMonocular3DDetection(SimIPUDenseModel):
    """An image encoder, a light feature pyramid and a centre-based head.

        >>> model = SimIPUForMonocular3DDetection(SimIPUDetectionConfig(image_config={"architecture": "resnet50"}))
        >>> model(pixel_values, camera_projections).boxes_3d  # (B, K, 7), metres and radians in the camera's frame

    Attributes:
        image_encoder, pyramid: as in [`SimIPUDenseModel`].
        neck: [`FeatureNeck`]. head: [`CenterHead`].

    Raises:
        ValueError: the configuration names stages that the encoder does not have.
    """

    config: SimIPUDetectionConfig
    base_model_prefix = "simipu_detection"
    finest_stride = 4

    def __init__(self, config: SimIPUDetectionConfig):
        super().__init__(config)
        self.neck = FeatureNeck(self.pyramid.channels, config.hidden_size)
        self.head = CenterHead(config.hidden_size, len(config.classes))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        camera_projection: Tensor,
        labels: Sequence[Mapping[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> SimIPUDetectionOutput:
        """Detect objects, and compute the losses where `labels` are given.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised.
            camera_projection: `(B, 3, 4)`, camera frame to pixels of `pixel_values`:
                `image_processor.pixel_transform((height, width)) @ camera_projection` of the original image.
            labels: one dictionary an image, as [`encode_targets`] takes it.
        """
        hidden = self.neck(self.pyramid(self.image_encoder, pad_to_divisor(pixel_values, self.image_encoder)))
        logits, regression = (maps.float() for maps in self.head(hidden))
        projection, grid, losses = camera_projection.to(regression), self.feature_grid, None
        with torch.autocast(regression.device.type, enabled=False):  # in half precision, pixels are several pixels off
            if labels is not None:
                targets = [
                    encode_targets(of_image, projection[index], grid, logits.shape[1:], self.config)
                    for index, of_image in enumerate(labels)
                ]
                losses = detection_losses(logits, regression, targets)
            with torch.no_grad():
                scores, classes, cells, values = select_peaks(logits, regression, self.config.max_detections)
                boxes_3d = decode_boxes(cells, values, classes, projection, grid, self.config)
        return SimIPUDetectionOutput(
            loss=None if losses is None else torch.stack(list(losses.values())).sum(),
            losses=losses,
            logits=logits,
            regression=regression,
            scores=scores,
            labels=classes,
            boxes_3d=boxes_3d,
        )

    @property
    def feature_grid(self) -> FeatureGrid:
        """Where the cells of the heat maps look; cells of an enlarged map divide those of the encoder's."""
        stage, stride = self.pyramid.stages[0], self.pyramid.strides[0]
        grids = self.config.image_encoder_config.feature_grids
        own = self.image_encoder.feature_info[stage]["reduction"]
        found = grids[stage] if grids and grids[stage] else [own, own, (own - 1) / 2, (own - 1) / 2]
        return FeatureGrid(stride, stride, *(offset - (own - stride) / 2 for offset in found[2:]))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        head = getattr(self, "head", None)
        last = {} if head is None else {branch[-1]: name for name, branch in head.branches.items()}
        if isinstance(module, nn.Conv2d) and module in last:
            assert module.bias is not None
            init.normal_(module.weight, std=0.001)
            # heat maps start at 0.1: next to all cells are empty (Lin et al. 2017)
            init.constant_(module.bias, -math.log(9) if last[module] == "heat_map" else 0.0)
        else:
            super()._init_weights(module)


# --- boxes and cells ------------------------------------------------------------------------------------------------


def encode_boxes(
    boxes_3d: Tensor, class_labels: Tensor, camera_projection: Tensor, grid: FeatureGrid, config: SimIPUDetectionConfig
) -> tuple[Tensor, Tensor]:
    """The cell of each box and the numbers that the head has to give there.

    Args:
        boxes_3d: `(..., 7)`, see [`SimIPUDetectionOutput`].
        class_labels: `(...)`, indices into `config.classes`.
        camera_projection: `(..., 3, 4)`.

    Returns:
        Cells `(..., 2)`, column and row, and numbers `(..., 9)` in the order of `CHANNELS`; those of the spread are 0.
    """
    location, dimensions, rotation = boxes_3d[..., :3], boxes_3d[..., 3:6], boxes_3d[..., 6]
    centre = location - F.pad(dimensions[..., :1] / 2, (1, 1))  # y is down
    intrinsics = camera_projection[..., :3]
    projected = (intrinsics @ centre[..., None])[..., 0] + camera_projection[..., 3]
    depth = projected[..., 2]
    exact = grid.cells(projected[..., :2] / depth[..., None])
    cells = exact.round()
    ray = _rays(projected / depth[..., None], intrinsics)
    seen_angle = rotation - torch.atan2(ray[..., 0], ray[..., 2])
    values = [
        exact - cells,
        torch.log(depth / _focal_length(intrinsics))[..., None] - config.log_depth_per_focal,
        torch.zeros_like(depth)[..., None],
        torch.log(dimensions / _mean_dimensions(config, class_labels)),
        torch.stack([seen_angle.sin(), seen_angle.cos()], dim=-1),
    ]
    return cells.long(), torch.cat(values, dim=-1)


def decode_boxes(
    cells: Tensor,
    values: Tensor,
    class_labels: Tensor,
    camera_projection: Tensor,
    grid: FeatureGrid,
    config: SimIPUDetectionConfig,
) -> Tensor:
    """The inverse of [`encode_boxes`]: boxes `(B, K, 7)` from cells `(B, K, 2)`, numbers `(B, K, 9)` and classes
    `(B, K)`, with `camera_projection` `(B, 3, 4)`."""
    part = split_values(values)
    projection = camera_projection.to(values.dtype)[:, None]
    intrinsics = projection[..., :3]
    x, y = (cells + part["offset"]).unbind(-1)
    pixels = torch.stack([x * grid.stride_x + grid.offset_x, y * grid.stride_y + grid.offset_y], dim=-1)
    ray = _rays(F.pad(pixels, (0, 1), value=1.0), intrinsics)
    depth = torch.exp(part["log_depth"] + config.log_depth_per_focal) * _focal_length(intrinsics)[..., None]
    shift = _rays(projection[..., 3], intrinsics)
    dimensions = torch.exp(part["log_dimensions"]) * _mean_dimensions(config, class_labels)
    location = depth * ray - shift + F.pad(dimensions[..., :1] / 2, (1, 1))
    seen_angle = torch.atan2(*part["angle"].unbind(-1))
    rotation = seen_angle + torch.atan2(ray[..., 0], ray[..., 2])
    rotation = torch.remainder(rotation + math.pi, 2 * math.pi) - math.pi  # in [-pi, pi)
    return torch.cat([location, dimensions, rotation[..., None]], dim=-1)


def split_values(values: Tensor) -> dict[str, Tensor]:
    """Numbers `(..., 9)` by their names in `CHANNELS`."""
    return dict(zip(CHANNELS, values.split(list(CHANNELS.values()), dim=-1), strict=True))


def _rays(pixels: Tensor, intrinsics: Tensor) -> Tensor:
    """Directions `(..., 3)` of depth 1 through homogeneous pixels `(..., 3)`."""
    return torch.linalg.solve_ex(intrinsics.expand(*pixels.shape, 3), pixels[..., None]).result[..., 0]


def _focal_length(intrinsics: Tensor) -> Tensor:
    """Geometric mean of both focal lengths, pixels: what an object's size in the image is proportional to."""
    return (intrinsics[..., 0, 0] * intrinsics[..., 1, 1]).abs().sqrt()


def _mean_dimensions(config: SimIPUDetectionConfig, class_labels: Tensor) -> Tensor:
    means = torch.tensor(config.mean_dimensions, device=class_labels.device, dtype=torch.float32)
    return means[class_labels]


# --- targets and losses ---------------------------------------------------------------------------------------------


@dataclass
class DetectionTargets:
    """Targets of one image: `heat_map` (C, h, w), 1 at centres; `weight` (C, h, w), 0 where nothing is known; of the n
    objects `cells` (n, 2), `class_labels` (n,) and `values` (n, 9)."""

    heat_map: Tensor
    weight: Tensor
    cells: Tensor
    class_labels: Tensor
    values: Tensor


def encode_targets(
    labels: Mapping[str, Tensor],
    camera_projection: Tensor,
    grid: FeatureGrid,
    map_size: Sequence[int],
    config: SimIPUDetectionConfig,
) -> DetectionTargets:
    """What the head has to predict for one image. Where two centres of one class share a cell, the nearer object has
    it; a centre outside the map or behind the camera has none.

    Args:
        labels: `class_labels` (n,) indices into `config.classes`, `boxes_3d` (n, 7) and `boxes` (n, 4), left, top,
            right, bottom in pixels of `pixel_values`; `ignored_boxes` (m, 4) and `ignored_labels` (m,), where a class
            (-1: every class) is neither to be found nor held to be absent.
        map_size: classes, height and width of the heat maps.
    """
    classes, height, width = map_size
    boxes_3d, class_labels = labels["boxes_3d"], labels["class_labels"]
    order = boxes_3d[:, 2].argsort(descending=True)  # the nearest last, so that it stays
    cells, values = encode_boxes(boxes_3d[order], class_labels[order], camera_projection, grid, config)
    column, row = cells.unbind(-1)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height) & (boxes_3d[order, 2] > 0)
    order, cells, values = order[inside], cells[inside], values[inside]
    place = class_labels[order] * height * width + cells[:, 1] * width + cells[:, 0]
    is_last = ~(place[:, None] == place).triu(diagonal=1).any(dim=1)
    order, cells, values = order[is_last], cells[is_last], values[is_last]
    boxes, class_labels = labels["boxes"][order], class_labels[order]
    y, x = torch.meshgrid(*(torch.arange(side, device=cells.device) for side in (height, width)), indexing="ij")
    low, high = grid.cells(labels["ignored_boxes"].view(-1, 2, 2))[..., None, None].unbind(1)
    covered = (x >= low[:, 0]) & (x <= high[:, 0]) & (y >= low[:, 1]) & (y <= high[:, 1])
    of_class = torch.arange(classes, device=cells.device)[:, None] == labels["ignored_labels"]
    of_class |= labels["ignored_labels"] < 0
    ignored = (of_class[:, :, None, None] & covered).any(dim=1)
    squared = (x - cells[:, 0, None, None]).square() + (y - cells[:, 1, None, None]).square()
    sides = (boxes[:, 2:] - boxes[:, :2]) / boxes.new_tensor([grid.stride_x, grid.stride_y])
    peaks = torch.exp(-squared / (2 * _gaussian_sigma(sides)[:, None, None].square()))
    heat_map = values.new_zeros(classes, height, width)
    heat_map.scatter_reduce_(0, class_labels.long()[:, None, None].expand_as(peaks), peaks.to(heat_map), "amax")
    return DetectionTargets(heat_map, (~ignored | (heat_map == 1)).to(values), cells, class_labels, values)


def _gaussian_sigma(sides: Tensor) -> Tensor:
    """Standard deviation (n,) of peaks for boxes of `sides` (n, 2), cells: a sixth of the diameter within which a
    shift along both axes leaves an intersection over union of `MIN_GAUSSIAN_OVERLAP`, as in CenterNet."""
    total, area = sides.sum(dim=-1), sides.prod(dim=-1)
    share = (1 - MIN_GAUSSIAN_OVERLAP) / (1 + MIN_GAUSSIAN_OVERLAP)
    radius = (total - (total.square() - 4 * share * area).clamp(min=0).sqrt()) / 2
    return ((2 * radius + 1) / 6).clamp(min=0.5)


def detection_losses(logits: Tensor, regression: Tensor, targets: Sequence[DetectionTargets]) -> dict[str, Tensor]:
    """Focal loss of the heat maps, and of the objects' cells the Laplacian likelihood of log depth and absolute errors
    of the rest; each a mean over the objects of the batch."""
    heat_map, weight = (torch.stack([getattr(target, name) for target in targets]) for name in ("heat_map", "weight"))
    count = max(sum(len(target.cells) for target in targets), 1)
    rows = torch.cat([torch.full_like(target.class_labels, i) for i, target in enumerate(targets)])
    column, row = torch.cat([target.cells for target in targets]).unbind(-1)
    found = split_values(regression[rows, :, row, column])
    wanted = split_values(torch.cat([target.values for target in targets]))
    error = {name: (found[name] - wanted[name]).abs() for name in CHANNELS}
    # leaky: a spread that fell below the least one is led up again where the depth turns out wrong
    log_spread = F.leaky_relu(found["log_spread"] - MIN_LOG_SPREAD) + MIN_LOG_SPREAD
    return {
        "heat_map": (focal_loss(logits, heat_map) * weight).sum() / count,
        "offset": error["offset"].sum() / count,
        "depth": (math.sqrt(2) * error["log_depth"] * torch.exp(-log_spread) + log_spread).sum() / count,
        "dimensions": error["log_dimensions"].sum() / count,
        "angle": error["angle"].sum() / count,
    }


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss of every cell for Gaussian peaks (CornerNet, Law and Deng 2018): alpha 2, beta 4."""
    probability = logits.sigmoid()
    positive = -F.logsigmoid(logits) * (1 - probability).square()
    negative = -F.logsigmoid(-logits) * probability.square() * (1 - target).pow(4)
    return torch.where(target == 1, positive, negative)


def select_peaks(logits: Tensor, regression: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best `count` local maxima of the heat maps: scores and classes (B, K), cells (B, K, 2), numbers (B, K, 9).
    Where there are fewer, the others have the score 0.

    A score is the heat map's, times exp(-spread of the log depth): boxes whose depth is unsure come later.
    """
    height, width = logits.shape[-2:]
    heat_map = logits.sigmoid()
    peaks = heat_map * (heat_map == F.max_pool2d(heat_map, 3, stride=1, padding=1))
    scores, index = peaks.flatten(1).topk(min(count, peaks[0].numel()))
    cell = index % (height * width)
    values = regression.flatten(2).transpose(1, 2).take_along_dim(cell[..., None], 1)
    sure = torch.exp(-torch.exp(split_values(values)["log_spread"][..., 0]))
    scores, order = (scores * sure).sort(dim=1, descending=True, stable=True)
    index, cell, values = index.gather(1, order), cell.gather(1, order), values.take_along_dim(order[..., None], 1)
    return scores, index // (height * width), torch.stack([cell % width, cell // width], dim=-1), values


SimIPUForMonocular3DDetection.register_for_auto_class("AutoModel")
