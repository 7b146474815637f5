"""Push, then load by the cards' own lines in processes that do not have the package, on line and off line."""

from simipu_hf.hub.push import push_folder

# Runs every Python block of a card as printed, and looks at what it made.
RUN_CARD = """
import re, torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
trained = load_file(TRAINED)

def differing(encoder):
    found = encoder.state_dict()
    return [name for name in trained if not torch.equal(found[name], trained[name])]

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
            result[f"{repo_id} {number} {name}"] = {"kind": kind, "differing": differing(made)}
        if "maps" in space:
            result[f"{repo_id} {number} maps"] = {"shapes": [list(m.shape) for m in space["maps"]]}
        if "segmenter" in space:
            norms = space["segmenter"].backbone._backbone
            result["segmenter"] = {"differing": differing(norms)}
            frozen = space["detector"].model.backbone.model.state_dict()
            result["detector"] = {"differing": [n for n in frozen if not torch.equal(frozen[n], trained[n])]}
"""

KINDS = {"SimIPUModel", "SimIPUForPreTraining", "TimmWrapperModel", "ResNet", "FeatureListNet", "TimmBackbone"}


def check_card_results(result: dict) -> None:
    loaded = {entry["kind"] for entry in result.values() if "kind" in entry}
    assert loaded == KINDS
    for name, entry in result.items():
        assert not entry.get("differing"), name
    assert [maps["shapes"][-1][1] for name, maps in result.items() if "shapes" in maps] == [96, 96]


def test_every_line_of_both_cards_works(endpoint, run_folder, isolated):
    """That what is loaded computes the same is in test_every_encoder.py."""
    push_folder(run_folder, "owner/simipu", encoder_repo_id="owner/encoder")
    trained = str(run_folder / "image_encoder" / "model.safetensors")
    values = {"TRAINED": trained, "REPOSITORIES": ["owner/simipu", "owner/encoder"]}
    check_card_results(isolated(RUN_CARD, hub=endpoint, **values))
    asked = len(endpoint.requests)
    check_card_results(isolated(RUN_CARD, offline=True, **values))
    assert len(endpoint.requests) == asked
