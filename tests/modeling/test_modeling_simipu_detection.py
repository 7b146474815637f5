"""The detection model: boxes there and back, targets, losses against their formulas, several encoders."""

import itertools
import math

import numpy as np
import pytest
import torch

from simipu_hf.modeling.configuration_simipu import SimIPUDetectionConfig
from simipu_hf.modeling.geometry import FeatureGrid, image_boxes
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.modeling_simipu_detection import (
    CHANNELS,
    MIN_GAUSSIAN_OVERLAP,
    SimIPUForMonocular3DDetection,
    decode_boxes,
    detection_losses,
    encode_boxes,
    encode_targets,
    focal_loss,
    select_peaks,
)

CONFIG = SimIPUDetectionConfig(image_config={"architecture": "test_resnet"})
PROJECTION = torch.tensor([[700.0, 0, 600, 45], [0, 710, 170, 0.2], [0, 0, 1, 0.003]], dtype=torch.float64)
GRID = FeatureGrid(4.0, 4.0, 1.5, 0.0)
EMPTY = {
    "class_labels": torch.zeros(0, dtype=torch.long),
    "boxes_3d": torch.zeros(0, 7),
    "boxes": torch.zeros(0, 4),
    "ignored_boxes": torch.zeros(0, 4),
    "ignored_labels": torch.zeros(0, dtype=torch.long),
}


def tiny(architecture="test_resnet", **fields) -> SimIPUForMonocular3DDetection:
    torch.manual_seed(0)
    config = SimIPUDetectionConfig(image_config={"architecture": architecture}, hidden_size=16, **fields)
    return SimIPUForMonocular3DDetection(config)


def labels_of(boxes_3d: torch.Tensor, classes: torch.Tensor, boxes: torch.Tensor | None = None) -> dict:
    """Of objects with boxes in the image of 40 x 40 pixels, unless they are given."""
    boxes = torch.tensor([[580.0, 150, 620, 190]]).expand(len(boxes_3d), 4) if boxes is None else boxes
    return EMPTY | {"class_labels": classes, "boxes_3d": boxes_3d.float(), "boxes": boxes}


def random_boxes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    low, high = [-10, 1, 5, 1, 0.5, 0.5, -math.pi], [10, 2, 60, 2, 2, 5, math.pi]
    return torch.from_numpy(rng.uniform(low, high, (count, 7))), torch.from_numpy(rng.integers(0, 3, count))


def test_decoding_inverts_encoding():
    boxes, labels = random_boxes(50)
    cells, values = encode_boxes(boxes, labels, PROJECTION, GRID, CONFIG)
    assert values[:, :2].abs().max() <= 0.5
    back = decode_boxes(cells[None], values[None], labels[None], PROJECTION[None], GRID, CONFIG)[0]
    torch.testing.assert_close(back, boxes, rtol=1e-6, atol=1e-6)


def test_the_cell_is_where_the_middle_appears():
    """By hand, for a camera at the origin that looks along z."""
    box = torch.tensor([[2.0, 1.5, 20, 1.0, 2, 4, 0.3]], dtype=torch.float64)
    projection = torch.tensor([[100.0, 0, 50, 0], [0, 100, 40, 0], [0, 0, 1, 0]], dtype=torch.float64)
    cells, values = encode_boxes(box, torch.tensor([0]), projection, FeatureGrid(4.0, 4.0, 0.0, 0.0), CONFIG)
    # x: 50 + 100 * 2 / 20 = 60, cell 15; y: 40 + 100 * (1.5 - 0.5) / 20 = 45, cell 11.25
    assert cells.tolist() == [[15, 11]]
    assert values[0, :2].tolist() == pytest.approx([0, 0.25])
    assert values[0, 2].item() == pytest.approx(math.log(20 / 100) - CONFIG.log_depth_per_focal)
    seen_angle = 0.3 - math.atan2(2, 20)
    assert values[0, -2:].tolist() == pytest.approx([math.sin(seen_angle), math.cos(seen_angle)])


def test_targets_of_an_image():
    boxes_3d = torch.tensor(
        [[0, 1, 20, 2.0, 2, 4, 0], [0, 1, 10, 2, 2, 4, 0], [90, 1, 10, 2, 2, 4, 0], [0, 1, -9, 2, 2, 4, 0]]
    )
    projection = torch.tensor([[700.0, 0, 600, 0], [0, 700, 170, 0], [0, 0, 1, 0]])
    labels = labels_of(boxes_3d, torch.tensor([0, 0, 1, 0]))
    targets = encode_targets(labels, projection, FeatureGrid(4.0, 4.0, 0, 0), (3, 96, 320), CONFIG)
    # both are in the middle of the picture: the nearer one stays; the third is outside, the last behind
    assert targets.cells.tolist() == [[150, 42]]
    assert targets.values[0, 2].item() == pytest.approx(math.log(10 / 700) - CONFIG.log_depth_per_focal, abs=1e-5)
    assert (targets.heat_map == 1).nonzero().tolist() == [[0, 42, 150]]


