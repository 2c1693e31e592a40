"""What the classes and the depth of a dataset mean; imports nothing, so worker processes start fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VOID = 255  # class index of pixels without a class


@dataclass(frozen=True)
class ClassInfo:
    """A class and the RGB colour it is drawn in."""

    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True)
class DepthInfo:
    """What stored depth means: ``stored * scale`` is in ``unit``; stored 0 is invalid."""

    kind: Literal["metric", "inverse"]
    unit: Literal["metre", "1"]
    scale: float
