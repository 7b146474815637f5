"""Sampling, optimization, metrics, arguments, signals, watch: each against what it promises."""

import copy
import itertools
import json
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from tiny_run import make_rows
from torch import nn

from simipu_hf.data.mixture import Mixture
from simipu_hf.data.overlap import rows_fingerprint
from simipu_hf.data.rows import dataset_from_rows
from simipu_hf.data.streaming import stream_two_views
from simipu_hf.data.two_views import TwoViewAugmentation
from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.configuration_simipu import SimIPUDepthConfig
from simipu_hf.modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.training.arguments import (
    CONFIGS,
    CompareDepthArguments,
    DepthArguments,
    EvaluateDepthArguments,
    EvaluateDetectionArguments,
    PreTrainingArguments,
    packaged_configs,
    parse_arguments,
    parse_overrides,
)
from simipu_hf.training.batch_norm import ReducedBatchNorm, synchronize_batch_norm
from simipu_hf.training.distributed import (
    SharedFlags,
    StopRequest,
    check_precision,
    choose_device,
    create_accelerator,
    recompute_activations,
)
from simipu_hf.training.logging import RunLogger, Watch, feature_spread, read_metrics
from simipu_hf.training.optimizers import (
    ChainedOptimizer,
    Recipe,
    choose_recipe,
    clip_gradients,
    create_optimizer,
    create_schedule,
    learning_rates,
)
from simipu_hf.training.run_folder import weights_fingerprint
from simipu_hf.training.sampling import GlobalBatchSampler, StreamedBatches, seed_micro_batch


def parse(*flags: str) -> PreTrainingArguments:
    return parse_arguments(PreTrainingArguments, ["--data_dir", "kitti", "--output_dir", "out", *flags])


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

    def test_seed_process_and_micro_batch_decide_what_the_model_draws(self):
        draws = set()
        for place in itertools.product((0, 1, 2), repeat=3):  # seed, micro-batch, process
            seed_micro_batch(*place)
            draws.add(torch.rand(()).item())
        assert len(draws) == 27


class TestStreams:
    def test_all_flags_that_choose_the_rows_identify_a_stream(self, tmp_path):
        rows = dataset_from_rows(make_rows(2), tmp_path).to_iterable_dataset()
        choices = ("validation_share=0.1", "validation_share=0.2", "dataset_config_name=raw", "train_split=all")
        views = SimIPUProcessor.from_preset("recommended"), TwoViewAugmentation()

        def identity(stream, *flags, mixture=None):
            return StreamedBatches(Accelerator(cpu=True), parse(*flags), stream, *views, mixture).identity

        found = {identity(rows, *flags)["stream"] for flags in ([], *([f"--{choice}"] for choice in choices))}
        assert len(found) == len(choices) + 1
        grown = dataset_from_rows(make_rows(2), tmp_path).to_iterable_dataset(num_shards=2)
        assert [identity(stream)["num_shards"] for stream in (rows, grown)] == [1, 2]
        # mixed streams have as many shards as the smallest
        mixed = [identity(rows, mixture=Mixture(shards, (1, 1))) for shards in ((1, 2), (1, 3))]
        assert mixed[0] != mixed[1]

    def test_versions_of_datasets_that_lose_rows_are_refused(self, monkeypatch):
        monkeypatch.setattr(datasets, "__version__", "5.0.0")
        with pytest.raises(SimIPUError, match=r"needs datasets >= 5.1, found 5.0.0"):
            stream_two_views(None, None, None, seed=0, batch_size=1, collate=list)


def test_recomputing_is_refused_where_timm_does_not_have_it():
    model = SimIPUForDepthEstimation(SimIPUDepthConfig(image_config={"architecture": "test_resnet"}))
    recompute_activations(model)
    assert model.image_encoder.grad_checkpointing
    model.image_encoder.set_grad_checkpointing = Mock(side_effect=AssertionError)
    with pytest.raises(SimIPUError, match="timm does not support it for test_resnet"):
        recompute_activations(model)


