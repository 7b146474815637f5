"""Rays against a street: its ground, and the triangles of everything on it."""

from typing import NamedTuple

import numpy as np

from .rays import Triangles
from .street import Street

GROUND = -1
"""Owner of what lies on the ground."""


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


class Scene:
    """A street ready for ray casting."""

    def __init__(self, street: Street):
        self.street, columns = street, []
        for owner, actor in enumerate(street.actors):
            model, pose = actor.model, actor.pose.astype(np.float32)
            rotation, origin = pose[:3, :3], pose[:3, 3]
            axes = rotation.T[model.axes]
            corners, normals = model.corners @ rotation.T + origin, model.normals @ rotation.T
            owners = np.full(len(corners), owner, np.int32)
            columns.append((corners, normals, axes, axes @ origin, owners, model.material, model.color * actor.tint))
        corners, *self._faces = (np.concatenate(column) for column in zip(*columns, strict=True))
        self._triangles = Triangles(corners)

    def cast(self, origin: np.ndarray, directions: np.ndarray) -> Hits:
        """First hits of rays from one `origin` (3,) along `directions` (N, 3), not necessarily of unit length."""
        directions = np.ascontiguousarray(directions, np.float32)
        triangle, reach = self._triangles.first(
            np.tile(np.asarray(origin, np.float32), (len(directions), 1)), directions
        )
        on_ground = np.float32(-origin[2]) / np.minimum(directions[:, 2], np.float32(-1e-6))
        on_ground[on_ground > 400] = np.inf
        distance = np.minimum(on_ground, reach)
        rays = np.flatnonzero(distance < np.inf)
        ground = np.flatnonzero(on_ground[rays] < reach[rays])
        points = np.asarray(origin, np.float32) + distance[rays, None] * directions[rays]
        normals, axes, shift, owner, material, color = (column[triangle[rays]] for column in self._faces)
        place = np.einsum("nij,nj->ni", axes, points) - shift
        normals[ground], owner[ground] = [0, 0, 1], GROUND
        material[ground], color[ground], place[ground] = self.street.ground(points[ground])
        toward = -np.einsum("ij,ij->i", normals, directions[rays])
        cosine = np.abs(toward) / np.linalg.norm(directions[rays], axis=1)
        normals *= np.sign(toward)[:, None]
        return Hits(directions, distance, rays, points, normals, cosine, owner, material, color, place)

    def occluded(self, origins: np.ndarray, directions: np.ndarray, reach: float) -> np.ndarray:
        """Whether anything is hit within `reach` times the direction, (N,) bool."""
        return self._triangles.occluded(np.asarray(origins, np.float32), np.asarray(directions, np.float32), reach)
