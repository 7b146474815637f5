"""Official checkpoints in every layout people have, and files that are none."""

import json

import official_names as official
import pytest
import timm
import torch
from conftest import close
from payload import Payload
from safetensors import safe_open
from weights import assert_same_weights, weights

from simipu_hf.errors import SimIPUError
from simipu_hf.hub.export import RESNET_FORMS, convert_checkpoint, export_image_encoder
from simipu_hf.hub.official import official_name
from simipu_hf.hub.sources import load_image_encoder
from simipu_hf.modeling.configuration_simipu import SimIPUConfig
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining


def encoder_state():
    return official.fill(official.resnet_shapes("resnet18"))


def save(path, state, **others):
    torch.save({"meta": {"epoch": 50}, "state_dict": state, **others}, path)
    return path


@pytest.fixture(scope="module")
def full_state():
    return official.fill(official.official_shapes())


@pytest.fixture(scope="module")
def converted(full_state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    state = {f"module.{name}": value for name, value in full_state.items()}
    return folder / "out", convert_checkpoint(save(folder / "epoch_100.pth", state), folder / "out")


def test_names_and_shapes_are_those_of_the_reference(reference):
    expected = json.loads((reference / "pretraining_step.json").read_text(encoding="utf-8"))["state_dict"]
    assert official.official_shapes() == expected


def test_every_entry_is_accounted_for(full_state, converted):
    folder, report = converted
    assert len(full_state) == 595
    assert report.kind == "pre-training model"
    assert report.architecture == "resnet50"
    assert report.mapped.keys() | report.ignored.keys() == full_state.keys()
    assert {name.split(".")[0] for name in report.ignored} == {"img_conv1x1_1", "img_conv1x1_2"}
    assert report.missing == []
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(report.mapped.values()) == set(file.keys())
        for theirs, ours in report.mapped.items():
            assert torch.equal(file.get_tensor(ours).flatten(), full_state[theirs].flatten()), theirs
    assert "never used" in str(report)


def test_converted_model_loads_completely(converted):
    model, info = SimIPUForPreTraining.from_pretrained(converted[0], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.point_config.use_xyz is False
    assert model.simipu.image_encoder.bn1.eps == 1e-3
    assert model.config.projection_normalization == "sample"


def test_there_and_back_is_bit_equal(full_state, converted, tmp_path):
    folder, report = converted
    whole = export_image_encoder(folder, tmp_path / "whole.pth", "official")
    state = torch.load(whole.path, weights_only=True)["state_dict"]
    assert state.keys() == report.mapped.keys()
    assert all(torch.equal(state[name], full_state[name]) for name in state)
    encoder = export_image_encoder(folder, tmp_path / "encoder.pth", "mmdet")
    state = torch.load(encoder.path, weights_only=True)["state_dict"]
    assert len(state) == 318
    assert all(torch.equal(value, full_state[name]) for name, value in state.items())


def test_other_networks_have_no_official_form(tmp_path):
    for architecture, message in (("resnet18", "other point encoders and heads"), ("resnet10t", "takes resnet18, 34")):
        fields = {"image_config": {"architecture": architecture}}
        SimIPUForPreTraining(SimIPUConfig.from_preset("recommended", **fields)).save_pretrained(tmp_path / "model")
        for form in ("official",) if architecture == "resnet18" else RESNET_FORMS:
            with pytest.raises(SimIPUError, match=message):
                export_image_encoder(tmp_path / "model", tmp_path / "out.pth", form)
    assert not (tmp_path / "out.pth").exists()


def test_converted_folder_has_the_encoder_and_its_processor(converted, pixels):
    from_model, data = load_image_encoder(converted[0], verbose=False)
    from_folder, _ = load_image_encoder(converted[0] / "image_encoder", verbose=False)
    assert data["mean"] == (0.406, 0.456, 0.485)
    with torch.no_grad():
        assert torch.equal(from_model.eval().forward_features(pixels), from_folder.eval().forward_features(pixels))


def test_point_features_with_xyz_double_precision_and_branches(tmp_path):
    """A ResNet-18 to be small; its other branches' entries are ignored with their reasons."""
    shapes = official.official_shapes(use_xyz=True, architecture="resnet18")
    state = official.fill(shapes, torch.float64)
    extra = {"queue": torch.zeros(128, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    extra["pts_backbone_k.SA_modules.0.mlps.0.layer0.conv.weight"] = torch.zeros(32, 4, 1, 1)
    extra["mlp_cross_img_pred.0.weight"] = torch.zeros(4, 4)
    extra["something.else"] = torch.zeros(1)
    missing = [name for name in state if name.startswith("mlp_intro_points.layer3.1")]
    for name in missing:
        del state[name]
    report = convert_checkpoint(save(tmp_path / "a.pth", {**state, **extra}), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["point_config"]["use_xyz"] is True
    assert config["dtype"] == "float64"
    assert config["image_config"]["architecture"] == "resnet18"
    for name, reason in zip(extra, ("negatives", "negatives", "momentum", "SimSiam", "no part"), strict=True):
        assert reason in report.ignored[name]
    assert sorted(official_name(name) for name in report.missing) == sorted(missing)
    saved = weights(tmp_path / "out")
    assert saved["simipu.image_encoder.conv1.weight"].dtype == torch.float64


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.img_backbone."])
@torch.no_grad()
def test_encoder_alone_under_each_prefix(prefix, tmp_path, pixels):
    state = encoder_state()
    path = save(tmp_path / "encoder.pth", {prefix + name: value for name, value in state.items()})
    report = convert_checkpoint(path, tmp_path / "out")
    assert report.kind == "image encoder"
    assert len(report.mapped) == len(state)
    expected = timm.create_model("resnet18", num_classes=0).eval()
    expected.load_state_dict(state)
    for module in expected.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    close(loaded.forward_features(pixels), expected.forward_features(pixels))
    back = export_image_encoder(tmp_path / "out", tmp_path / "back.pth", "mmdet", prefix="")
    returned = torch.load(back.path, weights_only=True)["state_dict"]
    assert_same_weights(returned, state)
    assert back.norm_cfg == {"type": "BN", "eps": 1e-3, "requires_grad": True}
    assert "norm_cfg=dict(type='BN', eps=0.001" in str(back)
    again = convert_checkpoint(back.path, tmp_path / "again")
    assert again.mapped.keys() == state.keys()
    assert_same_weights(tmp_path / "out", tmp_path / "again")


def test_imagenet_file_keeps_its_epsilon_and_loses_its_classifier(tmp_path):
    state = {name: value for name, value in encoder_state().items() if not name.endswith("num_batches_tracked")}
    state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "resnet18.pth")
    report = convert_checkpoint(tmp_path / "resnet18.pth", tmp_path / "out")
    assert report.ignored == {"fc.weight": "classifier", "fc.bias": "classifier"}
    saved = weights(tmp_path / "out")
    assert all(torch.equal(saved[name], state[name]) for name in saved if name in state)
    assert any("counters" in note for note in report.notes)


def test_pickled_objects_are_refused(tmp_path):
    path = save(tmp_path / "evil.pth", encoder_state(), hook=Payload(tmp_path / "ran"))
    with pytest.raises(SimIPUError, match=r"(?s)evil.pth: refused.*open"):
        convert_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_files(tmp_path, share, legacy):
    torch.save(encoder_state(), tmp_path / "whole.pth", _use_new_zipfile_serialization=not legacy)
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SimIPUError, match=r"cut\.pth"):
        convert_checkpoint(tmp_path / "cut.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_networks_and_other_files(tmp_path):
    state = encoder_state()
    cases = [
        (timm.create_model("vit_tiny_patch16_224").state_dict(), "nothing in it matches"),
        ({**state, "layer1.0.conv1.weight": torch.zeros(64, 32, 3, 3)}, "of another shape"),
        ({name: value for name, value in state.items() if name != "layer4.1.bn2.weight"}, "missing"),
        ({"epoch": 3}, "found none"),
        ([1, 2], "found none"),
    ]
    for content, message in cases:
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(SimIPUError, match=message):
            convert_checkpoint(tmp_path / "other.pth", tmp_path / "out")
    (tmp_path / "text.pth").write_text("not a checkpoint", encoding="utf-8")
    with pytest.raises(SimIPUError, match="no PyTorch checkpoint"):
        convert_checkpoint(tmp_path / "text.pth", tmp_path / "out")
    with pytest.raises(SimIPUError, match="no such file"):
        convert_checkpoint(tmp_path / "absent.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
