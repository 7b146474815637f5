"""Fine-tune an image encoder for monocular depth by the published recipe, and evaluate it.

    accelerate launch -m simipu_hf.finetune_depth --image_encoder RUN_OR_TIMM_NAME \
        --train_frames KITTI#train --test_frames KITTI#val --output_dir OUT

Read `finetune_depth` first; the loop itself is `simipu_hf.training.loop.train`, as in pre-training.
"""

# ruff: noqa: RUF009 (`flag` returns a dataclass field)

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, default_collate

from .data.depth_samples import DepthAugmentation, DepthDataset, DepthPreprocessing, default_crop_size
from .data.depth_targets import EigenDataset
from .data.rows import Rows
from .data.selection import select_depth_rows
from .errors import SimIPUError
from .evaluate_depth import EVALUATION_FILE, describe_frames, record_in_card
from .evaluation.depth import evaluate_frames, format_metrics, write_json
from .hub.card import write_model_card
from .hub.image_encoder import find_image_encoder, load_image_encoder
from .hub.push import HubUploader, Strategy
from .modeling.configuration_simipu_depth import SimIPUDepthConfig
from .modeling.image_processing_simipu import SimIPUImageProcessor
from .modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from .training.distributed import on_main_process, synchronize_batch_norm
from .training.fields import flag
from .training.legacy_arguments import as_size, check_choice, parse_flags
from .training.loop import (
    Batch,
    TrainingJob,
    TrainingSettings,
    create_accelerator,
    exit_code_of,
    move_into,
    train,
)
from .training.optimization import Optimization
from .training.run_folder import data_fingerprint
from .training.sampling import GlobalBatchSampler


