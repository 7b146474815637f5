"""What surfaces look like: procedural patterns per material, shared by the camera and the LiDAR, and the sky.

Patterns are functions of texture coordinates, evaluated for all hits of one material at once. Each takes the footprint
of a pixel on the surface (metres) and fades out what is finer, as the pixel of a real camera averages over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .meshes import Material

NOISE_SIZE = 512
NOISE_LEVELS = 9


@dataclass(frozen=True)
class Surface:
    """Appearance of N hits: `albedo` (N, 3) linear RGB, `reflectance` (N,) at 905 nm, `gloss` (N,) in [0, 1]."""

    albedo: np.ndarray
    reflectance: np.ndarray
    gloss: np.ndarray


Pattern = Callable[[np.ndarray, np.ndarray, np.ndarray], Surface]  # of texture coordinates, colour, footprint


@lru_cache(maxsize=1)
def _noise_pyramid() -> np.ndarray:
    """Tileable noise with a natural (1/f) spectrum, unit variance, and the same blurred by 2, 4, ... texels."""
    rng = np.random.default_rng(20220228)
    fy, fx = np.fft.fftfreq(NOISE_SIZE)[:, None], np.fft.fftfreq(NOISE_SIZE)[None]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = np.inf
    spectrum = np.fft.fft2(rng.normal(size=(NOISE_SIZE, NOISE_SIZE))) / (frequency + 0.008)
    levels = [
        np.fft.ifft2(spectrum * np.exp(-2 * (np.pi * np.where(np.isinf(frequency), 0, frequency) * blur) ** 2)).real
        for blur in [0.0, *(0.5 * 2.0 ** np.arange(1, NOISE_LEVELS))]
    ]
    return (np.stack(levels) / levels[0].std()).astype(np.float32)


def noise(texture: np.ndarray, texel: float, footprint: np.ndarray) -> np.ndarray:
    """Noise of unit variance at texture coordinates (N, 2), `texel` metres fine, averaged over `footprint` (N,)."""
    pyramid = _noise_pyramid()
    level = np.log2(np.maximum(footprint / texel, 1)).astype(np.int32)
    column, row = (np.floor(texture.T / texel).astype(np.int32)) % NOISE_SIZE
    return pyramid[np.minimum(level, NOISE_LEVELS - 1), row, column]


def _cell_hash(cell: np.ndarray, salt: float) -> np.ndarray:
    """A repeatable number in [0, 1) for each integer cell (N, 2)."""
    value = np.sin(cell[:, 0] * 12.9898 + cell[:, 1] * 78.233 + salt * 37.719).astype(np.float64) * 43758.5453
    return (value - np.floor(value)).astype(np.float32)


def _joints(coordinate: np.ndarray, period: float, width: float, footprint: np.ndarray) -> np.ndarray:
    """Share of joint (0 to 1) of lines `width` wide every `period` metres, their mean where a pixel is wider."""
    line = (np.abs(coordinate / period - np.floor(coordinate / period) - 0.5) > 0.5 - 0.5 * width / period).astype(
        np.float32
    )
    blur = np.clip(footprint / period * 1.5, 0, 1)
    return line * (1 - blur) + blur * width / period


def _grain(texture: np.ndarray, footprint: np.ndarray, fine: float, coarse: float) -> np.ndarray:
    """A factor around 1 from fine (1.5 cm) and coarse (25 cm) noise."""
    factor = 1 + fine * noise(texture, 0.015, footprint) + coarse * noise(texture[:, ::-1] + 3.7, 0.25, footprint)
    return np.clip(factor, 0.2, 2.0)


def _plain(reflectance: float, fine: float, coarse: float, gloss: float = 0.0) -> Pattern:
    def pattern(texture: np.ndarray, color: np.ndarray, footprint: np.ndarray) -> Surface:
        grain = _grain(texture, footprint, fine, coarse)
        return Surface(color * grain[:, None], reflectance * grain, np.full(len(grain), gloss, np.float32))

    return pattern


def _asphalt(texture: np.ndarray, color: np.ndarray, footprint: np.ndarray) -> Surface:
    grain = _grain(texture, footprint, 0.13, 0.05)
    along_wheels = 1 - 0.10 * np.exp(-(((np.abs(np.abs(texture[:, 1]) - 1.75) - 0.75) / 0.3) ** 2))
    patch = _cell_hash(np.floor(texture / [23.0, 2.6]), 1.0) < 0.12
    factor = grain * along_wheels * np.where(patch, 0.72, 1)
    return Surface(color * factor[:, None], 0.22 * factor, np.zeros(len(grain), np.float32))


def _paving(texture: np.ndarray, color: np.ndarray, footprint: np.ndarray) -> Surface:
    slab = _cell_hash(np.floor(texture / 0.5), 2.0) * (footprint < 0.3)
    joint = np.maximum(_joints(texture[:, 0], 0.5, 0.03, footprint), _joints(texture[:, 1], 0.5, 0.03, footprint))
    factor = _grain(texture, footprint, 0.08, 0.05) * (0.92 + 0.16 * slab) * (1 - 0.55 * joint)
    return Surface(color * factor[:, None], 0.30 * factor, np.zeros(len(factor), np.float32))


def _grass(texture: np.ndarray, color: np.ndarray, footprint: np.ndarray) -> Surface:
    grain = _grain(texture, footprint, 0.30, 0.22)
    dry = np.clip(0.5 * noise(texture + 11.3, 0.4, footprint), 0, 1)[:, None]
    albedo = (color * (1 - dry) + np.array([0.22, 0.19, 0.07], np.float32) * dry) * grain[:, None]
    return Surface(albedo, 0.42 * np.clip(grain, 0.5, 1.5), np.zeros(len(grain), np.float32))


def _brick_wall(metres: np.ndarray, color: np.ndarray, footprint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    course = np.floor(metres[:, 1] / 0.083)
    along = metres[:, 0] + 0.125 * (course % 2)
    brick = _cell_hash(np.stack([np.floor(along / 0.25), course], axis=1), 3.0) * (footprint < 0.15)
    mortar = np.maximum(_joints(along, 0.25, 0.02, footprint), _joints(metres[:, 1], 0.083, 0.02, footprint))[:, None]
    factor = (_grain(metres, footprint, 0.10, 0.08) * (0.8 + 0.4 * brick))[:, None]
    return color * factor * (1 - mortar) + 0.35 * mortar, 0.26 * factor[:, 0] + 0.1 * mortar[:, 0]


def _plaster_wall(metres: np.ndarray, color: np.ndarray, footprint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    factor = _grain(metres, footprint, 0.05, 0.03)
    return color * factor[:, None], 0.38 * factor * (0.5 + color.mean(axis=1))


def _facade(wall: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Pattern:
    """A wall with a window per bay and storey and some doors; texture coordinates count bays and storeys."""

    def pattern(texture: np.ndarray, color: np.ndarray, footprint: np.ndarray) -> Surface:
        metres = texture * np.array([2.8, 3.0], np.float32)
        albedo, reflectance = wall(metres, color, footprint)
        cell = np.floor(texture)
        x, y = (texture - cell).T
        house = np.stack([np.floor(cell[:, 0] / 8), 0 * cell[:, 0]], axis=1)
        chance, ground = _cell_hash(cell, 4.0), cell[:, 1] == 0
        half_width = 0.18 + 0.10 * _cell_hash(house, 5.0)
        door = ground & (chance < 0.22)
        sill = np.where(door, 0.02, 0.28 + 0.06 * _cell_hash(house, 6.0))
        across, up = np.abs(x - 0.5) - half_width, np.maximum(sill - y, y - 0.8)
        inside = np.maximum(across * 2.8, up * 3.0)
        present = (chance < 0.94) & (texture[:, 1] > 0.01)
        frame = present & (inside < 0.0)
        bars = (np.abs(x - 0.5) < 0.012) & ~door
        pane = present & (inside < -0.07) & ~bars
        frame_color = np.where(door, 0.3, 0.35 + 0.4 * _cell_hash(house, 7.0))
        albedo = np.where(frame[:, None], frame_color[:, None], albedo)
        curtain = np.clip(_cell_hash(cell, 8.0) * 1.4 - 0.9, 0, 1) * (y > 0.35)
        wood = np.array([0.16, 0.09, 0.05], np.float32) * (0.5 + 2 * _cell_hash(house, 9.0))[:, None]
        glass = np.where(door[:, None], wood, 0.025 + 0.4 * curtain[:, None])
        albedo = np.where(pane[:, None], glass, albedo)
        plinth = ground & (y < 0.16) & ~frame
        albedo = np.where(plinth[:, None], 0.5 * albedo, albedo)
        glazed = pane & ~door
        reflectance = np.where(glazed, 0.04, np.where(frame, 0.35, reflectance))
        return Surface(albedo, reflectance, np.where(glazed, 0.8, 0.0).astype(np.float32))

    return pattern


def _plain_wall(texture: np.ndarray, color: np.ndarray, footprint: np.ndarray) -> Surface:
    albedo, reflectance = _plaster_wall(texture, color, footprint)
    return Surface(albedo, reflectance, np.zeros(len(albedo), np.float32))


def _roof_tiles(texture: np.ndarray, color: np.ndarray, footprint: np.ndarray) -> Surface:
    shadow = 0.5 * _joints(texture[:, 0], 0.25, 0.05, footprint) + 0.6 * _joints(texture[:, 1], 0.33, 0.06, footprint)
    factor = _grain(texture, footprint, 0.12, 0.10) * (1 - np.minimum(shadow, 0.8))
    return Surface(color * factor[:, None], 0.24 * factor, np.zeros(len(factor), np.float32))


def _car_paint(texture: np.ndarray, color: np.ndarray, footprint: np.ndarray) -> Surface:
    count = len(texture)
    # dark paints send little of the laser back, and what is mirrored is lost
    reflectance = 0.06 + 0.45 * color.mean(axis=1)
    return Surface(color, reflectance, np.full(count, 0.35, np.float32))


def _car_window(texture: np.ndarray, color: np.ndarray, footprint: np.ndarray) -> Surface:
    x, y = texture.T
    pane = (np.minimum(x, 1 - x) > 0.05) & (np.minimum(y, 1 - y) > 0.08)
    seats = np.where((y < 0.55) & (np.abs(x - 0.5) < 0.3), 0.05, 0.02)[:, None]
    albedo = np.where(pane[:, None], seats, color)
    reflectance = np.where(pane, 0.03, 0.06 + 0.45 * color.mean(axis=1))
    return Surface(albedo, reflectance, np.where(pane, 0.9, 0.35).astype(np.float32))


_PATTERNS = {
    Material.ASPHALT: _asphalt,
    Material.ROAD_PAINT: _plain(0.62, 0.08, 0.14),
    Material.PAVEMENT: _paving,
    Material.CONCRETE: _plain(0.30, 0.10, 0.12),
    Material.GRASS: _grass,
    Material.FACADE_PLASTER: _facade(_plaster_wall),
    Material.FACADE_BRICK: _facade(_brick_wall),
    Material.PLASTER: _plain_wall,
    Material.ROOF_TILES: _roof_tiles,
    Material.CAR_PAINT: _car_paint,
    Material.CAR_WINDOW: _car_window,
    Material.TYRE: _plain(0.05, 0.10, 0.0),
    Material.METAL: _plain(0.45, 0.03, 0.05, gloss=0.1),
    Material.RETROREFLECTOR: _plain(0.95, 0.01, 0.0),
    Material.CLOTH: _plain(0.30, 0.15, 0.10),
    Material.SKIN: _plain(0.40, 0.03, 0.0),
    Material.BARK: _plain(0.28, 0.30, 0.15),
    Material.LEAVES: _plain(0.50, 0.15, 0.05),
    Material.WOOD: _plain(0.33, 0.12, 0.10),
}


def appearance(material: np.ndarray, texture: np.ndarray, color: np.ndarray, footprint: np.ndarray) -> Surface:
    """Pattern of every hit: `material` (N,), `texture` (N, 2), `color` (N, 3), `footprint` (N,) metres."""
    count = len(material)
    result = Surface(np.empty((count, 3), np.float32), np.empty(count, np.float32), np.empty(count, np.float32))
    order = np.argsort(material, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(material[order])) + 1) if count else []
    for rows in groups:
        part = _PATTERNS[Material(material[rows[0]])](texture[rows], color[rows], footprint[rows])
        result.albedo[rows], result.reflectance[rows], result.gloss[rows] = part.albedo, part.reflectance, part.gloss
    return result


@dataclass(frozen=True)
class Lighting:
    """Sun and sky of one drive, in the world frame (z up). Radiances are relative to a white sky of 1."""

    sun_direction: np.ndarray
    sun_color: np.ndarray
    zenith_color: np.ndarray
    horizon_color: np.ndarray
    cloud_cover: float
    tree_line: float
    visibility: float
    noise_offset: np.ndarray

    def sky(self, direction: np.ndarray, with_skyline: bool = True) -> np.ndarray:
        """Radiance (N, 3) of the sky, and of the far tree line under it, along unit directions (N, 3)."""
        up = np.clip(direction[:, 2], 0, 1)
        color = self.horizon_color + (self.zenith_color - self.horizon_color) * (up**0.5)[:, None]
        plane = direction[:, :2] / (up[:, None] + 0.12) + self.noise_offset
        cloud = 0.4 * noise(plane, 0.01, np.full(len(up), 0.16)) + 2.4 * (self.cloud_cover - 0.5)
        color = color + np.clip(cloud, 0, 1)[:, None] * (np.array([1.05, 1.05, 1.07], np.float32) - color)
        toward_sun = np.clip(direction @ self.sun_direction, 0, 1)
        glow = 0.25 * toward_sun**8 + 0.6 * toward_sun**64
        color = color + glow[:, None] * self.sun_color * (1 - 0.7 * self.cloud_cover)
        if with_skyline:
            azimuth = np.arctan2(direction[:, 1], direction[:, 0])
            profile = np.stack([azimuth, np.full_like(azimuth, 0.3)], axis=1)
            top = self.tree_line * (1 + 0.35 * noise(profile, 0.0015, np.full(len(up), 0.003)))
            hill = (direction[:, 2] < top)[:, None]
            color = np.where(hill, 0.45 * self.horizon_color + np.array([0.06, 0.10, 0.06], np.float32), color)
        return color.astype(np.float32)
