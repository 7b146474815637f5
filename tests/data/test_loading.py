"""Rows, and one function that loads them from wherever they are."""

import io
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from simipu_hf.data import preparation
from simipu_hf.data import rows as rows_module
from simipu_hf.data.depth import read_depth_png
from simipu_hf.data.loading import _runs, load_pretraining_dataset
from simipu_hf.data.preparation import _chunks
from simipu_hf.data.rows import (
    ROW_FEATURES,
    calibration_from_row,
    check_row,
    dataset_from_rows,
    image_from_row,
    pixels_from_row,
    points_from_row,
    to_row,
)
from simipu_hf.data.sources import split_source
from simipu_hf.data.two_views import TwoViewAugmentation, two_view_sample
from simipu_hf.dataset_scripts import kitti
from simipu_hf.errors import SimIPUError
from simipu_hf.modeling.processing_simipu import SimIPUProcessor
from simipu_hf.processes import run_in_processes

POINTS = np.arange(12, dtype=np.float64).reshape(3, 4)
PROJECTION = np.array([[40.0, 0, 3, 1], [0, 50, 2, 2], [0, 0, 1, 3]])
EXTRINSICS = np.array([[0, -1, 0, 4.0], [0, 0, -1, 5], [1, 0, 0, 6], [0, 0, 0, 1]])


def make_row(frame_id: str = "a", **changes) -> dict:
    values = {"image": np.full((4, 6, 3), 7, np.uint8), "points": POINTS} | changes
    return to_row(frame_id, **{"camera_projection": PROJECTION, "lidar_to_camera": EXTRINSICS} | values)


@pytest.fixture
def rows(tmp_path):
    return dataset_from_rows((make_row(f"frame{index}") for index in range(4)), cache_dir=tmp_path / "rows")


# --- rows


def test_a_row_gives_back_what_went_in(rows):
    row = rows[2]
    assert row["frame_id"] == "frame2"
    np.testing.assert_array_equal(points_from_row(row), POINTS.astype(np.float32))
    for found, expected in zip(calibration_from_row(row), (PROJECTION, EXTRINSICS), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.asarray(image_from_row(row)), np.full((4, 6, 3), 7))
    assert rows.features == ROW_FEATURES
    check_row(row)


def test_images_come_as_path_bytes_array_or_pil(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (6, 4), (1, 2, 3)).save(path)
    kinds = [path, str(path), path.read_bytes(), np.asarray(Image.open(path)), Image.open(path)]
    rows = dataset_from_rows((make_row(str(index), image=kind) for index, kind in enumerate(kinds)), tmp_path / "rows")
    for row in [*rows, *rows.cast_column("image", datasets.Image(decode=False))]:
        np.testing.assert_array_equal(np.asarray(image_from_row(row)), np.full((4, 6, 3), (1, 2, 3)))


def test_an_image_is_stored_and_read_in_one_way(tmp_path):
    wide = np.full((4, 6, 3), 0x40FF, np.uint16)
    wide[0] = 0x8001
    clear = Image.new("RGBA", (6, 4), (1, 2, 3, 0))
    Image.new("RGB", (12, 8)).save(tmp_path / "opened.png")
    opened = Image.open(tmp_path / "opened.png")
    opened.thumbnail((6, 4))
    opened.paste((9, 9, 9), (0, 0, 6, 4))
    rows = [make_row(image=wide), make_row("b", image=clear), make_row("c", image=opened)]
    first, second, third = dataset_from_rows(rows, tmp_path)
    assert (third["image"].size, third["image"].getpixel((0, 0))) == ((6, 4), (9, 9, 9))
    np.testing.assert_array_equal(np.asarray(first["image"])[:2, 0], [[128] * 3, [65] * 3])
    assert image_from_row(second).getpixel((0, 0)) == (1, 2, 3)
    for suffix, orientation in (("png", 6), ("jpg", 3), ("jpg", 1)):
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.new("RGB", (6, 4)).save(tmp_path / f"turned.{suffix}", exif=exif)
        if orientation == 1:
            make_row(image=tmp_path / "turned.jpg")
        else:
            with pytest.raises(SimIPUError, match=f"frame a: image: .* EXIF orientation {orientation}"):
                make_row(image=tmp_path / f"turned.{suffix}")


