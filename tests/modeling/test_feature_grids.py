"""Where cells look, against gradients of single cells of the untouched network and against known geometry."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from simipu_hf.modeling.configuration_simipu import SimIPUImageConfig
from simipu_hf.modeling.feature_grids import measure_feature_grids
from simipu_hf.modeling.geometry import FeatureGrid, sample_feature_map
from simipu_hf.modeling.image_encoder import build_image_encoder, configured_grids, feature_grids, image_feature_maps

# stage, image size, how many cells, and how well so many tell the place, in pixels: footprints of convolutions are
# wide and random, those of patches narrow; the other places in question are half a stride, up to 15.5 pixels, away
FAMILIES = {
    "resnet18": (-1, (256, 287), 32, 1.0),
    "regnety_002": (-1, (256, 287), 96, 2.0),
    "pvt_v2_b0": (-1, (160, 192), 8, 1.0),
    "mobilenetv4_conv_small": (-1, (544, 575), 32, 2.0),
    "efficientvit_m0": (1, (448, 448), 96, 2.0),
    "convnext_atto": (-1, (160, 192), 8, 1.0),
    "edgenext_xx_small": (-1, (160, 192), 8, 1.0),
    "vit_tiny_patch16_224": (-1, (96, 128), 8, 1.0),
    "vit_small_patch14_dinov2": (-1, (98, 126), 8, 1.0),
    "vit_small_patch16_dinov3": (-1, (96, 128), 8, 1.0),
    "swin_tiny_patch4_window7_224": (-1, (96, 160), 8, 1.0),
    "swinv2_tiny_window8_256": (-1, (96, 160), 8, 1.0),
    "hiera_tiny_224": (-1, (96, 160), 8, 1.0),
}
AT_A_TIME = 4


def footprint(encoder: nn.Module, stage: int, size: tuple[int, int], cells: int, stride: int, seed: int):
    """Mean energy `(H, W)` of the gradients of central cells, each moved to the place of one cell; and that cell."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(size)
    for _ in range(0, cells, AT_A_TIME):
        image = torch.randn(AT_A_TIME, 3, *size, generator=generator).requires_grad_()
        (feature_map,) = image_feature_maps(encoder, image, [stage])
        middle = (np.array(feature_map.shape[-2:]) - 1) / 2
        chosen = sorted(np.ndindex(*feature_map.shape[-2:]), key=lambda c: abs(c - middle).sum())[:AT_A_TIME]
        direction = torch.randn(AT_A_TIME, feature_map.shape[1], generator=generator)
        picked = sum((feature_map[k, :, r, c] * direction[k]).sum() for k, (r, c) in enumerate(chosen))
        energy = torch.autograd.grad(picked, image)[0].square().sum(1)
        for one, (r, c) in zip(energy, chosen, strict=True):
            shift = (chosen[0][0] - r) * stride, (chosen[0][1] - c) * stride
            total += (one / one.sum()).roll(shift, (0, 1))
    return total, chosen[0]


