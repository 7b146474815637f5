"""Where cells look, against gradients of single cells of the untouched network and against known geometry."""

import copy

import pytest
import timm
import torch
from timm.layers import GlobalContext, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d
from timm.layers.cbam import CbamModule
from torch import nn

from simipu_hf.modeling.configuration_simipu import SimIPUConfig, SimIPUImageConfig
from simipu_hf.modeling.feature_grids import measure_feature_grids
from simipu_hf.modeling.geometry import FeatureGrid, sample_feature_map
from simipu_hf.modeling.image_encoder import (
    build_image_encoder,
    configured_grids,
    feature_grids,
    image_feature_maps,
    pad_divisor,
)
from simipu_hf.modeling.modeling_simipu import SimIPUModel

FEW_BLOCKS = {
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)},
    "swinv2_tiny_window8_256": {"depths": (1, 1, 1, 1)},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1)},
    "maxvit_pico_rw_256": {"depths": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"depth": 3},
    "vit_small_patch14_dinov2": {"depth": 3},
    "vit_small_patch16_dinov3": {"depth": 3},
}


def random_encoder(architecture: str, size: tuple[int, int], stage: int) -> tuple[nn.Module, nn.Module, FeatureGrid]:
    """A network in training mode, the same one with mirrored kernels, and where the cells of a stage should look.

    Random kernels shift what a cell sees, mirrored ones shift it back: what is left of both together is geometry.
    """
    torch.manual_seed(0)
    model_args = FEW_BLOCKS.get(architecture)
    config = SimIPUImageConfig(architecture=architecture, out_indices=[stage], image_size=size, model_args=model_args)
    encoder = build_image_encoder(config).train()
    mirrored = copy.deepcopy(encoder)
    for module in mirrored.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.flip(-1, -2).contiguous()
    (grid,) = configured_grids(config)
    return encoder, mirrored, grid


# the image, and what it is padded to: sizes whose last map has a cell in the middle of it
CELL_SIZES = {
    **dict.fromkeys(["resnet18", "regnety_002", "efficientnet_b0"], ((193, 257), (193, 257))),
    **dict.fromkeys(["mobilenetv4_conv_small", "pvt_v2_b0"], ((193, 257), (193, 257))),
    **dict.fromkeys(["convnext_atto", "edgenext_xx_small"], ((155, 219), (160, 224))),
    **dict.fromkeys(["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"], ((155, 219), (160, 224))),
    "hiera_tiny_224": ((155, 219), (160, 224)),
    **dict.fromkeys(["vit_tiny_patch16_224", "vit_small_patch16_dinov3"], ((109, 139), (112, 144))),
    "vit_small_patch14_dinov2": ((95, 123), (98, 126)),
}


