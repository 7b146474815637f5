"""Publishing: what a repository holds, and what happens when the server or the token do not play along."""

import json
import shutil
import subprocess
import sys
import threading

import datasets
import local_hub
import pytest
from huggingface_hub import DatasetCard
from PIL import Image

from simipu_hf.errors import MAY_HANG, SimIPUError
from simipu_hf.hub import push
from simipu_hf.hub.push import HubUploader, push_dataset, push_folder
from simipu_hf.hub.sources import load_image_encoder
from simipu_hf.training.arguments import PreTrainingArguments


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Waiting between attempts is not what is tested here."""
    monkeypatch.setattr(push, "sleep", lambda seconds: None)
    yield
    for thread in threading.enumerate():
        if thread.name == MAY_HANG:  # with it a command of a later test would end the process
            thread.join()


# of this package's loop, and of transformers.Trainer
RESUME = {"training_state.pt", "manifest.json"}
RESUME |= {"trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth"}


@pytest.fixture
def checkpoint(run_folder, tmp_path):
    """A run in progress with one checkpoint, resume state included."""
    folder = tmp_path / "training" / "checkpoint-20"
    of_the_run = shutil.ignore_patterns("image_encoder", "run.yaml", "metrics.jsonl")
    shutil.copytree(run_folder, folder, ignore=of_the_run)
    shutil.copy(run_folder / "run.yaml", folder.parent)
    for name in RESUME:
        (folder / name).write_bytes(b"{}")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


def uploader_of(output_dir, repo_id="owner/run", **flags):
    hub = {"push_to_hub": True, "hub_model_id": repo_id}
    return HubUploader(PreTrainingArguments(data_dir="kitti", output_dir=str(output_dir), **hub, **flags))


def test_repository_holds_the_model_its_code_its_encoder_and_a_card(endpoint, run_folder, tmp_path):
    run_folder = shutil.copytree(run_folder, tmp_path / "last-checkpoint")  # texts of a folder of that name, too
    before = sorted(path.name for path in run_folder.rglob("*"))
    report = push_folder(run_folder, "owner/simipu", private=True, encoder_repo_id="owner/encoder")
    files = endpoint.files("owner/simipu")
    own = {"config.json", "model.safetensors", "modeling_simipu.py", "processor_config.json", "README.md"}
    own |= {"image_encoder/config.json", "image_encoder/model.safetensors", "metrics.jsonl", "run.yaml"}
    assert own <= set(files)
    assert files["model.safetensors"] == (run_folder / "model.safetensors").read_bytes()
    assert endpoint.repos["models", "owner/simipu"].private
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in files)
    assert not any(b"hf_abcdefghijklmnop" in content or b"alice" in content for content in files.values())
    assert {"config.json", "model.safetensors", "README.md"} <= set(endpoint.files("owner/encoder"))
    assert len(endpoint.repos["models", "owner/simipu"].commits) == 2  # the empty first one, and all of it at once
    assert ("POST", "/api/validate-yaml") in endpoint.requests
    assert report.url.endswith("/owner/simipu")
    assert report.encoder_url.endswith("/owner/encoder")
    assert sorted(path.name for path in run_folder.rglob("*")) == before


def test_an_upload_replaces_what_an_earlier_one_left_and_nothing_else(endpoint, run_folder):
    earlier = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "image_encoder/old.json")
    others = ("last-checkpoint/model.safetensors", "pictures/mine.png", "model-v1/model.safetensors", ".gitattributes")
    endpoint.create("owner/simipu", files=dict.fromkeys((*earlier, *others), b"{}"))
    push_folder(run_folder, "owner/simipu")
    files = endpoint.files("owner/simipu")
    assert [name for name, content in files.items() if content == b"{}"] == list(others)
    assert {"model.safetensors", "image_encoder/config.json"} <= set(files)


def test_photographs_of_test_frames_stay(endpoint, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "depth")
    config = json.loads((folder / "config.json").read_text())
    (folder / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / "pictures" / "000_frame.png")
    for name, model_type, published in (("simipu", "simipu", True), ("depth", "simipu_depth", False)):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        push_folder(folder, f"owner/{name}")
        files = endpoint.files(f"owner/{name}")
        assert ("pictures/000_frame.png" in files) == (b"000_frame.png" in files["README.md"]) == published


def test_links_as_in_the_cache_of_the_hub_are_followed_and_texts_elsewhere_are_not(endpoint, run_folder, tmp_path):
    folder = shutil.copytree(run_folder / "image_encoder", tmp_path / "encoder")
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    for target in (tmp_path / "credentials", tmp_path / "blobs" / "1f", folder / "inside"):
        target.parent.mkdir(exist_ok=True)
        target.write_text("{}", encoding="utf-8")
        (folder / f"{target.name}.json").symlink_to(target)
    with pytest.raises(SimIPUError, match=r"credentials\.json: a link out of .*encoder is not published"):
        push_folder(folder, "owner/encoder")
    (folder / "credentials.json").unlink()
    push_folder(folder, "owner/encoder")
    files = endpoint.files("owner/encoder")
    assert {"config.json", "1f.json", "inside.json"} <= set(files)
    assert files["model.safetensors"] == (tmp_path / "blob").read_bytes()


def test_a_card_that_was_edited_on_the_hub_stays(endpoint, run_folder, tmp_path):
    folder = shutil.copytree(run_folder / "image_encoder", tmp_path / "encoder")
    push_folder(folder, "owner/encoder")
    endpoint.repos["models", "owner/encoder"].add("main", {"README.md": b"---\nlicense: mit\n---\n"})
    push_folder(folder, "owner/encoder")
    assert b"timm" in endpoint.files("owner/encoder")["README.md"]  # what the Hub writes into a new repository
    endpoint.repos["models", "owner/encoder"].add("main", {"README.md": b"Edited on the Hub."})
    endpoint.faults.append(local_hub.Fault(r"/resolve/.*README", 500))  # tried again, not taken for none there
    push_folder(folder, "owner/encoder")
    files = endpoint.files("owner/encoder")
    assert files["README.md"] == b"Edited on the Hub."
    assert "model.safetensors" in files
    (folder / "README.md").write_text("Edited here.", encoding="utf-8")
    push_folder(folder, "owner/encoder")
    assert endpoint.files("owner/encoder")["README.md"] == b"Edited here."


def test_files_that_cannot_be_published_are_named_and_leave_nothing_behind(run_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(run_folder / "image_encoder", tmp_path / "encoder")
    before = {*folder.iterdir(), folder / "notes.md"}
    (folder / "notes.md").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(SimIPUError, match=r"encoder.notes\.md: cannot be published: .*utf-8"):
        push_folder(folder, "owner/encoder")
    assert {*folder.iterdir()} == before

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(push, "_place", full)
    with pytest.raises(SimIPUError, match=r"config\.json: cannot be published: No space left"):
        push_folder(folder, "owner/encoder")
    assert {*folder.iterdir()} == before


def test_revision_is_a_branch(endpoint, run_folder):
    push_folder(run_folder / "image_encoder", "owner/encoder", revision="candidate")
    assert "model.safetensors" in endpoint.files("owner/encoder", revision="candidate")
    assert "model.safetensors" not in endpoint.files("owner/encoder")


def test_server_errors_are_tried_again(endpoint, run_folder, capsys):
    endpoint.faults += [
        local_hub.Fault(r"repos/create", 500),
        local_hub.Fault(r"/commit/main", 503),
        local_hub.Fault(r"/commit/main", 412),  # another commit came first
    ]
    push_folder(run_folder / "image_encoder", "owner/encoder")
    assert "model.safetensors" in endpoint.files("owner/encoder")
    lines = [line for line in capsys.readouterr().err.splitlines() if "trying again" in line]
    assert [code in line for line, code in zip(lines, ("500", "503", "412"), strict=True)] == [True] * 3


def test_persistent_server_error_is_reported_and_nothing_is_pushed_half(endpoint, run_folder):
    endpoint.faults.append(local_hub.Fault(r"/commit/main", 500, times=99))
    with pytest.raises(SimIPUError, match=r"owner/encoder: .*500"):
        push_folder(run_folder / "image_encoder", "owner/encoder")
    assert endpoint.files("owner/encoder") == {}


def test_silent_server_counts_as_a_timeout(endpoint, run_folder, monkeypatch, capsys):
    endpoint.faults.append(local_hub.Fault(r"preupload", delay=3.0))
    monkeypatch.setattr(push, "SHORTEST_LIMIT", 1.5)
    monkeypatch.setattr(push, "SLOWEST_UPLOAD", float("inf"))
    push_folder(run_folder / "image_encoder", "owner/encoder")
    assert "no answer" in capsys.readouterr().err
    assert "model.safetensors" in endpoint.files("owner/encoder")


def test_no_server(run_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(push, "RETRIES", 0)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(SimIPUError, match=r"owner/encoder: .*refused"):
        push_folder(run_folder / "image_encoder", "owner/encoder")


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("owner/encoder", local_hub.READER_TOKEN, "you don't have the rights"),
        ("somebody/encoder", local_hub.OWNER_TOKEN, "you don't have the rights"),
        ("somebody/new", local_hub.OWNER_TOKEN, "you don't have the rights"),
        ("owner/encoder", "hf_unknown", "Invalid credentials"),
        ("not a name", local_hub.OWNER_TOKEN, "Repo id must"),
    ],
)
def test_missing_rights_are_named_and_not_retried(endpoint, run_folder, repo_id, token, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    endpoint.create("somebody/encoder", files={"README.md": b"theirs"})
    with pytest.raises(SimIPUError, match=message):
        push_folder(run_folder / "image_encoder", repo_id)
    assert capsys.readouterr().out == ""
    assert endpoint.files("somebody/encoder") == {"README.md": b"theirs"}


def test_folders_that_are_no_complete_model(endpoint, run_folder, tmp_path):
    config, weights = ((run_folder / name).read_bytes() for name in ("config.json", "model.safetensors"))
    for files, message in (
        ({}, r"config\.json"),
        ({"config.json": config}, "found none"),
        ({"config.json": config, "model.safetensors": weights[:-9]}, "damaged"),
        ({"config.json": b'{"model_type": "bert"}', "model.safetensors": weights}, "neither"),
    ):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(SimIPUError, match=message):
            push_folder(tmp_path, "owner/encoder")
    assert endpoint.repos == {}


def test_an_unfinished_run_is_published_with_its_record(endpoint, checkpoint, monkeypatch):
    monkeypatch.setattr("simipu_hf.hub.sources.newest_checkpoint", lambda path, **_: checkpoint)
    record = checkpoint.parent / "run.yaml"
    record.write_text(record.read_text(encoding="utf-8").replace("data/kitti", "/data/kitti/object"), encoding="utf-8")
    for model, repo_id in ((checkpoint, "owner/checkpoint"), (checkpoint.parent, "owner/run")):
        push_folder(model, repo_id, encoder_repo_id=f"{repo_id}-encoder")
        for repository in (repo_id, f"{repo_id}-encoder"):
            files = endpoint.files(repository)
            assert b"data_dir: \xe2\x80\xa6/object" in files["run.yaml"]
            assert b"license: cc-by-nc-sa-3.0" in files["README.md"]
            assert b"## Recipe" in files["README.md"]


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_checkpoints_are_published_in_the_background(endpoint, checkpoint, strategy, capsys):
    endpoint.create("owner/run", files={"last-checkpoint/rng_state_7.pth": b"of a run with more processes"})
    uploader = uploader_of(checkpoint.parent, hub_strategy=strategy)
    uploader.checkpoint_saved(checkpoint)
    uploader.running.result(30)
    files = endpoint.files("owner/run")
    assert {"model.safetensors", "image_encoder/model.safetensors", "README.md", "run.yaml"} <= set(files)
    resumable = {name for name in files if name.startswith("last-checkpoint/")}
    assert ({f"last-checkpoint/{name}" for name in RESUME} <= resumable) == (strategy == "checkpoint")
    assert ("last-checkpoint/rng_state_7.pth" in resumable) == (strategy != "checkpoint")
    assert not RESUME & set(files)
    assert not any("training_args" in name for name in files)
    assert "published checkpoint-20" in capsys.readouterr().out
    assert not list(checkpoint.parent.glob(".hub*"))


def test_checkpoint_deleted_during_its_upload_is_still_published_whole(endpoint, checkpoint):
    weights = (checkpoint / "model.safetensors").read_bytes()
    endpoint.faults.append(local_hub.Fault(r"repos/create", delay=0.5))
    uploader = uploader_of(checkpoint.parent)
    uploader.checkpoint_saved(checkpoint)
    running = uploader.running
    uploader.checkpoint_saved(checkpoint)
    assert uploader.running is running  # one upload at a time
    shutil.rmtree(checkpoint)
    uploader.running.result(30)
    assert endpoint.files("owner/run")["model.safetensors"] == weights


def test_a_run_that_ends_early_waits_for_an_upload_and_names_what_it_left_out(checkpoint, monkeypatch, capsys):
    released = threading.Event()
    monkeypatch.setattr(push, "_upload", lambda *_: released.wait(30) and push.PushReport("", "c" * 40))
    threading.Timer(0.2, released.set).start()
    for limit in (30, 0.1):
        monkeypatch.setattr(push, "LAST_WAIT", limit)
        uploader = uploader_of(checkpoint.parent, hub_private_repo=True)
        uploader.checkpoint_saved(checkpoint)
        with pytest.raises(RuntimeError), uploader:
            raise RuntimeError
        released.clear()
    said = capsys.readouterr().out
    released.set()
    uploader.running.result(30)
    assert not list(checkpoint.parent.glob(".hub*"))
    assert said.index("published checkpoint-20 as owner/run") < said.index("checkpoint-20 was not published before")
    assert f"simipu-hf push --model {checkpoint} --repo_id owner/run --private\n" in said


def test_an_upload_that_hangs_changes_no_exit_code_and_keeps_nothing_from_being_removed():
    program = (
        "import time; from simipu_hf.errors import *; from simipu_hf.hub.push import _in_background\n"
        "def run():\n _in_background(lambda: time.sleep(60)); raise TrainingInterrupted('stopped', 143)\n"
        "AT_THE_END.callback(print, 'removed')\n"
        "import atexit; atexit.register(lambda: print('the interpreter ended it'))\n"
        "raise SystemExit(exit_code_of(run))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "removed\n", "stopped\n")


def test_the_end_publishes_model_and_encoder(endpoint, run_folder, capsys):
    uploader = uploader_of(run_folder, hub_strategy="end", encoder_repo_id="owner/encoder")
    uploader.checkpoint_saved(run_folder)
    assert uploader.running is None
    with pytest.raises(SimIPUError, match="the encoder would replace the model"):
        push_folder(run_folder, "owner/run", encoder_repo_id="owner/run")
    uploader.finish()
    assert "model.safetensors" in endpoint.files("owner/run")
    assert "model.safetensors" in endpoint.files("owner/encoder")
    uploader_of(run_folder, encoder_repo_id="somebody/encoder").finish()
    published = f"{endpoint.url}/owner/run was published; Hub repository somebody/encoder: "
    assert f"not everything was published: {published}" in capsys.readouterr().out


def test_failures_are_reported_and_never_raised(endpoint, checkpoint, run_folder, capsys):
    uploader = uploader_of(checkpoint.parent, "somebody/run")
    uploader.checkpoint_saved(checkpoint)
    uploader.running.result(30)
    assert "checkpoint-20 was not published: Hub repository somebody/run: " in capsys.readouterr().out
    uploader.finish()
    assert "simipu-hf push --model" in capsys.readouterr().out
    (checkpoint / "model.safetensors").write_bytes(b"half")
    uploader.checkpoint_saved(checkpoint)
    assert "damaged" in capsys.readouterr().out


def test_loading_from_a_hub_that_says_no(endpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SimIPUError, match=r"owner/absent: .*Repository [Nn]ot [Ff]ound"):
        load_image_encoder("owner/absent", verbose=False)
    endpoint.create("owner/encoder", files={"config.json": b"{}"})
    with pytest.raises(SimIPUError, match="v9"):
        load_image_encoder("owner/encoder", revision="v9", verbose=False)
    endpoint.create("owner/secret", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SimIPUError, match=r"owner/secret: .*private"):
        load_image_encoder("owner/secret", verbose=False)


ROWS = datasets.Dataset.from_dict({"frame_id": ["a", "b", "c"]})
ONE_SPLIT = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {{split: {}, path: {}}}\n---\n"


def published_card(endpoint, repo_id: str) -> DatasetCard:
    return DatasetCard(endpoint.files(repo_id, "datasets")["README.md"].decode())


def test_data_set_from_kitti_is_private_and_says_why(endpoint, tmp_path, capsys):
    ROWS.to_parquet(tmp_path / "rows" / "train-00000-of-00001.parquet")
    ROWS.select(range(2)).to_parquet(tmp_path / "rows" / "train.clean-00000-of-00001.parquet")
    push_dataset(tmp_path / "rows", "owner/kitti")
    repo = endpoint.repos["datasets", "owner/kitti"]
    assert repo.private
    assert "CC BY-NC-SA" in capsys.readouterr().err
    card = published_card(endpoint, "owner/kitti")
    assert card.data.license == "cc-by-nc-sa-3.0"
    assert "3 rows in train, 2 rows in train.clean" in card.text
    assert "no commercial use" in card.text
    (tmp_path / "rows" / "train.clean-00000-of-00001.parquet").unlink()
    push_dataset(tmp_path / "rows", "owner/own", license="cc-by-4.0")
    assert capsys.readouterr().out == ""
    assert not endpoint.repos["datasets", "owner/own"].private
    assert "commercial" not in published_card(endpoint, "owner/own").content
    for shard in range(2):
        ROWS.shard(2, shard).to_parquet(tmp_path / "rows" / f"train-{shard:05d}-of-00002.parquet")
    (tmp_path / "rows" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(SimIPUError, match=r"owner/own: expected a private one, found a public one"):
        push_dataset(tmp_path / "rows", "owner/own")
    shards = [name for name in endpoint.files("owner/own", "datasets") if name.endswith("parquet")]
    assert shards == ["train-00000-of-00001.parquet"]
    push_dataset(tmp_path / "rows", "owner/own", license="cc-by-4.0")
    shards = [name for name in endpoint.files("owner/own", "datasets") if name.endswith("parquet")]
    assert shards == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    (tmp_path / "rows" / "README.md").write_text(ONE_SPLIT.format("own", "train-*"), encoding="utf-8")
    push_dataset(tmp_path / "rows", "owner/listed", license="cc-by-4.0")
    [config] = published_card(endpoint, "owner/listed").data["configs"]
    assert config["data_files"] == [{"split": "own", "path": "train-*"}]
    header = "---\ntags: [mine]\n---\n"
    (tmp_path / "rows" / "README.md").write_text(header, encoding="utf-8")
    push_dataset(tmp_path / "rows", "owner/header", license="cc-by-4.0")
    assert {"mine", "lidar"} <= set(published_card(endpoint, "owner/header").data.tags)
    (tmp_path / "rows" / "README.md").write_text(header + "Important caveat.\n", encoding="utf-8")
    push_dataset(tmp_path / "rows", "owner/edited", license="cc-by-4.0")
    assert not endpoint.repos["datasets", "owner/edited"].private
    push_dataset(tmp_path / "rows", "owner/kitti-edited")  # no licence in it, none given
    assert endpoint.repos["datasets", "owner/kitti-edited"].private
    edited = published_card(endpoint, "owner/edited")
    assert (edited.text.strip(), edited.data.tags, edited.data.license) == ("Important caveat.", ["mine"], "cc-by-4.0")
    with pytest.raises(SimIPUError, match="Parquet"):
        push_dataset(tmp_path / "absent", "owner/own")
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    images = datasets.Dataset.from_dict({"image": [str(tmp_path / "1.png")]})
    images.cast_column("image", datasets.Image()).to_parquet(tmp_path / "paths" / "train.parquet")
    with pytest.raises(SimIPUError, match=r"train\.parquet: expected image files, found paths"):
        push_dataset(tmp_path / "paths", "owner/own")
    (tmp_path / "rows" / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    with pytest.raises(SimIPUError, match=r"README.md: its header between --- lines cannot be read"):
        push_dataset(tmp_path / "rows", "owner/own")


@pytest.fixture
def parts(tmp_path):
    """Folders of rows: of train, of val, and of both."""
    for folder in ("train", "val", "both"):
        for split in ("train", "val") if folder == "both" else (folder,):
            ROWS.to_parquet(tmp_path / folder / "data" / f"{split}-00000-of-00001.parquet")
    return tmp_path


def test_splits_are_published_together(endpoint, parts):
    older = {"data/train-00000-of-00001-1a2b.parquet": b"rows"}  # as older versions of datasets name it
    repo = endpoint.create("owner/rows", "datasets", files=older)
    push_dataset(parts / "train", "owner/rows", license="cc-by-4.0")
    with pytest.raises(SimIPUError, match=r"expected no split that is not published now, found data/train: publish"):
        push_dataset(parts / "val", "owner/rows", license="cc-by-4.0")
    assert set(endpoint.files("owner/rows", "datasets")) == {"README.md", "data/train-00000-of-00001.parquet"}
    push_dataset(parts / "both", "owner/rows", license="cc-by-4.0")
    splits = {f"data/{split}-00000-of-00001.parquet" for split in ("train", "val")}
    assert set(endpoint.files("owner/rows", "datasets")) == {"README.md", *splits}
    assert len(repo.commits) == 4  # two before


def test_a_split_that_is_pushed_meanwhile_stays(endpoint, parts, monkeypatch):
    create_commit = push.HfApi.create_commit

    def after_another(*args, **arguments):
        monkeypatch.setattr(push.HfApi, "create_commit", create_commit)
        push_dataset(parts / "val", "owner/rows", license="cc-by-4.0")
        return create_commit(*args, **arguments)

    monkeypatch.setattr(push.HfApi, "create_commit", after_another)
    with pytest.raises(SimIPUError, match="found data/val"):
        push_dataset(parts / "train", "owner/rows", license="cc-by-4.0")
    assert "data/val-00000-of-00001.parquet" in endpoint.files("owner/rows", "datasets")
