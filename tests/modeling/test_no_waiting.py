"""A training step waits for the device once, for the Hungarian solution: on CUDA, and by its operations on the CPU."""

import pytest
import torch
from tiny_simipu import tiny_batch, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from simipu_hf.modeling import modeling_simipu
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.matching import PendingMatch
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.training.distributed import compile_image_encoder

# operations whose result's value or size the host has to know
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal", "bincount")
# plain PyTorch, whose every operation is recorded
PLAIN = {"sampling_backend": "torch", "grouping_backend": "torch"}


class RecordWaiting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["official", "recommended"])
def test_no_operation_of_a_step_tells_the_host_a_value(preset):
    options = {"anchor_weight": 1.0} if preset == "recommended" else {}
    model = SimIPUForPreTraining(tiny_config(preset, point_config=PLAIN, **options))
    model.anchor_image_encoder()
    with RecordWaiting() as record:
        model(**tiny_batch(), return_metrics=True).loss.backward()
    assert record.found == []


def test_the_recorder_notices():
    values = torch.arange(4.0)
    with RecordWaiting() as record:
        values[values > 1].sum().item()
    assert record.found == ["index", "_local_scalar_dense"]


@pytest.mark.parametrize("preset", ["official", "recommended"])
def test_mean_and_deviation_are_made_on_the_device_once(monkeypatch, preset):
    used, normalize = [], SimIPUImageProcessor.normalize
    monkeypatch.setattr(
        SimIPUImageProcessor, "normalize", lambda *a, **k: used.append(a[2:]) or normalize(*a, **k), raising=True
    )
    processor = SimIPUProcessor.from_preset(preset).image_processor
    images, sizes = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 2), 8)
    first, second = (processor.normalize_images(images, sizes) for _ in range(2))
    assert torch.equal(first, second)
    assert all(a is b and isinstance(a, torch.Tensor) for a, b in zip(*used, strict=True))


def test_what_a_step_calls_of_the_image_encoder_is_compiled(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda *a, **k: calls.append(a) or function(*a, **k))
    model = SimIPUForPreTraining(tiny_config())
    compile_image_encoder(model)
    model(**tiny_batch())
    assert calls


def test_the_assignment_is_solved_while_the_image_encoder_runs(monkeypatch):
    order = []

    class Recorded(PendingMatch):
        def __init__(self, *arguments):
            order.append("costs")
            super().__init__(*arguments)

        def result(self):
            order.append("match")
            return super().result()

    monkeypatch.setattr(modeling_simipu, "PendingMatch", Recorded)
    model = SimIPUForPreTraining(tiny_config())
    model.simipu.image_encoder.conv1.register_forward_hook(lambda *_: order.append("image"))
    model.inter_point_head.register_forward_hook(lambda *_: order.append("inter-modal"))
    model(**tiny_batch())
    assert order == ["costs", "image", "inter-modal", "match"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("preset", ["official", "recommended"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_the_device(preset, dtype):
    """No wait but the assignment's event; test_check.py compares losses with those of the CPU."""
    model = SimIPUForPreTraining(tiny_config(preset)).cuda()
    batch = {name: value.cuda() for name, value in tiny_batch().items()}

    def step() -> torch.Tensor:
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    step()  # kernels are compiled and tried once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
