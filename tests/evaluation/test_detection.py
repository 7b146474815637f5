"""KITTI's evaluation of detections against a slow implementation of its definition, and its text files."""

import dataclasses
import importlib.util
import math

import numpy as np
import pytest
from numba.core.caching import CompileResultCacheImpl
from oracles.kitti_evaluation import average_precision, shared_area

from simipu_hf.data.kitti_objects import KittiObjects, read_objects_folder, write_objects_folder
from simipu_hf.data.synthetic import rays
from simipu_hf.errors import SimIPUError
from simipu_hf.evaluation import detection_numba
from simipu_hf.evaluation.detection import DIFFICULTIES, evaluate_detection
from simipu_hf.evaluation.detection_numba import rectangle_intersection

LINE = "Car 0.10 1 -1.5 100 120 200 190 1.5 1.6 3.9 2.0 1.6 20.0 -1.4"


def make(rows, scores=None):
    """Objects of (type, truncated, occluded, alpha, bbox, dimensions, location, rotation_y)."""
    names = ("type", "truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return KittiObjects.from_row(columns | ({} if scores is None else {"score": scores}))


def random_labels(rng, count):
    rows = []
    for _ in range(count):
        kind = str(rng.choice(["Car", "Car", "Car", "Van", "Pedestrian", "Person_sitting", "Cyclist", "DontCare"]))
        left, top = rng.uniform(0, 300, 2)
        box = [left, top, left + rng.uniform(20, 120), top + rng.uniform(15, 90)]
        if kind == "DontCare":
            rows.append((kind, -1, -1, -10, box, [-1, -1, -1], [-1000, -1000, -1000], -10))
            continue
        place = [rng.uniform(-10, 10), rng.uniform(1, 2), rng.uniform(5, 40)]
        size = rng.uniform([1.3, 0.6, 0.8], [2, 1.8, 4.5])
        angle = rng.uniform(-3, 3)
        rows.append((kind, rng.choice([0, 0.1, 0.2, 0.4, 0.6]), rng.integers(4), angle, box, size, place, angle + 0.1))
    return rows


def random_frames(seed):
    """Labels and detections: some near labels, some duplicates, some elsewhere, scores with ties."""
    rng = np.random.default_rng(seed)
    predictions, labels = [], []
    for _ in range(12):
        truth = random_labels(rng, rng.integers(0, 12))
        found = random_labels(rng, rng.integers(0, 3))
        for kind, _, _, alpha, box, size, place, yaw in truth:
            if kind == "DontCare":
                size, place = [1.5, 1.6, 4.0], [0, 1.6, 20]
            for _ in range(rng.integers(0, 3)):
                kind = "Car" if kind in ("DontCare", "Van") and rng.random() < 0.8 else kind
                box, size = np.array(box) + rng.normal(0, 2, 4), np.abs(np.array(size) + rng.normal(0, 0.05, 3))
                place = np.array(place) + rng.normal(0, 0.1, 3)
                found.append((kind, -1, -1, alpha + rng.normal(0, 0.3), box, size, place, yaw + rng.normal(0, 0.05)))
        found = [row for row in found if row[0] != "DontCare"]
        labels.append(make(truth))
        predictions.append(make(found, np.round(rng.random(len(found)), 1)))
    return predictions, labels


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("least", [0.5, 0.3])
def test_average_precision_is_that_of_the_definition(seed, least):
    predictions, labels = random_frames(seed)
    found = evaluate_detection(predictions, labels, min_overlap=dict.fromkeys(("Car", "Pedestrian", "Cyclist"), least))
    some = 0
    for name, metrics in found.items():
        for level, difficulty in enumerate(DIFFICULTIES):
            for metric in ("2d", "bev", "3d"):
                expected, aos = average_precision(predictions, labels, name, metric, level, least)
                assert math.isclose(metrics[metric][difficulty], expected, abs_tol=1e-9)
                some += expected > 0
            expected, aos = average_precision(predictions, labels, name, "2d", level, least)
            assert math.isclose(metrics["aos"][difficulty], aos, abs_tol=1e-9)
    assert some > 5


def car(left=100.0, height=60.0, kind="Car", x=0.0, occluded=0):
    return (kind, 0.0, occluded, 0.3, [left, 100, left + 80, 100 + height], [1.5, 1.6, 4], [x, 1.6, 20], 0.3)


DONT_CARE = ("DontCare", -1, -1, -10, [90, 90, 300, 250], [-1, -1, -1], [-1000, -1000, -1000], -10)


@pytest.mark.parametrize(
    ("truth", "found", "scores", "expected"),
    [
        ([car()], [], [], 0),
        ([], [car()], [0.9], 0),
        ([car()], [car()], [0.9], 100),
        ([car()], [car(), car()], [0.9, 0.9], 50),  # a duplicate with the same score is a false positive
        (
            [car(), car(400, x=9)],
            [car(), car(400, x=9), car(700, x=-9)],
            [0.9, 0.5, 0.7],
            100 * (20 + 20 * 2 / 3) / 40,
        ),
        ([car(), car(400, kind="Van", x=9)], [car(), car(400, x=9)], [0.5, 0.9], 100),  # a van is no mistake
        ([car(), car(400, occluded=3, x=9)], [car(), car(400, x=9)], [0.5, 0.9], 100),
        ([car(), car(400, height=20, x=9)], [car(), car(400, height=20, x=9)], [0.5, 0.9], 100),
        ([car(), DONT_CARE], [car(), car(200, x=9)], [0.5, 0.9], (100, 50)),  # regions of the image excuse there alone
    ],
)
def test_cases_by_hand(truth, found, scores, expected):
    """A frame repeated 80 times: fewer labels than recall positions leave the last ones at 0."""
    metrics = evaluate_detection([make(found, scores)] * 80, [make(truth)] * 80, ["Car"])["Car"]
    in_image, in_space = expected if isinstance(expected, tuple) else (expected, expected)
    assert metrics["2d"]["moderate"] == pytest.approx(in_image)
    assert metrics["3d"]["moderate"] == metrics["bev"]["moderate"] == pytest.approx(in_space)


def test_without_frames_nothing_is_found():
    assert evaluate_detection([], [], ["Car"])["Car"]["3d"]["moderate"] == 0


def test_orientation_is_left_out_where_predictions_have_none():
    objects = make([car()], [0.5])
    unknown = dataclasses.replace(objects, alpha=np.array([-10.0]))
    assert "aos" in evaluate_detection([objects], [objects])["Car"]
    assert "aos" not in evaluate_detection([unknown], [objects])["Car"]


@pytest.mark.parametrize("module", [detection_numba, rays])
def test_kernels_are_compiled_where_nothing_can_be_cached(module, monkeypatch):
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.again", module.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_shared_area_of_rectangles():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = rng.uniform([-2, -2, 1, 1, -4], [2, 2, 5, 3, 4], (2, 5))
        boxes = [{"place": (x, 0, z), "size": (1, width, length), "yaw": yaw} for x, z, length, width, yaw in (a, b)]
        assert math.isclose(rectangle_intersection(a, b), shared_area(*boxes), abs_tol=1e-9)
    whole = np.array([0.3, -0.2, 4, 2, 0.7])
    assert rectangle_intersection(whole, whole) == pytest.approx(8)


def test_files_come_back(tmp_path):
    predictions, _ = random_frames(3)
    objects = {f"{index:06d}": frame for index, frame in enumerate(predictions)}
    write_objects_folder(tmp_path / "out", objects)
    back = read_objects_folder(tmp_path / "out", with_scores=True)
    assert list(back) == list(objects)
    for name, frame in objects.items():
        np.testing.assert_array_equal(back[name].type, frame.type)
        for field in ("alpha", "bbox", "dimensions", "location", "rotation_y", "score"):
            np.testing.assert_allclose(getattr(back[name], field), getattr(frame, field), atol=1e-4)
    scores = np.array([1, 0.1, 3e-7, 2e-7, 1e-38, np.nextafter(np.float32(0.3), np.float32(1))], np.float32)
    (tmp_path / "small.txt").write_text(make([car()] * len(scores), scores).to_text(), encoding="utf-8")
    np.testing.assert_array_equal(KittiObjects.read(tmp_path / "small.txt", True).score.astype(np.float32), scores)


@pytest.mark.parametrize(
    ("line", "with_scores", "message"),
    [
        (LINE.replace("Car", "Lorry"), False, "expected a class of .*found 'Lorry'"),
        (LINE.replace("1.5 1.6 3.9", "-1.5 1.6 3.9"), False, "at least 0"),
        (LINE.replace("100 120 200", "300 120 200"), False, "left <= right"),
        (LINE.rsplit(" ", 2)[0], False, "expected 15 fields, found 13"),
        (LINE, True, "a score, found 15"),
        (LINE.replace("20.0", "nan"), False, "finite"),
        (LINE.replace("20.0", "far"), False, "could not convert"),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, with_scores, message):
    (tmp_path / "000001.txt").write_text(f"{LINE} 0.5\n\n{line}\n", encoding="utf-8")
    with pytest.raises(SimIPUError, match=rf"000001.txt, line 3: .*{message}"):
        read_objects_folder(tmp_path, with_scores)


def test_what_cannot_be_evaluated_is_named(tmp_path):
    objects = make([car()])
    with pytest.raises(SimIPUError, match="scores"):
        evaluate_detection([objects], [objects])
    with pytest.raises(SimIPUError, match="found 1 and 2"):
        evaluate_detection([objects], [objects] * 2)
    with pytest.raises(SimIPUError, match="found none"):
        read_objects_folder(tmp_path)
