"""Exported encoders compute what the trained one computes, read by the libraries they are for."""

import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import close, export_timm, randomize
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny_simipu import tiny_config
from torch import nn
from transformers import AutoImageProcessor, AutoModel, ResNetBackbone

from simipu_hf.errors import SimIPUError
from simipu_hf.hub import export
from simipu_hf.hub.card import model_card
from simipu_hf.hub.export import export_image_encoder
from simipu_hf.hub.sources import load_image_encoder
from simipu_hf.hub.weights import EncoderWeights
from simipu_hf.modeling.image_encoder import pyramid_stages
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining

DATA = {"size": (64, 96), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


@pytest.fixture
def folder(encoder, tmp_path):
    return export_timm(encoder, tmp_path / "encoder", **DATA)


@torch.no_grad()
def test_timm_loads_the_folder(encoder, folder, pixels):
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    close(plain.forward_features(pixels), encoder.forward_features(pixels))
    assert all(module.eps == 1e-5 for module in plain.modules() if isinstance(module, nn.BatchNorm2d))
    pyramid = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(1, 4)).eval()
    expected = encoder.forward_intermediates(pixels, indices=[1, 4], intermediates_only=True)
    for actual, wanted in zip(pyramid(pixels), expected, strict=True):
        close(actual, wanted)
    data = timm.data.resolve_model_data_config(plain)
    assert [tuple(data[name]) for name in ("input_size", "mean", "std")] == [(3, 64, 96), DATA["mean"], DATA["std"]]


@pytest.mark.parametrize("keeps_ratio", [False, True])
def test_the_transform_of_timm_is_that_of_the_training(encoder, tmp_path, keeps_ratio):
    noise = np.random.default_rng(0).integers(0, 256, (9, 25, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((250, 90), Image.Resampling.BICUBIC)
    folder = export_timm(encoder, tmp_path / "encoder", **DATA, crop_mode="border" if keeps_ratio else "squash")
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}"))
    found = timm.data.create_transform(**config, is_training=False)(image)
    processor = SimIPUImageProcessor(
        size={"height": 64, "width": 96}, keep_aspect_ratio=keeps_ratio, image_mean=DATA["mean"], image_std=DATA["std"]
    )
    wanted = processor(image, return_tensors="pt")["pixel_values"][0][:, : 35 if keeps_ratio else 64]
    top = (64 - wanted.shape[1]) // 2  # timm pads on both sides
    torch.testing.assert_close(found[:, top : top + wanted.shape[1]], wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("architecture", "out_indices", "untrained"),
    [
        ("test_efficientnet", None, ["conv_head"]),
        ("test_resnet", None, []),
        ("test_resnet", [1, 2], ["layer3", "layer4"]),
    ],
)
def test_layers_that_were_not_trained_are_named(tmp_path, architecture, out_indices, untrained):
    config = tiny_config(architecture=architecture, image_config={"out_indices": out_indices})
    SimIPUForPreTraining(config).save_pretrained(tmp_path / "run")
    report = export_image_encoder(tmp_path / "run", tmp_path / "encoder")
    card = model_card(tmp_path / "encoder")
    again = export_image_encoder(tmp_path / "encoder", tmp_path / "again")
    for text in (str(report), str(again), card, model_card(tmp_path / "again")):
        assert ("reach" in text) == bool(untrained)
        assert ", ".join(untrained) in text
    assert ("UperNet" in card) == (out_indices is None)  # else fewer than four stages were trained


def test_weights_of_timm_keep_their_transform_and_are_trained(tmp_path):
    encoder = timm.create_model("test_efficientnet")
    save_for_hf(encoder, tmp_path / "timm", model_args={"num_classes": 1000}, safe_serialization=True)
    report = export_image_encoder(tmp_path / "timm", tmp_path / "encoder")
    assert "reach" not in str(report) + model_card(tmp_path / "encoder") + model_card(tmp_path / "timm")
    before, after = (
        timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / name}"))
        for name in ("timm", "encoder")
    )
    assert {**before, "input_size": list(before["input_size"])} == {**after, "input_size": list(after["input_size"])}


