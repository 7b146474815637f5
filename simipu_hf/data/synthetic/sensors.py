"""The recording car's sensors: calibration, a camera and a spinning LiDAR, both by ray casting.

Frames: *ego* is x forward, y left, z up, on the ground below the rectified reference camera; *rectified camera* is
x right, y down, z forward (level, 1.65 m above the road); *LiDAR* is x forward, y left, z up at the sensor: KITTI's.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import uniform_filter
from scipy.spatial.transform import Rotation

from .appearance import Lighting, Material, appearance
from .street import LANE, Hits, Street

AXES = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0.0]])
"""Camera axes of a vector in ego or LiDAR axes."""

CAMERA_HEIGHT = 1.65
HDL64_ELEVATIONS = np.deg2rad(np.concatenate([np.linspace(2.0, -8.33, 32), np.linspace(-8.83, -24.33, 32)]))
"""Velodyne HDL-64E: 32 beams a third of a degree apart above 32 beams half a degree apart."""


class Calibration:
    """A set-up as KITTI's, a little different every day, of a car on a street; `image_size` is (height, width).

    `P2` (3, 4) rectified camera -> pixels (square, centres at integers); `R0_rect` (3, 3); `Tr_velo_to_cam` (3, 4);
    `lidar_to_camera` (4, 4) LiDAR -> rectified camera; `camera_to_world` (4, 4) from there to the street's frame.
    """

    def __init__(self, rng: np.random.Generator, image_size: tuple[int, int], street: Street):
        self.image_size = height, width = image_size
        focal = width / 1242 * rng.uniform(700, 725)
        centre_x = (610 + rng.uniform(-8, 8)) * width / 1242 - 0.5
        centre_y = (173.4 + rng.uniform(-3, 8)) * height / 375 - 0.5
        K = np.array([[focal, 0, centre_x], [0, focal, centre_y], [0, 0, 1]])
        offset = np.array([0.06, 0.0, 0.0027]) + rng.normal(0, 2e-4, 3)
        tilt, self.R0_rect = Rotation.from_rotvec(rng.normal(0, 0.008, (2, 3))).as_matrix()
        translation = np.array([-0.004, -0.076, -0.272]) + rng.normal(0, 0.003, 3)
        self.P2, self.Tr_velo_to_cam = np.c_[K, K @ offset], np.c_[tilt @ AXES, translation]
        self.lidar_to_camera = np.vstack([self.R0_rect @ self.Tr_velo_to_cam, [0, 0, 0, 1]])
        camera_to_ego = np.eye(4)
        camera_to_ego[:3, :3], camera_to_ego[2, 3] = AXES.T, CAMERA_HEIGHT
        ego_pose = street.pose(0, -LANE / 2 + rng.normal(0, 0.12), rng.normal(0, 0.02))
        self.camera_to_world = ego_pose @ camera_to_ego

    def rays(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rays of pixels in the world: camera centre (3,) and directions (N, 3) of depth 1 (third row of `P2`)."""
        rotation, inverse = self.camera_to_world[:3, :3], np.linalg.inv(self.P2[:, :3])
        centre = self.camera_to_world[:3, 3] - rotation @ inverse @ self.P2[:, 3]
        return centre, np.stack([u, v, np.ones_like(u)], axis=-1) @ (rotation @ inverse).T


def render(street: Street, calibration: Calibration, rng: np.random.Generator) -> tuple[np.ndarray, Hits]:
    """Picture (H, W, 3) uint8 of a pinhole camera, and the first hits of the rays through the pixels' centres."""
    height, width = calibration.image_size
    v, u = np.mgrid[:height, :width].reshape(2, -1).astype(float)
    hits = street.cast(*calibration.rays(u, v))
    light, distance = street.lighting, hits.distance[hits.rays]
    view = hits.directions / np.linalg.norm(hits.directions, axis=1, keepdims=True)
    footprint = distance / calibration.P2[0, 0] / np.sqrt(np.maximum(hits.cosine, 0.02))
    albedo, _, gloss = appearance(hits.material, hits.color, hits.place, footprint, hits.owner)
    color = albedo * _light(street, hits, (height, width), rng)
    glossy = np.flatnonzero(gloss)
    color[glossy] += _reflection(light, view[hits.rays[glossy]], hits.normals[glossy], gloss[glossy])
    haze = np.exp(-distance / light.visibility)[:, None]
    radiance = np.empty_like(view)
    radiance[hits.rays] = color * haze + 0.9 * light.horizon_color * (1 - haze)
    missed = np.isinf(hits.distance)
    radiance[missed] = light.sky(view[missed])
    # automatic exposure on what is not sky, shot and read noise, gamma 2.2
    middle, bright = np.percentile(radiance[hits.rays, 1], [50, 97])
    linear = radiance * np.float32(min(0.17 / max(middle, 0.01), 0.8 / max(bright, 0.01)) * rng.uniform(0.85, 1.2))
    spread = np.sqrt(2e-5 + 1.5e-4 * np.clip(linear, 0, 1))
    linear += spread * rng.standard_normal(linear.shape, dtype=np.float32)
    return np.round(255 * np.clip(linear, 0, 1) ** (1 / 2.2)).astype(np.uint8).reshape(height, width, 3), hits


