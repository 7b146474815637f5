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
from typing import NamedTuple

import numba
import numpy as np

from simipu_hf.data.kitti_objects import NEIGHBOURS, KittiObjects
from simipu_hf.errors import SimIPUError

DIFFICULTIES = ("easy", "moderate", "hard")
MIN_HEIGHT = (40.0, 25.0, 25.0)
"""Pixels that a label is higher than, and that a detection has at least."""
MAX_OCCLUSION = (0, 1, 2)
MAX_TRUNCATION = (0.15, 0.30, 0.50)
MIN_OVERLAP = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
RECALL_POSITIONS = 41
"""Thresholds; the first, at recall 0, does not count."""

COUNTED, IGNORED, OTHER, DONT_CARE = 0, 1, -1, -2


class _Frames(NamedTuple):
    """All frames in flat arrays: objects of frame f are `starts[f]` to `starts[f + 1]`; pairs run over the detections
    of a frame and, for each, over its labels."""

    detection_starts: np.ndarray
    label_starts: np.ndarray
    pair_starts: np.ndarray
    scores: np.ndarray
    detection_angles: np.ndarray
    label_angles: np.ndarray


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
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name in classes:
        least = {**MIN_OVERLAP, **(min_overlap or {})}.get(name, 0.5)
        result[name] = {metric: {} for metric in ("2d", "bev", "3d", "aos")}
        for level, difficulty in enumerate(DIFFICULTIES):
            roles = _detection_roles(detections, name, level), _label_roles(truth, name, level)
            for metric, pairs in overlaps.items():
                covered = overlaps["covered"] if metric == "2d" else np.zeros(0)
                if metric != "covered":
                    precision, similarity = _curves(frames, *roles, pairs, covered, least)
                    result[name][metric][difficulty] = float(100 * precision[1:].mean())
                if metric == "2d":
                    result[name]["aos"][difficulty] = float(100 * similarity[1:].mean())
        if (detections.alpha == -10).any():
            del result[name]["aos"]
    return result


def _flatten(
    predictions: Sequence[KittiObjects], labels: Sequence[KittiObjects]
) -> tuple[_Frames, KittiObjects, KittiObjects]:
    counts = np.array([[len(found), len(true)] for found, true in zip(predictions, labels, strict=True)]).reshape(
        -1, 2
    )
    pairs = counts[:, :1] * counts[:, 1:]
    starts = np.concatenate([np.zeros((1, 3), int), np.cumsum(np.hstack([counts, pairs]), axis=0)])
    detections, truth = _join(predictions), _join(labels)
    assert detections.score is not None
    frames = _Frames(*np.ascontiguousarray(starts.T), detections.score, detections.alpha, truth.alpha)
    return frames, detections, truth


