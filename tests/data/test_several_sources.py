"""Several sources in one run, scenes held out, frames on both sides, and streams that go on where they stopped."""

import io
import json
import logging
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from simipu_hf.data import overlap
from simipu_hf.data import streaming as streaming_module
from simipu_hf.data.conversion import convert_to_parquet
from simipu_hf.data.inspection import inspect_dataset
from simipu_hf.data.loading import load_mixture, load_pretraining_dataset
from simipu_hf.data.mixture import Mixture
from simipu_hf.data.overlap import frames_on_both_sides, refuse_shared_frames, refuse_shared_stream
from simipu_hf.data.rows import ROW_FEATURES, dataset_from_rows, dataset_from_stream, scene_of, to_row
from simipu_hf.data.streaming import stream_two_views
from simipu_hf.data.two_views import TwoViewAugmentation, TwoViewCollator
from simipu_hf.errors import AT_THE_END, SimIPUError
from simipu_hf.modeling.processing_simipu import SimIPUProcessor

PROJECTION = np.array([[40.0, 0, 23.5, 0], [0, 40, 7.5, 0], [0, 0, 1, 0]])
EXTRINSICS = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])


def make_row(frame_id: str, number: int) -> dict:
    rng = np.random.default_rng(number)
    points = rng.uniform([5, -5, -2, 0], [50, 5, 2, 1], size=(60, 4))
    image = rng.integers(0, 256, (16, 48, 3), dtype=np.uint8)
    return to_row(frame_id, image, points, PROJECTION, EXTRINSICS)


def save(folder, frame_ids, first=0) -> str:
    rows = (make_row(frame_id, first + index) for index, frame_id in enumerate(frame_ids))
    dataset_from_rows(rows, folder / "rows").save_to_disk(folder / "saved")
    return str(folder / "saved")


# --- several sources


def test_sources_are_joined_in_order(object_root, tmp_path):
    saved = save(tmp_path, ["a/0", "a/1"])
    rows = load_pretraining_dataset(data_dir=[saved, object_root, f"{object_root}#val"])
    assert list(rows["frame_id"]) == ["a/0", "a/1", "000000", "000001", "000002", "000003", "000004"]
    assert list(rows["scene"][:3]) == ["a", "a", "training/000000"]
    rows, mixture = load_mixture(data_dir=[saved, object_root], mixture=[1, 1], seed=3)
    assert (len(rows), mixture.sizes, len(mixture)) == (5, (2, 3), 5)
    assert load_mixture(data_dir=[saved, object_root])[1] is None
    for weights in ([1], [1, 0], [1, -1], [1, float("nan")]):
        with pytest.raises(SimIPUError, match="a weight greater than 0 for each of 2 data sets"):
            load_mixture(data_dir=[saved, object_root], mixture=weights)
    with pytest.raises(SimIPUError, match="leave a data set without any of 5 rows"):
        load_mixture(data_dir=[saved, object_root], mixture=[1, 1e-3])


def test_joining_writes_nothing_into_the_sources(tmp_path):
    saved = [save(tmp_path / name, [f"{name}/0", f"{name}/1"], first) for first, name in enumerate("ab")]
    features = datasets.Features({**ROW_FEATURES, "points": datasets.Value("large_binary")})
    datasets.load_from_disk(saved[1]).cast(features).save_to_disk(tmp_path / "large")
    before = sorted((tmp_path / "large").iterdir())
    rows = load_pretraining_dataset([saved[0], tmp_path / "large"], cache_dir=tmp_path / "own")
    assert rows[2]["points"] == make_row("b/0", 1)["points"]
    assert sorted((tmp_path / "large").iterdir()) == before
    assert len(list((tmp_path / "own").iterdir())) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_other_types_are_left_out(tmp_path, streaming, caplog):
    sources = []
    for name, times in (("a", [1, 2]), ("b", ["noon", "one"])):
        rows = datasets.load_from_disk(save(tmp_path / name, [f"{name}/0", f"{name}/1"]))
        rows.add_column("time", times).add_column("number", [1, 2]).save_to_disk(tmp_path / name / "timed")
        sources.append(tmp_path / name / "timed")
    rows = load_pretraining_dataset(sources, streaming=streaming)
    assert [row["frame_id"] for row in rows] == ["a/0", "a/1", "b/0", "b/1"]
    assert set(rows.column_names) == {*ROW_FEATURES, "number"}
    assert "left out, since their types differ between the data sets: time" in caplog.text


