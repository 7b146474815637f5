"""A SimIPU small enough for tests, and a batch it accepts."""

import torch

from simipu_hf.modeling.configuration_simipu import SimIPUConfig

POINTS = 256
TINY_POINTNET2 = {
    "num_points": ((64,), (32,), (16, 16)),
    "fps_sample_ranges": ((-1,), (-1,), (16, -1)),
    "radii": ((2.0, 4.0), (4.0, 8.0), (8.0, 16.0)),
    "num_samples": ((8, 8), (8, 8), (4, 4)),
    "mlp_channels": (((4, 8), (4, 8)), ((8, 8), (8, 8)), ((8, 16), (8, 16))),
    "aggregation_channels": (8, 16, 32),
}


def tiny_config(preset: str = "recommended", architecture: str = "resnet10t", **overrides) -> SimIPUConfig:
    """A ResNet of 10 layers and a PointNet++ with 32 output points."""
    point_config = {**TINY_POINTNET2, **overrides.pop("point_config", {})}
    image_config = {"architecture": architecture, **overrides.pop("image_config", {})}
    return SimIPUConfig.from_preset(
        preset,
        image_config=image_config,
        point_config=point_config,
        projection_dim=16,
        projection_hidden_dim=32,
        **overrides,
    )


def tiny_batch(batch_size: int = 2, height: int = 64, width: int = 96) -> dict[str, torch.Tensor]:
    """Points in front of a pinhole camera that looks along x; the augmented view is turned about z and mirrored."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(batch_size, POINTS, 4, generator=generator)
    points[..., :3] = points[..., :3] * torch.tensor([20.0, 16.0, 4.0]) + torch.tensor([4.0, -8.0, -2.0])
    camera = torch.tensor([[width / 2, -width / 2, 0, 0], [height / 2, 0, -width / 2, 0], [1.0, 0, 0, 0]])
    turn = torch.tensor([[0.8, 0.6, 0, 1], [0.6, -0.8, 0, 2], [0, 0, 1, 0], [0, 0, 0, 1]])
    points_aug = points.clone()
    points_aug[..., :3] = points[..., :3] @ turn[:3, :3].T + turn[:3, 3]
    order = torch.randperm(POINTS, generator=generator)
    return {
        "pixel_values": torch.randn(batch_size, 3, height, width, generator=generator),
        "points": points,
        "points_aug": points_aug[:, order],
        "lidar_to_aug": turn.expand(batch_size, 4, 4).clone(),
        "lidar_to_pixel": camera.expand(batch_size, 3, 4).clone(),
    }
