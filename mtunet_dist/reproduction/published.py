"""Published figures for comparison. Shares are fractions, keys as in ``metrics.py``; see ``docs/paper.md``."""

from __future__ import annotations

from dataclasses import dataclass

SIZE = (128, 256)  # height, width
FIGURES = ("accuracy", "miou", "depth_abs", "depth_rel")  # the paper's IoU (pixel accuracy), mIoU, absolute, relative


def _row(accuracy: float, miou: float, absolute: float, relative: float) -> dict[str, float]:
    return dict(zip(FIGURES, (accuracy, miou, absolute, relative), strict=True))


# Paper 5178, tables 1 to 3, all rows: table -> (system of SYSTEMS, dataset of DATASETS) -> figures. The paper follows
# "the same evaluation procedure as MTAN", which then was the average over images or batches (``legacy/`` here). The
# unit of its depth errors on NYU Depth v2 is not said; they cannot be metres.
THE_PAPER: dict[str, dict[tuple[str, str], dict[str, float]]] = {
    "table1": {
        ("st_unet", "cityscapes7"): _row(0.9603, 0.7176, 0.0154, 3.609),
        ("stan", "cityscapes7"): _row(0.9057, 0.5190, 0.0145, 27.46),
        ("dense", "cityscapes7"): _row(0.9089, 0.5191, 0.0138, 27.21),
        ("cross_stitch", "cityscapes7"): _row(0.9033, 0.5008, 0.0154, 34.49),
        ("mtan", "cityscapes7"): _row(0.9111, 0.5304, 0.0144, 33.63),
        ("mtunet", "cityscapes7"): _row(0.9686, 0.7319, 0.0137, 2.7502),
        ("mtunet", "cityscapes19"): _row(0.9442, 0.3453, 0.0141, 2.8747),
    },
    "table2": {
        ("st_unet", "nyuv2"): _row(0.5934, 0.2381, 0.1152, 0.2147),
        ("stan", "nyuv2"): _row(0.4723, 0.1681, 0.1413, 0.3502),
        ("dense", "nyuv2"): _row(0.4541, 0.1542, 0.1464, 0.3790),
        ("cross_stitch", "nyuv2"): _row(0.4335, 0.1371, 0.1590, 0.4044),
        ("mtan", "nyuv2"): _row(0.4605, 0.1605, 0.1425, 0.3459),
        ("mtunet", "nyuv2"): _row(0.6139, 0.2654, 0.1304, 0.1969),
    },
    "table3": {
        ("mtunet", "cityscapes7"): _row(0.9686, 0.7319, 0.0137, 2.7502),
        ("mtunet_no_cross_talk", "cityscapes7"): _row(0.9671, 0.7230, 0.0142, 2.8921),
    },
}


@dataclass(frozen=True)
class Published:
    """A row of another paper's table, for two tasks at ``SIZE``."""

    title: str
    dataset: str  # of experiments.DATASETS
    figures: dict[str, float]


def _legacy(miou: float, accuracy: float, absolute: float, relative: float) -> dict[str, float]:
    return {
        "legacy/miou": miou,
        "legacy/accuracy": accuracy,
        "legacy/depth_abs": absolute,
        "legacy/depth_rel": relative,
    }


OTHERS = (
    Published("AdaMT-Net", "nyuv2", _legacy(0.2061, 0.5891, 0.6136, 0.2547)),
    Published("XTask", "nyuv2", _legacy(0.3031, 0.6302, 0.5954, 0.2235)),
    Published("AdaMT-Net", "cityscapes7", _legacy(0.6253, 0.9416, 0.0125, 22.23)),
    Published("XTask", "cityscapes7", _legacy(0.6651, 0.9356, 0.0122, 19.40)),
    Published(
        "MTAN, equal weights, whole set",
        "cityscapes7",
        {"miou": 0.7518, "accuracy": 0.9349, "depth_abs": 0.0155, "depth_rel": 46.77},
    ),
)
