"""Sparse encoder: spconv against dense convolution, the whole encoder against a dense one, and its contract."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

spconv = pytest.importorskip("spconv.pytorch", reason="spconv is not installed", exc_type=ImportError)

from simipu_hf.modeling import sparse_encoder  # noqa: E402
from simipu_hf.modeling.configuration_simipu import SimIPUConfig, SimIPUSparseConvConfig  # noqa: E402
from simipu_hf.modeling.modeling_simipu import SimIPUModel  # noqa: E402
from simipu_hf.modeling.sparse_encoder import SparseConvEncoder  # noqa: E402


def tiny_config(**overrides) -> SimIPUSparseConvConfig:
    fields = {
        "voxel_size": (0.5, 0.5, 0.5),
        "point_cloud_range": (-4.0, -3.0, -1.0, 4.0, 3.0, 2.0),
        "channels": (6, 8, 10),
        "blocks_per_stage": (1, 1, 1),
        "num_output_points": 16,
        "output_channels": 12,
    }
    return SimIPUSparseConvConfig(**{**fields, **overrides})


def tiny_encoder(**overrides) -> SparseConvEncoder:
    torch.manual_seed(0)
    return SparseConvEncoder(tiny_config(**overrides))


def random_points(batch: int = 2, dtype=torch.float32) -> torch.Tensor:
    """Points on a wavy surface, some of them outside the range of `tiny_config`."""
    points = torch.rand(batch, 120, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points[..., :2] = points[..., :2] * 9 - 4.5
    points[..., 2] = 0.5 * torch.sin(points[..., 0]) + 0.1 * points[..., 2]
    return points.to(dtype)


def to_dense(rows: torch.Tensor, cells: torch.Tensor, grid: tuple) -> torch.Tensor:
    """Rows (R, C) at cells (R, 4) -> (B, C, Z, Y, X), zero elsewhere."""
    volume = rows.new_zeros(*grid, rows.shape[1]).index_put(tuple(cells.unbind(1)), rows)
    return volume.permute(0, 4, 1, 2, 3)


class DenseEncoder:
    """The same network on dense volumes with occupancy masks, written without the module under test."""

    def __init__(self, weights: dict, config: SimIPUSparseConvConfig) -> None:
        self.weights, self.config = weights, config

    def norm(self, volume, mask, name):
        rows = volume.permute(0, 2, 3, 4, 1)[mask]
        rows = F.batch_norm(
            rows, None, None, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], True,
            eps=self.config.batch_norm_eps,
        )  # fmt: skip
        return to_dense(rows, mask.nonzero(), tuple(mask.shape))

    def conv(self, volume, name, stride=1):
        return F.conv3d(volume, self.weights[f"{name}.weight"].permute(0, 4, 1, 2, 3), stride=stride, padding=1)

    def __call__(self, volume, mask):
        for stage, num_blocks in enumerate(self.config.blocks_per_stage):
            name = f"stages.{stage}.0"
            volume = self.conv(volume, f"{name}.conv", stride=2 if stage else 1)
            if stage:
                ones = torch.ones(1, 1, 3, 3, 3, dtype=volume.dtype)
                mask = F.conv3d(mask[:, None].to(volume), ones, stride=2, padding=1)[:, 0] > 0
            volume = F.relu(self.norm(volume, mask, f"{name}.norm"))
            for block in range(1, num_blocks + 1):
                name = f"stages.{stage}.{block}"
                if not self.config.residual:
                    volume = F.relu(self.norm(self.conv(volume, f"{name}.conv"), mask, f"{name}.norm"))
                    continue
                hidden = F.relu(self.norm(self.conv(volume, f"{name}.conv1"), mask, f"{name}.norm1"))
                hidden = self.norm(self.conv(hidden, f"{name}.conv2"), mask, f"{name}.norm2")
                volume = F.relu(hidden + volume)
        return volume


def cells_by_hand(cloud: np.ndarray, config: SimIPUSparseConvConfig, stride: int = 1) -> dict:
    """(z, y, x) -> raw points in that cell, for one cloud."""
    low, high = np.array(config.point_cloud_range[:3]), np.array(config.point_cloud_range[3:])
    cells = {}
    for point in cloud:
        if (point[:3] >= low).all() and (point[:3] < high).all():
            x, y, z = np.floor((point[:3] - low) / np.array(config.voxel_size)).astype(int) // stride
            cells.setdefault((z, y, x), []).append(point)
    return cells


@pytest.mark.parametrize("residual", [True, False])
def test_encoder_equals_a_dense_encoder_in_float64(residual):
    config = tiny_config(residual=residual, num_output_points=200)
    encoder = tiny_encoder(residual=residual, num_output_points=200).double()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    points = random_points(dtype=torch.float64)
    output = encoder(points)

    low, high = np.array(config.point_cloud_range[:3]), np.array(config.point_cloud_range[3:])
    volume, mask = torch.zeros(2, 4, 6, 12, 16, dtype=torch.float64), torch.zeros(2, 6, 12, 16, dtype=torch.bool)
    for b, cloud in enumerate(points.numpy()):
        for (z, y, x), members in cells_by_hand(cloud, config).items():
            mean = np.mean(members, axis=0)
            mean[:3] = 2 * (mean[:3] - low) / (high - low) - 1
            volume[b, :, z, y, x], mask[b, z, y, x] = torch.from_numpy(mean), True
    weights = {name: p.detach().clone().requires_grad_() for name, p in encoder.named_parameters()}
    dense = DenseEncoder(weights, config)(volume, mask)

    generator = torch.Generator().manual_seed(3)
    loss, expected_loss = 0, 0
    for b, cloud in enumerate(points.numpy()):
        sites = cells_by_hand(cloud, config, stride=4)
        found = {tuple(np.round(np.mean(m, axis=0)[:3], 9)): site for site, m in sites.items()}
        assert output.mask[b].sum() == len(sites)
        for slot in output.mask[b].nonzero().flatten():
            z, y, x = found.pop(tuple(np.round(output.coordinates[b, slot].numpy(), 9)))
            expected = F.linear(dense[b, :, z, y, x], weights["projection.weight"], weights["projection.bias"])
            torch.testing.assert_close(output.features[b, slot], expected, rtol=1e-9, atol=1e-9)
            cotangent = torch.randn(12, generator=generator, dtype=torch.float64)
            loss = loss + (output.features[b, slot] * cotangent).sum()
            expected_loss = expected_loss + (expected * cotangent).sum()
        assert not found
    loss.backward()
    expected_loss.backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-7, atol=1e-9, msg=name)


def test_chosen_sites_are_distinct_and_hold_the_mean_of_their_points():
    encoder = tiny_encoder(num_output_points=7).eval()
    points = random_points()
    output = encoder(points)
    assert output.coordinates.shape == (2, 7, 3)
    assert output.features.shape == (2, 7, 12)
    assert output.indices is None
    assert output.mask.dtype == torch.bool
    assert output.mask.all()
    for cloud, chosen in zip(points.numpy(), output.coordinates.numpy(), strict=True):
        means = [np.mean(m, axis=0)[:3] for m in cells_by_hand(cloud, tiny_config(), stride=4).values()]
        assert len(means) > 7
        distance = np.linalg.norm(chosen[:, None] - np.array(means)[None], axis=-1)
        assert distance.min(1).max() < 1e-5
        assert len(set(distance.argmin(1))) == 7


def test_slots_without_a_site_are_masked_and_zero():
    encoder = tiny_encoder(num_output_points=50).eval()
    points = random_points()
    points[1] = points[1, :1]  # one site
    output = encoder(points)
    assert output.mask[1].tolist() == [True] + [False] * 49
    torch.testing.assert_close(output.coordinates[1, 0], points[1, 0, :3])
    assert (output.mask.int().diff(dim=1) <= 0).all()
    assert not output.coordinates[~output.mask].any()
    assert not output.features[~output.mask].any()
    assert output.features[output.mask].abs().sum(1).min() > 0


def test_points_outside_the_range_change_nothing():
    encoder = tiny_encoder().eval()
    points = random_points()
    far = torch.tensor([[4.0, 0, 0, 0.5], [0, 0, -1.01, 0.5], [float("nan"), 0, 0, 0.5], [0, float("inf"), 0, 0.5]])
    both = torch.cat([points, far.expand(2, 4, 4)], dim=1)
    expected, output = encoder(points), encoder(both)
    assert torch.equal(output.coordinates, expected.coordinates)
    assert torch.equal(output.features, expected.features)


def test_runs_repeat_bit_for_bit():
    def run():
        encoder = tiny_encoder()
        output = encoder(random_points())
        output.features.square().sum().backward()
        return [output.coordinates, output.features.detach(), *(p.grad for p in encoder.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_grid_size_is_free_of_rounding():
    default = SparseConvEncoder(SimIPUSparseConvConfig())
    assert default._grid(torch.zeros(2, 1, 4)) == (2, 90, 1600, 1600)
    assert tiny_encoder(voxel_size=(0.7, 0.5, 0.5))._grid(torch.zeros(1, 1, 4)) == (1, 6, 12, 12)


def test_without_gradient_the_batch_norms_still_follow_the_data():
    encoder = tiny_encoder()
    with torch.no_grad():
        output = encoder(random_points())
    assert not output.features.requires_grad
    assert all(b.item() == 1 for name, b in encoder.named_buffers() if name.endswith("num_batches_tracked"))
    assert all(b.any() for name, b in encoder.named_buffers() if name.endswith("running_mean"))


def test_batch_norms_follow_the_configuration():
    norms = [m for m in tiny_encoder(batch_norm_eps=0.02, batch_norm_momentum=0.3).modules() if hasattr(m, "eps")]
    assert len(norms) == 3 + 2 * 3
    assert all((norm.eps, norm.momentum) == (0.02, 0.3) for norm in norms)


def test_a_single_point_per_cloud_is_enough():
    encoder = tiny_encoder()
    points = torch.tensor([[[0.1, 0.2, 0.3, 0.5]], [[1.1, -2.0, 0.0, 0.1]]])
    output = encoder(points)
    output.features.sum().backward()
    assert torch.isfinite(output.features).all()
    torch.testing.assert_close(output.coordinates[:, 0], points[:, 0, :3])
    assert torch.isfinite(encoder.eval()(points[:1]).features).all()


def test_autocast_leaves_the_convolutions_in_float32_and_every_parameter_its_gradient():
    encoder = tiny_encoder().eval()
    points = random_points()
    expected = encoder(points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = encoder(points)
    assert output.features.dtype == torch.bfloat16
    assert torch.equal(output.coordinates, expected.coordinates)
    torch.testing.assert_close(output.features.float(), expected.features, rtol=2e-2, atol=2e-2)
    output.features.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in encoder.parameters())


def test_a_model_in_bfloat16_runs_and_agrees():
    points = random_points()
    expected = tiny_encoder().eval()(points)
    encoder = tiny_encoder().to(torch.bfloat16)
    encoder(points).features.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in encoder.parameters())
    output = tiny_encoder().to(torch.bfloat16).eval()(points)
    assert output.features.dtype == torch.bfloat16
    assert output.coordinates.dtype == torch.float32
    similarity = F.cosine_similarity(output.features.float(), expected.features, dim=-1)
    assert similarity[output.mask].min() > 0.98


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(10, 4), r"must be \(B, N, 4\)"),
        (torch.zeros(2, 10, 3), r"must be \(B, N, 4\)"),
        (torch.tensor([0, 100.0]).view(2, 1, 1).expand(2, 120, 4), r"points\[1\]: none of its 120 points"),
    ],
)
def test_points_that_cannot_be_encoded_are_named(points, message):
    with pytest.raises(ValueError, match=message):
        tiny_encoder()(points)


def test_more_cells_than_spconv_numbers_on_the_cpu_are_refused():
    encoder = SparseConvEncoder(SimIPUSparseConvConfig())  # 2**32 over 1600 x 1600 x 90 voxels is 18.6
    with pytest.raises(ValueError, match="at most 18 clouds"):
        encoder(torch.zeros(52, 1, 4))


def test_without_spconv_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(sparse_encoder, "spconv", None)
    with pytest.raises(ImportError, match=r"simipu-hf\[spconv\]"):
        tiny_encoder()


def test_the_stream_is_replaced_only_where_there_is_no_cuda(monkeypatch):
    def original():
        return 7

    monkeypatch.setattr(spconv.ops, "get_current_stream", original)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tiny_encoder()
    assert spconv.ops.get_current_stream is original
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny_encoder()
    assert spconv.ops.get_current_stream() == 0


def test_missing_weights_are_initialised_and_loaded_ones_kept(tmp_path):
    model = SimIPUModel(SimIPUConfig(image_config={"architecture": "test_resnet"}, point_config=tiny_config()))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    missing = "point_encoder.stages.1.0.conv.weight"
    model.save_pretrained(tmp_path)
    save_file({k: v for k, v in state.items() if k != missing}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = SimIPUModel.from_pretrained(tmp_path, output_loading_info=True)
    assert list(info["missing_keys"]) == [missing]
    assert not info["unexpected_keys"]
    values = loaded.state_dict()
    std = (2 / (27 * 6)) ** 0.5
    assert values[missing].std().item() == pytest.approx(std, rel=0.1)
    assert all(torch.equal(values[name], value) for name, value in state.items() if name != missing)


def test_default_encoder_on_a_real_frame(kitti_mini):
    scan = np.fromfile(sorted((kitti_mini / "training" / "velodyne").glob("*.bin"))[0], dtype="<f4").reshape(-1, 4)
    ahead = scan[(scan[:, 0] > 0) & (np.abs(scan[:, 1]) < scan[:, 0])]
    points = torch.from_numpy(ahead[:: max(1, len(ahead) // 16384)][:16384].copy())[None]
    with torch.no_grad():
        output = SparseConvEncoder(SimIPUSparseConvConfig()).eval()(points)
    assert output.features.shape == (1, 1024, 256)
    assert torch.isfinite(output.features).all()
    assert output.mask.float().mean() > 0.4
    distance = torch.cdist(output.coordinates[output.mask], points[0, :, :3]).min(1).values
    assert distance.max() < 0.8 * 3**0.5  # within the site of 0.8 m
    assert distance.median() < 0.2
