"""The pre-training command on a tiny model and made-up frames: results, resume, refusals."""

import dataclasses
import json
import math
import os
import pickle
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from tiny_run import OVERRIDES, arguments, make_rows, reset_accelerate, stopping, write_frames
from tiny_simipu import tiny_batch
from transformers.utils.logging import is_progress_bar_enabled
from weights import assert_same_weights, weights

from simipu_hf import pretrain as module
from simipu_hf.data.loading import load_pretraining_dataset
from simipu_hf.data.rows import dataset_from_rows
from simipu_hf.data.streaming import stream_two_views
from simipu_hf.data.two_views import TwoViewAugmentation, TwoViewDataset
from simipu_hf.errors import SimIPUError, TrainingInterrupted
from simipu_hf.files import write_lock
from simipu_hf.hub.card import model_card
from simipu_hf.hub.push import HubUploader
from simipu_hf.hub.sources import model_folder
from simipu_hf.modeling.configuration_simipu import SimIPUConfig
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.pretrain import create_augmentation, pretrain
from simipu_hf.training.arguments import PreTrainingArguments, parse_arguments
from simipu_hf.training.checkpoint import list_checkpoints, write_manifest
from simipu_hf.training.logging import read_metrics
from simipu_hf.training.run_folder import find_checkpoint

TIMES = ("rows_per_second", "seconds_per_step", "data_wait_share", "memory_gb")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    reset_accelerate()


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    write_frames(folder)
    return folder


@pytest.fixture
def run(frames, tmp_path, monkeypatch):
    """Calls `pretrain` with tiny defaults; flags as text, the output folder as a name. It draws no pictures."""
    for name in ("draw_curves", "draw_features"):
        monkeypatch.setattr(module, name, lambda *_: None)

    def call(name: str, *flags: str):
        return pretrain(arguments(frames, tmp_path / name, *flags))

    return call


@pytest.fixture(scope="module")
def whole(frames, tmp_path_factory):
    """A run of eight steps that nothing interrupts, with all its checkpoints; tests change copies."""
    return pretrain(arguments(frames, tmp_path_factory.mktemp("whole") / "whole", "--save_total_limit", "0"))


DROP_PATH = ("--config_overrides", OVERRIDES + ",image_config.model_args={drop_path_rate: 0.5}")


def assert_same_result(first, second):
    assert_same_weights(first, second)
    lines = [[{k: v for k, v in line.items() if k not in TIMES} for line in metrics(f)] for f in (first, second)]
    assert lines[0] == lines[1]


def metrics(folder):
    return read_metrics(folder / "metrics.jsonl")


def test_writes_a_complete_folder(whole):
    out = whole
    assert [p.name for p in list_checkpoints(out)] == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    assert {p.name for p in out.iterdir()} >= {
        *("config.json", "model.safetensors", "processor_config.json", "image_encoder", "metrics.jsonl", "run.yaml")
    }
    assert not [p for p in out.rglob("*") if "partial" in p.name]
    assert (out / "pictures" / "image_features.png").is_file()
    assert "(pictures/image_features.png)" in model_card(out)
    for folder in (out, out / "checkpoint-6"):
        assert_same_weights(SimIPUForPreTraining.from_pretrained(folder), folder)
    lines = metrics(out)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert lines[0]["inter_modal_chance"] == pytest.approx(math.log(2 * 32), abs=0.5)
    assert lines[0]["learning_rate/point_encoder"] == 1e-3
    assert lines[0]["grad_norm/image_encoder"] > 0
    # five steps an epoch: the official decay sets in with the sixth
    assert lines[-1]["learning_rate/image_encoder"] == pytest.approx(0.003 * 0.99)


def test_run_file_reproduces_the_run(whole, tmp_path):
    record = yaml.safe_load((whole / "run.yaml").read_text(encoding="utf-8"))
    assert record["data"]["rows"] == 10
    assert record["versions"]["torch"] == torch.__version__
    flags = ["--config", str(whole / "run.yaml"), "--output_dir", str(tmp_path / "again")]
    assert_same_result(whole, pretrain(parse_arguments(PreTrainingArguments, flags)))


