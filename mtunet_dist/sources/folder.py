"""Your own data: folders of images and a small ``dataset.yaml``."""

from __future__ import annotations

import colorsys
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtunet_dist.errors import InputError, closest
from mtunet_dist.sources._images import check_headers, id_table, read_images
from mtunet_dist.sources._source import KEY, RawSample, SampleFiles, list_images, match
from mtunet_dist.system.files import entries, read_yaml
from mtunet_dist.tasks._task import Task
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.normals import Normals
from mtunet_dist.tasks.segmentation import ClassInfo, Segmentation, class_problem

TASKS = {"segmentation": "label", "depth": "depth", "normals": "normal"}  # task -> folder
PARTS = ("rgb", *TASKS.values())
DESCRIPTION = "dataset.yaml"


class Folder:
    """``ROOT/SPLIT/{rgb,label,depth,normal}/STEM.SUFFIX``, any number of splits, and ``ROOT/dataset.yaml``::

        classes: [road, car]        # or [{name: road, color: [128, 64, 128]}, ...]
        label_offset: 0             # label value of the first class
        void_ids: [255]             # label values without a class; none of them may be a class's
        depth_kind: metric          # stored * depth_scale is metres; or inverse: a disparity without unit
        depth_scale: 0.001          # stored 0 is invalid

    Only ``classes`` is required. Labels are 8-bit gray PNGs, depth 16-bit gray PNGs, RGB is JPEG or 8-bit PNG; all are
    turned as their EXIF orientation says, so label and depth have to lie as a viewer shows the image.

    ``normal`` is optional: surface normals as 8-bit RGB PNGs (-1..1 is 0..255, black is none) or as npy files of
    vectors (H, W, 3), 0 for none; x right, y down, z into the scene.

    A sample may lack some of its targets, a split a whole folder: such samples train the other tasks alone.

    Options:
        allow_unlabelled: take RGB files that have neither label nor depth.
    """

    def __init__(self, root: Path, *, allow_unlabelled: bool = False) -> None:
        self.root, self.allow_unlabelled = root, allow_unlabelled
        path = root / DESCRIPTION
        description = self.stamp = _read_description(path)
        classes = _classes(description.classes, path)
        self.targets: dict[str, Task] = {"segmentation": Segmentation("segmentation", classes)}
        self._table = id_table(_class_ids(description, path), description.void_ids)
        if description.depth_kind == "metric":
            self.targets["depth"] = Depth.metric_depth(description.depth_scale)
        else:
            self.targets["depth"] = Depth.inverse_depth(description.depth_scale)
        if any(root.glob(f"*/{TASKS['normals']}/")):
            self.targets["normals"] = Normals("normals")

    def splits(self) -> dict[str, list[SampleFiles]]:
        """See ``Source.splits``."""
        folders = [path for path in entries(self.root) if path.is_dir() and not path.name.startswith(".")]
        if not folders:
            raise InputError(f"{self.root} has no split folder, such as train with {', '.join(PARTS)} in it")
        for folder in folders:
            if not KEY.fullmatch(folder.name):
                raise InputError(f"{folder}: the name of a split may have letters, digits, '_' and '-' only")
        return {folder.name: self._samples(folder) for folder in folders}

    def check(self, sample: SampleFiles) -> None:
        """See ``Source.check``."""
        check_headers(sample, self.targets)

    def read(self, sample: SampleFiles) -> RawSample:
        """See ``Source.read``."""
        hint = f"; see classes, label_offset and void_ids in {self.root / DESCRIPTION}"
        return read_images(sample, self.targets, {"segmentation": self._table}, hint)

    def _samples(self, folder: Path) -> list[SampleFiles]:
        targets = {name: (task.part, _list(folder / TASKS[name], name)) for name, task in self.targets.items()}
        if "normals" not in targets:
            _list(folder / TASKS["normals"], "normals")  # a misspelt name is an error
        samples = match(list_images(folder / "rgb"), targets, optional=True)
        if not self.allow_unlabelled:
            for sample in samples:
                if not sample.targets:
                    hint = "give it one, or allow such files with allow_unlabelled=true"
                    parts = " and no ".join(part for part, _ in targets.values())
                    raise InputError(f"{sample.rgb} has no {parts} file beside it; {hint}")
        return samples