def test_a_mixture_keeps_its_proportions_and_reaches_every_row():
    mixture = Mixture((70, 20, 10), (1, 2, 1), seed=5)
    counts = Counter()
    for epoch in range(40):
        rows = [mixture.row(epoch, index) for index in range(len(mixture))]
        assert rows == [mixture.row(epoch, index) for index in range(len(mixture))]
        sources = Counter(np.digitize(rows, [70, 90]).tolist())
        assert sources == {0: 25, 1: 50, 2: 25}
        counts.update(rows)
    assert {counts[row] for row in range(70)} <= {14, 15}  # 40 * 25 / 70
    assert {counts[row] for row in range(70, 100)} == {100}
    assert rows != [Mixture((70, 20, 10), (1, 2, 1), seed=6).row(epoch, index) for index in range(100)]


def test_scenes_are_held_out_whole(object_root, tmp_path, caplog):
    source = save(tmp_path, [f"log{log}/{frame:03d}" for log in range(20) for frame in range(3)])
    train, held_out = (
        load_pretraining_dataset(source, split=split, validation_share=0.2) for split in ("train", "validation")
    )
    scenes = [set(rows["scene"]) for rows in (train, held_out)]
    assert not scenes[0] & scenes[1]
    assert len(train) + len(held_out) == 60
    assert 1 <= len(scenes[1]) <= 9
    stream = load_pretraining_dataset(source, split="validation", validation_share=0.2, streaming=True)
    assert [row["frame_id"] for row in stream] == list(held_out["frame_id"])
    half = f"{source}#train[:30]"  # the first ten scenes
    parts = [
        set(load_pretraining_dataset(half, split=split, validation_share=0.2)["scene"])
        for split in ("train", "validation")
    ]
    assert parts == [scenes[0] & {f"log{log}" for log in range(10)}, scenes[1] & {f"log{log}" for log in range(10)}]
    assert not caplog.text
    load_pretraining_dataset(save(tmp_path / "flat", [f"{n:06d}_front" for n in range(20)]), validation_share=0.2)
    assert "makes 20 scenes of the names of 20 frames" in caplog.text
    more = load_pretraining_dataset(source, split="validation", validation_share=0.4)
    assert scenes[1] <= set(more["scene"])
    with pytest.raises(SimIPUError, match=r"puts all of 20 scenes on one side: choose a value between 0\.\d+ and"):
        load_pretraining_dataset(source, validation_share=1e-6)
    with pytest.raises(SimIPUError, match="between 0 and 1"):
        load_pretraining_dataset(source, validation_share=2)
    with pytest.raises(SimIPUError, match="leave validation_share out"):  # it has a validation split
        load_pretraining_dataset(data_dir=object_root, validation_share=0.5)


def test_a_scene_that_is_null_is_made_of_the_name(tmp_path):
    rows = datasets.load_from_disk(save(tmp_path, [f"log{log}/0" for log in range(20)]))
    scenes = [None if index % 2 else scene for index, scene in enumerate(rows["scene"][:])]
    rows.remove_columns("scene").add_column("scene", scenes).save_to_disk(tmp_path / "null")
    options = {"split": "validation", "validation_share": 0.2}
    expected = [row["frame_id"] for row in load_pretraining_dataset(tmp_path / "saved", **options)]
    for streaming in (False, True):
        held_out = load_pretraining_dataset(tmp_path / "null", streaming=streaming, **options)
        assert [row["frame_id"] for row in held_out] == expected
    assert inspect_dataset(tmp_path / "null").scenes == 20


