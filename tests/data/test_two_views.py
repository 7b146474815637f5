"""Two views of a row and their batch: geometry against the image itself and written-out formulae; purity."""

import io
import math

import datasets
import numpy as np
import pytest
import torch
from camera import LIDAR_TO_CAMERA, project, project_aligned
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation
from transformers.image_utils import SizeDict

from simipu_hf.data.rows import ROW_FEATURES, to_row
from simipu_hf.data.two_views import (
    TwoViewAugmentation,
    TwoViewCollator,
    TwoViewDataset,
    to_model_inputs,
    two_view_sample,
    view_transform,
)
from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

WIDTH, HEIGHT = 250, 120
CAMERA_PROJECTION = np.array([[150.0, 0, 124.5, 11.0], [0, 145.0, 59.5, -3.0], [0, 0, 1, 0.002]])


def make_row(seed=0, count=3000):
    """Every point has its own reflectance, which names it in both views."""
    rng = np.random.default_rng(seed)
    points = np.column_stack([rng.uniform((5, -12, -2.9), (60, 12, 0.9), (count, 3)), np.arange(count) / count])
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return to_row(f"{seed:06d}", image, points, CAMERA_PROJECTION, LIDAR_TO_CAMERA)


def make_sample(row, processor, augmentation, seed=0, epoch=0, index=0):
    return two_view_sample(row, processor, augmentation, seed=seed, epoch=epoch, index=index)


AUGMENTATIONS = {
    "plain": {"flip_probability": 0.0},
    "flip": {"flip_probability": 1.0},
    "zoom": {"flip_probability": 0.0, "random_zoom": (1.2, 2.0)},
    "flip and zoom": {"flip_probability": 1.0, "random_zoom": (1.2, 2.0)},
    "flip and random size": {"flip_probability": 1.0, "random_resize": ((100, 48), (500, 240))},
    "everything": {
        "flip_probability": 1.0,
        "random_resize": ((100, 48), (500, 240)),
        "random_zoom": (1.0, 2.0),
        "translation_std": 1.0,
    },
}


EVERYTHING = TwoViewAugmentation(**AUGMENTATIONS["everything"])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_lidar_to_pixel_agrees_with_the_image_itself(name):
    """Red and green hold x and y of the source, so the processed image says where each of its pixels came from."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    # an array of floats, so that nothing is rounded to levels
    row = {**make_row(), "image": np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.float32)}
    processor = SimIPUProcessor.from_preset("recommended", (96, 320), num_points=500)
    processor.image_processor.crop_size = SizeDict(height=100, width=231)
    for index in range(4):
        sample = make_sample(row, processor, TwoViewAugmentation(**AUGMENTATIONS[name]), index=index)
        height, width = sample["image"].shape[-2:]
        source = sample["image"].numpy()[:2, 4:-4, 4:-4].reshape(2, -1)
        v, u = (grid.ravel() for grid in np.mgrid[4 : height - 4, 4 : width - 4])
        # least squares: pixel of the processed image as an affine function of the source pixel
        columns = np.column_stack([*source, np.ones(source.shape[1])])
        fitted = np.linalg.lstsq(columns, np.column_stack([u, v]), rcond=None)[0]
        original = project_aligned(CAMERA_PROJECTION, sample["points"])[0]
        expected = np.column_stack([original, np.ones(len(original))]) @ fitted
        assert np.abs(project(sample["lidar_to_pixel"], sample["points"])[0] - expected).max() < 1e-2


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("random_resize", [None, ((100, 48), (500, 240))])
def test_official_lidar_to_pixel_equals_the_formula(mirrored, random_resize):
    processor = SimIPUProcessor.from_preset("official", (96, 160), num_points=500)
    augmentation = TwoViewAugmentation(flip_probability=float(mirrored), random_resize=random_resize)
    for index in range(5):
        sample = make_sample(make_row(), processor, augmentation, index=index)
        height, width = sample["image"].shape[-2:]
        u, v = project(CAMERA_PROJECTION @ LIDAR_TO_CAMERA, sample["points"])[0].T
        u, v = u * width / WIDTH, v * height / HEIGHT
        u = width - u if mirrored else u
        assert np.abs(project(sample["lidar_to_pixel"], sample["points"])[0] - np.column_stack([u, v])).max() < 1e-2


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_both_views_hold_the_same_physical_points_in_separate_orders(name):
    processor = SimIPUProcessor.from_preset("official", (32, 64), num_points=400)
    row = make_row()
    sample = make_sample(row, processor, TwoViewAugmentation(**AUGMENTATIONS[name]))
    points, moved = sample["points"].numpy(), sample["points_aug"].numpy()
    assert len(np.unique(points[:, 3])) == 400
    scan = np.frombuffer(row["points"], "<f4").reshape(-1, 4)
    np.testing.assert_array_equal(points, scan[np.round(points[:, 3] * len(scan)).astype(int)])  # not moved at all
    assert not np.array_equal(points[:, 3], moved[:, 3])
    assert (np.diff(points[:, 3]) < 0).any()
    first, second = np.argsort(points[:, 3]), np.argsort(moved[:, 3])
    np.testing.assert_array_equal(points[first, 3], moved[second, 3])
    matrix = sample["lidar_to_aug"].numpy().astype(np.float64)
    np.testing.assert_array_equal(matrix[3], [0, 0, 0, 1])
    expected = np.column_stack([points[first, :3], np.ones(400)]) @ matrix.T
    assert np.abs(moved[second, :3] - expected[:, :3]).max() < 1e-4


unit = st.floats(-1, 1, allow_subnormal=False)


@settings(deadline=None, max_examples=25)
@given(axis=st.tuples(unit, unit, unit), angle=st.floats(0, math.pi), shift=st.tuples(*[st.floats(-10, 10)] * 3))
def test_the_sample_does_not_know_the_rig(axis, angle, shift):
    """Turning and shifting the LiDAR's frame, extrinsics with it, changes nothing that training sees."""
    motion = np.eye(4)
    length = max(np.linalg.norm(axis), 1e-6)
    motion[:3, :3] = Rotation.from_rotvec(np.array(axis) / length * angle).as_matrix()
    motion[:3, 3] = shift
    row = make_row(count=600)
    scan = np.frombuffer(row["points"], "<f4").reshape(-1, 4)
    pixels = project(CAMERA_PROJECTION @ LIDAR_TO_CAMERA, scan)[0]
    scan = scan[(np.minimum(pixels, (WIDTH, HEIGHT) - pixels) > 2).all(axis=1)]  # the border is as exact as float32
    moved = np.column_stack([scan[:, :3] @ motion[:3, :3].T + motion[:3, 3], scan[:, 3]])
    extrinsics = LIDAR_TO_CAMERA @ np.linalg.inv(motion)
    processor = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=200)
    first, second = (
        make_sample(
            {**row, "points": points.astype("<f4").tobytes(), "lidar_to_camera": matrix}, processor, EVERYTHING
        )
        for points, matrix in ((scan, LIDAR_TO_CAMERA), (moved, extrinsics))
    )
    assert torch.equal(first["image"], second["image"])
    for name in ("points", "points_aug", "lidar_to_aug", "lidar_to_pixel"):
        assert (first[name] - second[name]).abs().max() <= 1e-5, name
    pixels, others = (project(sample["lidar_to_pixel"], sample["points"])[0] for sample in (first, second))
    assert np.abs(pixels - others).max() <= 1e-4


