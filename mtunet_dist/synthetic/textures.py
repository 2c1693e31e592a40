"""Procedural surface colours: each texture maps points of a body's surface to linear RGB.

Walls, cars and clothes draw from one palette and share brick, stripe and plain patterns, so colour names no class.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RGB = tuple[float, float, float]
GLASS: RGB = (0.05, 0.07, 0.09)
_SIZE = 512
_HUES = (0.0, 0.06, 0.1, 0.14, 0.33, 0.55, 0.62)


@dataclass
class Surface:
    """P points in the body's own frame (metres), their unit normals (3, P), the cosine between normal and
    view, and the metres that a pixel spans there."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    normal: np.ndarray
    facing: np.ndarray
    footprint: np.ndarray

    @functools.cached_property
    def across(self) -> np.ndarray:
        """The horizontal coordinate along the face."""
        return np.where(np.abs(self.normal[0]) > np.abs(self.normal[2]), self.z, self.x)

    @functools.cached_property
    def up(self) -> np.ndarray:
        """The coordinate along the face that is not `across`: height on walls, z on floors and tops."""
        return np.where(np.abs(self.normal[1]) > 0.8, self.z, self.y)

    @functools.cached_property
    def upright(self) -> np.ndarray:
        """Whether the point lies on a wall and not on a top."""
        return np.asarray(np.abs(self.normal[1]) < 0.8)

    def detail(self, size: float) -> np.ndarray:
        """How much of a pattern of this size (metres) a pixel still resolves, 0 to 1."""
        return np.asarray(1 / (1 + np.square(self.footprint * (2 / size))))


@dataclass
class Shade:
    """What a texture returns for P points: colour (3, P), mirror-like points, points that shine by themselves,
    and points that are there at all (foliage has gaps)."""

    rgb: np.ndarray
    glossy: np.ndarray | bool = False
    glowing: np.ndarray | bool = False
    solid: np.ndarray | None = None

    def cover(self, mask: np.ndarray, rgb: RGB) -> None:
        """Give the points of the mask one colour."""
        self.rgb[:, mask] = channels(rgb)


Texture = Callable[[Surface], Shade]


@functools.cache
def _cloud() -> np.ndarray:
    """Tileable fractal noise of mean 0 and deviation 1."""
    rng = np.random.default_rng(17)
    frequency = np.hypot(np.fft.fftfreq(_SIZE)[:, None], np.fft.rfftfreq(_SIZE)[None]) * _SIZE
    spectrum = np.fft.rfft2(rng.standard_normal((_SIZE, _SIZE))) / np.maximum(frequency, 4) ** 1.3
    noise = np.fft.irfft2(spectrum)
    return np.asarray((noise - noise.mean()) / noise.std(), dtype=np.float32)


@functools.cache
def _white() -> np.ndarray:
    """Independent uniform numbers."""
    return np.random.default_rng(23).random((_SIZE, _SIZE), dtype=np.float32)


