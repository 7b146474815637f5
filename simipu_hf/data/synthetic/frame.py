"""One synthetic frame: everything KITTI would have recorded, and the truth behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .meshes import Mesh
from .sensors import Calibration, Camera, Layer, Lidar, RayScene, make_calibration, pixel_rays
from .street import Actor, Street, make_street

LABEL_RANGE = 80.0
"""Objects further than this (metres), or of which less than a tenth is visible, are DontCare."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ObjectLabel:
    """The fifteen fields of a line of label_2, in its order (rectified camera frame, metres, radians, pixels)."""

    type: str
    truncated: float
    occluded: int
    alpha: float
    bbox: Box
    dimensions: tuple[float, float, float]
    location: tuple[float, float, float]
    rotation_y: float

    def line(self) -> str:
        """As KITTI writes it."""
        numbers = [self.alpha, *self.bbox, *self.dimensions, *self.location, self.rotation_y]
        return f"{self.type} {self.truncated:.2f} {self.occluded} " + " ".join(f"{number:.2f}" for number in numbers)


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
    objects: tuple[ObjectLabel, ...]
    point_object: np.ndarray
    pixel_object: np.ndarray


@dataclass(frozen=True)
class _Drive:
    """What all frames of a drive share: made once a process."""

    street: Street
    calibration: Calibration
    standing: Layer


@lru_cache(maxsize=1)
def _make_drive(key: tuple[int, ...], image_size: tuple[int, int], duration: float) -> _Drive:
    rng = np.random.default_rng(key)
    street = make_street(rng, duration)
    standing = [(index, actor) for index, actor in enumerate(street.actors) if not actor.speed]
    parts = [street.ground, *(actor.mesh.moved(street.actor_pose(actor, 0)) for _, actor in standing)]
    layer = Layer(parts, [-1, *(index for index, _ in standing)])
    return _Drive(street, make_calibration(rng, image_size), layer)


def synthesize_frame(
    drive: tuple[int, ...],
    step: int,
    *,
    image_size: tuple[int, int] = (375, 1242),
    interval: float = 0.5,
    steps: int = 25,
    lidar: Lidar | None = None,
) -> SyntheticFrame:
    """Frame `step` of `steps` of the drive named by the seed numbers `drive`; a pure function of its arguments.

    Args:
        image_size: height and width in pixels.
        interval: seconds between two frames.
        lidar: its resolution and noise; a Velodyne HDL-64E by default.
    """
    shared = _make_drive(tuple(drive), tuple(image_size), interval * steps)
    street, calibration, time = shared.street, shared.calibration, interval * step
    rng = np.random.default_rng((*drive, step + 1))
    ego_pose = street.ego_pose(time)
    moving = [i for i, actor in enumerate(street.actors) if actor.speed and street.is_near(actor, time)]
    parts = [street.actors[i].mesh.moved(street.actor_pose(street.actors[i], time)) for i in moving]
    scene = RayScene([shared.standing, Layer(parts, moving)] if parts else [shared.standing])
    points, point_owner = (lidar or Lidar()).scan(scene, calibration, ego_pose, rng)
    picture = Camera(calibration, image_size, street.lighting).render(scene, ego_pose, rng)
    objects, owners = _labels(scene, street, calibration, time, image_size)
    object_of = np.full(len(street.actors) + 1, -1, np.int32)  # the last: the ground's owner, -1
    object_of[owners] = np.arange(len(owners))
    return SyntheticFrame(
        image=picture.image,
        depth=picture.depth,
        points=points,
        calibration=calibration,
        objects=objects,
        point_object=object_of[point_owner],
        pixel_object=object_of[picture.owner],
    )


