"""What fine-tuning shares, whatever the task: the recipe, the stock Trainer with it, and a run in a folder.

Read `fine_tune` first. A task (`finetune_depth`, `finetune_detection`) builds model, data sets and a subclass of
`FineTuningTrainer` that evaluates.
"""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from traceback import clear_frames
from typing import Any, Self

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from .data.frames import FrameDataset
from .data.overlap import rows_fingerprint
from .data.sources import name_sources
from .errors import SimIPUError
from .files import atomic_folder, move_into, write_json
from .hub.card import write_model_card
from .hub.push import HubUploader
from .hub.sources import find_image_encoder
from .hub.weights import EncoderWeights, InputConvention
from .modeling.image_encoder import load_image_encoder_weights
from .modeling.image_processing_simipu import SimIPUImageProcessor
from .training.arguments import FineTuningRunArguments
from .training.batch_norm import kept_running_statistics, synchronize_batch_norm
from .training.checkpoint import checkpoint_errors, resumed_step, save_checkpoint
from .training.distributed import (
    SharedFlags,
    StopRequest,
    check_launch,
    check_precision,
    on_every_process,
    on_main_process,
    recompute_activations,
)
from .training.logging import METRICS_FILE, append_metrics, cut_metrics
from .training.run_folder import find_checkpoint, open_run_folder, weights_fingerprint
from .training.sampling import TRAINING_VERSION, GlobalBatchSampler, create_loader
from .visualization.frames import draw_curves


def announce(text: str) -> None:
    """Print on standard error in the main process alone, also before the processes are connected."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def find_rgb_encoder(source: str | os.PathLike) -> EncoderWeights:
    """The image encoder at `source` (a run or encoder folder, a Hub id, a `.pth`, a timm name, `random:<timm name>`)
    for RGB images and with the architecture's own batch-norm epsilon, as the fine-tuned models are built."""
    return find_image_encoder(source).with_channel_order("rgb").with_own_eps()


def create_model(
    model_class: Any, encoder: EncoderWeights, image_size: tuple[int, int] | None = None, seed: int = 0, **fields: Any
) -> Any:
    """A [`SimIPUDenseModel`] with the encoder's weights, random ones where it holds none, and a new decoder or head,
    which depends on `seed` and architecture alone.

    Args:
        image_size: height and width of the images, for encoders that are built for one size.
        fields: of the model's configuration.

    Raises:
        SimIPUError: the weights do not fit, or the encoder cannot be built for that size.
    """
    image_config = {"architecture": encoder.architecture, "model_args": encoder.model_args or None}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(model_class.config_class(image_config=image_config, **fields))
        if encoder.state_dict:
            load_image_encoder_weights(model.image_encoder, encoder.state_dict, encoder.description)
        if image_size is not None:
            model.set_image_size(image_size)
    except ValueError as error:
        raise SimIPUError(f"{encoder.description}: {error}") from error
    return model


def create_image_processor(
    size: tuple[int, int], convention: InputConvention | None = None, crop_size: tuple[int, int] | None = None
) -> SimIPUImageProcessor:
    """The image pipeline of a fine-tuned model: in training, in evaluation and, saved with it, wherever it is used.

    Args:
        size: height and width that images are resized to.
        convention: mean and deviation that the encoder was trained with; ImageNet's if `None`.
        crop_size: height and width of the bottom centre that is kept of an image before that.
    """
    convention = convention or InputConvention()
    return SimIPUImageProcessor(
        crop_size=None if crop_size is None else {"height": crop_size[0], "width": crop_size[1]},
        size={"height": size[0], "width": size[1]},
        image_mean=list(convention.mean),
        image_std=list(convention.std),
        pad_size_divisor=1,
    )


