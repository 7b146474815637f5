"""The depth model: loss against its formula, gradients, widths of the decoder."""

import math

import pytest
import timm
import torch

from simipu_hf.modeling.configuration_simipu import SimIPUDepthConfig
from simipu_hf.modeling.modeling_simipu_depth import SimIPUForDepthEstimation, silog_loss


def tiny(**fields) -> SimIPUForDepthEstimation:
    torch.manual_seed(0)
    return SimIPUForDepthEstimation(SimIPUDepthConfig(image_config={"architecture": "test_resnet"}, **fields))


def test_loss_equals_its_formula():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.rand(2, 5, 7, generator=generator, dtype=torch.float64) * 80
    target = torch.rand(2, 5, 7, generator=generator, dtype=torch.float64) * 120  # no upper limit in the loss
    target[torch.rand(2, 5, 7, generator=generator) < 0.6] = 0
    logs = [
        math.log(p + 1e-3) - math.log(t + 1e-3)
        for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True)
        if t > 0
    ]
    mean = math.fsum(logs) / len(logs)
    variance = math.fsum((g - mean) ** 2 for g in logs) / (len(logs) - 1)
    expected = math.sqrt(variance + 0.15 * mean**2)
    assert silog_loss(prediction, target).item() == pytest.approx(expected, rel=1e-12)


def test_loss_has_the_gradient_of_its_formula():
    prediction = (torch.rand(2, 3, 4, dtype=torch.float64) * 50 + 1).requires_grad_()
    target = torch.rand(2, 3, 4, dtype=torch.float64) * 50
    target[:, 0] = 0
    assert torch.autograd.gradcheck(lambda p: silog_loss(p, target), prediction)


@pytest.mark.parametrize("known", [0, 1])
def test_loss_without_enough_targets_is_zero_with_zero_gradient(known):
    prediction = torch.full((1, 2, 2), 5.0, requires_grad=True)
    target = torch.zeros(1, 2, 2)
    target.view(-1)[:known] = 7.0
    loss = silog_loss(prediction, target)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_perfect_prediction_has_no_loss_and_no_nan():
    prediction = torch.full((1, 4, 4), 7.0, requires_grad=True)
    silog_loss(prediction, torch.full((1, 4, 4), 7.0)).backward()
    assert torch.isfinite(prediction.grad).all()


def test_a_prediction_that_is_no_number_has_no_number_for_a_loss():
    prediction = torch.full((1, 4, 4), 9.0)
    prediction[0, 0, 0] = torch.nan
    assert silog_loss(prediction, torch.full((1, 4, 4), 5.0)).isnan()


def test_resnet50_decoder_has_the_published_widths():
    with torch.device("meta"):
        model = SimIPUForDepthEstimation(SimIPUDepthConfig(image_config={"architecture": "resnet50"}))
    assert model.pyramid.stages == [0, 1, 2, 3, 4]
    assert not list(model.pyramid.parameters())
    assert tuple(model.decoder.project.weight.shape) == (2048, 2048, 1, 1)
    shapes = [(tuple(b.conv1.weight.shape[:2]), tuple(b.conv2.weight.shape[:2])) for b in model.decoder.blocks]
    assert shapes == [
        ((1024, 2048 + 1024), (1024, 1024)),
        ((512, 1024 + 512), (512, 512)),
        ((256, 512 + 256), (256, 256)),
        ((128, 256 + 64), (128, 128)),
    ]
    assert tuple(model.decoder.to_depth.weight.shape) == (1, 128, 3, 3)


def test_depth_has_the_size_of_the_labels_or_of_the_image():
    """Encoders of other families, their gradients with them, are in hub/test_every_encoder.py."""
    model = tiny()
    output = model(torch.randn(2, 3, 64, 96), labels=torch.rand(2, 50, 70) * 60)
    assert output.predicted_depth.shape == (2, 50, 70)
    assert output.predicted_depth.min() > 0
    assert output.predicted_depth.max() < 80
    assert model(torch.randn(1, 3, 64, 96)).predicted_depth.shape == (1, 64, 96)


def test_depth_under_autocast_is_not_in_steps_of_half_precision():
    model = tiny().eval()
    torch.nn.init.constant_(model.decoder.to_depth.bias, 3.0)  # where the eight bits of bfloat16 are coarse
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        depth = model(torch.randn(1, 3, 64, 96)).predicted_depth
    assert depth.dtype == torch.float32
    assert len(depth.unique()) > 1000  # of 6144 pixels


def test_random_encoder_keeps_timms_own_initialisation():
    torch.manual_seed(0)
    expected = timm.create_model("resnet18", num_classes=0).state_dict()
    torch.manual_seed(0)
    model = SimIPUForDepthEstimation(SimIPUDepthConfig(image_config={"architecture": "resnet18"}))
    actual = model.image_encoder.state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert actual["layer1.0.bn2.weight"].abs().max() == 0  # timm starts residual branches at zero
    assert model.decoder.blocks[0].conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"out_indices": [1, 2, 3, 7]}, "has stages 0 to 4"),
        ({"decoder_channels": [8]}, "one fewer than stages"),
    ],
)
def test_a_decoder_that_does_not_fit_its_encoder_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)
