"""KITTI's evaluation of detections, slowly and box by box, after the definition in the object development kit.

Written from the published `evaluate_object.cpp` step by step (clean data, statistics without and with false positives,
thresholds, precision), without sharing anything with `simipu_hf.evaluation.detection`.
"""

import math
from itertools import pairwise

from matplotlib.path import Path
from matplotlib.transforms import Bbox

MIN_HEIGHT, MAX_OCCLUSION, MAX_TRUNCATION = (40, 25, 25), (0, 1, 2), (0.15, 0.3, 0.5)
SAMPLES = 41


def objects_of(boxes):
    """One dictionary for each object."""
    scores = boxes.score if boxes.score is not None else [None] * len(boxes)
    return [
        {
            "type": str(boxes.type[i]),
            "truncation": boxes.truncated[i],
            "occlusion": boxes.occluded[i],
            "alpha": boxes.alpha[i],
            "box": tuple(boxes.bbox[i]),
            "size": tuple(boxes.dimensions[i]),
            "place": tuple(boxes.location[i]),
            "yaw": boxes.rotation_y[i],
            "score": scores[i],
        }
        for i in range(len(boxes))
    ]


def corners(o):
    """The four corners from above, counter-clockwise or clockwise."""
    (x, _, z), (_, width, length), yaw = o["place"], o["size"], o["yaw"]
    c, s = math.cos(yaw), math.sin(yaw)
    offsets = [(length / 2, width / 2), (length / 2, -width / 2), (-length / 2, -width / 2), (-length / 2, width / 2)]
    return [(x + c * a + s * b, z - s * a + c * b) for a, b in offsets]


def shared_area(a, b):
    """Area that two objects share from above: the first's outline, cut by matplotlib in the axes of the second."""
    (x, _, z), (_, width, length), yaw = b["place"], b["size"], b["yaw"]
    c, s = math.cos(yaw), math.sin(yaw)
    outline = [(c * (px - x) - s * (pz - z), s * (px - x) + c * (pz - z)) for px, pz in corners(a)]
    half = abs(length) / 2, abs(width) / 2
    cut = Path([*outline, outline[0]], closed=True).clip_to_bbox(Bbox([[-half[0], -half[1]], half])).vertices.tolist()
    return abs(sum(ax * by - bx * ay for (ax, ay), (bx, by) in pairwise([*cut, *cut[:1]]))) / 2


def overlap_2d(a, b, of_first=False):
    w = min(a["box"][2], b["box"][2]) - max(a["box"][0], b["box"][0])
    h = min(a["box"][3], b["box"][3]) - max(a["box"][1], b["box"][1])
    if w <= 0 or h <= 0:
        return 0.0
    area = [(o["box"][2] - o["box"][0]) * (o["box"][3] - o["box"][1]) for o in (a, b)]
    return w * h / (area[0] if of_first else area[0] + area[1] - w * h)


def overlap_bev(a, b, of_first=False):
    shared = shared_area(a, b)
    area = [abs(o["size"][1] * o["size"][2]) for o in (a, b)]
    return shared / (area[0] if of_first else area[0] + area[1] - shared)


def overlap_3d(a, b, of_first=False):
    bottom = min(a["place"][1], b["place"][1])
    top = max(a["place"][1] - a["size"][0], b["place"][1] - b["size"][0])
    shared = shared_area(a, b) * max(0.0, bottom - top)
    volume = [o["size"][0] * o["size"][1] * o["size"][2] for o in (a, b)]
    return shared / (volume[0] if of_first else volume[0] + volume[1] - shared)


OVERLAPS = {"2d": overlap_2d, "bev": overlap_bev, "3d": overlap_3d}