def encoded_image(mode: str, name: str, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 4), dtype=np.uint8)
    image = Image.fromarray(noise).resize((106, 74), Image.Resampling.BICUBIC).convert(mode)
    image.save(file := io.BytesIO(), name, **options)
    return file.getvalue()


def damaged(data: bytes) -> list[bytes]:
    middle = bytearray(data)
    middle[len(data) // 2] ^= 0xFF
    return [bytes(middle), data + b"more", *(data[:-cut] for cut in (1, 5, 12, 40, len(data) // 2))]


@pytest.mark.parametrize(
    ("without_pillow", "mode", "name", "options"),
    [
        (True, "RGB", "JPEG", {"quality": 90}),
        (True, "RGB", "JPEG", {"quality": 30, "subsampling": 0, "progressive": True}),
        (False, "L", "JPEG", {}),
        (False, "CMYK", "JPEG", {}),
        (True, "RGB", "PNG", {}),
        (False, "RGB", "PNG", {"transparency": (1, 2, 3)}),
        (False, "RGBA", "PNG", {}),
        (False, "LA", "PNG", {}),
    ],
)
def test_pixels_are_those_of_pillow_and_so_are_refusals(tmp_path, monkeypatch, without_pillow, mode, name, options):
    data = encoded_image(mode, name, **options)
    (tmp_path / "image").write_bytes(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    with monkeypatch.context() as patch:
        if without_pillow:
            patch.delattr(rows_module, "image_from_row")
        for image in ({"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "image")}):
            pixels = pixels_from_row({"frame_id": "a", "image": image})
            np.testing.assert_array_equal(pixels, expected)
            assert pixels.flags.writeable
    for cut in damaged(data):
        row = {"frame_id": "a", "image": {"bytes": cut, "path": None}}
        try:
            by_pillow = np.asarray(image_from_row(row))
        except SimIPUError as error:
            with pytest.raises(SimIPUError, match=f"{re.escape(str(error))}$"):
                pixels_from_row(row)
        else:
            np.testing.assert_array_equal(pixels_from_row(row), by_pillow)


def test_a_flipped_bit_in_a_png_is_found():
    for mode in ("RGB", "RGBA", "I;16"):
        data = bytearray(encoded_image("L" if mode == "I;16" else mode, "PNG"))
        if mode == "I;16":
            Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100)).save(file := io.BytesIO(), "PNG")
            data = bytearray(file.getvalue())
        data[len(data) // 2] ^= 1
        source = {"bytes": bytes(data), "path": None}
        with pytest.raises(SimIPUError, match=r"frame a.*checksum"):
            read_depth_png(source, "frame a") if mode == "I;16" else image_from_row({"frame_id": "a", "image": source})


def test_files_of_images_may_be_remote_and_those_that_cannot_be_read_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.png", encoded_image("RGB", "PNG"))
    row = {"frame_id": "a", "image": {"bytes": None, "path": f"zip://a.png::{tmp_path / 'images.zip'}"}}
    np.testing.assert_array_equal(pixels_from_row(row), np.asarray(image_from_row(row)))
    (tmp_path / "bad.png").write_bytes(b"not an image")
    for path, named in ((tmp_path, re.escape(tmp_path.name)), (None, ""), (tmp_path / "bad.png", r"bad\.png")):
        row = {"frame_id": "a", "image": {"bytes": None, "path": path and str(path)}}
        for read in (image_from_row, pixels_from_row):
            with pytest.raises(SimIPUError, match=rf"frame a: image: .*{named}"):
                read(row)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"points": np.zeros((5, 3))}, r"points.*\(N, 4\).*\(5, 3\)"),
        ({"points": np.zeros((0, 4))}, "points.*0 bytes"),
        ({"points": np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]])}, "points.*1 of 2.*index 1"),
        ({"camera_projection": np.eye(3)}, r"camera_projection.*\(3, 4\).*\(3, 3\)"),
        ({"lidar_to_camera": np.ones((4, 4))}, "lidar_to_camera.*0 0 0 1"),
        ({"image": b"not an image"}, "image.*readable"),
        ({"image": "absent.png"}, "image.*absent.png"),
    ],
)
def test_a_bad_row_is_refused_by_name(changes, expected):
    with pytest.raises(SimIPUError, match=f"frame bad: {expected}"):
        make_row("bad", **changes)


