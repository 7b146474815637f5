"""One street: what stands and moves on it, its light, and the way of the car that records it.

World frame: x along the street at its start, y left, z up, metres. The street is an arc of constant curvature; places
on it are (s, d): metres along its centre line, metres to the left of it. Traffic keeps to the right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from . import meshes
from .materials import Lighting
from .meshes import Material, Mesh

BEHIND, AHEAD = 110.0, 200.0
"""How far the street goes on before the first and after the last place of the recording car (metres)."""

NEAR_BEHIND, NEAR_AHEAD = 90.0, 140.0
"""Moving things further away than this (metres) are left out of a frame."""

KERB = 0.12
LANE = 3.5
PARKING = 2.2


@dataclass(frozen=True)
class Actor:
    """A thing on the street: mesh, place at time 0, speed along the street (m/s); `kind`: a KITTI class or None."""

    mesh: Mesh
    s: float
    d: float
    z: float = 0.0
    yaw: float = 0.0
    speed: float = 0.0
    kind: str | None = None


@dataclass(frozen=True)
class Street:
    """Everything about one drive except its sensors."""

    curvature: float
    ego_speed: float
    ego_sway: np.ndarray
    lighting: Lighting
    ground: Mesh = field(repr=False)
    actors: tuple[Actor, ...] = field(repr=False)

    def place(self, s: float, d: float, z: float = 0.0, yaw: float = 0.0) -> np.ndarray:
        """4 x 4 pose in the world of something at (s, d), turned by `yaw` against the street."""
        heading = self.curvature * s + yaw
        pose = np.eye(4)
        pose[:2, :2] = [[np.cos(heading), -np.sin(heading)], [np.sin(heading), np.cos(heading)]]
        pose[:2, 3] = arc_point(self.curvature, s, d)
        pose[2, 3] = z
        return pose

    def ego_pose(self, time: float) -> np.ndarray:
        """4 x 4 pose in the world of the recording car: on the ground, in its lane, swaying a little."""
        amplitude, rate, phase = self.ego_sway
        sway = np.sin(rate * time + phase)
        return self.place(self.ego_speed * time, -LANE / 2 + amplitude * sway, yaw=0.02 * np.cos(rate * time + phase))

    def actor_pose(self, actor: Actor, time: float) -> np.ndarray:
        """4 x 4 pose in the world of an actor."""
        return self.place(actor.s + actor.speed * time, actor.d, actor.z, actor.yaw)

    def is_near(self, actor: Actor, time: float) -> bool:
        """Whether the actor is so close to the recording car that its movement matters."""
        return -NEAR_BEHIND < actor.s + (actor.speed - self.ego_speed) * time < NEAR_AHEAD


def arc_point(curvature: float, s: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
    """World x, y (..., 2) of places (s, d)."""
    angle = curvature * np.asarray(s, float)
    along = np.where(np.abs(angle) < 1e-9, s, np.sin(angle) / curvature)
    aside = np.where(np.abs(angle) < 1e-9, 0.0, (1 - np.cos(angle)) / curvature)
    return np.stack([along - d * np.sin(angle), aside + d * np.cos(angle)], axis=-1)


def make_street(rng: np.random.Generator, duration: float) -> Street:
    """A random street, long enough to be driven along for `duration` seconds."""
    curvature = float(rng.choice([-1, 1]) * (rng.uniform(0.0005, 0.006) if rng.random() < 0.6 else 1e-6))
    ego_speed = float(rng.uniform(5, 11))
    end = ego_speed * duration + AHEAD
    lanes = LANE * (1 if rng.random() < 0.85 else 2)
    urban = rng.uniform(0.1, 1.0)
    stock = _make_stock(rng)
    actors: list[Actor] = []
    edges = {}
    for side in (-1, 1):
        parked = rng.random() < 0.45 + 0.4 * urban
        kerb = lanes + (PARKING if parked else 0.3)
        walk = kerb + rng.uniform(1.8, 3.5)
        edges[side] = (lanes, kerb, walk)
        if parked:
            actors += _parked_cars(rng, stock, end, side, lanes + PARKING / 2)
        actors += _street_furniture(rng, stock, end, side, kerb)
        actors += _people(rng, stock, end, side, kerb, walk)
        actors += _frontage(rng, stock, end, side, walk, urban, curvature)
    actors += _traffic(rng, stock, end, ego_speed, duration, lanes)
    return Street(
        curvature=curvature,
        ego_speed=ego_speed,
        ego_sway=np.array([rng.uniform(0.05, 0.25), rng.uniform(0.3, 0.8), rng.uniform(0, 6.3)]),
        lighting=_lighting(rng),
        ground=_ground(rng, curvature, edges, lanes, -2 * BEHIND, end + 300.0),
        actors=tuple(actors),
    )


def _lighting(rng: np.random.Generator) -> Lighting:
    cloud_cover = float(rng.choice([0.15, 0.35, 0.6, 0.95]) + rng.uniform(-0.1, 0.05))
    elevation, azimuth = np.deg2rad(rng.uniform(18, 60)), rng.uniform(0, 2 * np.pi)
    direction = [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    warmth = np.array([1.0, 0.93 - 0.12 * (elevation < 0.5), 0.84 - 0.22 * (elevation < 0.5)])
    strength = 2.6 * np.clip(1.25 - cloud_cover, 0.05, 1)
    blue = np.array([rng.uniform(0.22, 0.4), rng.uniform(0.42, 0.55), rng.uniform(0.8, 0.95)])
    return Lighting(
        sun_direction=np.asarray(direction, np.float32),
        sun_color=np.float32(strength * warmth),
        zenith_color=np.float32(blue * (1 - cloud_cover) + 0.75 * cloud_cover),
        horizon_color=np.float32(rng.uniform(0.85, 1.0) * np.array([0.92, 0.95, 1.0])),
        cloud_cover=cloud_cover,
        tree_line=float(rng.uniform(0.01, 0.06)),
        visibility=float(rng.uniform(400, 1500)),
        noise_offset=np.float32(rng.uniform(0, 50, 2)),
    )


def _ground(rng: np.random.Generator, curvature: float, edges: dict, lanes: float, first: float, last: float) -> Mesh:
    """Road, marks, kerbs, pavements and grass from place `first` to place `last` along the street."""
    asphalt = np.array([1.0, 1.0, 1.03]) * rng.uniform(0.06, 0.16)
    paving = rng.uniform(0.22, 0.4) * np.array([1, rng.uniform(0.88, 1), rng.uniform(0.8, 1)])
    grass = [rng.uniform(0.05, 0.12), rng.uniform(0.12, 0.19), rng.uniform(0.02, 0.05)]
    (_, right_kerb, right_walk), (_, left_kerb, left_walk) = edges[-1], edges[1]
    # each strip: d and z of its right and left edge, material, colour
    strips: list[tuple[float, float, float, float, Material, ArrayLike]] = [
        (-right_kerb, 0.0, left_kerb, 0.0, Material.ASPHALT, asphalt),
        (-right_kerb - 0.01, KERB, -right_kerb, 0.0, Material.CONCRETE, [0.4] * 3),
        (left_kerb, 0.0, left_kerb + 0.01, KERB, Material.CONCRETE, [0.4] * 3),
    ]
    for side, kerb, walk in ((-1, right_kerb, right_walk), (1, left_kerb, left_walk)):
        for near, far, material, color in (
            (kerb + 0.01, kerb + 0.16, Material.CONCRETE, [0.4] * 3),
            (kerb + 0.16, walk, Material.PAVEMENT, paving),
            (walk, 90.0, Material.GRASS, grass),
        ):
            low, high = sorted((side * near, side * far))
            strips.append((low, KERB, high, KERB, material, color))
    paint = [0.55, 0.55, 0.52]
    marked = rng.random() < 0.8
    dash, gap = rng.choice([3.0, 4.0, 6.0]), rng.choice([3.0, 6.0, 9.0])
    lines = [0.0] if lanes == LANE else [-LANE, 0.0, LANE]
    edge_line = lanes - 0.15 if rng.random() < 0.5 else None
    crossings = rng.uniform(20, 400, 2) if rng.random() < 0.6 else np.empty(0)

    cut = np.arange(np.floor(first / 4), np.ceil(last / 4) + 1) * 4
    steps = np.stack([cut[:-1], cut[1:]], axis=1)
    parts = [_ribbon(curvature, steps, *strip) for strip in strips]
    if marked:
        starts = np.arange(first, last, dash + gap)
        dashes = np.stack([starts, starts + dash], axis=1)
        painted = [(d, dashes) for d in lines] + ([(-edge_line, steps), (edge_line, steps)] if edge_line else [])
        for d, pieces in painted:
            parts.append(_ribbon(curvature, pieces, d - 0.06, 0.004, d + 0.06, 0.004, Material.ROAD_PAINT, paint))
    for s in crossings:
        for d in np.arange(-lanes + 0.25, lanes - 0.5, 1.0):
            stripe = [[s, s + 3.5]]
            parts.append(_ribbon(curvature, stripe, d, 0.005, d + 0.5, 0.005, Material.ROAD_PAINT, paint))
    return meshes.join(*parts)


def _ribbon(
    curvature: float,
    s: ArrayLike,
    d0: float,
    z0: float,
    d1: float,
    z1: float,
    material: Material,
    color: ArrayLike,
) -> Mesh:
    """Quads between pairs of places (s[:, 0], s[:, 1]) along the street, from (d0, z0) on the right to (d1, z1) on the
    left; texture coordinates are (s, d)."""
    s = np.asarray(s, float)
    corners, texture = [], []
    for at, d, z in ((s[:, 0], d0, z0), (s[:, 1], d0, z0), (s[:, 1], d1, z1), (s[:, 0], d1, z1)):
        corners.append(np.concatenate([arc_point(curvature, at, d), np.full((len(s), 1), z)], axis=1))
        texture.append(np.stack([at, np.full(len(s), d)], axis=1))
    return meshes.quads(np.stack(corners, 1), material, color, np.stack(texture, 1))


VEHICLES = {"Car": meshes.car, "Van": meshes.van, "Truck": meshes.truck}


@dataclass(frozen=True)
class _Stock:
    """The models of one street. Making a mesh costs more than placing it, so a street repeats them."""

    vehicles: list[tuple[str, Mesh]]
    people: list[Mesh]
    cyclists: list[Mesh]
    trees: list[Mesh]

    @staticmethod
    def pick(rng: np.random.Generator, models: list[Mesh]) -> Mesh:
        return models[rng.integers(len(models))]

    def vehicle(self, rng: np.random.Generator, with_trucks: bool = True) -> tuple[str, Mesh]:
        """KITTI class and mesh of a random vehicle."""
        choice = self.vehicles if with_trucks else [v for v in self.vehicles if v[0] != "Truck"]
        return choice[rng.integers(len(choice))]


def _make_stock(rng: np.random.Generator) -> _Stock:
    kinds = ["Car"] * 16 + ["Van"] * 3 + ["Truck"] * 2
    return _Stock(
        vehicles=[(kind, VEHICLES[kind](rng)) for kind in kinds],
        people=[meshes.pedestrian(rng) for _ in range(12)],
        cyclists=[meshes.cyclist(rng) for _ in range(3)],
        trees=[meshes.tree(rng, rng.uniform(4, 13)) for _ in range(8)],
    )


def _parked_cars(rng: np.random.Generator, stock: _Stock, end: float, side: int, d: float) -> list[Actor]:
    cars, s, filled = [], -BEHIND, rng.uniform(0.3, 0.95)
    while s < end:
        kind, mesh = stock.vehicle(rng, with_trucks=False)
        length = mesh.size[2]
        if rng.random() < filled:
            yaw = (0 if side < 0 else np.pi) + (np.pi if rng.random() < 0.1 else 0) + rng.normal(0, 0.02)
            cars.append(Actor(mesh, s + length / 2, side * (d + rng.normal(0, 0.08)), yaw=yaw, kind=kind))
        s += length + rng.uniform(0.6, 1.8)
    return cars


def _traffic(
    rng: np.random.Generator, stock: _Stock, end: float, ego_speed: float, duration: float, lanes: float
) -> list[Actor]:
    """A car ahead and one behind at the pace of the recording car, and oncoming traffic."""
    cars = []
    for gap in (rng.uniform(14, 60), -rng.uniform(12, 40)):
        if rng.random() < 0.7:
            kind, mesh = stock.vehicle(rng)
            drift = rng.uniform(-0.25, 1.0) * (abs(gap) - 11) / max(duration, 1.0) * np.sign(gap)
            lane = -LANE / 2 + rng.normal(0, 0.15)
            cars.append(Actor(mesh, gap, lane, yaw=rng.normal(0, 0.01), speed=ego_speed + drift, kind=kind))
    speed = rng.uniform(5, 13)
    for lane in np.arange(LANE / 2, lanes, LANE):
        s = -BEHIND
        while s < end + speed * duration - AHEAD + NEAR_AHEAD:
            s += rng.exponential(45) + 14
            kind, mesh = stock.vehicle(rng)
            d = lane + rng.normal(0, 0.15)
            cars.append(Actor(mesh, s, d, yaw=np.pi + rng.normal(0, 0.01), speed=-speed, kind=kind))
    s = rng.uniform(10, 60)
    while s < end:
        direction = rng.choice([-1, 1])
        yaw, speed = 0.0 if direction > 0 else np.pi, direction * rng.uniform(3, 5)
        mesh, d = stock.pick(rng, stock.cyclists), -direction * (lanes - 0.35)
        cars.append(Actor(mesh, s, d, yaw=yaw, speed=speed, kind="Cyclist"))
        s += rng.exponential(90) + 20
    return cars


def _people(rng: np.random.Generator, stock: _Stock, end: float, side: int, kerb: float, walk: float) -> list[Actor]:
    people, s = [], -BEHIND
    spacing = rng.choice([8.0, 20.0, 60.0])
    while s < end:
        s += rng.exponential(spacing) + 0.6
        speed = rng.choice([-1, 1]) * rng.uniform(0.8, 1.6) if rng.random() < 0.85 else 0.0
        yaw = rng.uniform(-np.pi, np.pi) if speed == 0 else (0.0 if speed > 0 else np.pi) + rng.normal(0, 0.15)
        d = side * rng.uniform(kerb + 0.9, walk - 0.3)
        people.append(Actor(stock.pick(rng, stock.people), s, d, KERB, yaw, speed, "Pedestrian"))
    return people


def _street_furniture(rng: np.random.Generator, stock: _Stock, end: float, side: int, kerb: float) -> list[Actor]:
    """Lamps, signs, bollards and street trees in the half metre behind the kerb."""
    things, d = [], side * (kerb + 0.4)
    towards_road = 0.0 if side > 0 else np.pi
    lamps = rng.uniform(22, 40)
    for s in np.arange(-BEHIND + rng.uniform(0, lamps), end, lamps):
        things.append(Actor(meshes.lamp_post(rng), s, d, KERB, towards_road))
    for s in np.arange(-BEHIND, end, 35.0) + rng.uniform(0, 30):
        if rng.random() < 0.6:
            things.append(Actor(meshes.sign(rng), s, d, KERB, 0.0 if side < 0 else np.pi))
    if rng.random() < 0.3:
        post = meshes.bollard(rng)
        things += [Actor(post, s, d, KERB) for s in np.arange(-BEHIND, end, 2.5)]
    if rng.random() < 0.4:
        size, spacing = rng.uniform(4.5, 9), rng.uniform(9, 18)
        models = [meshes.tree(rng, size * rng.uniform(0.85, 1.15)) for _ in range(4)]
        for s in np.arange(-BEHIND + rng.uniform(0, spacing), end, spacing):
            things.append(Actor(stock.pick(rng, models), s, d, KERB, rng.uniform(0, 6.3)))
    return things


def _frontage(
    rng: np.random.Generator, stock: _Stock, end: float, side: int, walk: float, urban: float, curvature: float
) -> list[Actor]:
    """What stands behind the pavement: houses, gardens behind fences and hedges, trees."""
    things, s = [], -BEHIND
    setback = rng.choice([0.3, 2.5, 6.0], p=[0.4, 0.3, 0.3])
    storeys = rng.choice([2, 3, 4])
    while s < end:
        if rng.random() < 0.25 + 0.65 * urban:
            width, depth = rng.uniform(7, 20), rng.uniform(8, 13)
            front = walk + setback + rng.uniform(0, 0.6)
            house = meshes.building(rng, width, depth, max(1, int(storeys + rng.integers(-1, 2))))
            # on the inner side of a bend the street is longer than the row of houses
            stretch = 1 / (1 - curvature * side * (front + depth / 2))
            length = max(width, width * stretch) + (0.2 if rng.random() < urban else rng.uniform(2, 6))
            things.append(Actor(house, s + length / 2, side * (front + depth / 2), KERB, 0 if side < 0 else np.pi))
            if setback > 2:
                things += _garden(rng, s, s + length, side, walk, setback)
        else:
            length = rng.uniform(8, 25)
            things += _garden(rng, s, s + length, side, walk, 12.0)
            things += [
                Actor(
                    stock.pick(rng, stock.trees),
                    rng.uniform(s, s + length),
                    side * rng.uniform(walk + 3, walk + 26),
                    KERB,
                    rng.uniform(0, 6.3),
                )
                for _ in range(rng.integers(1, 6))
            ]
        s += length
    return things


def _garden(rng: np.random.Generator, first: float, last: float, side: int, walk: float, depth: float) -> list[Actor]:
    """A boundary (fence, hedge or nothing) and a few bushes on a plot."""
    things, length = [], last - first
    border = rng.choice(["fence", "hedge", "open"])
    middle, d = first + length / 2, side * (walk + 0.4)
    if border == "fence":
        things.append(Actor(meshes.fence(rng, length - 0.3), middle, d, KERB))
    elif border == "hedge":
        things.append(Actor(meshes.bush(rng, length - 0.5, 0.7, rng.uniform(0.7, 1.9)), middle, d + side * 0.4, KERB))
    for _ in range(rng.integers(0, 4)):
        size = rng.uniform(0.6, 1.6)
        place = rng.uniform(first, last), side * rng.uniform(walk + 1.2, walk + max(depth - 0.8, 1.3))
        things.append(Actor(meshes.bush(rng, size, size, size), *place, KERB))
    return things
