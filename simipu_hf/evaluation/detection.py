"""KITTI's evaluation of 3-D detection, as the benchmark's development kit defines it (`evaluate_object.cpp`).

    predictions = read_objects_folder("predictions", with_scores=True)
    labels = read_objects_folder("KITTI/training/label_2")
    result = evaluate_detection(list(predictions.values()), [labels[name] for name in predictions])
    result["Car"]["3d"]["moderate"]

Average precision over 40 recall positions in the image (2d), from above (bev) and in space (3d), and average
orientation similarity (aos) in the image: Geiger, Lenz and Urtasun, CVPR 2012; 40 positions: Simonelli et al.,
ICCV 2019.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from simipu_hf.data.kitti_objects import NEIGHBOURS, KittiObjects
from simipu_hf.errors import SimIPUError
from simipu_hf.evaluation.detection_numba import (
    COUNTED,
    DONT_CARE,
    IGNORED,
    OTHER,
    Frames,
    match_all,
    pair_overlaps,
)

DIFFICULTIES = ("easy", "moderate", "hard")
MIN_HEIGHT = (40.0, 25.0, 25.0)
"""Pixels that a label is higher than, and that a detection has at least."""
MAX_OCCLUSION = (0, 1, 2)
MAX_TRUNCATION = (0.15, 0.30, 0.50)
MIN_OVERLAP = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
RECALL_POSITIONS = 41
"""Thresholds; the first, at recall 0, does not count."""


def evaluate_detection(
    predictions: Sequence[KittiObjects],
    labels: Sequence[KittiObjects],
    classes: Sequence[str] = ("Car", "Pedestrian", "Cyclist"),
    min_overlap: Mapping[str, float] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Average precision in percent: class -> `2d`, `bev`, `3d`, `aos` -> `easy`, `moderate`, `hard`.

    Args:
        predictions: with scores, one item a frame.
        labels: of the same frames, in the same order, DontCare regions among them.
        classes: to evaluate.
        min_overlap: class -> intersection over union that a match exceeds; 0.7 for cars and 0.5 for others where it
            doesn't say.

    Returns:
        0 where there is no label of a class and difficulty, as the development kit does. `aos` is left out where a
        prediction has no angle (alpha -10).

    Raises:
        SimIPUError: numbers of frames differ, or predictions have no scores.
    """
    if len(predictions) != len(labels):
        raise SimIPUError(
            f"expected predictions and labels of the same frames, found {len(predictions)} and {len(labels)}"
        )
    for index, objects in enumerate(predictions):
        if objects.score is None:
            raise SimIPUError(f"predictions of frame {index}: expected scores, found none")
    frames, detections, truth = _flatten(predictions, labels)
    overlaps = _overlaps(frames, detections, truth)
    covered = overlaps.pop("covered")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name in classes:
        least = {**MIN_OVERLAP, **(min_overlap or {})}.get(name, 0.5)
        result[name] = {metric: {} for metric in ("2d", "bev", "3d", "aos")}
        for level, difficulty in enumerate(DIFFICULTIES):
            roles = _detection_roles(detections, name, level), label_roles(truth, name, level)
            for metric, pairs in overlaps.items():
                excused = covered if metric == "2d" else np.zeros(0)
                precision, similarity = _curves(frames, *roles, pairs, excused, least)
                result[name][metric][difficulty] = float(100 * precision[1:].mean())
                if metric == "2d":
                    result[name]["aos"][difficulty] = float(100 * similarity[1:].mean())
        if (detections.alpha == -10).any():
            del result[name]["aos"]
    return result


def _flatten(
    predictions: Sequence[KittiObjects], labels: Sequence[KittiObjects]
) -> tuple[Frames, KittiObjects, KittiObjects]:
    counts = np.array([[len(found), len(true)] for found, true in zip(predictions, labels, strict=True)], np.int64)
    counts = counts.reshape(-1, 2)
    pairs = counts[:, :1] * counts[:, 1:]
    starts = np.concatenate([np.zeros((1, 3), int), np.cumsum(np.hstack([counts, pairs]), axis=0)])
    detections, truth = _join(predictions), _join(labels)
    assert detections.score is not None
    first, first_label, first_pair = np.ascontiguousarray(starts.T)
    frames = Frames(first, first_label, first_pair, detections.score, detections.alpha, truth.alpha)
    return frames, detections, truth


