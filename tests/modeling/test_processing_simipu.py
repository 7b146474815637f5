"""Processor: rows to batches, errors, saving."""

import numpy as np
import pytest
import torch
from camera import LIDAR_TO_CAMERA, PROJECTION, project, project_aligned
from PIL import Image

from simipu_hf.modeling.processing_simipu import SimIPUProcessor


def make_row(width=250, height=80, count=3000, seed=0):
    rng = np.random.default_rng(seed)
    points = np.column_stack([rng.uniform((-10, -45, -4), (80, 45, 2), (count, 3)), np.linspace(0, 1, count)])
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return {
        "images": image,
        "points": points.astype("<f4"),
        "camera_projection": PROJECTION,
        "lidar_to_camera": LIDAR_TO_CAMERA,
    }


@pytest.mark.parametrize(
    ("preset", "image_size", "content", "padded"),
    [
        ("recommended", None, (384, 1248), (384, 1248)),
        ("recommended", (50, 100), (50, 100), (64, 128)),
        ("official", None, (384, 1200), (384, 1216)),  # 80 x 250 within 384 x 1280
        ("official", (96, 200), (64, 200), (64, 224)),
    ],
)
def test_lidar_to_pixel_is_the_projection_then_the_resize(preset, image_size, content, padded):
    row = make_row()
    batch = SimIPUProcessor.from_preset(preset, image_size, num_points=256)(**row)
    assert batch["pixel_values"].shape == (1, 3, *padded)
    assert batch["image_sizes"].tolist() == [list(content)]
    assert batch["points"].shape == batch["points_aug"].shape == (1, 256, 4)
    assert torch.equal(batch["lidar_to_aug"], torch.eye(4)[None])
    points = batch["points"][0]
    recommended = preset == "recommended"
    pixels, depth = (
        project_aligned(PROJECTION, points) if recommended else project(PROJECTION @ LIDAR_TO_CAMERA, points)
    )
    scale = np.array([content[1] / 250, content[0] / 80])
    expected = (pixels + 0.5) * scale - 0.5 if recommended else pixels * scale
    found, found_depth = project(batch["lidar_to_pixel"][0], points)
    assert np.abs(found - expected).max() < 1e-2
    np.testing.assert_allclose(found_depth, depth, rtol=1e-5)


def test_many_rows_equal_single_rows_and_are_padded_to_the_largest():
    processor = SimIPUProcessor.from_preset("official", (96, 320), num_points=200)
    rows = [make_row(), make_row(width=200, height=90, seed=1)]
    batch = processor(**{name: [row[name] for row in rows] for name in rows[0]})
    assert batch["pixel_values"].shape == (2, 3, 96, 320)
    for index, row in enumerate(rows):
        single = processor(**row)
        height, width = single["image_sizes"][0].tolist()
        assert batch["image_sizes"][index].tolist() == [height, width]
        content = single["pixel_values"][0, :, :height, :width]
        assert torch.equal(batch["pixel_values"][index, :, :height, :width], content)
        assert not batch["pixel_values"][index, :, height:].any()
        assert not batch["pixel_values"][index, :, :, width:].any()
        for name in ("points", "points_aug", "lidar_to_aug", "lidar_to_pixel"):
            assert torch.equal(batch[name][index], single[name][0])


def test_points_may_be_bytes_arrays_or_tensors_and_drawing_follows_the_seed():
    processor = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=100)
    row = make_row()
    reference = processor(**row)["points"]
    for points in (row["points"].tobytes(), torch.from_numpy(row["points"]), row["points"].astype(np.float64)):
        assert torch.equal(processor(**{**row, "points": points})["points"], reference)
    assert not torch.equal(processor(**row, seed=1)["points"], reference)
    assert torch.equal(processor(**row, seed=1)["points"], processor(**row, seed=1)["points"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": b"12345678"}, "points: expected the bytes of whole points"),
        ({"points": np.tile([1, 39, 0, 0.5], (9, 1))}, "no usable point: none of 9 points .* 9 are in front"),
        ({"camera_projection": np.eye(3)}, "camera_projection: expected shape"),
        ({"images": __file__}, "image: cannot be read as RGB"),
    ],
)
def test_bad_rows_are_named(change, message):
    good, bad = make_row(), make_row() | change
    processor = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=16)
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        processor(**{name: [good[name], bad[name]] for name in good})
    with pytest.raises(ValueError, match=r"^000007: "):
        processor(**bad, frame_id="000007")
    with pytest.raises(ValueError, match="row 0: crop_size: expected an image of at least 200 x 100"):
        processor(**good, crop_size={"height": 200, "width": 100})


def test_geometry_keeps_its_precision_where_a_batch_is_converted():
    processor = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=16)
    batch, half = processor(**make_row()), processor(**make_row()).to(torch.bfloat16)
    assert half["pixel_values"].dtype == torch.bfloat16
    for name in ("points", "points_aug", "lidar_to_aug", "lidar_to_pixel"):
        assert torch.equal(half[name], batch[name])


def test_an_image_may_be_the_bytes_of_a_file(tmp_path):
    processor, row = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=16), make_row()
    Image.fromarray(np.asarray(row["images"])).save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    assert torch.equal(processor(**row | {"images": data})["pixel_values"], processor(**row)["pixel_values"])
    assert torch.equal(processor(data)["pixel_values"], processor(**row)["pixel_values"])


def test_turned_images_are_refused_with_points(tmp_path):
    processor, row = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=16), make_row()
    exif = Image.Exif()
    exif[0x112] = 3
    Image.new("RGB", (250, 80)).save(tmp_path / "turned.png", exif=exif)
    for image in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        with pytest.raises(ValueError, match="row 0: EXIF orientation 3"):
            processor(**row | {"images": image})
    processor(Image.open(tmp_path / "turned.png"))


def test_settings_may_change_for_a_call_and_geometry_follows():
    processor, row = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=50), make_row()
    changed = {"crop_size": {"height": 40, "width": 120}, "size": {"height": 64, "width": 96}}
    batch = processor(**row, **changed, half_pixel_centers=False)
    assert batch["pixel_values"].shape[-2:] == (64, 96)
    pixels, _ = project_aligned(PROJECTION, batch["points"][0])
    expected = (pixels - (65, 40)) * (96 / 120, 64 / 40)
    assert np.abs(project(batch["lidar_to_pixel"][0], batch["points"][0])[0] - expected).max() < 1e-2
    assert torch.equal(processor(**row)["pixel_values"], processor.image_processor(row["images"])["pixel_values"])


def test_bad_calls_are_refused():
    row = make_row()
    processor = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=16)
    with pytest.raises(ValueError, match="points need camera_projection"):
        processor(row["images"], row["points"])
    with pytest.raises(ValueError, match=r"camera_projection: expected one per image \(2\), found 3"):
        processor([row["images"]] * 2, [row["points"]] * 2, PROJECTION, LIDAR_TO_CAMERA)
    with pytest.raises(ValueError, match="unknown preset 'best': choose from recommended, official"):
        SimIPUProcessor.from_preset("best")
    with pytest.raises(ValueError, match="image_size"):
        SimIPUProcessor.from_preset("official", (384,))


def test_presets_and_the_range_of_depths():
    recommended = SimIPUProcessor.from_preset(depth_range=(0.5, 200)).feature_extractor
    assert (recommended.frame, recommended.depth_range, recommended.point_cloud_range) == ("camera", [0.5, 200], None)
    assert SimIPUProcessor.from_preset("official").feature_extractor.depth_range is None
