"""One call for every place where an encoder can lie."""

import json
import pickle
import shutil

import pytest
import timm
import torch
from conftest import export_timm
from payload import Payload
from safetensors.torch import save_file
from weights import assert_same_weights

from simipu_hf.errors import SimIPUError
from simipu_hf.hub.sources import (
    find_image_encoder,
    load_dense_model,
    load_image_encoder,
    load_processor,
    model_folder,
    read_input_convention,
)
from simipu_hf.modeling.configuration_simipu import SimIPUDepthConfig
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.training.checkpoint import save_checkpoint


def as_checkpoint(run_folder, target):
    """A complete checkpoint as the training loop writes it."""

    def save(path):
        for name in ("config.json", "model.safetensors", "processor_config.json"):
            shutil.copy(run_folder / name, path)

    step = int(target.name.split("-")[1])
    return save_checkpoint(target.parent, step, save=save, identity={})


def test_run_folder(run_folder, tmp_path, capsys):
    model, data = load_image_encoder(run_folder)
    assert_same_weights(model, run_folder / "image_encoder")
    assert data["input_size"] == (3, 64, 96)
    assert "state_dict" not in model.pretrained_cfg  # timm would keep the weights that were loaded there
    assert "image encoder (test_resnet) of a simipu model" in capsys.readouterr().err
    pyramid, _ = load_image_encoder(run_folder, features_only=True, out_indices=(2, 4), verbose=False)
    assert [map.shape[1] for map in pyramid.eval()(torch.zeros(1, 3, 64, 96))] == [48, 96]
    from_file, _ = load_image_encoder(run_folder / "model.safetensors", verbose=False)
    assert_same_weights(from_file, model)
    vit = export_timm(timm.create_model("test_vit", num_classes=0), tmp_path / "vit")
    wrapped, _ = load_image_encoder(vit, features_only=True, verbose=False)
    assert "state_dict" not in wrapped.model.pretrained_cfg
    grey, _ = load_image_encoder(run_folder, in_chans=1, verbose=False)
    assert grey.conv1[0].weight.shape == (16, 1, 3, 3)


def test_checkpoint_and_run_without_a_final_model(run_folder, tmp_path):
    first = as_checkpoint(run_folder, tmp_path / "checkpoint-9")
    assert_same_weights(load_image_encoder(first, verbose=False)[0], run_folder / "image_encoder")
    last = as_checkpoint(run_folder, tmp_path / "checkpoint-10")
    assert "checkpoint-10" in find_image_encoder(tmp_path).description
    (last / "model.safetensors").write_bytes(b"half")
    assert "checkpoint-9" in find_image_encoder(tmp_path).description
    (first / "model.safetensors").unlink()
    with pytest.raises(SimIPUError, match=r"expected config\.json or a complete checkpoint.*damaged"):
        find_image_encoder(tmp_path)


def test_depth_run_without_a_final_model(tmp_path):
    depth = SimIPUForDepthEstimation(SimIPUDepthConfig(image_config={"architecture": "test_resnet"}))
    save_checkpoint(tmp_path, 20, save=depth.save_pretrained, identity={})
    model, _ = load_image_encoder(tmp_path, verbose=False)
    assert_same_weights(model, depth.image_encoder)


def test_a_model_saved_in_half_precision_is_loaded_in_single(tmp_path):
    depth = SimIPUForDepthEstimation(SimIPUDepthConfig(image_config={"architecture": "test_resnet"}))
    depth.bfloat16().save_pretrained(tmp_path)
    SimIPUImageProcessor().save_pretrained(tmp_path)
    assert load_dense_model(SimIPUForDepthEstimation, tmp_path, "cpu")[0].dtype == torch.float32
    (tmp_path / "model.safetensors").write_bytes(b"none" * 9)
    with pytest.raises(SimIPUError, match="no 'simipu_depth' model"):
        load_dense_model(SimIPUForDepthEstimation, tmp_path)


