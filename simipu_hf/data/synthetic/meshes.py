"""Shapes of a street as triangle soups: primitives first, then cars, people, trees, buildings and street furniture.

Every object stands in its own frame: x forward (along the street for buildings), y left, z up, the origin on the
ground below its centre. Lengths are metres, colours linear RGB albedo in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike


class Material(IntEnum):
    """What a triangle is made of: decides its pattern in the image and its reflectance for the LiDAR."""

    ASPHALT = 0
    ROAD_PAINT = 1
    PAVEMENT = 2
    CONCRETE = 3
    GRASS = 4
    FACADE_PLASTER = 5
    FACADE_BRICK = 6
    PLASTER = 7
    ROOF_TILES = 8
    CAR_PAINT = 9
    CAR_WINDOW = 10
    TYRE = 11
    METAL = 12
    RETROREFLECTOR = 13
    CLOTH = 14
    SKIN = 15
    BARK = 16
    LEAVES = 17
    WOOD = 18


@dataclass(frozen=True)
class Mesh:
    """T triangles: `corners` (T, 3, 3) metres, `texture` coordinates (T, 3, 2), `material` (T,), `color` (T, 3)."""

    corners: np.ndarray
    texture: np.ndarray
    material: np.ndarray
    color: np.ndarray

    def moved(self, pose: np.ndarray) -> Mesh:
        """The same mesh under a rigid 4 x 4 `pose`."""
        corners = self.corners @ pose[:3, :3].T.astype(np.float32) + pose[:3, 3].astype(np.float32)
        return Mesh(corners, self.texture, self.material, self.color)

    @property
    def size(self) -> tuple[float, float, float]:
        """Height, width and length in metres of the bounding box that is centred on the origin (KITTI's order)."""
        reach = np.abs(self.corners).reshape(-1, 3).max(axis=0)
        return float(reach[2]), float(2 * reach[1]), float(2 * reach[0])


UNIT_TEXTURE = [[0, 0], [1, 0], [1, 1], [0, 1]]


def join(*meshes: Mesh) -> Mesh:
    """One mesh of all triangles, in order."""
    return Mesh(
        *(np.concatenate([getattr(m, f) for m in meshes]) for f in ("corners", "texture", "material", "color"))
    )


def triangles(corners: ArrayLike, texture: ArrayLike, material: int, color: ArrayLike) -> Mesh:
    """A mesh of one material; `color` is (3,) or (T, 3)."""
    corners = np.asarray(corners, np.float32)
    count = len(corners)
    return Mesh(
        corners,
        np.asarray(texture, np.float32),
        np.full(count, material, np.uint8),
        np.broadcast_to(np.asarray(color, np.float32), (count, 3)).copy(),
    )


def quads(corners: ArrayLike, material: int, color: ArrayLike, texture: ArrayLike | None = None) -> Mesh:
    """Quadrilaterals (Q, 4, 3), two triangles each. Texture coordinates are metres along the first two sides."""
    corners = np.asarray(corners, np.float32)
    if texture is None:
        sides = np.sqrt(((corners[:, [1, 3]] - corners[:, :1]) ** 2).sum(axis=-1))
        texture = sides[:, None] * np.asarray(UNIT_TEXTURE, np.float32)
    texture = np.asarray(texture, np.float32)
    halves = [[0, 1, 2], [0, 2, 3]]
    return triangles(corners[:, halves].reshape(-1, 3, 3), texture[:, halves].reshape(-1, 3, 2), material, color)


def hexahedron(bottom: ArrayLike, top: ArrayLike) -> np.ndarray:
    """Sides and lid (5, 4, 3) over two rings of four corners, counter-clockwise seen from above; the lid is last."""
    bottom, top = np.asarray(bottom, np.float32), np.asarray(top, np.float32)
    sides = [[bottom[i], bottom[(i + 1) % 4], top[(i + 1) % 4], top[i]] for i in range(4)]
    return np.array([*sides, top], np.float32)


def rectangle(x0: float, x1: float, width: float, z: float) -> list[list[float]]:
    """Ring of four corners at height `z`, centred in y."""
    y = width / 2
    return [[x0, -y, z], [x1, -y, z], [x1, y, z], [x0, y, z]]


def box(x0: float, x1: float, width: float, z0: float, z1: float, material: int, color: ArrayLike) -> Mesh:
    """An upright box, closed below as well."""
    bottom = rectangle(x0, x1, width, z0)
    sides = hexahedron(bottom, rectangle(x0, x1, width, z1))
    return quads(np.concatenate([sides, [np.asarray(bottom, np.float32)]]), material, color)


def limb(
    start: ArrayLike,
    end: ArrayLike,
    radius: float,
    end_radius: float,
    material: int,
    color: ArrayLike,
    sides: int = 8,
) -> Mesh:
    """A closed frustum of a cone between two points: poles, trunks, wheels, arms and legs."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    axis = end - start
    length = np.sqrt(axis @ axis)
    x, y, z = axis / length
    across = np.array([0, z, -y] if abs(x) < 0.7 else [-z, 0, x])
    across /= np.sqrt(across @ across)
    ax, ay, az = across
    third = np.array([y * az - z * ay, z * ax - x * az, x * ay - y * ax])
    angle = np.linspace(0, 2 * np.pi, sides + 1)
    ring = np.cos(angle)[:, None] * across + np.sin(angle)[:, None] * third
    low, high = start + radius * ring, end + end_radius * ring
    wall = np.stack([low[:-1], low[1:], high[1:], high[:-1]], axis=1)
    arc = angle * max(radius, end_radius)
    wall_texture = np.stack([arc[:-1], arc[1:], arc[1:], arc[:-1]], axis=1)
    wall_texture = np.stack([wall_texture, np.broadcast_to([0, 0, length, length], wall_texture.shape)], axis=-1)
    caps = np.concatenate(
        [
            np.stack([np.broadcast_to(centre, edge[1:].shape), edge[:-1], edge[1:]], axis=1)
            for centre, edge in ((start, low), (end, high))
        ]
    )
    return join(quads(wall, material, color, wall_texture), triangles(caps, caps[..., :2], material, color))


def blob(centre: ArrayLike, radii: ArrayLike, material: int, color: ArrayLike, sides: int = 7, rings: int = 5) -> Mesh:
    """An ellipsoid of latitude rings: heads, helmets."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, rings)[:, None]
    longitude = np.linspace(0, 2 * np.pi, sides + 1)[None]
    unit = np.stack(
        [
            np.cos(latitude) * np.cos(longitude),
            np.cos(latitude) * np.sin(longitude),
            np.sin(latitude) + 0 * longitude,
        ],
        axis=-1,
    )
    grid = np.asarray(centre) + unit * np.asarray(radii)
    patches = np.stack([grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]], axis=2)
    return quads(patches.reshape(-1, 4, 3), material, color)