def test_a_stream_that_is_stored_is_fresh_and_leaves_nothing(object_root):
    for count in (60, 30):
        np.ones((count, 4), "<f4").tofile(object_root / "training/velodyne/000000.bin")
        stream = load_pretraining_dataset(data_dir=object_root, whole_scans=True, streaming=True)
        stored = dataset_from_stream(stream)
        assert (len(stored), len(stored[0]["points"])) == (3, count * 16)
        [file] = stored.cache_files
        assert stored.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"] is None
    AT_THE_END.close()
    assert not Path(file["filename"]).exists()


def test_scenes_are_made_of_names():
    scenes = {
        "log7/000123/CAM_FRONT": "log7",
        "drive-12": "drive",
        "2011_09_26_drive_0009_sync_image_03_0000000007": "2011_09_26_drive_0009_sync",
        "000123": "000123",
        "first": "first",
    }
    assert {name: scene_of(name) for name in scenes} == scenes


# --- frames on both sides


def test_shared_frames_are_found_by_content(tmp_path):
    first = dataset_from_rows([make_row(str(index), index) for index in range(6)], tmp_path)
    renamed = make_row("other name", 4)
    same_image = {**make_row("same image", 20), "image": make_row("", 2)["image"]}
    same_scan = {**make_row("same scan", 21), "points": make_row("", 3)["points"]}
    second = dataset_from_rows([make_row("3", 30), renamed, same_image, same_scan], tmp_path)
    expected = [("4", "other name"), ("2", "same image"), ("3", "same scan")]
    assert frames_on_both_sides(first, second) == expected
    damaged = [second[0], {**second[1], "image": {"bytes": None, "path": "absent.png"}}, second[2]]
    damaged.append({**second[3], "image": None})
    damaged = datasets.Dataset.from_list(damaged, features=second.features)
    assert frames_on_both_sides(damaged, first) == [("same image", "2"), ("same scan", "3"), ("other name", "4")]
    assert frames_on_both_sides(first, first.select([])) == []
    empty = [{**second[index], "image": {"bytes": b"", "path": None}} for index in (0, 2)]
    empty = datasets.Dataset.from_list(empty, features=second.features)
    assert frames_on_both_sides(empty.select([0]), empty.select([1])) == []
    with pytest.raises(SimIPUError, match=r"--eval: 3 of 4 frames are also trained on.*'other name', '4' among"):
        refuse_shared_frames(first, second, "--eval")
    refuse_shared_frames(first, second.select([0]), "--eval")


def test_shared_frames_are_found_among_rows_of_many_chunks(tmp_path):
    parts = [
        dataset_from_rows([make_row(f"{part}/{index}", 10 * part + index) for index in range(3)], tmp_path / str(part))
        for part in range(3)
    ]
    found = frames_on_both_sides(datasets.concatenate_datasets(parts), parts[2])
    assert found == [(f"2/{index}",) * 2 for index in range(3)]


def test_few_of_many_images_of_one_length_are_read(tmp_path, monkeypatch):
    rows = [{**make_row(str(index), index), "image": {"bytes": b"%064d" % index, "path": None}} for index in range(20)]
    first = datasets.Dataset.from_list(rows, features=ROW_FEATURES)
    read = []
    monkeypatch.setattr(overlap, "_content", lambda row, content=overlap._content: read.append(row) or content(row))
    second = datasets.Dataset.from_list([{**rows[3], "points": b"1"}, *rows[18:]], features=ROW_FEATURES)
    assert frames_on_both_sides(first.select(range(18)), second) == [("3", "3")]
    assert len(read) == 2
    (tmp_path / "image").write_bytes(rows[7]["image"]["bytes"])
    file = {**make_row("file", 30), "image": {"bytes": None, "path": str(tmp_path / "image")}}
    assert frames_on_both_sides(first, datasets.Dataset.from_list([file], features=ROW_FEATURES)) == [("7", "file")]