@pytest.mark.parametrize(("workers", "accumulation"), [("0", "1"), ("2", "2")])
def test_resumes_to_the_bit(request, run, tmp_path, monkeypatch, workers, accumulation):
    flags = ("--dataloader_num_workers", workers, "--gradient_accumulation_steps", accumulation)
    flags += DROP_PATH if accumulation == "2" else ()
    # another number of workers changes nothing
    uninterrupted = request.getfixturevalue("whole") if accumulation == "1" else run("whole", *flags[2:])
    break_off(run, monkeypatch, 5, *flags)
    (tmp_path / "broken" / ".checkpoint-6.partial").mkdir()
    resumed = run("broken", *flags, "--resume_from_checkpoint", "latest")
    assert_same_result(uninterrupted, resumed)
    assert not (resumed / ".checkpoint-6.partial").exists()


def break_off(run, monkeypatch, step, *flags):
    with monkeypatch.context() as patch:
        patch.setattr(module, "clip_gradients", stopping(step, RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            run("broken", *flags)


def test_resumes_before_the_first_checkpoint(run, whole, monkeypatch):
    break_off(run, monkeypatch, 3)
    resumed = run("broken", "--resume_from_checkpoint", "latest")
    assert_same_result(whole, resumed)
    assert [p.name for p in list_checkpoints(resumed)] == ["checkpoint-6", "checkpoint-8"]  # two are kept


def test_passes_over_a_damaged_checkpoint(run, whole, tmp_path, capsys):
    broken = shutil.copytree(whole, tmp_path / "broken")
    for name in ("checkpoint-8/model.safetensors", "checkpoint-6/training_state.pt"):
        with (broken / name).open("rb+") as stream:
            stream.truncate(1000)
    resumed = run("broken", "--save_total_limit", "0", "--resume_from_checkpoint", "latest")
    assert "the contents of model.safetensors differ from what was written" in capsys.readouterr().out
    assert_same_result(whole, resumed)


def test_a_state_that_is_refused_changes_nothing(run, whole, tmp_path):
    checkpoint = shutil.copytree(whole, tmp_path / "copied") / "checkpoint-6"
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "training_state.pt").write_bytes(pickle.dumps(tmp_path))
    write_manifest(checkpoint, manifest["step"], manifest["identity"])
    before = sorted(checkpoint.parent.rglob("*"))
    with pytest.raises(SimIPUError, match="holds more than tensors"):
        run("copied", "--resume_from_checkpoint", str(checkpoint))
    assert sorted(checkpoint.parent.rglob("*")) == before


def test_two_runs_do_not_write_into_one_folder(run, tmp_path):
    (tmp_path / "shared").mkdir()
    held = ExitStack()
    with ThreadPoolExecutor(1) as other:
        other.submit(held.enter_context, write_lock(tmp_path / "shared", tmp_path / "shared" / ".lock")).result()
        with pytest.raises(SimIPUError, match="shared is being written by another process"):
            run("shared", "--resume_from_checkpoint", "latest")
        assert [path.name for path in (tmp_path / "shared").iterdir()] == [".lock"]
        other.submit(held.close).result()


def test_sigterm_saves_and_says_how_to_continue(run, whole, monkeypatch):
    left = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "clip_gradients", stopping(4))
        patch.setattr(HubUploader, "checkpoint_saved", lambda self, path: None)
        patch.setattr(HubUploader, "__exit__", lambda self, kind, *_: left.append(kind))
        with pytest.raises(TrainingInterrupted, match=r"SIGTERM after step 4 of 8.*latest") as stopped:
            run("stopped", "--push_to_hub", "--hub_model_id", "user/name")
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert left == [TrainingInterrupted]
    assert_same_result(whole, run("stopped", "--resume_from_checkpoint", "latest"))


def test_stops_at_a_loss_that_is_no_number(run, monkeypatch, tmp_path):
    calls = []

    def poisoned(self, **inputs):
        calls.append(1)
        if len(calls) == 1 + 5:  # the first is the trial
            torch.nn.init.constant_(self.inter_image_head.layers[0].linear.weight, math.nan)
        return forward(self, **inputs)

    forward = SimIPUForPreTraining.forward
    monkeypatch.setattr(SimIPUForPreTraining, "forward", poisoned)
    with pytest.raises(SimIPUError, match=r"step 5: .*inter_modal_loss.* not finite") as error:
        run("out")
    assert "frame-0-" in str(error.value)
    assert "intra_modal_loss" not in str(error.value)
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    assert [line["step"] for line in metrics(tmp_path / "out")] == [2, 4]


