"""Pre-training: camera + LiDAR pairs in, a spatially aware image encoder out.

    accelerate launch -m simipu_hf.pretrain --data_dir KITTI --output_dir OUT
    simipu-hf pretrain --data_dir KITTI --output_dir OUT            (the same on one process)

Read `pretrain` first, then `simipu_hf.training.loop.train`, the loop itself.
"""

import contextlib
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.image_utils import SizeDict
from transformers.utils.logging import disable_progress_bar

from simipu_hf.data.augmentation import TwoViewAugmentation
from simipu_hf.data.collate import TwoViewCollator, to_model_inputs
from simipu_hf.data.loading import load_pretraining_dataset
from simipu_hf.data.pretraining_dataset import OnBadRow, TwoViewDataset
from simipu_hf.errors import SimIPUError
from simipu_hf.evaluation.correspondence import correspondence_recall
from simipu_hf.hub.export import export_image_encoder
from simipu_hf.hub.push import HubUploader, Strategy
from simipu_hf.modeling.configuration_simipu import SimIPUConfig
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.training.distributed import synchronize_batch_norm
from simipu_hf.training.legacy_arguments import (
    RECIPES,
    DataArguments,
    ModelArguments,
    PreTrainingArguments,
    TrainingArguments,
    parse_overrides,
    parse_pretraining_arguments,
)
from simipu_hf.training.loop import (
    Batch,
    TrainingJob,
    TrainingSettings,
    create_accelerator,
    exit_code_of,
    iterate,
    move_into,
    quiet_worker,
    train,
)
from simipu_hf.training.optimization import Optimization, OptimizerSettings, create_optimizer, create_schedule
from simipu_hf.training.run_folder import data_fingerprint
from simipu_hf.training.sampling import GlobalBatchSampler
from simipu_hf.training.watch import feature_spread

LOGGED = (
    "loss",
    "intra_modal_loss",
    "intra_modal_chance",
    "intra_modal_top1",
    "intra_modal_top5",
    "inter_modal_loss",
    "inter_modal_chance",
    "inter_modal_top1",
    "inter_modal_top5",
    "inter_modal_top10_percent",
    "inter_modal_top50_percent",
    "match_distance",
    "pairs_in_image",
)