def _pick(table: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.asarray(table[u.astype(np.int32) & (_SIZE - 1), v.astype(np.int32) & (_SIZE - 1)])


def noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Smooth noise, mean 0 and deviation 1, at coordinates in texels (lumps of 4 to 100)."""
    return _pick(_cloud(), u, v)


def scatter(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A uniform number in [0, 1) for each integer cell."""
    return _pick(_white(), np.floor(u), np.floor(v))


def paint(rng: np.random.Generator) -> RGB:
    """A colour that houses, cars and clothes wear alike: mostly muted, sometimes strong."""
    value = rng.uniform(0.05, 0.82) ** 1.2
    saturation = rng.uniform(0, 0.4) if rng.random() < 0.6 else rng.uniform(0.45, 0.9)
    hue = _HUES[int(rng.integers(len(_HUES)))] + rng.normal(0, 0.02)
    return colorsys.hsv_to_rgb(hue % 1, saturation, value)


def channels(rgb: Sequence[float]) -> np.ndarray:
    """One colour as (3, 1) float32, to combine with colours (3, P)."""
    return np.array(rgb, dtype=np.float32)[:, None]


def tint(rgb: RGB, factor: np.ndarray) -> np.ndarray:
    """The colour scaled by one factor for each point, (3, P)."""
    return np.asarray(channels(rgb) * np.maximum(factor, np.float32(0.05)))


def plain(rgb: RGB, grain: float = 0.08, texel: float = 0.04) -> Texture:
    """One colour with stains and grain."""

    def texture(s: Surface) -> Shade:
        return Shade(tint(rgb, 1 + grain * noise(s.across / texel, s.up / texel) * s.detail(texel * 8)))

    return texture


def bricks(rgb: RGB, mortar: RGB, length: float = 0.5, course: float = 0.22) -> Texture:
    """Bricks or stone blocks in running bond."""

    def texture(s: Surface) -> Shade:
        row = np.floor(s.up / course)
        along = s.across / length + 0.5 * (row % 2)
        tone = (scatter(along, row) - 0.5) * 0.6 + 0.1 * noise(s.across * 20, s.up * 20)
        joint = (along % 1 < 0.06) | (s.up / course % 1 < 0.12)
        detail = s.detail(course)
        colour = tint(rgb, 1 + tone * detail)
        return Shade(colour + joint * detail * (channels(mortar) - colour))

    return texture


def stripes(first: RGB, second: RGB, period: float, upright: bool = False) -> Texture:
    """Cladding boards, awnings, striped shirts."""

    def texture(s: Surface) -> Shade:
        phase = (s.across if upright else s.up) / period % 1
        mix = ((phase < 0.5) - 0.5) * s.detail(period) + 0.5
        grain = 1 + 0.05 * noise(s.across * 25, s.up * 25)
        return Shade(tint(first, grain * mix) + tint(second, grain * (1 - mix)))

    return texture


def foliage(rgb: RGB, leaf: float, seed: float, ragged: float = 1.0) -> Texture:
    """Leaves in clumps; the silhouette frays and shows gaps. ``leaf`` is the size of a texel in metres."""

    def texture(s: Surface) -> Shade:
        u, v = s.across / leaf + seed, s.up / leaf + 1.7 * seed
        clump = noise(u, v)
        fine = scatter(u * 1.5, v * 1.5) - 0.5
        detail = s.detail(leaf * 3)
        bright = 1 + 0.35 * clump + 0.9 * fine * detail + 0.25 * s.normal[1]
        solid = noise(v + 91, u) + 0.8 * fine < 1.8 - ragged * 3.4 * (1 - s.facing) if ragged else None
        return Shade(tint(rgb, bright), solid=solid)

    return texture


def facade(rng: np.random.Generator, wall: Texture, height: float) -> Texture:
    """Rows of windows in a wall, sometimes over a shop front."""
    storey, bay = rng.uniform(2.8, 3.7), rng.uniform(1.6, 3.4)
    wide, tall, sill = rng.uniform(0.3, 0.75), rng.uniform(0.4, 0.68), rng.uniform(0.5, 0.6)
    phase, lit = rng.uniform(0, 50), rng.uniform(0.0, 0.5)
    trim, shop = paint(rng), paint(rng) if rng.random() < 0.5 else None
    border = rng.uniform(0.0, 0.07)

    def texture(s: Surface) -> Shade:
        shade = wall(s)
        bays, storeys = s.across / bay + phase, s.y / storey
        column = np.abs(bays % 1 - 0.5)
        row = np.abs(storeys % 1 - sill)
        half_wide, half_tall = np.full_like(column, wide / 2), np.full_like(column, tall / 2)
        if shop is not None:
            ground = storeys < 1
            half_wide[ground], half_tall[ground] = 0.42, 0.36
            sign = s.upright & ground & (storeys > 0.88)
            shade.cover(sign, shop)
        walls = s.upright & (s.y < height - 0.5)
        window = walls & (column < half_wide) & (row < half_tall)
        frame = walls & ~window & (column < half_wide + border) & (row < half_tall + border)
        cell = scatter(bays, storeys * 1.0)
        sky = 0.1 + 0.9 * cell * lit + 0.04 * noise(s.across * 9 + 40 * cell, s.y * 9)
        shade.cover(frame, trim)
        shade.rgb[:, window] = channels(GLASS) + tint((0.4, 0.45, 0.5), sky[window])
        return Shade(shade.rgb, glossy=window)

    return texture
