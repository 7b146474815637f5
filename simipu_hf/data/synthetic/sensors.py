"""The recording car's sensors: calibration, a camera and a spinning LiDAR, both ray-cast with Embree.

Frames: *ego* is x forward, y left, z up, on the ground below the rectified reference camera; *rectified camera* is
x right, y down, z forward (level, 1.65 m above the road); *LiDAR* is x forward, y left, z up at the sensor: KITTI's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import uniform_filter
from scipy.spatial.transform import Rotation

from simipu_hf.errors import SimIPUError

from .materials import Lighting, appearance
from .meshes import Material, Mesh, join

try:
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene
except ImportError:  # no wheel for this platform (Linux on ARM)
    EmbreeScene = TriangleMesh = None

CAMERA_HEIGHT = 1.65
KITTI_SIZE = (375, 1242)


@dataclass(frozen=True)
class Calibration:
    """KITTI's calibration of one drive.

    `P2` (3, 4) rectified camera -> pixels (centres at integers); `R0_rect` (3, 3); `Tr_velo_to_cam` (3, 4).
    """

    P2: np.ndarray
    R0_rect: np.ndarray
    Tr_velo_to_cam: np.ndarray

    @property
    def lidar_to_camera(self) -> np.ndarray:
        """4 x 4, LiDAR -> rectified camera: `R0_rect @ Tr_velo_to_cam`."""
        matrix = np.eye(4)
        matrix[:3] = self.R0_rect @ self.Tr_velo_to_cam
        return matrix

    @property
    def ego_to_camera(self) -> np.ndarray:
        """4 x 4, ego -> rectified camera: a change of axes and the camera's height."""
        return np.array([[0, -1, 0, 0], [0, 0, -1, CAMERA_HEIGHT], [1, 0, 0, 0], [0, 0, 0, 1.0]])

    def camera_to_world(self, ego_pose: np.ndarray) -> np.ndarray:
        """4 x 4, rectified camera -> world, where `ego_pose` is ego -> world."""
        return ego_pose @ np.linalg.inv(self.ego_to_camera)


def make_calibration(rng: np.random.Generator, image_size: tuple[int, int]) -> Calibration:
    """A set-up as KITTI's, a little different every day; `image_size` is (height, width), pixels stay square.

    The focal length is KITTI's about 720 pixels at a width of 1242. The LiDAR is 0.27 m behind the camera, 1.73 m up.
    """
    height, width = image_size
    scale = width / KITTI_SIZE[1]
    focal = scale * rng.uniform(700, 725)
    centre_x = (609.5 + rng.uniform(-8, 8) + 0.5) * scale - 0.5
    centre_y = (172.9 + rng.uniform(-3, 8) + 0.5) * height / KITTI_SIZE[0] - 0.5
    K = np.array([[focal, 0, centre_x], [0, focal, centre_y], [0, 0, 1]])
    offset = np.array([0.06, 0.0, 0.0027]) + rng.normal(0, 2e-4, 3)
    # z before x: the axes of a camera seen from a LiDAR
    axes = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0.0]])
    tilt, rectification = Rotation.from_rotvec(rng.normal(0, 0.008, (2, 3))).as_matrix()
    translation = np.array([-0.004, -0.076, -0.272]) + rng.normal(0, 0.003, 3)
    return Calibration(
        P2=np.concatenate([K, (K @ offset)[:, None]], axis=1),
        R0_rect=rectification,
        Tr_velo_to_cam=np.concatenate([tilt @ axes, translation[:, None]], axis=1),
    )


@dataclass(frozen=True)
class Hits:
    """First hits of N rays: `distance` (N,) in units of the ray's direction (inf: none), and properties of the M hits.

    `rays` (M,) indices into N; `points`, `normals` (M, 3) in the world, normals towards the ray; `cosine` (M,) of the
    angle of incidence; `texture` (M, 2), `color` (M, 3), `material` (M,) and `owner` (M,) of the surface.
    """

    distance: np.ndarray
    rays: np.ndarray
    points: np.ndarray
    normals: np.ndarray
    cosine: np.ndarray
    texture: np.ndarray
    color: np.ndarray
    material: np.ndarray
    owner: np.ndarray


