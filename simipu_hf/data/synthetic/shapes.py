"""Shapes of a street: boxes, cylinders, spheres and convex hulls of trimesh, painted and put together.

Every shape stands in its own frame: x forward (along the street), y left, z up, the origin on the ground below its
centre. Lengths are metres, colours linear RGB albedo in [0, 1]; faces carry `material` and `color`.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from trimesh import Trimesh, creation
from trimesh.convex import convex_hull

from .appearance import Material

Vector = Sequence[float] | np.ndarray

# smallest and largest (length, width, height); rear and front of the cabin at the waist and of its roof, as shares of
# the length from the centre
VEHICLES = {
    "Car": ([3.5, 1.58, 1.38], [4.8, 1.85, 1.60], [-0.45, 0.20, -0.34, 0.03]),
    "Van": ([4.7, 1.80, 1.90], [5.7, 2.05, 2.50], [-0.50, 0.36, -0.49, 0.20]),
    "Truck": ([6.5, 2.30, 2.90], [9.0, 2.50, 3.50], [0.28, 0.48, 0.28, 0.46]),
}
HOUSE_DEPTH = 11.2


def paint(mesh: Trimesh, material: Material, color: Vector) -> Trimesh:
    """Give all faces a material and one colour (3,), or one for each face (F, 3)."""
    mesh.face_attributes["material"] = np.full(len(mesh.faces), material, np.uint8)
    mesh.face_attributes["color"] = np.broadcast_to(np.asarray(color, np.float32), (len(mesh.faces), 3))
    return mesh


def box(lower: Vector, upper: Vector, material: Material, color: Vector) -> Trimesh:
    return paint(creation.box(bounds=np.stack([lower, upper])), material, color)


def limb(start: Vector, end: Vector, radius: float, material: Material, color: Vector) -> Trimesh:
    """A cylinder between two points: poles, trunks, wheels, arms and legs."""
    return paint(creation.cylinder(radius, sections=9, segment=np.stack([start, end])), material, color)


def ball(centre: Vector, radii: Vector, color: Vector) -> Trimesh:
    sphere = creation.icosphere(subdivisions=1)
    sphere.vertices = sphere.vertices * np.asarray(radii) + np.asarray(centre)
    return paint(sphere, Material.CLOTH, color)


def prism(profile: Sequence[Vector], half_width: float | np.ndarray, material: Material, color: Vector) -> Trimesh:
    """Convex hull of a side view (N, 2) in x and z, as wide as each of its points says (N,) or one for all."""
    x, z = np.tile(np.array(profile).T, 2)
    y = np.broadcast_to(half_width, len(profile))
    return paint(convex_hull(np.stack([x, np.concatenate([y, -y]), z], axis=1)), material, color)


def leaves(rng: np.random.Generator, centre: Vector, radii: Vector, count: int) -> Trimesh:
    """A porous cloud of random triangles in an ellipsoid, darker inside and below."""
    unit, depth = rng.normal(size=(count, 3)), rng.uniform(0.15, 1, count) ** 0.4
    unit *= (depth / np.linalg.norm(unit, axis=1))[:, None]
    corners = (np.asarray(centre) + unit * np.asarray(radii))[:, None] + rng.normal(
        scale=0.12 + 0.1 * np.mean(radii), size=(count, 3, 3)
    )
    corners[..., 2] = np.maximum(corners[..., 2], 0.05)
    shade = (0.35 + 0.65 * depth**2) * (0.8 + 0.25 * unit[:, 2]) * rng.uniform(0.7, 1.3, count)
    mesh = Trimesh(corners.reshape(-1, 3), np.arange(3 * count).reshape(-1, 3), process=False)
    return paint(mesh, Material.LEAVES, rng.uniform([0.05, 0.14, 0.02], [0.16, 0.24, 0.06]) * shade[:, None])


def vehicle(rng: np.random.Generator, kind: str) -> list[Trimesh]:
    """A car, van or truck: convex lower body, tapered cabin of glass, wheels, lamps, number plates."""
    smallest, largest, cabin = VEHICLES[kind]
    length, width, height = rng.uniform(smallest, largest)
    rear, front, roof_rear, roof_front = length * (np.array(cabin) + rng.uniform(-0.04, 0.02))
    color = rng.uniform(0.03, 0.75) ** 1.5 * (rng.uniform(0.1, 1, 3) if rng.random() < 0.4 else np.ones(3))
    half, side, waist = length / 2, width / 2, (0.6 if kind == "Car" else 0.5) * height
    body = [[-half, 0.15 * height], [half, 0.15 * height], [half, 0.8 * waist], [front, waist], [-half, waist]]
    profile = [[rear, waist], [front, waist], [roof_rear, height - 0.05], [roof_front, height - 0.05]]
    roof = [roof_rear, -0.75 * side, height - 0.06], [roof_front, 0.75 * side, height]
    parts = [
        prism(body, side, Material.CAR_PAINT, color),
        prism(profile, np.array([0.97, 0.97, 0.78, 0.78]) * side, Material.GLASS, 0.3 * color),
        box(*roof, Material.CAR_PAINT, color),
    ]
    if kind == "Truck":
        cargo = [-half, -side, 0.25 * height], [0.24 * length, side, height]
        parts.append(box(*cargo, Material.METAL, rng.uniform(0.25, 0.8, 3)))
    for x in (-0.3 * length, 0.31 * length):
        for y in (-side - 0.01, side - 0.19):
            parts.append(limb([x, y, 0.31], [x, y + 0.2, 0.31], 0.31, Material.TYRE, [0.03] * 3))
    for x, lamp in ((half, [0.85, 0.85, 0.8]), (-half, [0.5, 0.02, 0.02])):
        for y, z, shade in ((-0.74, 0.7, lamp), (0.74, 0.7, lamp), (0, 0.5, [0.8] * 3)):
            middle, extent = np.array([x, y * side, z * waist]), np.array([0.01, 0.2, 0.06])
            parts.append(box(middle - extent, middle + extent, Material.RETROREFLECTOR, shade))
    return parts


def person(rng: np.random.Generator, seat: float = 0.0) -> list[Trimesh]:
    """Someone in mid-stride; with a `seat`, that much higher (metres), feet and hands forward."""
    height, stride = rng.uniform(1.5, 1.95), rng.uniform(0.02, 0.18)
    shirt, trousers = rng.uniform(0.03, 0.6, 3), rng.uniform(0.02, 0.2, 3)
    skin = np.array([0.5, 0.33, 0.24]) * rng.uniform(0.4, 1.2)
    parts = [
        ball([0, 0, 0.66], [0.1, 0.14, 0.21], shirt),
        ball([0, 0, 0.93], [0.06, 0.05, 0.07], skin),
        ball([-0.01, 0, 0.945], [0.062, 0.055, 0.055], rng.uniform(0, 0.2, 3)),
    ]
    for side in (-1, 1):
        ahead = 0.15 + 0.07 * side if seat else side * stride
        foot = [ahead, side * 0.05, 0.2 if seat else 0.01]
        hand = [0.3 if seat else -0.8 * ahead, side * 0.16, 0.52]
        parts.append(limb([0, side * 0.05, 0.5], foot, 0.048, Material.CLOTH, trousers))
        parts.append(limb([0, side * 0.12, 0.81], hand, 0.03, Material.CLOTH, shirt))
    return [part.apply_scale(height).apply_translation([0, 0, seat]) for part in parts]


def cyclist(rng: np.random.Generator) -> list[Trimesh]:
    """A rider on a bicycle."""
    tubes = (([-0.52, 0, 0.34], [0.35, 0, 1.0]), ([0.35, 0, 1.0], [0.52, 0, 0.34]), ([-0.1, 0, 0.3], [-0.1, 0, 0.95]))
    parts = [limb(a, b, 0.025, Material.METAL, rng.uniform(0.05, 0.5, 3)) for a, b in tubes]
    for x in (-0.52, 0.52):
        wheel = creation.annulus(0.29, 0.34, segment=[[x, -0.02, 0.34], [x, 0.02, 0.34]], sections=12)
        parts.append(paint(wheel, Material.TYRE, [0.03] * 3))
    return [*parts, *person(rng, seat=0.12)]


def tree(rng: np.random.Generator) -> list[Trimesh]:
    """A trunk and a crown of three to five clouds of leaves."""
    height = rng.uniform(4, 13)
    spread = rng.uniform(0.16, 0.24) * height
    parts = [limb([0, 0, 0], [0, 0, 0.75 * height], 0.018 * height, Material.BARK, [0.10, 0.075, 0.055])]
    for _ in range(rng.integers(3, 6)):
        centre = np.append(rng.uniform(-0.6, 0.6, 2) * spread, rng.uniform(0.5, 0.82) * height)
        parts.append(leaves(rng, centre, spread * rng.uniform(0.7, 1.1, 3), 70))
    return parts


def pole(rng: np.random.Generator) -> list[Trimesh]:
    """A lamp whose arm reaches over the road (towards +y), or a retroreflecting sign that faces traffic (-x)."""
    height, grey = rng.uniform(2.2, 2.8), [rng.uniform(0.15, 0.4)] * 3
    if rng.random() < 0.5:
        top, lamp = [0, 0, 3 * height], [0, rng.uniform(1, 2.5), 3 * height + 0.2]
        return [limb([0, 0, 0], top, 0.07, Material.METAL, grey), limb(top, lamp, 0.06, Material.METAL, grey)]
    discs = ((0.0, 0.4, [0.6, 0.02, 0.02]), (-0.01, 0.28, [0.85] * 3 if rng.random() < 0.6 else [0.03, 0.1, 0.5]))
    plates = [limb([x - 0.06, 0, height], [x - 0.04, 0, height], r, Material.RETROREFLECTOR, c) for x, r, c in discs]
    return [limb([0, 0, 0], [0, 0, height], 0.035, Material.METAL, grey), *plates]


def house(rng: np.random.Generator) -> list[Trimesh]:
    """A house with windows on all sides and a gabled or a flat roof; its length fits whole bays of windows."""
    half, side, eaves = 2.8 * rng.integers(1, 4), HOUSE_DEPTH / 2, 3.0 * rng.integers(2, 6)
    brick = rng.random() < 0.3
    color = np.array([0.34, 0.13, 0.08]) if brick else rng.uniform(0.35, 0.7) * rng.uniform([1, 0.85, 0.65], 1)
    walls = box([-half, -side, 0], [half, side, eaves], Material.BRICK if brick else Material.PLASTER, color)
    rise, ridge = (0.4, side) if rng.random() < 0.3 else (rng.uniform(3, 5), 0.05)
    ends = [[x, z] for z in (eaves, eaves + rise) for x in (-half - 0.3, half + 0.3)]
    tiles = rng.uniform(0.7, 1.3) * np.array([0.28, 0.09, 0.05] if rng.random() < 0.6 else [0.10, 0.09, 0.09])
    return [walls, prism(ends, np.array([side + 0.3, side + 0.3, ridge, ridge]), Material.ROOF_TILES, tiles)]


MAKERS = {kind: partial(vehicle, kind=kind) for kind in VEHICLES} | {
    "Pedestrian": person,
    "Cyclist": cyclist,
    "Tree": tree,
    "House": house,
    "Pole": pole,
}
"""What makes the parts of a random thing of each kind."""
