"""Collation: padding to the batch's largest image, zeros right and below, everything else stacked."""

import torch

from simipu_hf.data.collate import collate_two_views


def make_sample(height, width, value):
    return {
        "pixel_values": torch.full((3, height, width), float(value)),
        "image_sizes": torch.tensor([height, width]),
        "points": torch.full((5, 4), float(value)),
        "points_aug": torch.full((5, 4), -float(value)),
        "lidar_to_aug": torch.eye(4) * value,
        "lidar_to_pixel": torch.ones(3, 4) * value,
    }


def test_images_of_several_sizes_are_padded_to_the_largest_multiple_of_32():
    samples = [make_sample(40, 90, 1), make_sample(33, 128, 2), make_sample(64, 20, 3)]
    batch = collate_two_views(samples)
    assert batch["pixel_values"].shape == (3, 3, 64, 128)
    assert batch["image_sizes"].tolist() == [[40, 90], [33, 128], [64, 20]]
    for image, sample, (height, width) in zip(batch["pixel_values"], samples, batch["image_sizes"], strict=True):
        assert torch.equal(image[:, :height, :width], sample["pixel_values"])
        assert image.sum() == sample["pixel_values"].sum()


def test_the_rest_is_stacked_with_the_contracts_shapes():
    batch = collate_two_views([make_sample(32, 64, value) for value in (1, 2)])
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    assert shapes == {
        "pixel_values": (2, 3, 32, 64),
        "image_sizes": (2, 2),
        "points": (2, 5, 4),
        "points_aug": (2, 5, 4),
        "lidar_to_aug": (2, 4, 4),
        "lidar_to_pixel": (2, 3, 4),
    }
    assert batch["points"][1].unique().item() == 2
    assert collate_two_views([make_sample(32, 64, 1)], pad_size_divisor=50)["pixel_values"].shape == (1, 3, 50, 100)