class TestOptimizers:
    @pytest.fixture
    def layers(self):
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 1)})

    @pytest.fixture
    def optimizer(self, layers):
        flags = parse("--adam_beta1", "0.8", "--adam_beta2", "0.9", "--momentum", "0.5")
        recipes = {"a": Recipe("sgd", 0.1, 0.1), "b": Recipe("adamw", 0.01, 0.1)}
        return ChainedOptimizer([create_optimizer(flags, recipes[name], {name: [layers[name]]}) for name in recipes])

    def backward(self, layers):
        layers["b"](layers["a"](torch.tensor([[1.0, 2.0, 3.0]]))).sum().backward()

    def test_equals_its_parts_stepped_alone(self, layers, optimizer):
        twin = copy.deepcopy(layers)
        sgd = torch.optim.SGD(twin["a"].parameters(), lr=0.1, momentum=0.5, weight_decay=0.1)
        decayed, kept = [twin["b"].weight], [twin["b"].bias]  # biases are not decayed
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))
        for step in range(4):
            for model, optimizers in ((layers, [optimizer]), (twin, [sgd, adamw])):
                self.backward(model)
                for each in optimizers:
                    each.step()
                    each.zero_grad()
            if step == 1:  # also after a save and load
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        torch.testing.assert_close(layers.state_dict(), twin.state_dict())

    def rates(self, name, optimizer, steps, *flags, warmup_steps, steps_per_epoch):
        recipe = Recipe("sgd", 0.1, 0.1, warmup_steps=warmup_steps)
        arguments = parse("--lr_scheduler_type", name, *flags)
        schedule = create_schedule(arguments, recipe, optimizer, 10, steps_per_epoch)
        rates = []
        for step in range(steps):
            rates.append(learning_rates(optimizer))
            optimizer.step()
            schedule.step()
            if step == 2:
                optimizer.load_state_dict(optimizer.state_dict())
        return rates

    def test_one_schedule_serves_all(self, optimizer):
        decay = ("--lr_decay_per_epoch", "0.5")
        rates = self.rates("exponential", optimizer, 5, *decay, warmup_steps=0, steps_per_epoch=2)
        assert [rate["learning_rate/a"] for rate in rates] == [0.1, 0.1, 0.05, 0.05, 0.025]
        assert [rate["learning_rate/b"] for rate in rates] == [0.01, 0.01, 0.005, 0.005, 0.0025]

    @pytest.mark.parametrize("max_norm", [0.0, 1e-3])
    def test_clips_over_all_parts_together(self, layers, optimizer, max_norm):
        self.backward(layers)
        before = {name: p.grad.clone() for name, p in layers.named_parameters()}
        norms = clip_gradients(Accelerator(cpu=True), optimizer, max_norm)
        expected = {n: math.hypot(before[f"{n}.weight"].norm(), before[f"{n}.bias"].norm()) for n in ("a", "b")}
        assert {n: norms[f"grad_norm/{n}"].item() for n in expected} == pytest.approx(expected)
        scale = max_norm / math.hypot(*expected.values()) if max_norm else 1.0
        for name, parameter in layers.named_parameters():
            torch.testing.assert_close(parameter.grad, before[name] * scale, rtol=1e-3, atol=1e-9)

    @pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup", "polynomial", "inverse_sqrt"])
    def test_transformers_schedules(self, optimizer, name):
        found = self.rates(name, optimizer, 10, warmup_steps=2, steps_per_epoch=5)
        rates = [rate["learning_rate/a"] for rate in found]
        assert rates[:3] == pytest.approx([0.0, 0.05, 0.1])
        last = {"constant_with_warmup": 0.1, "inverse_sqrt": 0.1 * (2 / 9) ** 0.5}.get(name)
        assert rates[-1] < 0.05 if last is None else rates[-1] == pytest.approx(last)

    def test_recipes_by_family(self):
        resnet, vit = (timm.create_model(name, num_classes=0) for name in ("test_resnet", "test_vit"))
        flags = parse()
        assert (flags.point_optimizer, flags.point_learning_rate, flags.point_weight_decay) == ("adamw", 1e-3, 0.01)
        assert (flags.adam_beta1, flags.adam_beta2, flags.lr_decay_per_epoch) == (0.95, 0.99, 0.99)
        official = choose_recipe(flags, resnet, 1000)
        assert (official.optimizer, official.learning_rate, official.weight_decay) == ("sgd", 0.03, 1e-4)
        for start in (["--pretrained_image_encoder"], ["--model_name_or_path", "run"]):
            recipe = choose_recipe(parse(*start, "--weight_decay", "0.2"), vit, 1000)
            assert (recipe.optimizer, recipe.learning_rate, recipe.weight_decay) == ("adamw", 1e-4, 0.2)
            assert (recipe.layer_decay, recipe.warmup_steps) == (0.75, 50)
        with pytest.raises(SimIPUError, match="--layer_decay does nothing with sgd"):
            choose_recipe(parse("--layer_decay", "0.5"), resnet, 1000)
        with pytest.raises(SimIPUError, match="--momentum does nothing with adamw"):
            choose_recipe(parse("--momentum", "0.5"), vit, 1000)
        with pytest.raises(SimIPUError, match="--adam_beta2 does nothing with sgd"):
            choose_recipe(parse("--adam_beta2", "0.5", "--point_optimizer", "sgd"), resnet, 1000)

    def test_layers_further_from_the_output_learn_slower(self):
        vit = timm.create_model("test_vit", num_classes=0)
        optimizer = create_optimizer(parse(), Recipe("adamw", 1.0, 0.1, layer_decay=0.5), {"v": [vit]})
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        first, last = groups[id(vit.blocks[0].attn.qkv.weight)], groups[id(vit.blocks[-1].attn.qkv.weight)]
        assert last["lr"] == first["lr"] * 2 ** (len(vit.blocks) - 1)
        assert first["weight_decay"] == 0.1
        assert groups[id(vit.pos_embed)]["weight_decay"] == groups[id(vit.blocks[0].norm1.weight)]["weight_decay"] == 0


