"""Push, then load by the cards' own lines in processes that do not have the package, on line and off line."""

import pickle
from contextlib import suppress

import pytest
import timm
import torch
from safetensors.torch import load, load_file, save, save_file

from simipu_hf.errors import SimIPUError
from simipu_hf.hub.push import push_folder
from simipu_hf.hub.sources import load_image_encoder

# Runs every Python block of a card as printed, and looks at what it made.
RUN_CARD = """
import re, torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
trained = load_file(TRAINED)
pixels = load_file(PIXELS)["pixels"]

def differing(encoder):
    found = encoder.state_dict()
    return [name for name in trained if not torch.equal(found[name], trained[name])]

def features(encoder):
    with torch.no_grad():
        return encoder.eval().forward_features(pixels).double().sum(dim=(0, 2, 3)).tolist()

for repo_id in REPOSITORIES:
    card = open(hf_hub_download(repo_id, "README.md"), encoding="utf-8").read()
    for number, block in enumerate(re.findall(r"```python\\n(.*?)```", card, re.S)):
        space = {}
        exec(compile(block, f"{repo_id} block {number}", "exec"), space)
        for name in ("model", "encoder", "pyramid", "backbone"):
            made = space.get(name)
            if made is None:
                continue
            kind = type(made).__name__
            made = getattr(made, "simipu", made)
            for attribute in ("image_encoder", "timm_model", "_backbone"):
                made = getattr(made, attribute, made)
            entry = {"kind": kind, "differing": differing(made)}
            if hasattr(made, "forward_features"):
                entry["features"] = features(made)
            result[f"{repo_id} {number} {name}"] = entry
        if "maps" in space:
            result[f"{repo_id} {number} maps"] = {"shapes": [list(m.shape) for m in space["maps"]]}
        if "segmenter" in space:
            norms = space["segmenter"].backbone._backbone
            result["segmenter"] = {"differing": differing(norms)}
            frozen = space["detector"].model.backbone.model.state_dict()
            result["detector"] = {"differing": [n for n in frozen if not torch.equal(frozen[n], trained[n])]}
"""

# Asks for repositories that somebody tampered with.
TAMPERED = """
from transformers import AutoModel
said = result["tampered"] = {}
for repo_id in TAMPERED_REPOSITORIES:
    try:
        AutoModel.from_pretrained(repo_id, trust_remote_code=repo_id.startswith("owner/simipu"))
        said[repo_id] = "loaded"
    except Exception as error:
        said[repo_id] = f"{type(error).__name__}: {error}"
"""

KINDS = {"SimIPUModel", "SimIPUForPreTraining", "TimmWrapperModel", "ResNet", "FeatureListNet", "TimmBackbone"}


@pytest.fixture
def published(endpoint, run_folder):
    push_folder(run_folder, "owner/simipu", encoder_repo_id="owner/encoder")
    return endpoint


def check_card_results(result: dict, expected: list[float]) -> None:
    loaded = {entry["kind"] for entry in result.values() if "kind" in entry}
    assert loaded == KINDS
    for name, entry in result.items():
        assert not entry.get("differing"), name
        if "features" in entry:
            torch.testing.assert_close(torch.tensor(entry["features"]), torch.tensor(expected))
    assert [maps["shapes"][-1][1] for name, maps in result.items() if "shapes" in maps] == [96, 96]


def test_every_line_of_both_cards_works_and_what_was_tampered_with_is_refused(
    published, run_folder, isolated, pixels, tmp_path, monkeypatch
):
    """Neither has the package; one process on line for both, as starting it takes most of the time."""
    encoder_file = run_folder / "image_encoder" / "model.safetensors"
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    trained = timm.create_model("test_resnet", num_classes=0).eval()
    trained.load_state_dict(load_file(encoder_file))
    with torch.no_grad():
        expected = trained.forward_features(pixels).double().sum(dim=(0, 2, 3)).tolist()
    values = {
        "TRAINED": str(encoder_file),
        "PIXELS": str(tmp_path / "pixels.safetensors"),
        "REPOSITORIES": ["owner/simipu", "owner/encoder"],
    }
    mark = tmp_path / "ran"
    tampered = tampered_repositories(published, mark)
    result = isolated(RUN_CARD + TAMPERED, hub=published, TAMPERED_REPOSITORIES=tampered, **values)
    said = result.pop("tampered")
    check_card_results(result, expected)
    assert [name for name in tampered if said[name] == "loaded"] in ([], ["owner/simipu-shapes"])

    check_messages_to_tampered_repositories(tmp_path / "cache", monkeypatch)
    assert not mark.exists()

    asked = len(published.requests)
    check_card_results(isolated(RUN_CARD, offline=True, **values), expected)
    assert len(published.requests) == asked


def tampered_repositories(hub, mark) -> list[str]:
    """Creates repositories whose pickles, if they run, write the file `mark`."""

    class Payload:
        def __reduce__(self):
            return open, (str(mark), "w")

    encoder, simipu = hub.files("owner/encoder"), hub.files("owner/simipu")
    narrow = load(encoder["model.safetensors"])
    narrow["layer1.0.conv1.weight"] = torch.zeros(32, 16, 3, 3)
    without_weights = {name: c for name, c in encoder.items() if name != "model.safetensors"}
    repositories = {
        "owner/shapes": encoder | {"model.safetensors": save(narrow, {"format": "pt"})},
        "owner/pickle": without_weights | {"pytorch_model.bin": pickle.dumps(Payload())},
        "owner/renamed": encoder | {"model.safetensors": pickle.dumps(Payload())},
        "owner/json": encoder | {"config.json": b"{"},
        "owner/simipu-shapes": simipu
        | {"config.json": simipu["config.json"].replace(b'"projection_dim": 16', b'"projection_dim": 17')},
        "owner/simipu-type": simipu
        | {"config.json": simipu["config.json"].replace(b'"projection_dim": 16', b'"projection_dim": "many"')},
    }
    for repo_id, files in repositories.items():
        hub.create(repo_id, files=files)
    return list(repositories)


def check_messages_to_tampered_repositories(cache, monkeypatch) -> None:
    """What `load_image_encoder` says to them, in this process, with a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    messages = {
        "owner/shapes": r"of another shape \(layer1\.0\.conv1\.weight",
        "owner/pickle": "pickled weights are not read",
        "owner/renamed": "no readable safetensors",
        "owner/json": "no readable JSON",
    }
    for repo_id, message in messages.items():
        with pytest.raises(SimIPUError, match=message):
            load_image_encoder(repo_id, verbose=False)
    for repo_id in ("owner/simipu-shapes", "owner/simipu-type"):  # the encoder in it may be sound
        with suppress(SimIPUError):
            load_image_encoder(repo_id, verbose=False)
