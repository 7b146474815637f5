"""Pre-training: camera + LiDAR pairs in, a spatially aware image encoder out.

    accelerate launch -m simipu_hf.pretrain --data_dir KITTI --output_dir OUT
    simipu-hf pretrain --data_dir KITTI --output_dir OUT                        (the same on one process)
    pretrain(PreTrainingArguments(data_dir="KITTI", output_dir="OUT"))          (the same from Python)

Read top-down: `pretrain` makes the objects of the arguments, `train` is the loop, `finish` writes what is left behind.
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from huggingface_hub.errors import StrictDataclassError
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedConfig
from transformers.image_utils import SizeDict

from simipu_hf.data.loading import AnyDataset, load_mixture, load_pretraining_dataset, row_names
from simipu_hf.data.mixture import Mixture
from simipu_hf.data.overlap import refuse_shared_frames, refuse_shared_stream, rows_fingerprint
from simipu_hf.data.rows import Frame, dataset_from_stream
from simipu_hf.data.sources import given_sources, refuse_second_split
from simipu_hf.data.two_views import TwoViewAugmentation, TwoViewCollator, TwoViewDataset, to_model_inputs
from simipu_hf.errors import SimIPUError, exit_code_of
from simipu_hf.evaluation.correspondence import correspondence_recall
from simipu_hf.files import atomic_folder, move_into
from simipu_hf.hub.export import write_timm
from simipu_hf.hub.push import HubUploader
from simipu_hf.hub.sources import find_image_encoder, load_processor, model_folder
from simipu_hf.modeling.configuration_simipu import POINT_CONFIGS, SimIPUConfig
from simipu_hf.modeling.image_encoder import load_image_encoder_weights, pad_divisor, timm_arguments
from simipu_hf.modeling.modeling_simipu import SimIPUForPreTraining
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.training.arguments import PreTrainingArguments, parse_arguments, parse_overrides
from simipu_hf.training.batch_norm import kept_running_statistics, synchronize_batch_norm
from simipu_hf.training.checkpoint import TrainingState, read_state, resumed_step
from simipu_hf.training.distributed import (
    SharedFlags,
    StopRequest,
    check_precision,
    compile_image_encoder,
    create_accelerator,
    kept_session,
    on_every_process,
    on_main_process,
    recompute_activations,
)
from simipu_hf.training.logging import RunLogger, feature_spread
from simipu_hf.training.optimizers import (
    ChainedOptimizer,
    Recipe,
    choose_recipe,
    clip_gradients,
    create_optimizer,
    create_schedule,
    learning_rates,
)
from simipu_hf.training.run_folder import find_checkpoint, open_run_folder, weights_fingerprint
from simipu_hf.training.sampling import (
    TRAINING_VERSION,
    Steps,
    StoredBatches,
    StreamedBatches,
    create_loader,
    iterate,
    seed_micro_batch,
)
from simipu_hf.visualization.features import encode_image
from simipu_hf.visualization.figures import draw_image_features
from simipu_hf.visualization.frames import draw_curves
from simipu_hf.visualization.style import save_figure

MAX_SKIPPED_STEPS = 50  # in a row; the loss scale, halved in each, has then gone far below any that helps
NO_LOSS_SCALE = (
    f"the gradient was not finite in {MAX_SKIPPED_STEPS} steps in a row, whatever the loss scale of fp16. Use "
    "--mixed_precision bf16 or no or a lower learning rate, in a new run, or look at the rows"
)

# A resumed run may change these flags; every other flag identifies the run.
NOT_COMPARED = {
    *("output_dir", "num_train_epochs", "max_steps", "gradient_checkpointing", "torch_compile"),
    *("dataloader_num_workers", "logging_steps", "checkpointing_steps", "save_total_limit", "report_to"),
    "on_bad_row",  # none was met before the checkpoint, or it was skipped
    *("eval_steps", "per_device_eval_batch_size", "validation_split"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "encoder_repo_id"),
    # what follows from these is compared: the model's configuration, processor, augmentation, recipe, rows
    *("preset", "image_encoder", "point_encoder", "pretrained_image_encoder", "model_name_or_path"),
    *("config_overrides", "augmentation_overrides", "image_size", "num_points"),
    *("optimizer", "learning_rate", "weight_decay", "layer_decay", "warmup_steps"),
    *("depth_range", "freeze", "anchor_weight", "validation_share"),
    *("data_dir", "dataset_name", "dataset_config_name", "train_split", "per_device_train_batch_size"),
}


@kept_session()
def pretrain(arguments: PreTrainingArguments) -> Path:
    """Pre-train as the arguments say, in as many processes as were launched.

    Returns:
        the output folder: the model with its processor and code, `image_encoder/` for timm and transformers,
        `metrics.jsonl`, `run.yaml`, curves in `logs/`, and the checkpoints.

    Raises:
        SimIPUError: bad input; nothing was written unless the message says so.
        TrainingInterrupted: Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    check_precision(arguments.mixed_precision)
    arguments.trackers()  # refuses one before the data are read
    if arguments.resume_from_checkpoint is None:
        find_checkpoint(arguments)
    skipped: list[str] = []
    rows, mixture, held_out_rows = load_rows(arguments, skipped)  # before the processes join: it may take hours
    accelerator = create_accelerator(arguments)
    torch.manual_seed(arguments.seed)  # all that is drawn; Python's and NumPy's generators are the caller's
    model, processor = create_model(arguments)
    augmentation = create_augmentation(arguments, model.config)
    batches = create_batches(accelerator, arguments, rows, mixture, processor, augmentation)
    held_out = None
    if held_out_rows is not None:
        check_held_out(accelerator, arguments, held_out_rows)
        held_out = TwoViewDataset(held_out_rows, processor, augmentation, on_bad_row=arguments.on_bad_row)
    by_epochs = math.ceil(arguments.num_train_epochs * batches.steps_per_epoch)
    steps = Steps(0, arguments.max_steps if arguments.max_steps > 0 else by_epochs)
    recipe = choose_recipe(arguments, model.simipu.image_encoder, steps.last)
    identity = run_identity(accelerator, arguments, recipe, steps, batches, model, processor, augmentation)
    checkpoint = open_checkpoint(accelerator, arguments, identity, steps)
    prepare_model(accelerator, arguments, model)
    example = send_to_device(on_every_process(batches.example), accelerator.device)
    try_first_step(accelerator, model, to_model_inputs(example, processor.image_processor))
    optimizer, schedule = create_optimization(arguments, recipe, model, batches.steps_per_epoch, steps.last)

    record = {"data": describe_data(rows, identity.get("data_fingerprint")), "recipe": dataclasses.asdict(recipe)}
    if held_out_rows is not None:
        record["held_out"] = on_main_process(accelerator, describe_data, held_out_rows)
    output_dir = Path(arguments.output_dir)
    with contextlib.ExitStack() as held:
        on_main_process(accelerator, open_run_folder, arguments, held, steps.first, steps.last, **record)
        logger = RunLogger(accelerator, arguments, steps.first, steps.last, record)
        with contextlib.closing(logger):
            for name, about in record.items():
                if "rows" in about:
                    logger.message(f"{name}: {about['rows']} rows, {about['scenes']} scenes")
            wrapped, optimizer = accelerator.prepare(model, optimizer)
            state = TrainingState(accelerator, wrapped, processor, optimizer, schedule, logger, batches, identity)
            if checkpoint is not None:
                state.restore(checkpoint)
                logger.message(f"resumed from {checkpoint}")
            publishes = arguments.push_to_hub and accelerator.is_main_process
            uploader = HubUploader(arguments) if publishes else None
            try:
                train(accelerator, arguments, state, steps, batches, held_out, uploader)
            finally:
                report_skipped(skipped if accelerator.is_main_process else [], batches, held_out)
        on_main_process(accelerator, finish, state, output_dir)
        if uploader:
            uploader.finish()
    return output_dir