@pytest.mark.parametrize("given", ["2", "1"])
def test_the_flag_counts_and_not_the_environment(monkeypatch, given):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    accelerator = create_accelerator(parse("--gradient_accumulation_steps", given, "--report_to", "none"))
    assert accelerator.gradient_accumulation_steps == int(given)
    for precision in ("bf16", "no"):  # a second run in the same process
        again = create_accelerator(parse("--mixed_precision", precision, "--report_to", "none"))
        assert again.mixed_precision == precision


def test_a_precision_that_only_the_launcher_was_given_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(SimIPUError, match=r"--mixed_precision no: accelerate launch, .* asks for bf16"):
        check_precision(parse().mixed_precision)


def test_flags_are_seen_with_their_step():
    flags = SharedFlags(Accelerator(cpu=True))
    flags.put(1, stop=False, broken=torch.tensor(False))
    assert flags.get() == {}
    flags.put(2, stop=False, broken=torch.tensor(True))
    flags.put(3, stop=True, broken=torch.tensor(True))
    assert flags.get(wait=True) == {"broken": 2, "stop": 3}


class TestLogging:
    def logger(self, folder, first_step=0):
        arguments = PreTrainingArguments(data_dir="kitti", output_dir=folder)
        return RunLogger(Accelerator(cpu=True), arguments, first_step, 9, record={})

    def test_what_some_steps_lack_is_a_mean_over_the_others(self, tmp_path):
        logger = self.logger(tmp_path)
        for values in ({"loss": 1.0}, {"loss": 2.0}, {"loss": 6.0, "rank": 0.5}):
            logger.add({name: torch.tensor(value) for name, value in values.items()})
        logger.write_means(3, {"learning_rate": 0.1})
        logger.close()
        (line,) = read_metrics(tmp_path / "metrics.jsonl")
        expected = {"step": 3, "loss": 3.0, "rank": 0.5, "learning_rate": 0.1}
        assert {name: line[name] for name in expected} == expected

    def test_a_resumed_file_drops_what_was_beyond_and_what_was_cut_short(self, tmp_path):
        file = tmp_path / "metrics.jsonl"
        file.write_text('{"step": 2, "loss": 1.5}\n{"step": 4, "loss": 1.2}\n{"step": 6, "lo', encoding="utf-8")
        logger = self.logger(tmp_path, first_step=2)
        logger.write(4, {"loss": math.nan})
        logger.close()
        assert read_metrics(file) == [{"step": 2, "loss": 1.5}, {"step": 4, "loss": None}]

    def test_tensorboard_drops_what_is_written_again(self, tmp_path, monkeypatch):
        given = []
        monkeypatch.setattr(Accelerator, "init_trackers", lambda *_, init_kwargs, **__: given.append(init_kwargs))
        for first_step in (0, 4):  # also where an earlier start left no checkpoint
            self.logger(tmp_path, first_step).close()
        assert given == [{"tensorboard": {"purge_step": step}} for step in (1, 5)]

    def test_flags_values_that_are_not_finite(self, tmp_path):
        logger = self.logger(tmp_path)
        logger.add({"a": torch.tensor(1.0), "b": torch.tensor(math.inf)})
        logger.add({"a": torch.tensor(1.0), "b": torch.tensor(0.0)})
        assert {name: bool(flag) for name, flag in logger.not_finite().items()} == {"a": False, "b": True}
        logger.close()