def leaves(
    rng: np.random.Generator,
    centre: ArrayLike,
    radii: ArrayLike,
    count: int,
    size: float,
    color: ArrayLike,
    boxy: bool = False,
) -> Mesh:
    """A porous cloud of `count` random triangles in an ellipsoid (or a box), darker inside and below."""
    if boxy:
        unit = rng.uniform(-1, 1, (count, 3))
        depth = rng.uniform(0.8, 1.05, count)
        unit *= (depth / np.abs(unit).max(axis=1))[:, None]
    else:
        unit = rng.normal(size=(count, 3))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        depth = rng.uniform(0.15, 1, count) ** 0.4
        unit *= depth[:, None]
    middle = np.asarray(centre) + unit * np.asarray(radii)
    corners = middle[:, None] + rng.normal(scale=size, size=(count, 3, 3))
    corners[..., 2] = np.maximum(corners[..., 2], 0.05)
    shade = (0.35 + 0.65 * depth**2) * (0.8 + 0.25 * unit[:, 2]) * rng.uniform(0.7, 1.3, count)
    texture = rng.uniform(0, 5, (count, 1, 2)) + corners[..., :2]
    return triangles(corners, texture, Material.LEAVES, np.asarray(color) * shade[:, None])


# --- vehicles -------------------------------------------------------------------------------------------------------