def train(
    accelerator: Accelerator,
    arguments: PreTrainingArguments,
    state: TrainingState,
    steps: Steps,
    batches: StoredBatches | StreamedBatches,
    held_out: TwoViewDataset | None,
    uploader: HubUploader | None,
) -> None:
    """The loop, from `steps.first` to `steps.last`.

    Between logged steps the host reads nothing from the device but the assignment of points (and fp16's overflows).
    So a value that is not finite is noticed one step late on a device, before anything is logged or saved.
    """
    if steps.first >= steps.last:  # a finished run, which a stream would go on with
        return
    model, optimizer, logger = state.model, state.optimizer, state.logger
    image_processor, output_dir = state.processor.image_processor, Path(arguments.output_dir)
    accumulation = arguments.gradient_accumulation_steps
    flags, skipped = SharedFlags(accelerator), 0
    model.train()
    loading = iterate(batches.loader(steps.first, steps.last))
    with StopRequest() as stop, uploader or contextlib.nullcontext(), loading as loader:
        for index, batch in enumerate(logger.timed(loader), start=steps.first * accumulation):
            step = index // accumulation + 1
            is_logged = steps.is_due(step, arguments.logging_steps)
            seed_micro_batch(arguments.seed, index, accelerator.process_index)
            with accelerator.accumulate(model):
                batch = send_to_device(batch, accelerator.device, non_blocking=True)
                output = model(**to_model_inputs(batch, image_processor), return_metrics=is_logged)
                with kept_running_statistics(model):
                    accelerator.backward(output.loss)
                logger.add(scalars(output, with_spread=is_logged))
                del output  # or its maps would be kept through the next forward pass
                if accelerator.sync_gradients:
                    logger.add(clip_gradients(accelerator, optimizer, arguments.max_grad_norm))
                    rates = learning_rates(optimizer)
                optimizer.step()
                if accelerator.sync_gradients:
                    skipped = skipped + 1 if optimizer.step_was_skipped else 0
                    if skipped == MAX_SKIPPED_STEPS:
                        raise SimIPUError(f"step {step}: {NO_LOSS_SCALE}")
                    if not skipped:
                        state.schedule.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            logger.step_done()
            is_evaluated = steps.is_due(step, arguments.eval_steps)
            is_saved = steps.is_due(step, arguments.checkpointing_steps)
            flags.put(step, stop=stop.requested, **logger.not_finite())
            raised = flags.get(wait=is_logged or is_evaluated or is_saved)
            if raised:
                raised = flags.get(wait=True)
                refuse_values_that_are_not_finite(raised, batches)
            if is_logged:
                logger.write_means(step, rates)
            if held_out is not None and is_evaluated:  # first, so that a checkpoint means that its step is logged
                with logger.paused_clock():
                    logger.write(step, evaluate(accelerator, arguments, accelerator.unwrap_model(model), held_out))
            if is_saved or "stop" in raised:
                with logger.paused_clock():
                    saved = state.save(output_dir, step, arguments.save_total_limit)
                    if uploader:
                        draw_curves(output_dir, output_dir)
                        uploader.checkpoint_saved(saved)
            if step == steps.last:
                break
            if "stop" in raised:
                raise stop.interruption(step, steps.last, saved)


