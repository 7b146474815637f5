"""Conversion to Parquet is exact, resumable and atomic."""

import errno
import io
import itertools
import os
import shutil
import typing
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image

from simipu_hf import cli
from simipu_hf.data import conversion
from simipu_hf.data.conversion import convert_to_parquet
from simipu_hf.data.depth import image_and_depth
from simipu_hf.data.loading import load_pretraining_dataset
from simipu_hf.data.rows import ROW_FEATURES, dataset_from_rows, points_from_row, to_row
from simipu_hf.errors import AT_THE_END, SimIPUError


def make_row(frame_id: str, **changes) -> dict:
    image = np.zeros((60, 80, 3), np.uint8)
    return {**to_row(frame_id, image, np.ones((2, 4)), np.eye(3, 4), np.eye(4)), **changes}


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parquet_round_trip_is_exact_and_needs_nothing_of_ours(object_root, tmp_path):
    result = convert_to_parquet(tmp_path / "parquet", data_dir=object_root, num_shards=2)
    assert result["splits"] == {"train": 3, "val": 2, "test": 1}
    assert (result["shards"], result["resumed_shards"]) == (5, 0)
    shards = ["test-00000-of-00001"]
    shards += [f"{split}-0000{part}-of-00002" for split in ("train", "val") for part in range(2)]
    files = sorted(read_folder(tmp_path / "parquet"))
    assert files == ["README.md", *(f"data/{shard}.parquet" for shard in shards)]
    plain = datasets.load_dataset(str(tmp_path / "parquet"))
    for split, rows in plain.items():
        original = load_pretraining_dataset(data_dir=object_root, split=split)
        assert rows.features == original.features
        undecoded = rows.cast_column("image", datasets.Image(decode=False))
        folder = object_root / ("testing" if split == "test" else "training")
        for row, raw, expected in zip(rows, undecoded, original, strict=True):
            assert raw["image"]["bytes"] == (folder / f"image_2/{row['frame_id']}.png").read_bytes()
            row.pop("image"), expected.pop("image")
            assert row == expected


def test_rows_of_any_source_can_be_converted(tmp_path):
    dataset_from_rows(map(make_row, "abc"), tmp_path / "rows").save_to_disk(tmp_path / "saved")
    convert_to_parquet(tmp_path / "once", str(tmp_path / "saved"))
    convert_to_parquet(tmp_path / "twice", str(tmp_path / "once"))
    assert read_folder(tmp_path / "once") == read_folder(tmp_path / "twice")
    assert load_pretraining_dataset(str(tmp_path / "twice"))[1]["frame_id"] == "b"


def test_scenes_are_converted_from_the_splits_that_have_them(object_root, tmp_path):
    for sequence in ("03", "12"):  # of train and of test
        folder = tmp_path / "odometry" / "sequences" / sequence
        shutil.copytree(object_root / "training", folder)
        calibration = (folder / "calib" / "000000.txt").read_text().replace("Tr_velo_to_cam", "Tr")
        (folder / "calib.txt").write_text(calibration)
    result = convert_to_parquet(tmp_path / "parquet", data_dir=tmp_path / "odometry", scenes=["12"], cameras=[2])
    assert list(result["splits"]) == ["test"]
    shutil.rmtree(tmp_path / "odometry" / "sequences" / "03" / "velodyne")
    with pytest.raises(SimIPUError, match=r"03.velodyne: expected \*\.bin scans, found none"):
        convert_to_parquet(tmp_path / "both", data_dir=tmp_path / "odometry", scenes=["03", "12"], cameras=[2])