def test_evaluation_changes_nothing(run, monkeypatch):
    plain = run("plain", *DROP_PATH)
    recall, calls = module.correspondence_recall, []

    def without_points_at_first(*inputs):
        calls.append(1)
        return {name: value if len(calls) % 2 == 0 else math.nan for name, value in recall(*inputs).items()}

    monkeypatch.setattr(module, "correspondence_recall", without_points_at_first)
    watched = run("watched", *DROP_PATH, "--eval_steps", "3", "--per_device_eval_batch_size", "3")
    assert_same_weights(plain, watched)
    evaluations = [line for line in metrics(watched) if "eval/inter_modal_loss" in line]
    assert [line["step"] for line in evaluations] == [3, 6, 8]
    assert 0 <= evaluations[0]["eval/recall_within_1_cells"] <= evaluations[0]["eval/recall_within_5_cells"] <= 1


def test_gradient_checkpointing_computes_blocks_again_and_changes_nothing(run, monkeypatch):
    def counted(self, x):
        calls.append(self)
        return forward(self, x)

    calls, forward = [], timm.models.resnet.BasicBlock.forward
    monkeypatch.setattr(timm.models.resnet.BasicBlock, "forward", counted)
    plain, plain_calls = run("plain", "--max_steps", "3"), len(calls)
    saving = run("saving", "--max_steps", "3", "--gradient_checkpointing")
    assert len(calls) - plain_calls >= plain_calls + 3  # at least one in the backward pass of every step
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(saving)[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_bf16_trains(run, monkeypatch):
    def recorded(self, x):
        output = forward(self, x)
        seen.add(output.dtype)
        return output

    seen, forward = set(), torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", recorded)
    out = run("out", "--mixed_precision", "bf16", "--max_steps", "3")
    assert torch.bfloat16 in seen
    assert all(value.dtype != torch.bfloat16 for value in weights(out).values())
    assert math.isfinite(metrics(out)[-1]["loss"])


def test_a_gradient_can_be_clipped(run):
    plain, clipped = run("plain", "--max_steps", "2"), run("clipped", "--max_grad_norm", "0.001", "--max_steps", "2")
    assert metrics(clipped)[0]["grad_norm/image_encoder"] > 0.001  # logged as it was before clipping
    name = "simipu.image_encoder.layer4.0.conv1.weight"
    assert not torch.equal(weights(clipped)[name], weights(plain)[name])


def test_the_maps_of_a_step_are_freed_before_the_next(run, monkeypatch):
    def watched(self, **inputs):
        alive.append(bool(last) and last.pop()() is not None)
        output = forward(self, **inputs)
        last.append(weakref.ref(output.image_embeds))
        return output

    alive, last, forward = [], [], SimIPUForPreTraining.forward
    monkeypatch.setattr(SimIPUForPreTraining, "forward", watched)
    run("out", "--max_steps", "4")
    assert alive == [False] * 5  # the first is the trial


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_encoder", "resnet1000"], "no model named 'resnet1000'"),
        (["--num_points", "32"], "first step failed: D-FPS has to draw 64 points from 32"),
        (["--config_overrides", OVERRIDES + ",temperatur=1"], "no field temperatur"),
        (["--config_overrides", OVERRIDES + ",image_config.stride=1"], "no field stride"),
        (["--config_overrides", "loss.x=1"], "expected name=value or image_config.name=value"),
        (["--config_overrides", "architectures=[x]"], "SimIPUConfig has no field architectures"),
        (["--config_overrides", "image_config.architecture=resnet18"], "no field architecture to change"),
        (["--config_overrides", "preset=official"], "has no field preset to change; --preset"),
        (["--augmentation_overrides", "zoom=[1,2]"], "augmentation_overrides.*zoom.*the fields are rotation"),
        (["--augmentation_overrides", "random_zoom=2"], "augmentation_overrides"),
        (["--augmentation_overrides", "scale=[1,2,3]"], "augmentation_overrides: too many values"),
        (["--augmentation_overrides", "rotation_center=[0,0]"], "rotation_center: expected x, y, z"),
        (["--config_overrides", "point_config.num_points=[64,32,16]"], "num_points: expected a list for each"),
        (["--augmentation_overrides", "hue=2"], "augmentation hue: expected 0 to 0.5"),
        (["--augmentation_overrides", "image.hue=0.1"], "expected name=value$"),
        (["--per_device_train_batch_size", "11"], "10 rows, but one optimizer step takes 11"),
        (["--eval_steps", "2", "--per_device_eval_batch_size", "7"], "6 rows"),
        (["--resume_from_checkpoint", "/no/such/checkpoint"], "is not a training checkpoint"),
        (["--image_size", "31", "96"], "at least 32 pixels"),
        (["--eval_steps", "2", "--validation_split", "train"], "10 of 10 frames are also trained on"),
        (["--preset", "official", "--depth_range", "1", "50"], "does nothing with the official preset"),
        (["--eval_steps", "2", "--dataset_config_name", "raw"], "dataset_config_name: it has no configurations"),
        (["--learning_rate", "-1"], "at least 0"),
        (["--layer_decay", "1.5"], "above 0 and at most 1"),
        (["--push_to_hub"], "--hub_model_id"),
        (["--push_to_hub", "--hub_model_id", "a/b", "--encoder_repo_id", "a/b"], "must differ"),
        (["--torch_compile", "--gradient_checkpointing"], "exclude each other"),
    ],
)
def test_refuses_bad_values_before_writing(run, tmp_path, flags, message):
    with pytest.raises(SimIPUError, match=message):
        run("out", *flags)
    assert not (tmp_path / "out").exists()