def clean(name, truth, found, level):
    """Flags of labels and detections (0 counts, 1 ignored, -1 another class), DontCare regions, labels that count."""
    flags_truth, flags_found, count = [], [], 0
    for o in truth:
        height = o["box"][3] - o["box"][1]
        if o["type"] == name:
            valid = 1
        elif (name, o["type"]) in (("Car", "Van"), ("Pedestrian", "Person_sitting")):
            valid = 0
        else:
            valid = -1
        ignore = (
            o["occlusion"] > MAX_OCCLUSION[level]
            or o["truncation"] > MAX_TRUNCATION[level]
            or height <= MIN_HEIGHT[level]
        )
        if valid == 1 and not ignore:
            flags_truth.append(0)
            count += 1
        elif valid == 0 or (ignore and valid == 1):
            flags_truth.append(1)
        else:
            flags_truth.append(-1)
    for o in found:
        height = int(abs(o["box"][1] - o["box"][3]))
        flags_found.append(1 if height < MIN_HEIGHT[level] else 0 if o["type"] == name else -1)
    return flags_truth, flags_found, [o for o in truth if o["type"] == "DontCare"], count


def statistics(truth, found, regions, flags_truth, flags_found, overlap, least, with_errors, threshold=0.0):
    """True and false positives, scores of the true ones, summed orientation similarity of one frame."""
    assigned, low = [False] * len(found), [with_errors and o["score"] < threshold for o in found]
    tp, fp, scores, angles = 0, 0, [], []
    for i, label in enumerate(truth):
        if flags_truth[i] == -1:
            continue
        index, valid, best, took_ignored = -1, None, 0.0, False
        for j, detection in enumerate(found):
            if flags_found[j] == -1 or assigned[j] or low[j]:
                continue
            o = overlap(detection, label)
            if o <= least:
                continue
            if not with_errors:
                if valid is None or detection["score"] > valid:
                    index, valid = j, detection["score"]
            elif flags_found[j] == 0 and (o > best or took_ignored):
                index, valid, best, took_ignored = j, 1, o, False
            elif flags_found[j] == 1 and valid is None:
                index, valid, took_ignored = j, 1, True
        if valid is None:
            continue
        assigned[index] = True
        if flags_truth[i] == 1 or flags_found[index] == 1:
            continue
        tp += 1
        scores.append(found[index]["score"])
        angles.append(label["alpha"] - found[index]["alpha"])
    if with_errors:
        fp = sum(not (assigned[j] or flags_found[j] in (-1, 1) or low[j]) for j in range(len(found)))
        for region in regions:
            for j, detection in enumerate(found):
                if assigned[j] or flags_found[j] in (-1, 1) or low[j]:
                    continue
                if overlap(detection, region, of_first=True) > least:
                    assigned[j] = True
                    fp -= 1
    return tp, fp, scores, sum((1 + math.cos(angle)) / 2 for angle in angles)


def get_thresholds(scores, count):
    scores = sorted(scores, reverse=True)
    thresholds, recall = [], 0.0
    for i, score in enumerate(scores):
        left = (i + 1) / count
        right = (i + 2) / count if i < len(scores) - 1 else left
        if right - recall < recall - left and i < len(scores) - 1:
            continue
        thresholds.append(score)
        recall += 1.0 / (SAMPLES - 1.0)
    return thresholds


def average_precision(predictions, labels, name, metric, level, least):
    """Average precision and orientation similarity in percent, over 40 recall positions."""
    frames = [(objects_of(t), objects_of(f)) for t, f in zip(labels, predictions, strict=True)]
    cleaned = [clean(name, truth, found, level) for truth, found in frames]
    count, scores, overlap = sum(c[3] for c in cleaned), [], OVERLAPS[metric]
    for (truth, found), (flags_truth, flags_found, regions, _) in zip(frames, cleaned, strict=True):
        scores += statistics(truth, found, regions, flags_truth, flags_found, overlap, least, False)[2]
    precision, similarity = [0.0] * SAMPLES, [0.0] * SAMPLES
    for k, threshold in enumerate(get_thresholds(scores, count)):
        tp = fp = similar = 0
        for (truth, found), (flags_truth, flags_found, regions, _) in zip(frames, cleaned, strict=True):
            part = statistics(truth, found, regions, flags_truth, flags_found, overlap, least, True, threshold)
            tp, fp, similar = tp + part[0], fp + part[1], similar + part[3]
        if tp + fp:
            precision[k], similarity[k] = tp / (tp + fp), similar / (tp + fp)
    precision = [max(precision[k:]) for k in range(SAMPLES)]
    similarity = [max(similarity[k:]) for k in range(SAMPLES)]
    return 100 * sum(precision[1:]) / 40, 100 * sum(similarity[1:]) / 40