SWIN = "swin_tiny_patch4_window7_224"


@pytest.mark.parametrize(
    ("architecture", "arguments", "sizes"),
    [
        ("test_resnet", {}, [(64, 96), (96, 160)]),
        ("test_convnext", {}, [(64, 96), (96, 160)]),
        ("test_efficientnet", {}, [(64, 96), (96, 160)]),
        ("test_vit", {"dynamic_img_size": True}, [(64, 96), (96, 160)]),
        # with a block of shifted windows: a graph for one size, and one for any, as runs have it
        (SWIN, {"depths": (2, 1), "img_size": (64, 96)}, [(64, 96)]),
        (SWIN, {"depths": (2, 1), "dynamic_img_size": True}, [(64, 96), (96, 160)]),
    ],
)
@torch.no_grad()
def test_onnx_computes_what_pytorch_does(architecture, arguments, sizes, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    encoder = randomize(timm.create_model(architecture, num_classes=0, **arguments)).eval()
    folder = export_timm(encoder, tmp_path / "encoder", size=sizes[0])
    report = export_image_encoder(folder, tmp_path / "encoder.onnx", "onnx")
    assert "onnxruntime computes the same" in str(report)
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    for size in sizes:
        pixels = torch.rand(3, 3, *size)
        found = session.run(None, {"pixel_values": pixels.numpy()})
        expected = encoder.forward_intermediates(pixels, indices=pyramid_stages(encoder), intermediates_only=True)
        for actual, wanted in zip(found, expected, strict=True):
            assert (torch.from_numpy(actual) - wanted).abs().max() < 1e-4
    for parameter in encoder.parameters():
        parameter.mul_(1.01)
    with pytest.raises(SimIPUError, match="the ONNX graph is not the network: features differ by"):
        export._compare_onnx(report.path, export._Pyramid(encoder), pixels)


def test_an_onnx_graph_that_is_too_large_for_one_file_is_refused(folder, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export, "ONNX_LIMIT", 40_000_000)
    with pytest.raises(SimIPUError, match=r"at most 0\.0 GB; the weights of this resnet18 have 0\.0 GB"):
        export_image_encoder(folder, tmp_path / "encoder.onnx", "onnx")
    assert list(tmp_path.iterdir()) == [folder]


@torch.no_grad()
def test_torchvision_form(encoder, folder, tmp_path, pixels):
    report = export_image_encoder(folder, tmp_path / "out", "torchvision")
    state = torch.load(report.path, weights_only=True)
    model = torchvision.models.resnet18(weights=None)
    model.fc = nn.Identity()
    model.load_state_dict(state, strict=True)
    close(nn.Sequential(*list(model.children())[:-2]).eval()(pixels), encoder.forward_features(pixels))
    loaded, _ = load_image_encoder(report.path, verbose=False)  # a second folding would show here
    close(loaded.eval().forward_features(pixels), encoder.forward_features(pixels))


@torch.no_grad()
def test_transformers_form(encoder, folder, tmp_path, pixels):
    report = export_image_encoder(folder, tmp_path / "out", "transformers")
    model = AutoModel.from_pretrained(report.path).eval()
    close(model(pixels).last_hidden_state, encoder.forward_features(pixels))
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    assert torch.equal(model(pixels).last_hidden_state, plain.forward_features(pixels))
    backbone = ResNetBackbone.from_pretrained(report.path, out_features=["stage2", "stage4"]).eval()
    close(backbone(pixels).feature_maps[1], encoder.forward_features(pixels))
    processor = AutoImageProcessor.from_pretrained(report.path)
    assert (processor.size["height"], processor.size["width"]) == (64, 96)
    assert tuple(processor.image_mean) == DATA["mean"]


def test_retrained_folder_is_exported_as_it_is(folder, tmp_path):
    """The statistics kept for the way back count only as long as the weights are those they belong to."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    model.bn1.running_var += 1
    save_file(model.state_dict(), folder / "model.safetensors")
    report = export_image_encoder(folder, tmp_path / "encoder.pth", "mmdet")
    state = torch.load(report.path, weights_only=True)["state_dict"]
    assert torch.equal(state["img_backbone.bn1.running_var"], model.bn1.running_var)
    assert report.norm_cfg["eps"] == 1e-5


@torch.no_grad()
def test_channel_order(encoder, folder, tmp_path, pixels):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["simipu"] = {"channel_order": "bgr"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    kept = export_image_encoder(folder, tmp_path / "bgr")
    assert kept.input.channel_order == "bgr"
    assert "BGR" in str(kept)
    report = export_image_encoder(folder, tmp_path / "rgb", channel_order="rgb")
    assert report.input.mean == DATA["mean"][::-1]
    loaded, data = load_image_encoder(tmp_path / "rgb", verbose=False)
    assert data["mean"] == DATA["mean"][::-1]
    close(loaded.eval().forward_features(pixels.flip(1)), encoder.forward_features(pixels))
    flipped, _ = load_image_encoder(folder, channel_order="rgb", verbose=False)
    close(flipped.eval().forward_features(pixels.flip(1)), encoder.forward_features(pixels))
    folded = EncoderWeights("tresnet_m", {"body.conv1.conv.weight": torch.ones(64, 48, 3, 3)}, {})  # of 4 x 4 pixels
    with pytest.raises(SimIPUError, match="tresnet_m has no single first convolution"):
        folded.with_channel_order("bgr")


def test_nothing_but_an_earlier_output_is_replaced(encoder, folder, tmp_path):
    """`--overwrite` once deleted whatever was at the target: a run with its checkpoints, for instance."""
    run = export_timm(encoder, tmp_path / "run")
    (run / "checkpoint-5").mkdir()
    (run / "checkpoint-5" / "model.safetensors").write_bytes(b"precious")
    foreign = tmp_path / "bert"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    torch.save({"epoch": torch.tensor(3)}, tmp_path / "mine.pth")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for target, format in [(run, "timm"), (foreign, "transformers"), (tmp_path / "mine.pth", "mmdet")]:
        with pytest.raises(SimIPUError, match="exists already"):
            export_image_encoder(folder, target, format)
        with pytest.raises(SimIPUError, match="is not overwritten"):
            export_image_encoder(folder, target, format, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_earlier_output_is_replaced(folder, tmp_path):
    forms = {"out": "timm", "native": "transformers", "mmdet.pth": "mmdet", "tv.pth": "torchvision"}
    for name, format in forms.items():
        export_image_encoder(folder, tmp_path / name, format)
        export_image_encoder(folder, tmp_path / name, format, overwrite=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"encoder", *forms}


@pytest.mark.parametrize("target", [".", "..", "inside", "config.json"])
def test_source_and_target_never_contain_each_other(folder, target):
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(SimIPUError, match="contain one another"):
        export_image_encoder(folder, folder / target, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_impossible_exports(folder, tmp_path):
    with pytest.raises(SimIPUError, match="choose from timm"):
        export_image_encoder(folder, tmp_path / "out", "tensorrt")
    with pytest.raises(SimIPUError, match="SimIPUForPreTraining"):
        export_image_encoder(folder, tmp_path / "out", "official")
    atto = export_timm(timm.create_model("convnext_atto", num_classes=0), tmp_path / "atto")
    with pytest.raises(SimIPUError, match="convnext_atto"):
        export_image_encoder(atto, tmp_path / "out", "torchvision")
    dilated = export_timm(timm.create_model("resnet18", num_classes=0, output_stride=16), tmp_path / "dilated")
    with pytest.raises(SimIPUError, match=r"is resnet18, made with \{'output_stride': 16\}"):
        export_image_encoder(dilated, tmp_path / "out", "torchvision")
    assert not (tmp_path / "out").exists()
