"""The interface of a source: a read-only view of a published dataset in the layout that its authors chose."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from mtunet_dist.errors import InputError
from mtunet_dist.system.files import entries
from mtunet_dist.tasks._task import Task

KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # names that tar headers and WebDataset's "key.part.ext" can hold


class Sample(Protocol):
    """The information by which a source finds one sample: a small frozen dataclass. ``key`` is unique in its split."""

    @property
    def key(self) -> str:
        """A match of ``KEY``."""


S = TypeVar("S", bound=Sample)


@dataclass(frozen=True)
class SampleFiles:
    """A sample whose parts are separate files. ``targets`` has a file for each task that it has a target for."""

    key: str
    rgb: Path
    targets: dict[str, Path] = field(default_factory=dict)
    camera: Path | None = None


@dataclass(frozen=True)
class RawSample:
    """A decoded sample: ``rgb`` uint8 (H, W, 3), and the stored target of each task (see ``Task``), blank if the sample
    has none."""

    rgb: np.ndarray
    targets: dict[str, np.ndarray]


class Source(Protocol[S]):
    """A published dataset. Must be picklable: samples are read in worker processes."""

    @property
    def targets(self) -> dict[str, Task]:
        """The tasks that the samples have targets for, by name."""

    @property
    def stamp(self) -> object:
        """Everything that all samples depend on besides their own files. Its ``repr`` changes when the content
        changes."""

    def splits(self) -> dict[str, list[S]]:
        """The samples of each split, sorted by key. InputError for a missing folder or a file without its partner
        files."""

    def check(self, sample: S) -> None:
        """Look for wrong formats and sizes at little cost; called from threads. Raises InputError as ``read``."""

    def read(self, sample: S) -> RawSample:
        """Decode and convert one sample. InputError names a file that is not valid.

        A sample without a target gets a blank one. It does not count in that task's loss.
        """


def list_images(folder: Path, suffixes: Sequence[str] = (".png", ".jpg", ".jpeg")) -> dict[str, Path]:
    """The images directly in ``folder``, by stem. InputError if it is missing or empty, or if a stem occurs twice."""
    if not folder.is_dir():
        raise InputError(f"folder {folder} does not exist")
    images: dict[str, Path] = {}
    for path in entries(folder):
        if path.suffix.lower() in suffixes:
            if path.stem in images:
                raise InputError(f"{path} and {images[path.stem].name} have the same name: keep one")
            images[path.stem] = path
    if not images:
        raise InputError(f"folder {folder} holds no {' or '.join(suffixes)} file")
    return images


def match(
    rgb: Mapping[str, Path], targets: Mapping[str, tuple[str, Mapping[str, Path]]], *, optional: bool = False
) -> list[SampleFiles]:
    """Join the files (key -> path) of RGB and of each task into samples sorted by key. ``targets`` has for each task
    what its files are called, such as "label", and the files.

    Raises InputError for a file whose partner file is missing (a target may be if they are ``optional``), and for a
    file whose name cannot be a key. The message names the file.
    """
    samples = []
    for key in sorted(set(rgb).union(*(files for _, files in targets.values()))):
        found = {task: files[key] for task, (_, files) in targets.items() if key in files}
        path = rgb[key] if key in rgb else next(iter(found.values()))
        missing = ["rgb"] if key not in rgb else []
        missing += [what for task, (what, _) in targets.items() if task not in found and not optional]
        if missing:
            raise InputError(f"{path} has no {' and no '.join(missing)} file beside it")
        if not KEY.fullmatch(key):
            raise InputError(f"{path}: the name may have at most 80 letters, digits, '_' and '-' before the suffix")
        samples.append(SampleFiles(key, rgb[key], found))
    return samples