def scalars(output: Any, with_spread: bool) -> dict[str, torch.Tensor]:
    """What is logged of a forward pass: all scalars of its output, and the spread of the embeddings."""
    values = {name: value for name, value in output.items() if isinstance(value, torch.Tensor) and value.ndim == 0}
    if with_spread:
        spreads = {"image": output.image_embeds, "point": output.point_embeds}
        values |= {f"{name}_spread": feature_spread(embeds) for name, embeds in spreads.items()}
    return values


def refuse_values_that_are_not_finite(raised: dict[str, int], batches: StoredBatches | StreamedBatches) -> None:
    """Raises a `SimIPUError` that names the values, the step and its rows, unless only a stop was requested.

    `raised` is equal on all processes, so all of them stop.
    """
    broken = {name: step for name, step in raised.items() if name != "stop"}
    if not broken:
        return
    step = min(broken.values())
    names = [name for name in broken if broken[name] == step]
    rows = gather_object(batches.frame_ids(step)) or ["not known while streaming"]
    raise SimIPUError(
        f"step {step}: {', '.join(names)} not finite (NaN or infinite). Rows of the step: {', '.join(rows)}. Nothing "
        "was saved since the last checkpoint: look at the rows, or begin a new run (with --model_name_or_path, from "
        "that checkpoint) with a lower learning rate of that part or with --max_grad_norm"
    )


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, arguments: PreTrainingArguments, model: SimIPUForPreTraining, held_out: TwoViewDataset
) -> dict[str, float]:
    """`eval/` losses, accuracies and recall of the right pixel, means over the held-out rows of all processes.

    Always the same views of the same rows. Gathering negatives needs equal batches on every process, so the rows that
    do not fill one of all processes are left out.
    """
    batch_size = eval_batch_size(arguments)
    keys = range(accelerator.process_index * batch_size, len(held_out), batch_size * accelerator.num_processes)
    batches = [list(range(first, first + batch_size)) for first in keys]
    batches = batches[: len(held_out) // (batch_size * accelerator.num_processes)]
    image_processor = held_out.processor.image_processor
    collate = TwoViewCollator(image_processor.pad_size_divisor)
    loader = create_loader(held_out, batches, collate, arguments.dataloader_num_workers)
    means: dict[str, list[float]] = {}  # of each batch
    model.eval()
    with accelerator.autocast(), iterate(loader) as loaded:
        for batch in loaded:
            inputs = to_model_inputs(send_to_device(batch, accelerator.device), image_processor)
            output = model(**inputs, return_metrics=True)
            values = scalars(output, with_spread=False) | correspondence_recall(model, inputs, output)
            for name, value in values.items():
                of_batches = means.setdefault(name, [])
                if not (name.startswith("recall") and math.isnan(value)):  # no point lies in the batch's images
                    of_batches.append(float(value))
    model.train()
    own = torch.tensor(
        [(sum(of_batches), len(of_batches)) for of_batches in means.values()], device=accelerator.device
    )
    total, count = accelerator.reduce(own, reduction="sum").unbind(1)
    return {f"eval/{name}": value for name, value in zip(means, (total / count).tolist(), strict=True)}


def eval_batch_size(arguments: PreTrainingArguments) -> int:
    return arguments.per_device_eval_batch_size or arguments.per_device_train_batch_size


# What `pretrain` is made of, in its order.


def load_rows(
    arguments: PreTrainingArguments, skipped: list[str]
) -> tuple[AnyDataset, Mixture | None, datasets.Dataset | None]:
    """The rows to train on, how several data sets are mixed, and the rows to evaluate on where `--eval_steps` asks.

    Damaged frames end the run, or are left out and described in `skipped`, as `--on_bad_row` says.
    """
    source: dict[str, Any] = {
        "dataset_name": arguments.dataset_name,
        "data_dir": arguments.data_dir,
        "dataset_config_name": arguments.dataset_config_name,
        "validation_share": arguments.validation_share,
        "cameras": arguments.cameras,
        "scenes": arguments.scenes,
        "streaming": arguments.streaming,
        "skipped": skipped if arguments.on_bad_row == "skip" else None,
    }
    refuse_second_split(arguments.train_split, *given_sources(arguments.dataset_name, arguments.data_dir))
    rows, mixture = load_mixture(mixture=arguments.mixture, seed=arguments.seed, split=arguments.train_split, **source)
    what = f"--validation_split {arguments.validation_split}"
    if not arguments.eval_steps:
        return refuse_shared_stream(rows, None, what) if arguments.streaming else rows, mixture, None
    held_out = load_pretraining_dataset(split=arguments.validation_split, **source)
    skipped[:] = dict.fromkeys(skipped)  # both come from the same files with --validation_share
    if isinstance(held_out, datasets.IterableDataset):
        held_out = dataset_from_stream(held_out)
        rows = refuse_shared_stream(rows, held_out, what)
    else:
        refuse_shared_frames(rows, held_out, what)
    return rows, mixture, held_out


def create_model(arguments: PreTrainingArguments) -> tuple[SimIPUForPreTraining, SimIPUProcessor]:
    """The model and its processor, from a preset or from an earlier model, changed as the flags say."""
    source = arguments.model_name_or_path
    start = model_folder(source) if source else None
    try:
        if start:
            config = SimIPUConfig.from_pretrained(start)
            processor = load_processor(start)
            refuse_contradictions(arguments, config)
        else:
            image_fields = {"architecture": arguments.image_encoder or "resnet50"}
            preset, point_encoder = arguments.preset or "recommended", arguments.point_encoder or "pointnet2"
            config = SimIPUConfig.from_preset(preset, point_encoder, image_config=image_fields)
            processor = SimIPUProcessor.from_preset(preset)
            processor.image_processor.pad_size_divisor = pad_divisor(config.image_encoder_config.architecture)
        change_processor(arguments, processor)
        config = change_config(arguments, config, processor)
        if start:  # weights that were saved in half precision are trained in single
            model = SimIPUForPreTraining.from_pretrained(start, config=config, dtype=torch.float32)
        else:
            model = SimIPUForPreTraining(config)
    except SimIPUError:
        raise
    except (ValueError, ImportError, OSError, RuntimeError, StrictDataclassError) as error:
        said = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise SimIPUError(f"--model_name_or_path {source}: {said}" if source else str(said)) from error
    if arguments.pretrained_image_encoder:
        load_pretrained_image_encoder(model, processor)
    if model.config.anchor_weight > 0:
        model.anchor_image_encoder()
    return model, processor


def refuse_contradictions(arguments: PreTrainingArguments, config: SimIPUConfig) -> None:
    """Raises a `SimIPUError` for a flag that asks for something else than the model of `--model_name_or_path` is."""
    kinds = {config_class.model_type: name for name, config_class in POINT_CONFIGS.items()}
    found = {
        "preset": config.preset,
        "image_encoder": config.image_encoder_config.architecture,
        "point_encoder": kinds[config.point_encoder_config.model_type],
    }
    for name, value in found.items():
        wanted = getattr(arguments, name)
        if wanted not in (None, value):
            raise SimIPUError(f"--{name} {wanted}: {arguments.model_name_or_path} has {value}; leave the flag out")


def change_processor(arguments: PreTrainingArguments, processor: SimIPUProcessor) -> None:
    """Set what the flags ask for."""
    points = processor.feature_extractor
    if arguments.num_points is not None:
        points.num_points = arguments.num_points
    if arguments.image_size is not None:
        height, width = arguments.image_size
        processor.image_processor.size = SizeDict(height=height, width=width)
    if arguments.depth_range is not None:
        if points.frame != "camera":
            raise SimIPUError("--depth_range does nothing with the official preset, whose range is in LiDAR axes")
        points.depth_range = list(arguments.depth_range)


def change_config(arguments: PreTrainingArguments, config: SimIPUConfig, processor: SimIPUProcessor) -> SimIPUConfig:
    """A configuration with the fields that the flags change."""
    overrides = parse_overrides(arguments.config_overrides)
    sections = {"image_config": config.image_encoder_config, "point_config": config.point_encoder_config}
    for section, known in (("", config), *sections.items()):
        of_flags = {"preset", "architecture", "image_size", "frozen", "anchor_weight"}
        fixed = {*PreTrainedConfig.__dataclass_fields__, *of_flags}
        for name in overrides.get(section, {}) if section else overrides.keys() - sections:
            if name not in type(known).__dataclass_fields__ or name in fixed:
                raise SimIPUError(
                    f"--config_overrides: {type(known).__name__} has no field {name} to change; --preset, "
                    "--image_encoder, --image_size, --freeze and --anchor_weight set their own"
                )
    fields = config.to_dict()
    if arguments.image_size is not None or arguments.model_name_or_path is None:
        size = processor.image_processor.size  # encoders with embeddings of a fixed size are built for it
        fields["image_config"]["image_size"] = [size["height"], size["width"]]
    if arguments.freeze is not None:
        fields["image_config"]["frozen"] = arguments.freeze
    if arguments.anchor_weight is not None:
        fields["anchor_weight"] = arguments.anchor_weight
    if "model_args" in overrides.get("image_config", {}):  # another network, whose cells may look elsewhere
        fields["image_config"]["feature_grids"] = None
    for section in sections:
        fields[section] |= overrides.pop(section, {})
    return SimIPUConfig.from_dict({**fields, **overrides})


def load_pretrained_image_encoder(model: SimIPUForPreTraining, processor: SimIPUProcessor) -> None:
    """Replace the image encoder's weights by timm's pretrained ones, and take the mean and deviation they expect."""
    config = model.config.image_encoder_config
    try:
        source = timm.create_model(config.architecture, pretrained=True, num_classes=0, **timm_arguments(config))
        load_image_encoder_weights(model.simipu.image_encoder, source.state_dict(), config.architecture)
    except Exception as error:  # timm and the Hub client raise their own, by version
        raise SimIPUError(f"--pretrained_image_encoder: no weights for {config.architecture} ({error})") from error
    expected: Any = source.pretrained_cfg
    processor.image_processor.image_mean = tuple(expected["mean"])
    processor.image_processor.image_std = tuple(expected["std"])


def create_augmentation(arguments: PreTrainingArguments, config: SimIPUConfig) -> TwoViewAugmentation:
    """The augmentation of the model's preset, its images in one size where `--image_size` asks for it."""
    overrides = parse_overrides(arguments.augmentation_overrides, "--augmentation_overrides", sections=())
    if arguments.image_size is not None:
        overrides = {"random_resize": None, **overrides}
    try:
        return TwoViewAugmentation.from_preset(config.preset, **overrides)
    except SimIPUError:
        raise
    except (TypeError, ValueError) as error:  # an unknown field, or too few or too many numbers
        known = ", ".join(TwoViewAugmentation.__dataclass_fields__)
        raise SimIPUError(f"--augmentation_overrides: {error}; the fields are {known}") from error


def check_held_out(accelerator: Accelerator, arguments: PreTrainingArguments, rows: datasets.Dataset) -> None:
    """Raises a `SimIPUError` where there are fewer rows to evaluate on than one batch of all processes."""
    needed = eval_batch_size(arguments) * accelerator.num_processes
    if len(rows) < needed:
        raise SimIPUError(
            f"--validation_split {arguments.validation_split} has {len(rows)} rows, one batch of all processes takes "
            f"{needed}: lower --per_device_eval_batch_size, or hold out more (--validation_share)"
        )


def create_batches(
    accelerator: Accelerator,
    arguments: PreTrainingArguments,
    rows: AnyDataset,
    mixture: Mixture | None,
    processor: SimIPUProcessor,
    augmentation: TwoViewAugmentation,
) -> StoredBatches | StreamedBatches:
    """What the loop trains on."""
    if isinstance(rows, datasets.IterableDataset):
        return StreamedBatches(accelerator, arguments, rows, processor, augmentation, mixture)
    dataset = TwoViewDataset(rows, processor, augmentation, arguments.seed, arguments.on_bad_row, mixture)
    if accelerator.is_main_process:
        warn_of_squeezed_images(dataset)
    return StoredBatches(accelerator, arguments, dataset)


def warn_of_squeezed_images(dataset: TwoViewDataset) -> None:
    """Say so where the resize changes the images' shape by a fifth: the preset's size is that of KITTI's camera."""
    try:
        width, height = dataset.read_row(0)["image"].size
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


def run_identity(
    accelerator: Accelerator,
    arguments: PreTrainingArguments,
    recipe: Recipe,
    steps: Steps,
    batches: StoredBatches | StreamedBatches,
    model: SimIPUForPreTraining,
    processor: SimIPUProcessor,
    augmentation: TwoViewAugmentation,
) -> dict[str, Any]:
    """What has to be the same for a run to continue: every flag but the listed ones, and what follows from those.

    The number of processes may change as long as processes x batch size does not; not that of a stream, nor where
    negatives or batch statistics are those of each process.
    """
    not_counted = ("transformers_version", "_name_or_path", "dtype", "auto_map", "architectures")
    config = {name: value for name, value in model.config.to_dict().items() if name not in not_counted}
    flags = arguments.to_dict()
    identity = {name: value for name, value in flags.items() if name not in NOT_COMPARED}
    identity |= {
        **batches.identity,
        "kind": type(arguments).__name__,
        "training_version": TRAINING_VERSION,
        "rows_per_forward": arguments.per_device_train_batch_size * accelerator.num_processes,
        "recipe": dataclasses.asdict(recipe),
        "augmentation": dataclasses.asdict(augmentation),
        "image_processor": processor.image_processor.to_dict(),
        "feature_extractor": processor.feature_extractor.to_dict(),
        "model_config": config,
    }
    if model.config.anchor_weight > 0:  # the weights are still those of the start
        identity["anchor"] = weights_fingerprint(model.simipu.image_encoder.state_dict())
    if not (model.config.gather_negatives and arguments.sync_batch_norm):  # the loss is that of each process
        identity["num_processes"] = accelerator.num_processes
    if arguments.lr_scheduler_type not in ("exponential", "constant", "constant_with_warmup", "inverse_sqrt"):
        identity["total_steps"] = steps.last
    return json.loads(json.dumps(identity, default=str))


def open_checkpoint(
    accelerator: Accelerator, arguments: PreTrainingArguments, identity: dict[str, Any], steps: Steps
) -> Path | None:
    """The checkpoint to resume from, after which `steps` then begin; nothing is written."""
    path = on_main_process(accelerator, find_checkpoint, arguments)
    if path is not None:
        steps.first = resumed_step(path, identity)
        read_state(path)  # what torch refuses is found here, before anything is written
    if steps.first > steps.last:
        raise SimIPUError(f"{path} is beyond the last step, {steps.last}: raise --max_steps or --num_train_epochs")
    return path


def prepare_model(accelerator: Accelerator, arguments: PreTrainingArguments, model: SimIPUForPreTraining) -> None:
    """Batch norm over all processes, gradient checkpointing and compilation, as the flags say; on the device."""
    model.to(accelerator.device)
    if accelerator.num_processes > 1 and arguments.sync_batch_norm:
        synchronize_batch_norm(model)
    if arguments.gradient_checkpointing and arguments.torch_compile:
        # the second forward pass of the compiled encoder would count the batch statistics twice
        raise SimIPUError("--torch_compile and --gradient_checkpointing exclude each other: leave one out")
    if arguments.gradient_checkpointing:
        recompute_activations(model)
    if arguments.torch_compile:
        compile_image_encoder(model)


def try_first_step(accelerator: Accelerator, model: SimIPUForPreTraining, inputs: dict[str, torch.Tensor]) -> None:
    """Forward and backward of one batch, and everything as before: what cannot work fails before anything is written.

    Parameters that the loss does not reach (stages beyond the sampled ones) are frozen, so that several processes need
    not look for them in every step.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    try:
        with accelerator.autocast():
            loss = model(**inputs).loss
        loss.backward()
    except (AssertionError, RuntimeError, ValueError) as error:
        raise SimIPUError(f"the first step failed: {error}") from error
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def create_optimization(
    arguments: PreTrainingArguments,
    recipe: Recipe,
    model: SimIPUForPreTraining,
    steps_per_epoch: int,
    total_steps: int,
) -> tuple[ChainedOptimizer, LRScheduler]:
    """One optimizer for the image encoder and the heads, one for the point encoder, as the official run has them."""
    modules: dict[str, list[torch.nn.Module]] = {
        "image_encoder": [model.simipu.image_encoder],
        "heads": [model.intra_point_head, model.inter_image_head, model.inter_point_head],
    }
    of_points = Recipe(arguments.point_optimizer, arguments.point_learning_rate, arguments.point_weight_decay)
    optimizer = ChainedOptimizer(
        [
            create_optimizer(arguments, recipe, modules),
            create_optimizer(arguments, of_points, {"point_encoder": [model.simipu.point_encoder]}),
        ]
    )
    return optimizer, create_schedule(arguments, recipe, optimizer, total_steps, steps_per_epoch)


def describe_data(rows: AnyDataset, fingerprint: str | None = None) -> dict[str, Any]:
    """What `run.yaml` says about the data; of a stream neither the number of rows nor their names are known.

    `fingerprint` is that of the rows where it is known already.
    """
    info = rows.info
    named = {"dataset": info.builder_name, "config": info.config_name, "split": rows.split, "license": info.license}
    about: dict[str, Any] = {name: str(value) for name, value in named.items() if value}
    if isinstance(rows, datasets.Dataset):
        names = row_names(rows)
        about |= {"rows": len(rows), "scenes": len({scene for scene, _ in names})}
        about["fingerprint"] = fingerprint or rows_fingerprint(rows)
    return about


# What is left behind.


def finish(state: TrainingState, output_dir: Path) -> None:
    """Write the final model, its image encoder (`image_encoder/`) and pictures into `output_dir`."""
    model, processor, batches = state.accelerator.unwrap_model(state.model), state.processor, state.batches
    with atomic_folder(output_dir / ".final", overwrite=True) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_timm(find_image_encoder(folder), folder / "image_encoder")
    move_into(output_dir / ".final", output_dir)
    draw_curves(output_dir, output_dir)
    if isinstance(batches, StoredBatches):
        with contextlib.suppress(ValueError):  # the first frame may be a damaged one
            row = batches.dataset.read_row(0)
            draw_features(model, processor, row, output_dir / "pictures" / "image_features.png")
    encoder = (output_dir / "image_encoder").as_posix()
    print(f'{encoder}: load it with timm.create_model("local-dir:{encoder}", pretrained=True)')


def report_skipped(
    frames: list[str], batches: StoredBatches | StreamedBatches, held_out: TwoViewDataset | None
) -> None:
    """Name `frames`, and the rows that this process left out; a stream names them as they come."""
    skipped = list(frames)
    if isinstance(batches, StoredBatches):
        skipped += [f"row {row}" for row in batches.dataset.bad_rows]
    if held_out is not None:
        skipped += [f"held-out row {row}" for row in held_out.bad_rows]
    if skipped:
        print(f"{len(skipped)} damaged rows were skipped:", *skipped, sep="\n  ", file=sys.stderr)


def draw_features(model: SimIPUForPreTraining, processor: SimIPUProcessor, row: Mapping[str, Any], path: Path) -> None:
    """What the image encoder makes of a frame, as colours.

    Without the photograph: the picture goes to the Hub with the model, which is no reason to publish the data.
    """
    frame, stages = Frame.from_row(row), model.config.image_encoder_config.stages
    maps = encode_image(model.simipu.image_encoder.eval(), processor.image_processor, frame, stages)
    path.parent.mkdir(exist_ok=True)
    save_figure(draw_image_features(frame, maps, photograph=False), path)


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: pretrain(parse_arguments(PreTrainingArguments, prog="simipu_hf.pretrain"))))