class FineTuningTrainer(Trainer):
    """`transformers.Trainer` with the published recipe: AdamW, one-cycle schedule; a task adds `evaluate_frames`.

    The order of frames is a function of the seed, their augmentation of (seed, epoch, row), so a resumed run goes on
    exactly as the uninterrupted one, but for the first loss that it logs: a mean since it was resumed. A whole run is
    one pass over the loader, whose workers live as long.

    Args:
        args, kwargs: the Trainer's; both data sets are [`FrameDataset`]s. `warmup_steps` is the share of the steps in
            which the learning rate rises.
        encoder_learning_rate: peak for the image encoder; `learning_rate` if `None`.
        decoder_first: share of the steps, at the start, in which the image encoder's weights are frozen.
    """

    task: str  # as in evaluate-depth and depth_evaluation.json

    # narrower than the Trainer's, which also takes other libraries' models and data sets
    model: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        encoder_learning_rate: float | None = None,
        decoder_first: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.encoder_learning_rate = encoder_learning_rate
        self.evaluation: dict[str, Any] = {}  # the latest, whole
        self.identity: dict[str, Any] = {}  # what must be the same for the run to continue
        if decoder_first:
            self.add_callback(DecoderFirst(decoder_first))
        self._after_backward = ExitStack()
        self._learning_rates: dict[str, float] = {}
        if self.processing_class is None:
            self.processing_class = getattr(self.train_dataset or self.eval_dataset, "processor", None)
            self.callback_handler.processing_class = self.processing_class
        self.args = copy.copy(self.args)  # the number of steps is of these data sets alone
        self._counted_steps: int | None = None
        self._count_steps()

    @classmethod
    def from_arguments(cls, arguments: FineTuningRunArguments, **parts: Any) -> Self:
        """The trainer of a command, made of `parts`, its model changed as the flags say."""
        model = parts["model"]
        model.freeze_image_encoder(arguments.freeze_image_encoder)
        if arguments.gradient_checkpointing:
            recompute_activations(model)
        check_image_sizes(model, parts["train_dataset"])
        settings = trainer_settings(arguments)
        if settings.world_size > 1 and arguments.sync_batch_norm:
            synchronize_batch_norm(model.to(settings.device))
        return cls(
            args=settings,
            encoder_learning_rate=arguments.encoder_learning_rate,
            decoder_first=arguments.decoder_first,
            **parts,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except BaseException as error:
            # ends the loader's workers, which ignore the signals that end a process
            clear_frames(error.__traceback__)
            raise

    def _count_steps(self) -> None:
        given = self.args.max_steps > 0 and self.args.max_steps != self._counted_steps
        if self.train_dataset is not None and not given:
            steps = round(self.args.num_train_epochs * self._sampler(1).steps_per_epoch)
            self._counted_steps = self.args.max_steps = max(1, steps)

    def _sampler(self, last_step: int) -> GlobalBatchSampler:
        return GlobalBatchSampler(
            len(self.train_dataset),
            self.args.per_device_train_batch_size,
            accumulation_steps=self.args.gradient_accumulation_steps,
            num_processes=self.args.world_size,
            process_index=self.args.process_index,
            seed=self.args.seed,
            last_step=last_step,
        )

    def get_train_dataloader(self) -> DataLoader:
        self._count_steps()  # a trial of a hyperparameter search may have other epochs or batches
        sampler, pin_memory = self._sampler(self.args.max_steps), self.args.device.type == "cuda"
        workers = self.args.dataloader_num_workers
        return create_loader(self.train_dataset, sampler, self.data_collator, workers, pin_memory)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rate = self.args.learning_rate
            encoder_rate = rate if self.encoder_learning_rate is None else self.encoder_learning_rate
            encoder = list(self.model.image_encoder.parameters())
            others = set(self.model.parameters()) - set(encoder)
            decoder = [parameter for parameter in self.model.parameters() if parameter in others]
            groups = [
                {"name": name, "lr": peak, "params": [parameter for parameter in part if parameter.requires_grad]}
                for name, peak, part in (("image_encoder", encoder_rate, encoder), ("decoder", rate, decoder))
            ]
            groups = [group for group in groups if group["params"]]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = AdamW(groups, rate, betas=betas, weight_decay=self.args.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> OneCycleLR:
        """As published: from 1/25 of its peak, falling towards 1/100 of that at the end; the first beta is cycled."""
        self.lr_scheduler = OneCycleLR(
            self.optimizer,
            [group.get("max_lr", group["lr"]) for group in self.optimizer.param_groups],  # of an earlier train()
            num_training_steps + 1,  # it is asked once more after the last step
            pct_start=max(1, self.args.get_warmup_steps(num_training_steps)) / num_training_steps,
            base_momentum=self.args.adam_beta1 - 0.1,
            max_momentum=self.args.adam_beta1,
            div_factor=25,
            final_div_factor=100,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        self._after_backward.enter_context(kept_running_statistics(self.model))
        return result

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self._learning_rates = {f"learning_rate/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        with self._after_backward:
            loss = super().training_step(model, inputs, num_items_in_batch)
        values = {"loss": loss}
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:  # that of fp16 skips the step
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            values["norm of the gradient"] = torch.nn.utils.get_total_norm(gradients)
        # reading the loss waits for the backward pass: reading the norm costs no second wait
        broken = [f"{name} is {value.item()}" for name, value in values.items() if not torch.isfinite(value)]
        if broken:  # before the optimizer spreads it
            keys = self._sampler(self.args.max_steps).step_keys(self.state.global_step)
            names = [self.train_dataset.frame(row).frame_id for batch in keys for _, row in batch]
            # gradients are means over all processes: another one's frames may be the reason
            raise SimIPUError(
                f"step {self.state.global_step + 1}: the {' and '.join(broken)}. Frames of the step in this process: "
                f"{', '.join(names)}. The weights were not updated: look at the frames, or begin a new run with a "
                "lower --learning_rate"
            )
        return loss

    def own_frames(self, dataset: FrameDataset) -> Iterator[Any]:
        """This process's share of the frames of a data set."""
        return dataset.usable_frames(range(self.args.process_index, len(dataset), self.args.world_size))

    def evaluate_frames(self, dataset: FrameDataset, picture_dir: Path | None = None) -> dict[str, Any]:
        """`metrics` by name, and what else the task reports; every process evaluates its share of the frames, and the
        main one draws some into `picture_dir`."""
        raise NotImplementedError

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self.evaluation = self.evaluate_frames(dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluation["metrics"].items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._learning_rates
        if self.train_dataset is not None:
            self.state.epoch = self.state.global_step / self._sampler(1).steps_per_epoch
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(super()._get_output_dir(trial)) / ".checkpoint-saving")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Every process writes into a hidden folder, from where the main one moves all to its place.

        The Trainer deletes the oldest checkpoints of that folder, and finds none but this one.
        """
        name, aside = f"checkpoint-{self.state.global_step}", Path(self._get_output_dir(trial))
        save_parts = super()._save_checkpoint

        def write() -> None:
            with checkpoint_errors(aside.parent / name):
                save_parts(model, trial)

        try:
            on_every_process(write)
            on_main_process(
                self.accelerator,
                save_checkpoint,
                aside.parent,
                self.state.global_step,
                save=partial(move_into, aside / name),
                identity=self.identity,
                # the best is not to be the one that is deleted
                total_limit=0 if self.args.load_best_model_at_end else self.args.save_total_limit or 0,
            )
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        best = aside.parent / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():  # also after a resume, which finds the folder aside no more
            self.state.best_model_checkpoint = str(best)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Without the Trainer's pickle of its arguments, which would hold secrets and cannot be loaded safely."""
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            self.model.save_pretrained(folder, state_dict=state_dict)
            self.processing_class.save_pretrained(folder)


class DecoderFirst(TrainerCallback):
    """Freezes the image encoder's weights for the first `share` of the steps; its batch statistics go on adapting."""

    def __init__(self, share: float):
        self.share = share

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.image_encoder.requires_grad_(state.global_step >= self.share * state.max_steps)


class RunFolder(TrainerCallback):
    """Keeps `metrics.jsonl`, publishes checkpoints, and ends the run after a signal, when a checkpoint is written."""

    def __init__(self, output_dir: Path, stop: StopRequest, flags: SharedFlags, uploader: HubUploader | None = None):
        self.output_dir, self.stop, self.flags, self.uploader = output_dir, stop, flags, uploader
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # a resumed state holds the intervals of its first start
        if state.is_world_process_zero:
            cut_metrics(self.output_dir / METRICS_FILE, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        line = {name.replace("eval_", "eval/", 1): value for name, value in state.log_history[-1].items()}
        if state.is_world_process_zero and "train_runtime" not in line:  # the Trainer's summary at the end
            append_metrics(self.output_dir / METRICS_FILE, line)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.flags.put(state.global_step, stop=self.stop.requested)
        if self.flags.get():
            self.stopped = control.should_log = control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.uploader is not None and state.is_world_process_zero:
            self.uploader.checkpoint_saved(self.output_dir / f"checkpoint-{state.global_step}")


def recipe(output_dir: str | os.PathLike, mixed_precision: str = "no", **changes: Any) -> TrainingArguments:
    """The published recipe as arguments of the Trainer, with `changes`."""
    check_precision(mixed_precision)
    settings = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 24.0,
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "adam_beta1": 0.95,
        "adam_beta2": 0.99,
        "max_grad_norm": 35.0,
        "bf16": mixed_precision == "bf16",
        "fp16": mixed_precision == "fp16",
        "warmup_steps": 0.3,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "ddp_timeout": 7200,  # the others wait while the main process writes the final folder
        "report_to": "none",
        # not Apple's GPUs, which have no float64; without use_cpu the Trainer refuses bf16 on the CPU
        "use_cpu": torch.backends.mps.is_available() or not torch.accelerator.is_available(),
    }
    arguments = TrainingArguments(str(output_dir), **{**settings, **changes})
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are several processes, never nn.DataParallel
    return arguments


def trainer_settings(arguments: FineTuningRunArguments) -> TrainingArguments:
    """The flags as arguments of the Trainer."""
    same = (
        "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate",
        "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "seed", "dataloader_num_workers", "logging_steps",
    )  # fmt: skip
    return recipe(
        arguments.output_dir,
        arguments.mixed_precision,
        **{name: getattr(arguments, name) for name in same},
        warmup_steps=arguments.warmup_ratio,
        report_to=arguments.trackers(),
        eval_strategy="steps" if arguments.eval_steps else "no",
        eval_steps=arguments.eval_steps or None,
        save_strategy="steps",
        save_steps=arguments.checkpointing_steps or sys.maxsize,  # the last step is saved in any case
        save_total_limit=arguments.save_total_limit or None,
    )


def check_image_sizes(model: Any, dataset: FrameDataset) -> None:
    """One forward of a sample and of its whole image, so that nothing is written for an encoder of other sizes."""
    for sample in (dataset[0], dataset.sample(dataset.frame(0))):
        batch = {name: value[None] for name, value in sample.items() if name != "labels"}
        try:
            with torch.no_grad():
                model.eval()(**batch)
        except (RuntimeError, ValueError, AssertionError) as error:
            height, width = batch["pixel_values"].shape[-2:]
            architecture = model.config.image_encoder_config.architecture
            raise SimIPUError(
                f"--image_encoder: {architecture} does not take images of {height} x {width} pixels ({error}); choose "
                "another --image_size or --crop_size"
            ) from error


def fine_tune(
    arguments: FineTuningRunArguments,
    create_trainer: Callable[[], FineTuningTrainer],
    record: Callable[[Path, Sequence[str], dict[str, Any]], None],
    table: Callable[[dict[str, Any]], str],
) -> Path:
    """Train in as many processes as were launched, save, and evaluate.

    Args:
        record: keeps the result of the evaluation for the card: given the folder, the test frames and the result.
        table: a result as text.

    Returns:
        The output folder: the model with its image processor and code, the evaluation and `pictures/` of the test
        frames, `metrics.jsonl`, `run.yaml`, and the checkpoints.

    Raises:
        SimIPUError: unusable arguments, data or checkpoint, or a loss that is no number.
        TrainingInterrupted: Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    if arguments.resume_from_checkpoint is None:  # an occupied folder is refused before anything is read
        find_checkpoint(arguments)
    trainer = create_trainer()
    output_dir, accelerator = Path(arguments.output_dir), trainer.accelerator
    check_launch(accelerator)
    with ExitStack() as held:
        checkpoint = on_main_process(accelerator, open_run, arguments, trainer, held)
        publishes = arguments.push_to_hub and accelerator.is_main_process
        uploader = HubUploader(arguments) if publishes else None
        with StopRequest() as stop, uploader or nullcontext():
            run_folder = RunFolder(output_dir, stop, SharedFlags(accelerator), uploader)
            trainer.add_callback(run_folder)
            trainer.train(resume_from_checkpoint=checkpoint)
            step, last_step = trainer.state.global_step, trainer.args.max_steps
            if run_folder.stopped and step < last_step:  # a callback's early end is one as planned
                raise stop.interruption(step, last_step, output_dir / f"checkpoint-{step}")
        on_main_process(accelerator, save_final_model, trainer, output_dir)
        if trainer.eval_dataset is not None:
            result = evaluate_final_model(trainer, output_dir)
            if accelerator.is_main_process:
                record(output_dir, arguments.test_frames or [str(getattr(arguments, "test_list", None))], result)
                print(table(result))
        if accelerator.is_main_process:
            draw_curves(output_dir, output_dir)
            write_model_card(output_dir, arguments.hub_model_id)
        if uploader is not None:
            uploader.finish()
    return output_dir


# what a resumed run may change; the encoder, the frames and the schedule are identified by what they are
FREE = {
    "output_dir", "train_frames", "train_list", "test_frames", "test_list", "image_dir", "depth_dir", "keep_frames",
    "evaluation_crop", "flip_test", "min_overlap", "num_train_epochs", "max_steps", "on_bad_row",
    "report_to", "dataloader_num_workers", "logging_steps", "eval_steps", "checkpointing_steps", "save_total_limit",
    "gradient_checkpointing", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "image_encoder",
}  # fmt: skip


def open_run(arguments: FineTuningRunArguments, trainer: FineTuningTrainer, held: ExitStack) -> str | None:
    """Prepare the run folder and write `run.yaml`; the checkpoint to resume from, `None` to start at the beginning."""
    checkpoint = find_checkpoint(arguments)
    rows, test_rows = trainer.train_dataset.rows, trainer.eval_dataset and trainer.eval_dataset.rows
    record = {
        "source": name_sources(arguments.train_frames or [str(getattr(arguments, "image_dir", None))]),
        "train": {"rows": len(rows), "fingerprint": rows_fingerprint(rows)},
        "test": test_rows and {"rows": len(test_rows), "fingerprint": rows_fingerprint(test_rows)},
        "total_steps": trainer.args.max_steps,
        "rows_per_step": arguments.per_device_train_batch_size
        * arguments.gradient_accumulation_steps
        * trainer.args.world_size,
    }
    fixed = {name: value for name, value in arguments.to_dict().items() if name not in FREE}
    fixed |= {name: record[name] for name in ("train", "total_steps")}
    fixed |= {"kind": type(arguments).__name__, "training_version": TRAINING_VERSION}
    fixed["num_processes"] = trainer.args.world_size  # losses are those of each process
    config = trainer.model.config.image_encoder_config
    fixed["image_encoder"] = {
        "architecture": config.architecture,
        "model_args": config.model_args,
        # none is trained yet; random ones differ in their last bits between processors
        "weights": "random"
        if arguments.image_encoder.startswith("random:")
        else weights_fingerprint(trainer.model.image_encoder.state_dict()),
    }
    fixed["image_processor"] = trainer.processing_class.to_dict()
    trainer.identity = json.loads(json.dumps(fixed))
    step = 0 if checkpoint is None else resumed_step(checkpoint, trainer.identity)
    open_run_folder(arguments, held, step, trainer.args.max_steps, data=record)
    return None if checkpoint is None else str(checkpoint)


def save_final_model(trainer: FineTuningTrainer, output_dir: Path) -> None:
    with atomic_folder(output_dir / ".final", overwrite=True) as beside:
        trainer.save_model(str(beside))
    move_into(output_dir / ".final", output_dir)


def evaluate_final_model(trainer: FineTuningTrainer, output_dir: Path) -> dict[str, Any]:
    """The task's evaluation, as JSON, and pictures; a failure leaves the model where it is, and says so.

    It is computed without the autocast of training, in single precision, in which the saved model is loaded.
    """
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    try:
        result = trainer.evaluate_frames(trainer.eval_dataset, output_dir / "pictures")
    except SimIPUError as error:
        raise SimIPUError(
            f"the model is saved in {output_dir}, but could not be evaluated: {error}. Evaluate it later with "
            f"simipu-hf evaluate-{trainer.task} --model {output_dir}, the test frames and the evaluation flags of "
            "this command"
        ) from error
    if trainer.is_world_process_zero():
        description = {"image_encoder": trainer.model.config.image_encoder_config.architecture}
        write_json(output_dir / f"{trainer.task}_evaluation.json", {**description, **result})
    return result
