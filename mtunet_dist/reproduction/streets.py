"""Synthetic streets in the place of Cityscapes: made and prepared by the command that trains on them."""

from __future__ import annotations

from pathlib import Path

from mtunet_dist.machine import cpus
from mtunet_dist.prepare import prepare
from mtunet_dist.synthesize import synthesize
from mtunet_dist.synthetic.tree import Settings


def streets_root(folder: Path, classes: int, size: tuple[int, int]) -> Path:
    """Where the prepared streets of so many classes at ``size`` (height, width) lie below ``folder``."""
    return folder / f"streets{classes}_{size[0]}x{size[1]}"


def prepare_streets(folder: Path, classes: int, size: tuple[int, int]) -> None:
    """Draw the scenes and prepare them, with inverse depth as in the paper's Cityscapes; what is there is kept."""
    source = folder / "streets_reproduce_source"
    synthesize(source, Settings(), cpus())
    height, width = size
    options = {"classes": classes, "depth": "inverse", "test": True}
    out = streets_root(folder, classes, size)
    prepare("cityscapes", source, out, height=height, width=width, workers=cpus(), options=options)