@pytest.mark.parametrize("mirrored", [False, True])
def test_view_transform_is_the_official_formula_on_row_vectors(mirrored):
    rng = np.random.default_rng(0)
    p, c, t = rng.normal(size=(50, 3)) * 20, np.array([35.2, 0, -1]), np.array([0.3, -0.2, 0.1])
    angle, s = 0.7, 1.2
    R = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    expected = s * ((p - c) @ R + c) + t
    if mirrored:
        expected[:, 1] *= -1
    matrix = view_transform(angle, s, t, tuple(c), mirrored)
    np.testing.assert_allclose(np.column_stack([p, np.ones(50)]) @ matrix.T, np.column_stack([expected, np.ones(50)]))


def test_view_transform_reproduces_the_official_matrices(reference):
    from safetensors.torch import load_file

    tensors = load_file(reference / "pretraining_step.safetensors")
    for matrix, mirrored in zip(tensors["lidar_to_aug"].numpy(), (False, True), strict=True):
        unmirrored = np.diag([1, -1 if mirrored else 1, 1]) @ matrix[:3, :3]
        scale = np.cbrt(np.linalg.det(unmirrored))
        angle = math.atan2(unmirrored[0, 1], unmirrored[0, 0])
        found = view_transform(
            angle, scale, np.zeros(3), TwoViewAugmentation.from_preset("official").rotation_center, mirrored
        )
        np.testing.assert_allclose(found, matrix, atol=1e-9)


def test_draws_cover_their_ranges_and_image_and_view_flip_together():
    processor = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=8)
    row = make_row(count=200)
    angles, scales, flips = [], [], []
    for index in range(300):
        sample = make_sample(row, processor, TwoViewAugmentation(), index=index)
        linear = sample["lidar_to_aug"].double()[:3, :3]
        flipped = bool(torch.linalg.det(linear) < 0)
        # in the image, y to the left grows to the left unless it is mirrored
        left, right = project(sample["lidar_to_pixel"], np.array([[20.0, 1, 0], [20.0, -1, 0]]))[0][:, 0]
        assert (left > right) == flipped
        flips.append(flipped)
        scales.append(float(linear[2, 2]))
        angles.append(math.atan2(linear[0, 1], linear[0, 0]))
    assert 0.4 < np.mean(flips) < 0.6
    assert 0.75 <= min(scales) < 0.78
    assert 1.22 < max(scales) <= 1.25
    assert -math.pi / 2 <= min(angles) < -1.5
    assert 1.5 < max(angles) <= math.pi / 2


