"""Frames with depth: selection, sparse targets against hand-made projections, Eigen lists, training samples."""

import dataclasses
import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from depth_rows import FOCAL, LIDAR_TO_CAMERA, lidar_points, make_rows, save_rows
from PIL import Image

from simipu_hf.data.depth import (
    DepthAugmentation,
    DepthDataset,
    DepthFrame,
    default_crop_size,
    image_and_depth,
    project_to_depth_map,
    read_depth_png,
    read_eigen_list,
    refuse_small_crop,
    resize_depth_map,
)
from simipu_hf.data.frames import select_frames
from simipu_hf.data.rows import dataset_from_rows
from simipu_hf.data.sources import describe_frames
from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.image_processing_simipu import SimIPUImageProcessor

PROJECTION = np.array([[FOCAL, 0, 32, 0], [0, FOCAL, 16, 0], [0, 0, 1, 0]])
PROCESSOR = SimIPUImageProcessor(size={"height": 32, "width": 64}, pad_size_divisor=1)


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> str:
    return save_rows(tmp_path_factory.mktemp("depth_frames"))


# --- frames by name -------------------------------------------------------------------------------------------------


def test_frames_are_selected_by_split_and_id(frames, tmp_path):
    assert select_frames([frames])["frame_id"][:2] == ["000000", "000001"]
    rows = select_frames([f"{frames}#train:000003,000001", f"{frames}#test"])
    assert list(rows["frame_id"]) == ["000003", "000001", "000006", "000007"]
    rows = select_frames([f"{frames}#train[:2]+test[1:]", f"{frames}#train[2:]+test[:1]:000006"])
    assert list(rows["frame_id"]) == ["000000", "000001", "000007", "000006"]
    (tmp_path / "ids.txt").write_text("000002\n000000\n", encoding="utf-8-sig")
    assert list(select_frames([f"{frames}#:@{tmp_path / 'ids.txt'}"])["frame_id"]) == ["000002", "000000"]
    with pytest.raises(SimIPUError, match="expected one frame '000009', found 0"):
        select_frames([f"{frames}#train:000001,000009"])
    with pytest.raises(SimIPUError, match=r"expected other rows than those taken before, found .*'000001'\) again"):
        select_frames([f"{frames}#train:000001,000001"])
    rows = select_frames([f"{frames}#train:000000,000001"])
    rows = rows.remove_columns("frame_id").add_column("frame_id", ["000000", "000000"])
    rows.remove_columns("scene").add_column("scene", ["a", "b"]).save_to_disk(tmp_path / "scenes")
    with pytest.raises(SimIPUError, match="expected one frame '000000', found 2"):
        select_frames([f"{tmp_path / 'scenes'}#:000000"])
    with pytest.raises(SimIPUError, match=r"expected other rows than those taken before, found .*'000001'\) again"):
        select_frames([f"{frames}#train:000001", f"{frames}/../{Path(frames).name}#train"])
    with pytest.raises(SimIPUError, match="banana"):
        select_frames([f"{frames}#banana"])


def test_depth_maps_stay_where_other_sources_have_none(frames, tmp_path):
    depth = Image.fromarray(np.full((64, 96), 10 * 256, np.uint16))
    (row,) = select_frames([f"{frames}#train:000000"])
    rows = dataset_from_rows([{**row, "depth": depth}], tmp_path / "rows", {"depth": datasets.Image()})
    rows.save_to_disk(tmp_path / "maps")
    first, second = select_frames([str(tmp_path / "maps"), f"{frames}#train:000001"])
    assert (image_and_depth(first)[1] == 10).all()
    assert 0 < (image_and_depth(second)[1] > 0).mean() < 0.5  # its scan


def test_splits_are_described_by_the_names_that_are_read(frames, tmp_path, monkeypatch):
    for name in ("mini_train", "val"):
        datasets.DatasetDict({name: select_frames([frames])}).save_to_disk(tmp_path / name)
    assert describe_frames([frames, f"{frames}#test:000006"]) == ("rows", "train + test")
    assert describe_frames(["/data/kitti/#train[:50%]:000001", "/data/logs"]) == ("kitti + logs", "train[:50%] + all")
    assert describe_frames(["C:\\data\\kitti#val", "/x/kitti#test"]) == ("kitti", "val + test")
    assert describe_frames([str(tmp_path / "mini_train")]) == ("mini_train", "mini_train")
    monkeypatch.chdir(tmp_path / "mini_train")
    assert describe_frames(["."]) == ("mini_train", "mini_train")
    assert describe_frames([str(tmp_path / "val"), f"{frames}#train[:1]+test[1:]"])[1] == "val + train[:1]+test[1:]"