def test_a_sharded_model_on_the_hub_is_read_from_its_encoder_folder(endpoint, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = {p.relative_to(run_folder).as_posix(): p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    files["model-00001-of-00002.safetensors"] = files.pop("model.safetensors")
    files["last-checkpoint/trainer_state.json"] = b"{}"
    endpoint.create("owner/simipu", files=files)
    assert_same_weights(load_image_encoder("owner/simipu", verbose=False)[0], run_folder / "image_encoder")
    assert not list(tmp_path.rglob("last-checkpoint"))


def test_timm_name(capsys):
    model, data = load_image_encoder("random:resnet18")
    assert model.num_classes == 0
    assert data["mean"] == (0.485, 0.456, 0.406)
    assert "random weights" in capsys.readouterr().err
    with pytest.raises(SimIPUError, match="random weights are of no channel order"):
        load_image_encoder("random:resnet18", channel_order="bgr")


def test_input_convention_is_that_of_the_processor(tmp_path):
    SimIPUProcessor.from_preset("official").save_pretrained(tmp_path)
    convention = read_input_convention(tmp_path)
    assert convention.channel_order == "bgr"
    assert convention.mean == pytest.approx([103.53 / 255, 116.28 / 255, 123.675 / 255])
    assert convention.std == pytest.approx([1 / 255] * 3)
    SimIPUProcessor.from_preset("recommended", image_size=(96, 320)).save_pretrained(tmp_path)
    convention = read_input_convention(tmp_path)
    assert (convention.channel_order, convention.size) == ("rgb", (96, 320))
    assert convention.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("architecture"), "expected a SimIPU model"),
        (lambda c: c.update(architecture="resnet1000"), "no model named 'resnet1000'"),
        (lambda c: c.update(architecture="resnet34"), "do not fit"),
        (lambda c: c.update(model_args={"no_such_option": 1}), "cannot build"),
        (lambda c: c.update(model_args=[1]), "must be objects"),
    ],
)
def test_tampered_configuration(run_folder, tmp_path, change, message):
    folder = shutil.copytree(run_folder / "image_encoder", tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SimIPUError, match=message):
        load_image_encoder(folder, verbose=False)


def test_a_processor_with_code_of_its_own_is_refused_and_not_asked_about(run_folder, tmp_path, monkeypatch):
    for name in ("config.json", "processor_config.json", "feature_extraction_simipu.py"):
        shutil.copy(run_folder / name, tmp_path)
    assert load_processor(tmp_path).to_dict() == SimIPUProcessor.from_pretrained(run_folder).to_dict()
    config = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    config["feature_extractor"]["feature_extractor_type"] = "SomebodyElses"
    config["feature_extractor"]["auto_map"] = {"AutoFeatureExtractor": "feature_extraction_simipu.SomebodyElses"}
    (tmp_path / "processor_config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(SimIPUError, match="of an earlier version, or with code of its own, is refused"):
        load_processor(tmp_path)


def test_tampered_weights(run_folder, tmp_path):
    simipu = shutil.copytree(run_folder, tmp_path / "run")
    (simipu / "model.safetensors").write_bytes((simipu / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(SimIPUError, match="no readable safetensors"):
        load_image_encoder(simipu, verbose=False)
    (simipu / "model.safetensors").unlink()
    assert "image_encoder/" in find_image_encoder(simipu).description


def test_pickles_are_never_read(run_folder, tmp_path):
    folder = shutil.copytree(run_folder / "image_encoder", tmp_path / "encoder")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(SimIPUError, match="no readable safetensors"):
        load_image_encoder(folder, verbose=False)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SimIPUError, match="pickled weights are not read"):
        load_image_encoder(folder, verbose=False)
    (folder / "config.json").write_bytes(b"{")
    with pytest.raises(SimIPUError, match="no readable JSON"):
        load_image_encoder(folder, verbose=False)
    assert not (tmp_path / "ran").exists()


def test_other_weights_beside_a_model_are_themselves(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    other = timm.create_model("test_resnet", num_classes=0)
    torch.save({"state_dict": other.state_dict()}, run / "other.pth")
    with pytest.raises(SimIPUError, match=r"other.pth: expected a folder, or the model.safetensors"):
        model_folder(run / "other.pth")
    save_file(other.state_dict(), run / "image_encoder" / "ema.safetensors")
    with pytest.raises(SimIPUError, match=r"ema\.safetensors"):
        find_image_encoder(run / "image_encoder" / "ema.safetensors")


def test_nothing_there(tmp_path):
    with pytest.raises(SimIPUError, match="no timm model of that name"):
        load_image_encoder(tmp_path / "absent")
    with pytest.raises(SimIPUError, match="found an empty folder"):
        load_image_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(SimIPUError, match="'bert' model"):
        load_image_encoder(tmp_path)
    with pytest.raises(SimIPUError, match="channel_order"):
        load_image_encoder(
            export_timm(timm.create_model("test_resnet", num_classes=0), tmp_path / "e"), channel_order="hsv"
        )
