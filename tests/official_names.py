"""Names and shapes of the official network's state dict, written down from its configuration, and values for them."""

import zlib

import numpy as np
import torch
import torchvision

HEADS = {"mlp_cross_points": 1024, "mlp_cross_img": 2048, "mlp_intro_points": 1024}
NORM = ("weight", "bias", "running_mean", "running_var")


def _norm(name: str, width: int) -> dict[str, list[int]]:
    return {f"{name}.{leaf}": [width] for leaf in NORM} | {f"{name}.num_batches_tracked": []}


def resnet_shapes(architecture: str = "resnet50") -> dict[str, list[int]]:
    """torchvision's, whose names mmdetection's ResNet has."""
    with torch.device("meta"):
        state = getattr(torchvision.models, architecture)(weights=None).state_dict()
    return {name: list(value.shape) for name, value in state.items() if not name.startswith("fc.")}


def point_shapes(use_xyz=False) -> dict[str, list[int]]:
    levels = (
        ((32, 32, 64), (32, 32, 64), (64, 64, 128)),
        ((64, 64, 128), (64, 64, 128), (128, 128, 256)),
        ((128, 128, 256), (128, 128, 256), (256, 256, 512)),
    )
    shapes, width = {}, 1
    for i, (scales, aggregated) in enumerate(zip(levels, (128, 256, 1024), strict=True)):
        for s, channels in enumerate(scales):
            fan_in = width + 3 * use_xyz
            for k, out in enumerate(channels):
                name = f"SA_modules.{i}.mlps.{s}.layer{k}"
                shapes |= {f"{name}.conv.weight": [out, fan_in, 1, 1], f"{name}.conv.bias": [out]}
                shapes |= _norm(f"{name}.bn", out)
                fan_in = out
        name = f"aggregation_mlps.{i}"
        total = sum(channels[-1] for channels in scales)
        shapes |= {f"{name}.conv.weight": [aggregated, total, 1], f"{name}.conv.bias": [aggregated]}
        shapes |= _norm(f"{name}.bn", aggregated)
        width = aggregated
    return shapes


def official_shapes(use_xyz=False, architecture="resnet50") -> dict[str, list[int]]:
    shapes = {f"img_backbone.{name}": shape for name, shape in resnet_shapes(architecture).items()}
    shapes |= {f"pts_backbone.{name}": shape for name, shape in point_shapes(use_xyz).items()}
    image_width = {"resnet18": 512, "resnet50": 2048}[architecture]
    for head, width in {**HEADS, "mlp_cross_img": image_width}.items():
        for k, out in enumerate((width, width, 128), start=1):
            shapes |= {f"{head}.layer{k}.0.weight": [out, width], f"{head}.layer{k}.0.bias": [out]}
            shapes |= _norm(f"{head}.layer{k}.1", out)
    for k in (1, 2):
        shapes |= {f"img_conv1x1_{k}.weight": [image_width, image_width, 1, 1], f"img_conv1x1_{k}.bias": [image_width]}
    return shapes


def official_tensor(name: str, shape: list[int]) -> torch.Tensor:
    """The value that the reference step gives to the official parameter or buffer `name`, in float64."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    seed = zlib.crc32(name.encode()) % 9973
    t = 12.9898 * (np.arange(int(np.prod(shape)), dtype=np.float64) + 1) + 78.233 * seed
    h = 43758.5453 * np.sin(t)
    v = torch.from_numpy((2 * (h - np.floor(h)) - 1).reshape(shape))
    if name.endswith("running_var"):
        return 1 + 0.1 * v
    if name.endswith("running_mean"):
        return 0.05 * v
    if len(shape) == 1:
        return 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
    return v * np.sqrt(3) * np.sqrt(2 / np.prod(shape[1:]))


def fill(shapes: dict[str, list[int]], dtype=torch.float32) -> dict[str, torch.Tensor]:
    values = {name: official_tensor(name, shape) for name, shape in shapes.items()}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}
