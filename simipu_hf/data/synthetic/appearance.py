"""What surfaces look like to a camera and to a LiDAR: materials, patterns, light and sky."""

from enum import IntEnum
from functools import lru_cache

import numpy as np

Material = IntEnum(
    "Material",
    "ASPHALT ROAD_PAINT PAVEMENT GRASS PLASTER BRICK ROOF_TILES CAR_PAINT GLASS TYRE METAL RETROREFLECTOR CLOTH BARK "
    "LEAVES",
    start=0,
)
# reflectance at 905 nm (dark paint and glass send little back), what brightness adds to it, contrast of fine (1.5 cm)
# and of coarse (25 cm) grain, gloss
LOOKS = {
    Material.ASPHALT: (0.22, 0.0, 0.13, 0.10, 0.0),
    Material.ROAD_PAINT: (0.62, 0.0, 0.08, 0.14, 0.0),
    Material.PAVEMENT: (0.30, 0.0, 0.08, 0.08, 0.0),
    Material.GRASS: (0.42, 0.0, 0.30, 0.25, 0.0),
    Material.PLASTER: (0.19, 0.4, 0.05, 0.05, 0.0),
    Material.BRICK: (0.26, 0.0, 0.15, 0.10, 0.0),
    Material.ROOF_TILES: (0.24, 0.0, 0.15, 0.15, 0.0),
    Material.CAR_PAINT: (0.06, 0.5, 0.0, 0.0, 0.35),
    Material.GLASS: (0.03, 0.0, 0.0, 0.0, 0.9),
    Material.TYRE: (0.05, 0.0, 0.10, 0.0, 0.0),
    Material.METAL: (0.45, 0.0, 0.03, 0.05, 0.1),
    Material.RETROREFLECTOR: (0.95, 0.0, 0.01, 0.0, 0.0),
    Material.CLOTH: (0.32, 0.0, 0.12, 0.08, 0.0),
    Material.BARK: (0.28, 0.0, 0.30, 0.15, 0.0),
    Material.LEAVES: (0.50, 0.0, 0.15, 0.05, 0.0),
}
BAY, STOREY = 2.8, 3.0
NOISE_SIZE, NOISE_LEVELS = 512, 9


@lru_cache(maxsize=1)
def _noise_pyramid() -> np.ndarray:
    """Tileable noise with a natural (1/f) spectrum, unit variance, and the same blurred by 2, 4, ... texels."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(NOISE_SIZE), np.fft.fftfreq(NOISE_SIZE)))
    white = np.random.default_rng(20220228).normal(size=frequency.shape)
    spectrum = np.fft.fft2(white) * (frequency > 0) / (frequency + 0.008)
    blurs = [0.0, *(0.5 * 2.0 ** np.arange(1, NOISE_LEVELS))]
    levels = [np.fft.ifft2(spectrum * np.exp(-2 * (np.pi * frequency * blur) ** 2)).real for blur in blurs]
    return (np.stack(levels) / levels[0].std()).astype(np.float32)


def noise(position: np.ndarray, texel: float, footprint: np.ndarray | float) -> np.ndarray:
    """Noise of unit variance at positions (N, 2) in metres, `texel` metres fine, averaged over `footprint` metres."""
    level = np.log2(np.maximum(np.asarray(footprint) / texel, 1)).astype(np.int32)
    column, row = np.floor(position.T / texel).astype(np.int32) % NOISE_SIZE
    return _noise_pyramid()[np.minimum(level, NOISE_LEVELS - 1), row, column]


def appearance(
    material: np.ndarray, color: np.ndarray, place: np.ndarray, footprint: np.ndarray, owner: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Albedo (N, 3), reflectance (N,) and gloss (N,) of `material` (N,) painted in `color` (N, 3).

    `place` (N, 2) is metres along the surface, `footprint` (N,) the width of a pixel there: what is finer is averaged.
    `owner` (N,) makes walls differ from house to house.
    """
    material, color = _cut_windows(material, color, place, owner)
    base, tint, fine, coarse, gloss = np.array(list(LOOKS.values()), np.float32)[material].T
    grain = 1 + fine * noise(place, 0.015, footprint) + coarse * noise(place[:, ::-1] + 3.7, 0.25, footprint)
    grain = np.clip(grain, 0.2, 2)
    jointed = (material == Material.BRICK) | (material == Material.PAVEMENT) | (material == Material.ROOF_TILES)
    grain[jointed & (np.minimum(*(place.T % 0.4)) < 0.03) & (footprint < 0.1)] *= 0.6
    return color * grain[:, None], (base + tint * color.mean(axis=1)) * grain, gloss


