"""Two processes with B rows each are one process with 2B rows, to rounding in float64; and they resume exactly."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import OVERRIDES, reset_accelerate, write_frames

from simipu_hf.data.two_views import to_model_inputs
from simipu_hf.training.logging import read_metrics

WORKER = Path(__file__).with_name("data_parallel_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """What the worker wrote in two processes."""
    out = tmp_path_factory.mktemp("data_parallel")
    write_frames(out / "frames")
    flags = [
        *("--dataset_name", str(out / "frames"), "--image_encoder", "test_resnet", "--image_size", "32", "96"),
        *("--num_points", "128", "--config_overrides", OVERRIDES, "--report_to", "none", "--max_steps", "6"),
        *("--per_device_train_batch_size", "1", "--logging_steps", "3", "--checkpointing_steps", "2"),
        *("--dataloader_num_workers", "1", "--learning_rate", "0.003", "--gradient_accumulation_steps", "2"),
        *("--eval_steps", "3"),
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*launcher, str(WORKER), str(out), json.dumps(flags)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a hang takes its workers with it
    )
    try:
        _, errors = process.communicate(timeout=280)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-4000:]
    return out


@pytest.fixture
def worker():
    """The worker as a module, for its runs in this process."""
    spec = importlib.util.spec_from_file_location("data_parallel_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    reset_accelerate()
    module.module.clip_gradients, module.module.to_model_inputs = module.clip_gradients, to_model_inputs


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet"])
def test_two_processes_equal_one_with_twice_the_rows(worker, results, tmp_path, architecture, accumulation_steps):
    one = worker.train(architecture, accumulation_steps, tmp_path / "one")
    two = load_file(results / f"{architecture}-{accumulation_steps}.safetensors")
    assert one.keys() == two.keys()
    assert any(name.startswith("grad.simipu.point_encoder") for name in one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_resume_to_the_bit(results):
    whole, resumed = load_file(results / "whole/model.safetensors"), load_file(results / "broken/model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    lines = [read_metrics(results / name / "metrics.jsonl") for name in ("whole", "broken")]
    for name in ("loss", "eval/loss", "eval/recall_within_2_cells"):
        assert [line[name] for line in lines[0] if name in line] == [line[name] for line in lines[1] if name in line]
    assert [line["step"] for line in lines[1]] == [3, 3, 6, 6]
