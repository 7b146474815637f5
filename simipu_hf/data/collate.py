"""Samples of the two-view data set to one batch."""

from collections.abc import Sequence

import torch

from simipu_hf.modeling.processing_simipu import pad_to_largest


def collate_two_views(
    samples: Sequence[dict[str, torch.Tensor]], pad_size_divisor: int = 32
) -> dict[str, torch.Tensor]:
    """Stack the samples of `two_view_sample`; images of several sizes are padded to the batch's largest.

    Args:
        samples: dictionaries with `pixel_values` (3, h, w) of any size; every other tensor has one shape in all.
        pad_size_divisor: height and width of the batch are multiples of it.

    Returns:
        `pixel_values` (B, 3, H, W), zeros on the right and at the bottom, and the other tensors stacked.
    """
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0] if name != "pixel_values"}
    batch["pixel_values"] = pad_to_largest([sample["pixel_values"] for sample in samples], pad_size_divisor)
    return batch