def test_check_row_names_the_column():
    row = make_row()
    for column, value, expected in (
        ("points", b"\0" * 24, "24 bytes"),
        ("points", [[0.0] * 4], "list"),
        ("camera_projection", "none", "'none'"),
        ("image", None, "readable image"),
    ):
        with pytest.raises(SimIPUError, match=f"frame a: {column}: expected.*{expected}"):
            check_row({**row, column: value})


def test_an_interrupted_generator_leaves_nothing(tmp_path):
    def damaged():
        yield make_row()
        yield make_row("bad", points=np.full((1, 4), np.nan))

    with pytest.raises(SimIPUError, match="frame bad"):
        dataset_from_rows(damaged(), cache_dir=tmp_path / "rows")
    row = {**make_row(), "speed": 3.0}
    with pytest.raises(SimIPUError, match="frame a: speed: expected a column whose type is given in features"):
        dataset_from_rows([row], tmp_path / "rows")
    assert not list(tmp_path.rglob("*.arrow"))


# --- loading


def test_kitti_raw_is_recognised(raw_root, tmp_path):
    for name in (None, "raw"):
        data = load_pretraining_dataset(str(raw_root), dataset_config_name=name)
        assert len(data) == 2
    with pytest.raises(SimIPUError, match="drive_0009"):
        load_pretraining_dataset(str(raw_root), scenes=["2011_09_26_drive_0009"])


def test_only_the_split_asked_for_must_be_sound(object_root):
    (object_root / "testing/velodyne/000000.bin").unlink()
    assert len(load_pretraining_dataset(data_dir=object_root)) == 3
    with pytest.raises(SimIPUError, match=r"testing.velodyne.000000\.bin"):
        load_pretraining_dataset(data_dir=object_root, split="test")


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_folder(rows, tmp_path, streaming, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pt").touch()  # which a module of datasets, named as the folder is, would take for data
    embedded = rows.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)
    embedded.to_parquet(tmp_path / "parquet/train-00000-of-00001.parquet")
    data = load_pretraining_dataset("parquet", streaming=streaming)
    for row, original in zip(data, rows, strict=True):
        check_row(row)
        assert row["points"] == original["points"]


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_folder(rows, tmp_path, streaming):
    rows.with_format("torch").save_to_disk(tmp_path / "one")
    splits = {"test": rows.select([]), "train": rows, "val": rows.select([0])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "many")

    def count(folder, split):
        loaded = list(load_pretraining_dataset(tmp_path / folder, split=split, streaming=streaming))
        check_row(loaded[0])  # whatever format it was saved in
        return len(loaded)

    assert [count("one", None), count("one", "train"), count("one", "train[:2]")] == [4, 4, 2]
    assert [count("many", None), count("many", "validation"), count("many", "train[3:]+val")] == [4, 1, 2]
    for folder, split, there in (
        ("one", "banana", "'train'"),
        ("one", "validation", "'train'"),
        ("many", "banana", "'val'"),
    ):
        with pytest.raises(SimIPUError, match=rf"split: expected one of \[.*{there}\], found '{split}'"):
            count(folder, split)
    with pytest.raises(SimIPUError, match="many: split 'test': expected rows, found none"):
        count("many", "test")
    if streaming:  # in which repeated rows are not looked for
        assert count("one", "train[:3]+train[2:]") == 5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows.remove_columns("points"), "column 'points': expected.*binary.*found None of"),
        (lambda rows: rows.cast_column("points", datasets.Value("large_binary")), None),
        (
            lambda rows: rows.remove_columns("points").add_column("points", ["x"] * 4),
            "column 'points': expected.*binary.*found.*string",
        ),
        (
            lambda rows: rows.cast_column("camera_projection", datasets.Array2D((4, 3), "float64")),
            r"column 'camera_projection': expected.*\(3, 4\).*found.*\(4, 3\)",
        ),
        (lambda rows: rows.remove_columns("frame_id").add_column("frame_id", range(4)), "'frame_id'.*string.*int64"),
        (lambda rows: rows.select([]), "split 'train': expected rows, found none"),
    ],
)
def test_columns_are_checked(rows, tmp_path, change, expected):
    change(rows).save_to_disk(tmp_path / "saved")
    if expected is None:
        assert len(load_pretraining_dataset(data_dir=tmp_path / "saved")) == 4
    else:
        with pytest.raises(SimIPUError, match=f"saved: .*{expected}"):
            load_pretraining_dataset(data_dir=tmp_path / "saved")


