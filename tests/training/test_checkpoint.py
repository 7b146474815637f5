"""Checkpoints are complete or absent, damage is found, nothing is unpickled."""

import os
import pickle
from unittest.mock import Mock

import pytest
import torch
from payload import Payload
from safetensors.torch import save_file

from simipu_hf.errors import SimIPUError
from simipu_hf.training import checkpoint as module
from simipu_hf.training.checkpoint import (
    TrainingState,
    list_checkpoints,
    newest_checkpoint,
    resumed_step,
    save_checkpoint,
)

IDENTITY = {"kind": "PreTrainingArguments", "seed": 0}


def save(folder, step, **options):
    def save_files(path):
        save_file({"weight": torch.full((100,), float(step))}, path / "model.safetensors")
        tensors = {"moments": [torch.arange(5.0)], "step": step, "state": {"python": (3, (1, 2), None)}}
        torch.save(tensors, path / "training_state.pt")

    return save_checkpoint(folder, step, save=save_files, identity=IDENTITY, **options)


def test_keeps_the_newest(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step, total_limit=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    save(tmp_path, 8, total_limit=2)  # never the one just written
    assert (tmp_path / "checkpoint-8").is_dir()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("disk full")])
def test_a_failed_write_leaves_the_last_good_one(tmp_path, monkeypatch, error):
    save(tmp_path, 1, total_limit=1)
    monkeypatch.setattr(module.torch, "save", Mock(side_effect=error))
    with pytest.raises(SimIPUError, match=r"checkpoint-2.*Earlier ones are untouched"):
        save(tmp_path, 2, total_limit=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert resumed_step(tmp_path / "checkpoint-1", IDENTITY) == 1
    assert torch.load(tmp_path / "checkpoint-1" / "training_state.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda p: os.truncate(p / "training_state.pt", 10), "contents of training_state.pt differ"),
        (lambda p: flip_a_bit(p / "model.safetensors"), "contents of model.safetensors differ"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: os.truncate(p / "manifest.json", 10), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_text('{"files": 3}', encoding="utf-8"), "manifest.json is damaged"),
    ],
)
def test_damage_is_named_and_passed_over(tmp_path, damage, message):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad)
    with pytest.raises(SimIPUError, match=message):
        resumed_step(bad, IDENTITY)
    heard = []
    assert newest_checkpoint(tmp_path, on_damaged=heard.append) == good
    assert len(heard) == 1
    with pytest.raises(SimIPUError, match="is not a training checkpoint"):  # the run, not one of its checkpoints
        resumed_step(tmp_path, IDENTITY)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_pickled_payload_is_refused_and_not_run(tmp_path):
    payload = Payload(tmp_path / "owned")
    for write in (
        lambda path: torch.save({"x": payload}, path / "training_state.pt"),
        lambda path: (path / "training_state.pt").write_bytes(pickle.dumps(payload)),
    ):
        path = save_checkpoint(tmp_path, 1, save=write, identity=IDENTITY)
        with pytest.raises(SimIPUError, match="unpickling runs code"):
            TrainingState(*[None] * 8).restore(path)
    assert not (tmp_path / "owned").exists()


def test_differences_between_runs_are_all_listed(tmp_path):
    def resume(saved, current):
        resumed_step(save_checkpoint(tmp_path, 1, save=lambda folder: None, identity=saved), current)

    resume({"a": 1, "zoom": [1, 1.5]}, {"a": 1, "zoom": [1.0, 1.5]})
    with pytest.raises(SimIPUError, match=r"(?s)a: 1 in the checkpoint, 2 now.*b: absent in the checkpoint, 3 now"):
        resume({"a": 1, "c": 0}, {"a": 2, "b": 3, "c": 0})
    with pytest.raises(SimIPUError, match="kind: absent in the checkpoint, PreTrainingArguments now"):
        resume({}, IDENTITY)
    with pytest.raises(SimIPUError, match="training_version: 4 in the checkpoint, 5 now"):
        resume(IDENTITY | {"training_version": 4}, IDENTITY | {"training_version": 5, "a": 9})
