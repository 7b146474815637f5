"""Does the image feature at a pixel belong to the point that projects there? Metrics of the pre-training task."""

import torch
import torch.nn.functional as F

from simipu_hf.modeling.geometry import FeatureGrid, inside_image, project_points
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.outputs_simipu import SimIPUForPreTrainingOutput

RADII = (1, 2, 5)


def dense_image_embeds(
    model: SimIPUForPreTraining, image_features: tuple[torch.Tensor, ...], image_size: tuple[int, int]
) -> tuple[torch.Tensor, FeatureGrid]:
    """The inter-modal image projection at every cell of the finest sampled stage.

    Args:
        model: in evaluation mode.
        image_features: of the model's output, each (B, C, H, W).
        image_size: height and width of `pixel_values`.

    Returns:
        unit vectors (B, H*W, D), and where the cells lie.
    """
    finest = image_features[0]
    grid = model.stage_grids(image_features, image_size)[0]
    pixels = grid.pixels((finest.shape[-2], finest.shape[-1]), finest.device)
    embeds = model.embed_pixels(image_features, pixels.expand(len(finest), -1, -1), image_size)
    return F.normalize(embeds.float(), dim=-1), grid


def pixel_recall(
    point_embeds: torch.Tensor,
    cell_embeds: torch.Tensor,
    pixels: torch.Tensor,
    valid: torch.Tensor,
    grid: FeatureGrid,
    map_size: tuple[int, int],
) -> dict[str, float]:
    """How often the image cell most similar to a point lies within r cells of where the point projects.

    Args:
        point_embeds: (B, M, D), unit vectors.
        cell_embeds: (B, K, D), unit vectors of every cell of the image.
        pixels: (B, M, 2), where the points project, x and y.
        valid: (B, M), points that project into their image.
        grid: where the cells lie.
        map_size: how many there are down and across, K in all.

    Returns:
        `recall_within_{r}_cells` for each of `RADII`, Euclidean distances to the cell's centre; 0 to 1, NaN without
        valid points.
    """
    with torch.autocast(point_embeds.device.type, enabled=False):  # half precision has ties, of which any would win
        best = (point_embeds.float() @ cell_embeds.float().transpose(1, 2)).argmax(-1)
    offset = (grid.pixels(map_size, best.device)[best] - pixels) / pixels.new_tensor([grid.stride_x, grid.stride_y])
    distance = offset.norm(dim=-1)[valid]
    return {f"recall_within_{r}_cells": (distance <= r).float().mean().item() for r in RADII}


@torch.no_grad()
def correspondence_recall(
    model: SimIPUForPreTraining, batch: dict[str, torch.Tensor], output: SimIPUForPreTrainingOutput
) -> dict[str, float]:
    """[`pixel_recall`] of a batch, with its `image_sizes`, and the model's output in evaluation mode."""
    assert output.image_features is not None
    assert output.point_output is not None
    assert output.point_embeds is not None
    image_size = (batch["pixel_values"].shape[-2], batch["pixel_values"].shape[-1])
    cell_embeds, grid = dense_image_embeds(model, output.image_features, image_size)
    coordinates = output.point_output.coordinates
    pixels, depth = project_points(coordinates, batch["lidar_to_pixel"].to(coordinates.dtype))
    valid = inside_image(pixels, depth, batch["image_sizes"]) & output.point_output.mask
    embeds, (height, width) = F.normalize(output.point_embeds.float(), dim=-1), output.image_features[0].shape[-2:]
    return pixel_recall(embeds, cell_embeds, pixels.float(), valid, grid, (height, width))
