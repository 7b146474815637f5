"""The whole way of every family of encoders at two sizes: pre-train, export, each loading line, fine-tune, serve."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from conftest import close
from depth_rows import make_rows
from PIL import Image
from tiny_simipu import tiny_batch, tiny_config
from torch import nn
from transformers import AutoImageProcessor, AutoModel, pipeline

from simipu_hf.data.rows import dataset_from_rows
from simipu_hf.finetune_depth import trainer_parts
from simipu_hf.finetuning import find_rgb_encoder
from simipu_hf.hub.export import export_image_encoder
from simipu_hf.hub.sources import load_image_encoder
from simipu_hf.modeling.image_encoder import pad_divisor, pad_to_divisor
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.training.arguments import DepthArguments

FEW = (1, 1, 1, 1)
FAMILIES = {  # what height and width must be multiples of, and which arguments leave few and narrow blocks
    "resnet18": (32, {}),
    "convnext_tiny": (32, {"depths": FEW, "dims": (16, 32, 64, 128)}),
    "vit_tiny_patch16_224": (16, {"depth": 4, "embed_dim": 96}),
    "vit_small_patch14_dinov2": (14, {"depth": 4, "embed_dim": 96}),
    "vit_small_patch16_dinov3": (16, {"depth": 4, "embed_dim": 96}),
    "swin_tiny_patch4_window7_224": (32, {"depths": FEW, "embed_dim": 24}),
    "swinv2_tiny_window8_256": (32, {"depths": FEW, "embed_dim": 24}),
    "hiera_tiny_224": (32, {"stages": FEW, "embed_dim": 24}),
    "maxvit_nano_rw_256": (32, {"depths": FEW, "embed_dim": (32, 32, 64, 96)}),
    "efficientnet_b0": (32, {}),
    "mobilenetv4_conv_small": (32, {}),
    "regnety_002": (32, {}),
    "efficientvit_m0": (64, {}),
}
ODD = (61, 203)


def two_steps(model: nn.Module, **batch: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        assert torch.isfinite(output.loss)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_whole_way(architecture, tmp_path):
    divisor, model_args = FAMILIES[architecture]
    assert pad_divisor(architecture) == divisor
    model = pretrain(architecture, model_args, ODD, divisor)
    model.save_pretrained(tmp_path / "run")
    SimIPUProcessor.from_preset("recommended", image_size=ODD).save_pretrained(tmp_path / "run")
    encoder = export_image_encoder(tmp_path / "run", tmp_path / "encoder").path
    check_loading_lines(model.eval(), tmp_path / "run", encoder)
    check_depth(encoder, (64, 192), tmp_path / "depth")


def pretrain(architecture: str, model_args: dict, size: tuple[int, int], divisor: int) -> SimIPUForPreTraining:
    torch.manual_seed(0)
    image_config = {"image_size": size, "model_args": model_args}
    model = SimIPUForPreTraining(tiny_config(architecture=architecture, image_config=image_config))
    height, width = (math.ceil(length / divisor) * divisor for length in size)
    batch = tiny_batch(1, height=height, width=width)
    two_steps(model, **batch, image_sizes=torch.tensor([size]))
    features = model.simipu.get_image_features(batch["pixel_values"])
    for feature_map, grid in zip(features, model.stage_grids(features, (height, width)), strict=True):
        assert tuple(feature_map.shape[-2:]) == (height // grid.stride_y, width // grid.stride_x)
    return model


@torch.no_grad()
def check_loading_lines(model: SimIPUForPreTraining, run: Path, folder: Path) -> None:
    """Each line computes the trained features of the image that the folder's own processor makes."""
    encoder = model.simipu.image_encoder
    pixels = AutoImageProcessor.from_pretrained(folder)(Image.new("RGB", (640, 192)), return_tensors="pt").pixel_values
    features, maps = encoder.forward_features(pixels), encoder.forward_intermediates(pixels, intermediates_only=True)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    close(plain.forward_features(pixels), features)
    assert tuple(timm.data.resolve_model_data_config(plain)["input_size"][1:]) == tuple(pixels.shape[-2:])
    coarsest = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()(pixels)[-1]
    # timm's pyramid of a Swin has its channels last
    close(coarsest if coarsest.shape == maps[-1].shape else coarsest.permute(0, 3, 1, 2), maps[-1])
    close(AutoModel.from_pretrained(folder).eval()(pixels).last_hidden_state, features)
    close(load_image_encoder(folder, verbose=False)[0].eval().forward_features(pixels), features)
    close(AutoModel.from_pretrained(run).eval().image_encoder.forward_features(pixels), features)
    grids = json.loads((folder / "config.json").read_text(encoding="utf-8"))["simipu"]["feature_grids"]
    assert [grid and grid[0] for grid in grids] == [stage["reduction"] for stage in encoder.feature_info]


def check_depth(encoder: Path, size: tuple[int, int], folder: Path) -> None:
    """Fine-tuned as the command does, at another size than the encoder's, and served."""
    arguments = DepthArguments(
        image_encoder=str(encoder), train_frames=["rows"], output_dir=str(folder), image_size=size, kb_crop=False
    )
    rows = dataset_from_rows(make_rows(range(1)), cache_dir=str(folder.parent))
    parts = trainer_parts(arguments, find_rgb_encoder(encoder), rows, None, seed=0)
    model, sample = parts["model"], parts["train_dataset"][0]
    two_steps(model, **{name: value[None] for name, value in sample.items()})
    assert [name for name, parameter in model.decoder.named_parameters() if parameter.grad is None] == []
    with torch.no_grad():
        image = pad_to_divisor(torch.randn(1, 3, *size), model.image_encoder)
        maps = model.pyramid(model.image_encoder, image)
    assert [m.shape[-1] for m in maps] == [math.ceil(image.shape[-1] / stride) for stride in model.pyramid.strides]
    model.save_pretrained(folder)
    parts["train_dataset"].processor.save_pretrained(folder)
    estimate = pipeline("depth-estimation", str(folder), device="cpu")
    assert estimate(Image.new("RGB", (200, 120)))["predicted_depth"].shape == (120, 200)
