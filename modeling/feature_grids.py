"""Where the cells of an image encoder's feature maps look, measured from the network itself.

A ResNet's cell j of stride s is centred on pixel `s * j`, a ViT's patch on `s * j + (s - 1) / 2`, and other families
lie between. What decides is kernels, strides and paddings, so the network is rebuilt as a chain of plain averages: the
gradient of one of its cells is then the exact footprint of that cell on the image, and its centre the cell's place.
"""

import re
from functools import partial
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from .geometry import FeatureGrid

# of a footprint only what reaches this share of its peak counts: what attention spreads over the image is far below
LEAST_SHARE = 0.1
# a stage is regular if its cells lie on a line within this share of its stride
TOLERANCE = 0.1

GATES = re.compile("SqueezeExcite|SqueezeAndExcite|SEModule|SEBlock|EcaModule|Cbam|GatherExcite|GlobalContext$")
ATTENTION = re.compile("Attention|Attn|LiteMLA")


@torch.enable_grad()
def measure_feature_grids(network: Any, image_size: tuple[int, int]) -> tuple[FeatureGrid | None, ...]:
    """The grid of every stage of a timm model; `None` where the cells do not lie on one.

    Args:
        network: on the CPU; it is of no use afterwards.
        image_size: height and width to measure with, some seven cells of the coarsest stage each.
    """
    _make_averaging(network.float())
    reductions = [stage["reduction"] for stage in network.feature_info]
    # three copies of the image: the footprints of three neighbouring cells in one backward pass
    image = torch.ones(3, 3, *image_size, dtype=torch.float32, requires_grad=True)
    maps = network.forward_intermediates(image, intermediates_only=True)
    grids: list[FeatureGrid | None] = []
    for stage, feature_map in enumerate(maps):
        inside_run = 0 < stage < len(maps) - 1 and reductions[stage - 1] == reductions[stage] == reductions[stage + 1]
        # layers of a plain ViT: the last is measured, the others lie where the first does
        grids.append(grids[-1] if inside_run else _grid_of(feature_map, image, reductions[stage]))
    return tuple(grids)


class _Rescale(nn.Module):
    """In place of a normalisation: keeps values near 1, linear in its input."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden / hidden.detach().abs().mean().clamp(min=1)


@torch.no_grad()
def _make_averaging(network: nn.Module) -> None:
    """Turn every operation into a plain average, and attention into little where something else carries the map."""
    network.eval().requires_grad_(False)
    replaced: tuple[str, ...] = ()
    for name, module in list(network.named_modules()):
        if name.startswith(replaced):  # a part of what is gone
            continue
        replacement = _replacement(module)
        if name and replacement is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, replacement)
            replaced += (f"{name}.",)
        elif isinstance(module, nn.Conv2d) and "StdConv" in type(module).__name__:
            # would standardise its weights, all equal here, to 0
            plain: Any = Conv2dSame if getattr(module, "same_pad", False) else nn.Conv2d
            vars(module)["forward"] = partial(plain.forward, module)
        elif _is_attention(module) and not any(_is_attention(part) for part in module.modules() if part is not module):
            module.register_forward_hook(_damp)
    for name, parameter in network.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf.endswith("weight") and parameter.ndim > 1:
            parameter.fill_(1 / parameter[0].numel())
        else:  # biases and position embeddings to 0, layer scales to 1
            parameter.fill_(1.0 if leaf.startswith(("gamma", "scale")) else 0.0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _keeps_its_place(module):
            # sharp footprints: the centre tap alone, which is where an odd "same" kernel has its centre
            rows, columns = module.kernel_size
            module.weight.zero_()
            module.weight[:, :, rows // 2, columns // 2] = 1 / module.weight.shape[1]


def _replacement(module: nn.Module) -> nn.Module | None:
    kind = type(module)
    parameters = list(module.parameters())
    if "Norm" in kind.__name__ and all(parameter.ndim <= 1 for parameter in parameters):
        return _Rescale()
    activations = ("torch.nn.modules.activation", "timm.layers.activations")
    is_activation = kind.__module__.startswith(activations) and not parameters and "Softmax" not in kind.__name__
    if is_activation or GATES.search(kind.__name__):
        return nn.Identity()
    if isinstance(module, nn.MaxPool2d):
        return nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
    return None


def _is_attention(module: nn.Module) -> bool:
    return ATTENTION.search(type(module).__name__) is not None


def _damp(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return output[0] * 1e-3, *output[1:]
    return output * 1e-3


def _keeps_its_place(conv: nn.Conv2d) -> bool:
    """Whether its cells lie where those of its input do."""
    if max(conv.stride) > 1 or not all(size % 2 for size in conv.kernel_size):
        return False
    if "Same" in type(conv).__name__ or conv.padding == "same":
        return True
    if isinstance(conv.padding, str):  # "valid"
        return max(conv.kernel_size) == 1
    reach = zip(conv.kernel_size, conv.padding, conv.dilation, strict=True)
    return all(2 * padding == dilation * (size - 1) for size, padding, dilation in reach)


def _grid_of(feature_map: Tensor, image: Tensor, reduction: int) -> FeatureGrid | None:
    if min(feature_map.shape[-2:]) < 3:
        return None
    # three cells on a diagonal through the middle, far enough from the borders for footprints to be whole
    middle = [length // 2 for length in feature_map.shape[-2:]]
    step = max(1, min(feature_map.shape[-2:]) // 8)
    cells = [feature_map[k, :, middle[0] + (k - 1) * step, middle[1] + (k - 1) * step] for k in range(3)]
    (footprints,) = torch.autograd.grad(torch.stack(cells).sum(), image, retain_graph=True)
    footprints = footprints.sum(1).double()
    footprints = footprints.where(footprints >= LEAST_SHARE * footprints.amax((1, 2), keepdim=True), 0)
    offsets = []
    for axis, index in ((2, middle[0]), (1, middle[1])):
        profile = footprints.sum(axis)
        before, place, after = (profile @ torch.arange(profile.shape[1]).double() / profile.sum(1)).tolist()
        irregularity = max(abs(place - before - step * reduction), abs(after - place - step * reduction))
        if not irregularity <= TOLERANCE * reduction:  # also where it is not a number
            return None
        offsets.append(round(place - index * reduction, 2) + 0.0)
    return FeatureGrid(float(reduction), float(reduction), offsets[0], offsets[1])