def _cut_windows(
    material: np.ndarray, color: np.ndarray, place: np.ndarray, owner: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Material and colour with a window or a door in every bay and storey of a wall."""
    material, color = material.copy(), color.copy()
    wall = np.flatnonzero((material == Material.PLASTER) | (material == Material.BRICK))
    x, y = place[wall].T / [[BAY], [STOREY]]
    bay, storey, house = np.floor(x), np.floor(y), owner[wall]
    luck = np.sin(12.9898 * bay + 78.233 * storey + 37.719 * house) * 43758.5453 % 1
    sill, width = np.where((storey == 0) & (luck < 0.22), 0.02, 0.3), 0.18 + 0.1 * np.sin(house) ** 2
    outside = np.maximum(
        (np.abs(x - bay - 0.5) - width) * BAY, (np.abs(y - storey - sill / 2 - 0.4) - 0.4 + sill / 2) * STOREY
    )
    frame, pane = wall[outside < 0], outside < -0.07
    color[frame] = 0.35 + 0.4 * np.cos(owner[frame, None]) ** 2
    color[wall[pane]] = np.where(luck < 0.6, 0.025, 0.3 * luck)[pane, None]
    material[wall[pane]] = Material.GLASS
    return material, color


class Lighting:
    """A random sun and sky of a street, in the world frame (z up). Radiances are relative to a white sky of 1."""

    def __init__(self, rng: np.random.Generator):
        self.cloud_cover = rng.choice([0.15, 0.35, 0.6, 0.95]) + rng.uniform(-0.1, 0.05)
        elevation, azimuth = np.deg2rad(rng.uniform(18, 60)), rng.uniform(0, 2 * np.pi)
        direction = [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
        warmth = np.array([1.0, 0.93, 0.84]) if elevation > 0.5 else np.array([1.0, 0.81, 0.62])
        blue = rng.uniform([0.22, 0.42, 0.8], [0.4, 0.55, 0.95])
        self.sun_direction = np.array(direction, np.float32)
        self.sun_color = np.asarray(2.6 * np.clip(1.25 - self.cloud_cover, 0.05, 1) * warmth, np.float32)
        self.zenith_color = np.asarray(blue * (1 - self.cloud_cover) + 0.75 * self.cloud_cover, np.float32)
        self.horizon_color = np.asarray(rng.uniform(0.85, 1.0) * np.array([0.92, 0.95, 1.0]), np.float32)
        self.visibility = rng.uniform(400, 1500)

    def sky(self, direction: np.ndarray) -> np.ndarray:
        """Radiance (N, 3) of the sky along unit directions (N, 3), and of a far tree line under it."""
        up = np.clip(direction[:, 2:], 0, 1)
        color = self.horizon_color + (self.zenith_color - self.horizon_color) * np.sqrt(up)
        cloud = 0.4 * noise(direction[:, :2] / (up + 0.12) + 50, 0.01, 0.16) + 2.4 * (self.cloud_cover - 0.5)
        color += np.clip(cloud, 0, 1)[:, None] * (1.05 - color)
        color += 0.6 * np.clip(direction @ self.sun_direction, 0, 1)[:, None] ** 64 * self.sun_color
        skyline = 0.03 + 0.01 * noise(direction[:, :2] * [1, 0], 0.0015, 0.003)
        trees = 0.45 * self.horizon_color + np.array([0.06, 0.10, 0.06], np.float32)
        return np.where(direction[:, 2:] < skyline[:, None], trees, color).astype(np.float32)