CAR_COLORS = (
    [0.60, 0.60, 0.62],
    [0.75, 0.75, 0.74],
    [0.03, 0.03, 0.035],
    [0.12, 0.13, 0.14],
    [0.30, 0.31, 0.33],
    [0.05, 0.055, 0.06],
    [0.45, 0.46, 0.48],
    [0.24, 0.02, 0.02],
    [0.02, 0.035, 0.12],
    [0.07, 0.12, 0.20],
    [0.03, 0.08, 0.05],
    [0.40, 0.32, 0.12],
    [0.20, 0.15, 0.10],
)
# cabin: rear and front at the waist, rear and front of the roof, as fractions of the length from the centre
CAR_CABINS = {
    "saloon": (-0.38, 0.20, -0.22, 0.02),
    "hatchback": (-0.47, 0.22, -0.38, 0.04),
    "estate": (-0.48, 0.20, -0.44, 0.02),
    "people carrier": (-0.49, 0.34, -0.46, 0.12),
}


def _wheels(length: float, width: float, radius: float) -> Mesh:
    parts = []
    for x in (-0.30 * length, 0.31 * length):
        for side in (-1, 1):
            outer = side * (width / 2 + 0.01)
            parts.append(
                limb(
                    [x, outer - side * 0.22, radius], [x, outer, radius], radius, radius, Material.TYRE, [0.03] * 3, 10
                )
            )
            parts.append(
                limb(
                    [x, outer, radius],
                    [x, outer + side * 0.02, radius],
                    radius * 0.6,
                    radius * 0.5,
                    Material.METAL,
                    [0.4] * 3,
                    6,
                )
            )
    return join(*parts)


def _lights_and_plates(length: float, width: float, height: float) -> Mesh:
    """Front lamps, tail lamps and both number plates, a centimetre outside the bumpers."""
    parts = []
    for end, lamp, plate in ((1, [0.85, 0.85, 0.8], 0.32), (-1, [0.5, 0.02, 0.02], 0.40)):
        x = end * (length / 2 + 0.01)
        for y, half_width, z, half_height, color in (
            (0.37 * width, 0.09 * width, 0.45 * height, 0.05 * height, lamp),
            (-0.37 * width, 0.09 * width, 0.45 * height, 0.05 * height, lamp),
            (0.0, 0.26, plate * height, 0.055, [0.8, 0.8, 0.75]),
        ):
            y0, y1, z0, z1 = y - half_width, y + half_width, z - half_height, z + half_height
            corners = [[[x, y0, z0], [x, y1, z0], [x, y1, z1], [x, y0, z1]]]
            parts.append(quads(corners, Material.RETROREFLECTOR, color))
    return join(*parts)


def car(rng: np.random.Generator) -> Mesh:
    """A passenger car: convex lower body, tapered cabin with windows, wheels, lamps, plates."""
    shape = list(CAR_CABINS)[rng.integers(len(CAR_CABINS))]
    tall = shape == "people carrier"
    length, width = rng.uniform(3.5, 4.8), rng.uniform(1.58, 1.85)
    height = rng.uniform(1.6, 1.85) if tall else rng.uniform(1.38, 1.55)
    color = np.array(CAR_COLORS[rng.integers(len(CAR_COLORS))]) * rng.uniform(0.8, 1.2)
    rear, front, roof_rear, roof_front = (fraction * length for fraction in CAR_CABINS[shape])
    waist, nose, floor = 0.61 * height, 0.49 * height, 0.15 * height
    half = length / 2
    # side view of the lower body, convex, counter-clockwise seen from the right
    profile = np.array(
        [
            [-half, floor],
            [half, floor],
            [half, nose],
            [front, waist],
            [rear, waist],
            [-half, nose + 0.08 * height],
        ]
    )
    ring = np.insert(profile, 1, 0, axis=1)
    across = np.array([0, width / 2, 0])
    left, right = ring + across, ring - across
    fans = np.concatenate(
        [
            np.stack([np.broadcast_to(flank[0], flank[2:].shape), flank[1:-1], flank[2:]], axis=1)
            for flank in (left, right)
        ]
    )
    shell = np.stack([right, np.roll(right, -1, axis=0), np.roll(left, -1, axis=0), left], axis=1)
    cabin = hexahedron(
        rectangle(rear, front, width * 0.97, waist), rectangle(roof_rear, roof_front, width * 0.76, height)
    )
    return join(
        triangles(fans, fans[..., [0, 2]], Material.CAR_PAINT, color),
        quads(shell, Material.CAR_PAINT, color),
        quads(cabin[:4], Material.CAR_WINDOW, color, [UNIT_TEXTURE] * 4),
        quads(cabin[4:], Material.CAR_PAINT, color),
        _wheels(length, width, rng.uniform(0.29, 0.34)),
        _lights_and_plates(length, width, height),
    )