class Layer:
    """Meshes in the world frame, ready for ray casting. `owners` gives the number that hits on each mesh report."""

    def __init__(self, parts: Sequence[Mesh], owners: Sequence[int]):
        if EmbreeScene is None:
            raise SimIPUError(
                "the synthetic drive needs the package 'embreex' (Embree ray casting), which is not installed and has "
                "no wheel for Linux on ARM. Use a recorded data set, or synthesize on another machine"
            )
        self.mesh = join(*parts)
        self.owner = np.repeat(np.asarray(owners, np.int32), [len(part.material) for part in parts])
        self.scene = EmbreeScene()
        self._geometry = TriangleMesh(self.scene, self.mesh.corners)


class RayScene:
    """What rays meet: a layer that stands for a whole drive and one that is new in every frame."""

    def __init__(self, layers: Sequence[Layer]):
        self._layers = tuple(layers)

    def first(self, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Owner (N,) and distance (N,) of the first hit (-1, inf: none) of rays from `origin` (3,)."""
        owner = np.full(len(directions), -1, np.int32)
        distance = np.full(len(directions), np.inf, np.float32)
        for layer, triangle, reach, _ in self._run(origin, directions):
            nearer = (triangle >= 0) & (reach < distance)
            distance[nearer], owner[nearer] = reach[nearer], layer.owner[triangle[nearer]]
        return owner, distance

    def cast(self, origin: np.ndarray, directions: np.ndarray) -> Hits:
        """First hits of rays from one `origin` (3,) along `directions` (N, 3), not necessarily of unit length."""
        directions = np.asarray(directions, np.float32)
        results = list(self._run(origin, directions))
        reach = np.stack([np.where(triangle >= 0, reach, np.inf) for _, triangle, reach, _ in results])
        nearest, distance = reach.argmin(axis=0), reach.min(axis=0)
        parts = []
        for index, (layer, triangle, _, result) in enumerate(results):
            rays = np.flatnonzero((nearest == index) & np.isfinite(distance))
            parts.append((rays, *self._surface(layer, triangle[rays], result, rays)))
        rays, normals, *rest = (np.concatenate(column) for column in zip(*parts, strict=True))
        direction = directions[rays]
        cosine = np.einsum("ij,ij->i", normals, direction)
        normals *= -np.sign(cosine)[:, None]
        length = np.sqrt(np.einsum("ij,ij->i", direction, direction))
        points = np.float32(origin) + distance[rays, None] * direction
        return Hits(distance, rays, points, normals, np.abs(cosine) / length, *rest)

    @staticmethod
    def _surface(
        layer: Layer, triangle: np.ndarray, result: dict[str, np.ndarray], rays: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Unit normals, texture coordinates, colour, material and owner at hits on a layer's triangles."""
        normals = result["Ng"][rays]
        normals /= np.sqrt(np.einsum("ij,ij->i", normals, normals))[:, None] + 1e-12
        u, v, corners = result["u"][rays, None], result["v"][rays, None], layer.mesh.texture[triangle]
        texture = corners[:, 0] * (1 - u - v) + corners[:, 1] * u + corners[:, 2] * v
        return normals, texture, layer.mesh.color[triangle], layer.mesh.material[triangle], layer.owner[triangle]

    def occluded(self, origins: np.ndarray, directions: np.ndarray, reach: float) -> np.ndarray:
        """Whether anything is hit within `reach` times the direction, (N,) bool."""
        origins, directions = (np.ascontiguousarray(rays, np.float32) for rays in (origins, directions))
        blocked = np.zeros(len(origins), bool)
        for layer in self._layers:
            free = np.flatnonzero(~blocked)
            limit = np.full(len(free), reach, np.float32)
            hit = layer.scene.run(origins[free], directions[free], dists=limit, query="OCCLUDED")
            blocked[free] = hit >= 0
        return blocked

    def _run(
        self, origin: np.ndarray, directions: np.ndarray
    ) -> Iterator[tuple[Layer, np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
        """Per layer: itself, triangle (N,) (-1: none), distance (N,) and Embree's full result."""
        directions = np.ascontiguousarray(directions, np.float32)
        origins = np.broadcast_to(np.float32(origin), directions.shape).copy()
        for layer in self._layers:
            result = layer.scene.run(origins, directions, output=True)
            yield layer, result["primID"], result["tfar"], result


# --- camera ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CameraFrame:
    """`image` (H, W, 3) uint8 RGB; `depth` (H, W) float32 metres (third row of `P2`), inf: sky; `owner` (H, W) of
    what is seen at the pixel's centre, -1: none."""

    image: np.ndarray
    depth: np.ndarray
    owner: np.ndarray


def pixel_rays(
    calibration: Calibration, ego_pose: np.ndarray, u: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rays of pixels (u, v) in the world: camera centre (3,) and directions (N, 3) of depth 1.

    A direction times d ends at depth d, where depth is the third row of `P2`, so that a ray's distance is its depth.
    """
    to_world = calibration.camera_to_world(ego_pose)
    inverse = np.linalg.inv(calibration.P2[:, :3])
    centre = to_world[:3, :3] @ (-inverse @ calibration.P2[:, 3]) + to_world[:3, 3]
    directions = np.stack([u, v, np.ones_like(u)], axis=-1) @ (to_world[:3, :3] @ inverse).T
    return centre, directions.astype(np.float32)


class Camera:
    """A pinhole camera with sun, sky light, shadows, reflections, haze, exposure and sensor noise."""

    SUBPIXELS = ((-0.375, -0.125), (-0.125, 0.375), (0.125, -0.375), (0.375, 0.125))

    def __init__(self, calibration: Calibration, image_size: tuple[int, int], lighting: Lighting):
        self.calibration, self.image_size, self.lighting = calibration, image_size, lighting

    def render(self, scene: RayScene, ego_pose: np.ndarray, rng: np.random.Generator) -> CameraFrame:
        """One picture. Pixels on an outline average four rays, the others have one through their centre."""
        height, width = self.image_size
        v, u = np.mgrid[:height, :width].reshape(2, -1).astype(float)
        origin, directions = pixel_rays(self.calibration, ego_pose, u, v)
        hits = scene.cast(origin, directions)
        ambient = np.ones(height * width, np.float32)
        ambient[hits.rays] = self._open_sky(scene, hits, rng)
        ambient = uniform_filter(ambient.reshape(height, width), 5).reshape(-1)
        radiance = self._radiance(scene, hits, directions, ambient)

        owner = np.full(height * width, -1, np.int32)
        owner[hits.rays] = hits.owner
        outline = np.flatnonzero(self._outline(hits))
        du, dv = np.transpose(self.SUBPIXELS)[:, :, None]
        origin, rays = pixel_rays(self.calibration, ego_pose, (u[outline] + du).ravel(), (v[outline] + dv).ravel())
        parts = self._radiance(scene, scene.cast(origin, rays), rays, np.tile(ambient[outline], len(self.SUBPIXELS)))
        radiance[outline] = parts.reshape(len(self.SUBPIXELS), -1, 3).mean(axis=0)
        return CameraFrame(
            image=self._expose(radiance, hits.rays, rng).reshape(height, width, 3),
            depth=hits.distance.reshape(height, width),
            owner=owner.reshape(height, width),
        )

    def _outline(self, hits: Hits) -> np.ndarray:
        """Pixels (H * W,) whose right or lower neighbour shows another surface: material, direction or distance."""
        height, width = self.image_size
        inverse = np.zeros(height * width, np.float32)
        inverse[hits.rays] = 1 / hits.distance[hits.rays]
        kind = np.full(height * width, 255, np.float32)
        kind[hits.rays] = hits.material + 0.31 * hits.normals[:, 0] + 0.17 * hits.normals[:, 2]
        edge = np.zeros((height, width), bool)
        inverse_map, kind_map = inverse.reshape(height, width), kind.reshape(height, width)
        for axis in (0, 1):
            step = np.abs(np.diff(inverse_map, axis=axis)) > 0.1 * np.minimum(*_neighbours(inverse_map, axis)) + 1e-6
            step |= np.abs(np.diff(kind_map, axis=axis)) > 0.05
            before, after = _neighbours(edge, axis)
            before |= step
            after |= step
        return edge.reshape(-1)

    def _open_sky(self, scene: RayScene, hits: Hits, rng: np.random.Generator) -> np.ndarray:
        """1 where a random direction above the surface is free for 2.5 m, else 0: to be smoothed."""
        toward = rng.standard_normal((len(hits.rays), 3), dtype=np.float32)
        toward /= np.sqrt(np.einsum("ij,ij->i", toward, toward))[:, None]
        toward += hits.normals
        return 1.0 - scene.occluded(hits.points + 0.02 * hits.normals, toward, 2.5)

    def _radiance(self, scene: RayScene, hits: Hits, directions: np.ndarray, ambient: np.ndarray) -> np.ndarray:
        """Light (N, 3) arriving along every ray. `ambient` (N,) is the open share of the sky at the hit."""
        light = self.lighting
        view = directions / np.sqrt(np.einsum("ij,ij->i", directions, directions))[:, None]
        radiance = np.empty(view.shape, np.float32)
        missed = np.flatnonzero(np.isinf(hits.distance))
        radiance[missed] = light.sky(view[missed])
        distance, normals, view = hits.distance[hits.rays], hits.normals, view[hits.rays]
        footprint = distance / self.calibration.P2[0, 0] / np.sqrt(np.maximum(hits.cosine, 0.02))
        surface = appearance(hits.material, hits.texture, hits.color, footprint)

        sun = normals @ light.sun_direction
        leafy = hits.material == Material.LEAVES
        sun = np.where(leafy, 0.35 + 0.5 * np.abs(sun), np.maximum(sun, 0))
        lit = np.flatnonzero(sun > 0)
        toward_sun = np.broadcast_to(light.sun_direction, (len(lit), 3))
        shadow = scene.occluded(hits.points[lit] + 0.02 * normals[lit], toward_sun, 150.0)
        sun[lit[shadow]] = 0
        fill = 0.5 * light.zenith_color + 0.5 * light.horizon_color
        sky_light = (0.28 + 0.72 * ambient[hits.rays]) * (0.62 + 0.38 * normals[:, 2])
        color = surface.albedo * (sun[:, None] * light.sun_color + 0.75 * sky_light[:, None] * fill)

        glossy = np.flatnonzero(surface.gloss > 0)
        color[glossy] += self._reflection(view[glossy], normals[glossy], surface.gloss[glossy], sun[glossy])
        haze = np.exp(-distance / light.visibility)[:, None]
        radiance[hits.rays] = color * haze + 0.9 * light.horizon_color * (1 - haze)
        return radiance

    def _reflection(self, view: np.ndarray, normals: np.ndarray, gloss: np.ndarray, sun: np.ndarray) -> np.ndarray:
        """Mirrored sky (dark below the horizon) and the sun's highlight, stronger at grazing angles (Schlick)."""
        cosine = -np.einsum("ij,ij->i", view, normals)
        mirrored = view + 2 * cosine[:, None] * normals
        fresnel = gloss * (0.05 + 0.95 * (1 - np.clip(cosine, 0, 1)) ** 5)
        above = 1 / (1 + np.exp(-12 * (mirrored[:, 2:] - 0.05)))
        sky = self.lighting.sky(mirrored, with_skyline=False) * above + 0.12 * (1 - above)
        highlight = np.clip(mirrored @ self.lighting.sun_direction, 0, 1) ** 90 * (sun > 0)
        return fresnel[:, None] * 1.6 * sky + (0.8 * gloss * highlight)[:, None] * self.lighting.sun_color

    def _expose(self, radiance: np.ndarray, solid: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Automatic exposure on what is not sky, shot and read noise, the sRGB-like curve; (N, 3) uint8."""
        middle, bright = np.percentile(radiance[solid, 1], [50, 97]) if len(solid) else (0.5, 1.0)
        gain = min(0.17 / max(middle, 0.01), 0.8 / max(bright, 0.01)) * rng.uniform(0.85, 1.2)
        linear = radiance * np.float32(gain)
        spread = np.sqrt(2e-5 + 1.5e-4 * np.clip(linear, 0, 1))
        linear += spread * rng.standard_normal(linear.shape, dtype=np.float32)
        return _GAMMA[(np.clip(linear, 0, 1) * (len(_GAMMA) - 1)).astype(np.int32)]


_GAMMA = np.round(255 * np.linspace(0, 1, 8192) ** (1 / 2.2)).astype(np.uint8)


def _neighbours(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Views of every element but the last, and every element but the first, along `axis`."""
    return (values[:-1], values[1:]) if axis == 0 else (values[:, :-1], values[:, 1:])


# --- LiDAR ----------------------------------------------------------------------------------------------------------

HDL64_ELEVATIONS = np.deg2rad(np.concatenate([np.linspace(2.0, -8.33, 32), np.linspace(-8.83, -24.33, 32)]))
"""Velodyne HDL-64E: 32 beams a third of a degree apart above 32 beams half a degree apart."""


@dataclass(frozen=True)
class Lidar:
    """A spinning LiDAR, Velodyne HDL-64E unless told otherwise.

    `azimuth_steps` firings a turn (2083 at 10 Hz); `range_noise` standard deviation in metres; `dropouts` whether weak
    returns (dark, grazing, far, through glass) and one in a hundred others are lost.
    """

    azimuth_steps: int = 2083
    range_noise: float = 0.02
    dropouts: bool = True
    min_range: float = 1.5
    max_range: float = 120.0

    def scan(
        self, scene: RayScene, calibration: Calibration, ego_pose: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Points (N, 4) float32 x y z reflectance in the LiDAR frame, and the owner (N,) of each.

        Beam by beam from the top, each turning left from straight ahead.
        """
        beams = _beam_directions(self.azimuth_steps)
        pose = calibration.camera_to_world(ego_pose) @ calibration.lidar_to_camera
        hits = scene.cast(pose[:3, 3], beams @ np.float32(pose[:3, :3].T))
        distance = hits.distance[hits.rays]
        surface = appearance(hits.material, hits.texture, hits.color, 0.003 * distance)
        mirror = hits.material == Material.RETROREFLECTOR
        reflectance = surface.reflectance * np.where(mirror, 1, 0.4 + 0.6 * hits.cosine)
        reflectance *= 1 + 0.08 * rng.standard_normal(len(distance), dtype=np.float32)

        kept = (distance > self.min_range) & (distance < self.max_range)
        if self.dropouts:
            signal = surface.reflectance * (0.1 + hits.cosine) * (1 - 0.8 * surface.gloss) * (100 / distance) ** 2
            kept &= rng.random(len(distance), dtype=np.float32) < 0.99 * (1 - np.exp(-8 * signal))
        noisy = distance + self.range_noise * rng.standard_normal(len(distance), dtype=np.float32)
        points = np.empty((int(kept.sum()), 4), np.float32)
        points[:, :3] = beams[hits.rays[kept]] * noisy[kept, None]
        points[:, 3] = np.round(np.clip(reflectance[kept], 0, 0.99), 2)
        return points, hits.owner[kept]


@lru_cache(maxsize=1)
def _beam_directions(azimuth_steps: int) -> np.ndarray:
    """Unit directions (64 * `azimuth_steps`, 3) in the LiDAR frame, float32, beam by beam."""
    azimuth = np.linspace(0, 2 * np.pi, azimuth_steps, endpoint=False)
    elevation = HDL64_ELEVATIONS[:, None]
    forward, left, up = np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)
    return np.stack(np.broadcast_arrays(forward, left, up), axis=-1, dtype=np.float32).reshape(-1, 3)
