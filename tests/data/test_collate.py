"""Collation: padding to the batch's largest image, everything else stacked; then the processor's normalisation."""

import pytest
import torch

from simipu_hf.data.collate import TwoViewCollator, to_model_inputs
from simipu_hf.modeling.image_processing_simipu import IMAGE_PRESETS, SimIPUImageProcessor


def make_sample(height, width, value):
    generator = torch.Generator().manual_seed(value)
    return {
        "image": torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8),
        "points": torch.full((5, 4), float(value)),
        "points_aug": torch.full((5, 4), -float(value)),
        "lidar_to_aug": torch.eye(4) * value,
        "lidar_to_pixel": torch.ones(3, 4) * value,
    }


@pytest.mark.parametrize("preset", IMAGE_PRESETS)
def test_images_of_several_sizes_are_padded_to_the_largest_multiple_of_32_and_normalised(preset):
    processor = SimIPUImageProcessor(**IMAGE_PRESETS[preset])
    samples = [make_sample(40, 90, 1), make_sample(33, 128, 2), make_sample(64, 20, 3)]
    batch = TwoViewCollator(processor.pad_size_divisor)(samples)
    assert batch["images"].shape == (3, 3, 64, 128)
    assert batch["images"].dtype == torch.uint8
    assert batch["image_sizes"].tolist() == [[40, 90], [33, 128], [64, 20]]
    inputs = to_model_inputs(batch, processor)
    assert sorted(inputs) == sorted({*batch, "pixel_values"} - {"images"})
    assert inputs["pixel_values"].dtype == torch.float32
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    for pixels, sample, (height, width) in zip(inputs["pixel_values"], samples, batch["image_sizes"], strict=True):
        levels = sample["image"].double() / (255 if processor.do_rescale else 1)
        expected = ((levels.flip(0) if preset == "official" else levels) - mean) / std
        torch.testing.assert_close(pixels[:, :height, :width].double(), expected, rtol=1e-6, atol=1e-6)
        assert not pixels[:, height:].any()
        assert not pixels[:, :, width:].any()


@pytest.mark.parametrize("preset", IMAGE_PRESETS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_model_inputs_are_those_of_the_processor_alone(preset, channels_last):
    processor = SimIPUImageProcessor(**IMAGE_PRESETS[preset])
    samples = [make_sample(40, 90, 1), make_sample(33, 128, 2)]
    if channels_last:  # in memory, as Pillow decodes
        samples = [{**s, "image": s["image"].permute(1, 2, 0).contiguous().permute(2, 0, 1)} for s in samples]
    batch = TwoViewCollator()(samples)
    before = batch["images"].clone()
    inputs = to_model_inputs(batch, processor)
    assert torch.equal(batch["images"], before)
    assert inputs["pixel_values"].is_contiguous()
    expected = processor([sample["image"] for sample in samples], do_resize=False, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["image_sizes"], expected["image_sizes"])


def test_images_of_bytes_and_of_floats_share_a_batch():
    samples = [make_sample(32, 64, 1), make_sample(32, 64, 2)]
    samples[1]["image"] = samples[1]["image"] + 0.5
    together = TwoViewCollator()(samples)["images"]
    assert all(torch.equal(pixels, sample["image"]) for pixels, sample in zip(together, samples, strict=True))


def test_the_rest_is_stacked_with_the_contracts_shapes():
    batch = TwoViewCollator()([make_sample(32, 64, value) for value in (1, 2)])
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    assert shapes == {
        "images": (2, 3, 32, 64),
        "image_sizes": (2, 2),
        "points": (2, 5, 4),
        "points_aug": (2, 5, 4),
        "lidar_to_aug": (2, 4, 4),
        "lidar_to_pixel": (2, 3, 4),
    }
    assert batch["points"][1].unique().item() == 2
    assert TwoViewCollator(50)([make_sample(32, 64, 1)])["images"].shape == (1, 3, 50, 100)