def centre_of(energy: torch.Tensor, stride: int) -> np.ndarray:
    """Centre of what reaches half of the peak; what gates and batch statistics spread over the image does not."""
    window = stride + 1
    smooth = nn.functional.avg_pool2d(energy[None], window, stride=1, padding=stride // 2, count_include_pad=False)[0]
    smooth = (smooth - smooth.max() / 2).clamp(min=0)
    return np.array([smooth.sum(1 - axis) @ torch.arange(float(smooth.shape[axis])) / smooth.sum() for axis in (0, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_cells_look_where_their_gradients_are(architecture):
    """With random weights in training mode, at odd sizes too."""
    stage, size, cells, tolerance = FAMILIES[architecture]
    torch.manual_seed(0)
    config = SimIPUImageConfig(architecture=architecture, image_size=size, out_indices=[stage])
    encoder = build_image_encoder(config).train()
    (grid,) = configured_grids(config)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts the last one of a block at 0, which hides the block
    stride = int(grid.stride_x)
    energy, cell = footprint(encoder, stage, size, cells // 2, stride, seed=0)
    for module in encoder.modules():  # the same kernels mirrored: what is left of both together is geometry
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.flip(-1, -2).contiguous()
    energy += footprint(encoder, stage, size, cells // 2, stride, seed=1)[0]
    found = centre_of(energy, stride) - np.array(cell) * stride
    np.testing.assert_allclose(found, [grid.offset_y, grid.offset_x], atol=tolerance)


@pytest.mark.parametrize(
    ("architecture", "stage"), [("test_convnext", 1), ("test_vit", 0), ("test_efficientnet", 2), ("resnet18", 2)]
)
def test_a_feature_sampled_at_a_pixel_knows_its_colour_best(architecture, stage):
    """R² of a pixel's colour, predicted linearly from the feature sampled there, over shifts of the sampling."""
    torch.manual_seed(0)
    sizes = {"dynamic_img_size": True} if "vit" in architecture else {}
    encoder = timm.create_model(architecture, num_classes=0, **sizes)
    (grid,) = feature_grids(encoder, [stage])
    # colours that change within a cell, and mirrored images beside them
    grains = [int(length / grid.stride_x) + 3 for length in (160, 224)]
    images = nn.functional.interpolate(torch.rand(24, 3, *grains), size=(160, 224), mode="bicubic")
    images = torch.cat([images, images.flip(-1)])
    with torch.no_grad():
        (features,) = image_feature_maps(encoder.train(), images, [stage])
    pixels = 48 + torch.rand(len(images), 120, 2) * torch.tensor([128.0, 64.0])
    colours = sample_feature_map(images, pixels).flatten(0, 1)

    def r_squared(shift: float) -> float:
        rows = sample_feature_map(features, grid.cells(pixels + shift)).flatten(0, 1)
        rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
        residual = (colours - rows @ torch.linalg.lstsq(rows, colours, driver="gelsd").solution).square().mean(0)
        return (1 - residual / colours.var(0)).mean().item()

    half = grid.stride_x / 2
    scores = {shift: round(r_squared(shift), 3) for shift in (-half, 0.0, half)}
    assert max(scores, key=scores.get) == 0, scores


def test_padding_at_the_bottom_and_right_moves_no_cell():
    torch.manual_seed(0)
    encoder = build_image_encoder(SimIPUImageConfig(architecture="test_efficientnet", out_indices=[1])).eval()
    image = torch.randn(1, 3, 64, 96)
    (plain,) = image_feature_maps(encoder, image, [1])
    (padded,) = image_feature_maps(encoder, nn.functional.pad(image, (0, 64, 0, 32)), [1])
    torch.testing.assert_close(plain[..., :10, :16], padded[..., :10, :16])


class Chain(nn.Module):
    """A network whose cells' places follow from arithmetic."""

    def __init__(self, *layers: nn.Module, reduction: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.feature_info = [{"reduction": reduction}]

    def forward_intermediates(self, image, **_):
        return [self.layers(image)]


@pytest.mark.parametrize(
    ("layers", "stride", "offset"),
    [
        ([nn.Conv2d(3, 4, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, 1)], 4, 0),
        ([nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4), nn.GELU()], 4, 1.5),
        ([nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2)], 4, 1 + 2),
        ([nn.Conv2d(3, 4, 3, padding=2, dilation=2), nn.AvgPool2d(2)], 2, 0.5),
        ([nn.Conv2d(3, 4, (3, 4), stride=(4, 4), padding=(0, 1))], 4, (1, 0.5)),
    ],
)
def test_places_follow_from_kernels_strides_and_paddings(layers, stride, offset):
    (grid,) = measure_feature_grids(Chain(*layers, reduction=stride), (64, 64))
    y, x = offset if isinstance(offset, tuple) else (offset, offset)
    assert grid == FeatureGrid(stride, stride, y, x)


def test_irregular_cells_have_no_grid():
    stretched = Chain(nn.Conv2d(3, 4, 4, stride=4), nn.Upsample(size=(20, 20), mode="nearest"), reduction=4)
    assert measure_feature_grids(stretched, (64, 64)) == (None,)
    nowhere = Chain(nn.Conv2d(3, 4, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Upsample(size=(16, 16)), reduction=4)
    assert measure_feature_grids(nowhere, (64, 64)) == (None,)
