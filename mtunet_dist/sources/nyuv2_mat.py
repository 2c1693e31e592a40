"""NYU Depth v2, the 1449 labelled images, as downloaded: the one file ``nyu_depth_v2_labeled.mat``.

Silberman, Hoiem, Kohli, Fergus: "Indoor segmentation and support inference from RGBD images", ECCV 2012.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from mtunet_dist.errors import InputError
from mtunet_dist.sources._images import id_table, to_classes
from mtunet_dist.sources._nyuv2 import CLASSES_40, COUNT, FROM_40_TO_13, RAW_TO_40, TRAIN
from mtunet_dist.sources._source import RawSample
from mtunet_dist.sources.nyuv2 import (
    CAMERA,
    CLASSES,
    DEPTH,
    HEIGHT,
    WIDTH,
    computed_normals,
    targets_of,
    with_validation,
)

FILE = "nyu_depth_v2_labeled.mat"
DATASETS = {  # shape and type as HDF5 has them: MATLAB's axes are reversed, so an image is 640x480
    "images": ((COUNT, 3, WIDTH, HEIGHT), np.uint8),
    "labels": ((COUNT, WIDTH, HEIGHT), np.uint16),
    "depths": ((COUNT, WIDTH, HEIGHT), np.float32),
    "rawDepths": ((COUNT, WIDTH, HEIGHT), np.float32),
}
CROP = np.s_[45:471, 41:601]  # rows and columns
CACHE_BYTES = 1 << 25  # per dataset, for chunks that span images


@dataclass(frozen=True)
class ImageNumber:
    """A sample by its official 1-based index."""

    index: int

    @property
    def key(self) -> str:
        """Four digits, as the source ``nyuv2`` has them."""
        return f"{self.index:04d}"


class NYUv2Mat:
    """``ROOT`` is ``nyu_depth_v2_labeled.mat`` or the folder that holds it; images are read one by one.

    Options:
        classes: the 13 classes of A. Handa, or the 40 of Gupta et al.; raw label 0 is void.
        depth: "filled", the set's ``depths`` with every pixel inpainted, or "raw", its ``rawDepths`` as projected
            from the sensor, 0 where it saw nothing. Stored in millimetres.
        val: hold 100 training images out as the split val, see ``nyuv2.VALIDATION``; without it, the official two
            splits of 795 and 654.
        crop: keep only rows 45 to 470 and columns 41 to 600, as in many evaluations of depth on this set: leaves out
            the border, white after undistortion.
        normals: also give surface normals. They are computed from the depth by local plane fits (``_plane_fits.py``),
            not measured.
    """

    def __init__(
        self,
        root: Path,
        *,
        classes: Literal[13, 40] = 13,
        depth: Literal["filled", "raw"] = "filled",
        val: bool = True,
        crop: bool = False,
        normals: bool = False,
    ) -> None:
        self.path = root / FILE if root.is_dir() else root
        self.val, self.crop = val, crop
        self.targets = targets_of(CLASSES if classes == 13 else CLASSES_40, normals=normals)
        self._depths = "depths" if depth == "filled" else "rawDepths"
        of_40 = FROM_40_TO_13 if classes == 13 else range(1, 41)
        mapping = {raw: of_40[class_40 - 1] - 1 for raw, class_40 in enumerate(RAW_TO_40, start=1)}
        self._table = id_table(mapping, void=[0], size=len(RAW_TO_40) + 2)

    @property
    def stamp(self) -> list[int]:
        """Size and modification time of the file that holds all samples."""
        try:
            found = self.path.stat()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from None
        return [found.st_size, found.st_mtime_ns]

    def splits(self) -> dict[str, list[ImageNumber]]:
        """See ``Source.splits``."""
        self._check_file()
        samples = [ImageNumber(index) for index in range(1, COUNT + 1)]
        train = [s for s in samples if s.index in TRAIN]
        test = [s for s in samples if s.index not in TRAIN]
        return with_validation(train, test, self.val)

    def check(self, sample: ImageNumber) -> None:
        """See ``Source.check``. Nothing to do: ``splits`` has checked the shapes and types, which are the same for all
        samples."""

    def read(self, sample: ImageNumber) -> RawSample:
        """See ``Source.read``."""
        rgb = self._image("images", sample)
        label = to_classes(self._image("labels", sample), self._table, self._name("labels", sample))
        depth = DEPTH.from_numbers(self._image(self._depths, sample), self._name(self._depths, sample))
        targets = {"segmentation": label, "depth": depth}
        if "normals" in self.targets:
            camera = CAMERA.cropped(CROP[1].start, CROP[0].start) if self.crop else CAMERA
            targets["normals"] = computed_normals(depth, camera)
        return RawSample(rgb, targets)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_file"}

    @functools.cached_property
    def _file(self) -> h5py.File:
        """The open file. Each process opens its own. It is not locked, because network disks may not support locks."""
        try:
            return h5py.File(self.path, "r", locking=False, rdcc_nbytes=CACHE_BYTES)
        except FileNotFoundError:
            raise InputError(f"{self.path}: no such file; ROOT is {FILE} or its folder") from None
        except OSError as error:
            raise InputError(f"{self.path}: not a complete HDF5 file (MATLAB v7.3): {_one_line(error)}") from None

    def _check_file(self) -> None:
        """InputError unless the datasets in use are there, with the official shape and type."""
        for key in ("images", "labels", self._depths):
            dataset = self._file.get(key)
            if not isinstance(dataset, h5py.Dataset):
                raise InputError(f"{self.path}: has no dataset '{key}'; is it {FILE}?")
            shape, dtype = DATASETS[key]
            if dataset.shape != shape or dataset.dtype != dtype:
                found, expected = f"{dataset.dtype} {dataset.shape}", f"{np.dtype(dtype)} {shape}"
                raise InputError(f"{self.path}: dataset '{key}' is {found}; expected {expected}")

    def _image(self, key: str, sample: ImageNumber) -> np.ndarray:
        """The part of ``sample`` in the dataset ``key``, (H, W) or (H, W, 3)."""
        try:
            pixels: np.ndarray = self._file[key][sample.index - 1].T
        except (OSError, RuntimeError, KeyError) as error:
            raise InputError(f"{self._name(key, sample)}: cannot be read: {_one_line(error)}") from None
        return np.ascontiguousarray(pixels[CROP] if self.crop else pixels)

    def _name(self, key: str, sample: ImageNumber) -> str:
        return f"{self.path}: '{key}' of image {sample.index}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


PLUGIN = NYUv2Mat
