"""Cards say what is on disk, and leave what somebody wrote by hand."""

import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from huggingface_hub import ModelCard

from simipu_hf.errors import SimIPUError
from simipu_hf.hub.card import CURVES, GENERATED, add_evaluation, model_card, redact, write_model_card
from simipu_hf.pretrain import describe_data


@pytest.fixture
def folder(run_folder, tmp_path):
    return shutil.copytree(run_folder, tmp_path / "run")


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def record(folder: Path, **sections) -> None:
    """Changes the record of a run."""
    content = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8")) | sections
    (folder / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def test_facts_of_the_run(folder):
    (folder / CURVES).write_bytes(b"a picture")
    card = write_model_card(folder, "owner/simipu", "owner/encoder").read_text(encoding="utf-8")
    for fact in ("--data_dir data/kitti", "| rows | 25 |", "max_steps", "2112.04680", "| torch | 2.15.0 |"):
        assert fact in card, fact
    assert "hf_abcdefghijklmnop" not in card
    assert "| learning_rate | 0.03 |" in card  # the recipe's: no flag gave it
    assert f"({CURVES})" in card
    assert "| inter_modal_chance | 8.3 |" in card
    assert "https://huggingface.co/owner/encoder" in card
    assert ModelCard(card).data.library_name == "transformers"


def test_evaluation_becomes_a_model_index(folder):
    add_evaluation(folder, "depth-estimation", "KITTI Eigen", "test", {"abs_rel": 0.09}, "Garg crop, 80 m")
    metrics = {"abs_rel": 0.07, "rmse": float("nan"), "silog": float("inf")}
    add_evaluation(folder, "depth-estimation", "KITTI Eigen", "test", metrics, "Garg crop, 80 m")
    card = model_card(folder, "owner/simipu")
    (result,) = ModelCard(card).data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("abs_rel", 0.07, "test")
    assert "Garg crop, 80 m" in card
    assert len(metadata(card)["model-index"]) == 1
    for source in ("a/rows", "b/rows", "./b/rows", "b/rows#test:000001"):
        (folder / source.partition("#")[0]).mkdir(parents=True, exist_ok=True)
        add_evaluation(folder, "depth-estimation", "rows", "test", metrics, "80 m", [f"{folder}/{source}"])
    kept = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    assert [entry["dataset"] for entry in kept] == ["KITTI Eigen", "rows", "rows", "rows"]
    (folder / "eval_results.json").write_text('[{"metrics": 3}]', encoding="utf-8")
    with pytest.raises(SimIPUError, match="add_evaluation"):
        model_card(folder)


def test_a_card_shows_what_works_with_its_weights(folder):
    assert "With the projection heads" in model_card(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["SimIPUModel"]}), encoding="utf-8")
    assert "With the projection heads" not in model_card(folder)
    config = json.loads((folder / "image_encoder" / "config.json").read_text(encoding="utf-8"))
    grids = [[stride, stride, 0, 0] for stride in (4, 8, 16, 32)]
    for architecture, shown in (("convnext_atto", True), ("swin_tiny_patch4_window7_224", False)):  # channels last
        changed = config | {"architecture": architecture, "simipu": {"feature_grids": grids}}
        (folder / "image_encoder" / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        assert ("UperNet" in model_card(folder / "image_encoder")) == shown


def test_base_model_data_set_and_licence(folder):
    flags = {"image_encoder": "test_resnet", "dataset_name": "owner/drives", "pretrained_image_encoder": True}
    record(folder, arguments=flags, data={"rows": 7, "license": "cc-by-4.0"})
    data = metadata(model_card(folder))
    assert data["base_model"] == ["timm/test_resnet.r160_in1k"]
    assert data["datasets"] == ["owner/drives"]
    assert data["license"] == "cc-by-4.0"
    # not the tag that timm takes for the name alone
    record(folder, arguments=flags | {"image_encoder": "resnet18.a2_in1k"})
    assert metadata(model_card(folder / "image_encoder"))["base_model"] == ["timm/resnet18.a2_in1k"]


@pytest.mark.parametrize("name", ["data_dir", "train_frames", "image_dir", "image_encoder", "model_name_or_path"])
def test_models_made_from_kitti_carry_its_licence(folder, name):
    record(folder, arguments={name: ["/data/KITTI#train"]})
    card = model_card(folder)
    assert metadata(card)["license"] == "cc-by-nc-sa-3.0"
    assert "CC BY-NC-SA" in card


def test_encoder_card_and_folder_without_a_record(folder):
    card = model_card(folder / "image_encoder", "owner/encoder")
    assert metadata(card)["library_name"] == "timm"
    assert 'timm.create_model("hf-hub:owner/encoder"' in card
    for name in ("run.yaml", "metrics.jsonl"):
        (folder / name).unlink()
    card = model_card(folder)
    assert "## Recipe" not in card
    assert "license" not in metadata(card)
    with pytest.raises(SimIPUError, match=r"config\.json"):
        model_card(folder / "absent")


@pytest.mark.parametrize(
    ("license", "identifier", "name"),
    [
        ("Own Licence 1.0", "other", "own-licence-1.0"),
        ("CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", None),  # as the readers write it
        ("CC BY-NC-SA 3.0", "cc-by-nc-sa-3.0", None),
        ("CC BY-NC-SA 3.0\n\nCC BY 4.0", "other", "cc-by-nc-sa-3.0-and-cc-by-4.0"),  # of a mixture with KITTI
        ("CC BY 4.0\n\ncc-by-4.0", "cc-by-4.0", None),
        ("", None, None),
    ],
)
def test_licence_of_the_rows_and_pipelines_that_there_are_none_of(folder, license, identifier, name):
    rows = datasets.Dataset.from_dict({"frame_id": ["a"], "scene": ["log"], "image": [{"bytes": b"", "path": None}]})
    rows.info.license = license
    record(folder, arguments={"data_dir": "drives"}, data=describe_data(rows))
    card = model_card(folder)
    data = metadata(card)
    assert (data.get("license"), data.get("license_name")) == (identifier, name)
    assert ("Its training images are KITTI's" in card) == ("CC BY-NC-SA 3.0" in license)
    # transformers' pipeline of that name fails on a tuple of feature maps
    assert "pipeline_tag" not in data
    assert "image-feature-extraction" in data["tags"]


def test_own_edits_stay(folder):
    path = write_model_card(folder, "owner/simipu")
    path.write_text(path.read_text(encoding="utf-8").replace(GENERATED, "Mine."), encoding="utf-8")
    before = path.read_text(encoding="utf-8")
    write_model_card(folder, "owner/other")
    assert path.read_text(encoding="utf-8") == before


def test_bgr_is_said(folder):
    config = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    config["image_processor"]["do_flip_channel_order"] = True
    (folder / "processor_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "expects BGR" in model_card(folder)


def test_tokens_and_folders_are_taken_out(monkeypatch):
    assert redact("hf_abcdefgh123") == "hf_…"
    assert redact('"/home/alice/runs/kitti", --a=/mnt/x/y --b /z/w') == '"…/kitti", --a=…/y --b …/w'
    assert redact(r"C:\Users\alice\runs\a D:/alice/secret/KITTI") == "…/a …/KITTI"
    assert redact(r"file:///home/alice/x/y file:///C:/alice/z \\nas\alice\KITTI") == "…/y …/z …/KITTI"
    home = Path("C:/Users/John O'Doe" if os.name == "nt" else "/home/John O'Doe")
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr(Path, "cwd", lambda: home.parent)
    assert redact(f"data: {home / 'secret' / 'KITTI'}") == "data: …/KITTI"
    assert redact("data: /home/John Doe/KITTI") == redact(r"data: C:\Users\John Doe\KITTI") == "data: …/KITTI"
    assert redact("x '--a=/home/John Doe/KITTI' --b=/c/d") == "x '--a=…/KITTI' --b=…/d"
    assert redact('"data_dir": "/media/John Doe/KITTI raw/x"') == '"data_dir": "…/x"'
    assert redact("| data_dir | /media/John Doe/KITTI raw/x |") == "| data_dir | …/x |"
    assert redact("data_dir: /mnt/my (old)/K#train:1/2,1/3\n- D:/My Data/x") == "data_dir: …/K#train:1/2,1/3\n- …/x"
    assert redact("- /a b/D#train:@/media/J D/x.txt\n'/my #2/J D/x'") == "- …/D#train:@…/x.txt\n'…/x'"
    unchanged = [
        "runs/home/a s3://bucket/home/a",
        r'"(\\w+\\.)+|\\d+/\\w+/x"',  # as JSON writes an expression
        "see https://huggingface.co/owner/name/tree/main, a/b/c, 3 km/h, ./x/y, </details>",
        "simipu_hf.pretrain --hub_model_id a/b",
    ]
    assert [redact(text) for text in unchanged] == unchanged
    assert redact("--a sftp://me:s3cr3t@host/kitti#train") == "--a sftp://…@host/kitti#train"
    assert redact("- 's3://b/x?X-Signature=a/b+c#train' y?") == "- 's3://b/x?…#train' y?"
    assert redact("sftp://me:p@ss@host/a {url: https://a/b?c, x: 1}") == "sftp://…@host/a {url: https://a/b?…, x: 1}"
    assert redact("[x](https://e.org/p?a=1) `s3://b?x`") == "[x](https://e.org/p?…) `s3://b?…`"
    assert redact(r"https://h/x?v=1&p=a,b(c)&s=1 s3://u:pa\s@h/a") == "https://h/x?… s3://…@h/a"
    command = {"command": 'x --d "s3://b/x?sig=1" --y 2'}
    assert json.loads(redact(json.dumps(command))) == {"command": 'x --d "s3://b/x?…" --y 2'}