def test_duplicate_frames(tmp_path):
    names = ("a", "b", "a", "c")
    dataset_from_rows(map(make_row, names), tmp_path / "rows").save_to_disk(tmp_path / "saved")
    with pytest.raises(SimIPUError, match="frame a: expected one row, found 2"):
        load_pretraining_dataset(data_dir=tmp_path / "saved")
    rows = [make_row("a"), {**make_row("b"), "frame_id": None}]
    dataset_from_rows(rows, tmp_path / "rows").save_to_disk(tmp_path / "nameless")
    with pytest.raises(SimIPUError, match="nameless: split 'train', row 1: frame_id: expected a name, found none"):
        load_pretraining_dataset(data_dir=tmp_path / "nameless")
    skipped = []
    assert list(load_pretraining_dataset(data_dir=tmp_path / "saved", skipped=skipped)["frame_id"]) == ["a", "b", "c"]
    assert len(skipped) == 1


@pytest.mark.parametrize("name", ["train", "day_train", "day", "all"])
def test_a_share_is_held_out_of_train_or_the_only_split(tmp_path, name):
    rows = dataset_from_rows((make_row(f"log{index}/0") for index in range(20)), tmp_path / "rows")
    test = dataset_from_rows((make_row(f"test{index}/0") for index in range(20)), tmp_path / "test")
    splits = {name: rows} if name == "all" else {name: rows, "test": test}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    load = partial(load_pretraining_dataset, data_dir=tmp_path / "saved", validation_share=0.3)
    if name == "day":  # no train: nothing is held out, unless it is named
        assert len(load(split="day")) == 20
        load = partial(load, data_dir=f"{tmp_path / 'saved'}#day")
        assert 0 < len(load(split="validation")) < 20
        return
    train = None if name == "all" else name
    train, held_out = ({*load(split=split)["frame_id"]} for split in (train, "validation"))
    assert 0 < len(held_out) < 20
    assert train == {*rows["frame_id"]} - held_out
    if name != "all":
        assert list(load(split="test")["frame_id"]) == list(test["frame_id"])


