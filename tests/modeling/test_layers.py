import pytest
import torch
from torch import nn

from simipu_hf.modeling.layers import ProjectionHead, WeightedBatchNorm, linear


def repeated_and_weighted(dtype: torch.dtype = torch.float64):
    """The same rows twice: each listed as often as it counts, and listed once with that count."""
    torch.manual_seed(0)
    rows = (torch.randn(40, 6, dtype=dtype) * 3 + 2).requires_grad_()
    counts = torch.randint(0, 5, (40,))
    return rows, counts, torch.arange(40).repeat_interleave(counts)


def test_weighted_batch_norm_equals_batch_norm_of_repeated_rows():
    rows, counts, repeated = repeated_and_weighted()
    ours = WeightedBatchNorm(6, eps=1e-3, momentum=0.2).double()
    theirs = nn.BatchNorm1d(6, eps=1e-3, momentum=0.2).double()
    with torch.no_grad():
        for tensor in (ours.weight, ours.bias):
            tensor.normal_()
    theirs.load_state_dict(ours.state_dict())

    upstream = torch.randn(len(repeated), 6, dtype=torch.float64)
    expected = theirs(rows[repeated])
    (expected * upstream).sum().backward()
    expected_grad, rows.grad = rows.grad, None

    actual = ours(rows, counts.double())
    (actual[repeated] * upstream).sum().backward()

    torch.testing.assert_close(actual[repeated], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.grad, expected_grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-10, atol=1e-12)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.state_dict()[name], buffer, rtol=1e-12, atol=1e-12)

    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(rows), theirs(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rows_keep_their_dtype_and_float32_statistics(dtype):
    rows, counts, *_ = repeated_and_weighted(torch.float32)
    norm, reference = WeightedBatchNorm(6), WeightedBatchNorm(6)
    low = norm(rows.to(dtype), counts.float())
    assert low.dtype == dtype
    assert norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(low.float(), reference(rows, counts.float()), rtol=0.05, atol=0.05)


def test_projection_head_is_the_official_stack():
    """Whose batch norms have no weights for rows."""
    torch.manual_seed(0)
    head = ProjectionHead(8, 4)
    rows = torch.randn(20, 8)
    stack = nn.Sequential(
        *[nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()],
        *[nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()],
        *[nn.Linear(8, 4), nn.BatchNorm1d(4)],
    )
    ours = [tensor for name, tensor in head.state_dict().items()]
    stack.load_state_dict(dict(zip(stack.state_dict(), ours, strict=True)))
    torch.testing.assert_close(head(rows), stack(rows))
    torch.testing.assert_close([*head.state_dict().values()], [*stack.state_dict().values()])


@pytest.mark.parametrize("shape", [(1, 128, 128), (300, 256, 128), (77, 130, 257)])
def test_wide_linear_is_linear(shape):
    torch.manual_seed(0)
    rows = torch.randn(shape[0], shape[1], requires_grad=True)
    layer = nn.Linear(shape[1], shape[2])
    upstream = torch.randn(shape[0], shape[2])
    ours = linear(rows, layer.weight, layer.bias)
    torch.testing.assert_close(ours, layer(rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear(rows, layer.weight), rows @ layer.weight.T, rtol=1e-4, atol=1e-5)
    inputs = [rows, layer.weight, layer.bias]
    expected = torch.autograd.grad((layer(rows) * upstream).sum(), inputs)
    for actual, theirs in zip(torch.autograd.grad((ours * upstream).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(actual, theirs, rtol=1e-4, atol=1e-4)


def test_wide_linear_under_anomaly_detection_and_twice_differentiated():
    rows, weight = torch.randn(4, 128, requires_grad=True), torch.randn(128, 128, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        (grad,) = torch.autograd.grad(linear(rows, weight).square().sum(), rows, create_graph=True)
    torch.testing.assert_close(grad, 2 * rows @ weight.T @ weight)
    grad.sum().backward()
    assert weight.grad.abs().sum() > 0


def test_linear_takes_part_of_a_wide_weight():
    torch.manual_seed(0)
    rows, wide = torch.randn(40, 130), torch.randn(140, 300, requires_grad=True)
    part = wide.split([130, 170], dim=1)[0]
    torch.testing.assert_close(linear(rows, part), rows @ part.T, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(linear(rows, part).square().sum(), wide)
    (expected,) = torch.autograd.grad((rows @ part.T).square().sum(), wide)
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-2)


def test_statistics_are_not_in_half_precision_under_autocast():
    rows = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0)) + 300
    weight = torch.full((4096,), 3.0)
    norm = WeightedBatchNorm(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(rows, weight)
    expected = (rows - rows.mean(0)) / rows.var(0, unbiased=False).add(1e-5).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