def van(rng: np.random.Generator) -> Mesh:
    """A delivery van: tall closed body, sloping windscreen, side windows in front only."""
    length, width, height = rng.uniform(4.9, 5.9), rng.uniform(1.85, 2.05), rng.uniform(2.1, 2.6)
    color = np.array(CAR_COLORS[rng.integers(4)]) * rng.uniform(0.8, 1.2)
    half, waist, floor = length / 2, 0.5 * height, 0.14 * height
    cab = half - 0.32 * length
    front = hexahedron(
        rectangle(cab, half - 0.12 * length, width * 0.99, waist), rectangle(cab, cab + 0.1, width * 0.9, height)
    )
    return join(
        box(-half, cab, width, floor, height, Material.CAR_PAINT, color),
        box(cab, half, width, floor, waist, Material.CAR_PAINT, color),
        quads(front[:3], Material.CAR_WINDOW, color, [UNIT_TEXTURE] * 3),
        quads(front[4:], Material.CAR_PAINT, color),
        _wheels(length, width, 0.34),
        _lights_and_plates(length, width, 0.7 * height),
    )


def truck(rng: np.random.Generator) -> Mesh:
    """A lorry: cab in front of a box body."""
    length, width, height = rng.uniform(6.5, 9.0), rng.uniform(2.3, 2.5), rng.uniform(2.9, 3.5)
    half = length / 2
    cab = half - 1.9
    body = rng.uniform(0.25, 0.8, 3)
    front = hexahedron(rectangle(cab, half, width * 0.95, 1.5), rectangle(cab, half - 0.25, width * 0.9, 2.6))
    return join(
        box(-half, cab - 0.15, width, 0.85, height, Material.METAL, body),
        box(-half + 0.3, half - 0.1, width * 0.8, 0.45, 0.85, Material.METAL, [0.08] * 3),
        box(cab, half, width * 0.95, 0.4, 1.5, Material.CAR_PAINT, body[::-1]),
        quads(front[:4], Material.CAR_WINDOW, body[::-1], [UNIT_TEXTURE] * 4),
        quads(front[4:], Material.CAR_PAINT, body[::-1]),
        _wheels(length, width, 0.46),
        _lights_and_plates(length, width, 1.6),
    )


# --- people ---------------------------------------------------------------------------------------------------------

SKIN = ([0.58, 0.36, 0.26], [0.45, 0.26, 0.17], [0.22, 0.11, 0.07])
HAIR = ([0.03, 0.02, 0.02], [0.10, 0.06, 0.03], [0.35, 0.25, 0.12], [0.3, 0.3, 0.3])


def _clothes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.uniform(0.03, 0.6, 3), rng.choice([0.03, 0.06, 0.15]) * rng.uniform(0.6, 1.4, 3)


