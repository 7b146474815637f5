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


def fill(shapes: dict[str, list[int]], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Values that depend on each entry's name alone; variances are small and varied."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
            continue
        random = np.random.default_rng(zlib.crc32(name.encode()))
        values = torch.from_numpy(random.random(shape, dtype=np.float32)).to(dtype)
        if name.endswith("running_var"):
            values = 0.002 + values * 0.5
        elif len(shape) > 1:
            values = (2 * values - 1) * (3 / np.prod(shape[1:])) ** 0.5
        elif name.endswith("weight"):
            values = 0.5 + values * 0.2
        else:
            values = 0.1 * values - 0.05
        state[name] = values.contiguous()
    return state