def test_heat_map_and_weight_object_by_object():
    boxes_3d, classes = random_boxes(12)
    rng = np.random.default_rng(1)
    corners = torch.from_numpy(rng.uniform(0, [1200, 380], (2, 16, 2))).float()
    boxes = torch.cat([corners.amin(0), corners.amax(0)], dim=1)
    ignored = {"ignored_boxes": boxes[12:], "ignored_labels": torch.tensor([-1, 0, 2, 2])}
    labels = labels_of(boxes_3d, classes, boxes[:12]) | ignored
    targets = encode_targets(labels, PROJECTION.float(), GRID, (3, 96, 310), CONFIG)
    cells, _ = encode_boxes(boxes_3d.float(), classes, PROJECTION.float(), GRID, CONFIG)
    peaks = []
    for (x, y), label, (left, top, right, bottom) in zip(
        cells.tolist(), classes.tolist(), boxes[:12].tolist(), strict=True
    ):
        if 0 <= x < 310 and 0 <= y < 96:
            peaks.append((x, y, label, peak_sigma((right - left) / 4, (bottom - top) / 4)))
    assert len({peak[:3] for peak in peaks}) == len(peaks) > 5
    for label, row, column in itertools.product(range(3), range(0, 96, 5), range(0, 310, 5)):
        x, y = 4 * column + 1.5, 4 * row  # what the cell looks at
        hidden = any(
            of in (-1, label) and left <= x <= right and top <= y <= bottom
            for (left, top, right, bottom), of in zip(boxes[12:].tolist(), (-1, 0, 2, 2), strict=True)
        )
        heights = [
            math.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * sigma**2))
            for x, y, of, sigma in peaks
            if of == label
        ]
        assert targets.heat_map[label, row, column].item() == pytest.approx(max(heights, default=0), abs=1e-4)
        assert targets.weight[label, row, column].item() == (not hidden or max(heights, default=0) == 1)


def peak_sigma(width: float, height: float) -> float:
    """From the largest shift along both axes at which two such boxes overlap enough, found by halving."""
    low, high = 0.0, min(width, height)
    for _ in range(60):
        shift = (low + high) / 2
        shared = (width - shift) * (height - shift)
        low, high = (shift, high) if shared / (2 * width * height - shared) > MIN_GAUSSIAN_OVERLAP else (low, shift)
    return max((2 * low + 1) / 6, 0.5)


def test_an_object_outside_the_image_takes_no_cell_of_another():
    # columns 318 of row 59 and -2 of row 60: as far from the first cell, counted along the rows
    cells, classes = torch.tensor([[[318, 59], [-2, 60]]]), torch.zeros(1, 2, dtype=torch.long)
    values = torch.zeros(1, 2, 9)
    values[..., 2] = torch.tensor([20.0, 10.0]).div(700).log() - CONFIG.log_depth_per_focal
    values[..., -1] = 1
    boxes_3d = decode_boxes(cells, values, classes, PROJECTION[None].float(), GRID, CONFIG)[0]
    labels = labels_of(boxes_3d, classes[0])
    targets = encode_targets(labels, PROJECTION.float(), GRID, (3, 96, 320), CONFIG)
    assert targets.cells.tolist() == [[318, 59]]


def test_losses_are_those_of_their_formulas():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3), torch.tensor([[1.0, 0.4, 0.0], [0.9, 1.0, 0.2]])
    for logit, wanted, loss in zip(
        logits.flatten(), target.flatten(), focal_loss(logits, target).flatten(), strict=True
    ):
        p = 1 / (1 + math.exp(-logit))
        expected = -math.log(p) * (1 - p) ** 2 if wanted == 1 else -math.log(1 - p) * p**2 * (1 - wanted) ** 4
        assert loss.item() == pytest.approx(float(expected), rel=1e-4)
    boxes, classes = random_boxes(1)
    targets = encode_targets(labels_of(boxes, classes), PROJECTION.float(), GRID, (3, 200, 400), CONFIG)
    regression = torch.zeros(1, sum(CHANNELS.values()), 200, 400)
    regression[0, 3] = 0.5  # log of the spread
    losses = detection_losses(torch.zeros(1, 3, 200, 400), regression, [targets])
    error = abs(targets.values[0, 2].item())
    assert losses["depth"].item() == pytest.approx(math.sqrt(2) * error / math.exp(0.5) + 0.5, rel=1e-5)
    assert losses["offset"].item() == pytest.approx(targets.values[0, :2].abs().sum().item(), rel=1e-5)