def _join(objects: Sequence[KittiObjects]) -> KittiObjects:
    empty = KittiObjects.from_row({name: [] for name in (*KittiObjects.__annotations__,)})
    parts = [empty, *objects]
    names = [name for name in KittiObjects.__annotations__ if all(getattr(part, name) is not None for part in parts)]
    return KittiObjects(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def label_roles(labels: KittiObjects, name: str, level: int) -> np.ndarray:
    """What every label is to a class and difficulty: counted, ignored, another class, a DontCare region."""
    hard = (labels.occluded > MAX_OCCLUSION[level]) | (labels.truncated > MAX_TRUNCATION[level])
    hard |= labels.bbox[:, 3] - labels.bbox[:, 1] <= MIN_HEIGHT[level]
    of_class, neighbour = labels.type == name, labels.type == NEIGHBOURS.get(name, "")
    choices = [COUNTED, IGNORED, DONT_CARE]
    return np.select([of_class & ~hard, of_class | neighbour, labels.type == "DontCare"], choices, OTHER)


def _detection_roles(detections: KittiObjects, name: str, level: int) -> np.ndarray:
    """What every detection is: counted, ignored (too small, whatever its class) or of another class."""
    small = np.abs(detections.bbox[:, 3] - detections.bbox[:, 1]) < MIN_HEIGHT[level]
    return np.select([small, detections.type == name], [IGNORED, COUNTED], OTHER)


def _curves(
    frames: Frames,
    detection_roles: np.ndarray,
    label_roles: np.ndarray,
    overlaps: np.ndarray,
    covered: np.ndarray,
    min_overlap: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and orientation similarity (41,) at the recall positions, each the best of those behind it."""
    pairs = detection_roles, label_roles, overlaps, covered, min_overlap
    matched = match_all(frames, *pairs, np.array([-np.inf]), False)[0]
    thresholds = _recall_thresholds(np.sort(frames.scores[matched])[::-1], int((label_roles == COUNTED).sum()))
    _, counts = match_all(frames, *pairs, thresholds, True)
    curves = np.zeros((2, RECALL_POSITIONS))
    found = np.maximum(counts[:, 0] + counts[:, 1], 1)
    curves[0, : len(counts)], curves[1, : len(counts)] = counts[:, 0] / found, counts[:, 2] / found
    best = np.maximum.accumulate(curves[:, ::-1], axis=1)[:, ::-1]
    return best[0], best[1]


def _recall_thresholds(scores: np.ndarray, num_labels: int) -> np.ndarray:
    """Scores (at most 41), from the highest down, at which recall is nearest to each recall position."""
    thresholds, recall = [], 0.0
    for index, score in enumerate(scores):
        last = index == len(scores) - 1
        here, after = (index + 1) / num_labels, (index + 1 + (not last)) / num_labels
        if last or after - recall >= recall - here:
            thresholds.append(score)
            recall += 1 / (RECALL_POSITIONS - 1)
    return np.array(thresholds)


def _overlaps(frames: Frames, detections: KittiObjects, labels: KittiObjects) -> dict[str, np.ndarray]:
    """Intersection over union of every pair (P,) by metric; `covered` is the share of the detection's image box."""
    order = [0, 2, 5, 4, 6, 1, 3]  # x, z, length, width, rotation_y, y of the bottom, height
    upright = [
        np.c_[boxes.location, boxes.dimensions, boxes.rotation_y].take(order, axis=1) for boxes in (detections, labels)
    ]
    starts = frames.detection_starts, frames.label_starts, frames.pair_starts
    values = pair_overlaps(*starts, detections.bbox, labels.bbox, *upright)
    return dict(zip(("2d", "covered", "bev", "3d"), np.ascontiguousarray(values.T), strict=True))