PRETRAIN = {"data_dir": "kitti", "output_dir": "out"}
TRAIN = {"train_frames": ["a"], "output_dir": "o"}
TEST = {"model": "m", "test_frames": ["b"]}
COMPARE = {**TRAIN, "test_frames": ["b"], "image_encoders": ["a=b"], "modes": ["frozen"]}


class TestArguments:
    def test_the_command_line_wins_over_a_file_of_json(self, tmp_path):
        values = {"learning_rate": 0.5, "image_size": [64, 96], "seed": 3, "torch_compile": True, "num_points": None}
        (tmp_path / "flags.json").write_text(json.dumps(values), encoding="utf-8")
        found = parse("--config", str(tmp_path / "flags.json"), "--seed", "4").to_dict()
        assert {name: found[name] for name in values} == {**values, "image_size": (64, 96), "seed": 4}

    def test_files_are_read_in_order_and_names_that_look_like_numbers_stay_names(self, tmp_path):
        (tmp_path / "a.yaml").write_text("seed: 5\nmixed_precision: no\ntorch_compile: yes\n", encoding="utf-8")
        names = "scenes: [10017090168044687777_6380_000, 010]\ntrain_split: 1_0\nnum_points: 77\nimage_size: null\n"
        (tmp_path / "b.yaml").write_text(names, encoding="utf-8")
        found = parse("--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}", "--seed", "6")
        assert (found.scenes, found.train_split) == (["10017090168044687777_6380_000", "010"], "1_0")
        assert (found.seed, found.num_points, found.torch_compile, found.image_size) == (6, 77, True, None)

    @pytest.mark.parametrize("name", packaged_configs())
    def test_packaged_configs_are_valid(self, name):
        found = parse("--config", name).to_dict()
        for flag, value in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")).items():
            assert found[flag] == (tuple(value) if isinstance(value, list) else value)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"learnin_rate: 1", "did you mean 'learning_rate'"),
            (b"[1, 2]", "expected names and values"),
            (b"a: [", "read"),
            ("seed: 1".encode("utf-16"), "read"),
        ],
    )
    def test_bad_files_are_named(self, tmp_path, content, message):
        file = tmp_path / "flags.yaml"
        file.write_bytes(content)
        with pytest.raises(SimIPUError, match=message) as error:
            parse("--config", str(file))
        assert str(file) in str(error.value)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--hub_model_id", "user/name"], "does nothing without --push_to_hub"),
            (["--per_device_eval_batch_size", "2"], "does nothing without --eval_steps"),
            (["--seed", str(2**32)], "--seed must be at least 0 and below 2"),
            (["--pretrained_image_encoder", "--model_name_or_path", "run"], "does nothing with --model_name_or_path"),
            (["--lr_scheduler_type", "cosine", "--lr_decay_per_epoch", "0.5"], "does nothing without"),
            (["--lr_scheduler_type", "constant", "--warmup_steps", "5"], "does nothing with --lr_scheduler_type"),
            (["--streaming"], "needs --max_steps"),
            (["--validation_share", "1"], "above 0 and below 1"),
            (["--depth_range", "80", "1"], "the nearest depth, at least 0, and a farther one"),
            (["--preset", "official", "--pretrained_image_encoder"], "leave one of the two out"),
            (["--adam_beta1", "1"], "--adam_beta1 must be at least 0 and below 1, found 1"),
        ],
    )
    def test_flags_without_effect_or_meaning_are_refused(self, flags, message):
        with pytest.raises(SimIPUError, match=message):
            parse(*flags)

    @pytest.mark.parametrize(
        ("cls", "given", "wrong", "message"),
        [
            (DepthArguments, TRAIN, {"adam_beta1": 0.05}, "must be at least 0.1 and below 1"),
            (DepthArguments, TRAIN, {"max_depth": 0.0}, "must be a number of metres above 0"),
            (DepthArguments, TRAIN, {"kb_crop": False}, "needs --image_size"),
            (DepthArguments, {"output_dir": "o"}, {"train_frames": []}, "or --train_list"),
            (DepthArguments, TRAIN, {"image_dir": "x"}, "does nothing with"),
            (DepthArguments, {**TRAIN, "freeze_image_encoder": True}, {"decoder_first": 0.5}, "does nothing with"),
            (EvaluateDepthArguments, TEST, {"min_depth": -1.0}, "must be at least 0, found -1"),
            (EvaluateDepthArguments, TEST, {"num_pictures": 2}, "does nothing with"),
            (EvaluateDepthArguments, TEST, {"depth_dir": "x"}, "does nothing with"),
            (EvaluateDetectionArguments, {"predictions": "p", "labels": "l"}, {"device": "cuda"}, "does nothing with"),
            (CompareDepthArguments, COMPARE, {"max_depth": math.inf}, "must be"),
            (CompareDepthArguments, COMPARE, {"encoder_learning_rate": 0.1}, "does nothing with"),
            (CompareDepthArguments, COMPARE, {"label_fractions": (0.5, 2)}, "must be above 0 and at most 1, found 2"),
            (CompareDepthArguments, COMPARE, {"seeds": 0}, "must be one or more, each once, found 0"),
            (PreTrainingArguments, PRETRAIN, {"report_to": ["wandbb"]}, "'wandbb': choose from tensorboard, "),
            (PreTrainingArguments, PRETRAIN, {"preset": "offical"}, "'offical': choose from recommended, official"),
        ],
    )
    def test_values_without_effect_or_meaning_are_refused_from_python_too(self, cls, given, wrong, message):
        with pytest.raises(SimIPUError, match=f"--(no_)?{next(iter(wrong))} {message}"):
            cls(**given, **wrong)

    def test_overrides(self):
        text = "max_match_distance=null,image_config.out_indices=[-1, 2],point_config.use_xyz=false,temperature=0.1"
        assert parse_overrides(text) == {
            "max_match_distance": None,
            "image_config": {"out_indices": [-1, 2]},
            "point_config": {"use_xyz": False},
            "temperature": 0.1,
        }
        assert parse_overrides(None) == {}
        assert parse_overrides("a='x, y',,b=[1,2],") == {"a": "x, y", "b": [1, 2]}
        for bad, message in (
            ("a=1,a=2", "a is given twice"),
            ("a=[", r"'a=\[': the value cannot be read"),
            ("a=1,b", "expected name=value"),
            ("a=[1],b", "the value cannot be read"),
        ):
            with pytest.raises(SimIPUError, match=message):
                parse_overrides(bad)


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

    def in_a_thread() -> bool:  # where Python allows no handlers
        with StopRequest() as stop:
            return stop.requested

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(in_a_thread).result()