def test_output_folder_is_not_overwritten(run, tmp_path):
    thesis = tmp_path / "papers" / "image_encoder" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work", encoding="utf-8")
    with pytest.raises(SimIPUError, match=r"papers holds a model and no whole checkpoint"):
        run("papers", "--resume_from_checkpoint", "latest")
    assert thesis.exists()
    (tmp_path / "depth").mkdir()
    (tmp_path / "depth" / "run.yaml").write_text("kind: DepthArguments\n", encoding="utf-8")
    with pytest.raises(SimIPUError, match="depth holds a run of another command"):
        run("depth", "--resume_from_checkpoint", "latest")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "slurm-17.out").touch()  # a job's log file: its first start is no danger to anything
    assert find_checkpoint(arguments("KITTI", tmp_path / "job", "--resume_from_checkpoint", "latest")) is None


def test_what_needs_no_data_is_checked_before_it_is_read(run, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "load_rows", lambda *_: pytest.fail("the data is read"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work", encoding="utf-8")
    for name, flags, message in (
        ("out", ["--report_to", "swanlab"], "not installed"),
        ("out", ["--mixed_precision", "fp16"], "needs a GPU"),
        ("papers", [], "not empty"),
    ):
        with pytest.raises(SimIPUError, match=message):
            run(name, *flags)


def test_a_run_leaves_the_session_as_it_was(run):
    AcceleratorState._reset_state()
    own = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    drawn = []
    for seed in (1, 2):  # not that of the run
        random.seed(seed), np.random.seed(seed)
        run(f"out{seed}", "--max_steps", "1")
        drawn.append((random.random(), np.random.rand()))
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] != drawn[1][1]
    assert (own.mixed_precision, own.gradient_accumulation_steps) == ("bf16", 4)
    assert is_progress_bar_enabled()
    AcceleratorState._reset_state()
    GradientState._reset_state()


def test_refuses_to_resume_another_configuration(run, tmp_path):
    run("out", "--max_steps", "3")
    with pytest.raises(SimIPUError) as error:
        run("out", "--resume_from_checkpoint", "latest", "--augmentation_overrides", "brightness=0.4")
    assert str(error.value).splitlines()[1:] == ["  augmentation.brightness: 0.0 in the checkpoint, 0.4 now"]
    with pytest.raises(SimIPUError, match=r"(?s)rows_per_forward: 2 in the checkpoint, 5 now.*seed: 0 in .* 1 now"):
        run("out", "--resume_from_checkpoint", "latest", "--seed", "1", "--per_device_train_batch_size", "5")
    with pytest.raises(SimIPUError, match="beyond the last step"):
        run("out", "--resume_from_checkpoint", "latest", "--max_steps", "2")
    with pytest.raises(SimIPUError, match="out is not empty: choose another folder, or continue the run in it"):
        run("out", "--resume_from_checkpoint", str(tmp_path / "out"))
    # as every folder of KITTI's layout counts its frames from 000000
    rows = [{**row, "image": Image.new("RGB", (128, 64), (9, index, 9))} for index, row in enumerate(make_rows(10))]
    dataset_from_rows(rows).save_to_disk(tmp_path / "other")
    with pytest.raises(SimIPUError, match="data_fingerprint"):
        run("out", "--resume_from_checkpoint", "latest", "--dataset_name", str(tmp_path / "other"))


def test_where_each_process_has_its_own_negatives_their_number_stays(run, monkeypatch):
    opened = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(module, "open_checkpoint", opened)
    own_negatives = ("--config_overrides", OVERRIDES + ",gather_negatives=false")
    for flags, counts in (((), False), (own_negatives, True), (("--no_sync_batch_norm",), True)):
        with pytest.raises(KeyboardInterrupt):
            run("out", *flags)
        assert ("num_processes" in opened.call_args.args[2]) == counts  # of what identifies a run


def test_a_longer_run_continues_a_finished_one(run, whole):
    run("short", "--max_steps", "4")
    assert_same_result(whole, run("short", "--max_steps", "8", "--resume_from_checkpoint", "latest"))


def test_the_last_step_may_change_where_the_schedule_does_not_depend_on_it(run, monkeypatch):
    flags = ("--lr_scheduler_type", "inverse_sqrt", "--warmup_steps", "1")
    out = run("out", *flags, "--max_steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr("simipu_hf.pretrain.finish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("out", *flags, "--max_steps", "2", "--resume_from_checkpoint", "latest")
    assert model_folder(out) == out / "checkpoint-2"  # not the model of the first end
    assert model_folder(out / "set_aside-1") == out / "set_aside-1"
    run("out", *flags, "--max_steps", "2", "--resume_from_checkpoint", "latest")
    assert model_folder(out) == out


def test_a_run_that_goes_on_from_an_earlier_checkpoint_keeps_both_ways(run, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    again = ("--resume_from_checkpoint", str(out / "checkpoint-3"), "--save_total_limit", "1")
    run("out", *again, "--max_steps", "4")
    assert f"what the run had beyond step 3 is now in {out / 'set_aside-1'}" in capsys.readouterr().out
    assert [p.name for p in list_checkpoints(out)] == ["checkpoint-4"]
    assert [p.name for p in list_checkpoints(out / "set_aside-1")] == ["checkpoint-6", "checkpoint-8"]
    assert [line["step"] for line in metrics(out / "set_aside-1")] == [2, 4, 6, 8]
    assert [line["step"] for line in metrics(out)] == [2, 4]
    again = run("again", "--resume_from_checkpoint", str(out / "set_aside-1" / "checkpoint-6"))
    assert_same_weights(whole, again)


def test_a_checkpoint_of_another_run_starts_in_an_empty_folder_alone(run, whole, tmp_path):
    mine, notes = run("mine", "--max_steps", "2", "--seed", "1"), tmp_path / "notes"
    notes.mkdir()
    (notes / "config.json").write_text("mine", encoding="utf-8")
    again = ("--resume_from_checkpoint", str(whole / "checkpoint-3"))
    for folder in (mine, notes):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(SimIPUError, match="not empty"):
            run(folder.name, *again)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert (run("new", *again) / "checkpoint-8").is_dir()


def test_a_first_step_that_fails_leaves_nothing_in_the_way(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SimIPUForPreTraining, "forward", lambda *_, **__: torch.zeros(2, 3) @ torch.zeros(2, 3))
        with pytest.raises(SimIPUError, match="the first step failed: mat1 and mat2"):
            run("out")
    assert not (tmp_path / "out").exists()
    run("out", "--max_steps", "1")


def test_trying_the_first_step_changes_nothing_and_finds_what_is_not_trained(frames, tmp_path):
    flags = arguments(frames, tmp_path / "out", "--config_overrides", OVERRIDES + ",image_config.out_indices=[2]")
    model, _ = module.create_model(flags)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module.try_first_step(Accelerator(cpu=True), model, tiny_batch(height=32, width=96))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"layer3", "layer4"}  # stage 2 is layer2
    assert all(p.grad is None for p in model.parameters())


class TestFromAnEarlierModel:
    @pytest.fixture(scope="class")
    def earlier(self, frames, tmp_path_factory):
        """An official model whose saved processor draws 100 points."""
        flags = arguments(frames, tmp_path_factory.mktemp("earlier"), "--preset", "official", "--num_points", "100")
        model, processor = module.create_model(flags)
        folder = tmp_path_factory.mktemp("earlier") / "model"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    def create(self, earlier, *flags):
        start = ("--data_dir", "none", "--output_dir", "none", "--model_name_or_path", str(earlier))
        found = parse_arguments(PreTrainingArguments, [*start, *flags])
        model, processor = module.create_model(found)
        return model, processor, create_augmentation(found, model.config)

    def test_all_of_it_is_kept(self, earlier):
        model, processor, augmentation = self.create(earlier)
        assert_same_weights(model, earlier)
        assert model.config.preset == "official"
        assert processor.feature_extractor.num_points == 100
        assert augmentation == TwoViewAugmentation.from_preset("official")

    def test_flags_change_it(self, earlier):
        model, processor, _ = self.create(
            earlier, "--num_points", "77", "--config_overrides",
            "temperature=0.2,image_config.out_indices=[-1],image_config.model_args={output_stride: 16}",
        )  # fmt: skip
        assert model.config.temperature == 0.2
        assert model.config.image_config.feature_grids[-1][:2] == [16.0, 16.0]
        assert processor.feature_extractor.num_points == 77

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--image_encoder", "resnet18"], "--image_encoder resnet18: .* has test_resnet"),
            (["--point_encoder", "sparse_conv"], "has pointnet2"),
            (["--preset", "recommended"], "has official"),
            (["--config_overrides", "projection_dim=9"], "size mismatch|mismatched|shape"),
        ],
    )
    def test_what_contradicts_it_is_refused(self, earlier, flags, message):
        with pytest.raises(SimIPUError, match=message):
            self.create(earlier, *flags)


