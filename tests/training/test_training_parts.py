"""Sampling, optimization, metrics, arguments, signals, watch: each against what it promises."""

import json
import math
import os
import signal
from itertools import chain

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import nn

from simipu_hf.errors import SimIPUError
from simipu_hf.training.distributed import ReducedBatchNorm, synchronize_batch_norm
from simipu_hf.training.legacy_arguments import (
    PreTrainingArguments,
    packaged_configs,
    parse_overrides,
    parse_pretraining_arguments,
    read_config,
)
from simipu_hf.training.metrics import MetricsFile, check_trackers, flatten, read_metrics
from simipu_hf.training.optimization import Optimization, OptimizerSettings, create_optimizer, create_schedule
from simipu_hf.training.run_folder import current_command, data_fingerprint
from simipu_hf.training.sampling import GlobalBatchSampler
from simipu_hf.training.signals import StopRequest
from simipu_hf.training.watch import Watch, feature_spread


class TestGlobalBatchSampler:
    def test_processes_share_each_global_batch(self):
        one = list(GlobalBatchSampler(23, 6, accumulation_steps=2, seed=5, last_step=4))
        parts = [
            list(
                GlobalBatchSampler(23, 2, accumulation_steps=2, num_processes=3, process_index=r, seed=5, last_step=4)
            )
            for r in range(3)
        ]
        assert one == [list(chain(*batch)) for batch in zip(*parts, strict=True)]

    def test_an_epoch_sees_no_row_twice_and_epochs_differ(self):
        sampler = GlobalBatchSampler(23, 5, seed=1, last_step=8)
        keys = list(chain(*sampler))
        for epoch in (0, 1):
            rows = [row for e, row in keys if e == epoch]
            assert len(rows) == len(set(rows)) == 20
        assert [row for e, row in keys if e == 0] != [row for e, row in keys if e == 1]

    def test_starts_anywhere(self):
        whole = list(GlobalBatchSampler(10, 3, accumulation_steps=1, seed=2, last_step=9))
        assert list(GlobalBatchSampler(10, 3, seed=2, first_step=5, last_step=9)) == whole[5:]
        assert len(GlobalBatchSampler(10, 3, seed=2, first_step=5, last_step=9)) == 4

    def test_seeds_differ(self):
        orders = {
            tuple(GlobalBatchSampler(50, 1, seed=seed).permutation(epoch)) for seed in (0, 1) for epoch in (0, 1)
        }
        assert len(orders) == 4


class TestOptimization:
    @pytest.fixture
    def layers(self):
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 1)})

    def create(self, layers, **options):
        optimizers = [
            create_optimizer(OptimizerSettings("sgd", 0.1, 0.0, momentum=0.5), {"a": layers["a"].parameters()}),
            create_optimizer(OptimizerSettings("adamw", 0.01, 0.1, (0.8, 0.9)), {"b": layers["b"].parameters()}),
        ]
        schedules = [
            create_schedule("exponential", o, warmup_steps=0, total_steps=9, steps_per_epoch=2, decay_per_epoch=0.5)
            for o in optimizers
        ]
        return Optimization(Accelerator(cpu=True), optimizers, schedules, **options)

    def backward(self, layers):
        x = torch.tensor([[1.0, 2.0, 3.0]])
        layers["b"](layers["a"](x)).sum().backward()

    def test_norms_rates_and_steps(self, layers):
        optimization = self.create(layers)
        before = layers["a"].weight.clone()
        rates = []
        for _ in range(5):
            self.backward(layers)
            grad = layers["a"].weight.grad.clone()
            norms = optimization.gradient_norms()
            expected = math.hypot(grad.norm().item(), layers["a"].bias.grad.norm().item())
            assert norms["a"] == pytest.approx(expected)
            rates.append(optimization.learning_rates()["a"])
            optimization.step()
            if len(rates) == 1:
                torch.testing.assert_close(layers["a"].weight, before - 0.1 * grad)
        assert rates == [0.1, 0.1, 0.05, 0.05, 0.025]
        assert layers["a"].weight.grad is None

    def test_clips_over_all_parts_together(self, layers):
        optimization = self.create(layers, max_grad_norm=1e-3)
        before = [p.detach().clone() for p in layers["a"].parameters()]
        self.backward(layers)
        share = math.hypot(*(norms := optimization.gradient_norms()).values())
        optimization.step()
        moved = math.sqrt(
            sum((p - b).square().sum().item() for p, b in zip(layers["a"].parameters(), before, strict=True))
        )
        assert moved == pytest.approx(0.1 * 1e-3 * norms["a"] / share, rel=1e-3)

    @pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup"])
    def test_transformers_schedules(self, layers, name):
        optimizer = create_optimizer(OptimizerSettings("sgd", 1.0, 0.0), {"a": layers["a"].parameters()})
        schedule = create_schedule(
            name, optimizer, warmup_steps=2, total_steps=6, steps_per_epoch=1, decay_per_epoch=1.0
        )
        rates = []
        for _ in range(6):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates[:3] == [0.0, 0.5, 1.0]

    def test_exponential_warms_up(self, layers):
        optimizer = create_optimizer(OptimizerSettings("sgd", 1.0, 0.0), {"a": layers["a"].parameters()})
        schedule = create_schedule(
            "exponential", optimizer, warmup_steps=3, total_steps=6, steps_per_epoch=100, decay_per_epoch=0.5
        )
        rates = []
        for _ in range(5):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates == [0.25, 0.5, 0.75, 1.0, 1.0]

    def test_frozen_parameters_stay_out(self, layers):
        layers["a"].weight.requires_grad_(False)
        optimizer = create_optimizer(OptimizerSettings("sgd", 1.0, 0.0), {"a": layers["a"].parameters()})
        assert [len(group["params"]) for group in optimizer.param_groups] == [1]


