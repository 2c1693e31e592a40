"""Cityscapes: street scenes with fine labels and stereo disparity, as its archives unpack.

Cordts et al.: "The Cityscapes dataset for semantic urban scene understanding", CVPR 2016. Label ids, train ids, names
and colours are those of cityscapesScripts.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np

from mtunet_dist.errors import InputError
from mtunet_dist.sources._images import check_headers, id_table, read_images
from mtunet_dist.sources._source import RawSample, SampleFiles, match
from mtunet_dist.tasks._task import Task
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.normals import Normals
from mtunet_dist.tasks.segmentation import ClassInfo, Segmentation

LABEL_IDS = (*range(34), 255)  # 255: -1, the license plate, where a tool wrote it into 8 bits
METRES = 1 / 256  # unit of stored metric depth, as in KITTI's depth PNGs
FILES = {  # task or part -> folder and end of the file names
    "rgb": ("leftImg8bit", "_leftImg8bit.png"),
    "segmentation": ("gtFine", "_gtFine_labelIds.png"),
    "depth": ("disparity", "_disparity.png"),
    "normals": ("normal", "_normal.png"),
    "camera": ("camera", "_camera.json"),
}
_NO_CAMERA = "the option depth=inverse needs no camera"
_NO_NORMALS = "only the synthetic tree has normals, and mtunet synthesize adds them to one that was made without"
_HINTS = {"camera": _NO_CAMERA, "normals": _NO_NORMALS}

# Class -> (colour, label ids). The 7 categories as MTAN groups them: all ids of a category, evaluated or not.
CLASSES_7: dict[str, tuple[tuple[int, int, int], range]] = {
    "flat": ((128, 64, 128), range(7, 11)),
    "construction": ((70, 70, 70), range(11, 17)),
    "object": ((220, 220, 0), range(17, 21)),
    "nature": ((107, 142, 35), range(21, 23)),
    "sky": ((70, 130, 180), range(23, 24)),
    "human": ((220, 20, 60), range(24, 26)),
    "vehicle": ((0, 0, 142), range(26, 34)),
}
# Class -> (colour, label id), in the order of the official train ids.
CLASSES_19: dict[str, tuple[tuple[int, int, int], int]] = {
    "road": ((128, 64, 128), 7),
    "sidewalk": ((244, 35, 232), 8),
    "building": ((70, 70, 70), 11),
    "wall": ((102, 102, 156), 12),
    "fence": ((190, 153, 153), 13),
    "pole": ((153, 153, 153), 17),
    "traffic light": ((250, 170, 30), 19),
    "traffic sign": ((220, 220, 0), 20),
    "vegetation": ((107, 142, 35), 21),
    "terrain": ((152, 251, 152), 22),
    "sky": ((70, 130, 180), 23),
    "person": ((220, 20, 60), 24),
    "rider": ((255, 0, 0), 25),
    "car": ((0, 0, 142), 26),
    "truck": ((0, 0, 70), 27),
    "bus": ((0, 60, 100), 28),
    "train": ((0, 80, 100), 31),
    "motorcycle": ((0, 0, 230), 32),
    "bicycle": ((119, 11, 32), 33),
}
# Class -> (colour, categories). MTAN publishes 2-class labels without saying how they were made. Here the foreground is
# all things that move or are parked. Ids outside the 7 categories stay void.
CLASSES_2: dict[str, tuple[tuple[int, int, int], tuple[str, ...]]] = {
    "background": ((70, 70, 70), ("flat", "construction", "object", "nature", "sky")),
    "foreground": ((220, 20, 60), ("human", "vehicle")),
}
EVALUATED = frozenset(i for _, i in CLASSES_19.values())


def class_set(classes: Literal[2, 7, 19]) -> dict[ClassInfo, tuple[int, ...]]:
    """The label ids of each class, in the order of the class indices."""
    if classes == 19:
        return {ClassInfo(name, color): (i,) for name, (color, i) in CLASSES_19.items()}
    if classes == 7:
        return {ClassInfo(name, color): tuple(ids) for name, (color, ids) in CLASSES_7.items()}
    return {
        ClassInfo(name, color): tuple(i for category in categories for i in CLASSES_7[category][1])
        for name, (color, categories) in CLASSES_2.items()
    }


class Cityscapes:
    """``ROOT/{leftImg8bit,gtFine,disparity,camera}/SPLIT/CITY/*``; the splits are those that leftImg8bit has.

    Options:
        classes: 7 categories as MTAN uses them, the official 19, or 2: background and foreground, see ``CLASSES_2``.
        unevaluated: what becomes of the ids that Cityscapes defines but does not evaluate (parking, rail track, guard
            rail, bridge, tunnel, pole group, caravan, trailer: 9, 10, 14 to 16, 18, 29, 30): "keep" them in their
            category, as MTAN does, or make them "void". In the 19 classes they are always void.
        depth: "metric", metres from disparity and camera, baseline * fx / ((p - 1) / 256) of the stored p, kept in
            steps of 1/256 m; or "inverse", (p - 1) / 65536, what MTAN and its successors call depth. Pixels without
            disparity (p = 0), at infinity (p = 1) or beyond 256 m are invalid.
        test: also take the split test. Its labels in Cityscapes are withheld, so the files hold void only; those of
            the synthetic tree are real.
        normals: also take surface normals from ROOT/normal, which the synthetic tree has and Cityscapes does not. They
            are unit vectors in the frame of the camera, see ``mtunet_dist/tasks/normals.py``; the sky has none.
    """

    stamp = None

    def __init__(
        self,
        root: Path,
        *,
        classes: Literal[2, 7, 19] = 7,
        unevaluated: Literal["keep", "void"] = "keep",
        depth: Literal["metric", "inverse"] = "metric",
        test: bool = False,
        normals: bool = False,
    ) -> None:
        self.root = root
        self._names = ("train", "val", "test") if test else ("train", "val")
        ids = class_set(classes)
        self.inverse = depth == "inverse"
        self.targets: dict[str, Task] = {
            "segmentation": Segmentation("segmentation", tuple(ids)),
            "depth": Depth.inverse_depth(1 / 65536) if self.inverse else Depth.metric_depth(METRES),
        }
        if normals:
            self.targets["normals"] = Normals("normals")
        mapping = {i: index for index, c in enumerate(ids) for i in ids[c] if unevaluated == "keep" or i in EVALUATED}
        self._table = id_table(mapping, void=set(LABEL_IDS) - set(mapping))

    def splits(self) -> dict[str, list[SampleFiles]]:
        """See ``Source.splits``."""
        names = [name for name in self._names if (self.root / "leftImg8bit" / name).is_dir()]
        if not names:
            raise InputError(f"folder {self.root / 'leftImg8bit'} has no {' or '.join(self._names)} folder")
        return {name: self._samples(name) for name in names}

    def check(self, sample: SampleFiles) -> None:
        """See ``Source.check``."""
        check_headers(sample, self.targets)

    def read(self, sample: SampleFiles) -> RawSample:
        """See ``Source.read``."""
        raw = read_images(sample, self.targets, {"segmentation": self._table})
        disparity = raw.targets["depth"]
        if self.inverse:
            depth = np.maximum(disparity, 1) - np.uint16(1)
        else:
            assert sample.camera is not None
            depth = _metric(disparity, *_baseline_and_fx(sample.camera))
        return RawSample(raw.rgb, {**raw.targets, "depth": depth})

    def _samples(self, split: str) -> list[SampleFiles]:
        targets = {name: (task.part, self._files(name, split)) for name, task in self.targets.items()}
        samples = match(self._files("rgb", split), targets)
        if self.inverse:
            return samples
        cameras = self._files("camera", split)
        for sample in samples:
            if sample.key not in cameras:
                raise InputError(f"{sample.rgb} has no camera file; {_NO_CAMERA}")
        return [dataclasses.replace(sample, camera=cameras[sample.key]) for sample in samples]

    def _files(self, part: str, split: str) -> dict[str, Path]:
        top, suffix = FILES[part]
        folder = self.root / top / split
        files = {path.name.removesuffix(suffix): path for path in folder.glob(f"*/*{suffix}")}
        if not files:
            hint = f"; {_HINTS[part]}" if part in _HINTS else ""
            raise InputError(f"folder {folder} is missing or holds no CITY/*{suffix}{hint}")
        return files


def _baseline_and_fx(path: Path) -> tuple[float, float]:
    """Stereo baseline in metres and focal length in pixels."""
    try:
        camera = json.loads(path.read_bytes())
        return float(camera["extrinsic"]["baseline"]), float(camera["intrinsic"]["fx"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path}: cannot read extrinsic.baseline and intrinsic.fx ({error!r}); {_NO_CAMERA}"
        raise InputError(message) from None


def _metric(disparity: np.ndarray, baseline: float, fx: float) -> np.ndarray:
    """Stored disparity p -> stored depth, uint16 in ``METRES``."""
    pixels = (np.arange(1 << 16) - 1) / 256
    with np.errstate(divide="ignore"):
        stored = np.rint(baseline * fx / pixels / METRES)
    stored[(stored < 1) | (stored > 65535)] = 0
    depth: np.ndarray = stored.astype(np.uint16)[disparity]
    return depth


PLUGIN = Cityscapes