def test_official_preset_draws_sizes_within_the_official_range():
    small = TwoViewAugmentation.from_preset("official", random_resize=((64, 20), (240, 72)))
    processor = SimIPUProcessor.from_preset("official", num_points=8)
    row = make_row(count=200)
    sizes = {tuple(make_sample(row, processor, small, index=i)["image"].shape[-2:]) for i in range(40)}
    assert len(sizes) > 10
    for height, width in sizes:
        assert 20 <= height <= 72
        assert width <= 240
        assert abs(height * WIDTH / HEIGHT - width) <= 2


def test_colour_jitter_changes_colours_and_nothing_else():
    processor = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=8)
    row = make_row(count=200)
    plain = make_sample(row, processor, TwoViewAugmentation())
    for name in ("brightness", "contrast", "saturation", "hue"):
        jittered = make_sample(row, processor, TwoViewAugmentation(**{name: 0.4}))
        assert not torch.equal(jittered["image"], plain["image"])
        assert all(torch.equal(jittered[key], plain[key]) for key in plain if key != "image")


@pytest.mark.parametrize(
    "values",
    [
        {"rotation": (1.0, -1.0)},
        {"scale": (0.0, 1.0)},
        {"random_zoom": (0.5, 1.0)},
        {"flip_probability": 1.5},
        {"hue": 0.7},
        {"translation_std": -1.0},
        {"translation_std": math.nan},
        {"scale": (1.0, math.inf)},
        {"random_resize": ((100, 100), (50, 200))},
        {"rotation": (math.nan, 1.0)},
    ],
)
def test_wrong_values_are_refused(values):
    with pytest.raises(SimIPUError, match=next(iter(values))):
        TwoViewAugmentation(**values)
    with pytest.raises(ValueError, match="unknown preset 'best': choose from recommended, official"):
        TwoViewAugmentation.from_preset("best")


def make_item(height, width, value):
    generator = torch.Generator().manual_seed(value)
    return {
        "image": torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8),
        "points": torch.full((5, 4), float(value)),
        "points_aug": torch.full((5, 4), -float(value)),
        "lidar_to_aug": torch.eye(4) * value,
        "lidar_to_pixel": torch.ones(3, 4) * value,
    }


def test_images_of_floats_are_those_of_bytes_or_are_refused():
    processor, row = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=16), make_row()
    colors = TwoViewAugmentation(flip_probability=0.0, brightness=0.4, contrast=0.4)
    pixels = torch.from_numpy(np.asarray(row["image"]).copy()).permute(2, 0, 1)
    expected = make_sample(row, processor, colors)["image"]
    floats = make_sample(row | {"image": pixels.float()}, processor, colors)["image"]
    torch.testing.assert_close(floats, expected.float(), rtol=0, atol=3)
    with pytest.raises(ValueError, match="expected an image from 0 to 255, found floats from"):
        make_sample(row | {"image": pixels / 255}, processor, colors)
    turned = Image.open(io.BytesIO(stored(row["image"], orientation=3)["bytes"]))
    with pytest.raises(ValueError, match="EXIF orientation 3"):
        make_sample(row | {"image": turned}, processor, colors)