def pedestrian(rng: np.random.Generator) -> Mesh:
    """A walking person, caught in mid-stride."""
    h = rng.uniform(1.1, 1.4) if rng.random() < 0.15 else rng.uniform(1.55, 1.92)
    shirt, trousers = _clothes(rng)
    skin, hair = SKIN[rng.integers(len(SKIN))], HAIR[rng.integers(len(HAIR))]
    stride, swing, bulk = rng.uniform(0.02, 0.18) * h, rng.uniform(0.02, 0.16) * h, rng.uniform(0.9, 1.25)
    parts = [
        limb([0, 0, 0.48 * h], [0, 0, 0.83 * h], 0.085 * h * bulk, 0.105 * h * bulk, Material.CLOTH, shirt),
        limb([0, 0, 0.83 * h], [0, 0, 0.88 * h], 0.04 * h, 0.035 * h, Material.SKIN, skin, 5),
        blob([0.01 * h, 0, 0.925 * h], [0.06 * h, 0.05 * h, 0.065 * h], Material.SKIN, skin),
        blob([-0.01 * h, 0, 0.94 * h], [0.062 * h, 0.055 * h, 0.06 * h], Material.CLOTH, hair),
    ]
    for side in (-1, 1):
        y, ahead = side * 0.05 * h, side * stride
        knee = [ahead * 0.5 + 0.02 * h, y, 0.26 * h]
        parts.append(limb([0, y, 0.5 * h], knee, 0.055 * h * bulk, 0.04 * h, Material.CLOTH, trousers, 5))
        parts.append(limb(knee, [ahead, y, 0.02 * h], 0.04 * h, 0.03 * h, Material.CLOTH, trousers, 5))
        shoe = box(ahead - 0.03 * h, ahead + 0.1 * h, 0.055 * h, 0, 0.035 * h, Material.TYRE, [0.04] * 3)
        offset = np.eye(4)
        offset[1, 3] = y
        parts.append(shoe.moved(offset))
        elbow = [-side * swing * 0.5, side * 0.135 * h * bulk, 0.63 * h]
        hand = [-side * swing + 0.03 * h, side * 0.13 * h * bulk, 0.48 * h]
        shoulder = [0, side * 0.11 * h * bulk, 0.81 * h]
        parts.append(limb(shoulder, elbow, 0.035 * h, 0.03 * h, Material.CLOTH, shirt, 5))
        parts.append(limb(elbow, hand, 0.028 * h, 0.022 * h, Material.SKIN, skin, 5))
    return join(*parts)


def cyclist(rng: np.random.Generator) -> Mesh:
    """A rider on a bicycle."""
    shirt, trousers = _clothes(rng)
    skin = SKIN[rng.integers(len(SKIN))]
    frame = rng.uniform(0.05, 0.5, 3)
    k = rng.uniform(0.93, 1.06)
    parts = []
    angle = np.linspace(0, 2 * np.pi, 15)
    for x in (-0.52, 0.52):
        rim = np.stack([x + 0.33 * np.cos(angle), 0 * angle, 0.345 + 0.33 * np.sin(angle)], axis=1)
        parts += [limb(a, b, 0.018, 0.018, Material.TYRE, [0.03] * 3, 4) for a, b in pairwise(rim)]
    seat, bars, crank = [-0.2, 0, 0.95], [0.38, 0, 1.02], [-0.05, 0, 0.32]
    for a, b in (
        (crank, seat),
        (crank, bars),
        (seat, bars),
        ([-0.52, 0, 0.345], crank),
        ([-0.52, 0, 0.345], seat),
        (bars, [0.52, 0, 0.345]),
    ):
        parts.append(limb(a, b, 0.02, 0.02, Material.METAL, frame, 5))
    parts.append(limb([0.38, -0.28, 1.04], [0.38, 0.28, 1.04], 0.015, 0.015, Material.METAL, [0.1] * 3, 5))
    shoulder = np.array([0.12, 0, 1.45 * k])
    parts += [
        limb([-0.2, 0, 0.97], shoulder, 0.14, 0.17, Material.CLOTH, shirt),
        blob(np.add(shoulder, [0.08, 0, 0.2]), [0.1, 0.085, 0.12], Material.SKIN, skin),
        blob(np.add(shoulder, [0.06, 0, 0.24]), [0.12, 0.1, 0.1], Material.CLOTH, rng.uniform(0.05, 0.7, 3)),
    ]
    for side in (-1, 1):
        knee, foot = [0.18, side * 0.1, 0.72 + side * 0.1], [-0.03, side * 0.1, 0.32 + side * 0.16]
        parts += [
            limb([-0.2, side * 0.09, 0.95], knee, 0.085, 0.06, Material.CLOTH, trousers, 6),
            limb(knee, foot, 0.055, 0.04, Material.CLOTH, trousers, 6),
            limb(
                np.add(shoulder, [0, side * 0.17, -0.03]),
                [0.38, side * 0.25, 1.06],
                0.05,
                0.035,
                Material.SKIN,
                skin,
                6,
            ),
        ]
    return join(*parts)


