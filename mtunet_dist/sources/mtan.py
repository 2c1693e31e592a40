"""The npy files published with Liu, Johns, Davison: "End-to-end multi-task learning with attention" (CVPR 2019).

Much later work trains on them. They contain NYUv2 at 288x384, and Cityscapes at 128x256 or 256x512.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from mtunet_dist.errors import InputError
from mtunet_dist.sources._arrays import load_numbers, map_numbers
from mtunet_dist.sources._source import RawSample, SampleFiles, match
from mtunet_dist.sources.cityscapes import class_set
from mtunet_dist.sources.nyuv2 import CLASSES, targets_of
from mtunet_dist.tasks._task import Task
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.segmentation import Segmentation

CITYSCAPES: dict[str, Literal[2, 7, 19]] = {"label_2": 2, "label_7": 7, "label_19": 19}
# The axes of an array after height and width.
PLANES: dict[str, tuple[int, ...]] = {"segmentation": (), "depth": (1,), "normals": (3,)}
ROUNDING = 1e-3  # resizing in float may exceed 1 by this


class MTAN:
    """``ROOT/{train,val}/{image,LABELS,depth}/N.npy``, N = 0, 1, ...; the official indices of the images are lost.

    Images are (H, W, 3), 0..1 or 0..255; labels (H, W), -1 without class; depth (H, W, 1), 0 invalid; of NYUv2 also
    ``normal`` (H, W, 3), 0 invalid. MTAN's val is the official test part of NYUv2 and the official val part of
    Cityscapes.

    Options:
        labels: the folder LABELS, which also tells the dataset: "label" is NYUv2 with 13 classes and depth in metres,
            stored in millimetres; "label_2", "label_7" and "label_19" are Cityscapes, whose "depth" is (p - 1) / 65536
            of the disparity p, stored as p - 1 without loss. What MTAN's 2 classes are is not documented: they are
            taken as those of the source ``cityscapes``.
        normals: also take the surface normals of NYUv2, from the folder ``normal``.
    """

    stamp = None

    def __init__(
        self,
        root: Path,
        *,
        labels: Literal["label", "label_2", "label_7", "label_19"] = "label",
        normals: bool = False,
    ) -> None:
        self.root, self.labels = root, labels
        if normals and labels != "label":
            raise InputError(f"normals=true with labels={labels}: only the NYUv2 files of MTAN have normals")
        if labels == "label":
            self.targets = targets_of(CLASSES, normals=normals)
        else:
            classes = tuple(class_set(CITYSCAPES[labels]))
            self.targets = {
                "segmentation": Segmentation("segmentation", classes),
                "depth": Depth.inverse_depth(1 / 65536),
            }

    def splits(self) -> dict[str, list[SampleFiles]]:
        """See ``Source.splits``."""
        folders = {"segmentation": self.labels, "depth": "depth", "normals": "normal"}
        found = {}
        for split in ("train", "val"):
            parts = {name: (task.part, _list(self.root / split / folders[name])) for name, task in self.targets.items()}
            found[split] = match(_list(self.root / split / "image"), parts)
        return found

    def check(self, sample: SampleFiles) -> None:
        """See ``Source.check``."""
        _arrays(sample, self.targets, map_numbers)

    def read(self, sample: SampleFiles) -> RawSample:
        """See ``Source.read``."""
        image, arrays = _arrays(sample, self.targets, load_numbers)
        stored = {n: self.targets[n].from_numbers(array, f"{sample.targets[n]}") for n, array in arrays.items()}
        return RawSample(_rgb(image, f"{sample.rgb}"), stored)


def _list(folder: Path) -> dict[str, Path]:
    """The arrays in ``folder`` by key. The key is their number with four or more digits."""
    if not folder.is_dir():
        raise InputError(f"folder {folder} does not exist")
    files = {}
    for path in folder.glob("*.npy"):
        if not path.stem.isdecimal() or str(int(path.stem)) != path.stem:
            raise InputError(f"{path}: the name is not a number, such as 0.npy")
        files[f"{int(path.stem):04d}"] = path
    if not files:
        raise InputError(f"folder {folder} holds no .npy file")
    return files


def _arrays(
    sample: SampleFiles, targets: Mapping[str, Task], get: Callable[[Path], np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Image and targets from ``get``, with a check of their shapes."""
    image = get(sample.rgb)
    if image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"{sample.rgb}: shape {image.shape}; expected (H, W, 3)")
    found = {}
    for name, path in sample.targets.items():
        array, planes = get(path), PLANES[targets[name].KIND]
        expected = (*image.shape[:2], *planes)
        if array.shape != expected:
            raise InputError(f"{path}: shape {array.shape}; expected {expected} as its image")
        found[name] = array[:, :, 0] if planes == (1,) else array
    return image, found


def _rgb(image: np.ndarray, name: str) -> np.ndarray:
    """Image of 0..1 or 0..255 -> uint8. InputError if the range is unclear."""
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 255):  # NaN must fail too
        raise InputError(f"{name}: values from {low:g} to {high:g}; expected 0..1 or 0..255")
    unit = image.dtype.kind == "f" and high < 2
    if unit and (high > 1 + ROUNDING or (high == 1 and np.isin(image, (0, 1)).all())):
        raise InputError(f"{name}: values from {low:g} to {high:g} may mean 0..1 as well as 0..255")
    rgb: np.ndarray = np.rint(image * 255 if unit else image).clip(0, 255).astype(np.uint8)
    return rgb


PLUGIN = MTAN
