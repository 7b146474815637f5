"""What `accelerate launch` of two processes computes is what one computes, to rounding; and they resume exactly."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from depth_rows import save_rows
from tiny_run import reset_accelerate, write_frames
from training import data_parallel_worker as worker
from weights import assert_same_weights, weights

from simipu_hf.evaluate_depth import evaluate_depth
from simipu_hf.training.arguments import EvaluateDepthArguments
from simipu_hf.training.logging import read_metrics


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """What the worker wrote in two processes."""
    out = tmp_path_factory.mktemp("data_parallel")
    write_frames(out / "frames")
    save_rows(out)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    helpers = Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(helpers), os.environ.get("PYTHONPATH", "")])
    environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "4"  # not ours: the flags count
    launcher = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
    ]
    process = subprocess.Popen(
        [*launcher, worker.__file__, str(out)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a hang takes its workers with it
    )
    try:
        _, errors = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-4000:]
    return out


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet"])
def test_two_processes_equal_one_with_twice_the_rows(results, architecture, accumulation_steps):
    name = f"{architecture}-{accumulation_steps}"
    worker.train(results, f"one-{name}", architecture, accumulation_steps)
    reset_accelerate()
    one, two = (results / folder for folder in (f"one-{name}", name))
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-10, atol=1e-10)
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    for part in ("image_encoder", "heads", "point_encoder"):  # before they were clipped
        norms = [[line[f"grad_norm/{part}"] for line in lines] for lines in (first, second)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-10)
        assert min(norms[0]) > 0


def test_two_processes_resume_to_the_bit(results):
    assert_same_weights(results / "whole", results / "broken")
    lines = [read_metrics(results / name / "metrics.jsonl") for name in ("whole", "broken")]
    for name in ("loss", "eval/loss", "eval/recall_within_2_cells"):
        assert [line[name] for line in lines[0] if name in line] == [line[name] for line in lines[1] if name in line]
    assert [line["step"] for line in lines[1]] == [3, 3, 6, 6]


def test_a_signal_to_one_of_two_processes_ends_both_after_a_checkpoint(results):
    assert_same_weights(results / "whole", results / "preempted")
    messages = {(results / f"interruption-{rank}.txt").read_text(encoding="utf-8") for rank in range(2)}
    assert len(messages) == 1
    assert re.match(r"stopped by SIGTERM after step [34] of 6, saved .*checkpoint-[34]\.", messages.pop())


def test_an_error_of_one_process_ends_both(results):
    told = [json.loads((results / f"errors-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert told == [["process 1 failed", "process 0 failed"]] * 2


def test_two_processes_share_the_evaluation_of_a_depth_model(results):
    steps = [line["step"] for line in read_metrics(results / "depth" / "metrics.jsonl")]
    assert steps == [1, 2]
    saved = json.loads((results / "depth" / "depth_evaluation.json").read_text(encoding="utf-8"))
    arguments = {"model": str(results / "depth"), "test_frames": [f"{results / 'rows'}#test"], "json": True}
    alone = evaluate_depth(EvaluateDepthArguments(**arguments, kb_crop=False, flip_test=False, device="cpu"))
    assert saved["num_images"] == alone["num_images"] == 2  # each process had one
    assert saved["metrics"] == {name: pytest.approx(value, rel=1e-6) for name, value in alone["metrics"].items()}
    manifest = json.loads((results / "depth" / "checkpoint-2" / "manifest.json").read_text(encoding="utf-8"))
    assert {"rng_state_0.pth", "rng_state_1.pth"} < manifest["files"].keys()
    assert manifest["identity"]["num_processes"] == 2  # one process with twice the frames would have another loss