@dataclass
class DepthArguments:
    """Everything [`finetune_depth`] needs. The defaults are the published KITTI recipe."""

    image_encoder: str = flag(
        "random:resnet50",
        "Weights to start from: a run or encoder folder, a Hub id, a .pth, a timm name (its ImageNet weights), or "
        "random:<timm name>.",
    )
    freeze_image_encoder: bool = flag(False, "Train the decoder alone, as a probe of the encoder's features.")
    max_depth: float = flag(80.0, "Largest depth that is predicted and evaluated, in metres.")

    train_frames: list[str] = flag([], "Frames to train on: SOURCE[#SPLIT[:IDS]] ...", metavar="FRAMES")
    test_frames: list[str] = flag([], "Frames to evaluate on, written the same way.", metavar="FRAMES")
    train_list: str | None = flag(None, "Eigen file list to train on, instead of --train_frames.")
    test_list: str | None = flag(None, "Eigen file list to evaluate on, instead of --test_frames.")
    image_dir: str | None = flag(None, "Folder the image paths of the lists start from (KITTI raw).")
    depth_dir: str | None = flag(None, "Folder the depth paths of the lists start from (annotated depth).")
    kb_crop: bool = flag(True, "Keep the bottom centre of 352 x 1216 pixels of every image.")
    image_size: list[int] | None = flag(None, "Height and width to resize to after that.", metavar="PIXELS")
    crop_size: list[int] | None = flag(
        None, "Height and width of the random training window; 352 704 or the same share if empty.", metavar="PIXELS"
    )
    keep_frames: bool = flag(False, "Keep decoded frames in memory, for small sets.")

    output_dir: str = flag("", "Folder of the run.")
    overwrite_output_dir: bool = flag(False, "Delete what an earlier run left in --output_dir.")
    resume_from_checkpoint: str | None = flag(None, "latest, or the path of a checkpoint.", metavar="latest|PATH")
    per_device_train_batch_size: int = flag(8, "Frames per process and forward pass (the recipe: 2 GPUs x 8).")
    gradient_accumulation_steps: int = flag(1, "Forward passes per optimizer step.")
    num_train_epochs: float = flag(24.0, "Passes over the frames.")
    max_steps: int = flag(-1, "Optimizer steps; overrides --num_train_epochs when above 0.")
    learning_rate: float = flag(1e-4, "Peak of the one-cycle schedule.")
    weight_decay: float = flag(0.01, "Of AdamW.")
    adam_beta1: float = flag(0.95, "Of AdamW.")
    adam_beta2: float = flag(0.99, "Of AdamW.")
    max_grad_norm: float = flag(35.0, "Clip gradients to this norm; 0 does not.")
    mixed_precision: str = flag("no", "no, bf16, or fp16 (GPU only).")
    gradient_checkpointing: bool = flag(False, "Recompute the encoder's activations in the backward pass.")
    sync_batch_norm: bool = flag(True, "Batch statistics over all processes; nothing changes on one.")
    seed: int = flag(0, "Of new weights, frame order and augmentation.")
    dataloader_num_workers: int = flag(2, "Processes that load data; the result does not depend on it.")
    logging_steps: int = flag(10, "Optimizer steps per logged line.")
    eval_steps: int = flag(0, "Evaluate every so many steps; 0 at the end alone.")
    checkpointing_steps: int = flag(500, "Optimizer steps per checkpoint; 0 only at the end.")
    save_total_limit: int = flag(2, "Checkpoints to keep, the newest; 0 keeps all.")
    report_to: list[str] = flag(["tensorboard"], "Trackers: tensorboard, trackio, wandb, …, or none.")
    evaluation_crop: str = flag("garg", "garg, eigen or none.")
    flip_test: bool = flag(True, "Evaluate the mean of the predictions for the image and its mirror image.")
    push_to_hub: bool = flag(False, "Publish checkpoints and the result on the Hub.")
    hub_model_id: str | None = flag(None, "Repository, user/name.")
    hub_private_repo: bool = flag(False, "Create it private.")
    hub_strategy: str = flag("every_save", "end, every_save, or checkpoint.")
    hub_token: str | None = flag(None, "Token; the logged-in user's if empty.")

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise SimIPUError("--output_dir is missing: the folder to write the run to")
        if bool(self.train_frames) == bool(self.train_list):
            raise SimIPUError("give the frames to train on: either --train_frames or --train_list")
        if self.test_frames and self.test_list:
            raise SimIPUError("give either --test_frames or --test_list, not both")
        if (self.train_list or self.test_list) and not (self.image_dir and self.depth_dir):
            raise SimIPUError("--train_list and --test_list need --image_dir and --depth_dir")
        for name in ("image_size", "crop_size"):
            size = getattr(self, name)
            if size is not None and (len(size) != 2 or min(size) < 32):
                raise SimIPUError(f"--{name} takes a height and a width of at least 32 pixels, found {size}")
        if self.image_size is None and not self.kb_crop:
            raise SimIPUError("--no_kb_crop needs --image_size: a batch holds images of one size")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise SimIPUError(f"--{name} must be at least 1, found {getattr(self, name)}")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise SimIPUError(f"--num_train_epochs must be above 0, found {self.num_train_epochs}")
        check_choice("--mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        check_choice("--evaluation_crop", self.evaluation_crop, ("garg", "eigen", "none"))
        check_choice("--hub_strategy", self.hub_strategy, ("end", "every_save", "checkpoint"))
        if self.push_to_hub and not self.hub_model_id:
            raise SimIPUError("--push_to_hub needs --hub_model_id user/name")

    def to_dict(self) -> dict[str, Any]:
        """All flags that make the run what it is, for `run.yaml`."""
        left_out = ("hub_token", "resume_from_checkpoint", "overwrite_output_dir")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def augmentation(self) -> DepthAugmentation:
        return DepthAugmentation(crop_size=as_size(self.crop_size) or default_crop_size(as_size(self.image_size)))

    def preprocessing(self, about: dict[str, Any]) -> DepthPreprocessing:
        return DepthPreprocessing(self.kb_crop, as_size(self.image_size), about["image_mean"], about["image_std"])

    def optimization(
        self, accelerator: Accelerator, model: SimIPUForDepthEstimation, total_steps: int
    ) -> Optimization:
        optimizer, schedule = create_optimization(
            model,
            total_steps,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=(self.adam_beta1, self.adam_beta2),
        )
        return Optimization(accelerator, [optimizer], [schedule], self.max_grad_norm)

    def rows(self, part: str) -> Rows | None:
        """The rows of `"train"` or `"test"`; `None` where none are asked for."""
        frames, file_list = getattr(self, f"{part}_frames"), getattr(self, f"{part}_list")
        return select_depth_rows(frames, file_list, self.image_dir, self.depth_dir)


def load_encoder_for_depth(
    source: str | os.PathLike,
) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None, dict[str, Any]]:
    """Where the image encoder of a depth model comes from.

    Args:
        source: a run or encoder folder, a Hub id, a `.pth`, a timm name (its published weights), or
            `random:<timm name>`.

    Returns:
        Fields of `SimIPUImageConfig`; the weights, `None` for random ones; and `description`, `image_mean`,
        `image_std` (of RGB values from 0 to 1).

    Raises:
        SimIPUError: nothing usable there.
    """
    name = str(source)
    about: dict[str, Any]
    if name.startswith("random:"):
        architecture = name.removeprefix("random:")
        if not timm.is_model(architecture):
            raise SimIPUError(f"{name}: timm {timm.__version__} has no model named {architecture!r}")
        about = {"description": f"timm model {architecture} with random weights"}
        imagenet = DepthPreprocessing()
        about |= {"image_mean": imagenet.image_mean, "image_std": imagenet.image_std}
        return {"architecture": architecture.split(".")[0]}, None, about
    if name.startswith("timm:") or (not Path(name).exists() and timm.is_model(name)):
        model, data_config = load_image_encoder(name, verbose=False)
        about = {
            "description": f"timm model {name} with its published weights ({model.pretrained_cfg.get('tag')})",
            "image_mean": tuple(data_config["mean"]),
            "image_std": tuple(data_config["std"]),
        }
        return {"architecture": model.pretrained_cfg["architecture"]}, model.state_dict(), about
    weights = find_image_encoder(source).with_channel_order("rgb").with_own_eps()
    about = {
        "description": weights.description,
        "image_mean": tuple(weights.input.mean),
        "image_std": tuple(weights.input.std),
    }
    image_fields = {"architecture": weights.architecture, "model_args": weights.model_args or None}
    return image_fields, weights.state_dict, about