def footprint(encoder: nn.Module, images: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Energy `(H, W)` of the gradients of the middle cell of the last stage, along one direction an image."""
    images = images.clone().requires_grad_()
    (feature_map,) = image_feature_maps(encoder, images, [-1])
    rows, columns = feature_map.shape[-2:]
    cell = feature_map[..., rows // 2, columns // 2]
    (gradient,) = torch.autograd.grad((cell * directions[:, : cell.shape[1]]).sum(), images)
    energy = gradient.square().sum(1)
    return (energy / energy.sum((1, 2), keepdim=True)).sum(0)


def centre_of(energy: torch.Tensor, window: int) -> tuple[float, float]:
    """Centre, x and y, of what reaches half of the peak; gates and batch statistics spread little over the image."""
    smooth = nn.functional.avg_pool2d(energy[None], window, stride=1, padding=window // 2, count_include_pad=False)[0]
    smooth = (smooth - smooth.max() / 2).clamp(min=0)
    x, y = (smooth.sum(axis) @ torch.arange(float(smooth.shape[1 - axis])) / smooth.sum() for axis in (0, 1))
    return x.item(), y.item()


@pytest.mark.parametrize("architecture", CELL_SIZES)
def test_cells_look_where_their_gradients_are(architecture):
    """Within one pixel: with random weights, in training mode, at odd sizes."""
    (height, width), padded = CELL_SIZES[architecture]
    encoder, mirrored, grid = random_encoder(architecture, padded, stage=-1)
    for module in (*encoder.modules(), *mirrored.modules()):
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts the last one of a block at 0, which hides the block
    images = nn.functional.pad(torch.randn(4, 3, height, width), (0, padded[1] - width, 0, padded[0] - height))
    directions = torch.randn(4, 2048)
    energy = footprint(encoder, images, directions) + footprint(mirrored, images.flip(-1, -2), directions)
    rows, columns = (-(-length // int(grid.stride_x)) for length in padded)
    middle = grid.pixels((rows, columns)).view(rows, columns, 2)[rows // 2, columns // 2]
    assert centre_of(energy, int(grid.stride_x) + 1) == pytest.approx(middle.tolist(), abs=1)


# encoders whose gradients spread over the whole image, and stages before the last: the coarsest whose features
# tell colours with random weights, which many random kernels that see one channel each hardly leave
COLOUR_STAGES = {"maxvit_pico_rw_256": -1, "efficientvit_m0": 0, "efficientnet_b0": 2, "mobilenetv4_conv_small": 2}
SHIFTS = (-0.5, 0.0, 0.5)  # in cells: what taking a ResNet's map for a ViT's, or the reverse, is off by


def colours_explained(encoder: nn.Module, grid: FeatureGrid, stage: int, size: tuple[int, int]) -> torch.Tensor:
    """R² of the mean colour around shifted pixels, predicted linearly from the features sampled at the pixels."""
    details = [torch.randn(4, 3, *(length // grain + 3 for length in size)) for grain in (8, 16, 32)]
    images = sum(nn.functional.interpolate(detail, size=size, mode="bicubic") for detail in details)
    with torch.no_grad():
        (feature_map,) = image_feature_maps(encoder, images, [stage])
    window = int(grid.stride_x) // 2 * 2 + 1
    colours = nn.functional.avg_pool2d(images, window, stride=1, padding=window // 2, count_include_pad=False)
    corner = torch.tensor([size[1], size[0]]) - 2 * window
    pixels = window + torch.rand(4, 150, 2) * corner
    features = sample_feature_map(feature_map, grid.cells(pixels)).flatten(0, 1)
    features = features @ torch.randn(features.shape[1], min(48, features.shape[1]))  # too few to learn by heart
    features = nn.functional.pad(features - features.mean(0), (0, 1), value=1)
    shifted = [sample_feature_map(colours, pixels + shift * grid.stride_x) for shift in SHIFTS]
    wanted = torch.cat(shifted, dim=-1).flatten(0, 1)
    residual = wanted - features @ torch.linalg.lstsq(features, wanted, driver="gelsd").solution
    return (1 - residual.square().mean(0) / wanted.var(0)).view(len(SHIFTS), 3).mean(1)


@pytest.mark.parametrize("architecture", COLOUR_STAGES)
def test_a_feature_sampled_at_a_pixel_knows_its_colour_best(architecture):
    stage = COLOUR_STAGES[architecture]
    divisor = pad_divisor(architecture)
    size = (192 // divisor * divisor, 256 // divisor * divisor)
    encoder, mirrored, grid = random_encoder(architecture, size, stage)
    explained = sum(colours_explained(network, grid, stage, size) for network in (encoder, mirrored))
    assert explained.argmax() == SHIFTS.index(0), explained / 2


def test_places_do_not_depend_on_the_default_data_type():
    config = SimIPUConfig.from_preset("recommended", image_config={"architecture": "test_resnet"})
    model = SimIPUModel._from_config(config, dtype=torch.float64)
    assert next(model.parameters()).dtype == torch.float64
    assert model.config.image_config.feature_grids[0] == [2.0, 2.0, 0.0, 0.0]


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


def test_weights_that_a_layer_standardises_and_parts_of_gates_do_not_matter():
    convolutions = StdConv2d(3, 4, 3, stride=2), ScaledStdConv2d(4, 4, 2, stride=2, padding=0)
    (grid,) = measure_feature_grids(Chain(*convolutions, reduction=4), (64, 64))
    assert grid == FeatureGrid(4, 4, 1, 1)
    (grid,) = measure_feature_grids(Chain(ScaledStdConv2dSame(3, 4, 2, stride=2), reduction=2), (64, 64))
    assert grid == FeatureGrid(2, 2, 0.5, 0.5)
    (grid,) = measure_feature_grids(
        Chain(nn.Conv2d(3, 8, 4, 4), GlobalContext(8), CbamModule(8), reduction=4), (64, 64)
    )
    assert grid == FeatureGrid(4, 4, 1.5, 1.5)


def test_a_mobilevit_is_padded_to_whole_patches_of_cells():
    assert pad_divisor("mobilevitv2_050") == 64
    grids = feature_grids(timm.create_model("mobilevitv2_050", num_classes=0), [-1])
    assert grids == [FeatureGrid(32, 32, 0, 0)]


def test_irregular_cells_have_no_grid():
    stretched = Chain(nn.Conv2d(3, 4, 4, stride=4), nn.Upsample(size=(20, 20), mode="nearest"), reduction=4)
    assert measure_feature_grids(stretched, (64, 64)) == (None,)
    nowhere = Chain(nn.Conv2d(3, 4, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Upsample(size=(16, 16)), reduction=4)
    assert measure_feature_grids(nowhere, (64, 64)) == (None,)
