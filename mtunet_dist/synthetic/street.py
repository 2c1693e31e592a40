"""The ground of a scene: a road that may curve, its markings, pavements and what lies beyond."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mtunet_dist.synthetic.textures import RGB, Shade, Surface, Texture, noise, scatter, tint

ROAD, SIDEWALK, TERRAIN = 7, 8, 22


@dataclass(frozen=True)
class Street:
    """Cross-section and course of the street, in metres; `across` is measured from the middle of the road."""

    offset: float
    bend: float
    half_width: float
    pavement: tuple[float, float]
    lawn: tuple[bool, bool]
    crossroad: tuple[float, float]
    zebra: float
    asphalt: RGB
    paving: RGB
    grass: RGB
    marking: float
    dash: float
    tile: float
    seed: float
    tram: Literal["none", "along", "across"]

    @property
    def lanes(self) -> tuple[float, float]:
        """The middle of the own lane and of the one coming the other way."""
        return -self.offset, self.offset * 0.9

    def middle(self, z: float) -> float:
        """World x of the middle of the road."""
        return self.offset + self.bend * z * z

    def heading(self, z: float) -> float:
        """Direction of the road, rad from +z towards +x."""
        return math.atan(2 * self.bend * z)

    def edge(self, side: int) -> float:
        """Distance from the middle of the road to the outer edge of the pavement on a side (-1 left, 1 right)."""
        return self.half_width + self.pavement[side > 0]

    def crosses(self, z: float) -> bool:
        """Whether the crossroad runs at this z."""
        return self.crossroad[0] < z < self.crossroad[1]

    def surface(self, s: Surface) -> tuple[np.ndarray, Shade]:
        """Label ids and colours of ground points (P,) given in world coordinates."""
        across = s.x - (self.offset + self.bend * s.z * s.z)
        side = np.abs(across)
        left = across < 0
        crossroad = (s.z > self.crossroad[0]) & (s.z < self.crossroad[1])
        edge = np.where(left, self.edge(-1), self.edge(1)).astype(np.float32)
        lawn = np.where(left, *self.lawn)
        road = (side < self.half_width) | crossroad
        paved = ~road & ((side < edge) | ~lawn)
        labels = np.full(side.shape, TERRAIN, dtype=np.uint8)
        labels[road], labels[paved] = ROAD, SIDEWALK
        rgb = np.empty((3, side.size), dtype=np.float32)
        for mask, texture in ((road, self._asphalt(across, crossroad)), (paved, self._paving(across))):
            rgb[:, mask] = texture(s).rgb[:, mask]
        rest = ~(road | paved)
        rgb[:, rest] = self._meadow(s)[:, rest]
        return labels, Shade(rgb)

    def _asphalt(self, across: np.ndarray, crossroad: np.ndarray) -> Texture:
        def texture(s: Surface) -> Shade:
            side = np.abs(across)
            patch = noise(s.x * 4 + self.seed, s.z * 1.5)
            grain = noise(s.x * 40, s.z * 40 + self.seed) * s.detail(0.2)
            rut = 0.06 * np.cos(across * 3.5)
            colour = tint(self.asphalt, 1 + 0.12 * patch + 0.08 * grain + rut)
            dashes = (side < 0.08) & ((s.z + self.seed) % (3 * self.dash) < self.dash * 1.3)
            edges = np.abs(side - self.half_width + 0.35) < 0.07
            bars = (np.abs(s.z - self.zebra) < 1.6) & (across % 1.1 < 0.5) & (side < self.half_width - 0.2)
            stop = (np.abs(s.z - self.zebra + 2.6) < 0.2) & (across > 0) & (side < self.half_width - 0.3)
            lines = ((dashes | edges) & (np.abs(s.z - self.zebra) > 3) | bars | stop) & ~crossroad
            worn = lines * np.clip(0.85 + 0.25 * patch, 0, 1) * self.marking
            colour += worn * (0.62 - colour)
            colour[:, self._rails(across, s.z, crossroad)] = 0.16
            return Shade(colour)

        return texture

    def _rails(self, across: np.ndarray, z: np.ndarray, crossroad: np.ndarray) -> np.ndarray:
        """Where the rails of a tram lie in the road."""
        if self.tram == "across":
            return np.asarray(crossroad & (np.abs(np.abs(z - sum(self.crossroad) / 2) - 0.72) < 0.06))
        if self.tram == "along":
            return np.asarray(np.minimum(*(np.abs(np.abs(across - lane) - 0.72) for lane in self.lanes)) < 0.06)
        return np.zeros(across.shape, dtype=bool)

    def _paving(self, across: np.ndarray) -> Texture:
        def texture(s: Surface) -> Shade:
            side = np.abs(across) - self.half_width
            u, v = side / self.tile, s.z / self.tile
            joint = ((u % 1 < 0.08) | (v % 1 < 0.08)) * s.detail(self.tile)
            tone = (scatter(u, v) - 0.5) * 0.25 * s.detail(self.tile) + 0.08 * noise(s.x * 12, s.z * 12)
            colour = tint(self.paving, 1 + tone - 0.35 * joint)
            kerb = (side > 0) & (side < 0.18)
            colour[:, kerb] = 0.42
            return Shade(colour)

        return texture

    def _meadow(self, s: Surface) -> np.ndarray:
        tuft = (scatter(s.x * 25, s.z * 25) - 0.5) * s.detail(0.08)
        return tint(self.grass, 1 + 0.2 * noise(s.x * 9 + self.seed, s.z * 9) + 0.7 * tuft)
