"""Random augmentation as numbers: drawn here per (seed, epoch, sample), carried out by the loader.

The draw does not depend on ranks, batches or threads, so a resumed or rescaled run sees the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtunet_dist.data.color import ColorMap, color_map


@dataclass(frozen=True)
class Draw:
    """The changes to one sample: crop this window, resize it back to full size, change colours, perhaps flip."""

    top: int
    left: int
    height: int
    width: int
    scale: float  # the image is enlarged by this factor
    flip: bool
    color: ColorMap | None = None  # of the image alone; None changes nothing


class Augmentation:
    """Draws for images of ``height`` x ``width``.

    Each task says how its target follows a zoom and a flip. ``brightness``, ``contrast`` and ``saturation`` are factors
    drawn from [max(0, 1 - x), 1 + x], ``hue`` a turn of the colour circle from [-x, x]; 0 is off. ``color.py`` says
    what they do.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.height, self.width = height, width
        self.flip, self.scales, self.seed = flip, tuple(scales), seed
        self.factors, self.hue = (brightness, contrast, saturation), hue

    @property
    def zooms(self) -> bool:
        """Whether any draw can crop."""
        return any(scale != 1.0 for scale in self.scales)

    @property
    def colors(self) -> bool:
        """Whether draws change colours."""
        return any(self.factors) or bool(self.hue)

    @property
    def changes(self) -> bool:
        """Whether any draw can change anything."""
        return self.flip or self.zooms or self.colors

    def draw(self, epoch: int, sample: int) -> Draw:
        """The augmentation of ``sample`` in ``epoch``."""
        # 2^63 + epoch differs from all keys of the shuffles. The counter gives each sample its own stream.
        key = np.array([self.seed, (1 << 63) + epoch], dtype=np.uint64)
        random = np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, sample], dtype=np.uint64)))
        scale = self.scales[int(random.integers(len(self.scales)))]
        height, width = round(self.height / scale), round(self.width / scale)
        top = int(random.integers(self.height - height + 1))
        left = int(random.integers(self.width - width + 1))
        flip = bool(random.random() < 0.5) and self.flip
        # Colours come last, and always draw all four, so that switching one on changes nothing else.
        color = self._color(random) if self.colors else None
        return Draw(top, left, height, width, scale, flip, color)

    def _color(self, random: np.random.Generator) -> ColorMap:
        brightness, contrast, saturation = (random.uniform(max(0.0, 1.0 - x), 1.0 + x) for x in self.factors)
        return color_map(brightness, contrast, saturation, random.uniform(-self.hue, self.hue))
