"""Rays against triangles: Embree where it is installed, else a bounding volume hierarchy in Numba (Linux on ARM)."""

import numpy as np

from ...modeling.point_ops_numba import jit

try:
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene
except ImportError:
    EmbreeScene = None

LEAF = 4


def _rays(origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Origins, one (3,) for all or (N, 3), and directions (N, 3) of any length, as float32 (N, 3)."""
    origins = np.broadcast_to(origins, directions.shape)
    return np.ascontiguousarray(origins, np.float32), np.ascontiguousarray(directions, np.float32)


class EmbreeTriangles:
    """Triangles (T, 3, 3) in Embree. trimesh's own wrapper takes ten times as long: it repeats this in float64."""

    def __init__(self, corners: np.ndarray):
        self._scene = EmbreeScene()
        self._mesh = TriangleMesh(self._scene, np.ascontiguousarray(corners, np.float32))

    def first(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Triangle (N,) that each ray hits first (-1: none), and its distance (N,), inf where there is none."""
        result = self._scene.run(*_rays(origins, directions), output=True)
        return result["primID"], np.where(result["primID"] >= 0, result["tfar"], np.float32(np.inf))

    def occluded(self, origins: np.ndarray, directions: np.ndarray, reach: float) -> np.ndarray:
        """Whether each ray hits anything within `reach` times its direction, (N,) bool."""
        limit = np.full(len(directions), reach, np.float32)
        return self._scene.run(*_rays(origins, directions), dists=limit, query="OCCLUDED") >= 0


class NumbaTriangles:
    """The same without Embree, several times slower: a binary tree of boxes, split at medians."""

    def __init__(self, corners: np.ndarray):
        levels = max(int(np.ceil(np.log2(len(corners) / LEAF))), 0)
        order, boxes = np.minimum(np.arange(LEAF << levels), len(corners) - 1), []
        for level in range(levels + 1):  # the children of box i are 2i + 1 and 2i + 2
            order = order.reshape(2**level, -1)
            boxes.append(np.stack([corners[order].min(axis=(1, 2)), corners[order].max(axis=(1, 2))], axis=1))
            if level < levels:
                middle = corners.mean(axis=1)[order]
                longest = np.ptp(middle, axis=1).argmax(axis=1)
                along = np.take_along_axis(middle, longest[:, None, None], axis=2)[..., 0]
                order = np.take_along_axis(order, along.argsort(axis=1, kind="stable"), axis=1)
        self._tree = np.concatenate(boxes), order, np.ascontiguousarray(corners, np.float32)

    def first(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _trace(*self._tree, *_rays(origins, directions), np.inf, False)

    def occluded(self, origins: np.ndarray, directions: np.ndarray, reach: float) -> np.ndarray:
        return _trace(*self._tree, *_rays(origins, directions), reach, True)[0] >= 0


Triangles: type[EmbreeTriangles | NumbaTriangles] = NumbaTriangles if EmbreeScene is None else EmbreeTriangles


@jit()
def _trace(boxes, order, corners, origins, directions, reach, any_hit):
    found = np.full(len(origins), -1, np.int32)
    distance = np.full(len(origins), np.inf, np.float32)
    first_leaf = len(boxes) - len(order)
    for ray in range(len(origins)):
        origin, direction, nearest, node = origins[ray], directions[ray], reach, 0
        while node >= 0 and not (any_hit and found[ray] >= 0):
            if _enters(boxes[node], origin, direction, nearest):
                if node < first_leaf:
                    node = 2 * node + 2
                    continue
                for triangle in order[node - first_leaf]:
                    t = _intersect(corners[triangle], origin, direction)
                    if t < nearest:
                        nearest, found[ray], distance[ray] = t, triangle, t
            while node % 2:  # a left child is visited last: its parent is done
                node //= 2
            node -= 1
    return found, distance


@jit()
def _enters(box, origin, direction, reach):
    near, far = 0.0, reach
    for axis in range(3):
        step = 1 / direction[axis] if direction[axis] != 0 else np.inf
        a, b = (box[0, axis] - origin[axis]) * step, (box[1, axis] - origin[axis]) * step
        near, far = max(near, min(a, b)), min(far, max(a, b))
    return near <= far


@jit()
def _intersect(corner, origin, direction):
    """Distance along a ray to a triangle, inf where it misses (Möller and Trumbore, 1997)."""
    a, b, offset = _minus(corner[1], corner[0]), _minus(corner[2], corner[0]), _minus(origin, corner[0])
    p, q = _cross(direction, b), _cross(offset, a)
    determinant = _dot(a, p)
    if determinant == 0:
        return np.inf
    u, v, t = _dot(offset, p) / determinant, _dot(direction, q) / determinant, _dot(b, q) / determinant
    return t if u >= 0 and v >= 0 and u + v <= 1 and t > 0 else np.inf


# vectors as tuples: arrays would be allocated for each triangle
@jit()
def _minus(a, b):
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


@jit()
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@jit()
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]
