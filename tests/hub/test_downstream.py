"""What downstream users start from: the programs of docs/examples, and the names that mmdetection3d looks up."""

import runpy
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from conftest import export_timm, randomize

from simipu_hf.hub.export import export_image_encoder

DOCS = Path(__file__).parents[2] / "docs"
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
PROGRAMS = {
    "transformers_detr": {**DETR, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 4},
    "torchvision_detector": {"rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 8},
    "pytorch_segmentation": {},
}


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    torch.manual_seed(0)
    encoder = randomize(timm.create_model("resnet18", num_classes=0))
    return export_timm(encoder, tmp_path_factory.mktemp("downstream") / "encoder", size=(64, 96))


@pytest.mark.parametrize("program", PROGRAMS)
def test_example_trains_from_a_folder_and_from_the_hub(program, encoder_folder, endpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    endpoint.create("owner/encoder", files={file.name: file.read_bytes() for file in encoder_folder.iterdir()})
    path = DOCS / "examples" / f"{program}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    main = runpy.run_path(str(path))["main"]
    for encoder, steps in ((f"local-dir:{encoder_folder}", 2), ("hf-hub:owner/encoder", 1)):
        torch.manual_seed(0)
        losses = main(encoder, steps=steps, height=64, width=96, **PROGRAMS[program])
        assert all(torch.tensor(losses).isfinite())


def test_detr_holds_the_weights_of_the_encoder(encoder_folder):
    """transformers resets the batch-norm statistics of a TimmBackbone: the example has to load them once more."""
    build = runpy.run_path(str(DOCS / "examples" / "transformers_detr.py"))["build_detector"]
    backbone = build(f"local-dir:{encoder_folder}", **PROGRAMS["transformers_detr"]).model.backbone.model.state_dict()
    expected = timm.create_model(f"local-dir:{encoder_folder}", pretrained=True, features_only=True).state_dict()
    assert expected.keys() - backbone.keys() <= {name for name in expected if name.endswith("num_batches_tracked")}
    assert all(torch.equal(value, expected[name]) for name, value in backbone.items())


@pytest.fixture(scope="module")
def resnet50_folder(tmp_path_factory):
    return export_timm(timm.create_model("resnet50", num_classes=0), tmp_path_factory.mktemp("resnet50") / "encoder")


@pytest.mark.parametrize("name", sorted(path.stem for path in (DOCS / "mmdetection3d").glob("*.py")))
def test_mmdetection3d_configuration_finds_every_weight(name, resnet50_folder, tmp_path):
    """mmdetection's ResNet has torchvision's names; `init_cfg` takes those that follow the prefix."""
    model = runpy.run_path(str(DOCS / "mmdetection3d" / f"{name}.py"))["model"]
    backbone = model.get("backbone") or model["img_backbone"]
    start = backbone["init_cfg"]
    assert backbone["depth"] == 50
    report = export_image_encoder(resnet50_folder, tmp_path / start["checkpoint"], "mmdet", prefix=start["prefix"])
    exported = torch.load(report.path, weights_only=True)["state_dict"]
    found = {key.removeprefix(f"{start['prefix']}."): value.shape for key, value in exported.items()}
    with torch.device("meta"):
        expected = torchvision.models.resnet50(weights=None).state_dict()
    assert found == {key: value.shape for key, value in expected.items() if not key.startswith("fc.")}
    assert start["type"] == "Pretrained"
    assert backbone["norm_cfg"] == report.norm_cfg
    if "bevdet" not in name:  # the bases of the others freeze the first stage and all statistics
        assert (backbone["frozen_stages"], backbone["norm_eval"]) == (-1, False)
