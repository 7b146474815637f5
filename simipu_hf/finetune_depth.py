"""Fine-tune an image encoder for monocular depth by the published recipe, on the stock `transformers.Trainer`.

What is depth's own is here: model, data and evaluation. Recipe, Trainer and run folder are those of every task, in
`simipu_hf.finetuning`.
"""

import sys
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from .data.depth import (
    KB_CROP,
    DepthAugmentation,
    DepthDataset,
    default_crop_size,
    refuse_small_crop,
    select_depth_rows,
)
from .data.frames import FrameDataset
from .data.overlap import refuse_shared_frames
from .errors import exit_code_of
from .evaluate_depth import PictureWriter, format_table, record_in_card
from .evaluation.depth import DepthProtocol, evaluate_frames
from .finetuning import (
    FineTuningTrainer,
    announce,
    create_image_processor,
    create_model,
    find_rgb_encoder,
    fine_tune,
)
from .hub.weights import EncoderWeights, InputConvention
from .modeling.image_encoder import is_built_for_one_size, timm_arguments
from .modeling.image_processing_simipu import SimIPUImageProcessor
from .modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from .training.arguments import DepthArguments, DepthTaskArguments, parse_arguments


class DepthTrainer(FineTuningTrainer):
    """[`FineTuningTrainer`] that evaluates by a [`DepthProtocol`]; both data sets are [`DepthDataset`]s.

    trainer = DepthTrainer(model, recipe("OUT", max_steps=500), train_dataset=DepthDataset(rows, processor))
    trainer.train()
    """

    task = "depth"

    def __init__(self, *args: Any, protocol: DepthProtocol | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.protocol = protocol or DepthProtocol()

    def evaluate_frames(self, dataset: FrameDataset, picture_dir: Path | None = None) -> dict[str, Any]:
        """Evaluate on a [`DepthDataset`], every process on its share of the frames; as `evaluate_maps`."""
        return evaluate_frames(
            self.model,
            self.own_frames(dataset),
            dataset.processor,
            self.protocol,
            gather=gather_object,
            show=PictureWriter(picture_dir if self.is_world_process_zero() else None),
        )


def create_processor(arguments: DepthTaskArguments, convention: InputConvention | None = None) -> SimIPUImageProcessor:
    """The image pipeline that the flags describe, see [`create_image_processor`]."""
    size, crop_size = arguments.image_size or KB_CROP, KB_CROP if arguments.kb_crop else None
    return create_image_processor(size, convention, crop_size)


def trainer_parts(
    arguments: DepthTaskArguments,
    encoder: EncoderWeights,
    train_rows: Any,
    test_rows: Any,
    seed: int,
    keep_frames: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of [`DepthTrainer`], from rows or frames to train and, where not `None`, to evaluate on."""
    processor, on_bad_row = create_processor(arguments, encoder.input), arguments.on_bad_row
    size = arguments.image_size or KB_CROP
    model = create_model(SimIPUForDepthEstimation, encoder, size, seed, max_depth=arguments.max_depth)
    whole_images = is_built_for_one_size(timm_arguments(model.config.image_encoder_config))
    crop_size = arguments.crop_size or (size if whole_images else default_crop_size(arguments.image_size))
    augmentation = DepthAugmentation(crop_size=crop_size)
    train_dataset = DepthDataset(train_rows, processor, augmentation, seed, keep_frames, on_bad_row)
    if arguments.kb_crop:
        refuse_small_crop(train_dataset.frame(0))
    return {
        "model": model,
        "train_dataset": train_dataset,
        "eval_dataset": None if test_rows is None else DepthDataset(test_rows, processor, on_bad_row=on_bad_row),
        "protocol": DepthProtocol.from_arguments(arguments),
    }


def create_trainer(arguments: DepthArguments) -> DepthTrainer:
    """The trainer of `finetune_depth`, for use from Python: `train`, `evaluate`, `add_callback`.

    Raises:
        SimIPUError: unusable arguments, encoder or frames, or a frame that is trained and tested on.
    """
    where = arguments.image_dir, arguments.depth_dir, arguments.on_bad_row
    train_rows = select_depth_rows(arguments.train_frames, arguments.train_list, *where)
    test_rows = None
    if arguments.test_frames or arguments.test_list:
        test_rows = select_depth_rows(arguments.test_frames, arguments.test_list, *where)
        refuse_shared_frames(train_rows, test_rows, "test frames")
    encoder = find_rgb_encoder(arguments.image_encoder)
    announce(f"image encoder: {encoder.description}")
    parts = trainer_parts(arguments, encoder, train_rows, test_rows, arguments.seed, arguments.keep_frames)
    return DepthTrainer.from_arguments(arguments, **parts)


def finetune_depth(arguments: DepthArguments) -> Path:
    """Fine-tune as the arguments say, in as many processes as were launched, and evaluate.

    finetune_depth(DepthArguments(image_encoder="OUT", train_frames=["KITTI#train"], output_dir="DEPTH"))

    Returns:
        The output folder, which `pipeline("depth-estimation")` loads; see [`fine_tune`],
        also for errors.
    """
    return fine_tune(arguments, lambda: create_trainer(arguments), record_in_card, format_table)


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: finetune_depth(parse_arguments(DepthArguments, prog="simipu-hf finetune-depth"))))