def _join(objects: Sequence[KittiObjects]) -> KittiObjects:
    empty = KittiObjects.from_row({name: [] for name in (*KittiObjects.__annotations__,)})
    parts = [empty, *objects]
    names = [name for name in KittiObjects.__annotations__ if all(getattr(part, name) is not None for part in parts)]
    return KittiObjects(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _label_roles(labels: KittiObjects, name: str, level: int) -> np.ndarray:
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
    frames: _Frames,
    detection_roles: np.ndarray,
    label_roles: np.ndarray,
    overlaps: np.ndarray,
    covered: np.ndarray,
    min_overlap: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and orientation similarity (41,) at the recall positions, each the best of those behind it."""
    pairs = detection_roles, label_roles, overlaps, covered, min_overlap
    matched = _match_all(frames, *pairs, np.array([-np.inf]), False)[0]
    thresholds = _recall_thresholds(np.sort(frames.scores[matched])[::-1], int((label_roles == COUNTED).sum()))
    _, counts = _match_all(frames, *pairs, thresholds, True)
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


@numba.njit(cache=True, nogil=True)
def _match_all(frames, detection_roles, label_roles, overlaps, covered, min_overlap, thresholds, counting):
    """Detections (N,) that are true positives at the last threshold; true positives, false positives and summed
    similarity (T, 3) at every threshold."""
    matched, taken = np.zeros(len(detection_roles), np.bool_), np.zeros(len(detection_roles), np.bool_)
    totals = np.zeros((len(thresholds), 3))
    pairs = (overlaps, covered, min_overlap)
    for frame in range(len(frames.pair_starts) - 1):
        for index in range(len(thresholds)):
            _match(
                frames,
                frame,
                detection_roles,
                label_roles,
                pairs,
                thresholds[index],
                counting,
                taken,
                matched,
                totals[index],
            )
    return matched, totals


@numba.njit(cache=True, nogil=True)
def _match(frames, frame, detection_roles, label_roles, pairs, threshold, counting, taken, matched, total):
    """Match the detections of a frame that reach `threshold` to its labels, and add to `total`.

    While thresholds are collected a label takes the detection with the highest score; while errors are counted the one
    that overlaps most, and one that is too small only where there is no other.
    """
    overlaps, covered, min_overlap = pairs
    first, last = frames.detection_starts[frame], frames.detection_starts[frame + 1]
    first_label, last_label = frames.label_starts[frame], frames.label_starts[frame + 1]
    pair, labels = frames.pair_starts[frame], last_label - first_label
    taken[first:last] = False
    for label in range(labels):
        if label_roles[first_label + label] < COUNTED:
            continue
        chosen, best = -1, -np.inf
        for detection in range(first, last):
            role, overlap = detection_roles[detection], overlaps[pair + (detection - first) * labels + label]
            if role == OTHER or taken[detection] or frames.scores[detection] < threshold or not overlap > min_overlap:
                continue
            worth = frames.scores[detection]
            if counting:
                worth = overlap if role == COUNTED else -1.0
            if worth > best:
                chosen, best = detection, worth
        if chosen < 0:
            continue
        taken[chosen] = True
        if label_roles[first_label + label] == COUNTED and detection_roles[chosen] == COUNTED:
            matched[chosen] = True
            total[0] += 1
            total[2] += (1 + np.cos(frames.label_angles[first_label + label] - frames.detection_angles[chosen])) / 2
    for detection in range(first, last):
        if taken[detection] or detection_roles[detection] != COUNTED or frames.scores[detection] < threshold:
            continue
        excused = False
        if len(covered):
            for label in range(labels):
                share = covered[pair + (detection - first) * labels + label]
                excused |= label_roles[first_label + label] == DONT_CARE and share > min_overlap
        total[1] += not excused


def _overlaps(frames: _Frames, detections: KittiObjects, labels: KittiObjects) -> dict[str, np.ndarray]:
    """Intersection over union of every pair (P,) by metric; `covered` is the share of the detection's image box."""
    upright = [
        np.c_[
            boxes.location[:, [0, 2]],
            boxes.dimensions[:, [2, 1]],
            boxes.rotation_y,
            boxes.location[:, 1],
            boxes.dimensions[:, 0],
        ]
        for boxes in (detections, labels)
    ]
    starts = frames.detection_starts, frames.label_starts, frames.pair_starts
    values = _pair_overlaps(*starts, detections.bbox, labels.bbox, *upright)
    return dict(zip(("2d", "covered", "bev", "3d"), np.ascontiguousarray(values.T), strict=True))


@numba.njit(cache=True, nogil=True)
def _pair_overlaps(detection_starts, label_starts, pair_starts, image_boxes, image_labels, boxes, labels):
    """(P, 4): in the image, share of the detection in the image, from above, in space; boxes are x, z, length, width,
    rotation_y, y of the bottom, height."""
    result = np.zeros((pair_starts[-1], 4))
    for frame in range(len(pair_starts) - 1):
        pair = pair_starts[frame]
        for i in range(detection_starts[frame], detection_starts[frame + 1]):
            for j in range(label_starts[frame], label_starts[frame + 1]):
                result[pair, 0], result[pair, 1] = _image_overlap(image_boxes[i], image_labels[j])
                result[pair, 2], result[pair, 3] = _upright_overlap(boxes[i], labels[j])
                pair += 1
    return result


@numba.njit(cache=True, nogil=True)
def _image_overlap(a, b):
    """Intersection over union of two image boxes, and over the area of the first."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0, 0.0
    shared, area = width * height, (a[2] - a[0]) * (a[3] - a[1])
    return shared / (area + (b[2] - b[0]) * (b[3] - b[1]) - shared), shared / area


@numba.njit(cache=True, nogil=True)
def _upright_overlap(a, b):
    """Intersection over union of two boxes from above and in space."""
    if min(a[2], a[3], b[2], b[3]) <= 0 or np.hypot(a[0] - b[0], a[1] - b[1]) > np.hypot(a[2], a[3]) + np.hypot(
        b[2], b[3]
    ):
        return 0.0, 0.0
    shared = rectangle_intersection(a, b)
    height = max(0.0, min(a[5], b[5]) - max(a[5] - a[6], b[5] - b[6]))
    volume = shared * height
    union = a[2] * a[3] * a[6] + b[2] * b[3] * b[6] - volume
    return shared / (a[2] * a[3] + b[2] * b[3] - shared), volume / union if union > 0 else 0.0


@numba.njit(cache=True, nogil=True)
def rectangle_intersection(a, b):
    """Area that two rectangles (x, z, length, width, rotation_y) share: the first is clipped at the four sides of the
    second, in the second's own frame (Sutherland and Hodgman, 1974)."""
    polygon, clipped, count = np.empty((12, 2)), np.empty((12, 2)), 4
    cos, sin, turn = np.cos(b[4]), np.sin(b[4]), a[4] - b[4]
    dx, dz = a[0] - b[0], a[1] - b[1]
    middle_x, middle_z = cos * dx - sin * dz, sin * dx + cos * dz
    for corner in range(4):
        x = a[2] / 2 if corner in (0, 3) else -a[2] / 2
        z = a[3] / 2 if corner < 2 else -a[3] / 2
        polygon[corner, 0] = middle_x + np.cos(turn) * x + np.sin(turn) * z
        polygon[corner, 1] = middle_z - np.sin(turn) * x + np.cos(turn) * z
    for side in range(4):
        axis, sign, limit = side % 2, 1 - 2 * (side // 2), b[2 + side % 2] / 2
        kept = 0
        for index in range(count):
            start, end = polygon[index], polygon[(index + 1) % count]
            inside, after = limit - sign * start[axis], limit - sign * end[axis]
            if inside >= 0:
                clipped[kept] = start
                kept += 1
            if inside * after < 0:
                clipped[kept] = start + (end - start) * (inside / (inside - after))
                kept += 1
        polygon, clipped, count = clipped, polygon, kept
    area = 0.0
    for index in range(count):
        start, end = polygon[index], polygon[(index + 1) % count]
        area += start[0] * end[1] - end[0] * start[1]
    return abs(area) / 2