class TestWatch:
    def test_warns_of_a_loss_at_chance_once_and_again_after_recovery(self):
        heard = []
        watch = Watch(heard.append, patience=3)
        for step in range(190, 220):
            loss = 3.0 if 210 <= step < 213 else 8.3
            watch.look(step, {"inter_modal_loss": loss, "inter_modal_chance": 8.32, "x_loss": 1.0}, 0.0)
        assert len(heard) == 2
        assert heard[0].startswith("step 204: the inter-modal loss is still at chance level (8.32)")

    def test_warns_of_collapse_and_starvation(self):
        heard = []
        watch = Watch(heard.append, patience=20)
        for step in (10, 20, 30, 40):
            watch.look(step, {"image_spread": 0.01, "point_spread": 0.9}, 0.8)
        assert len(heard) == 2
        assert "step 30: the image features are collapsing" in heard[0]
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
        encoder = timm.create_model("test_efficientnet", num_classes=0).eval()
        x = torch.randn(1, 3, 32, 32)
        names, expected = list(encoder.state_dict()), encoder(x)
        converted = synchronize_batch_norm(encoder)
        assert list(converted.state_dict()) == names
        assert any(isinstance(module, ReducedBatchNorm) for module in converted.modules())
        torch.testing.assert_close(converted(x), expected)