def test_no_row_is_read_twice(object_root):
    assert len(load_pretraining_dataset(data_dir=object_root, split="train+val+test")) == 5 + 1
    for split in ("train+train", "train+train[:1]"):
        with pytest.raises(SimIPUError, match="object: frame 000000: expected one row, found 2"):
            load_pretraining_dataset(data_dir=object_root, split=split)
    for sources in ([object_root, object_root], [f"{object_root}#train", f"{object_root}#val+train"]):
        with pytest.raises(SimIPUError, match=r"expected other rows than those taken before, found .*000000"):
            load_pretraining_dataset(data_dir=sources)
    streams = [f"{object_root}#train", f"{object_root}#val+train"], [f"{object_root}#val", f"{object_root}#validation"]
    for source in (f"{object_root}#train+train", *streams):
        with pytest.raises(SimIPUError, match=r"expected (different names|other rows)"):
            load_pretraining_dataset(data_dir=source, streaming=True)


@pytest.mark.parametrize(
    ("num_proc", "numbers", "message"),
    [
        (None, np.zeros(5), r"velodyne.000001.bin: expected whole points .* found 20 bytes"),
        (2, np.full(8, -5.0), "frame 000001: expected points of the scan in the image, found none"),
    ],
)
def test_damage_is_one_clear_error_and_can_be_skipped(object_root, num_proc, numbers, message, monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK", 2)  # 000002 is in another file
    numbers.astype("<f4").tofile(object_root / "training/velodyne/000001.bin")
    options = {"data_dir": object_root, "num_proc": num_proc}
    with pytest.raises(SimIPUError, match=message):
        load_pretraining_dataset(**options)
    for _ in range(2):  # prepared, then from the cache
        skipped = []
        data = load_pretraining_dataset(**options, skipped=skipped)
        assert list(data["frame_id"]) == ["000000", "000002"]
        assert len(skipped) == 1
        assert skipped[0].startswith("frame 000001: ")
    with pytest.raises(SimIPUError, match="found none; 1 left out, the first: frame 000001: "):
        load_pretraining_dataset(**options, split="train[2:3]", skipped=[])


@pytest.mark.parametrize("skipped", [[], None])
def test_a_frame_left_out_for_a_passing_reason_comes_back(object_root, monkeypatch, skipped):
    def away(path):
        if path.endswith("000001.bin"):
            raise ValueError(f"{path}: a disk that is away")
        return read_points(path)

    read_points = kitti.read_points
    load = partial(load_pretraining_dataset, data_dir=object_root, num_proc=1)
    with monkeypatch.context() as patch:
        patch.setattr(kitti, "read_points", away)
        assert len(load(skipped=[])) == 2
    assert len(load(skipped=skipped)) == 3
    assert not skipped


def test_damage_while_streaming(object_root):
    shutil.copy(object_root / "ImageSets/val.txt", object_root / "training/velodyne/000001.bin")
    data = load_pretraining_dataset(data_dir=object_root, streaming=True)
    with pytest.raises(ValueError, match=r"000001\.bin"):
        list(data)
    data = load_pretraining_dataset(data_dir=object_root, streaming=True, skipped=[])
    assert isinstance(data, datasets.IterableDataset)
    assert [row["frame_id"] for row in data] == ["000000", "000002"]


def test_what_is_no_data_set_is_named(tmp_path, object_root, raw_root):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday/photo.jpg").touch()
    (tmp_path / "download").mkdir()
    (tmp_path / "download/data_object_image_2.zip").touch()
    (tmp_path / "tracking/training/image_02").mkdir(parents=True)
    (tmp_path / "odometry/sequences/00/image_2").mkdir(parents=True)
    shutil.copytree(object_root / "training/velodyne", tmp_path / "gray/sequences/00/velodyne")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/again").symlink_to(tmp_path / "loop")
    (tmp_path / "loop/up").symlink_to(tmp_path)
    (tmp_path / "several/rows").mkdir(parents=True)
    for name in ("train.parquet", "test.txt"):
        (tmp_path / "several/rows" / name).write_text("none", encoding="utf-8")
    reduced = shutil.copytree(object_root, tmp_path / "reduced/kitti")
    (reduced / "training/velodyne").rename(reduced / "training/velodyne_reduced")
    cases = [
        ({"dataset_name": "a", "data_dir": "b"}, "either dataset_name or data_dir"),
        ({"data_dir": []}, "expected a data set, found"),
        ({"data_dir": tmp_path / "absent"}, "absent: expected the folder of a data set, found no such folder"),
        ({"data_dir": tmp_path / "holiday/photo.jpg"}, "found a file"),
        ({"data_dir": tmp_path / "download/data_object_image_2.zip"}, "an archive: unpack it first"),
        ({"data_dir": tmp_path / "download"}, r"unpack data_object_image_2\.zip first"),
        ({"data_dir": tmp_path / "holiday"}, "as published.*found photo.jpg$"),
        ({"data_dir": object_root / "training/velodyne"}, f"did you mean {re.escape(str(object_root))}"),
        ({"data_dir": raw_root / "2011_09_26"}, f"did you mean {re.escape(str(raw_root))}"),
        ({"data_dir": reduced.parent}, f"did you mean {re.escape(str(reduced))}"),
        ({"data_dir": tmp_path / "loop"}, "as published.*found again, up"),
        ({"data_dir": tmp_path / "several"}, "expected a folder of one data set, found rows"),
        ({"data_dir": reduced}, "rename it to velodyne"),
        ({"data_dir": tmp_path / "odometry"}, r"found none; they are in KITTI's data_odometry_velodyne\.zip"),
        ({"data_dir": tmp_path / "gray"}, r"no pair; the colour images are in KITTI's data_odometry_color\.zip"),
        ({"data_dir": tmp_path / "tracking"}, "tracking benchmark, which is not read"),
        ({"data_dir": object_root, "dataset_config_name": "raw"}, r"\['object'\], found 'raw'"),
        (
            {"data_dir": object_root, "split": "nothing"},
            r"expected one of \['train', 'val', 'test'\], found 'nothing'",
        ),
        ({"data_dir": object_root, "cameras": [3]}, r"expected the folder image_3, .* data_object_image_3\.zip"),
    ]
    for options, expected in cases:
        with pytest.raises(SimIPUError, match=expected):
            load_pretraining_dataset(**options)


def test_a_folder_s_name_may_hold_the_mark_of_a_split(object_root, tmp_path):
    folder = object_root.rename(tmp_path / "kitti#2")
    assert split_source(f"{folder}#val:000003") == (str(folder), "val:000003")
    assert split_source("absent#val#2") == ("absent", "val#2")
    rows = load_pretraining_dataset(data_dir=f"{folder}#val")
    assert list(rows["frame_id"]) == ["000003", "000004"]


def test_parquet_in_a_dated_or_a_linked_folder_and_a_path_that_datasets_would_expand(rows, tmp_path):
    rows.to_parquet(tmp_path / "logs/2026_01_02/train.parquet")  # as KITTI's days are called
    rows.to_parquet(tmp_path / "real/train-00000-of-00001.parquet")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/data").symlink_to(tmp_path / "real")
    for folder in ("logs", "linked"):
        assert len(load_pretraining_dataset(data_dir=tmp_path / folder)) == 4
    (tmp_path / "real").rename(tmp_path / "a [1]")
    with pytest.raises(SimIPUError, match=r"a \[1\]: expected a path without"):
        load_pretraining_dataset(data_dir=tmp_path / "a [1]")


def test_an_address_of_parquet_files_is_streamed(rows, tmp_path):
    rows.to_parquet(tmp_path / "bucket/data/train-00000-of-00001.parquet")
    rows.select([1]).to_parquet(tmp_path / "bucket/data/val-00000-of-00001.parquet")
    rows.to_parquet(tmp_path / "spark/train/part-0.snappy.parquet")
    (tmp_path / "spark/train/_SUCCESS").touch()
    assert len(load_pretraining_dataset(f"file://{tmp_path}/spark")) == 4
    license = "license: other\nlicense_name: terms-of-use"
    (tmp_path / "bucket/README.md").write_text(f"---\n{license}\n---\n", encoding="utf-8")
    address = f"file://{tmp_path}/bucket"
    for split, expected in (("train", 4), ("val", 1), ("validation", 1)):
        stream = load_pretraining_dataset(address, split=split, streaming=True)
        assert len([check_row(row) for row in stream]) == expected
        assert stream.info.license == "terms of use"


def test_a_process_that_is_ended_from_outside_is_no_traceback():
    with pytest.raises(SimIPUError, match="one of 2 processes ended without an answer"):
        run_in_processes(os._exit, [1, 1], 2, "Preparing", int)


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_workers_end_with_their_parent(tmp_path, how):
    """The parent starts a pool of two whose workers write their numbers, and is ended."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "from simipu_hf.errors import exit_code_of\n"
        "from simipu_hf.processes import run_in_processes\n"
        "def work(path):\n"
        "    open(path, 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(exit_code_of(lambda: run_in_processes(work, sys.argv[1:], 2, 'Waiting')))\n"
    )
    notes = [tmp_path / name for name in "abcdef"]
    parent = subprocess.Popen([sys.executable, script, *notes], stderr=subprocess.DEVNULL)
    wait_until(lambda: all(note.is_file() and note.read_text() for note in notes[:2]))
    getattr(parent, how)()
    assert parent.wait(30) == ({"terminate": 143, "kill": -9}[how] if os.name != "nt" else 1)
    numbers = [int(note.read_text()) for note in notes[:2]]
    wait_until(lambda: not any(is_running(number) for number in numbers))
    assert not any(note.exists() for note in notes[2:])


def is_running(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_file_in_the_cache_s_place_is_named(object_root, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(SimIPUError, match=r"object: .*cache.simipu_hf'"):
        load_pretraining_dataset(data_dir=object_root)


def test_rigs_of_published_data_sets_are_recognised(rigs):
    for name, count, scene in (("nuscenes", 6, "scene-0061"), ("waymo_v2_miniature", 4, None)):
        rows = load_pretraining_dataset(data_dir=rigs / name)
        assert len(rows) == count
        assert scene in (None, rows[0]["scene"])
        check_row(rows[0])


# --- prepared rows


def test_interrupted_preparation_goes_on(object_root, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK", 1)
    options = {"data_dir": object_root, "num_proc": 1}
    sound = (object_root / "training/velodyne/000002.bin").read_bytes()
    (object_root / "training/velodyne/000002.bin").write_bytes(b"\0" * 20)
    with pytest.raises(SimIPUError, match=r"000002\.bin"):
        load_pretraining_dataset(**options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert len(before) == 2
    (object_root / "training/velodyne/000002.bin").write_bytes(sound)
    assert len(load_pretraining_dataset(**options)) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_new_scenes_leave_the_files_of_long_ones_as_they_are():
    def frames(**scenes):
        return [
            SimpleNamespace(scene=scene, number=number) for scene, count in scenes.items() for number in range(count)
        ]

    def chunks(**scenes):
        cut = [tuple((frame.scene, frame.number) for frame in chunk) for chunk in _chunks(frames(**scenes))]
        assert sum(cut, ()) == tuple((frame.scene, frame.number) for frame in frames(**scenes))
        assert all(0 < len(chunk) <= 512 for chunk in cut)
        return set(cut)

    before = chunks(b=700, d=40, e=2, f=1)
    assert before <= chunks(a=600, b=700, c=33, d=40, e=2, f=1, g=50)
    assert len(chunks(**{f"frame{index}": 1 for index in range(1100)})) == 3


@pytest.mark.parametrize(
    ("frames", "processes", "shards"), [(100_000, 1, 1563), (2000, 1, 2000), (3, 8, 3), (25, 8, 25), (7481, 8, 1072)]
)
def test_a_stream_reads_neighbours_together_and_has_as_many_shards_for_each_process(
    frames, processes, shards, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    runs = _runs(range(frames))
    assert len(runs) == shards
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    assert [index for run in runs for index in run] == list(range(frames))


def test_rows_are_prepared_anew_where_files_or_code_change(object_root, tmp_path, monkeypatch):
    first = load_pretraining_dataset(data_dir=object_root)[0]["points"]
    np.fromfile(object_root / "training/velodyne/000000.bin", "<f4")[:80].tofile(
        object_root / "training/velodyne/000000.bin"
    )
    assert len(load_pretraining_dataset(data_dir=object_root)[0]["points"]) < len(first)
    prepared = len(list((tmp_path / "cache").rglob("*.arrow")))
    changed = tmp_path / "kitti.py"
    changed.write_bytes(Path(kitti.__file__).read_bytes() + b"\n# changed\n")
    monkeypatch.setattr(kitti, "__file__", str(changed))
    load_pretraining_dataset(data_dir=object_root)
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == prepared + 1


def test_labels_that_cannot_be_used_are_logged_and_stop_nothing(object_root, caplog):
    path = object_root / "training/label_2/000000.txt"
    path.write_text("Car 0 0 0 1 1 5 5 1 1 1 0 0 9 0\nCar 0 0 0 1 1 5 5 1 1 1 0 0 9\n")
    rows = load_pretraining_dataset(data_dir=object_root, num_proc=1)
    assert rows[0]["objects"]["type"] == [0, 8]  # a car, and one region, all of the image, of DontCare
    assert f"{path}, line 2: expected 15 fields" in caplog.text


def test_what_killed_processes_left_is_removed(object_root, tmp_path):
    names = [".1234abcd-kitti-old.arrow", ".1234abcd-kitti-at-work.arrow"]
    paths = [tmp_path / "cache" / "simipu_hf" / name for name in names]
    paths[0].parent.mkdir(parents=True)
    for path, age in zip(paths, (2 * 24 * 60 * 60, 60), strict=True):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    load_pretraining_dataset(data_dir=object_root, num_proc=1)
    assert [path.exists() for path in paths] == [False, True]


def test_processes_that_load_at_once_prepare_once(object_root, tmp_path):
    load = partial(load_pretraining_dataset, data_dir=object_root, num_proc=1, cache_dir=tmp_path / "own")
    with ThreadPoolExecutor(3) as pool:
        loaded = [future.result() for future in [pool.submit(load) for _ in range(3)]]
    assert [len(rows) for rows in loaded] == [3, 3, 3]
    assert len(list((tmp_path / "own").rglob("*.arrow"))) == 1


def test_cut_rows_hold_what_the_camera_sees_and_give_the_samples_of_whole_scans_bit_for_bit(kitti_mini):
    cut, whole = (
        load_pretraining_dataset(data_dir=kitti_mini, split="train[:6]", whole_scans=keep) for keep in (False, True)
    )
    for preset in ("recommended", "official"):
        processor = SimIPUProcessor.from_preset(preset, image_size=(96, 320), num_points=4096)
        sample = partial(two_view_sample, processor=processor, augmentation=TwoViewAugmentation.from_preset(preset))
        for index, rows in enumerate(zip(cut, whole, strict=True)):
            first, second = (sample(row, seed=1, epoch=2, index=index) for row in rows)
            assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    for a, b in zip(cut, whole, strict=True):
        points = points_from_row(b)
        assert len(a["points"]) < len(b["points"]) / 4
        height, width = np.asarray(b["image"]).shape[:2]
        projection, lidar_to_camera = calibration_from_row(b)
        u, v, depth = projection @ lidar_to_camera @ np.vstack([points[:, :3].T, np.ones(len(points))])
        seen = (depth > 0) & (u / depth >= -0.5) & (u / depth < width - 0.5)
        seen &= (v / depth >= -0.5) & (v / depth < height - 0.5)
        kept = {point.tobytes() for point in points_from_row(a)}
        assert {point.tobytes() for point in points[seen]} <= kept <= {point.tobytes() for point in points}