def test_peaks_are_local_maxima_in_order_of_score():
    logits, regression = torch.full((1, 2, 6, 8), -9.0), torch.zeros(1, 9, 6, 8)
    logits[0, 1, 2, 3], logits[0, 1, 2, 4], logits[0, 0, 5, 7] = 3.0, 2.0, 1.0
    regression[0, 0, 5, 7] = 0.25
    regression[0, 3] = -20.0  # sure of every depth
    scores, labels, cells, values = select_peaks(logits, regression, 2)
    assert cells.tolist() == [[[3, 2], [7, 5]]]
    assert labels.tolist() == [[1, 0]]
    assert scores[0].tolist() == pytest.approx([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1))])
    assert values[0, 1, 0] == 0.25
    regression[0, 3, 2, 3] = 1.0  # unsure of the first: it comes second
    assert select_peaks(logits, regression, 2)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext"])
def test_several_encoders_learn(architecture):
    model = tiny(architecture).train()
    boxes, classes = random_boxes(2)
    boxes[:, 0] /= 10
    labels = labels_of(boxes, classes, torch.tensor([[10.0, 10, 50, 50]] * 2))
    projection = torch.tensor([[100.0, 0, 60, 0], [0, 100, 30, 0], [0, 0, 1, 0]]).expand(2, 3, 4)
    pixels = torch.randn(2, 3, 70, 130)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(16):
        output = model(pixels, projection, [labels, EMPTY])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert output.boxes_3d.shape == (2, 50, 7)
    assert model(pixels, projection, [EMPTY, EMPTY]).loss.isfinite()


def test_boxes_and_losses_are_exact_under_autocast(monkeypatch):
    """In half precision the projected centre of a box would be pixels off, and so would its cell."""
    model, seen = tiny().eval(), []

    def keep_targets(logits, regression, targets):
        seen.append(targets[0])
        return detection_losses(logits, regression, targets)

    monkeypatch.setattr("simipu_hf.modeling.modeling_simipu_detection.detection_losses", keep_targets)
    boxes, classes = random_boxes(30)
    labels = labels_of(boxes, classes, torch.rand(30, 4).cumsum(-1) * 90)
    pixels, projection = torch.randn(1, 3, 376, 1216), PROJECTION.float()[None]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels, projection, [labels])
    model(pixels, projection, [labels])
    half, full = seen
    assert len(full.cells) > 10
    assert torch.equal(half.cells, full.cells)
    assert torch.equal(half.values, full.values)
    _, classes, cells, values = select_peaks(output.logits, output.regression, model.config.max_detections)
    expected = decode_boxes(cells, values, classes, projection, model.feature_grid, model.config)
    assert torch.equal(output.boxes_3d, expected)


def test_post_processing_gives_boxes_of_the_original_image():
    box = torch.tensor([1.0, 1.6, 20, 1.5, 1.6, 4, 0.4], dtype=torch.float64)
    behind, dim = box * torch.tensor([1, 1, -1, 1, 1, 1, 1]), torch.tensor([[0.9, 0.8, 0.05]])

    class Output:
        scores, labels, boxes_3d = dim, torch.tensor([[0, 1, 2]]), torch.stack([box, behind, box])[None]

    found = SimIPUImageProcessor().post_process_3d_object_detection(Output, [PROJECTION.numpy()], [(375, 1242)])[0]
    assert found["scores"].tolist() == pytest.approx([0.9])
    corners = []
    for along in (-2, 2):
        for across in (-0.8, 0.8):
            for up in (0, 1.5):
                x = 1 + math.cos(0.4) * along + math.sin(0.4) * across
                z = 20 - math.sin(0.4) * along + math.cos(0.4) * across
                u, v, w = (PROJECTION @ torch.tensor([x, 1.6 - up, z, 1], dtype=torch.float64)).tolist()
                corners.append((u / w, v / w))
    low, high = np.min(corners, axis=0), np.max(corners, axis=0)
    assert found["boxes"][0].tolist() == pytest.approx([*low, *high])
    assert found["alpha"].item() == pytest.approx(0.4 - math.atan2(1, 20))
    clipped = image_boxes(box[None], PROJECTION, (200, 620))[0]
    assert clipped[2].item() == 619
