"""Daylight: the sun, the sky with its clouds, haze."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mtunet_dist.synthetic.textures import RGB, channels, noise


@dataclass(frozen=True)
class Daylight:
    """Sun direction (unit vector towards it), cover 0 (clear) to 1 (overcast), haze length in metres."""

    sun: tuple[float, float, float]
    cover: float
    haze: float
    seed: float

    @property
    def sunlight(self) -> RGB:
        """Colour and strength of the sun: warmer when low, weaker under cloud."""
        low = 1 - min(self.sun[1] / 0.7, 1.0)
        strength = 2.5 * (1 - 0.92 * self.cover)
        return strength, strength * (0.94 - 0.22 * low), strength * (0.84 - 0.42 * low)

    @property
    def ambient(self) -> RGB:
        """Light from the whole sky on an upward face."""
        grey = 0.55 + 0.35 * self.cover
        return grey * (0.82 + 0.18 * self.cover), grey * (0.93 + 0.07 * self.cover), grey * 1.08

    def horizon(self) -> np.ndarray:
        """Colour (3, 1) of the sky at the horizon, to which haze fades."""
        return channels((0.80, 0.82, 0.84)) * self.cover + channels((0.72, 0.84, 0.95)) * (1 - self.cover)

    def colour(self, ray: np.ndarray) -> np.ndarray:
        """Sky colour along directions (3, P): a gradient, clouds on a plane high above, a glow about the sun."""
        unit = ray / np.sqrt((ray * ray).sum(axis=0))
        rise = np.maximum(unit[1], 0.0)
        zenith = channels((0.16, 0.36, 0.74)) * (1 - self.cover) + channels((0.55, 0.58, 0.62)) * self.cover
        fade = np.exp(-4.0 * rise)
        colour = self.horizon() * fade + zenith * (1 - fade)
        reach = 26 / (rise + 0.12)
        east, north = unit[0] * reach, unit[2] * reach
        density = noise(east + self.seed, north) + 0.35 * noise(east * 4, north * 4)
        clouds = np.clip(0.6 * (density + 2.6 * self.cover - 0.9), 0, 1) * np.clip(rise * 9, 0, 1)
        white = np.clip(0.98 - 0.10 * (density + 1) * (0.4 + self.cover), 0.45, 1.05)
        colour += clouds * (white - colour)
        towards = np.maximum(_cosine(unit, self.sun), 0)
        for _ in range(5):
            towards = towards * towards
        return np.asarray(colour + channels((0.5, 0.46, 0.4)) * ((1 - self.cover) * towards))

    def shade(self, albedo: np.ndarray, normal: np.ndarray, sunlit: np.ndarray) -> np.ndarray:
        """Lambert shading of colours (3, P) with normals (3, P); ``sunlit`` is 0 in cast shadow."""
        facing = np.maximum(_cosine(normal, self.sun), 0) * sunlit
        dome = 0.62 + 0.38 * normal[1]
        light = channels(self.sunlight) * facing + channels(self.ambient) * dome
        return np.asarray(albedo * light)

    def veil(self, colour: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Fade colours (3, P) into the haze with depth (P,)."""
        clear = np.exp(depth * (-1 / self.haze))
        horizon = self.horizon()
        return np.asarray(horizon + clear * (colour - horizon))


def _cosine(vectors: np.ndarray, sun: tuple[float, float, float]) -> np.ndarray:
    """Products (P,) of unit vectors (3, P) with the sun's; not through BLAS, whose rounding varies with threads."""
    return np.asarray(vectors[0] * sun[0] + vectors[1] * sun[1] + vectors[2] * sun[2])


def random_daylight(rng: np.random.Generator) -> Daylight:
    """Any hour but dusk, any cover."""
    height, turn = math.radians(rng.uniform(22, 68)), rng.uniform(0, 2 * math.pi)
    flat = math.cos(height)
    cover = float(np.clip(rng.beta(0.8, 1.3) * 1.1 - 0.05, 0, 1))
    haze = math.exp(rng.uniform(math.log(180), math.log(1500)))
    return Daylight((flat * math.sin(turn), math.sin(height), flat * math.cos(turn)), cover, haze, rng.uniform(0, 500))