def eigen_list(folder, *lines, encoding="utf-8"):
    for name in ("raw", "depth"):
        (folder / name).mkdir(exist_ok=True)
    Image.new("RGB", (64, 32)).save(folder / "raw" / "a.png")
    Image.fromarray(np.full((32, 64), 512, np.uint16)).save(folder / "depth" / "a.png")
    (folder / "list.txt").write_text("\n".join(lines), encoding=encoding)
    return folder / "list.txt", folder / "raw", folder / "depth"


@pytest.mark.parametrize(
    "line", ["a.png a.png 721.5377", "a.png a.png", "/a.png /a.png 721.5", "\\a.png \\a.png", "//a.png a.png"]
)
def test_eigen_lists_in_every_published_form(tmp_path, line):
    rows = read_eigen_list(*eigen_list(tmp_path, line, "", "b.png None 721.5377", encoding="utf-8-sig"))
    assert len(rows) == 1
    assert rows[0]["frame_id"] == "a.png"
    assert (image_and_depth(rows[0])[1] == 2.0).all()


def test_faults_of_eigen_lists_are_named(tmp_path, capsys):
    with pytest.raises(SimIPUError, match="line 2"):
        read_eigen_list(*eigen_list(tmp_path, "a.png a.png", "b.png"))
    with pytest.raises(SimIPUError, match="no line has ground truth"):
        read_eigen_list(*eigen_list(tmp_path, "a.png None"))
    twice = eigen_list(tmp_path, "a.png a.png", "/a.png a.png 721.5")
    assert len(read_eigen_list(*twice)) == 1
    missing = eigen_list(tmp_path, "a.png a.png", "a.png x.png", "y.png a.png")
    with pytest.raises(SimIPUError, match=r"files of 2 of 3 frames are missing, the first .*x\.png"):
        read_eigen_list(*missing)
    assert len(read_eigen_list(*missing, on_bad_row="skip")) == 1
    assert "2 of 3" in capsys.readouterr().err


# --- ground truth ---------------------------------------------------------------------------------------------------


def test_every_point_lands_on_its_pixel_and_the_nearest_wins():
    u, v, depth = np.array(
        [
            (10, 5, 20.0),
            (10.4, 5.4, 8.0),  # same pixel, nearer
            (9.6, 4.6, 30.0),  # same pixel, farther
            (0, 0, 3.0),
            (63.4, 31.4, 4.0),  # the last pixel's cell reaches to 63.5, 31.5
            (63.6, 10, 5.0),  # outside
            (-0.6, 10, 5.0),
            (20, 20, -7.0),  # behind the camera
            (20, 20, np.nan),
        ]
    ).T
    points = lidar_points(u, v, depth, 32, 64).astype(np.float32)
    target = project_to_depth_map(points, PROJECTION, LIDAR_TO_CAMERA, 32, 64)
    assert target.dtype == np.float32
    known = {(int(r), int(c)): float(target[r, c]) for r, c in zip(*np.nonzero(target), strict=True)}
    assert known == {(5, 10): 8.0, (0, 0): 3.0, (31, 63): 4.0}


def test_resizing_keeps_depths_and_the_nearest_wins():
    depth = np.zeros((4, 8), np.float32)
    depth[0, 0], depth[1, 1], depth[3, 7], depth[2, 4] = 9.0, 4.0, 30.0, 7.0
    resized = resize_depth_map(depth, 2, 4)
    assert resized.tolist() == [[4.0, 0, 0, 0], [0, 0, 7.0, 30.0]]
    assert resize_depth_map(depth, 4, 8) is depth


def test_depth_png_round_trip(tmp_path):
    stored = np.array([[0, 256, 65535], [1, 512, 20480]], dtype=np.uint16)
    Image.fromarray(stored).save(tmp_path / "depth.png")
    np.testing.assert_array_equal(read_depth_png(tmp_path / "depth.png", "a"), stored.astype(np.float32) / 256)
    Image.new("RGB", (3, 2)).save(tmp_path / "colour.png")
    with pytest.raises(SimIPUError, match="a: expected a 16-bit"):
        read_depth_png(tmp_path / "colour.png", "a")
    with pytest.raises(SimIPUError, match=r"a: cannot be read.*missing\.png"):
        read_depth_png(tmp_path / "missing.png", "a")


def test_target_of_a_row_comes_from_its_depth_or_its_points():
    row = next(make_rows(range(7, 8)))
    _, depth = image_and_depth(row)
    rows, _ = np.nonzero(depth)
    # the plane at a pixel's row is 75 m + row / 4, a point lies within half a pixel of it
    assert np.abs(depth[depth > 0] - (75 + rows / 4)).max() <= 0.125 + 1e-4
    assert len(rows) > 1000
    stored = np.full((64, 96), 256, dtype=np.uint16)
    assert (image_and_depth({**row, "depth": Image.fromarray(stored)})[1] == 1.0).all()
    with pytest.raises(SimIPUError, match=r"000007.*points"):
        image_and_depth({**row, "points": b"\0" * 17})
    with pytest.raises(SimIPUError, match="depth is 96 x 63, its image 96 x 64"):
        image_and_depth({**row, "depth": Image.fromarray(stored[1:])})


