"""The depth protocol: metrics against a scalar computation, crops pixel by pixel."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simipu_hf.data.depth import DepthFrame
from simipu_hf.errors import SimIPUError
from simipu_hf.evaluation.depth import (
    METRICS,
    DepthProtocol,
    depth_metrics,
    evaluate_maps,
    map_metrics,
    predict_depth,
)
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor

WHOLE = DepthProtocol(crop="none")


def scalar_metrics(prediction: list[float], target: list[float]) -> dict[str, float]:
    """The nine metrics, one pixel at a time, with exact sums."""
    n = len(target)
    pairs = list(zip(prediction, target, strict=True))
    logs = [math.log(p) - math.log(t) for p, t in pairs]
    mean_log = math.fsum(logs) / n
    return {
        **{f"a{power}": sum(max(p / t, t / p) < 1.25**power for p, t in pairs) / n for power in (1, 2, 3)},
        "abs_rel": math.fsum(abs(p - t) / t for p, t in pairs) / n,
        "sq_rel": math.fsum((p - t) ** 2 / t for p, t in pairs) / n,
        "rmse": math.sqrt(math.fsum((p - t) ** 2 for p, t in pairs) / n),
        "rmse_log": math.sqrt(math.fsum(g * g for g in logs) / n),
        "log10": math.fsum(abs(math.log10(p) - math.log10(t)) for p, t in pairs) / n,
        "silog": 100 * math.sqrt(math.fsum((g - mean_log) ** 2 for g in logs) / n),
    }


def test_metrics_equal_a_scalar_computation():
    rng = np.random.default_rng(0)
    target = rng.uniform(0.5, 80, size=400)
    prediction = target * np.exp(rng.normal(0.05, 0.3, size=400))
    actual, expected = depth_metrics(prediction, target), scalar_metrics(prediction.tolist(), target.tolist())
    assert tuple(actual) == METRICS
    for name in METRICS:
        assert actual[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-12), name
    assert depth_metrics(np.array([5.0]), np.array([4.0]))["a1"] == 0  # the threshold does not count itself


@pytest.mark.parametrize(
    ("crop", "height", "width", "box"),
    [
        # 0.40810811*352 = 143.65, 0.99189189*352 = 349.15, 0.03594771*1216 = 43.71, 0.96405229*1216 = 1172.29
        ("garg", 352, 1216, (143, 349, 43, 1172)),
        # the numbers printed by Garg et al.'s evaluation for a full frame
        ("garg", 375, 1242, (153, 371, 44, 1197)),
        # 0.3324324*352 = 117.02, 0.91351351*352 = 321.56, 0.0359477*1216 = 43.71
        ("eigen", 352, 1216, (117, 321, 43, 1172)),
        ("none", 352, 1216, (0, 352, 0, 1216)),
    ],
)
def test_crops_select_exactly_the_published_pixels(crop, height, width, box):
    mask = DepthProtocol(crop).mask(np.full((height, width), 10.0, np.float32))
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = box
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == box
    assert mask.sum() == (bottom - top) * (right - left)


def test_kb_crop_comes_before_the_evaluation_crop():
    depth = np.full((375, 1242), 10.0)
    whole, part = DepthProtocol(kb_crop=True).mask(depth), DepthProtocol().mask(depth[23:, 13:-13])
    assert np.array_equal(whole, np.pad(part, ((23, 0), (13, 13))))
    with pytest.raises(SimIPUError, match=r"frame 3.*352 x 1216.*320"):
        DepthProtocol(kb_crop=True).mask(np.ones((96, 320)), "frame 3")


def test_depth_range_is_open_at_both_ends():
    target = np.array([[0.0, 1e-3, 2e-3, 79.9, 80.0, 90.0]])
    assert WHOLE.mask(target).tolist() == [[False, False, True, True, False, False]]


def test_predictions_are_clamped_and_nan_is_named():
    target = np.full((4, 4), 8.0)
    far = map_metrics("far", np.full((4, 4), np.inf), target, WHOLE)
    assert far["all"]["abs_rel"] == pytest.approx(9.0)
    prediction = np.full((4, 4), 8.0)
    prediction[1, 2] = np.nan
    with pytest.raises(SimIPUError, match=r"frame 7.*NaN at 1"):
        map_metrics("frame 7", prediction, target, WHOLE)
    with pytest.raises(SimIPUError, match="shape"):
        map_metrics("frame 7", prediction[:3], target, WHOLE)


def test_images_count_the_same_and_empty_ones_do_not_count():
    one, many = np.zeros((4, 4)), np.full((4, 4), 10.0)
    one[0, 0] = 10.0
    empty = np.zeros((4, 4))
    pairs = [("a", np.full((4, 4), 15.0), one), ("b", np.full((4, 4), 11.0), many), ("c", many, empty)]
    result = evaluate_maps(pairs, WHOLE)
    assert result["metrics"]["abs_rel"] == pytest.approx((0.5 + 0.1) / 2, rel=1e-12)
    assert result["num_images"] == 3
    assert result["num_images_without_target"] == 1
    assert result["per_range"]["0-20 m"]["abs_rel"] == pytest.approx(0.3, rel=1e-12)
    assert math.isnan(result["per_range"]["20-40 m"]["abs_rel"])
    assert result["per_image"][1]["rmse"] == pytest.approx(1.0)
    with pytest.raises(SimIPUError, match="none of 1 images"):
        evaluate_maps([("c", many, empty)], WHOLE)


@pytest.mark.parametrize(
    ("max_depth", "bounds"),
    [(70, (0, 20, 40, 60, 80)), (80, (0, 20, 40, 60, 80)), (120, (0, 20, 40, 60, 80, 120))],
)
def test_ranges_partition_the_pixels(max_depth, bounds):
    rng = np.random.default_rng(3)
    target = rng.uniform(1, max_depth - 1, (20, 30))
    prediction = target + rng.normal(0, 1, target.shape)
    result = evaluate_maps([("a", prediction, target)], DepthProtocol(crop="none", max_depth=max_depth))
    clamped = np.clip(prediction, 1e-3, max_depth)
    assert list(result["per_range"]) == [f"{low}-{high} m" for low, high in pairwise(bounds)]
    for low, high in pairwise(bounds):
        name, part = f"{low}-{high} m", (target >= low) & (target < high)
        expected = scalar_metrics(clamped[part].tolist(), target[part].tolist())
        assert result["per_range"][name]["rmse"] == pytest.approx(expected["rmse"], rel=1e-12)


def test_flip_test_averages_with_the_mirrored_prediction():
    class Columns(torch.nn.Module):
        """Looks at the column, so that mirroring matters."""

        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.arange(64.0))

        def forward(self, pixel_values):
            return SimpleNamespace(predicted_depth=pixel_values[:, 0] + self.slope)

    image = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    processor = SimIPUImageProcessor(size={"height": 32, "width": 64}, do_normalize=False, pad_size_divisor=1)
    frame = DepthFrame("a", image, np.zeros((32, 64)), np.zeros((32, 64)), (0, 0, 32, 64))
    red, columns = image[..., 0] / 255, np.arange(64.0)
    np.testing.assert_allclose(predict_depth(Columns(), frame, processor), red + columns, rtol=1e-5)
    mean = predict_depth(Columns(), frame, processor, flip_test=True)
    np.testing.assert_allclose(mean, red + (columns + columns[::-1]) / 2, rtol=1e-5)
    padding = SimIPUImageProcessor(size={"height": 32, "width": 64}, do_normalize=False, pad_size_divisor=48)
    np.testing.assert_allclose(predict_depth(Columns(), frame, padding), red + columns, rtol=1e-5)