def test_rows_are_told_apart_by_scans_and_calibration_and_not_by_where_they_lie(tmp_path):
    rows = make_rows(3)
    found = {rows_fingerprint(dataset_from_rows(rows, tmp_path / name)) for name in ("a", "b")}
    first = rows[0]
    points = np.frombuffer(first["points"], "<f4").reshape(-1, 4)
    others = [
        {"points": (points * np.float32(1.2)).tobytes()},
        {"points": points[1:].tobytes()},
        {"camera_projection": (np.asarray(first["camera_projection"]) * [[1.01], [1], [1]]).tolist()},
        {"lidar_to_camera": (np.asarray(first["lidar_to_camera"]) + np.eye(4)[:, ::-1] * 0.01).tolist()},
        {"frame_id": "another"},
    ]
    labels = [[{"type": "Car", "bbox": [0.0, 1, 2, height]}] for height in (3.0, 3.0, 4.0)]
    for objects in labels:
        found.add(rows_fingerprint(dataset_from_rows(rows, tmp_path / "f").add_column("objects", [objects, [], None])))
    for change in others:
        found.add(rows_fingerprint(dataset_from_rows([{**first, **change}, *rows[1:]], tmp_path / "c")))
    found.add(rows_fingerprint(dataset_from_rows(rows[::-1], tmp_path / "d")))
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"depth")
    features = datasets.Features({"frame_id": datasets.Value("string"), "depth": datasets.Image(decode=False)})
    paths = [{"frame_id": ["0"], "depth": [str(tmp_path / f"{name}.png")]} for name in "ab"]
    assert len({rows_fingerprint(datasets.Dataset.from_dict(columns, features)) for columns in paths}) == 1
    selected = dataset_from_rows([rows[1], *rows], tmp_path / "e").select([1, 2, 3])  # by a table of indices, too
    assert rows_fingerprint(selected) in found
    assert len(found) == 1 + len(others) + 1 + 2


def test_arguments_from_python_take_paths_and_numbers_of_numpy(tmp_path):
    arguments = PreTrainingArguments(
        data_dir=[tmp_path], output_dir=tmp_path, learning_rate=np.float64(0.1), seed=np.int64(3), report_to="none",
        freeze="conv1",
    )  # fmt: skip
    assert (arguments.data_dir, arguments.output_dir) == ([str(tmp_path)], str(tmp_path))
    assert (type(arguments.learning_rate), type(arguments.seed), arguments.report_to) == (float, int, ["none"])
    assert arguments.freeze == ["conv1"]


def test_a_folder_that_a_tracker_left_is_not_its_package(tmp_path, monkeypatch):
    (tmp_path / "swanlab" / "run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SimIPUError, match="not installed"):
        parse("--report_to", "swanlab").trackers()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_fingerprint_is_of_weights_of_any_type(dtype):
    weights = {"a": torch.arange(6, dtype=dtype).view(2, 3), "n": torch.tensor(1, dtype=dtype)}
    assert weights_fingerprint(weights) == weights_fingerprint({n: value.clone() for n, value in weights.items()})
    assert weights_fingerprint(weights) != weights_fingerprint({**weights, "n": torch.tensor(2, dtype=dtype)})
    assert weights_fingerprint(weights) != weights_fingerprint(weights, "resnet18")


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    def two_gpus(size, dtype, device):
        if device.index == 2:
            raise RuntimeError("CUDA error: invalid device ordinal")
        if device.type == "mps" and dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")

    chosen = Mock()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", chosen)
    monkeypatch.setattr("torch.zeros", two_gpus)
    assert [str(choose_device(name)) for name in (None, "cuda", "cpu", "cuda:1")] == ["cuda", "cuda", "cpu", "cuda:1"]
    assert [call.args for call in chosen.mock_calls] == [(torch.device("cuda:1"),)]
    for name, problem in (("cuda:2", "invalid device ordinal"), ("gpu0", "Invalid device string"), ("mps", "float64")):
        with pytest.raises(SimIPUError, match=f"--device {name}: .*{problem}"):
            choose_device(name)