# Flags that a resumed run may not change, beside the recipe and the model's configuration.
IDENTIFYING = (
    "preset",
    "image_size",
    "num_points",
    "on_bad_row",
    "gradient_accumulation_steps",
    "mixed_precision",
    "sync_batch_norm",
    "seed",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: parse the flags and run; returns the exit code."""
    return exit_code_of(lambda: pretrain(parse_pretraining_arguments(argv, prog="simipu-hf pretrain")))


def pretrain(arguments: PreTrainingArguments) -> Path:
    """Pre-train as the arguments say, in as many processes as were launched.

    Returns:
        the output folder: the model with its processor and code, `image_encoder/` for timm and transformers,
        `metrics.jsonl`, `run.yaml`, curves in `logs/`, and the checkpoints.

    Raises:
        SimIPUError: bad input; nothing was written unless the message says so.
        TrainingInterrupted: Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    flags = arguments.training
    disable_progress_bar()  # of every save; the run has one bar
    accelerator = create_accelerator(
        flags.output_dir,
        mixed_precision=flags.mixed_precision,
        gradient_accumulation_steps=flags.gradient_accumulation_steps,
        report_to=flags.report_to,
    )
    set_seed(flags.seed)
    model, processor = create_model(arguments.model, arguments.data)
    skipped: list[str] | None = None if arguments.data.on_bad_row == "error" else []
    rows = load_rows(accelerator, arguments.data, arguments.data.train_split, skipped)
    augmentation = create_augmentation(arguments.model, arguments.data)
    on_bad_row = cast("OnBadRow", arguments.data.on_bad_row)
    dataset = TwoViewDataset(rows, processor, augmentation, seed=flags.seed, on_bad_row=on_bad_row)
    if accelerator.is_main_process:
        warn_of_squeezed_images(dataset)
    steps_per_epoch, settings = resolve_steps(accelerator, len(dataset), flags)
    evaluate = create_evaluation(accelerator, arguments, model, processor) if flags.eval_steps else None
    if accelerator.num_processes > 1 and flags.sync_batch_norm:
        synchronize_batch_norm(model.to(accelerator.device))
    if arguments.model.gradient_checkpointing:
        checkpoint_gradients(model)
    if arguments.model.torch_compile:
        compile_image_encoder(model)
    uploader = create_uploader(accelerator, flags)
    job = TrainingJob(
        name="pretrain",
        model=model,
        create_optimization=lambda m: create_optimization(accelerator, m, flags, settings, steps_per_epoch),
        dataset=dataset,
        collate=TwoViewCollator(processor.image_processor.pad_size_divisor),
        compute_loss=functools.partial(compute_loss, processor.image_processor),
        frame_ids=list(rows["frame_id"]),
        save_model=functools.partial(save_model, accelerator, model, processor),
        finish=functools.partial(finish, accelerator, model, processor, dataset, skipped or []),
        evaluate=evaluate,
        identity=run_identity(accelerator, arguments, model, rows, settings.total_steps),
        run_record={"arguments": arguments.to_dict(), "data": describe_data(rows)},
        show={"intra_modal_loss": "intra", "inter_modal_loss": "inter", "inter_modal_chance": "chance"},
        on_saved=uploader.checkpoint_saved if uploader else None,
    )
    output_dir = train(accelerator, job, settings)
    encoder = (output_dir / "image_encoder").as_posix()
    accelerator.print(f'{encoder}: load it with timm.create_model("local-dir:{encoder}", pretrained=True)')
    if uploader:
        uploader.finish()
    return output_dir


def create_model(model: ModelArguments, data: DataArguments) -> tuple[SimIPUForPreTraining, SimIPUProcessor]:
    """The model and its processor, from a preset or from an earlier model.

    Raises:
        SimIPUError: an unknown preset, encoder, stage or configuration field, or too few points for the sampler.
    """
    try:
        if model.model_name_or_path is not None:
            network = SimIPUForPreTraining.from_pretrained(model.model_name_or_path)
        else:
            network = SimIPUForPreTraining(create_config(model))
        processor = create_processor(model, data)
    except SimIPUError:
        raise
    except (ValueError, ImportError, OSError) as error:
        raise SimIPUError(str(error)) from error
    needed = sum(getattr(network.config.point_config, "num_points", [[0]])[0])
    if data.num_points < needed:
        raise SimIPUError(
            f"--num_points {data.num_points}: the point encoder's first level samples {needed} points; raise it, or "
            "lower point_config.num_points with --config_overrides"
        )
    if model.pretrained_image_encoder:
        load_pretrained_image_encoder(network)
    return network, processor


def create_processor(model: ModelArguments, data: DataArguments) -> SimIPUProcessor:
    """The preset's processor, or that of an earlier model, with the size and the number of points of the flags."""
    if model.model_name_or_path is None:
        return SimIPUProcessor.from_preset(model.preset, image_size=data.image_size, num_points=data.num_points)
    processor = SimIPUProcessor.from_pretrained(model.model_name_or_path)
    processor.feature_extractor.num_points = data.num_points
    if data.image_size is not None:
        height, width = data.image_size
        processor.image_processor.size = SizeDict(height=height, width=width)
    return processor


def create_augmentation(model: ModelArguments, data: DataArguments) -> TwoViewAugmentation:
    """The preset's augmentation, its images in one size where `--image_size` asks for it, and the overrides."""
    overrides = parse_overrides(data.augmentation_overrides, "--augmentation_overrides", sections=())
    if data.image_size is not None:
        overrides = {"random_resize": None, **overrides}
    try:
        return TwoViewAugmentation.from_preset(model.preset, **overrides)
    except TypeError as error:  # an unknown field, or one number where a range is needed
        known = ", ".join(TwoViewAugmentation.__dataclass_fields__)
        raise SimIPUError(f"--augmentation_overrides: {error}; the fields are {known}") from error


def create_config(model: ModelArguments) -> SimIPUConfig:
    """The preset's configuration with the encoder flags and `--config_overrides` applied."""
    overrides = parse_overrides(model.config_overrides)
    image_fields = {"architecture": model.image_encoder, **overrides.pop("image_config", {})}
    config = SimIPUConfig.from_preset(
        model.preset, point_encoder=model.point_encoder, image_config=image_fields, **overrides
    )
    for fields, known in (
        (overrides, config),
        (image_fields, config.image_encoder_config),
        (parse_overrides(model.config_overrides).get("point_config", {}), config.point_encoder_config),
    ):
        unknown = [name for name in fields if name not in type(known).__dataclass_fields__]
        if unknown:
            raise SimIPUError(f"--config_overrides: {type(known).__name__} has no field {', '.join(unknown)}")
    return config


def load_pretrained_image_encoder(model: SimIPUForPreTraining) -> None:
    """Replace the image encoder's weights by timm's pretrained ones.

    Raises:
        SimIPUError: timm has none for this architecture, or they cannot be downloaded.
    """
    import timm

    config = model.config.image_encoder_config
    try:
        source = timm.create_model(config.architecture, pretrained=True, num_classes=0, **(config.model_args or {}))
    except Exception as error:  # timm and the Hub client raise their own, by version
        raise SimIPUError(f"--pretrained_image_encoder: no weights for {config.architecture} ({error})") from error
    model.simipu.image_encoder.load_state_dict(source.state_dict())


def load_rows(
    accelerator: Accelerator, data: DataArguments, split: str | None, skipped: list[str] | None = None
) -> datasets.Dataset:
    """The rows of a split; the main process prepares the cache and the others read it.

    Where `skipped` is given, damaged frames are left out and described there.
    """
    with accelerator.main_process_first():
        return load_pretraining_dataset(
            data.dataset_name, data.data_dir, data.dataset_config_name, split, skipped=skipped
        )


def warn_of_squeezed_images(dataset: TwoViewDataset) -> None:
    """Say so where the resize changes the images' shape by a fifth: the preset's size is that of KITTI's camera."""
    try:
        height, width = dataset.processor.image_processor.load_image(dataset.read_row(0)["image"]).shape[-2:]
    except ValueError:  # a damaged row is reported when it is used
        return
    new_height, new_width = dataset.processor.image_processor.output_size((height, width))
    squeeze = (new_width / width) / (new_height / height)
    if not 5 / 6 < squeeze < 6 / 5:
        fitting = max(32, round(new_height * width / height / 32) * 32)
        print(
            f"warning: images of {width} x {height} are resized to {new_width} x {new_height}, which changes their "
            f"shape by a factor of {squeeze:.2f}: --image_size {new_height} {fitting} would keep it",
            file=sys.stderr,
        )


def resolve_steps(accelerator: Accelerator, num_rows: int, flags: TrainingArguments) -> tuple[int, TrainingSettings]:
    """Optimizer steps per epoch, and the loop's settings with the total number of steps.

    Raises:
        SimIPUError: fewer rows than one optimizer step takes.
    """
    steps_per_epoch = GlobalBatchSampler(
        num_rows,
        flags.per_device_train_batch_size,
        accumulation_steps=flags.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
    ).steps_per_epoch
    total = flags.max_steps if flags.max_steps > 0 else math.ceil(flags.num_train_epochs * steps_per_epoch)
    settings = TrainingSettings(
        output_dir=Path(flags.output_dir),
        total_steps=total,
        **{
            name: getattr(flags, name)
            for name in TrainingSettings.__dataclass_fields__
            if name not in ("output_dir", "total_steps")
        },
    )
    return steps_per_epoch, settings


def create_optimization(
    accelerator: Accelerator,
    model: SimIPUForPreTraining,
    flags: TrainingArguments,
    settings: TrainingSettings,
    steps_per_epoch: int,
) -> Optimization:
    """One optimizer for the image encoder and the heads, one for the point encoder, as the official run has them."""
    heads = [model.intra_point_head, model.inter_image_head, model.inter_point_head]
    betas = (flags.adam_beta1, flags.adam_beta2)
    optimizers = [
        create_optimizer(
            OptimizerSettings(flags.optimizer, flags.learning_rate, flags.weight_decay, betas, flags.momentum),
            {
                "image_encoder": model.simipu.image_encoder.parameters(),
                "heads": [p for head in heads for p in head.parameters()],
            },
        ),
        create_optimizer(
            OptimizerSettings(
                flags.point_optimizer, flags.point_learning_rate, flags.point_weight_decay, betas, flags.momentum
            ),
            {"point_encoder": model.simipu.point_encoder.parameters()},
        ),
    ]
    schedules = [
        create_schedule(
            flags.lr_scheduler_type,
            optimizer,
            warmup_steps=flags.warmup_steps,
            total_steps=settings.total_steps,
            steps_per_epoch=steps_per_epoch,
            decay_per_epoch=flags.lr_decay_per_epoch,
        )
        for optimizer in optimizers
    ]
    return Optimization(accelerator, optimizers, schedules, flags.max_grad_norm)


def compute_loss(
    image_processor: SimIPUImageProcessor, model: nn.Module, batch: Batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the values to log."""
    output = model(**to_model_inputs(batch, image_processor))
    values = {name: getattr(output, name) for name in LOGGED}
    values["image_spread"] = feature_spread(output.image_embeds)
    values["point_spread"] = feature_spread(output.point_embeds)
    return output.loss, values


def create_evaluation(
    accelerator: Accelerator, arguments: PreTrainingArguments, model: SimIPUForPreTraining, processor: SimIPUProcessor
) -> Callable[[], dict[str, float]]:
    """A function that evaluates `model` on the held-out rows, always the same views of them.

    Raises:
        SimIPUError: the split does not exist, or has fewer rows than one batch of all processes.
    """
    flags = arguments.training
    batch_size = flags.per_device_eval_batch_size or flags.per_device_train_batch_size
    rows = load_rows(accelerator, arguments.data, arguments.data.validation_split)
    # gathering negatives needs the same batches on every process, so rows that do not fill one are left out
    batches = len(rows) // (batch_size * accelerator.num_processes)
    if batches == 0:
        raise SimIPUError(
            f"--validation_split {arguments.data.validation_split} has {len(rows)} rows, fewer than one batch of "
            f"{batch_size} on {accelerator.num_processes} processes: lower --per_device_eval_batch_size"
        )
    dataset = TwoViewDataset(rows, processor, create_augmentation(arguments.model, arguments.data), seed=0)
    first = accelerator.process_index * batch_size
    keys = [
        range(start + first, start + first + batch_size)
        for start in range(0, batches * batch_size * accelerator.num_processes, batch_size * accelerator.num_processes)
    ]

    def evaluate() -> dict[str, float]:
        loader = DataLoader(
            dataset,
            batch_sampler=[list(key) for key in keys],
            collate_fn=TwoViewCollator(processor.image_processor.pad_size_divisor),
            num_workers=flags.dataloader_num_workers,
            worker_init_fn=quiet_worker,
            generator=torch.Generator(),  # or it would draw from the random state that training goes on with
        )
        sums: dict[str, float] = {}
        model.eval()
        with torch.no_grad(), accelerator.autocast(), iterate(loader) as batches:
            for batch in batches:
                inputs = to_model_inputs(send_to_device(batch, accelerator.device), processor.image_processor)
                for name, value in evaluate_batch(model, inputs).items():
                    sums[name] = sums.get(name, 0.0) + value / len(keys)
        model.train()
        totals = accelerator.reduce(torch.tensor(list(sums.values()), device=accelerator.device), reduction="mean")
        return dict(zip(sums, totals.tolist(), strict=True))

    return evaluate


def evaluate_batch(model: SimIPUForPreTraining, batch: Batch) -> dict[str, float]:
    """Both losses, the accuracies, and the recall of the right pixel."""
    output = model(**batch)
    values = {name: float(getattr(output, name)) for name in LOGGED}
    return values | correspondence_recall(model, batch, output)


def checkpoint_gradients(model: SimIPUForPreTraining) -> None:
    """Recompute the image encoder's activations in the backward pass.

    Raises:
        SimIPUError: timm does not support it for this encoder.
    """
    try:
        model.simipu.image_encoder.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        name = model.config.image_encoder_config.architecture
        raise SimIPUError(f"--gradient_checkpointing: timm does not support it for {name}") from error


def compile_image_encoder(model: SimIPUForPreTraining) -> None:
    """Compile the image encoder; the point branch's index operations gain nothing from it.

    Raises:
        SimIPUError: together with gradient checkpointing, whose second forward would count the batch statistics
            twice; or at the first step, where this machine cannot compile.
    """
    encoder = model.simipu.image_encoder
    if getattr(encoder, "grad_checkpointing", False):
        raise SimIPUError("--torch_compile and --gradient_checkpointing exclude each other: leave one out")
    compiled = torch.compile(encoder.forward_intermediates)

    def forward_intermediates(*inputs: Any, **settings: Any) -> Any:
        try:
            return compiled(*inputs, **settings)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise SimIPUError(f"--torch_compile: this machine cannot compile the image encoder ({error})") from error

    encoder.forward_intermediates = forward_intermediates


def create_uploader(accelerator: Accelerator, flags: TrainingArguments) -> HubUploader | None:
    """What publishes the run in the background, on the main process where `--push_to_hub` is set."""
    if not (flags.push_to_hub and accelerator.is_main_process):
        return None
    assert flags.hub_model_id is not None
    return HubUploader(
        flags.hub_model_id,
        flags.output_dir,
        cast("Strategy", flags.hub_strategy),
        private=flags.hub_private_repo or None,
        token=flags.hub_token,
        encoder_repo_id=flags.encoder_repo_id,
        report=tqdm.write,
    )


def save_model(accelerator: Accelerator, model: SimIPUForPreTraining, processor: SimIPUProcessor, path: Path) -> None:
    """Everything `from_pretrained` needs, remote code included."""
    accelerator.unwrap_model(model).save_pretrained(path)
    processor.save_pretrained(path)


def finish(
    accelerator: Accelerator,
    model: SimIPUForPreTraining,
    processor: SimIPUProcessor,
    dataset: TwoViewDataset,
    skipped: list[str],
    output_dir: Path,
) -> None:
    """Write the final model, its image encoder (`image_encoder/`) and a picture of its features into `output_dir`."""
    aside = output_dir / ".final.partial"
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while finishing
    save_model(accelerator, model, processor, aside)
    export_image_encoder(aside, aside / "image_encoder", format="timm")
    move_into(aside, output_dir)
    with contextlib.suppress(SimIPUError):  # the first frame may be one of the damaged
        draw_features(model, processor, dataset.read_row(0), output_dir / "pictures" / "image_features.png")
    skipped = skipped + [f"row {row}" for row in dataset.bad_rows]
    if skipped:
        print(f"{len(skipped)} damaged rows were skipped:", *skipped, sep="\n  ", file=sys.stderr)


def draw_features(model: SimIPUForPreTraining, processor: SimIPUProcessor, row: Mapping[str, Any], path: Path) -> None:
    """What the image encoder makes of a frame, as colours.

    Without the photograph: the picture goes to the Hub with the model, which is no reason to publish the data.
    """
    from .visualization import Frame, draw_image_features, save_figure  # importing matplotlib takes seconds
    from .visualization.features import encode_image

    frame, stages = Frame.from_row(row), model.config.image_encoder_config.out_indices
    maps = encode_image(model.simipu.image_encoder.eval(), processor.image_processor, frame, stages)
    path.parent.mkdir(exist_ok=True)
    save_figure(draw_image_features(frame, maps, photograph=False), path)


def run_identity(
    accelerator: Accelerator,
    arguments: PreTrainingArguments,
    model: SimIPUForPreTraining,
    rows: datasets.Dataset,
    total_steps: int,
) -> dict[str, Any]:
    """What has to be the same for a run to continue: the model, the data and their order, the recipe.

    The number of processes may change as long as processes x batch size does not.
    """
    flags = arguments.to_dict()
    kept = {name: flags[name] for name in (*IDENTIFYING, *RECIPES["official"]) if name != "num_train_epochs"}
    if kept["lr_scheduler_type"] not in ("exponential", "constant", "constant_with_warmup"):
        kept["total_steps"] = total_steps
    not_counted = ("transformers_version", "_name_or_path", "dtype", "auto_map", "architectures")
    config = {name: value for name, value in model.config.to_dict().items() if name not in not_counted}
    return {
        **kept,
        "rows_per_forward": arguments.training.per_device_train_batch_size * accelerator.num_processes,
        "data_fingerprint": data_fingerprint(rows["frame_id"]),
        "model_config": _as_json(config),
    }


def describe_data(rows: datasets.Dataset) -> dict[str, Any]:
    """What `run.yaml` says about the data."""
    info = rows.info
    return {
        "dataset": info.builder_name or "",
        "config": info.config_name or "",
        "split": str(rows.split or ""),
        "rows": len(rows),
        "fingerprint": data_fingerprint(rows["frame_id"]),
    }


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


if __name__ == "__main__":
    sys.exit(main())
