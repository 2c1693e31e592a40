"""The npy files published with Liu, Johns, Davison: "End-to-end multi-task learning with attention" (CVPR 2019).

Much later work trains on them. They contain NYUv2 at 288x384, and Cityscapes at 128x256 or 256x512.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from mtunet_dist.errors import InputError
from mtunet_dist.schema import VOID, ClassInfo, DepthInfo
from mtunet_dist.sources._arrays import stored_depth
from mtunet_dist.sources._source import RawSample, SampleFiles, match
from mtunet_dist.sources.cityscapes import class_set
from mtunet_dist.sources.nyuv2 import CLASSES

CITYSCAPES: dict[str, Literal[2, 7, 19]] = {"label_2": 2, "label_7": 7, "label_19": 19}
ROUNDING = 1e-3  # resizing in float may exceed 1 by this


class MTAN:
    """``ROOT/{train,val}/{image,LABELS,depth}/N.npy``, N = 0, 1, ...; the official indices of the images are lost.

    Images are (H, W, 3), 0..1 or 0..255; labels (H, W), -1 without class; depth (H, W, 1), 0 invalid. MTAN's val is
    the official test part of NYUv2 and the official val part of Cityscapes.

    Options:
        labels: the folder LABELS, which also tells the dataset: "label" is NYUv2 with 13 classes and depth in metres,
            stored in millimetres; "label_2", "label_7" and "label_19" are Cityscapes, whose "depth" is (p - 1) / 65536
            of the disparity p, stored as p - 1 without loss. What MTAN's 2 classes are is not documented: they are
            taken as those of the source ``cityscapes``.
    """

    stamp = None

    def __init__(self, root: Path, *, labels: Literal["label", "label_2", "label_7", "label_19"] = "label") -> None:
        self.root, self.labels = root, labels
        self.classes: tuple[ClassInfo, ...]
        if labels == "label":
            self.classes, self.depth = CLASSES, DepthInfo("metric", "metre", 0.001)
        else:
            self.classes, self.depth = tuple(class_set(CITYSCAPES[labels])), DepthInfo("inverse", "1", 1 / 65536)

    def splits(self) -> dict[str, list[SampleFiles]]:
        """See ``Source.splits``."""
        folders = {"rgb": "image", "label": self.labels, "depth": "depth"}
        return {
            split: match({part: _list(self.root / split / folder) for part, folder in folders.items()})
            for split in ("train", "val")
        }

    def check(self, sample: SampleFiles) -> None:
        """See ``Source.check``."""
        _arrays(sample, _mapped)

    def read(self, sample: SampleFiles) -> RawSample:
        """See ``Source.read``."""
        # Read, not mapped: if a mapped file is cut short, SIGBUS ends the process without a message.
        image, label, depth = _arrays(sample, _loaded)
        return RawSample(
            _rgb(image, f"{sample.rgb}"),
            _classes(label, len(self.classes), f"{sample.label}"),
            stored_depth(depth[:, :, 0], self.depth.scale, f"{sample.depth}"),
        )


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


def _arrays(sample: SampleFiles, get: Callable[[Path], np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, label and depth from ``get``, with a check of their shapes."""
    assert sample.label is not None and sample.depth is not None
    image, label, depth = (get(path) for path in (sample.rgb, sample.label, sample.depth))
    if image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"{sample.rgb}: shape {image.shape}; expected (H, W, 3)")
    height, width = image.shape[:2]
    if label.shape != (height, width):
        raise InputError(f"{sample.label}: shape {label.shape}; expected {(height, width)} as its image")
    if depth.shape != (height, width, 1):
        raise InputError(f"{sample.depth}: shape {depth.shape}; expected {(height, width, 1)} as its image")
    return image, label, depth


def _mapped(path: Path) -> np.ndarray:
    """Read only the header."""
    return _numbers(path, lambda: np.lib.format.open_memmap(path, mode="r"))


def _loaded(path: Path) -> np.ndarray:
    return _numbers(path, lambda: np.load(path, allow_pickle=False))


def _numbers(path: Path, read: Callable[[], np.ndarray]) -> np.ndarray:
    try:
        array = read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a complete npy file of numbers: {error}") from None
    if array.dtype.kind not in "iuf":
        raise InputError(f"{path}: holds {array.dtype}; expected numbers")
    return array


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


def _classes(label: np.ndarray, count: int, name: str) -> np.ndarray:
    """-1 and class indices of any type -> uint8 with VOID."""
    valid = (label == np.rint(label)) & (label >= -1) & (label < count)
    if not valid.all():
        raise InputError(f"{name}: label value {label[~valid][0]:g} is not one of -1..{count - 1}")
    classes = label.astype(np.int16)
    return np.where(classes < 0, VOID, classes).astype(np.uint8)


PLUGIN = MTAN