class TestMetricsFile:
    def test_resume_drops_what_lies_beyond_and_a_torn_line(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        file = MetricsFile(path)
        for step in (1, 2, 3, 4):
            file.write({"step": step, "loss": step / 3})
        file.close()
        with path.open("a", encoding="utf-8") as stream:
            stream.write('{"step": 5, "lo')
        file = MetricsFile(path, step=2)
        file.write({"step": 3, "loss": 9.0})
        file.close()
        assert read_metrics(path) == [
            {"step": 1, "loss": 1 / 3},
            {"step": 2, "loss": 2 / 3},
            {"step": 3, "loss": 9.0},
        ]

    def test_is_strict_json(self, tmp_path):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.write({"step": 1, "loss": math.nan})
        assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8")) == {"step": 1, "loss": None}
        file.close()


def test_trackers_are_checked():
    assert check_trackers(["none"]) == []
    assert check_trackers(["tensorboard"]) == ["tensorboard"]
    with pytest.raises(SimIPUError, match="unknown tracker"):
        check_trackers(["tensorbored"])


def test_flatten():
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": 1, "a.c": "[1, 2]", "d": "None"}


class TestArguments:
    REQUIRED = ("--data_dir", "kitti", "--output_dir", "out")

    def test_official_recipe(self):
        training = parse_pretraining_arguments([*self.REQUIRED, "--preset", "official"]).training
        assert (training.optimizer, training.learning_rate, training.weight_decay) == ("sgd", 0.03, 1e-4)
        assert (training.point_optimizer, training.point_learning_rate) == ("adamw", 1e-3)
        assert (training.adam_beta1, training.adam_beta2, training.point_weight_decay) == (0.95, 0.99, 0.01)
        assert (training.lr_scheduler_type, training.lr_decay_per_epoch) == ("exponential", 0.99)

    @pytest.mark.parametrize("form", ["yaml", "json"])
    def test_command_line_wins_over_a_file(self, tmp_path, form):
        values = {"learning_rate": 0.5, "image_size": [64, 96], "seed": 3, "torch_compile": True, "max_steps": None}
        file = tmp_path / f"flags.{form}"
        file.write_text(json.dumps(values) if form == "json" else yaml.safe_dump(values), encoding="utf-8")
        arguments = parse_pretraining_arguments([*self.REQUIRED, "--config", str(file), "--seed", "4"])
        assert arguments.training.learning_rate == 0.5
        assert arguments.data.image_size == [64, 96]
        assert arguments.training.seed == 4
        assert arguments.model.torch_compile is True
        assert arguments.training.max_steps == -1

    def test_own_record_reproduces(self, tmp_path):
        first = parse_pretraining_arguments([*self.REQUIRED, "--image_size", "64", "96", "--no_sync_batch_norm"])
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({"arguments": first.to_dict(), "versions": {}}), encoding="utf-8")
        assert parse_pretraining_arguments(["--config", str(file)]) == first

    @pytest.mark.parametrize("name", packaged_configs())
    def test_packaged_configs_are_valid(self, name):
        arguments = parse_pretraining_arguments([*self.REQUIRED, "--config", name])
        assert isinstance(arguments, PreTrainingArguments)
        flat = arguments.to_dict()
        assert all(flat[flag] == value for flag, value in read_config(name).items())

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("learnin_rate: 1", "did you mean 'learning_rate'"),
            ("[1, 2]", "expected names and values"),
            ("a: [", "read"),
        ],
    )
    def test_bad_files_are_named(self, tmp_path, content, message):
        file = tmp_path / "flags.yaml"
        file.write_text(content, encoding="utf-8")
        with pytest.raises(SimIPUError, match=message) as error:
            parse_pretraining_arguments([*self.REQUIRED, "--config", str(file)])
        assert str(file) in str(error.value)

    def test_unknown_flags_and_files_end_the_command(self, capsys):
        with pytest.raises(SystemExit) as end:
            parse_pretraining_arguments([*self.REQUIRED, "--learnin_rate", "1"])
        assert end.value.code == 2
        assert "unknown argument --learnin_rate; did you mean --learning_rate?" in capsys.readouterr().err
        with pytest.raises(SimIPUError, match="the packaged ones are official_kitti"):
            parse_pretraining_arguments([*self.REQUIRED, "--config", "nothing"])

    def test_the_token_is_not_recorded(self, monkeypatch):
        arguments = parse_pretraining_arguments([*self.REQUIRED, "--hub_token", "hf_secret"])
        assert "hf_secret" not in str(arguments.to_dict())
        monkeypatch.setattr(
            "sys.orig_argv", ["/usr/bin/python", "x", "--hub_token", "hf_secret", "--hub_token=hf_secret"]
        )
        assert "hf_secret" not in current_command()

    def test_overrides(self):
        text = "max_match_distance=null,image_config.out_indices=[-1, 2],point_config.use_xyz=false,temperature=0.1"
        assert parse_overrides(text) == {
            "max_match_distance": None,
            "image_config": {"out_indices": [-1, 2]},
            "point_config": {"use_xyz": False},
            "temperature": 0.1,
        }
        assert parse_overrides(None) == {}