# --- beside the road ------------------------------------------------------------------------------------------------


def tree(rng: np.random.Generator, height: float) -> Mesh:
    """A trunk, a few branches and a crown of three to five clouds of leaves."""
    trunk = rng.uniform(0.28, 0.42) * height
    bark = np.array([0.10, 0.075, 0.055]) * rng.uniform(0.7, 1.5)
    green = np.array([rng.uniform(0.05, 0.16), rng.uniform(0.14, 0.24), rng.uniform(0.02, 0.06)])
    thickness = 0.022 * height
    parts = [limb([0, 0, 0], [0, 0, 0.75 * height], thickness, 0.3 * thickness, Material.BARK, bark)]
    spread = rng.uniform(0.16, 0.24) * height
    for _ in range(rng.integers(3, 6)):
        centre = np.array([*rng.uniform(-0.6, 0.6, 2) * spread, rng.uniform(0.5, 0.82) * height])
        parts.append(limb([0, 0, trunk], centre, 0.4 * thickness, 0.1 * thickness, Material.BARK, bark, 5))
        radii = spread * rng.uniform(0.7, 1.1, 3) * [1, 1, 0.9]
        parts.append(leaves(rng, centre, radii, 180, 0.08 + 0.009 * height, green * rng.uniform(0.8, 1.2)))
    return join(*parts)


def bush(rng: np.random.Generator, length: float, width: float, height: float) -> Mesh:
    """A hedge or bush: a dense box of leaves over a dark core."""
    green = np.array([rng.uniform(0.04, 0.12), rng.uniform(0.12, 0.2), rng.uniform(0.02, 0.05)])
    inner = max(0.5 * length - 0.15, 0.3 * length)
    core = box(-inner, inner, 0.7 * width, 0, 0.85 * height, Material.LEAVES, 0.35 * green)
    count = int(40 * (length + width) * (height + width))
    half = [0.5 * length, 0.5 * width, 0.5 * height]
    return join(core, leaves(rng, [0, 0, 0.5 * height], half, count, 0.10, green, boxy=True))


def fence(rng: np.random.Generator, length: float) -> Mesh:
    """A low wall with or without palings."""
    color = rng.uniform(0.2, 0.5) * np.array([1, rng.uniform(0.85, 1), rng.uniform(0.7, 0.95)])
    half, wall = length / 2, rng.uniform(0.3, 1.1)
    parts = [box(-half, half, 0.22, 0, wall, Material.CONCRETE, color)]
    if wall < 0.7:
        wood = np.array([0.25, 0.16, 0.09]) * rng.uniform(0.6, 1.8)
        top = wall + rng.uniform(0.6, 1.0)
        parts += [
            box(x, x + 0.09, 0.03, wall, top, Material.WOOD, wood) for x in np.arange(-half + 0.1, half - 0.1, 0.2)
        ]
        parts.append(box(-half, half, 0.05, top - 0.2, top - 0.12, Material.WOOD, wood))
    return join(*parts)


def lamp_post(rng: np.random.Generator) -> Mesh:
    """A street lamp whose arm reaches over the road (towards -y)."""
    height, arm = rng.uniform(5.5, 9), rng.uniform(0.8, 2)
    grey = [rng.uniform(0.15, 0.4)] * 3
    return join(
        limb([0, 0, 0], [0, 0, height], 0.09, 0.055, Material.METAL, grey),
        limb([0, 0, height], [0, -arm, height + 0.25], 0.04, 0.03, Material.METAL, grey, 6),
        limb([0, -arm, height + 0.25], [0, -arm - 0.6, height + 0.2], 0.09, 0.06, Material.METAL, [0.5] * 3, 6),
    )


def bollard(rng: np.random.Generator) -> Mesh:
    """A waist-high post."""
    color = [0.5, 0.5, 0.5] if rng.random() < 0.5 else [0.45, 0.08, 0.05]
    return limb([0, 0, 0], [0, 0, rng.uniform(0.8, 1.1)], 0.06, 0.06, Material.METAL, color)