def _light(street: Street, hits: Hits, image_size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Light of sun and sky (M, 3) that falls on every hit, with shadows."""
    light, normals = street.lighting, hits.normals
    above = hits.points + 0.02 * normals
    sun = normals @ light.sun_direction
    sun = np.where(hits.material == Material.LEAVES, 0.35 + 0.5 * np.abs(sun), np.maximum(sun, 0))
    lit = np.flatnonzero(sun > 0)
    sun[lit[street.triangles.occluded(above[lit], np.tile(light.sun_direction, (len(lit), 1)), 150.0)]] = 0
    # the open share of the sky: one random direction a pixel, free for 2.5 m or not, smoothed
    toward = rng.standard_normal(normals.shape, dtype=np.float32)
    toward = toward / np.linalg.norm(toward, axis=1, keepdims=True) + normals
    free = np.ones(image_size, np.float32)
    free.flat[hits.rays] -= street.triangles.occluded(above, toward, 2.5)
    sky = (0.28 + 0.72 * uniform_filter(free, 5).flat[hits.rays]) * (0.62 + 0.38 * normals[:, 2])
    return sun[:, None] * light.sun_color + sky[:, None] * 0.375 * (light.zenith_color + light.horizon_color)


def _reflection(light: Lighting, view: np.ndarray, normals: np.ndarray, gloss: np.ndarray) -> np.ndarray:
    """Mirrored sky, dark below the horizon, stronger at grazing angles (Schlick)."""
    cosine = -(view * normals).sum(axis=1)
    mirrored = view + 2 * cosine[:, None] * normals
    fresnel = 1.6 * gloss * (0.05 + 0.95 * (1 - np.clip(cosine, 0, 1)) ** 5)
    return fresnel[:, None] * np.where(mirrored[:, 2:] > 0.03, light.sky(mirrored), 0.12)


@dataclass(frozen=True)
class Lidar:
    """A spinning LiDAR, Velodyne HDL-64E by default.

    `azimuth_steps` firings a turn (2083 at 10 Hz); `range_noise` standard deviation in metres; `dropouts` whether weak
    returns (dark, grazing, far, through glass) and one in a hundred others are lost.
    """

    azimuth_steps: int = 2083
    range_noise: float = 0.02
    dropouts: bool = True

    def scan(
        self, street: Street, calibration: Calibration, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Points (N, 4) float32 x y z reflectance in the LiDAR frame, beam by beam, and the owner (N,) of each."""
        turn = np.linspace(0, 2 * np.pi, self.azimuth_steps, endpoint=False)
        elevation, azimuth = (angle.ravel() for angle in np.meshgrid(HDL64_ELEVATIONS, turn, indexing="ij"))
        level = np.cos(elevation)
        beams = np.stack([level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation)], axis=1)
        pose = calibration.camera_to_world @ calibration.lidar_to_camera
        hits = street.cast(pose[:3, 3], beams @ pose[:3, :3].T)
        distance = hits.distance[hits.rays]
        _, reflectance, gloss = appearance(hits.material, hits.color, hits.place, 0.003 * distance, hits.owner)
        kept = (distance > 1.5) & (distance < 120)
        if self.dropouts:
            signal = reflectance * (0.1 + hits.cosine) * (1 - 0.8 * gloss) * (100 / distance) ** 2
            kept &= rng.random(len(distance)) < 0.99 * (1 - np.exp(-8 * signal))
        facing = np.where(hits.material == Material.RETROREFLECTOR, 1, 0.4 + 0.6 * hits.cosine)
        measured = reflectance * facing * (1 + 0.08 * rng.standard_normal(len(facing)))
        noisy = distance + self.range_noise * rng.standard_normal(len(distance))
        points = np.c_[beams[hits.rays] * noisy[:, None], np.round(np.clip(measured, 0, 0.99), 2)]
        return points[kept].astype(np.float32), hits.owner[kept]
