"""Published figures that stand beside ours. Shares as fractions, keys as in ``metrics.py``; ``docs/paper.md`` on them.

Only figures for two tasks at ``SIZE`` are here. Keys under ``legacy/`` are averages per image or batch.
"""

from __future__ import annotations

from dataclasses import dataclass

SIZE = (128, 256)  # height, width


@dataclass(frozen=True)
class Published:
    """A row of someone's table."""

    title: str
    dataset: str  # of experiments.DATASETS
    classes: int
    figures: dict[str, float]


def _legacy(miou: float, accuracy: float, absolute: float, relative: float) -> dict[str, float]:
    return {
        "legacy/miou": miou,
        "legacy/accuracy": accuracy,
        "legacy/depth_abs": absolute,
        "legacy/depth_rel": relative,
    }


PUBLISHED = (
    # The other figures of the paper's tables are not known to us. Which family these two are of is our reading.
    Published("MT-UNet, the paper", "nyuv2", 13, {"legacy/miou": 0.2654, "legacy/accuracy": 0.6139}),
    Published("AdaMT-Net", "nyuv2", 13, _legacy(0.2061, 0.5891, 0.6136, 0.2547)),
    Published("XTask", "nyuv2", 13, _legacy(0.3031, 0.6302, 0.5954, 0.2235)),
    Published("MTAN, its paper", "cityscapes", 7, _legacy(0.5304, 0.9111, 0.0144, 33.63)),
    Published("AdaMT-Net", "cityscapes", 7, _legacy(0.6253, 0.9416, 0.0125, 22.23)),
    Published("XTask", "cityscapes", 7, _legacy(0.6651, 0.9356, 0.0122, 19.40)),
    Published(
        "MTAN, equal weights",
        "cityscapes",
        7,
        {"miou": 0.7518, "accuracy": 0.9349, "depth_abs": 0.0155, "depth_rel": 46.77},
    ),
)