def sign(rng: np.random.Generator) -> Mesh:
    """A traffic sign on a post, facing oncoming traffic (towards -x): a rim and a face, both retroreflecting."""
    height, radius = rng.uniform(2.2, 2.8), rng.uniform(0.3, 0.42)
    sides = int(rng.choice([3, 4, 8, 24]))
    rim, face = ([0.6, 0.02, 0.02], [0.85, 0.85, 0.85]) if rng.random() < 0.6 else ([0.8, 0.8, 0.8], [0.03, 0.1, 0.5])
    return join(
        limb([0, 0, 0], [0, 0, height + radius], 0.035, 0.035, Material.METAL, [0.4] * 3, 6),
        limb([-0.06, 0, height], [-0.04, 0, height], radius, radius, Material.RETROREFLECTOR, rim, sides),
        limb([-0.07, 0, height], [-0.06, 0, height], 0.7 * radius, 0.7 * radius, Material.RETROREFLECTOR, face, sides),
    )


WALL_COLORS = (
    [0.62, 0.58, 0.50],
    [0.70, 0.68, 0.64],
    [0.60, 0.48, 0.30],
    [0.55, 0.38, 0.28],
    [0.42, 0.44, 0.46],
    [0.50, 0.55, 0.45],
    [0.66, 0.60, 0.42],
)


def building(rng: np.random.Generator, width: float, depth: float, floors: int) -> Mesh:
    """A house `width` along the street: walls with windows and doors, a gabled or a flat roof.

    Facade texture coordinates count window bays across and storeys upwards, so that the pattern fits any wall.
    """
    brick = rng.random() < 0.3
    color = np.array([0.34, 0.13, 0.08] if brick else WALL_COLORS[rng.integers(len(WALL_COLORS))])
    color = np.clip(color * rng.uniform(0.75, 1.2) * rng.uniform(0.93, 1.07, 3), 0, 0.85)
    storey, bay = rng.uniform(2.7, 3.3), rng.uniform(2.2, 3.6)
    eaves, half, y = floors * storey, width / 2, depth / 2
    walls = hexahedron(rectangle(-half, half, depth, 0), rectangle(-half, half, depth, eaves))[:4]
    bays = np.maximum(np.round(np.array([width, depth, width, depth]) / bay), 1)
    texture = np.array(UNIT_TEXTURE)[None] * np.stack([bays, np.full(4, floors)], axis=1)[:, None]
    # a whole number of bays apart, so that every house draws its own windows from the pattern
    texture = texture + rng.integers(0, 500, (4, 1, 1)) * [1, 0]
    parts = [quads(walls, Material.FACADE_BRICK if brick else Material.FACADE_PLASTER, color, texture)]
    if rng.random() < 0.75:
        rise, over = rng.uniform(0.3, 0.55) * depth, 0.35
        ridge, low = eaves + rise, eaves - over * rise / y
        roof_color = np.array([0.28, 0.09, 0.05] if rng.random() < 0.6 else [0.10, 0.09, 0.09]) * rng.uniform(0.7, 1.3)
        slopes = [
            [
                [-half - over, side * (y + over), low],
                [half + over, side * (y + over), low],
                [half + over, 0, ridge],
                [-half - over, 0, ridge],
            ]
            for side in (-1, 1)
        ]
        gables = np.array([[[x, -y, eaves], [x, y, eaves], [x, 0, ridge - 0.05]] for x in (-half, half)])
        parts.append(quads(slopes, Material.ROOF_TILES, roof_color))
        parts.append(triangles(gables, gables[..., 1:], Material.PLASTER, color))
        if rng.random() < 0.6:
            x = rng.uniform(-0.35, 0.35) * width
            parts.append(box(x, x + 0.6, 0.5, eaves + 0.5 * rise, ridge + 0.8, Material.PLASTER, [0.3, 0.14, 0.1]))
    else:
        parts.append(box(-half - 0.15, half + 0.15, depth + 0.3, eaves, eaves + 0.4, Material.CONCRETE, 0.8 * color))
    return join(*parts)
