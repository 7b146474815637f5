"""Pre-training: camera + LiDAR pairs in, a spatially aware image encoder out.

    accelerate launch -m simipu_hf.pretrain --data_dir KITTI --output_dir OUT
    simipu-hf pretrain --data_dir KITTI --output_dir OUT                        (the same on one process)
    pretrain(PreTrainingArguments(data_dir="KITTI", output_dir="OUT"))          (the same from Python)

Read top-down: `pretrain` makes the objects of the arguments, `train` is the loop, `finish` writes what is left behind.
"""

import contextlib
from pathlib import Path

import torch
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from simipu_hf.data.two_views import TwoViewDataset
from simipu_hf.training.arguments import PreTrainingArguments
from simipu_hf.training.checkpoint import (
    TrainingState,
)
from simipu_hf.training.distributed import create_accelerator, on_main_process
from simipu_hf.training.optimizers import (
    choose_recipe,
)

Batch = dict[str, torch.Tensor]
LOGGED = (
    *("loss", "intra_modal_loss", "intra_modal_chance", "intra_modal_top1", "intra_modal_top5"),
    *("inter_modal_loss", "inter_modal_chance", "inter_modal_top1", "inter_modal_top5"),
    *("inter_modal_top10_percent", "inter_modal_top50_percent", "match_distance", "pairs_in_image"),
)
SHOWN = {"intra_modal_loss": "intra", "inter_modal_loss": "inter", "inter_modal_chance": "chance"}

# A resumed run may change these flags; every other flag identifies the run. Those of the second part are identified by
# what follows from them: the model's configuration, the processor, the augmentation, the recipe, the rows.
MAY_CHANGE = {
    *("output_dir", "num_train_epochs", "max_steps", "gradient_checkpointing", "torch_compile"),
    *("dataloader_num_workers", "logging_steps", "checkpointing_steps", "save_total_limit", "report_to"),
    *("eval_steps", "per_device_eval_batch_size", "validation_split"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "encoder_repo_id"),
}
IDENTIFIED_BY_RESULT = {
    *("preset", "image_encoder", "point_encoder", "pretrained_image_encoder", "model_name_or_path"),
    *("config_overrides", "augmentation_overrides", "image_size", "num_points"),
    *("optimizer", "learning_rate", "weight_decay", "layer_decay", "warmup_steps"),
    *("data_dir", "dataset_name", "dataset_config_name", "train_split", "per_device_train_batch_size"),
}


def pretrain(arguments: PreTrainingArguments) -> Path:
    """Pre-train as the arguments say, in as many processes as were launched.

    Returns:
        the output folder: the model with its processor and code, `image_encoder/` for timm and transformers,
        `metrics.jsonl`, `run.yaml`, curves in `logs/`, and the checkpoints.

    Raises:
        SimIPUError: bad input; nothing was written unless the message says so.
        TrainingInterrupted: Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    disable_progress_bar()  # of every save; the run has one bar
    skipped: list[str] = []
    rows, held_out_rows = load_rows(arguments, skipped)  # before the processes join: it may take hours
    accelerator = create_accelerator(arguments)
    set_seed(arguments.seed)
    model, processor = create_model(arguments)
    augmentation = create_augmentation(arguments, model)
    dataset = TwoViewDataset(rows, processor, augmentation, arguments.seed, arguments.on_bad_row)
    held_out = create_held_out(accelerator, arguments, processor, augmentation, held_out_rows)
    sampler = create_sampler(accelerator, arguments, len(dataset))
    recipe = choose_recipe(arguments, model.simipu.image_encoder, sampler.last_step)
    identity = run_identity(accelerator, arguments, recipe, sampler, rows, [model.config, processor, augmentation])
    checkpoint = open_checkpoint(accelerator, arguments, identity, sampler)

    prepare_model(accelerator, arguments, model)
    try_first_step(accelerator, model, dataset, sampler)
    logger = open_run_folder(accelerator, arguments, recipe, sampler, rows)
    optimizer, schedule = create_optimization(arguments, recipe, model, sampler)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    state = TrainingState(accelerator, model, processor, optimizer, schedule, logger, identity)
    if checkpoint is not None:
        state.restore(checkpoint)
        logger.message(f"resumed from {checkpoint.path}")
    uploader = create_uploader(arguments) if arguments.push_to_hub and accelerator.is_main_process else None
    loader = create_training_loader(accelerator, arguments, dataset, sampler)
    with contextlib.closing(logger):
        train(accelerator, arguments, wrapped, prepared, state, sampler, loader, held_out, uploader)
    on_main_process(accelerator, finish, Path(arguments.output_dir), state, dataset, skipped)
    if uploader:
        uploader.finish()
    return Path(arguments.output_dir)