def test_splits_of_different_columns_are_refused_before_anything_is_written(object_root, tmp_path):
    rows = load_pretraining_dataset(data_dir=object_root, split="train")
    parts = {"train": rows.select([0]).remove_columns("objects"), "test": rows.select([1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(SimIPUError, match=r"found that objects of test differ from those of train.*--split"):
        convert_to_parquet(tmp_path / "parquet", str(tmp_path / "saved"))
    assert not list(tmp_path.glob("parquet*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows does not remove the current folder")
def test_the_empty_folder_one_stands_in_can_be_converted_into(object_root, tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path / "rows")
    assert convert_to_parquet(".", data_dir=object_root, split="test")["shards"] == 1
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["README.md", "data"]
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(SimIPUError, match="is a mounted disk"):
        convert_to_parquet(tmp_path / "disk", data_dir=object_root)


@pytest.mark.parametrize("options", [{}, {"image_size": (2, 3)}, {"image_format": "webp"}])
def test_other_columns_are_copied_as_they_are_stored(tmp_path, options):
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 48, 3), np.uint8)).save(jpeg, "jpeg", quality=98)
    images = [{"bytes": jpeg.getvalue(), "path": None}, {"bytes": jpeg.getvalue()[:300], "path": None}]  # one is cut
    rows = dataset_from_rows(map(make_row, "ab"), tmp_path / "rows").add_column("right", images)
    rows = rows.cast_column("right", datasets.Image())
    times = pa.table({"time": pa.array([1700000000123456789] * 2, pa.timestamp("ns"))})
    rows = datasets.concatenate_datasets([rows, datasets.Dataset(times)], axis=1)
    rows.save_to_disk(tmp_path / "saved")
    convert_to_parquet(tmp_path / "parquet", str(tmp_path / "saved"), num_proc=1, **options)
    table = pq.read_table(tmp_path / "parquet/data/train-00000-of-00001.parquet")
    assert [image["bytes"] for image in table["right"].to_pylist()] == [image["bytes"] for image in images]
    assert table["time"][0].value == 1700000000123456789
    assert load_pretraining_dataset(str(tmp_path / "parquet")).features == rows.features


def test_the_command_takes_every_format():
    choices, _ = typing.get_args(typing.get_type_hints(cli.Shards)["image_format"])
    assert sorted(typing.get_args(choices)) == sorted(conversion.FORMATS)


@pytest.mark.parametrize("kind", ["kitti", "rows"])
def test_an_interrupted_conversion_goes_on_and_ends_equal(object_root, tmp_path, monkeypatch, kind):
    if kind == "rows":
        load_pretraining_dataset(data_dir=object_root).save_to_disk(tmp_path / "saved")
        options = {"data_dir": tmp_path / "saved", "num_shards": 9, "num_proc": 1}
    else:
        options = {"data_dir": object_root, "num_shards": 9, "num_proc": 1, "split": ["train", "val"]}
    convert_to_parquet(tmp_path / "whole", **options)

    calls, write_table = itertools.count(1), pq.ParquetWriter.write_table

    def full_disk(*args, **kwargs):
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_table(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full_disk)
        with pytest.raises(SimIPUError, match=r"No space left.*goes on with what is whole in .*resumed\.partial"):
            convert_to_parquet(tmp_path / "resumed", **options)
    assert not (tmp_path / "resumed").exists()
    assert len(list((tmp_path / "resumed.partial/data").iterdir())) == 2
    (tmp_path / "resumed.partial/data/.1234abcd-train-00002-of-00003.parquet").touch()  # as a process killed leaves it

    assert convert_to_parquet(tmp_path / "resumed", **options)["resumed_shards"] == 2
    assert not (tmp_path / "resumed.partial").exists()
    assert read_folder(tmp_path / "whole") == read_folder(tmp_path / "resumed")


def test_what_changed_since_the_interruption_is_converted_again(object_root, tmp_path, monkeypatch):
    options = {"data_dir": object_root, "split": "train", "num_shards": 9}
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_write_card", Mock(side_effect=SimIPUError("interrupted")))
        with pytest.raises(SimIPUError, match="interrupted"):
            convert_to_parquet(tmp_path / "parquet", **options)
    scan = np.fromfile(object_root / "training/velodyne/000002.bin", "<f4")
    scan[:-4].tofile(object_root / "training/velodyne/000002.bin")
    assert convert_to_parquet(tmp_path / "parquet", **options)["resumed_shards"] == 0
    data = load_pretraining_dataset(str(tmp_path / "parquet"))
    assert data[2]["points"] == load_pretraining_dataset(data_dir=object_root)[2]["points"]


def test_nothing_of_others_is_overwritten(object_root, tmp_path):
    for folder in ("parquet", "other.partial"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.txt").write_text("mine")
    for folder, expected in (("parquet", "new or empty folder"), ("other", "something else")):
        with pytest.raises(SimIPUError, match=expected):
            convert_to_parquet(tmp_path / folder, data_dir=object_root)
    assert (tmp_path / "other.partial/mine.txt").read_text() == (tmp_path / "parquet/mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 50}, "quality does nothing without"),
        ({"quality": 500, "image_format": "jpeg"}, "expected 1 to 100"),
        ({"output_dir": "parquet"}, "contain one another"),
        ({"split": "train"}, "#val: split: expected one, found 'train' as well"),
    ],
)
def test_what_would_be_ignored_is_refused(object_root, options, message):
    target = object_root / options.pop("output_dir", "../parquet")
    with pytest.raises(SimIPUError, match=message):
        convert_to_parquet(target, data_dir=f"{object_root}#val", **options)
    assert not target.exists()


def test_damage_ends_it_before_anything_is_written(object_root, tmp_path):
    (object_root / "testing/velodyne/000000.bin").unlink()
    with pytest.raises(SimIPUError, match=r"testing.velodyne.000000\.bin: expected a LiDAR scan, found no such file"):
        convert_to_parquet(tmp_path / "parquet", data_dir=object_root)
    assert not (tmp_path / "parquet.partial").exists()


def test_a_scan_behind_the_camera_is_named(tmp_path):
    row = make_row("log/0", points=np.full((2, 4), -1, "<f4").tobytes())
    dataset_from_rows([row], tmp_path / "rows").save_to_disk(tmp_path / "saved")
    with pytest.raises(SimIPUError, match="frame log/0: expected points of the scan in the image, found none"):
        convert_to_parquet(tmp_path / "parquet", str(tmp_path / "saved"))
    dataset_from_rows([{**row, "points": None}], tmp_path / "rows").save_to_disk(tmp_path / "without")
    with pytest.raises(SimIPUError, match=r"frame log/0: points: .*NoneType"):
        convert_to_parquet(tmp_path / "parquet", str(tmp_path / "without"), whole_scans=True)


def test_files_are_as_large_and_as_many_as_asked_for(object_root, tmp_path):
    options = {"data_dir": object_root, "split": "train", "num_proc": 2}
    assert convert_to_parquet(tmp_path / "one", **options)["shards"] == 1
    assert convert_to_parquet(tmp_path / "two", num_shards=2, **options)["shards"] == 2
    assert convert_to_parquet(tmp_path / "small", max_shard_size="1KB", **options)["shards"] == 3
    names = [f"a/{index}" for index in range(10)]
    dataset_from_rows(map(make_row, names), tmp_path / "ten").save_to_disk(tmp_path / "saved")
    convert_to_parquet(tmp_path / "four", data_dir=tmp_path / "saved", num_shards=4, num_proc=1)
    files = sorted((tmp_path / "four").rglob("*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [2, 3, 2, 3]
    assert load_pretraining_dataset(data_dir=tmp_path / "four")["frame_id"][:] == names
    numbers = ({"num_shards": 0}, {"max_shard_size": "large"})
    for wrong in ({"image_format": "gif"}, {"image_size": (0, 5)}, {"image_size": (9, 5, 3)}, *numbers):
        with pytest.raises(SimIPUError, match=f"{next(iter(wrong))}: (expected|.*is not in a valid format)"):
            convert_to_parquet(tmp_path / "wrong", **options, **wrong)


def test_images_are_resized_and_encoded_anew(tmp_path):
    """A white square stays where its corners project to, by the map of Pillow's own resize."""
    image = np.zeros((60, 80, 3), np.uint8)
    image[20:40, 30:50] = 255
    depth, focal = 10.0, 50.0
    corners = np.array([[29.5, 19.5], [49.5, 39.5]])  # edges of the square; integers are centres of pixels
    points = np.ones((2, 4))
    points[:, :3] = np.column_stack([(corners - [39.5, 29.5]) / focal * depth, [depth, depth]])
    projection = np.array([[focal, 0, 39.5, 0], [0, focal, 29.5, 0], [0, 0, 1, 0]])
    behind = np.array([[0, 0, -5.0, 0]])
    rows = [to_row("log/0", image, np.vstack([points, behind]), projection, np.eye(4))]
    dataset_from_rows(rows, tmp_path / "rows").save_to_disk(tmp_path / "saved")
    convert_to_parquet(
        tmp_path / "parquet", str(tmp_path / "saved"), image_size=(30, 20), image_format="jpeg", quality=100
    )
    row = load_pretraining_dataset(str(tmp_path / "parquet"))[0]
    assert (row["image"].format, row["image"].size) == ("JPEG", (20, 30))
    np.testing.assert_array_equal(points_from_row(row), points.astype(np.float32))  # the one behind is cut
    pixels = np.asarray(row["camera_projection"]) @ np.vstack([points[:, :3].T, [1, 1]])
    np.testing.assert_allclose(pixels[:2] / pixels[2], [[30 / 4 - 0.5, 50 / 4 - 0.5], [9.5, 19.5]])
    mass = np.asarray(row["image"].convert("L"), float)
    assert np.average(np.arange(20), weights=mass.sum(0)) == pytest.approx(40 / 4 - 0.5, abs=0.05)
    assert np.average(np.arange(30), weights=mass.sum(1)) == pytest.approx(30 / 2 - 0.5, abs=0.05)


def test_files_that_are_no_images_are_not_embedded(tmp_path):
    (tmp_path / "id_rsa").write_text("secret", encoding="utf-8")
    row = make_row("log/0", depth={"bytes": None, "path": str(tmp_path / "id_rsa")})
    features = datasets.Features({**ROW_FEATURES, "depth": datasets.Image()})
    table = datasets.Dataset.from_list([row], features).with_format("arrow")[:]  # datasets' own writers embed files
    (tmp_path / "saved").mkdir()
    pq.write_table(table.cast(features.arrow_schema), tmp_path / "saved" / "train.parquet")
    with pytest.raises(SimIPUError, match=r"frame log/0: depth: expected an image file, found .*id_rsa"):
        convert_to_parquet(tmp_path / "parquet", str(tmp_path / "saved"))


def test_a_file_of_rows_of_a_process_that_was_killed_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for name in ("killed", "running"):
        (tmp_path / f"rows-{name}.arrow").touch()
        (tmp_path / f"rows-{name}.arrow.lock").touch()
    row = make_row("log/0")
    with FileLock(tmp_path / "rows-running.arrow.lock"):
        first, second = dataset_from_rows([row]), dataset_from_rows([row, row])
        assert not list(tmp_path.glob("rows-killed*"))
        assert (tmp_path / "rows-running.arrow").is_file()
    assert (len(first), len(second), first[0]["frame_id"]) == (1, 2, "log/0")
    own = [Path(first.cache_files[0]["filename"]), Path(second.cache_files[0]["filename"])]
    del first, second  # Windows keeps what is open
    AT_THE_END.close()
    assert not any(path.exists() for path in own)


def test_labels_one_by_one_and_depth_are_resized_with_their_image(tmp_path):
    depth = np.zeros((60, 80), np.uint16)
    depth[30, 40] = 10 * 256
    png = io.BytesIO()
    Image.fromarray(depth).save(png, "png")
    objects = [[{"bbox": [9.5, 19.5, 29.5, 39.5], "rotation_y": 0.0}]]
    rows = dataset_from_rows([make_row("log/0")], tmp_path / "rows").add_column("objects", objects)
    rows.add_column("depth", ["depth.png"]).save_to_disk(tmp_path / "paths")
    for name, data in (("saved", png.getvalue()), ("cut", png.getvalue()[:60])):
        pictures = rows.add_column("depth", [{"bytes": data, "path": None}])
        pictures.cast_column("depth", datasets.Image()).save_to_disk(tmp_path / name)
    options = {"image_size": (30, 20)}
    with pytest.raises(SimIPUError, match=r"depth: expected datasets\.Image"):
        convert_to_parquet(tmp_path / "wrong", str(tmp_path / "paths"), **options)
    with pytest.raises(SimIPUError, match="frame log/0: cannot be read as a depth PNG"):
        convert_to_parquet(tmp_path / "wrong", str(tmp_path / "cut"), **options)
    convert_to_parquet(tmp_path / "small", str(tmp_path / "saved"), **options)
    row = load_pretraining_dataset(str(tmp_path / "small"))[0]
    assert row["objects"][0]["bbox"] == [2, 9.5, 7, 19.5]
    target = image_and_depth(row)[1]
    assert (target.shape, target[15, 10], target.sum()) == ((30, 20), 10, 10)


def test_boxes_of_labels_are_resized_with_their_image(object_root, tmp_path):
    options = {"data_dir": object_root, "split": "train", "num_proc": 1}
    before = load_pretraining_dataset(**options)[0]
    width, height = before["image"].size
    convert_to_parquet(tmp_path / "small", image_size=(height // 2, width // 4), **options)
    after = load_pretraining_dataset(data_dir=tmp_path / "small")[0]
    scale = np.array([width // 4 / width, height // 2 / height] * 2)
    assert len(before["objects"]["bbox"])
    expected = (np.array(before["objects"]["bbox"]) + 0.5) * scale - 0.5
    np.testing.assert_allclose(after["objects"]["bbox"], expected, atol=1e-4)
    assert after["objects"]["location"] == before["objects"]["location"]