def test_several_sources_resume_to_the_bit(run, tmp_path, monkeypatch):
    write_frames(tmp_path / "a", train=6)
    dataset_from_rows(make_rows(8, seed=5)).save_to_disk(tmp_path / "b")
    flags = ("--dataset_name", str(tmp_path / "a"), str(tmp_path / "b"), "--mixture", "1", "3")
    assert_resumes(run, monkeypatch, (*flags, "--dataloader_num_workers", "2"))


def test_a_stream_resumes_to_the_bit(run, tmp_path, monkeypatch):
    for shard in range(2):
        dataset_from_rows(make_rows(8, seed=shard)).to_parquet(tmp_path / "rows" / f"train-{shard}.parquet")
    dataset_from_rows(make_rows(3, seed=9)).to_parquet(tmp_path / "rows" / "validation-0.parquet")
    flags = ("--dataset_name", str(tmp_path / "rows"), "--streaming", "--lr_scheduler_type")
    assert_resumes(run, monkeypatch, (*flags, "cosine", "--dataloader_num_workers", "2", "--eval_steps", "6"))
    monkeypatch.setitem(stream_two_views.__kwdefaults__, "shuffle_buffer", 2)  # the state is that of datasets as well
    run("other", *flags, "constant", "--max_steps", "2")
    out = run(
        "other", *flags, "constant", "--max_steps", "4", "--eval_steps", "2", "--resume_from_checkpoint", "latest"
    )
    assert [line["step"] for line in metrics(out) if "eval/loss" in line] == [4]