def create_depth_model(
    source: str | os.PathLike, seed: int = 0, **config_fields: Any
) -> tuple[SimIPUForDepthEstimation, dict[str, Any]]:
    """A depth model whose image encoder has the weights of `source`, and whose decoder is new.

    The decoder depends on `seed` and the architecture alone, whatever the weights.

    Args:
        source: see [`load_encoder_for_depth`].
        seed: of the new weights.
        config_fields: of `SimIPUDepthConfig`.

    Returns:
        The model, and what was loaded: `description`, `image_mean`, `image_std`.
    """
    image_fields, weights, about = load_encoder_for_depth(source)
    return build_depth_model(image_fields, weights, seed, **config_fields), about


def build_depth_model(
    image_fields: dict[str, Any], weights: dict[str, torch.Tensor] | None, seed: int, **config_fields: Any
) -> SimIPUForDepthEstimation:
    """The model of [`create_depth_model`] from weights already in memory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SimIPUForDepthEstimation(SimIPUDepthConfig(image_config=image_fields, **config_fields))
    if weights is not None:
        model.image_encoder.load_state_dict(weights)
    return model


def create_optimization(
    model: SimIPUForDepthEstimation,
    total_steps: int,
    *,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.95, 0.99),
) -> tuple[AdamW, OneCycleLR]:
    """AdamW over all trainable parameters alike, and a one-cycle schedule stepped once per optimizer step.

    As published: the rate starts at 1/25 of its peak and ends at 1/100 of that; the first beta is cycled as well.
    """
    parts = {"image_encoder": model.image_encoder, "decoder": model.decoder}
    groups = [
        {"name": name, "params": trainable}
        for name, part in parts.items()
        if (trainable := [p for p in part.parameters() if p.requires_grad])
    ]
    optimizer = AdamW(groups, lr=learning_rate, betas=betas, weight_decay=weight_decay)
    # the schedule is asked once more after the last step
    schedule = OneCycleLR(optimizer, learning_rate, total_steps + 1, div_factor=25, final_div_factor=100)
    return optimizer, schedule


def fit(
    model: SimIPUForDepthEstimation,
    dataset: DepthDataset,
    *,
    total_steps: int,
    batch_size: int,
    seed: int = 0,
    max_grad_norm: float = 35.0,
    on_step: Callable[[int], None] = lambda step: None,
    **optimization: Any,
) -> list[float]:
    """Train in this process, on the model's device and without a run folder, as `compare_depth` does many times.

    Args:
        dataset: best with `keep_frames`, so that nothing is decoded twice.
        batch_size: frames per step; all of them where there are fewer.
        on_step: called with the number of steps taken, after each.
        optimization: keywords of [`create_optimization`].

    Returns:
        The loss of every step.
    """
    device = next(model.parameters()).device
    optimizer, schedule = create_optimization(model, total_steps, **optimization)
    sampler = GlobalBatchSampler(len(dataset), min(batch_size, len(dataset)), seed=seed, last_step=total_steps)
    losses = []
    model.train()
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=default_collate)
    for step, batch in enumerate(loader, start=1):
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        on_step(step)
    return torch.stack(losses).tolist()


def finetune_depth(arguments: DepthArguments) -> Path:
    """Fine-tune as the arguments say, in as many processes as were launched, and evaluate.

    Returns:
        The output folder, which `pipeline("depth-estimation")` loads: the model with its image processor and code,
        `depth_evaluation.json` and `pictures/` of the test frames, `metrics.jsonl`, `run.yaml`, and the checkpoints.

    Raises:
        SimIPUError: unusable arguments, data or checkpoint, or a loss that is no number.
        TrainingInterrupted: Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    accelerator = create_accelerator(
        arguments.output_dir,
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        report_to=arguments.report_to,
    )
    set_seed(arguments.seed)
    model, about = create_depth_model(arguments.image_encoder, arguments.seed, max_depth=arguments.max_depth)
    accelerator.print(f"image encoder: {about['description']}")
    model.freeze_image_encoder(arguments.freeze_image_encoder)
    if arguments.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if accelerator.num_processes > 1 and arguments.sync_batch_norm:
        synchronize_batch_norm(model.to(accelerator.device))

    preprocessing = arguments.preprocessing(about)
    with accelerator.main_process_first():
        train_rows, test_rows = arguments.rows("train"), arguments.rows("test")
    assert train_rows is not None
    dataset = DepthDataset(
        train_rows, preprocessing, arguments.augmentation(), arguments.seed, keep_frames=arguments.keep_frames
    )
    settings = resolve_settings(accelerator, len(dataset), arguments)

    def evaluate(picture_dir: Path | None = None) -> dict[str, Any]:
        assert test_rows is not None
        return evaluate_frames(
            accelerator.unwrap_model(model),
            (preprocessing.load(test_rows[index]) for index in range(len(test_rows))),
            preprocessing,
            flip_test=arguments.flip_test,
            picture_dir=picture_dir,
            crop=arguments.evaluation_crop,
            max_depth=arguments.max_depth,
        )

    def save_model(folder: Path) -> None:
        accelerator.unwrap_model(model).save_pretrained(folder)
        size = preprocessing.image_size or dataset.frame(0).image.shape[:2]
        save_image_processor(folder, size, preprocessing)

    uploader = create_uploader(arguments) if arguments.push_to_hub and accelerator.is_main_process else None

    def finish(output_dir: Path) -> None:
        aside = output_dir / ".final.partial"
        save_model(aside)
        if test_rows is not None:
            result = {"image_encoder": about["description"], **evaluate(aside / "pictures")}
            result["protocol"]["kb_crop"] = arguments.kb_crop
            write_json(aside / EVALUATION_FILE, result)
            record_in_card(aside, arguments.test_frames or [str(arguments.test_list)], result)
            print(format_metrics(result["metrics"]))
        move_into(aside, output_dir)
        write_model_card(output_dir, arguments.hub_model_id)
        if uploader is not None:
            uploader.finish()

    job = TrainingJob(
        name="finetune_depth",
        model=model,
        create_optimization=lambda m: arguments.optimization(accelerator, m, settings.total_steps),
        dataset=dataset,
        collate=default_collate,
        compute_loss=compute_loss,
        frame_ids=frame_ids(train_rows),
        save_model=save_model,
        finish=finish,
        evaluate=None if test_rows is None else lambda: on_main_process(accelerator, lambda: evaluate()["metrics"]),
        identity=run_identity(accelerator, arguments, settings, train_rows),
        run_record={
            "arguments": arguments.to_dict(),
            "data": {
                "source": describe_frames(arguments.train_frames or [str(arguments.image_dir)])[0],
                "train": describe_rows(train_rows),
                "test": describe_rows(test_rows),
            },
        },
        on_saved=(lambda path: None) if uploader is None else uploader.checkpoint_saved,
        show={"loss": "loss"},
    )
    return train(accelerator, job, settings)


