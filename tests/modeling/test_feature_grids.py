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

# stage, image size, and how many cells: footprints of convolutions are wide and random, those of patches narrow
FAMILIES = {
    "resnet18": (-1, (256, 287), 16),
    "regnety_002": (-1, (256, 287), 32),
    "efficientnet_b0": (-1, (256, 287), 32),
    "tf_efficientnet_b0": (-1, (256, 288), 32),
    "mobilenetv4_conv_small": (-1, (256, 287), 32),
    "fastvit_t8": (-1, (256, 288), 16),
    "efficientvit_m0": (1, (448, 448), 32),
    "convnext_atto": (-1, (160, 192), 4),
    "edgenext_xx_small": (-1, (160, 192), 4),
    "vit_tiny_patch16_224": (-1, (96, 128), 4),
    "vit_small_patch14_dinov2": (-1, (98, 126), 4),
    "swin_tiny_patch4_window7_224": (-1, (96, 160), 4),
    "swinv2_tiny_window8_256": (-1, (96, 160), 4),
    "hiera_tiny_224": (-1, (96, 160), 4),
}


def footprint_offset(encoder: nn.Module, stage: int, size: tuple[int, int], cells: int, stride: int) -> np.ndarray:
    """Centre of the gradients of central cells, less index * stride: y and x, in pixels.

    A gradient of a random network is noise with an envelope: energies are averaged over cells, each shifted to the
    place of cell (0, 0), smoothed, and what is spread over the whole image (batch statistics, gates) is cut off.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(cells, 3, *size, generator=generator).requires_grad_()
    (feature_map,) = image_feature_maps(encoder, image, [stage])
    rows, columns = feature_map.shape[-2:]
    near = sorted(np.ndindex(rows, columns), key=lambda c: abs(c[0] - (rows - 1) / 2) + abs(c[1] - (columns - 1) / 2))
    chosen = [near[k % 4] for k in range(cells)]
    direction = torch.randn(cells, feature_map.shape[1], generator=generator)
    total = sum((feature_map[k, :, r, c] * direction[k]).sum() for k, (r, c) in enumerate(chosen))
    energy = torch.autograd.grad(total, image)[0].square().sum(1)
    energy /= energy.sum((1, 2), keepdim=True)
    middle = near[0]
    shifts = [((middle[0] - r) * stride, (middle[1] - c) * stride) for r, c in chosen]
    mean = torch.stack([e.roll(shift, (0, 1)) for e, shift in zip(energy, shifts, strict=True)]).mean(0)
    window = stride // 2 + 1
    mean = nn.functional.avg_pool2d(mean[None], window, stride=1, padding=window // 2, count_include_pad=False)[0]
    mean = (mean - mean.max() / 3).clamp(min=0)
    places = [mean.sum(1 - axis) @ torch.arange(float(mean.shape[axis])) / mean.sum() for axis in (0, 1)]
    return np.array([place - index * stride for place, index in zip(places, middle, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_cells_look_where_their_gradients_are(architecture):
    """Within a pixel at stride 32, with random weights in training mode, at odd sizes too."""
    stage, size, cells = FAMILIES[architecture]
    torch.manual_seed(0)
    config = SimIPUImageConfig(architecture=architecture, image_size=size, out_indices=[stage])
    encoder = build_image_encoder(config).train()
    (grid,) = configured_grids(config)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts the last one of a block at 0, which hides the block
    found = footprint_offset(encoder, stage, size, cells, int(grid.stride_x))
    np.testing.assert_allclose(found, [grid.offset_y, grid.offset_x], atol=1)


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