def check_outside(out: Path, what: str) -> None:
    """Raise InputError if the output folder ``out`` lies in such a source's folder, which would read it as a split."""
    for folder in (out.resolve(), *out.resolve().parents):
        if (folder / DESCRIPTION).is_file():
            lies = f"lies in the dataset {folder} (it has a {DESCRIPTION}), which would take it for input"
            raise InputError(f"{what} {out} {lies}; choose a folder outside")


def _list(folder: Path, task: str) -> dict[str, Path]:
    """The files of a task. Empty if the folder is missing; a misspelt name of it is an error."""
    if folder.is_dir():
        return list_images(folder, (".png", ".npy")) if task == "normals" else list_images(folder)
    others = [path.name for path in entries(folder.parent) if path.is_dir() and path.name not in PARTS]
    hint = closest(folder.name, others)
    if hint:
        raise InputError(f"folder {folder} does not exist.{hint}")
    return {}


@dataclass(frozen=True)
class _Description:
    """The keys of ``dataset.yaml`` with their defaults."""

    classes: list[Any]
    label_offset: int = 0
    void_ids: list[int] = field(default_factory=lambda: [255])
    depth_kind: str = "metric"
    depth_scale: float = 0.001


def _read_description(path: Path) -> _Description:
    value = read_yaml(path)
    known = [f.name for f in dataclasses.fields(_Description)]
    if not isinstance(value, dict) or "classes" not in value:
        raise InputError(f"{path}: the key 'classes' is missing. Keys: {', '.join(known)}")
    unknown = [key for key in value if key not in known]
    if unknown:
        raise InputError(f"{path}: unknown key '{unknown[0]}'. Keys: {', '.join(known)}")
    description = _Description(**value)
    _check(description, path)
    return description


def _check(description: _Description, path: Path) -> None:
    """Check what YAML does not check: types and ranges."""

    def is_id(value: object) -> bool:
        return type(value) is int and 0 <= value <= 255

    rules = {
        "classes": (isinstance(description.classes, list) and bool(description.classes), "a list of classes"),
        "label_offset": (is_id(description.label_offset), "0..255"),
        "void_ids": (
            isinstance(description.void_ids, list) and all(is_id(v) for v in description.void_ids),
            "a list of 0..255",
        ),
        "depth_kind": (description.depth_kind in ("metric", "inverse"), "metric or inverse"),
        "depth_scale": (
            type(description.depth_scale) in (int, float) and 0 < description.depth_scale < math.inf,
            "a number above 0",
        ),
    }
    for key, (valid, expected) in rules.items():
        if not valid:
            raise InputError(f"{path}: {key} is {getattr(description, key)!r}; expected {expected}")


def _classes(entries: list[Any], path: Path) -> tuple[ClassInfo, ...]:
    """The classes of the list. Classes without a colour get evenly spread hues."""
    classes = []
    for i, entry in enumerate(entries):
        hue = colorsys.hsv_to_rgb(i / len(entries), 0.75, 0.9)
        given = entry if isinstance(entry, dict) else {"name": entry}
        color = given.get("color", [round(255 * x) for x in hue])
        valid_color = (
            isinstance(color, list) and len(color) == 3 and all(type(c) is int and 0 <= c <= 255 for c in color)
        )
        if not isinstance(given.get("name"), str) or set(given) - {"name", "color"} or not valid_color:
            expected = "a name (in quotes if YAML takes it for something else) or {name: ..., color: [r, g, b]}"
            raise InputError(f"{path}: class {i} is {entry!r}; expected {expected}")
        classes.append(ClassInfo(given["name"], (color[0], color[1], color[2])))
    problem = class_problem(classes)
    if problem:
        raise InputError(f"{path}: {problem}")
    return tuple(classes)


def _class_ids(description: _Description, path: Path) -> dict[int, int]:
    """Label value -> class index. InputError if a value does not fit into 8 bits or has two meanings."""
    first, count = description.label_offset, len(description.classes)
    if first + count > 256:
        raise InputError(f"{path}: label_offset {first} puts {count} classes outside 0..255")
    both = sorted(set(description.void_ids) & set(range(first, first + count)))
    if both:
        after = both[-1] + 1
        leading, ends = both == list(range(first, after)), after + count
        fits = leading and ends <= 256 and not set(description.void_ids) & set(range(after, ends))
        hint = f"if the first class has label value {after}, add label_offset: {after}; else take" if fits else "take"
        raise InputError(
            f"{path}: {both[0]} in void_ids is the label value of a class too; {hint} {both[0]} out of void_ids"
        )
    return {first + i: i for i in range(count)}


PLUGIN = Folder
