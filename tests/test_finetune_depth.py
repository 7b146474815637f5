"""Depth fine-tuning on the Trainer: resume, what is served is what was measured, gradients, early refusals."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from depth_rows import make_rows, save_rows
from PIL import Image
from timm.models import save_for_hf
from tiny_run import ENCODER, FINE_TUNING
from transformers import Trainer, TrainerCallback, TrainingArguments, pipeline
from weights import assert_same_weights, weights

from simipu_hf import finetune_depth as finetune_depth_module
from simipu_hf.cli import run as run_command
from simipu_hf.data.depth import DepthAugmentation, DepthDataset, DepthFrame
from simipu_hf.data.frames import select_frames
from simipu_hf.data.rows import dataset_from_rows, image_from_row
from simipu_hf.errors import SimIPUError, TrainingInterrupted
from simipu_hf.evaluate_depth import evaluate_depth
from simipu_hf.evaluation.depth import METRICS, DepthProtocol, evaluate_maps
from simipu_hf.finetune_depth import DepthTrainer, create_processor, finetune_depth
from simipu_hf.finetuning import RunFolder, create_model, find_rgb_encoder, recipe
from simipu_hf.hub.push import HubUploader
from simipu_hf.modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from simipu_hf.training.arguments import DepthArguments, DepthTaskArguments, EvaluateDepthArguments
from simipu_hf.training.checkpoint import save_checkpoint
from simipu_hf.training.logging import read_metrics

SMALL = {"kb_crop": False, "image_size": (32, 64)}


@pytest.fixture(scope="session")
def frames(tmp_path_factory) -> str:
    return save_rows(tmp_path_factory.mktemp("depth_frames"))


def depth_arguments(frames, output_dir, **changes) -> DepthArguments:
    fields = {
        "train_frames": [frames],
        "output_dir": str(output_dir),
        "max_steps": 4,
        "checkpointing_steps": 2,
        "save_total_limit": 0,
        "flip_test": False,
    }
    return DepthArguments(**{**FINE_TUNING, **SMALL, **fields, **changes})


@pytest.fixture
def fine_tune(frames, tmp_path):
    """Calls `finetune_depth` with tiny defaults, in the folder of a name."""
    return lambda name, **changes: finetune_depth(depth_arguments(frames, tmp_path / name, **changes))


def depth_model(**fields) -> SimIPUForDepthEstimation:
    return create_model(SimIPUForDepthEstimation, find_rgb_encoder(ENCODER), **fields)


@pytest.fixture(scope="session")
def run(frames, tmp_path_factory):
    """A finished run of four steps."""
    test_frames = [f"{frames}#test"]
    return finetune_depth(depth_arguments(frames, tmp_path_factory.mktemp("runs") / "run", test_frames=test_frames))


# --- a run ----------------------------------------------------------------------------------------------------------


def test_resumed_run_is_bit_equal(fine_tune, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    fine_tune("run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"), dataloader_num_workers=1)
    assert_same_weights(run, tmp_path / "run")
    straight, resumed = (read_metrics(folder / "metrics.jsonl") for folder in (run, tmp_path / "run"))
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    assert [line["loss"] for line in straight] == [line["loss"] for line in resumed]
    with pytest.raises(SimIPUError, match=r"another configuration(.|\n)*learning_rate"):
        fine_tune("run", resume_from_checkpoint="latest", learning_rate=0.5)
    assert [path.name for path in (tmp_path / "run" / "set_aside-1").glob("checkpoint-*")] == ["checkpoint-4"]
    last = shutil.copytree(run / "checkpoint-2", tmp_path / "download" / "last-checkpoint")  # as it is published
    fine_tune("again", resume_from_checkpoint=str(last), checkpointing_steps=1)
    assert (tmp_path / "again" / "checkpoint-3").is_dir()
    assert_same_weights(run, tmp_path / "again")


def test_a_checkpoint_that_lacks_a_file_of_the_trainer_is_named_and_passed_over(fine_tune, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    last = tmp_path / "run" / "checkpoint-4"
    (last / "scheduler.pt").unlink()
    with pytest.raises(SimIPUError, match=r"checkpoint-4 is damaged: scheduler\.pt is missing"):
        fine_tune("run", resume_from_checkpoint=str(last))
    fine_tune("run", resume_from_checkpoint="latest")
    assert_same_weights(run, tmp_path / "run")


def test_a_full_disk_leaves_the_last_good_checkpoint(fine_tune, run, tmp_path, monkeypatch):
    def full(self, output_dir):
        if self.state.global_step == 4:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        save(self, output_dir)

    save = DepthTrainer._save_optimizer_and_scheduler
    monkeypatch.setattr(DepthTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(SimIPUError, match=r"could not write checkpoint .*checkpoint-4: PytorchStreamWriter"):
        fine_tune("run")
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    (tmp_path / "run" / ".checkpoint-saving" / "checkpoint-4").mkdir(parents=True)  # of a kill
    fine_tune("run", resume_from_checkpoint="latest", save_total_limit=1)
    assert_same_weights(run, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-4"]
    assert not list((tmp_path / "run").glob("set_aside-*"))


def test_an_encoder_is_known_by_what_it_is_and_a_run_by_its_command(fine_tune, tmp_path):
    encoder, run = tmp_path / "encoder", tmp_path / "run"
    torch.manual_seed(5)
    save_for_hf(timm.create_model("test_resnet", num_classes=0), encoder, safe_serialization=True)
    fine_tune("run", image_encoder=str(encoder), max_steps=1)
    moved = shutil.move(encoder, tmp_path / "moved")
    resumed = {"max_steps": 1, "resume_from_checkpoint": "latest"}
    fine_tune("run", image_encoder=str(moved), **resumed)
    config = json.loads((moved / "config.json").read_text("utf-8"))
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (moved / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(
        SimIPUError, match=r"image_processor\.image_mean: .* in the checkpoint, \[0\.1, 0\.2, 0\.3\] now$"
    ):
        fine_tune("run", image_encoder=str(moved), **resumed)
    with pytest.raises(SimIPUError, match=r"image_encoder\.weights: "):
        fine_tune("run", **resumed)
    save_checkpoint(run, 1, save=lambda folder: None, identity={"kind": "PreTrainingArguments"})
    with pytest.raises(SimIPUError, match="kind: PreTrainingArguments in the checkpoint, DepthArguments now"):
        fine_tune("run", **resumed)


def test_a_signal_ends_the_run_after_a_checkpoint(fine_tune, run, tmp_path, monkeypatch):
    step = DepthTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), 15)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DepthTrainer, "training_step", interrupted)
    monkeypatch.setattr(HubUploader, "checkpoint_saved", lambda self, path: None)
    left = []
    monkeypatch.setattr(HubUploader, "__exit__", lambda self, kind, *_: left.append(kind))
    push = {"push_to_hub": True, "hub_model_id": "user/name"}
    with pytest.raises(TrainingInterrupted, match="SIGTERM after step 3 of 4") as stopped:
        fine_tune("run", checkpointing_steps=0, **push)
    assert stopped.value.exit_code == 143
    assert left == [TrainingInterrupted]
    monkeypatch.undo()
    fine_tune("run", resume_from_checkpoint="latest")
    assert_same_weights(run, tmp_path / "run")


def test_folder_holds_model_card_evaluation_and_no_pickles(run):
    saved = json.loads((run / "depth_evaluation.json").read_text())
    assert saved["num_images"] == 2
    assert len(list((run / "pictures").iterdir())) == 2
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "depth-estimation" in card
    assert f"{saved['metrics']['abs_rel']:.6g}" in card
    assert not list(run.rglob("training_args.bin"))
    assert (run / "training_curves.png").is_file()
    for folder in (run, run / "checkpoint-4"):  # no more private than the umask makes every file
        assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


# --- what is served is what was measured ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "task"),
    [
        ((353, 1217), {"kb_crop": True, "image_size": (65, 211)}),
        ((64, 96), {"kb_crop": False, "image_size": (33, 70)}),
    ],
)
def test_pipeline_returns_what_evaluation_measures(size, task, tmp_path):
    """The whole image goes into the pipeline, and its answer is compared with the whole ground truth."""
    rows = dataset_from_rows(make_rows(range(3), *size), cache_dir=str(tmp_path / "cache"))
    rows.save_to_disk(tmp_path / "rows")
    flags = task | {"max_steps": 1, "per_device_train_batch_size": 1}
    run = finetune_depth(depth_arguments(f"{tmp_path / 'rows'}#:000000", tmp_path / "run", **flags))
    test = [f"{tmp_path / 'rows'}#:000001,000002"]
    arguments = EvaluateDepthArguments(
        model=str(run), test_frames=test, kb_crop=task["kb_crop"], flip_test=False, device="cpu", json=True
    )
    measured = evaluate_depth(arguments)["metrics"]

    estimate = pipeline("depth-estimation", model=str(run), trust_remote_code=True, device="cpu")
    maps = []
    for row in select_frames(test):
        target = DepthFrame.from_row(row, create_processor(DepthTaskArguments(**task))).depth
        answer = estimate(image_from_row(row))["predicted_depth"].numpy()
        assert answer.shape == size
        maps.append((row["frame_id"], answer, target))
    served = evaluate_maps(maps, DepthProtocol(kb_crop=task["kb_crop"]))["metrics"]
    assert served == {name: pytest.approx(measured[name], abs=1e-6) for name in METRICS}


def test_command_prints_metrics_or_json(frames, run, capsys):
    flags = ["--model", str(run), "--test_frames", f"{frames}#test", "--no_kb_crop", "--device", "cpu"]
    for crop, images in ("garg", "1 of 2 images, garg crop"), ("none", "2 images, none crop"):
        run_command(["evaluate-depth", *flags, "--evaluation_crop", crop])  # all of one image's crop is beyond 80 m
        about, names, _ = capsys.readouterr().out.splitlines()
        assert about.startswith(images)
        assert names.split()[0] == "a1"
    run_command(["evaluate-depth", *flags, "--json"])
    assert json.loads(capsys.readouterr().out)["num_images"] == 2


def test_a_callback_may_end_a_run_early(fine_tune, monkeypatch):
    def stopped(arguments):
        trainer = create(arguments)
        trainer.add_callback(StopAfter(2))
        return trainer

    create = finetune_depth_module.create_trainer
    monkeypatch.setattr(finetune_depth_module, "create_trainer", stopped)
    run = fine_tune("early", test_frames=[])
    assert weights(run)
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2]


def test_pictures_of_other_frames_are_replaced(frames, run, tmp_path):
    for frame in ("000000", "000001"):
        arguments = {"model": str(run), "test_frames": [f"{frames}#train:{frame}"], "output_dir": str(tmp_path)}
        evaluate_depth(EvaluateDepthArguments(**arguments, kb_crop=False, device="cpu", json=True))
        assert [path.name for path in (tmp_path / "pictures").iterdir()] == [f"000_{frame}.png"]


def test_a_run_in_bf16_reports_what_its_saved_model_does(fine_tune, frames):
    test = {"test_frames": [f"{frames}#test"], "flip_test": False}
    run = fine_tune("run", **test, mixed_precision="bf16")
    measured = evaluate_depth(EvaluateDepthArguments(model=str(run), **test, kb_crop=False, json=True))["metrics"]
    reported = json.loads((run / "depth_evaluation.json").read_text())["metrics"]
    assert reported == pytest.approx(measured, rel=1e-6)


def test_apples_gpus_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_mps_available", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert recipe(tmp_path).device.type == "cpu"


def test_evaluation_of_a_crop_is_not_that_of_the_whole_image(tmp_path):
    depth_model().save_pretrained(tmp_path)
    create_processor(DepthTaskArguments(image_size=(64, 192))).save_pretrained(tmp_path)
    with pytest.raises(SimIPUError, match="KITTI crop alone"):
        evaluate_depth(EvaluateDepthArguments(model=str(tmp_path), test_frames=["none"], kb_crop=False))


# --- the stock Trainer ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(frames):
    processor = create_processor(DepthTaskArguments(**SMALL))
    return DepthDataset(select_frames([frames]), processor, DepthAugmentation(crop_size=(32, 64)), keep_frames=True)


def test_stock_trainer_takes_model_and_processor_and_averages_accumulated_gradients(dataset, tmp_path):
    heads = []
    for steps in (1, 2, 4):
        model = depth_model().eval()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=steps, optim="sgd",
            learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to="none",
            use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        same_frame = torch.utils.data.Subset(dataset, [0] * 4)
        trainer = Trainer(model, arguments, train_dataset=same_frame, processing_class=dataset.processor)
        trainer.train()
        heads.append(model.decoder.to_depth.weight.detach().clone())
    torch.testing.assert_close(heads[1], heads[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(heads[2], heads[0], rtol=1e-4, atol=1e-7)


def test_one_cycle_starts_at_a_25th_and_ends_at_a_2500th(dataset, tmp_path):
    settings = recipe(tmp_path, max_steps=50, learning_rate=1.0, warmup_steps=0.2, adam_beta1=0.9)
    trainer = DepthTrainer(depth_model(), settings, train_dataset=dataset, encoder_learning_rate=0.1)
    optimizer = trainer.create_optimizer()
    schedule = trainer.create_scheduler(50)
    rates, betas = [], []
    for _ in range(50):
        rates.append([group["lr"] for group in optimizer.param_groups])
        betas.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx([0.1 / 25, 1 / 25])
    assert int(np.argmax([decoder for _, decoder in rates])) == pytest.approx(0.2 * 50, abs=1)
    assert max(encoder for encoder, _ in rates) == pytest.approx(0.1, abs=1e-3)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(1 / 2500)
    assert (min(betas), max(betas)) == (pytest.approx(0.8, abs=1e-2), pytest.approx(0.9))
    trainer.create_scheduler(50)  # train() again
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 / 25, 1 / 25])


def test_decoder_first_leaves_the_encoders_weights_for_a_share_of_the_steps(dataset, tmp_path):
    changed = []
    for steps in (2, 3):
        model = depth_model()
        before = [parameter.clone() for parameter in model.image_encoder.parameters()]
        settings = recipe(tmp_path, max_steps=4, per_device_train_batch_size=2, save_strategy="no", use_cpu=True)
        trainer = DepthTrainer(model, settings, train_dataset=dataset, decoder_first=0.5)
        trainer.add_callback(StopAfter(steps))
        trainer.train()
        changed.append(
            any(not torch.equal(a, b) for a, b in zip(before, model.image_encoder.parameters(), strict=True))
        )
    assert changed == [False, True]


def test_the_best_model_is_loaded_at_the_end(dataset, tmp_path):
    settings = recipe(
        tmp_path, max_steps=4, per_device_train_batch_size=2, use_cpu=True, learning_rate=4e-3, save_steps=1,
        save_total_limit=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="abs_rel", greater_is_better=True,  # the worst, which is not the last
    )  # fmt: skip
    trainer = DepthTrainer(depth_model(), settings, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    values = [entry["eval_abs_rel"] for entry in trainer.state.log_history if "eval_abs_rel" in entry]
    best = 1 + int(np.argmax(values))
    assert best < 4
    assert_same_weights(trainer.model, tmp_path / f"checkpoint-{best}")


def test_a_resumed_run_knows_its_best_model(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(DepthTrainer, "evaluate_frames", lambda self, *_: {"metrics": {"abs_rel": next(values)}})
    settings = recipe(
        tmp_path, max_steps=3, per_device_train_batch_size=2, use_cpu=True, save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="abs_rel",
        greater_is_better=False,
    )  # fmt: skip

    def trainer():
        return DepthTrainer(depth_model(), settings, train_dataset=dataset, eval_dataset=dataset)

    values = iter([0.1, 0.9, 0.8])
    trainer().train()
    shutil.rmtree(tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "checkpoint-2")
    values, resumed = iter([0.9, 0.8]), trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_weights(resumed.model, tmp_path / "checkpoint-1")
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")


def test_one_set_of_arguments_serves_several_trainers(dataset, tmp_path):
    settings = recipe(tmp_path, num_train_epochs=3, per_device_train_batch_size=2, use_cpu=True)
    two = DepthDataset(dataset.rows.select([0, 1]), dataset.processor)
    trainers = [DepthTrainer(depth_model(), settings, train_dataset=train) for train in (two, dataset)]
    assert [trainer.args.max_steps for trainer in trainers] == [3, round(3 * len(dataset) / 2)]
    trainers[0].train()
    assert trainers[0].callback_handler.processing_class is two.processor
    trainers[1].args.num_train_epochs = 1  # as a trial of a hyperparameter search
    trainers[1].get_train_dataloader()
    assert trainers[1].args.max_steps == round(len(dataset) / 2)
    trainers[1].args.max_steps = 7
    trainers[1].get_train_dataloader()
    assert trainers[1].args.max_steps == 7
    assert (tmp_path / "checkpoint-3" / "preprocessor_config.json").is_file()


def test_other_frames_than_those_of_training_are_evaluated(dataset, tmp_path):
    model, settings = depth_model(), recipe(tmp_path, per_device_train_batch_size=2, use_cpu=True)
    other = DepthDataset(dataset.rows.select([2]), dataset.processor)
    found = DepthTrainer(model, settings, train_dataset=dataset, eval_dataset=dataset).evaluate(other)
    alone = DepthTrainer(model, settings, eval_dataset=other)
    assert found | {"epoch": 0} == alone.evaluate() | {"epoch": 0}


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def test_probe_leaves_the_encoder_as_it_was(fine_tune, run):
    probe = weights(fine_tune("probe", freeze_image_encoder=True, max_steps=2))
    start = depth_model().state_dict()
    changed = {name.split(".")[0] for name, value in probe.items() if not torch.equal(value, start[name])}
    assert changed == {"decoder"}
    first = "image_encoder.conv1.0.weight"
    assert not torch.equal(weights(run)[first], start[first])


def test_it_learns_brightness_to_depth(dataset, tmp_path):
    model = depth_model(max_depth=100.0)
    settings = recipe(
        tmp_path, max_steps=16, per_device_train_batch_size=4, learning_rate=4e-3, save_strategy="no", logging_steps=1
    )
    trainer = DepthTrainer(model, settings, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])  # batches are of four of the frames
    assert set(trainer.evaluate()) == {f"eval_{name}" for name in METRICS} | {"epoch"}


# --- refusals before the first step ---------------------------------------------------------------------------------


def test_an_occupied_folder_is_refused_before_frames_are_read(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SimIPUError, match="is not empty"):
        finetune_depth(depth_arguments(str(tmp_path / "missing"), tmp_path))


def test_frames_on_both_sides_are_refused_by_content(fine_tune, tmp_path):
    renamed = dataset_from_rows(make_rows(range(5, 8), prefix="other-"), cache_dir=str(tmp_path / "cache"))
    renamed.save_to_disk(tmp_path / "renamed")
    with pytest.raises(SimIPUError, match="000005"):
        fine_tune("run", test_frames=[str(tmp_path / "renamed")])
    assert not (tmp_path / "run").exists()


def eigen_files(folder):
    (folder / "raw").mkdir()
    (folder / "depth").mkdir()
    lines = []
    for index in range(4):
        image = np.random.default_rng(index).integers(0, 255, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "raw" / f"{index}.png")
        Image.fromarray(np.full((64, 96), 256 * (5 + index), np.uint16)).save(folder / "depth" / f"{index}.png")
        lines.append(f"/{index}.png {index}.png 721.5")
    (folder / "train.txt").write_text("\n".join(lines[:3]), encoding="utf-8")
    (folder / "test.txt").write_text(lines[3] + "\n2.png gone.png\n", encoding="utf-8")
    lists = {"train_list": str(folder / "train.txt"), "test_list": str(folder / "test.txt")}
    roots = {"image_dir": str(folder / "raw"), "depth_dir": str(folder / "depth")}
    return {"train_frames": [], "test_frames": [], **roots, **lists}


def test_missing_ground_truth_of_the_test_list_is_found_first(fine_tune, tmp_path, capsys):
    files = eigen_files(tmp_path)
    with pytest.raises(SimIPUError, match=r"test\.txt: the files of 1 of 2 frames are missing, the first .*gone\.png"):
        fine_tune("run", **files)
    assert not (tmp_path / "run").exists()
    run = fine_tune("run", **files, on_bad_row="skip", max_steps=1)
    assert json.loads((run / "depth_evaluation.json").read_text())["num_images"] == 1
    assert "1 of 2 frames" in capsys.readouterr().err


def test_a_failing_evaluation_costs_nothing(fine_tune, tmp_path):
    files = eigen_files(tmp_path)
    (tmp_path / "test.txt").write_text("/3.png 3.png\n", encoding="utf-8")
    (tmp_path / "depth" / "3.png").write_bytes(b"damaged")
    with pytest.raises(SimIPUError, match=r"the model is saved in .*run.*3\.png.*evaluate-depth --model .*run"):
        fine_tune("run", **files, max_steps=1)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_damaged_training_frame_stops_or_is_skipped(fine_tune, tmp_path, capsys):
    files = {**eigen_files(tmp_path), "test_list": None}
    (tmp_path / "raw" / "1.png").write_bytes(b"damaged")
    with pytest.raises(SimIPUError, match=r"frame 1\.png"):
        fine_tune("run", **files, max_steps=6)  # two of three frames a step
    fine_tune("run", **files, max_steps=6, on_bad_row="skip", resume_from_checkpoint="latest")
    assert "left out: frame 1.png" in capsys.readouterr().err


def test_a_loss_that_is_no_number_names_its_frames(fine_tune, monkeypatch):
    monkeypatch.setattr(
        DepthTrainer, "compute_loss", lambda self, model, inputs, **_: torch.tensor(torch.nan, requires_grad=True)
    )
    with pytest.raises(
        SimIPUError, match=r"step 1: the loss is nan\. Frames of the step in this process: 00000\d, 00000\d"
    ):
        fine_tune("run")


def test_the_recorded_rows_of_a_step_are_those_of_all_its_batches(fine_tune):
    run = fine_tune("run", gradient_accumulation_steps=3, max_steps=1)
    record = yaml.safe_load((run / "run.yaml").read_text("utf-8"))
    assert record["data"]["rows_per_step"] == 6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_that_is_no_number_ends_the_run_before_the_step(fine_tune, tmp_path, monkeypatch, accumulation):
    def broken(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        if self.state.global_step == 1:
            self.model.decoder.to_depth.weight.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    compute = DepthTrainer.compute_loss
    monkeypatch.setattr(DepthTrainer, "compute_loss", broken)
    with pytest.raises(
        SimIPUError, match=r"step 2: the norm of the gradient is (nan|inf)\. Frames of the step in this process: 0"
    ):
        fine_tune("run", checkpointing_steps=1, gradient_accumulation_steps=accumulation)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


def test_metrics_are_json_whatever_the_numbers(tmp_path):
    state = SimpleNamespace(log_history=[{"grad_norm": float("inf"), "step": 1}], is_world_process_zero=True)
    RunFolder(tmp_path, None, None).on_log(None, state, None)
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"grad_norm": null, "step": 1}\n'


def test_a_first_forward_that_fails_leaves_nothing_behind(fine_tune, tmp_path, monkeypatch):
    def forward(self, pixel_values, **kwargs):
        raise AssertionError("Input height (32) doesn't match model (224).")

    monkeypatch.setattr(SimIPUForDepthEstimation, "forward", forward)
    with pytest.raises(SimIPUError, match=r"test_resnet does not take images of 32 x 32 .*\(224\)"):
        fine_tune("run")
    assert not (tmp_path / "run").exists()
