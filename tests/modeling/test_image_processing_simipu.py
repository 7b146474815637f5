"""Image processor: pixel values against Pillow and formulae written out here, crop, other modes, depth maps back."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.processing_simipu import SimIPUProcessor


def make_image(height=80):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, 250, 3), dtype=np.uint8))


def preset(name, image_size=None):
    return SimIPUProcessor.from_preset(name, image_size).image_processor


def test_recommended_pixel_values_are_pillows_resize_then_imagenet_normalisation():
    image = make_image().resize((1000, 300), Image.BICUBIC)
    pixel_values = preset("recommended", (96, 320))(image, return_tensors="pt")["pixel_values"][0]
    resized = np.asarray(image.resize((320, 96), Image.BILINEAR)).astype(np.float64).transpose(2, 0, 1) / 255
    mean, std = np.array([0.485, 0.456, 0.406])[:, None, None], np.array([0.229, 0.224, 0.225])[:, None, None]
    assert pixel_values.dtype == torch.float32
    assert np.abs(pixel_values.numpy() * std + mean - resized).max() < 1.01 / 255  # one level of rounding


def test_official_pixel_values_are_bgr_minus_mean_padded_with_zeros():
    batch = preset("official", (96, 320))(Image.new("RGB", (400, 100), (10, 20, 200)), return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 96, 320)
    assert batch["image_sizes"].tolist() == [[80, 320]]
    expected = torch.tensor([200 - 103.53, 20 - 116.28, 10 - 123.675])[:, None, None].expand(3, 80, 320)
    torch.testing.assert_close(batch["pixel_values"][0, :, :80], expected)
    assert (batch["pixel_values"][0, :, 80:] == 0).all()


@pytest.mark.parametrize(("divisor", "padded"), [(1, (50, 100)), (14, (56, 112)), (32, (64, 128)), (64, (64, 128))])
def test_padding_follows_the_divisor(divisor, padded):
    processor = SimIPUImageProcessor(size={"height": 50, "width": 100}, pad_size_divisor=divisor)
    assert processor(make_image(), return_tensors="pt")["pixel_values"].shape[-2:] == padded


def test_the_crop_is_the_bottom_centre_and_is_saved(tmp_path):
    crop, size = {"height": 40, "width": 151}, {"height": 20, "width": 75}
    SimIPUImageProcessor(crop_size=crop, size=size, pad_size_divisor=1).save_pretrained(tmp_path)
    processor = SimIPUImageProcessor.from_pretrained(tmp_path)
    assert processor.crop_window((80, 250)) == (40, 49, 40, 151)
    assert processor.output_size((80, 250)) == (20, 75)
    by_hand = SimIPUImageProcessor(size=size, pad_size_divisor=1)(make_image().crop((49, 40, 200, 80)))
    assert torch.equal(processor(make_image())["pixel_values"][0], by_hand["pixel_values"][0])
    moved = processor.pixel_transform((80, 250)) @ np.array([[49, 200 - 1], [40, 79], [1, 1]])
    np.testing.assert_allclose(moved[:2].T, [[0.5 * 75 / 151 - 0.5, -0.25], [74.5 - 0.5 * 75 / 151, 19.25]])
    with pytest.raises(ValueError, match=r"expected an image of at least 40 x 151 pixels .* found 39 x 250"):
        processor(make_image(height=39))
    assert processor(make_image(), crop_size={"height": 80, "width": 250})["image_sizes"].tolist() == [[20, 75]]
    assert processor.with_settings(crop_size=None).crop_window((80, 250)) == (0, 0, 80, 250)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(mode):
    batch = preset("recommended", (32, 64))(make_image().convert(mode), return_tensors="pt")
    assert sorted(batch) == ["image_sizes", "pixel_values"]
    assert batch["pixel_values"].shape == (1, 3, 32, 64)


def test_alpha_is_dropped_as_of_stored_rows():
    processor, clear = preset("recommended", (32, 64)), make_image()
    clear.putalpha(0)
    array = np.moveaxis(np.array(clear), -1, 0)
    for image in (clear, array, torch.from_numpy(array)):
        assert torch.equal(processor(image)["pixel_values"], processor(make_image())["pixel_values"])
    floats = array.astype(np.float32)
    assert torch.equal(processor(floats)["pixel_values"], processor(floats[:3])["pixel_values"])


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_images_go_to_the_device_that_is_asked_for(mode):
    image = preset("recommended", (32, 64)).process_image(
        make_image().convert(mode), do_convert_rgb=True, device=torch.device("meta")
    )
    assert (image.device.type, image.shape) == ("meta", (3, 80, 250))


@pytest.mark.parametrize("shape", [(6, 8, 3), (3, 6, 8), (6, 8, 4)])
def test_opencvs_order_can_be_turned_round(shape):
    turned = np.random.default_rng(0).integers(0, 256, shape, np.uint8)[::-1, ::-1, ::-1]
    found, expected = (SimIPUImageProcessor()(image)["pixel_values"] for image in (turned, turned.copy()))
    assert torch.equal(found, expected)


def test_16_bits_are_scaled_to_8_and_32_bits_are_refused(tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (80, 250)).astype(np.uint16)
    wide = gray * 257
    processor = preset("recommended", (80, 250))
    expected = processor(Image.fromarray(gray.astype(np.uint8)), return_tensors="pt")["pixel_values"]
    Image.fromarray(wide).save(tmp_path / "wide.png")
    with Image.open(tmp_path / "wide.png") as opened:
        assert opened.mode.startswith("I;16")
        images = [opened.copy(), str(tmp_path / "wide.png"), torch.from_numpy(wide[None]), np.stack([wide] * 3, -1)]
    for image in images:
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], expected)
        assert processor.load_image(image).dtype == torch.uint8
    for image, mode in ((Image.fromarray(gray.astype(np.int32)), "I"), (gray.astype(np.int32)[None], "int32")):
        with pytest.raises(ValueError, match=f"expected 8 or 16 bits a channel, found mode '{mode}'"):
            processor(image)


@pytest.mark.parametrize(
    "values",
    [
        np.array([0, 1.0]),
        np.array([-1, 1.0], np.float16),
        np.array([-2.1, 2.64], np.float32),
        np.array([0, 65535.0]),
        np.array([0, np.nan]),
        np.array([0, 1], bool),
        np.array([0, 4095], np.uint16),
    ],
    ids=lambda values: f"{values.dtype}-{values[-1]}",
)
def test_arrays_that_do_not_reach_from_0_to_255_are_refused(values):
    image = np.resize(values, (32, 64, 3))
    for name in ("recommended", "official"):
        with pytest.raises(ValueError, match=r"expected .* found"):
            preset(name, (32, 64))(image)


def test_floats_are_what_they_are_as_bytes():
    processor, image = preset("recommended", (80, 250)), np.asarray(make_image())
    expected = processor(image)["pixel_values"]
    torch.testing.assert_close(processor(image.astype(np.float64))["pixel_values"], expected)
    scaled = processor(image.astype(np.float32) / 255, do_rescale=False)["pixel_values"]
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-5)
    assert processor(np.zeros((80, 250, 3), np.float32))["pixel_values"][..., :80, :250].max() < 0  # black


def test_one_number_is_that_of_every_channel():
    image, half = make_image(), {"image_mean": 0.5, "image_std": 0.25}
    expected = SimIPUImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3)(image, return_tensors="pt")
    assert torch.equal(SimIPUImageProcessor(**half)(image, return_tensors="pt").pixel_values, expected.pixel_values)
    scaled = torch.rand(3, 40, 40)
    assert SimIPUImageProcessor(**half, do_rescale=False)(scaled, return_tensors="pt").pixel_values.isfinite().all()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="pad_size_divisor: expected at least 1, found 0"):
        SimIPUImageProcessor(pad_size_divisor=0)
    with pytest.raises(TypeError, match="no setting 'do_resise'"):
        SimIPUImageProcessor().with_settings(do_resise=False)
    with pytest.raises(TypeError, match="do_resise"):
        SimIPUProcessor.from_preset("recommended")(make_image(), do_resise=False)


@pytest.mark.parametrize("image", ["no/such/image.png", torch.zeros(7, 32, 32), b"none"])
def test_an_image_that_cannot_be_read_is_named(image):
    with pytest.raises(ValueError, match="image: cannot be read as RGB"):
        preset("recommended").load_image(image)


@pytest.mark.parametrize("resolution", [1, 2])
def test_depth_post_processing_removes_padding_and_restores_the_size(resolution):
    processor = preset("official", (96, 320))
    images = [Image.new("RGB", (400, 100)), Image.new("RGB", (200, 90))]
    depth = torch.full((2, 96 // resolution, 320 // resolution), 1000.0)  # padding must not leak in
    for index, (height, width) in enumerate(processor(images)["image_sizes"].tolist()):
        ramp = (torch.arange(width // resolution) + 0.5) * resolution / width
        depth[index, : height // resolution, : width // resolution] = ramp
    outputs = SimpleNamespace(predicted_depth=depth)
    results = processor.post_process_depth_estimation(outputs, [(100, 400), (90, 200)])
    for result, (height, width) in zip(results, [(100, 400), (90, 200)], strict=True):
        expected = ((torch.arange(width) + 0.5) / width).expand(height, width)
        assert (result["predicted_depth"] - expected).abs().max() < 0.01
    assert torch.equal(processor.post_process_depth_estimation(outputs)[0]["predicted_depth"], depth[0])
    with pytest.raises(ValueError, match="one target size per depth map"):
        processor.post_process_depth_estimation(outputs, [(1, 1)])


def test_depth_of_a_crop_comes_back_in_its_place():
    processor = SimIPUImageProcessor(crop_size={"height": 40, "width": 120}, size={"height": 20, "width": 60})
    depth = torch.rand(1, 32, 64) + 1
    outputs = SimpleNamespace(predicted_depth=depth)
    placed = processor.post_process_depth_estimation(outputs, [(70, 201)])[0]["predicted_depth"]
    window = torch.nn.functional.interpolate(depth[None, :, :20, :60], size=(40, 120), mode="bilinear")[0, 0]
    assert placed.shape == (70, 201)
    assert torch.equal(placed[30:, 40:160], window)
    assert placed.count_nonzero() == window.numel()
