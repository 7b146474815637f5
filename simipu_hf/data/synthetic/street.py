"""A random street, everything on it, and what rays hit of that.

World frame: x along the street, y left, z up, metres, the recording car at x = 0. The street bends like a parabola;
places on it are (s, d): metres ahead, metres to the left of its centre line. Traffic keeps to the right.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from trimesh.util import concatenate

from .appearance import Lighting, Material
from .rays import Triangles
from .shapes import HOUSE_DEPTH, MAKERS

FIRST, LAST, LANE = -40.0, 140.0, 3.5
LABELLED = ("Car", "Van", "Truck", "Pedestrian", "Cyclist")
GROUND = -1  # owner of what lies on the ground


class Hits(NamedTuple):
    """First hits of N rays: `directions` (N, 3), `distance` (N,) in their units, inf where nothing is hit.

    Of the M hits: `rays` (M,) indices into N; `points`, `normals` (M, 3) in the world, normals towards the ray;
    `cosine` (M,) of the angle of incidence; `owner` (M,) index of the actor; `material` (M,), `color` (M, 3) and
    `place` (M, 2) in metres along the surface.
    """

    directions: np.ndarray
    distance: np.ndarray
    rays: np.ndarray
    points: np.ndarray
    normals: np.ndarray
    cosine: np.ndarray
    owner: np.ndarray
    material: np.ndarray
    color: np.ndarray
    place: np.ndarray


class Model:
    """A shape in its own frame: of each face corners (F, 3, 3), normal (F, 3), the two axes (F, 2) that it is least
    tilted against, material (F,) and colour (F, 3); and all of it ready for ray casting."""

    def __init__(self, kind: str, number: int):
        mesh: Any = concatenate(MAKERS[kind](np.random.default_rng((list(MAKERS).index(kind), number))))
        self.corners, self.normals = np.asarray(mesh.triangles, np.float32), np.asarray(mesh.face_normals, np.float32)
        self.axes = np.array([[1, 2], [0, 2], [0, 1]])[np.abs(self.normals).argmax(axis=1)]
        self.material, self.color = (mesh.face_attributes[name] for name in ("material", "color"))
        self.triangles = Triangles(self.corners)


class Actor(NamedTuple):
    """A thing on the street: kind (a KITTI class or another of MAKERS), 4 x 4 pose, factor (3,) of its colours."""

    kind: str
    model: Model
    pose: np.ndarray
    tint: np.ndarray


shared_model = lru_cache(maxsize=256)(Model)  # by all streets: making a model costs more than placing it


class Street:
    """A random street with its light, buildings, trees, parked cars, traffic and people, ready for ray casting."""

    def __init__(self, rng: np.random.Generator):
        self.lighting = Lighting(rng)
        self.bend, self.lanes = rng.uniform(-0.004, 0.004), LANE * (1 if rng.random() < 0.85 else 2)
        self.dash, self.parking = rng.choice([3.0, 4.5, 6.0]), rng.random(2) < 0.7
        self.kerb = self.lanes + np.where(self.parking, 2.2, 0.3)  # of the left and the right side
        self.walk = self.kerb + rng.uniform(1.8, 3.5, 2)
        self.colors = np.zeros((len(Material), 3), np.float32)
        self.colors[Material.ROAD_PAINT], self.colors[Material.ASPHALT] = 0.55, rng.uniform(0.06, 0.16)
        self.colors[Material.PAVEMENT] = rng.uniform(0.22, 0.4) * rng.uniform([1, 0.88, 0.8], 1)
        self.colors[Material.GRASS] = rng.uniform([0.05, 0.12, 0.02], [0.12, 0.19, 0.05])
        self.actors = [*self._line(rng, 0), *self._line(rng, 1)]
        columns = []
        for owner, actor in enumerate(self.actors):
            model, pose = actor.model, actor.pose.astype(np.float32)
            rotation, origin = pose[:3, :3], pose[:3, 3]
            axes = rotation.T[model.axes]
            corners, normals = model.corners @ rotation.T + origin, model.normals @ rotation.T
            owners = np.full(len(corners), owner, np.int32)
            columns.append((corners, normals, axes, axes @ origin, owners, model.material, model.color * actor.tint))
        corners, *self._faces = (np.concatenate(column) for column in zip(*columns, strict=True))
        self.triangles = Triangles(corners)

    def pose(self, s: float, d: float, yaw: float = 0.0) -> np.ndarray:
        """4 x 4 pose in the world of something on the ground at (s, d), turned by `yaw` against the street."""
        heading = np.arctan(self.bend * s)
        pose = np.eye(4)
        pose[:2, 3] = s - d * np.sin(heading), self.bend * s**2 / 2 + d * np.cos(heading)
        cos, sin = np.cos(heading + yaw), np.sin(heading + yaw)
        pose[:2, :2] = [[cos, -sin], [sin, cos]]
        return pose

    def ground(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Material (N,), colour (N, 3) and place (N, 2) of the ground at points (N, 3): road, marks, pavement."""
        s = points[:, 0]
        d = (points[:, 1] - self.bend * s**2 / 2) / np.sqrt(1 + (self.bend * s) ** 2)
        out, (kerb, walk) = np.abs(d), (np.where(d > 0, *edge) for edge in (self.kerb, self.walk))
        line = (out < 0.06) & (s % (2 * self.dash) < self.dash) | (np.abs(out - self.lanes + 0.1) < 0.06)
        line |= ((s + 10 * self.dash) % 90 < 3.5) & (out < self.lanes - 0.3) & (d % 1 < 0.5)  # pedestrian crossings
        kinds = [Material.ROAD_PAINT, Material.ASPHALT, Material.PAVEMENT]
        material = np.select([line, out < kerb, out < walk], kinds, Material.GRASS)
        patch = (out < kerb) & (np.sin(np.floor(s / 23) * 78.2 + np.floor(d / 2.6) * 12.9) > 0.8)
        return material, self.colors[material] * np.where(patch, 0.72, 1)[:, None], np.stack([s, d], axis=1)

    def cast(self, origin: np.ndarray, directions: np.ndarray) -> Hits:
        """First hits of rays from one `origin` (3,) along `directions` (N, 3), not necessarily of unit length."""
        directions = np.ascontiguousarray(directions, np.float32)
        triangle, reach = self.triangles.first(origin, directions)
        on_ground = np.float32(-origin[2]) / np.minimum(directions[:, 2], np.float32(-1e-6))
        on_ground[on_ground > 400] = np.inf
        distance = np.minimum(on_ground, reach)
        rays = np.flatnonzero(distance < np.inf)
        ground = np.flatnonzero(on_ground[rays] < reach[rays])
        points = np.asarray(origin, np.float32) + distance[rays, None] * directions[rays]
        normals, axes, shift, owner, material, color = (column[triangle[rays]] for column in self._faces)
        place = np.einsum("nij,nj->ni", axes, points) - shift
        normals[ground], owner[ground] = [0, 0, 1], GROUND
        material[ground], color[ground], place[ground] = self.ground(points[ground])
        toward = -np.einsum("ij,ij->i", normals, directions[rays])
        cosine = np.abs(toward) / np.linalg.norm(directions[rays], axis=1)
        normals *= np.sign(toward)[:, None]
        return Hits(directions, distance, rays, points, normals, cosine, owner, material, color, place)

    def _line(self, rng: np.random.Generator, right: int) -> Iterator[Actor]:
        """Everything on one side of the street, outwards from the middle."""
        kerb, walk, row = self.kerb[right], self.walk[right], partial(self._row, rng, right)
        for lane in np.arange(LANE / 2, self.lanes, LANE):
            yield from row("Car Car Car Car Car Van Truck", lane, 14 + rng.exponential(40), clear=9)
        yield from row("Cyclist", self.lanes - 0.35, 70, clear=4)
        if self.parking[right]:
            yield from row("Car Car Car Car Car Van", self.lanes + 1.1, rng.exponential(4))
        yield from row("Pole Pole Tree", kerb + 0.4, rng.uniform(8, 30))
        for gap in rng.uniform(10, 150, 3):
            yield from row("Pedestrian", rng.uniform(kerb + 0.9, walk - 0.3), gap, yaw=np.pi * rng.integers(2))
        setback = rng.choice([0.3, 2.5, 6.0])
        yield from row("House", walk + setback + HOUSE_DEPTH / 2, rng.choice([0.2, 1.0, 4.0, 12.0]))
        for beyond in (6, 12, 22):
            yield from row("Tree", walk + beyond, 20)

    def _row(
        self, rng: np.random.Generator, right: int, kinds: str, d: float, gap: float, clear: float = 0, yaw: float = 0
    ) -> Iterator[Actor]:
        """Things of random kinds along a line `d` metres beside the middle, about `gap` metres apart.

        They look along the traffic of their side; `clear` metres around the recording car stay empty.
        """
        s = FIRST + rng.uniform(0, gap)
        while s < LAST:
            kind = str(rng.choice(kinds.split()))
            model = shared_model(kind, int(rng.integers(20)))
            length: Any = np.ptp(model.corners[..., 0])
            s += length / 2
            towards = (0 if right else np.pi) + yaw + rng.normal(0, 0.03)
            pose = self.pose(s, (-d if right else d) + rng.normal(0, 0.1), towards)
            if not clear or abs(s) > clear + length / 2:
                tint = rng.uniform(0.6, 1.1) * rng.uniform(0.8, 1.0, 3)
                yield Actor(kind, model, pose, tint.astype(np.float32))
            s += length / 2 + 0.2 + min(rng.exponential(gap), 3 * gap)
