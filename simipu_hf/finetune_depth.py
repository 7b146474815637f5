"""Fine-tune an image encoder for monocular depth by the published recipe, on the stock `transformers.Trainer`.

    accelerate launch -m simipu_hf.finetune_depth --image_encoder RUN_OR_TIMM_NAME \
        --train_frames KITTI#train --test_frames KITTI#val --output_dir OUT

What is depth's own is here: model, data and evaluation. Recipe, Trainer and run folder are those of every task, in
`simipu_hf.finetuning`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from .data.depth import (
    KB_CROP,
    DepthAugmentation,
    DepthDataset,
    default_crop_size,
    select_depth_rows,
    usable_frames,
)
from .data.overlap import refuse_shared_frames
from .errors import exit_code_of
from .evaluate_depth import PictureWriter, record_in_card
from .evaluation.depth import DepthProtocol, evaluate_frames, format_metrics
from .finetuning import FineTuningTrainer, create_model, find_rgb_encoder, fine_tune, prepare_model
from .hub.weights import EncoderWeights, InputConvention
from .modeling.image_processing_simipu import SimIPUImageProcessor
from .modeling.modeling_simipu_depth import SimIPUForDepthEstimation
from .training.arguments import DepthArguments, DepthTaskArguments, parse_arguments


def create_depth_model(
    encoder: EncoderWeights, image_size: tuple[int, int] | None = None, seed: int = 0, **config_fields: Any
) -> SimIPUForDepthEstimation:
    """A depth model with the encoder's weights and a new decoder, see [`create_model`].

    model = create_depth_model(find_rgb_encoder("OUT"), max_depth=80.0)

    Args:
        config_fields: of `SimIPUDepthConfig`.
    """
    return create_model(SimIPUForDepthEstimation, encoder, image_size, seed, **config_fields)


def create_image_processor(
    arguments: DepthTaskArguments, convention: InputConvention | None = None
) -> SimIPUImageProcessor:
    """The image pipeline of a depth model: in training, in evaluation and, saved with it, wherever it is used.

    Args:
        arguments: crop and size.
        convention: mean and deviation that the encoder was trained with; ImageNet's if `None`.
    """
    convention = convention or InputConvention()
    height, width = arguments.image_size or KB_CROP
    return SimIPUImageProcessor(
        crop_size={"height": KB_CROP[0], "width": KB_CROP[1]} if arguments.kb_crop else None,
        size={"height": height, "width": width},
        image_mean=list(convention.mean),
        image_std=list(convention.std),
        pad_size_divisor=1,
    )


class DepthTrainer(FineTuningTrainer):
    """[`FineTuningTrainer`] with depth metrics; both data sets are [`DepthDataset`]s.

        trainer = DepthTrainer(model, recipe("OUT", max_steps=500), train_dataset=DepthDataset(rows, processor))
        trainer.train()

    Args:
        protocol: of `evaluate`.
    """

    task = "depth"

    def __init__(self, *args: Any, protocol: DepthProtocol | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.protocol = protocol or DepthProtocol()

    def evaluate_frames(self, picture_dir: Path | None = None) -> dict[str, Any]:
        """Evaluate on `eval_dataset`, every process on its share of the frames; as `evaluate_maps`."""
        data = self.eval_dataset
        share = range(self.args.process_index, len(data), self.args.world_size)
        return evaluate_frames(
            self.model,
            usable_frames(data.rows, data.processor, data.on_bad_row, share),
            data.processor,
            self.protocol,
            gather=gather_object,
            show=PictureWriter(picture_dir if self.is_world_process_zero() else None),
        )


def create_trainer(arguments: DepthArguments, callbacks: Sequence[TrainerCallback] = ()) -> DepthTrainer:
    """The trainer of `finetune_depth`, for use from Python: `train`, `evaluate`, `hyperparameter_search`, callbacks.

    Raises:
        SimIPUError: unusable arguments, encoder or frames, or a frame that is trained and tested on.
    """
    train_rows, test_rows = (
        select_depth_rows(frames, file_list, arguments.image_dir, arguments.depth_dir, arguments.on_bad_row)
        for frames, file_list in (
            (arguments.train_frames, arguments.train_list),
            (arguments.test_frames, arguments.test_list),
        )
    )
    assert train_rows is not None
    if test_rows is not None:
        refuse_shared_frames(train_rows, test_rows, "test frames")
    encoder = find_rgb_encoder(arguments.image_encoder)
    size = arguments.image_size or KB_CROP
    model = create_depth_model(encoder, size, arguments.seed, max_depth=arguments.max_depth)
    processor = create_image_processor(arguments, encoder.input)
    augmentation = DepthAugmentation(crop_size=arguments.crop_size or default_crop_size(arguments.image_size))
    dataset = DepthDataset(
        train_rows, processor, augmentation, arguments.seed, arguments.keep_frames, arguments.on_bad_row
    )
    inputs = [{"pixel_values": image[None]} for image in (dataset[0]["pixel_values"], dataset.pixel_values(0))]
    settings = prepare_model(model, arguments, inputs)
    test_set = None if test_rows is None else DepthDataset(test_rows, processor, on_bad_row=arguments.on_bad_row)
    print(f"image encoder: {encoder.description}", file=sys.stderr)
    return DepthTrainer(
        model,
        settings,
        train_dataset=dataset,
        eval_dataset=test_set,
        processing_class=processor,
        callbacks=list(callbacks),
        protocol=DepthProtocol.from_arguments(arguments),
        encoder_learning_rate=arguments.encoder_learning_rate,
        decoder_first=arguments.decoder_first,
    )


def finetune_depth(arguments: DepthArguments) -> Path:
    """Fine-tune as the arguments say, in as many processes as were launched, and evaluate.

    finetune_depth(DepthArguments(image_encoder="OUT", train_frames=["KITTI#train"], output_dir="DEPTH"))

    Returns:
        The output folder, which `pipeline("depth-estimation")` loads; see [`fine_tune`].

    Raises:
        SimIPUError: unusable arguments, data or checkpoint, or a loss that is no number.
        TrainingInterrupted: Ctrl-C or SIGTERM, after saving a checkpoint.
    """

    def record(result: dict[str, Any]) -> None:
        frames = arguments.test_frames or [str(arguments.test_list)]
        record_in_card(Path(arguments.output_dir), frames, result)
        print(format_metrics(result["metrics"]))

    return fine_tune(arguments, create_trainer(arguments), record)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: parse the flags and run; returns the exit code."""
    return exit_code_of(lambda: finetune_depth(parse_arguments(DepthArguments, argv, "simipu-hf finetune-depth")))


if __name__ == "__main__":
    sys.exit(main())