@pytest.mark.parametrize("missing", [[], ["scene"]])
def test_scenes_of_a_stream_are_held_out(run, tmp_path, missing):
    rows = dataset_from_rows([{**row, "frame_id": f"{row['scene']}/{row['frame_id']}"} for row in make_rows(24)])
    rows.remove_columns(missing).to_parquet(tmp_path / "rows" / "train-0.parquet")
    flags = (
        *("--dataset_name", str(tmp_path / "rows"), "--streaming", "--lr_scheduler_type", "constant"),
        *("--eval_steps", "2", "--per_device_eval_batch_size", "1"),
    )
    out = run("out", *flags, "--validation_share", "0.4", "--max_steps", "2")
    assert math.isfinite(metrics(out)[-1]["eval/loss"])
    with pytest.raises(SimIPUError, match=r"stream: .* in the checkpoint"):
        run("out", *flags, "--validation_share", "0.3", "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_worker_says_is_its_message_alone(run, tmp_path, streaming):
    rows = make_rows(12)
    rows[5]["image"] = {"bytes": b"no picture", "path": None}
    dataset_from_rows(rows).to_parquet(tmp_path / "rows" / "train-0.parquet")
    flags = ("--streaming", "--lr_scheduler_type", "constant") if streaming else ()
    with pytest.raises(SimIPUError) as error:
        run("out", "--dataset_name", str(tmp_path / "rows"), "--dataloader_num_workers", "1", *flags)
    assert str(error.value).startswith("frame frame-0-5: image: expected a readable image, found Unidentified")
    assert str(error.value).count("frame-0-5") == len(str(error.value).splitlines()) == 1


def test_a_stream_ends_before_a_row_that_is_evaluated_on(run, tmp_path):
    rows = make_rows(20)
    rows[19]["frame_id"] = "renamed"
    dataset_from_rows(rows).to_parquet(tmp_path / "rows" / "train-0.parquet")
    dataset_from_rows([make_rows(20)[19], *make_rows(2, seed=1)]).to_parquet(
        tmp_path / "rows" / "validation-0.parquet"
    )
    flags = ("--dataset_name", str(tmp_path / "rows"), "--streaming", "--lr_scheduler_type", "cosine")
    with pytest.raises(SimIPUError, match=r"validation: .*'frame-0-19', 'renamed' among the training"):
        run("out", *flags, "--eval_steps", "4")
    assert not (tmp_path / "out").exists()


def assert_resumes(run, monkeypatch, flags):
    whole = run("whole", *flags)
    break_off(run, monkeypatch, 5, *flags)
    for _ in range(2):  # the second time there is nothing left to do
        assert_same_result(whole, run("broken", *flags, "--resume_from_checkpoint", "latest"))


def test_pretrained_vit_with_an_anchor_and_a_frozen_part(run, frames, tmp_path, monkeypatch):
    """timm's download is replaced; the rest is what `--pretrained_image_encoder` does."""
    create = timm.create_model
    monkeypatch.setattr(module.timm, "create_model", lambda *a, pretrained=False, **k: create(*a, **k))
    flags = (
        *("--image_encoder", "test_vit", "--pretrained_image_encoder", "--anchor_weight", "0.5", "--max_steps", "6"),
        *("--freeze", "patch_embed", "blocks.0", "--config_overrides", OVERRIDES),
    )
    assert_resumes(run, monkeypatch, flags)
    out = tmp_path / "whole"
    monkeypatch.setattr(module.timm, "create_model", lambda *a, pretrained=False, **k: scaled(create(*a, **k)))
    with pytest.raises(SimIPUError, match=r"anchor: \w+ in the checkpoint, \w+ now"):
        run("broken", *flags, "--resume_from_checkpoint", "latest")
    assert yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))["recipe"]["optimizer"] == "adamw"
    assert metrics(out)[-1]["anchor_loss"] > 0
    start = SimIPUForPreTraining.from_pretrained(out / "checkpoint-3").state_dict()
    encoder = "simipu.image_encoder."
    for part, trained in (("blocks.0.attn.qkv.weight", False), ("blocks.1.attn.qkv.weight", True)):
        assert torch.equal(weights(out)[encoder + part], start[encoder + part]) is not trained


