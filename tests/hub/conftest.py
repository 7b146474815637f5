"""A Hub on this machine, a small trained-looking run, and processes that do not have the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from tiny_simipu import tiny_config
from torch import nn

from simipu_hf.hub.export import write_timm
from simipu_hf.hub.sources import find_image_encoder
from simipu_hf.hub.weights import EncoderWeights, InputConvention, batch_norm_eps
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

sys.path.insert(0, str(Path(__file__).parent))  # the helper modules beside this file

import local_hub

OPTIONAL = ("spconv", "cumm", "numba", "llvmlite", "torch_quickfps", "scipy", "triton", "datasets", "accelerate")
# as if they were not installed: importing them fails, and `find_spec` finds nothing
PREAMBLE = f"""
import json, sys
sys.modules.update(dict.fromkeys({("simipu_hf", *OPTIONAL)}))
globals().update(json.loads(sys.argv[1]))
result = {{}}
"""


@pytest.fixture
def endpoint(monkeypatch):
    """This process talks to the local Hub; the client reads its environment only once, so the constants are set."""
    file = "{repo_id}/resolve/{revision}/{filename}"
    with local_hub.serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{file}")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", local_hub.OWNER_TOKEN)
        yield hub


@pytest.fixture
def isolated(tmp_path):
    """Run Python code in a process in which neither this package nor any module of `OPTIONAL` can be imported."""

    def run(code: str, hub=None, offline=False, **values) -> dict:
        work = tmp_path / "elsewhere"
        work.mkdir(exist_ok=True)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH", "TRANSFORMERS_"))}
        env |= {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": local_hub.OWNER_TOKEN}
        env |= {"HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
        env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        command = [sys.executable, "-c", f"{PREAMBLE}{code}\nprint(json.dumps(result))", json.dumps(values)]
        done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def randomize(model: nn.Module) -> nn.Module:
    """Batch-norm statistics as after training: no layer is an identity, activations stay of order one."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.3, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.0, generator=generator)
            module.bias.data.uniform_(-0.1, 0.1, generator=generator)
            module.num_batches_tracked.fill_(12)
    return model


@pytest.fixture
def encoder() -> nn.Module:
    """A ResNet-18 with the official batch-norm epsilon, in evaluation mode."""
    torch.manual_seed(0)
    model = randomize(timm.create_model("resnet18", num_classes=0)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return model


@pytest.fixture(scope="session")
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding: up to 1e-5 of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def export_timm(encoder: nn.Module, folder: Path, **convention) -> Path:
    """Write a live timm model as an export does; `convention` are fields of `InputConvention`."""
    about = (encoder.pretrained_cfg["architecture"], encoder.state_dict(), batch_norm_eps(encoder))
    write_timm(EncoderWeights(*about, encoder._model_args, InputConvention(**convention)), folder)
    return folder


RUN = """\
command: simipu-hf pretrain --data_dir data/kitti --output_dir /home/alice/runs/1 --hub_token hf_abcdefghijklmnop
arguments: {image_encoder: test_resnet, data_dir: data/kitti, output_dir: /home/alice/runs/1, max_steps: 20}
recipe: {optimizer: sgd, learning_rate: 0.03}
data: {dataset: kitti, config: object, split: train, rows: 25, fingerprint: 0123456789abcdef}
versions: {python: 3.11.7, torch: 2.15.0}
"""


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """What a finished pre-training leaves: model, processor, code, encoder, metrics, record."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    model = randomize(SimIPUForPreTraining(tiny_config(architecture="test_resnet")))
    model.save_pretrained(folder)
    SimIPUProcessor.from_preset("recommended", image_size=(64, 96), num_points=256).save_pretrained(folder)
    write_timm(find_image_encoder(folder), folder / "image_encoder")
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")
    chance = {"inter_modal_chance": 8.3}
    lines = [{"step": s, "loss": 14 - s, "inter_modal_loss": 8 - s / 2, **chance} for s in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder
