"""NYU Depth v2, the 1449 labelled images, as one file per image and part.

Silberman, Hoiem, Kohli, Fergus: "Indoor segmentation and support inference from RGBD images", ECCV 2012.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mtunet_dist.sources._images import check_headers, id_table, read_images
from mtunet_dist.sources._plane_fits import Camera, normals_of
from mtunet_dist.sources._source import RawSample, S, SampleFiles, list_images, match
from mtunet_dist.tasks._task import Task
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.normals import Normals
from mtunet_dist.tasks.segmentation import ClassInfo, Segmentation

# A validation part carved out of train, 100 images drawn once: the official split has none, and choosing settings on
# test would spoil its figures. 1-based indices of the labelled set, as in the file names.
# fmt: off
VALIDATION = frozenset(f"{index:04d}" for index in (
    6, 48, 53, 54, 98, 107, 110, 135, 159, 215, 224, 233, 235, 238, 245, 248, 255, 262, 307, 337, 338, 345, 393,
    404, 424, 440, 456, 459, 460, 484, 493, 494, 504, 595, 596, 616, 623, 654, 660, 685, 703, 705, 714, 719,
    730, 737, 740, 752, 753, 756, 758, 788, 798, 808, 820, 881, 883, 888, 896, 909, 912, 913, 929, 937, 939,
    940, 948, 950, 955, 958, 963, 968, 987, 988, 990, 1018, 1055, 1063, 1112, 1121, 1185, 1197, 1214, 1231,
    1246, 1251, 1267, 1269, 1270, 1272, 1274, 1283, 1284, 1312, 1343, 1359, 1361, 1405, 1427, 1428,
))
# fmt: on

CLASSES = (  # the 13 classes of A. Handa's 40 -> 13 mapping, in the colours of SceneNet RGB-D
    ClassInfo("bed", (0, 0, 255)),
    ClassInfo("books", (233, 89, 48)),
    ClassInfo("ceiling", (0, 218, 0)),
    ClassInfo("chair", (149, 0, 240)),
    ClassInfo("floor", (222, 241, 24)),
    ClassInfo("furniture", (255, 206, 206)),
    ClassInfo("objects", (0, 224, 229)),
    ClassInfo("picture", (106, 136, 204)),
    ClassInfo("sofa", (117, 29, 41)),
    ClassInfo("table", (240, 35, 235)),
    ClassInfo("tv", (0, 167, 156)),
    ClassInfo("wall", (249, 139, 0)),
    ClassInfo("window", (225, 229, 194)),
)


WIDTH, HEIGHT = 640, 480  # of the published images
# The camera of the colour images, from the toolbox of the dataset (camera_params.m, without distortion).
CAMERA = Camera(518.85790117450188, 519.46961112127485, 325.58244941119034 - 1, 253.73616633400465 - 1)
DEPTH, NORMALS = Depth.metric_depth(0.001), Normals("normals")


def targets_of(classes: tuple[ClassInfo, ...], *, normals: bool) -> dict[str, Task]:
    """The targets of NYUv2 with these classes: depth is stored in millimetres."""
    targets: dict[str, Task] = {"segmentation": Segmentation("segmentation", classes), "depth": DEPTH}
    return {**targets, "normals": NORMALS} if normals else targets


def computed_normals(stored_depth: np.ndarray, camera: Camera) -> np.ndarray:
    """Stored surface normals of the stored depth (H, W)."""
    return NORMALS.from_numbers(normals_of(stored_depth * DEPTH.scale, camera), "computed normals")


def with_validation(train: list[S], test: list[S], val: bool) -> dict[str, list[S]]:
    """The official splits; with ``val`` the images of ``VALIDATION`` are a split of their own, out of train."""
    if not val:
        return {"train": train, "test": test}
    held_out = [s for s in train if s.key in VALIDATION]
    return {"train": [s for s in train if s.key not in VALIDATION], "val": held_out, "test": test}


class NYUv2:
    """``ROOT/{train,test}/{rgb/NNNN.jpg,depth/NNNN.png,label13/NNNN.png}``, NNNN the official 1-based index.

    Depth PNGs are 16-bit millimetres; label PNGs are 8-bit, 0 void, 1..13 the classes.

    Options:
        val: hold the images of ``VALIDATION`` out of train as the split val; without it, the official two splits.
            Train on ``train`` while choosing settings and on ``train+val`` for a final run.
        normals: also give surface normals. They are computed from the depth by local plane fits (``_plane_fits.py``),
            not measured.
    """

    stamp = None

    def __init__(self, root: Path, *, val: bool = True, normals: bool = False) -> None:
        self.root, self.val = root, val
        self.targets = targets_of(CLASSES, normals=normals)
        self._table = id_table({i + 1: i for i in range(len(CLASSES))}, void=[0])

    def splits(self) -> dict[str, list[SampleFiles]]:
        """See ``Source.splits``."""
        return with_validation(self._samples("train"), self._samples("test"), self.val)

    def check(self, sample: SampleFiles) -> None:
        """See ``Source.check``."""
        check_headers(sample, self.targets)

    def read(self, sample: SampleFiles) -> RawSample:
        """See ``Source.read``."""
        raw = read_images(sample, self.targets, {"segmentation": self._table})
        if "normals" not in self.targets:
            return raw
        height, width = raw.rgb.shape[:2]
        computed = computed_normals(raw.targets["depth"], CAMERA.resized(width / WIDTH, height / HEIGHT))
        return RawSample(raw.rgb, {**raw.targets, "normals": computed})

    def _samples(self, split: str) -> list[SampleFiles]:
        files = {folder: list_images(self.root / split / folder) for folder in ("rgb", "label13", "depth")}
        return match(files["rgb"], {"segmentation": ("label", files["label13"]), "depth": ("depth", files["depth"])})


PLUGIN = NYUv2