def test_signals_ask_once_and_interrupt_twice():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert stop.signal is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


class TestWatch:
    def test_warns_of_a_loss_at_chance_once_and_again_after_recovery(self):
        heard = []
        watch = Watch(heard.append, patience=3, grace=2)
        for step in range(1, 20):
            loss = 3.0 if 10 <= step < 13 else 8.3
            watch.look(step, {"inter_modal_loss": loss, "inter_modal_chance": 8.32, "x_loss": 1.0}, 0.0)
        assert len(heard) == 2
        assert heard[0].startswith("step 5: the inter-modal loss is still at chance level (8.32)")

    def test_warns_of_collapse_and_starvation(self):
        heard = []
        watch = Watch(heard.append, patience=2)
        for step in range(1, 4):
            watch.look(step, {"image_spread": 0.01, "point_spread": 0.9}, 0.8)
        assert len(heard) == 2
        assert "image features are collapsing" in heard[0]
        assert "80%" in heard[1]

    def test_spread(self):
        torch.manual_seed(0)
        assert feature_spread(torch.randn(5000, 3, 64)).item() == pytest.approx(1, abs=0.05)
        assert feature_spread(torch.ones(10, 64) * torch.rand(10, 1)).item() == pytest.approx(0, abs=1e-6)


class TestReducedBatchNorm:
    """On one process it is PyTorch's batch norm, running statistics included."""

    @pytest.mark.parametrize("shape", [(5, 3, 4, 2), (7, 3)])
    def test_equals_batch_norm(self, shape):
        torch.manual_seed(0)
        norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(3, momentum=0.3).double()
        nn.init.uniform_(norm.weight)
        state = {name: value.clone() for name, value in norm.state_dict().items()}
        ours = ReducedBatchNorm.from_batch_norm(norm)
        theirs = type(norm)(3, momentum=0.3).double()
        theirs.load_state_dict(state)
        x = torch.randn(shape, dtype=torch.float64)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        for module, values in zip((ours, theirs), inputs, strict=True):
            (module(values) * torch.linspace(0, 1, x.numel(), dtype=x.dtype).view(shape)).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))

    def test_conversion_keeps_names_and_fused_activations(self):
        import timm

        encoder = timm.create_model("test_efficientnet", num_classes=0).eval()
        x = torch.randn(1, 3, 32, 32)
        names, expected = list(encoder.state_dict()), encoder(x)
        converted = synchronize_batch_norm(encoder)
        assert list(converted.state_dict()) == names
        assert any(isinstance(module, ReducedBatchNorm) for module in converted.modules())
        torch.testing.assert_close(converted(x), expected)


def test_fingerprint_is_of_frames_and_their_order():
    assert data_fingerprint(["a", "b"]) == data_fingerprint(iter(["a", "b"]))
    assert data_fingerprint(["a", "b"]) != data_fingerprint(["b", "a"])
    assert data_fingerprint(["ab"]) != data_fingerprint(["a", "b"])
