"""Push, then load by the cards' own lines in processes that do not have the package, on line and off line."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from simipu_hf.hub.push import push_folder

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


def test_every_line_of_both_cards_works(published, run_folder, isolated, pixels, tmp_path):
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
    check_card_results(isolated(RUN_CARD, hub=published, **values), expected)
    asked = len(published.requests)
    check_card_results(isolated(RUN_CARD, offline=True, **values), expected)
    assert len(published.requests) == asked
