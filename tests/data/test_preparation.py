"""What the preparation of rows says of labels, and what killed processes leave in its cache."""

import os
import time

from simipu_hf.data.loading import load_pretraining_dataset


def test_labels_that_cannot_be_used_are_logged_and_stop_nothing(object_root, tmp_path, caplog):
    path = object_root / "training/label_2/000000.txt"
    path.write_text("Car 0 0 0 1 1 5 5 1 1 1 0 0 9 0\nCar 0 0 0 1 1 5 5 1 1 1 0 0 9\n")
    rows = load_pretraining_dataset(data_dir=object_root, cache_dir=tmp_path, num_proc=1)
    assert rows[0]["objects"]["type"] == [0, 8]  # a car, and one region, all of the image, of DontCare
    assert f"{path}, line 2: expected 15 fields" in caplog.text


def test_what_killed_processes_left_is_removed(object_root, tmp_path):
    names = [".1234abcd-kitti-old.arrow", ".1234abcd-kitti-at-work.arrow"]
    paths = [tmp_path / "simipu_hf" / name for name in names]
    paths[0].parent.mkdir()
    for path, age in zip(paths, (2 * 24 * 60 * 60, 60), strict=True):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    load_pretraining_dataset(data_dir=object_root, cache_dir=tmp_path, num_proc=1)
    assert [path.exists() for path in paths] == [False, True]
