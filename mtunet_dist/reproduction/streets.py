"""Synthetic streets in place of Cityscapes. The command that trains on them makes and prepares them."""

from __future__ import annotations

from pathlib import Path

from mtunet_dist.prepare import prepare
from mtunet_dist.synthesize import synthesize
from mtunet_dist.synthetic.tree import Settings
from mtunet_dist.system.machine import cpus


def streets_root(folder: Path, classes: int, size: tuple[int, int]) -> Path:
    """The folder below ``folder`` for prepared streets with so many classes at ``size`` (height, width)."""
    return folder / f"streets{classes}_{size[0]}x{size[1]}"


def prepare_streets(folder: Path, classes: int, size: tuple[int, int]) -> None:
    """Draw and prepare the scenes, with inverse depth as in the paper's Cityscapes. Existing ones stay."""
    source = folder / "streets_reproduce_source"
    synthesize(source, Settings(), cpus())
    height, width = size
    options = {"classes": classes, "depth": "inverse", "test": True}
    out = streets_root(folder, classes, size)
    prepare("cityscapes", source, out, height=height, width=width, workers=cpus(), options=options)
