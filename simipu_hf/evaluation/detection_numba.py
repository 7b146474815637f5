"""What KITTI's evaluation does for every pair of boxes and every threshold, compiled by Numba."""

from typing import NamedTuple

import numpy as np

from simipu_hf.modeling.point_ops_numba import jit

# what a label or a detection is to a class and a difficulty
COUNTED, IGNORED, OTHER, DONT_CARE = 0, 1, -1, -2


class Frames(NamedTuple):
    """All frames in flat arrays: objects of frame f are `starts[f]` to `starts[f + 1]`; pairs run over the detections
    of a frame and, for each, over its labels."""

    detection_starts: np.ndarray
    label_starts: np.ndarray
    pair_starts: np.ndarray
    scores: np.ndarray
    detection_angles: np.ndarray
    label_angles: np.ndarray


@jit()
def match_all(frames, detection_roles, label_roles, overlaps, covered, min_overlap, thresholds, counting):
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


@jit()
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


@jit()
def pair_overlaps(detection_starts, label_starts, pair_starts, image_boxes, image_labels, boxes, labels):
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


@jit()
def _image_overlap(a, b):
    """Intersection over union of two image boxes, and over the area of the first."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0, 0.0
    shared, area = width * height, (a[2] - a[0]) * (a[3] - a[1])
    return shared / (area + (b[2] - b[0]) * (b[3] - b[1]) - shared), shared / area


@jit()
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


@jit()
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
