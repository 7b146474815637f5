"""The cheap point encoder against the textbook one: group first, compute after, plain PyTorch throughout."""

import copy

import pytest
import torch
from oracles.grouped_pointnet2 import GroupedPointNet2
from tiny_simipu import TINY_POINTNET2

from simipu_hf.modeling.configuration_simipu import SimIPUPointNet2Config
from simipu_hf.modeling.pointnet2 import PointNet2Encoder

XYZ = [{"use_xyz": False}, {"use_xyz": True, "xyz_layer": "first"}, {"use_xyz": True, "xyz_layer": "last"}]


def encoder(dtype: torch.dtype = torch.float64, **fields) -> PointNet2Encoder:
    torch.manual_seed(0)
    made = PointNet2Encoder(SimIPUPointNet2Config(**{**TINY_POINTNET2, **fields})).to(dtype)
    for module in made.modules():
        if hasattr(module, "running_mean"):
            torch.nn.init.normal_(module.weight)  # of both signs: the maximum must turn into a minimum
            torch.nn.init.normal_(module.bias)
    return made


def clouds(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0, size: int = 160) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.rand(2, size, 4, generator=generator, dtype=dtype) * torch.tensor([30, 30, 3, 1], dtype=dtype)
    if kind == "duplicates":
        made[:, size // 2 :] = made[:, : size - size // 2]
    if kind == "grid":  # distances tie, and many neighbours lie exactly on a radius
        made[..., :3] = made[..., :3].round()
    if kind == "sparse":  # rings without any point but the centre
        made[..., :3] *= 100
    return made


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize(
    ("kind", "dilated", "size"),
    [
        *(("random", True, 64), ("random", False, 160), ("duplicates", True, 160), ("duplicates", False, 97)),
        *(("grid", True, 160), ("grid", False, 160), ("sparse", True, 160), ("sparse", False, 131)),
    ],
)
@pytest.mark.parametrize("xyz", XYZ, ids=lambda fields: fields.get("xyz_layer", "none"))
def test_forward_backward_and_running_statistics_equal_the_textbook(xyz, kind, dilated, size, backend):
    fast = encoder(**xyz, dilated_group=dilated, sampling_backend=backend, grouping_backend=backend)
    textbook, points = copy.deepcopy(fast), clouds(kind, size=size)
    clones = [points.clone().requires_grad_() for _ in range(2)]
    actual, expected = fast(clones[0]), GroupedPointNet2(textbook)(clones[1])
    assert torch.equal(actual.indices, expected.indices)
    torch.testing.assert_close(actual.features, expected.features, rtol=1e-8, atol=1e-10)
    upstream = torch.randn(expected.features.shape, generator=torch.Generator().manual_seed(1), dtype=points.dtype)
    (actual.features * upstream).sum().backward()
    (expected.features * upstream).sum().backward()
    torch.testing.assert_close(clones[0].grad, clones[1].grad, rtol=1e-8, atol=1e-8)
    gradients = [{name: p.grad for name, p in network.named_parameters()} for network in (fast, textbook)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(dict(fast.named_buffers()), dict(textbook.named_buffers()), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("xyz", XYZ, ids=lambda fields: fields.get("xyz_layer", "none"))
def test_evaluation_mode_equals_the_textbook(xyz):
    fast = encoder(**xyz)
    fast(clouds("random", seed=3))  # running statistics leave their initial values
    fast.eval()
    points = clouds("random")
    expected = GroupedPointNet2(copy.deepcopy(fast))(points)
    torch.testing.assert_close(fast(points).features, expected.features, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("xyz", XYZ, ids=lambda fields: fields.get("xyz_layer", "none"))
def test_single_precision_far_from_the_sensor(xyz):
    """Offsets of decimetres between coordinates of tens of metres."""
    fast = encoder(torch.float32, **xyz, radii=((0.2, 0.4), (0.4, 0.8), (0.8, 1.6)))
    points = clouds("random", torch.float32)
    points[..., :3] = points[..., :3] * 0.03 + torch.tensor([60.0, 30.0, 1.0])
    textbook = copy.deepcopy(fast).double()
    actual, expected = fast(points).features, GroupedPointNet2(textbook)(points.double()).features
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("xyz", XYZ, ids=lambda fields: fields.get("xyz_layer", "none"))
def test_autocast_changes_nothing(xyz):
    fast = encoder(torch.float32, **xyz)
    points = clouds("random", torch.float32)
    expected = copy.deepcopy(fast)(points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fast(points)
    assert torch.equal(actual.features, expected.features)
    assert torch.equal(actual.indices, expected.indices)


@pytest.mark.parametrize("xyz", XYZ, ids=lambda fields: fields.get("xyz_layer", "none"))
def test_a_bfloat16_encoder_runs_and_learns(xyz):
    low = encoder(torch.bfloat16, **xyz)
    output = low(clouds("random", torch.float32))
    output.features.float().square().mean().backward()
    assert output.features.dtype == torch.bfloat16
    assert output.coordinates.dtype == torch.float32
    assert all(torch.isfinite(parameter.grad).all() for parameter in low.parameters())