def scaled(model):
    for parameter in model.parameters():
        parameter.data *= 2
    return model


def test_the_schedule_waits_where_the_loss_scaler_skips_a_step(run, monkeypatch):
    def create_accelerator(arguments):
        accelerator = original(arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)  # every gradient overflows
        return accelerator

    original = module.create_accelerator
    monkeypatch.setattr(module, "create_accelerator", create_accelerator)
    out = run("out")
    assert [line["learning_rate/image_encoder"] for line in metrics(out)] == [0.003] * 4
    monkeypatch.setattr(module, "MAX_SKIPPED_STEPS", 3)
    with pytest.raises(SimIPUError, match=r"step 3: the gradient was not finite.* fp16"):
        run("stopped")


def test_second_start_on_a_finished_run_only_finishes(run, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "model.safetensors").unlink()
    (out / ".final.partial" / "image_encoder").mkdir(parents=True)  # as if it had been killed while finishing
    (out / ".final.partial" / "image_encoder" / "config.json").write_text("{", encoding="utf-8")
    again = run("out", "--resume_from_checkpoint", "latest")
    assert_same_result(whole, again)
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(SimIPUError, match="holds a model and no whole checkpoint"):
        run("out", "--resume_from_checkpoint", "latest")
    assert_same_result(whole, again)
    assert f'timm.create_model("local-dir:{out.as_posix()}/image_encoder", pretrained=True)' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("pretrain", ["--data_dir=a"]),
        ("finetune_depth", ["--train_frames=a", "--image_encoder=b"]),
        ("finetune_detection", ["--train_frames=a", "--image_encoder=b"]),
    ],
)
def test_a_module_ends_with_one_line_for_a_mistake(name, flags, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["", *flags, "--output_dir=c", "--seed=-1"])
    monkeypatch.delitem(sys.modules, f"simipu_hf.{name}", raising=False)  # runpy warns of a module that is there
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"simipu_hf.{name}", run_name="__main__")
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: --seed must be at least 0 and below 2**32, found -1\n"


def test_a_killed_process_resumes_to_the_bit(frames, tmp_path):
    """SIGKILL at some moment behind the second checkpoint of a real process."""
    changes = ("--max_steps", "20", "--checkpointing_steps", "2", "--save_total_limit", "0")  # which keeps all
    flags = arguments(frames, tmp_path / "whole", *changes)
    whole = pretrain(flags)
    config, out = tmp_path / "flags.json", tmp_path / "killed"
    config.write_text(json.dumps(flags.to_dict()), encoding="utf-8")
    again = ["--config", str(config), "--output_dir", str(out), "--resume_from_checkpoint", "latest"]
    command = [sys.executable, "-m", "simipu_hf.pretrain", *again]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "checkpoint-4").exists():
        time.sleep(0.05)
    time.sleep(np.random.default_rng().uniform(0, 0.3))
    process.kill()
    assert process.wait() != 0
    assert (out / "checkpoint-4").exists()
    assert_same_result(whole, pretrain(parse_arguments(PreTrainingArguments, again)))


