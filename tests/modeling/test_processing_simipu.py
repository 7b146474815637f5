"""Processor: pixel values and geometry against formulae written out here, errors, saving and remote code."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from simipu_hf.modeling.feature_extraction_simipu import SimIPUFeatureExtractor
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

CAMERA_PROJECTION = np.array([[180.0, 0, 125.5, 11.0], [0, 175.0, 39.5, -3.0], [0, 0, 1, 0.002]])
# x forward, y left, z up -> x right, y down, z forward, slightly tilted and shifted
LIDAR_TO_CAMERA = np.array(
    [[0.01, -0.99995, 0, 0.02], [-0.02, 0, -0.9998, -0.08], [0.9998, 0.01, -0.02, -0.27], [0, 0, 0, 1]]
)


def make_row(width=250, height=80, count=3000, seed=0):
    rng = np.random.default_rng(seed)
    points = np.column_stack([rng.uniform((-10, -45, -4), (80, 45, 2), (count, 3)), np.linspace(0, 1, count)])
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return {
        "images": image,
        "points": points.astype("<f4"),
        "camera_projection": CAMERA_PROJECTION,
        "lidar_to_camera": LIDAR_TO_CAMERA,
    }


def project(matrix, points):
    homogeneous = (
        np.asarray(matrix, np.float64) @ np.column_stack([points[:, :3].astype(np.float64), np.ones(len(points))]).T
    )
    return (homogeneous[:2] / homogeneous[2]).T, homogeneous[2]


@pytest.mark.parametrize(
    ("preset", "image_size", "content", "padded"),
    [
        ("recommended", None, (384, 1248), (384, 1248)),
        ("recommended", (96, 320), (96, 320), (96, 320)),
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
    points = batch["points"][0].numpy()
    pixels, depth = project(CAMERA_PROJECTION @ LIDAR_TO_CAMERA, points)
    scale = np.array([content[1] / 250, content[0] / 80])
    expected = (pixels + 0.5) * scale - 0.5 if preset == "recommended" else pixels * scale
    found, found_depth = project(batch["lidar_to_pixel"][0], points)
    assert np.abs(found - expected).max() < 1e-2
    np.testing.assert_allclose(found_depth, depth, rtol=1e-5)


def test_recommended_pixel_values_are_pillows_resize_then_imagenet_normalisation():
    image = make_row()["images"].resize((1000, 300), Image.BICUBIC)
    pixel_values = SimIPUProcessor.from_preset("recommended", (96, 320))(image)["pixel_values"][0]
    resized = np.asarray(image.resize((320, 96), Image.BILINEAR)).astype(np.float64).transpose(2, 0, 1) / 255
    mean, std = np.array([0.485, 0.456, 0.406])[:, None, None], np.array([0.229, 0.224, 0.225])[:, None, None]
    assert pixel_values.dtype == torch.float32
    assert np.abs(pixel_values.numpy() * std + mean - resized).max() < 1.01 / 255  # one level of rounding


def test_official_pixel_values_are_bgr_minus_mean_padded_with_zeros():
    image = Image.new("RGB", (400, 100), (10, 20, 200))
    batch = SimIPUProcessor.from_preset("official", (96, 320))(image)
    assert batch["pixel_values"].shape == (1, 3, 96, 320)
    assert batch["image_sizes"].tolist() == [[80, 320]]
    expected = torch.tensor([200 - 103.53, 20 - 116.28, 10 - 123.675])[:, None, None].expand(3, 80, 320)
    torch.testing.assert_close(batch["pixel_values"][0, :, :80], expected)
    assert (batch["pixel_values"][0, :, 80:] == 0).all()


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


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_only_and_other_modes_become_rgb(mode):
    batch = SimIPUProcessor.from_preset("recommended", (32, 64))(make_row()["images"].convert(mode))
    assert sorted(batch) == ["image_sizes", "pixel_values"]
    assert batch["pixel_values"].shape == (1, 3, 32, 64)


def test_filter_keeps_what_is_strictly_in_range_and_seen():
    row = make_row(count=20000)
    points = row["points"]
    points[:3, :3] = [[0.0, 0, -1], [70.4, 0, -1], [20, 0, 1.0]]  # on the bounds
    pixels, depth = project(CAMERA_PROJECTION @ LIDAR_TO_CAMERA, points)
    seen = (depth > 0) & (pixels >= 0).all(1) & (pixels[:, 0] <= 249) & (pixels[:, 1] <= 79)
    low, high = np.array([0, -40, -3], np.float32), np.array([70.4, 40, 1], np.float32)
    inside = ((points[:, :3] > low) & (points[:, :3] < high)).all(1)
    processor = SimIPUFeatureExtractor()
    lidar_to_image = CAMERA_PROJECTION @ LIDAR_TO_CAMERA
    np.testing.assert_array_equal(processor.filter(points, lidar_to_image, (80, 250)), points[seen & inside])
    np.testing.assert_array_equal(processor.filter(points), points[inside])
    everything = SimIPUFeatureExtractor(point_cloud_range=None, do_filter_field_of_view=False)
    assert everything.filter(points, lidar_to_image, (80, 250)) is points


def test_drawing_is_without_replacement_where_there_are_enough_points():
    points = make_row(count=50)["points"]
    for num_points, distinct in ((50, 50), (20, 20), (500, 50)):
        drawn = SimIPUFeatureExtractor(num_points).draw(points, np.random.default_rng(0))
        assert drawn.shape == (num_points, 4)
        assert len(np.unique(drawn[:, 3])) == distinct
        assert np.isin(drawn, points).all()


def test_point_cloud_processor_alone():
    scans = [make_row(seed=0)["points"], make_row(seed=1)["points"]]
    processor = SimIPUFeatureExtractor(num_points=64)
    batch = processor([scan.tobytes() for scan in scans])
    assert batch["points"].shape == (2, 64, 4)
    assert torch.equal(batch["points"][1:], processor(scans[1])["points"])


def with_nan(points):
    points = points.copy()
    points[5, 2] = np.nan
    return points


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {"points": row["points"][:, :3]}, r"row 1: points: expected shape \(N, 4\).*\(3000, 3\)"),
        (
            lambda row: {"points": row["points"].tobytes()[:-4]},
            "row 1: points: expected the bytes of whole points, 16 .* 47996 bytes",
        ),
        (
            lambda row: {"points": with_nan(row["points"])},
            "row 1: points: expected finite values, found 1 of 3000 .* at index 5",
        ),
        (
            lambda row: {"points": np.tile([1, 39, 0, 0.5], (9, 1))},
            "row 1: no usable point: .* none of these",
        ),
        (lambda row: {"points": row["points"] + 1000}, "row 1: no usable point: none of 3000"),
        (lambda row: {"points": b""}, "row 1: no usable point"),
        (lambda row: {"camera_projection": np.eye(3)}, r"row 1: camera_projection: expected shape \(3, 4\)"),
        (lambda row: {"lidar_to_camera": np.eye(4)[:3]}, r"row 1: lidar_to_camera: expected shape \(4, 4\)"),
        (lambda row: {"lidar_to_camera": LIDAR_TO_CAMERA.T}, "row 1: lidar_to_camera: expected the last row 0 0 0 1"),
        (lambda row: {"camera_projection": CAMERA_PROJECTION + np.inf}, "row 1: camera_projection: expected finite"),
        (lambda row: {"images": "no/such/image.png"}, "row 1: image: cannot be read as RGB"),
        (lambda row: {"images": torch.zeros(7, 32, 32)}, "row 1: image: "),
    ],
)
def test_bad_rows_are_named(change, message):
    good, bad = make_row(), make_row()
    bad.update(change(bad))
    processor = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=16)
    with pytest.raises(ValueError, match=message):
        processor(**{name: [good[name], bad[name]] for name in good})
    with pytest.raises(ValueError, match=r"^000007: "):
        processor(**bad, frame_id="000007")


def test_bad_calls_are_refused():
    row = make_row()
    processor = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=16)
    with pytest.raises(ValueError, match="points need camera_projection"):
        processor(row["images"], row["points"])
    with pytest.raises(ValueError, match=r"camera_projection: expected one per image \(2\), found 3"):
        processor([row["images"]] * 2, [row["points"]] * 2, CAMERA_PROJECTION, LIDAR_TO_CAMERA)
    with pytest.raises(ValueError, match="unknown preset 'best': choose from recommended, official"):
        SimIPUProcessor.from_preset("best")
    with pytest.raises(ValueError, match="image_size"):
        SimIPUProcessor.from_preset("official", (384,))
    with pytest.raises(ValueError, match="num_points"):
        SimIPUFeatureExtractor(num_points=0)
    with pytest.raises(ValueError, match="point_cloud_range"):
        SimIPUFeatureExtractor(point_cloud_range=[0, 0, 0, 1, 1, 0])


@pytest.mark.parametrize("resolution", [1, 2])
def test_depth_post_processing_removes_padding_and_restores_the_size(resolution):
    processor = SimIPUProcessor.from_preset("official", (96, 320)).image_processor
    images = [Image.new("RGB", (400, 100)), Image.new("RGB", (200, 90))]
    inputs = processor(images, return_tensors="pt")
    depth = torch.full((2, 96 // resolution, 320 // resolution), 1000.0)  # padding must not leak in
    for index, (height, width) in enumerate(inputs["image_sizes"].tolist()):
        ramp = (torch.arange(width // resolution) + 0.5) * resolution / width
        depth[index, : height // resolution, : width // resolution] = ramp
    results = processor.post_process_depth_estimation(SimpleNamespace(predicted_depth=depth), [(100, 400), (90, 200)])
    for result, (height, width) in zip(results, [(100, 400), (90, 200)], strict=True):
        assert result["predicted_depth"].shape == (height, width)
        expected = ((torch.arange(width) + 0.5) / width).expand(height, width)
        assert (result["predicted_depth"] - expected).abs().max() < 0.01
    untouched = processor.post_process_depth_estimation(SimpleNamespace(predicted_depth=depth))
    assert torch.equal(untouched[0]["predicted_depth"], depth[0])
    with pytest.raises(ValueError, match="one target size per depth map"):
        processor.post_process_depth_estimation(SimpleNamespace(predicted_depth=depth), [(1, 1)])


@pytest.mark.parametrize("preset", ["recommended", "official"])
def test_save_and_load(tmp_path, preset):
    processor = SimIPUProcessor.from_preset(preset, (64, 160), num_points=77)
    processor.save_pretrained(tmp_path)
    row = make_row()
    expected = processor(**row)
    loaded_image = SimIPUImageProcessor.from_pretrained(tmp_path)
    loaded = SimIPUProcessor(loaded_image, SimIPUFeatureExtractor.from_pretrained(tmp_path))
    found = loaded(**row)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


WITHOUT_PACKAGE = """
import sys
sys.modules["simipu_hf"] = None  # importing it fails
import numpy as np
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

