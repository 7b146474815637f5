"""The demo at its smallest: every stage runs, the report needs nothing else, failures are clean."""

import json
import re
import shutil

import numpy as np
import pytest
from html_pages import References
from safetensors.torch import load_file, save_file
from tiny_run import reset_accelerate

import simipu_hf.demo
from simipu_hf.data.rows import points_from_row
from simipu_hf.demo import DemoSettings, copy_frames, demo, load_rows
from simipu_hf.errors import SimIPUError, TrainingInterrupted
from simipu_hf.visualization.report import write_report

TINY = DemoSettings(
    num_frames=10,
    image_size=(32, 96),
    image_encoder="resnet10t",
    num_points=1024,
    per_device_train_batch_size=2,
    max_steps=2,
)
STAGES = ("data", "pretraining", "encoder", "depth", "pictures")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a finished demo."""
    folder = tmp_path_factory.mktemp("demo") / "simipu_demo"
    report = demo(folder, settings=TINY)
    reset_accelerate()
    assert report == folder / "report.html"
    return folder


def test_report_needs_no_other_file(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    page = References(text)
    assert page.fetched
    assert all(value.startswith("data:") for value in page.fetched)
    assert "default-src &#39;none&#39;" in text.partition("<style>")[0]  # whatever a script would like to fetch
    assert page.tags.count("img") == 7
    assert page.tags.count("iframe") == 1
    assert page.sections == [
        *("what-was-done", "the-data", "training", "features", "in-3-d", "depth", "use-the-encoder", "next-steps"),
    ]


def test_results_hold_every_stage_and_the_closing_words_say_what_where_and_next(made):
    results = json.loads((made / "results.json").read_text(encoding="utf-8"))
    stages = results["stages"]
    assert tuple(stages) == STAGES
    assert all(stages[name]["seconds"] >= 0 for name in STAGES)
    assert (stages["data"]["train_frames"], stages["data"]["held_out_frames"]) == (8, 2)
    assert stages["pretraining"]["held_out"]["inter_modal_loss"] > 0
    assert set(stages["depth"]["metrics"]) == {"scratch", "pretrained"}
    assert all((made / name).is_file() for name in stages["pictures"]["files"])
    words = simipu_hf.demo.closing_words(results)
    for part in ("report.html", "run/image_encoder", "results.json", "features_only=True", "simipu-hf pretrain"):
        assert part in words


def test_a_changed_weight_is_noticed(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    file = run / "image_encoder" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("weight"))
    weights[name] = weights[name] + 1e-3
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(SimIPUError, match=re.escape(name)):
        simipu_hf.demo.check_encoder(run, load_rows(made / "frames", "validation")[0])


def test_an_existing_folder_is_kept(made):
    with pytest.raises(SimIPUError, match="exists already"):
        demo(made, settings=TINY)
    assert (made / "report.html").exists()


def test_wrong_data_dir_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(SimIPUError, match="nothing_here"):
        demo(tmp_path / "out", data_dir=tmp_path / "nothing_here", settings=TINY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "kind"), [(SimIPUError("no luck"), SimIPUError), (KeyboardInterrupt(), TrainingInterrupted)]
)
def test_a_failed_stage_is_named_and_leaves_no_report(tmp_path, monkeypatch, error, kind):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(simipu_hf.demo, "make_frames", lambda *args: {})
    monkeypatch.setattr(simipu_hf.demo, "pretraining_arguments", lambda *args: None)
    monkeypatch.setattr(simipu_hf.demo, "pretrain", fail)
    with pytest.raises(kind, match=r"stage 2 of 5 \(pre-training.*No report was written"):
        demo(tmp_path / "out", settings=TINY)
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_report_that_cannot_be_written_leaves_the_old_one(made, tmp_path):
    old = tmp_path / "report.html"
    old.write_text("old", encoding="utf-8")
    results = json.loads((made / "results.json").read_text(encoding="utf-8"))
    with pytest.raises(FileNotFoundError):
        write_report(results, old)  # its pictures are not beside it
    assert old.read_text(encoding="utf-8") == "old"


def test_frames_are_copied_unchanged(made, tmp_path):
    copy_frames(made / "frames", tmp_path / "frames", num_frames=6)
    for split, count in (("train", 5), ("validation", 1)):
        copies, originals = load_rows(tmp_path / "frames", split), load_rows(made / "frames", split)
        assert list(copies["frame_id"]) == list(originals["frame_id"])[:count]
        assert np.array_equal(np.asarray(copies[0]["image"]), np.asarray(originals[0]["image"]))
        assert np.array_equal(points_from_row(copies[0]), points_from_row(originals[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]


def test_a_set_without_a_pair_of_splits_holds_out_its_last_frames(made, kitti_raw_mini, tmp_path):
    (drive := shutil.copytree(made / "drive", tmp_path / "drive")).joinpath("ImageSets/train.txt").unlink()
    copy_frames(drive, tmp_path / "overlapping", num_frames=10)  # val and trainval, which hold the same frames
    first, second = (set(load_rows(tmp_path / "overlapping", split)["frame_id"]) for split in ("train", "validation"))
    assert min(map(len, (first, second))) > 0
    assert not first & second
    copy_frames(kitti_raw_mini, tmp_path / "frames", num_frames=10)
    train, held_out = (list(load_rows(tmp_path / "frames", split)["frame_id"]) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (8, 2)
    assert not set(train) & set(held_out)