def test_pushes_checkpoints_and_the_end(run, monkeypatch):
    heard = []

    class Uploader(HubUploader):
        def checkpoint_saved(self, path):
            SimIPUForPreTraining.from_pretrained(path)
            heard.append(path.name)

        def finish(self):
            heard.append((self.repo_id, self.strategy, self.private, self.encoder_repo_id))

    monkeypatch.setattr("simipu_hf.pretrain.HubUploader", Uploader)
    flags = ("--push_to_hub", "--hub_model_id", "user/name", "--hub_private_repo")
    run("out", *flags, "--hub_strategy", "checkpoint", "--encoder_repo_id", "user/encoder")
    end = ("user/name", "checkpoint", True, "user/encoder")
    assert heard == ["checkpoint-3", "checkpoint-6", "checkpoint-8", end]


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_read_only_output_folder(run, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(SimIPUError, match=r"out cannot be written, or is being written by another user: .*denied"):
        run("out")


def test_image_size_holds_for_the_official_preset_too():
    config = SimIPUConfig.from_preset("official")
    drawn = create_augmentation(PreTrainingArguments(data_dir="kitti", output_dir="out"), config)
    fixed = create_augmentation(PreTrainingArguments(data_dir="kitti", output_dir="out", image_size=(64, 192)), config)
    assert drawn.random_resize == ((640, 192), (2400, 720))
    assert fixed == dataclasses.replace(drawn, random_resize=None)


@pytest.mark.parametrize(("size", "message"), [((64, 192), None), ((64, 96), "--image_size 64 192 would keep it")])
def test_warns_where_images_change_their_shape(frames, capsys, size, message):
    rows = load_pretraining_dataset(data_dir=str(frames))  # 96 x 32 pixels
    processor = SimIPUProcessor.from_preset("recommended", image_size=size)
    module.warn_of_squeezed_images(TwoViewDataset(rows, processor, TwoViewAugmentation()))
    said = capsys.readouterr().err
    assert (message in said) if message else not said


def test_damage_that_both_sides_find_is_told_once(frames, tmp_path, monkeypatch):
    def load(skipped, **_):
        skipped += ["frame 1: no scan", "frame 2: no scan"]
        return dataset_from_rows(make_rows(2, seed=len(skipped)), tmp_path)

    monkeypatch.setattr(module, "load_mixture", lambda **options: (load(**options), None))
    monkeypatch.setattr(module, "load_pretraining_dataset", load)
    skipped = []
    module.load_rows(arguments(frames, tmp_path / "out", "--on_bad_row", "skip", "--eval_steps", "1"), skipped)
    assert skipped == ["frame 1: no scan", "frame 2: no scan"]


def test_damaged_rows_that_are_skipped_end_no_run_and_are_named(frames, tmp_path, capsys, monkeypatch):
    damaged = {}
    for split in ("train", "validation"):
        encoded = load_pretraining_dataset(data_dir=str(frames), split=split)
        rows = [dict(row) for row in encoded.cast_column("image", datasets.Image(decode=False))]
        rows[0]["image"] = {"bytes": f"no picture of {split}".encode(), "path": None}
        damaged[split] = dataset_from_rows(rows)
    datasets.DatasetDict(damaged).save_to_disk(tmp_path / "damaged")
    flags = (
        *("--dataset_name", str(tmp_path / "damaged"), "--on_bad_row", "skip", "--resume_from_checkpoint", "latest"),
        *("--max_steps", "7", "--eval_steps", "7"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(module, "clip_gradients", stopping(6))  # an epoch has 5
        with pytest.raises(TrainingInterrupted):
            pretrain(arguments(frames, tmp_path / "out", *flags))
    assert "1 damaged rows were skipped:\n  row 0\n" in capsys.readouterr().err
    out = pretrain(arguments(frames, tmp_path / "out", *flags))
    assert (out / "image_encoder" / "config.json").is_file()
    assert not (out / "pictures").exists()
    assert math.isfinite(metrics(out)[-1]["eval/inter_modal_loss"])
    assert "2 damaged rows were skipped:\n  row 0\n  held-out row 0\n" in capsys.readouterr().err