def _labels(
    scene: RayScene, street: Street, calibration: Calibration, time: float, image_size: tuple[int, int]
) -> tuple[tuple[ObjectLabel, ...], list[int]]:
    """Labels of what stands in the image, and the index in `street.actors` of each."""
    ego_pose = street.ego_pose(time)
    to_camera = np.linalg.inv(calibration.camera_to_world(ego_pose))
    seen = []
    for owner, actor in enumerate(street.actors):
        if actor.kind is None or not street.is_near(actor, time):
            continue
        pose = to_camera @ street.actor_pose(actor, time)
        if 1.0 < pose[2, 3] < 1.5 * LABEL_RANGE:
            mesh = actor.mesh.moved(pose)
            box, truncated = _image_box(mesh, calibration, image_size)
            if box is not None:
                seen.append((owner, mesh, pose, box, truncated))
    if not seen:
        return (), []
    owners, placed, poses, boxes, truncations = zip(*seen, strict=True)
    shares = _visible_shares(scene, placed, owners, calibration, ego_pose, image_size)
    labels = [
        (_label(street.actors[owner], *rest), owner, rest[0][2, 3])
        for owner, *rest in zip(owners, poses, boxes, truncations, shares, strict=True)
        if rest[-1] > 0.02
    ]
    labels.sort(key=lambda item: (item[0].type == "DontCare", item[2]))
    return tuple(label for label, _, _ in labels), [owner for _, owner, _ in labels]


def _label(actor: Actor, pose: np.ndarray, box: Box, truncated: float, visible: float) -> ObjectLabel:
    """Label of an actor whose `pose` is in the rectified camera frame."""
    location, forward = pose[:3, 3], pose[:3, 0]
    if visible < 0.1 or location[2] > LABEL_RANGE or truncated > 0.95:
        return ObjectLabel("DontCare", -1, -1, -10, box, (-1, -1, -1), (-1000, -1000, -1000), -10)
    assert actor.kind is not None
    # KITTI's yaw turns about the camera's y (down), from its x (right)
    rotation_y = np.arctan2(-forward[2], forward[0])
    alpha = rotation_y - np.arctan2(location[0], location[2])
    return ObjectLabel(
        type=actor.kind,
        truncated=truncated,
        occluded=0 if visible > 0.85 else 1 if visible > 0.5 else 2,
        alpha=float((alpha + np.pi) % (2 * np.pi) - np.pi),
        bbox=box,
        dimensions=actor.mesh.size,
        location=tuple(location.tolist()),
        rotation_y=float(rotation_y),
    )


def _project(points: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Rectified camera frame (N, 3) -> u, v, depth (N, 3)."""
    u, v, depth = (points @ calibration.P2[:, :3].T + calibration.P2[:, 3]).T
    return np.stack([u / depth, v / depth, depth], axis=1)


def _image_box(mesh: Mesh, calibration: Calibration, image_size: tuple[int, int]) -> tuple[Box | None, float]:
    """Left, top, right, bottom of the mesh in the image (None: not in it), and the share of its full box cut off."""
    corners = _project(mesh.corners.reshape(-1, 3), calibration)
    corners = corners[corners[:, 2] > 0.1]
    if not len(corners):
        return None, 1.0
    height, width = image_size
    (left, top), (right, bottom) = corners[:, :2].min(axis=0), corners[:, :2].max(axis=0)
    box = (
        float(max(left, 0.0)),
        float(max(top, 0.0)),
        float(min(right, width - 1.0)),
        float(min(bottom, height - 1.0)),
    )
    if box[2] <= box[0] or box[3] <= box[1]:
        return None, 1.0
    inside = (box[2] - box[0]) * (box[3] - box[1])
    return box, float(1 - inside / ((right - left) * (bottom - top)))


def _visible_shares(
    scene: RayScene,
    placed: Sequence[Mesh],
    owners: Sequence[int],
    calibration: Calibration,
    ego_pose: np.ndarray,
    image_size: tuple[int, int],
) -> np.ndarray:
    """Share of each mesh (rectified camera frame) in the image that nothing else hides, weighted by projected area."""
    height, width = image_size
    corners = np.concatenate([mesh.corners for mesh in placed])
    item = np.repeat(np.arange(len(placed)), [len(mesh.corners) for mesh in placed])
    middle = corners.mean(axis=1)
    u, v, depth = _project(middle, calibration).T
    shown = (depth > 0.1) & (u > -0.5) & (u < width - 0.5) & (v > -0.5) & (v < height - 0.5)
    corners, middle, item, depth = corners[shown], middle[shown], item[shown], depth[shown]
    area = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    weight = np.abs(np.einsum("ij,ij->i", area, middle)) / depth**3
    first, distance = scene.first(*pixel_rays(calibration, ego_pose, u[shown], v[shown]))
    free = (first == np.asarray(owners)[item]) | (distance > depth - 0.01)
    total = np.bincount(item, weight, len(placed))
    return np.bincount(item, weight * free, len(placed)) / np.maximum(total, 1e-12)