def test_shared_files_are_found(object_root):
    train, both = (load_pretraining_dataset(data_dir=object_root, split=split) for split in ("train", "train[2:]+val"))
    assert frames_on_both_sides(train, both) == [("000002", "000002")]


# --- streaming


def stream_of(folder, workers=0, rank=0, ranks=1, on_bad_row="error", **options):
    rows, _ = load_mixture(folder, streaming=True, **options)
    processor = SimIPUProcessor.from_preset("recommended", image_size=(16, 48), num_points=16)
    return stream_two_views(
        rows,
        processor,
        TwoViewAugmentation(),
        seed=7,
        batch_size=2,
        num_workers=workers,
        collate=TwoViewCollator(pad_size_divisor=1),
        process_index=rank,
        num_processes=ranks,
        shuffle_buffer=4,
        on_bad_row=on_bad_row,
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    source = save(folder, [f"log{index // 5}/{index:03d}" for index in range(45)])
    convert_to_parquet(folder / "parquet", source, num_shards=9, num_proc=1)
    return str(folder / "parquet")


def take(loader, count) -> list:
    return [batch for _, batch in zip(range(count), loader, strict=False)]  # and none more of an iterator


def digests(loader, count) -> list:
    return [[batch[name].double().sum().item() for name in sorted(batch)] for batch in take(loader, count)]


def assert_goes_on(create, whole, stop) -> None:
    """Stopped behind some batches of `whole`, another stream gives the rest of them."""
    stopped, resumed = create(), create()
    batches = iter(stopped)
    first = digests(batches, stop)
    state = stopped.state_dict()
    del batches
    resumed.load_state_dict(json.loads(json.dumps(state, default=str)) if stopped.num_workers == 0 else state)
    assert first + digests(resumed, len(whole) - stop) == whole, stop


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (2, 2)])
def test_a_resumed_stream_goes_on_exactly(shards, workers, ranks, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging.getLogger("datasets.iterable_dataset"), "callHandlers", warnings.append)
    for rank in range(ranks):
        create = partial(stream_of, shards, workers, rank, ranks)
        whole = digests(create(), 26 // ranks)
        for stop in (1, 7, 12):
            assert_goes_on(create, whole, stop)
    assert not warnings  # of rows lost in the shuffle buffer


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stream_sees_every_row_of_an_epoch_in_another_order_each_time(shards, ranks):
    rows, _ = load_mixture(shards, split="train", streaming=True)
    seen = [[], []]
    for rank in range(ranks):
        stream = stream_of(shards, 0, rank, ranks).dataset
        for epoch in (0, 1):
            stream.load_state_dict({"epoch": epoch, "rows": None, "done": 0, "count": 0})
            seen[epoch] += [row["frame_id"] for row in stream._rows_of_epoch(epoch)]
    names = sorted(row["frame_id"] for row in rows)
    assert sorted(seen[0]) == sorted(seen[1]) == names
    assert seen[0] != seen[1] != names


def test_streams_are_mixed_by_weight(shards, tmp_path):
    other = save(tmp_path, [f"other/{index}" for index in range(40)], first=1000)
    with pytest.raises(SimIPUError, match="a weight for each data set"):
        load_mixture([shards, other], streaming=True)
    load_mixture([shards, other], mixture=[1, 1000], streaming=True)  # few shards are no few rows
    rows, mixture = load_mixture([shards, other], mixture=[1, 3], streaming=True, seed=1)
    assert mixture.sizes == (9, 40)  # shards
    names = [row["scene"] for row, _ in zip(rows, range(100), strict=False)]
    assert 60 < names.count("other") < 90
    create = partial(stream_of, [shards, other], mixture=[1, 3])
    assert_goes_on(create, digests(create(), 12), 5)
    few = save(tmp_path / "few", ["few/0", "few/1"], first=2000)
    repeated = digests(stream_of([shards, few], mixture=[1, 9]), 12)
    assert len(set(map(tuple, repeated))) == 12  # other views of the two rows each time
    nameless = datasets.load_from_disk(few).remove_columns("scene")
    nameless.save_to_disk(tmp_path / "nameless")
    assert list(load_pretraining_dataset(tmp_path / "nameless")["scene"]) == ["few", "few"]
    slices = [f"{tmp_path / 'nameless'}#train[:1]", f"{tmp_path / 'nameless'}#train[1:]"]
    assert len(take(load_mixture(slices, mixture=[1, 1], streaming=True)[0], 9)) == 2


def test_rows_of_a_generator_may_hold_images_of_any_form(tmp_path):
    image = np.zeros((16, 48, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    rows = [
        {**make_row(f"a/{index}", index), "image": form}
        for index, form in enumerate((str(tmp_path / "image.png"), Image.fromarray(image)))
    ]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    processor = SimIPUProcessor.from_preset("recommended", image_size=(16, 48), num_points=16)
    loader = stream_two_views(
        stream, processor, TwoViewAugmentation(), seed=0, batch_size=2, collate=TwoViewCollator(1)
    )
    assert next(iter(loader))["images"].shape == (2, 3, 16, 48)


def test_a_block_of_large_rows_is_smaller_and_is_resumed_exactly(shards, monkeypatch):
    monkeypatch.setattr(streaming_module, "BLOCK_BYTES", 1)
    stream = stream_of(shards).dataset
    assert len(stream._next_block(iter(stream.rows))[0]) == 1
    create = partial(stream_of, shards)
    assert_goes_on(create, digests(create(), 26), 5)


def test_streams_of_other_writers_are_mixed(shards, tmp_path):
    rows = datasets.load_from_disk(save(tmp_path, [f"other/{index}" for index in range(4)], first=1000))
    types = {"points": datasets.Value("large_binary"), "camera_projection": datasets.Array2D((3, 4), "float32")}
    rows.cast(datasets.Features({**rows.features, **types})).to_parquet(tmp_path / "other" / "train-0.parquet")
    mixed = stream_of([shards, str(tmp_path / "other")], mixture=[1, 3])
    assert len(take(mixed, 6)) == 6
    assert all(isinstance(row["image"], dict) for row in mixed.dataset.rows)


def test_too_few_shards_are_an_error_and_no_multiple_of_the_processes_is_warned_of(shards, caplog):
    with pytest.raises(SimIPUError, match="one shard for each of 10 processes, found 9"):
        stream_of(shards, ranks=10)
    stream_of(shards, ranks=2)
    assert "9 shards are no multiple of 2 processes" in caplog.text


def test_damage_in_a_stream_is_named_or_left_out(tmp_path, caplog):
    rows = [make_row(f"a/{index}", index) for index in range(4)]
    rows[2]["points"] = b"\0" * 20
    dataset_from_rows(rows, tmp_path / "rows").save_to_disk(tmp_path / "saved")
    with pytest.raises(SimIPUError, match="frame a/2: points"):
        take(stream_of(str(tmp_path / "saved")), 4)
    batches = take(stream_of(str(tmp_path / "saved"), on_bad_row="skip"), 3)  # two epochs of three rows
    assert len({batch["points"].sum().item() for batch in batches}) == 3
    assert "left out: frame a/2: points" in caplog.text


def test_images_that_training_does_not_use_are_not_decoded(tmp_path):
    png = io.BytesIO()
    Image.new("L", (48, 16)).save(png, "png")
    rows = datasets.load_from_disk(save(tmp_path, ["a/0", "a/1"]))
    rows = rows.add_column("depth", [{"bytes": png.getvalue()[:45], "path": None}] * 2)
    rows.cast_column("depth", datasets.Image()).save_to_disk(tmp_path / "damaged")
    assert take(stream_of(str(tmp_path / "damaged")), 1)
    stream = load_pretraining_dataset(tmp_path / "damaged", streaming=True)
    other = dataset_from_rows([make_row("b/0", 9)], tmp_path / "other")
    assert [row["frame_id"] for row in refuse_shared_stream(stream, other, "--eval")] == ["a/0", "a/1"]
