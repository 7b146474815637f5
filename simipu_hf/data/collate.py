"""Samples of the two-view data set to one batch, and the batch to the model's inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor, pad_to_largest


@dataclass(frozen=True)
class TwoViewCollator:
    """Makes a batch of samples of `two_view_sample`: images of several sizes are padded to the largest.

    Args:
        pad_size_divisor: height and width of the batch are multiples of it.
    """

    pad_size_divisor: int = 32

    def __call__(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The batch; [`to_model_inputs`] makes the model's inputs of it.

        Args:
            samples: `image` (3, h, w) of any size; every other tensor has one shape in all samples.

        Returns:
            `images` (B, 3, H, W), zeros on the right and at the bottom; `image_sizes` (B, 2), height and width of
            each; and the other tensors stacked.
        """
        images = [sample["image"] for sample in samples]
        stacked = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0] if name != "image"}
        return {
            "images": pad_to_largest(images, self.pad_size_divisor),
            "image_sizes": torch.tensor([image.shape[-2:] for image in images]),
            **stacked,
        }


def to_model_inputs(
    batch: Mapping[str, torch.Tensor], image_processor: SimIPUImageProcessor
) -> dict[str, torch.Tensor]:
    """The inputs of [`SimIPUForPreTraining`], normalised on the device that the batch is on.

    Workers ship bytes instead, a quarter of the size: several of them are limited by what they send.

    Args:
        batch: of [`TwoViewCollator`].
        image_processor: of the processor that made its samples.

    Returns:
        The batch with `pixel_values` (B, 3, H, W) float32 in the place of `images`.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "images"}
    return {"pixel_values": image_processor.normalize_images(batch["images"], batch["image_sizes"]), **inputs}