# --- what a model sees ----------------------------------------------------------------------------------------------


def test_frame_is_cropped_and_resized_with_its_target():
    row = next(make_rows(range(1), 375, 1242))
    crop = {"height": 352, "width": 1216}
    frame = DepthFrame.from_row(row, SimIPUImageProcessor(crop_size=crop, size={"height": 88, "width": 304}))
    assert frame.window == (23, 13, 352, 1216)
    assert frame.image.shape == (88, 304, 3)
    np.testing.assert_array_equal(frame.target, resize_depth_map(frame.depth[23:, 13:-13], 88, 304))
    refuse_small_crop(frame)
    with pytest.raises(SimIPUError, match=r"frame 000000.*352 x 1216.*--no_kb_crop"):
        DepthFrame.from_row(next(make_rows(range(1))), SimIPUImageProcessor(crop_size=crop))
    with pytest.raises(SimIPUError, match=r"frame 000000.*less than half of the image, 900 x 1600; --no_kb_crop"):
        refuse_small_crop(dataclasses.replace(frame, depth=np.ones((900, 1600))))


@pytest.mark.parametrize("decode", [True, False])
def test_depth_that_cannot_be_read_is_named_by_its_frame(tmp_path, capsys, decode):
    png = io.BytesIO()
    Image.fromarray(np.full((64, 96), 512, np.uint16)).save(png, "png")
    depth = [{"bytes": data, "path": None} for data in (png.getvalue(), png.getvalue()[:60])]
    rows = dataset_from_rows(make_rows(range(2)), str(tmp_path / "rows")).add_column("depth", depth)
    rows.cast_column("depth", datasets.Image(decode=decode)).save_to_disk(tmp_path / "saved")
    rows = select_frames([str(tmp_path / "saved")])
    with pytest.raises(SimIPUError, match="frame 000001: depth: cannot be read as a depth PNG"):
        list(DepthDataset(rows, PROCESSOR).usable_frames())
    dataset = DepthDataset(rows, PROCESSOR, on_bad_row="skip")
    [frame] = dataset.usable_frames()
    assert (frame.target == 2).all()
    assert "left out: frame 000001" in capsys.readouterr().err
    assert dataset.frame(1).frame_id == "000000"


# --- training samples -----------------------------------------------------------------------------------------------


def test_samples_depend_on_seed_epoch_and_row_alone(frames):
    rows, augmentation = select_frames([frames]), DepthAugmentation(crop_size=(32, 32))
    first, second = (DepthDataset(rows, PROCESSOR, augmentation, seed=3, keep_frames=keep) for keep in (False, True))
    before = second[2]
    for name in ("pixel_values", "labels"):
        assert torch.equal(first[0, 2][name], before[name])
        assert torch.equal(first[1, 2][name], second[1, 2][name])
    assert not torch.equal(first[1, 2]["pixel_values"], second[2, 2]["pixel_values"])


def test_augmentation_moves_image_and_depth_together():
    """Depth is written into the image, so that every known depth can be checked against its pixel."""
    rng = np.random.default_rng(0)
    depth = np.zeros((40, 60), np.float32)
    depth[::3, ::3] = rng.integers(1, 80, depth[::3, ::3].shape)
    image = np.repeat(depth[..., None], 3, axis=2).astype(np.uint8)
    augmentation = DepthAugmentation(rotation=(2.5, 0.0), flip=0.5, crop_size=(30, 32), color=0.0)
    seen = set()
    for seed in range(20):
        moved, target = augmentation(image, depth, np.random.default_rng(seed))
        assert target.shape == (30, 32)
        np.testing.assert_array_equal(moved[..., 0], target)
        seen.add(moved.tobytes())
    assert len(seen) > 15
    rotated = DepthAugmentation(rotation=(2.5, 1.0), flip=0.0, crop_size=None, color=0.0)
    _, target = rotated(image, depth, np.random.default_rng(0))
    assert set(np.unique(target)) <= set(np.unique(depth))  # no depth is mixed with another


def test_windows(frames):
    assert default_crop_size(None) == (352, 704)
    assert default_crop_size((352, 1216)) == (352, 704)
    assert default_crop_size((96, 320)) == (96, 192)
    assert default_crop_size((32, 32)) == (32, 32)
    dataset = DepthDataset(select_frames([frames]), PROCESSOR, DepthAugmentation(crop_size=(64, 64)))
    with pytest.raises(SimIPUError, match=r"frame 000000.*64 x 64 is larger than the image 64 x 32"):
        dataset[0]