@pytest.mark.parametrize("preset", ["recommended", "official"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_of_several_sizes_are_padded_to_the_largest_multiple_of_32_and_normalised(preset, channels_last):
    processor = SimIPUProcessor.from_preset(preset).image_processor
    samples = [make_item(40, 90, 1), make_item(33, 128, 2), make_item(64, 20, 3)]
    if channels_last:  # in memory, as Pillow decodes
        samples = [{**s, "image": s["image"].permute(1, 2, 0).contiguous().permute(2, 0, 1)} for s in samples]
    batch = TwoViewCollator(processor.pad_size_divisor)(samples)
    assert batch["images"].shape == (3, 3, 64, 128)
    assert batch["images"].dtype == torch.uint8
    assert batch["image_sizes"].tolist() == [[40, 90], [33, 128], [64, 20]]
    before = batch["images"].clone()
    inputs = to_model_inputs(batch, processor)
    assert torch.equal(batch["images"], before)
    assert sorted(inputs) == sorted({*batch, "pixel_values"} - {"images"})
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["pixel_values"].is_contiguous()
    alone = processor([sample["image"] for sample in samples], do_resize=False, return_tensors="pt")
    assert all(torch.equal(inputs[name], alone[name]) for name in ("pixel_values", "image_sizes"))
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    for pixels, sample, (height, width) in zip(inputs["pixel_values"], samples, batch["image_sizes"], strict=True):
        levels = sample["image"].double() / (255 if processor.do_rescale else 1)
        expected = ((levels.flip(0) if preset == "official" else levels) - mean) / std
        torch.testing.assert_close(pixels[:, :height, :width].double(), expected, rtol=1e-6, atol=1e-6)
        assert not pixels[:, height:].any()
        assert not pixels[:, :, width:].any()


def test_images_of_bytes_and_of_floats_share_a_batch():
    samples = [make_item(32, 64, 1), make_item(32, 64, 2)]
    samples[1]["image"] = samples[1]["image"] + 0.5
    together = TwoViewCollator()(samples)["images"]
    assert all(torch.equal(pixels, sample["image"]) for pixels, sample in zip(together, samples, strict=True))
    batch = TwoViewCollator(50)(samples)
    assert batch["images"].shape == (2, 3, 50, 100)
    assert batch["points_aug"].shape == (2, 5, 4)
    assert batch["lidar_to_pixel"][1].unique().tolist() == [2]


def make_dataset(count=6, on_bad_row="error", change=None, **augmentation):
    rows = [make_row(seed=index, count=300) for index in range(count)]
    if change is not None:
        change(rows)
    processor = SimIPUProcessor.from_preset("recommended", (32, 64), num_points=64)
    rows = datasets.Dataset.from_list(rows, features=ROW_FEATURES)
    return TwoViewDataset(rows, processor, TwoViewAugmentation(**augmentation), 5, on_bad_row)


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_samples_are_a_pure_function_of_seed_epoch_and_index():
    dataset, again = make_dataset(), make_dataset()
    first = [dataset[index] for index in range(6)]
    assert all(equal(again[index], first[index]) for index in (3, 1, 5, 0, 3))
    assert not any(equal(dataset[1, index], first[index]) for index in range(6))
    assert all(equal(dataset[0, index], first[index]) for index in range(6))
    row = dataset.rows[0]
    samples = [
        make_sample(row, dataset.processor, dataset.augmentation, seed, epoch, index)
        for seed, epoch, index in ((5, 0, 0), (6, 0, 0), (5, 1, 0), (5, 0, 1))
    ]
    assert equal(samples[0], first[0])
    assert len({float(sample["lidar_to_aug"][0, 0]) for sample in samples}) == 4
    assert len(list(dataset)) == 6  # by IndexError
    with pytest.raises(IndexError, match="0 to 5, found 6"):
        dataset[6]


def stored(image, orientation=1, length=None, format="PNG"):
    """The first bytes of a file."""
    exif = Image.Exif()
    exif[0x112] = orientation
    image.save(file := io.BytesIO(), format, exif=exif)
    return {"bytes": file.getvalue()[:length], "path": None}


@pytest.mark.parametrize(
    ("column", "damage", "num_workers"),
    [
        ("points", lambda points: points[:-3], 0),
        ("image", lambda image: stored(image, length=2000), 2),
        ("image", lambda image: stored(image, orientation=6, format="JPEG"), 0),
        ("lidar_to_camera", lambda _: (np.diag([1, 1, -1, 1]) @ LIDAR_TO_CAMERA).tolist(), 2),  # it looks away
    ],
)
def test_bad_rows_are_named_or_replaced_by_the_next(column, damage, num_workers):
    def change(rows):
        rows[2][column] = damage(rows[2][column])

    with pytest.raises(SimIPUError, match="frame 000002: "):
        make_dataset(change=change)[2]
    dataset = make_dataset(change=change, on_bad_row="skip")
    assert dataset.bad_rows == []
    collate = TwoViewCollator()
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=collate)
    batches = list(loader)
    assert [len(batch["points"]) for batch in batches] == [2, 2, 2]
    assert dataset.bad_rows == [2]
    # the third row's place holds the fourth row, augmented by the third's numbers
    expected = make_sample(dataset.rows[3], dataset.processor, dataset.augmentation, seed=5, index=2)
    assert torch.equal(batches[1]["points_aug"][0], expected["points_aug"])
    assert not torch.equal(batches[1]["lidar_to_aug"][0], batches[1]["lidar_to_aug"][1])


def test_a_data_set_that_cannot_work_is_refused():
    processor, augmentation = SimIPUProcessor.from_preset(num_points=8), TwoViewAugmentation()
    rows = datasets.Dataset.from_list([make_row()], features=ROW_FEATURES)
    with pytest.raises(SimIPUError, match="no rows"):
        TwoViewDataset(rows.select([]), processor, augmentation)
    broken = make_dataset(2, "skip", change=lambda rows: [row.update(points=b"") for row in rows])
    with pytest.raises(SimIPUError, match="none of the 2 rows can be used; the last: frame 000000: "):
        broken[1]
