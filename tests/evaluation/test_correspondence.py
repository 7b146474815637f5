"""Correspondence metrics on maps whose right answer is known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_simipu import tiny_batch, tiny_config

from simipu_hf.evaluation.correspondence import RADII, correspondence_recall, dense_image_embeds, pixel_recall
from simipu_hf.modeling.geometry import FeatureGrid
from simipu_hf.modeling.layers import run_blocks
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining


def test_recall_counts_cells():
    # a row of 8 cells of 10 pixels with a direction of their own; the points ask for cells 0, 3, 7 and 2
    cells = torch.eye(8)[None]
    asked = torch.eye(8)[None, [0, 3, 7, 2]]
    # they project onto: the asked cell; 2 cells from it; 5 cells from it; and beside the image
    pixels = torch.tensor([[[0.0, 0], [50, 0], [20, 0], [900, 0]]])
    valid = torch.tensor([[True, True, True, False]])
    recall = pixel_recall(asked, cells, pixels, valid, FeatureGrid(10.0, 10.0, 0.0, 0.0), (1, 8))
    assert recall == {
        "recall_within_1_cells": pytest.approx(1 / 3),
        "recall_within_2_cells": pytest.approx(2 / 3),
        "recall_within_5_cells": 1.0,
    }


def test_recall_without_points_is_not_a_number():
    one = torch.ones(1, 1, 1)
    nobody = torch.zeros(1, 1, dtype=torch.bool)
    recall = pixel_recall(one, one, torch.zeros(1, 1, 2), nobody, FeatureGrid(1.0, 1.0, 0.0, 0.0), (1, 1))
    assert all(math.isnan(value) for value in recall.values())


def test_dense_embeds_are_those_of_the_model():
    torch.manual_seed(0)
    config = tiny_config(architecture="test_resnet", image_config={"out_indices": [-1]})
    model, batch = SimIPUForPreTraining(config).eval(), tiny_batch() | {"image_sizes": torch.tensor([[64, 96]] * 2)}
    with torch.no_grad():
        output = model(**batch)
    embeds, grid = dense_image_embeds(model, output.image_features, (64, 96))
    last = output.image_features[-1]
    assert embeds.shape == (2, last.shape[-2] * last.shape[-1], 16)
    # one stage: the projection of each of its cells
    head = model.inter_image_head.layers
    expected = run_blocks(head, last.flatten(2).transpose(1, 2).flatten(0, 1))
    expected = F.normalize(expected, dim=-1)
    torch.testing.assert_close(embeds.flatten(0, 1), expected, rtol=1e-3, atol=1e-4)

    # every point asks for a cell; some are masked, one lies beside the image
    coordinates = output.point_output.coordinates
    coordinates[0, 0, 1] += 1000
    kept = np.arange(coordinates.shape[1]) % 3 > 0
    output.point_output.mask = torch.from_numpy(kept).expand(2, -1)
    asked = torch.randint(embeds.shape[1], coordinates.shape[:2])
    output.point_embeds = embeds[torch.arange(2)[:, None], asked]
    distances, valid = [], []
    for points, to_pixel, cells in zip(coordinates.numpy(), batch["lidar_to_pixel"].numpy(), asked, strict=True):
        x, y, depth = to_pixel @ np.c_[points, np.ones(len(points))].T
        rows, columns = np.divmod(cells.numpy(), last.shape[-1])
        x, y = x / depth, y / depth
        across = (grid.offset_x + columns * grid.stride_x - x) / grid.stride_x
        down = (grid.offset_y + rows * grid.stride_y - y) / grid.stride_y
        distances.append(np.hypot(across, down))
        valid.append(kept & (depth > 0) & (x >= -0.5) & (x < 95.5) & (y >= -0.5) & (y < 63.5))
    distances, valid = np.concatenate(distances), np.concatenate(valid)
    assert 0 < valid.sum() < 2 * kept.sum()
    expected = {f"recall_within_{r}_cells": pytest.approx((distances[valid] <= r).mean()) for r in RADII}
    assert correspondence_recall(model, batch, output) == expected
