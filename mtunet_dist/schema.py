"""The meaning of the classes and the depth of a dataset. Imports nothing, so that worker processes start fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

VOID = 255  # class index of pixels without a class
MOST_CLASSES = VOID  # indices 0..254


@dataclass(frozen=True)
class ClassInfo:
    """A class and the RGB colour it is drawn in."""

    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True)
class DepthInfo:
    """The meaning of stored depth: ``stored * scale`` is in ``unit``; stored 0 is invalid."""

    kind: Literal["metric", "inverse"]
    unit: Literal["metre", "1"]
    scale: float


def class_problem(classes: Sequence[ClassInfo]) -> str | None:
    """Why labels cannot have these classes, or None. Figures are kept by name, so that an equal name would hide a
    figure."""
    if not 0 < len(classes) <= MOST_CLASSES:
        return f"{len(classes)} classes; a dataset has 1 to {MOST_CLASSES}, as {VOID} means a pixel without a class"
    before: dict[str, str] = {}
    for info in classes:
        alike = "".join(info.name.split()).casefold()
        if not alike or not info.name.isprintable() or info.name != info.name.strip():
            return f"the class name {info.name!r} must be one line of text without blanks around it"
        if alike in before:
            return f"the class names {before[alike]!r} and {info.name!r} must differ in more than blanks and case"
        before[alike] = info.name
    return None