def create_uploader(arguments: DepthArguments) -> HubUploader:
    """Publishes checkpoints in the background and the result at the end."""
    assert arguments.hub_model_id is not None
    return HubUploader(
        arguments.hub_model_id,
        arguments.output_dir,
        strategy=cast("Strategy", arguments.hub_strategy),
        private=arguments.hub_private_repo or None,
        token=arguments.hub_token,
    )


def compute_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the values to log."""
    loss = model(**batch).loss
    return loss, {"loss": loss}


def resolve_settings(accelerator: Accelerator, num_rows: int, arguments: DepthArguments) -> TrainingSettings:
    """The loop's settings, with epochs turned into optimizer steps."""
    frames_per_step = (
        arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    )
    steps_per_epoch = max(num_rows // frames_per_step, 1)
    epochs_in_steps = max(1, round(arguments.num_train_epochs * steps_per_epoch))
    names = [name for name in TrainingSettings.__dataclass_fields__ if name not in ("output_dir", "total_steps")]
    return TrainingSettings(
        output_dir=Path(arguments.output_dir),
        total_steps=arguments.max_steps if arguments.max_steps > 0 else epochs_in_steps,
        **{name: getattr(arguments, name) for name in names},
    )


def run_identity(
    accelerator: Accelerator, arguments: DepthArguments, settings: TrainingSettings, rows: Any
) -> dict[str, Any]:
    """What has to be the same for a run to continue; the schedule's length is part of it."""
    names = (
        "image_encoder", "freeze_image_encoder", "max_depth", "kb_crop", "image_size", "crop_size", "learning_rate",
        "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "mixed_precision", "gradient_accumulation_steps",
        "seed",
    )  # fmt: skip
    return {
        **{name: getattr(arguments, name) for name in names},
        "total_steps": settings.total_steps,
        "rows_per_forward": arguments.per_device_train_batch_size * accelerator.num_processes,
        "data_fingerprint": data_fingerprint(frame_ids(rows)),
    }


def frame_ids(rows: Any) -> list[str]:
    """Names of the frames, read without decoding them."""
    return [entry.image for entry in rows.entries] if isinstance(rows, EigenDataset) else list(rows["frame_id"])


def describe_rows(rows: Any) -> dict[str, Any] | None:
    """Number and fingerprint of the frames, for `run.yaml`."""
    return None if rows is None else {"rows": len(rows), "fingerprint": data_fingerprint(frame_ids(rows))}


def save_image_processor(folder: Path, size: tuple[int, int], preprocessing: DepthPreprocessing) -> None:
    """The image processor of a depth model: resizes whole images to `size` (height, width) and normalises them."""
    SimIPUImageProcessor.register_for_auto_class("AutoImageProcessor")
    SimIPUImageProcessor(
        size={"height": int(size[0]), "width": int(size[1])},
        image_mean=list(preprocessing.image_mean),
        image_std=list(preprocessing.image_std),
    ).save_pretrained(folder)


_DESCRIPTION = """Fine-tune an image encoder for monocular depth, and evaluate it by the published protocol.

accelerate launch -m simipu_hf.finetune_depth --image_encoder RUN --train_frames KITTI#train --test_frames KITTI#val \\
    --output_dir OUT
accelerate launch -m simipu_hf.finetune_depth --image_encoder resnet50 --train_list eigen_train.txt \\
    --test_list eigen_test.txt --image_dir KITTI_RAW --depth_dir KITTI_DEPTH --output_dir OUT

FRAMES is SOURCE, SOURCE#SPLIT or SOURCE#SPLIT:ID,ID,... where SOURCE is a KITTI folder, a folder of Parquet files, a
save_to_disk folder or a Hub id; the ids may also be lines of a file, written SOURCE#SPLIT:@FILE."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command: parse the flags and run; returns the exit code."""
    return exit_code_of(
        lambda: finetune_depth(*parse_flags((DepthArguments,), argv, "simipu-hf finetune-depth", _DESCRIPTION))
    )


if __name__ == "__main__":
    sys.exit(main())