folder, out = sys.argv[1:]
classes = [AutoProcessor, AutoImageProcessor, AutoFeatureExtractor]
processor, image_processor, feature_extractor = (c.from_pretrained(folder, trust_remote_code=True) for c in classes)
assert type(image_processor).__name__ == "SimIPUImageProcessor", image_processor
assert type(feature_extractor).__name__ == "SimIPUFeatureExtractor", feature_extractor
assert hasattr(image_processor, "post_process_depth_estimation")
row = dict(np.load(folder + "/row.npz"))
batch = processor(Image.fromarray(row.pop("image")), **row)
np.savez(out, **{name: tensor.numpy() for name, tensor in batch.items()})
processor.save_pretrained(folder + "/again")
AutoProcessor.from_pretrained(folder + "/again", trust_remote_code=True)
"""


def test_loads_as_remote_code_without_the_package(tmp_path, monkeypatch):
    for processor_class, auto_class in (
        (SimIPUProcessor, "AutoProcessor"),
        (SimIPUImageProcessor, "AutoImageProcessor"),
        (SimIPUFeatureExtractor, "AutoFeatureExtractor"),
    ):
        monkeypatch.setattr(processor_class, "_auto_class", auto_class)
    processor = SimIPUProcessor.from_preset("official", (64, 160), num_points=77)
    processor.save_pretrained(tmp_path)
    row = make_row()
    expected = processor(**row)
    np.savez(tmp_path / "row.npz", image=np.asarray(row.pop("images")), **row)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120)
    found = np.load(tmp_path / "out.npz")
    assert sorted(found) == sorted(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name].numpy())


def test_real_frames_project_as_the_calibration_says(kitti_mini):
    processor = SimIPUProcessor.from_preset("recommended", num_points=16384)
    folder = kitti_mini / "testing"
    for calib in sorted((folder / "calib").glob("*.txt"))[:3]:
        lines = dict(line.split(":") for line in calib.read_text(encoding="utf-8").splitlines() if ":" in line)
        values = {name: np.array(text.split(), np.float64) for name, text in lines.items()}
        rectify, extrinsic = np.eye(4), np.eye(4)
        rectify[:3, :3] = values["R0_rect"].reshape(3, 3)
        extrinsic[:3] = values["Tr_velo_to_cam"].reshape(3, 4)
        image = Image.open(folder / "image_2" / f"{calib.stem}.png")
        projection = values["P2"].reshape(3, 4)
        scan = (folder / "velodyne" / f"{calib.stem}.bin").read_bytes()
        batch = processor(image, scan, projection, rectify @ extrinsic)
        points = batch["points"][0].numpy()
        pixels, depth = project(projection @ rectify @ extrinsic, points)
        assert depth.min() > 0
        assert pixels.min() >= -1e-6
        assert (pixels <= np.array(image.size) - 1 + 1e-6).all()
        found, _ = project(batch["lidar_to_pixel"][0], points)
        expected = (pixels + 0.5) * np.array([1248, 384]) / np.array(image.size) - 0.5
        assert np.abs(found - expected).max() < 1e-2
