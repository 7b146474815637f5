"""One synthetic frame: everything KITTI would have recorded, and the truth behind it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kitti_objects import KittiObjects
from .sensors import Calibration, Lidar, render
from .street import GROUND, LABELLED, Actor, Street

LABEL_RANGE = 80.0
"""Objects further than this (metres), or of which less than a tenth is visible, are DontCare."""
DONT_CARE: dict[str, Any] = {
    "type": "DontCare", "truncated": -1, "occluded": -1, "alpha": -10, "rotation_y": -10, "dimensions": (-1, -1, -1),
    "location": (-1000, -1000, -1000),
}  # fmt: skip


@dataclass(frozen=True)
class SyntheticFrame:
    """A synchronised camera and LiDAR pair with labels and truth.

    image: (H, W, 3) uint8 RGB.
    depth: (H, W) float32 metres, third row of `calibration.P2`; inf where nothing is hit.
    points: (N, 4) float32 x y z reflectance, LiDAR frame.
    objects: labels, nearest first, DontCare last.
    point_object: (N,) index into `objects` of the thing a point lies on, -1 for everything that has no label.
    pixel_object: (H, W), the same for pixels.
    """

    image: np.ndarray
    depth: np.ndarray
    points: np.ndarray
    calibration: Calibration
    objects: KittiObjects
    point_object: np.ndarray
    pixel_object: np.ndarray


def synthesize_frame(
    seed: int, index: int, *, image_size: tuple[int, int] = (375, 1242), lidar: Lidar | None = None
) -> SyntheticFrame:
    """Frame `index` of the drive named by `seed`, each in a street of its own; a pure function of its arguments.

    frame = synthesize_frame(0, 7, image_size=(96, 320))
    frame.image.shape, frame.points.shape  # (96, 320, 3), (128445, 4)

    Args:
        image_size: height and width in pixels; the field of view is KITTI's at any width.
        lidar: its resolution and noise; a Velodyne HDL-64E by default.
    """
    rng = np.random.default_rng((seed, index))
    street = Street(rng)
    calibration = Calibration(rng, image_size, street)
    points, point_owner = (lidar or Lidar()).scan(street, calibration, rng)
    image, hits = render(street, calibration, rng)
    pixel_owner = np.full(image_size, GROUND)
    pixel_owner.flat[hits.rays] = hits.owner
    labels: dict[int, dict[str, Any]] = {}
    for owner in np.unique(pixel_owner[pixel_owner != GROUND]).tolist():
        actor = street.actors[owner]
        if actor.kind in LABELLED and (label := _label(actor, calibration, pixel_owner == owner)):
            labels[owner] = label
    owners = sorted(labels, key=lambda owner: (labels[owner]["type"] == "DontCare", labels[owner]["location"][2]))
    object_of = np.full(len(street.actors) + 1, -1)  # the last: the ground's
    object_of[owners] = np.arange(len(owners))
    return SyntheticFrame(
        image=image,
        depth=hits.distance.reshape(image_size),
        points=points,
        calibration=calibration,
        objects=KittiObjects.from_row([labels[owner] for owner in owners]),
        point_object=object_of[point_owner],
        pixel_object=object_of[pixel_owner],
    )


def _label(actor: Actor, calibration: Calibration, seen: np.ndarray) -> dict[str, Any] | None:
    """Label of an actor that is `seen` (H, W); None where it is beside the camera or next to nothing is seen."""
    pose = np.linalg.inv(calibration.camera_to_world) @ actor.pose
    location, forward = pose[:3, 3], pose[:3, 0]
    if not 1 < location[2] < 1.5 * LABEL_RANGE:
        return None
    box, truncated = _image_box(actor.model.corners.reshape(-1, 3) @ pose[:3, :3].T + location, calibration)
    visible = seen.sum() / max(_pixels_alone(actor, calibration, box), 1)
    if visible < 0.1 or location[2] > LABEL_RANGE or truncated > 0.95:
        return DONT_CARE | {"bbox": box} if visible > 0.02 else None
    # KITTI's yaw turns about the camera's y (down), from its x (right)
    rotation_y = np.arctan2(-forward[2], forward[0])
    half_length, half_width, height = np.abs(actor.model.corners).max(axis=(0, 1))
    return {
        "type": actor.kind,
        "truncated": truncated,
        "occluded": 0 if visible > 0.85 else 1 if visible > 0.5 else 2,
        "alpha": np.angle(np.exp(1j * (rotation_y - np.arctan2(location[0], location[2])))),
        "bbox": box,
        "dimensions": (height, 2 * half_width, 2 * half_length),
        "location": location,
        "rotation_y": rotation_y,
    }


def _image_box(vertices: np.ndarray, calibration: Calibration) -> tuple[tuple[float, ...], float]:
    """Left, top, right, bottom of vertices (V, 3) in the image, and the share of the full box that is cut off."""
    pixels = vertices @ calibration.P2[:, :3].T + calibration.P2[:, 3]
    pixels = pixels[pixels[:, 2] > 0.1]
    pixels = pixels[:, :2] / pixels[:, 2:]
    full = np.stack([pixels.min(axis=0), pixels.max(axis=0)])
    height, width = calibration.image_size
    inside = np.clip(full, 0, [width - 1, height - 1])
    return tuple(inside.ravel().tolist()), float(1 - np.prod(inside[1] - inside[0]) / np.prod(full[1] - full[0]))


def _pixels_alone(actor: Actor, calibration: Calibration, box: tuple[float, ...]) -> int:
    """How many pixels of its box an actor would fill if nothing hid it."""
    left, top, right, bottom = (int(edge) for edge in box)
    v, u = np.mgrid[top : bottom + 2, left : right + 2].reshape(2, -1).astype(float)
    origin, directions = calibration.rays(u, v)
    rotation = actor.pose[:3, :3]
    hit, _ = actor.model.triangles.first((origin - actor.pose[:3, 3]) @ rotation, directions @ rotation)
    return int((hit >= 0).sum())
