"""The interface of a task: everything that the rest of the program needs to know of what is predicted.

A file of this folder is one kind of task, and ``PLUGIN`` is its class, a frozen dataclass. An instance is the task on
one dataset, with the meaning of its target there, such as the classes. A dataset may have several targets of one kind,
each under its own name.

torch is imported where it computes, not at the top: the processes of ``prepare`` start without it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from torch import Tensor

Direction = Literal["max", "min"]
Counts = dict[str, Any]
"""Sums over the pixels of a target, whole numbers, or lists of them, under names that the task chooses. Every task has
``pixels``, ``valid`` and ``samples_without``: all pixels, those with a target, and the samples without a single one."""


@dataclass(frozen=True)
class ImageFormat:
    """The image files that may hold a part of a sample. ``names`` are such as ``8-bit gray PNG``."""

    what: str  # for messages: rgb, label, depth
    names: tuple[str, ...]
    dtype: type[np.unsignedinteger[Any]]


class Metric(Protocol):
    """An accumulator over a whole set. ``update`` never makes the host wait for the device.

    The caller sums ``tensors()`` over ranks in place and then calls ``compute``.
    """

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch."""

    def tensors(self) -> list[Tensor]:
        """The state; its sum over parts of a set is the state of the set."""

    def compute(self) -> dict[str, float]:
        """The metrics of the kind's ``METRICS``, nan without a valid pixel."""

    def per_class(self) -> dict[str, float]:
        """The IoU of each class by its name, for a task with classes; else empty."""


@dataclass(frozen=True)
class Task(ABC):
    """One task on one dataset. Its target in a batch is ``batch[name]``."""

    name: str

    KIND: ClassVar[str]  # the name of the file
    PART: ClassVar[str]  # what people call a file with such a target: label, depth
    METRICS: ClassVar[dict[str, Direction]]  # metric -> whether the largest or the smallest value is the best
    MAIN: ClassVar[tuple[str, ...]]  # the metrics to show first; best.pt is chosen by the first of them
    # How a target is stored: the type, and the number of planes. (H, W) for one plane, else (H, W, planes).
    DTYPE: ClassVar[type[np.integer[Any]]]
    PLANES: ClassVar[int] = 1
    IMAGE: ClassVar[ImageFormat]  # image files with such a target
    LOSSLESS: ClassVar[bool] = True  # whether an image file holds a stored target without loss

    @property
    def unit_text(self) -> str:
        """The unit of its errors in a text, if they have one."""
        return ""

    @property
    def part(self) -> str:
        """What a file with this target is called, in folders and in messages."""
        return self.PART if self.name == self.KIND else self.name

    def full(self, metric: str) -> str:
        """The name of ``metric`` (of ``METRICS``), or the caption of a tile, among those of all tasks: with the task's
        name in front if this is not the kind's."""
        return metric if self.name == self.KIND else f"{self.name}/{metric}"

    # The meaning of the target, for dataset.json.

    def to_json(self) -> dict[str, Any]:
        """The kind and the meaning of the target as JSON values, without the name."""
        meaning = dataclasses.asdict(self)
        del meaning["name"]
        return {"kind": self.KIND, **meaning}

    @classmethod
    @abstractmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Task:
        """The task from the values of ``to_json``. Raises KeyError or TypeError for other values."""

    def problem(self, *, old: bool = False) -> str | None:
        """Why a target cannot have this meaning, or None. ``old``: in a dataset that exists already, where earlier
        versions accepted more."""
        return None

    def identity(self) -> object:
        """JSON values that are equal for tasks that learn the same."""
        return [self.name, self.to_json()]

    # The stored target, in numpy.

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of a stored target."""
        return (height, width) if self.PLANES == 1 else (height, width, self.PLANES)

    @abstractmethod
    def blank(self, height: int, width: int) -> np.ndarray:
        """A stored target without a valid pixel."""

    def from_image(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """The stored target of an image file's ``pixels``, whose format is ``IMAGE``. InputError starts with ``name``
        for values that are not valid."""
        return pixels

    @abstractmethod
    def from_numbers(self, array: np.ndarray, name: str) -> np.ndarray:
        """The stored target of an array of numbers, (H, W, ...), such as from an npy file. InputError starts with
        ``name`` for values that are not valid."""

    @abstractmethod
    def count(self, target: np.ndarray) -> Counts:
        """The counts of one stored target."""

    def add(self, one: Counts, other: Counts) -> Counts:
        """The counts of both together. Lists are added entry by entry; ``min`` and ``max`` are kept."""
        joined: Counts = {}
        for key, a in one.items():
            b = other[key]
            if isinstance(a, list):
                joined[key] = [x + y for x, y in zip(a, b, strict=True)]
            else:
                joined[key] = min(a, b) if key == "min" else max(a, b) if key == "max" else a + b
        return joined

    @abstractmethod
    def rows(self, counts: Counts) -> dict[str, str]:
        """The counts of a split for people: label -> text."""

    @abstractmethod
    def tally(self, target: np.ndarray) -> np.ndarray:
        """What ``constant`` and ``chart`` need of a stored target. The sum of several stands for all of them."""

    @abstractmethod
    def constant(self, tally: np.ndarray) -> list[float]:
        """The best output that does not depend on the image, one number per channel."""

    @abstractmethod
    def chart(self, axes: Axes, splits: Mapping[str, tuple[Counts, np.ndarray]]) -> None:
        """Draw how the target is distributed: for each split, by its title, from its counts and a tally."""

    # From stored targets to those of a batch.

    def factors(self, draws: Sequence[Draw], count: int) -> np.ndarray | None:
        """float32 (count, PLANES): what the stored numbers of each sample are multiplied by. ``draws`` is empty
        without augmentation. None: they are taken as they are."""
        return None

    @property
    def multiplied(self) -> bool:
        """Whether stored numbers are multiplied by ``factors``."""
        return self.factors((), 0) is not None

    # The trained task, in torch.

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of the network's output."""

    @abstractmethod
    def loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the loss over the valid pixels (float32) and their number (int64).

        The caller divides, by a count shared over ranks. Invalid pixels must be replaced before the arithmetic: a
        selection by a boolean index makes the device wait, and a mask on the result lets an inf or NaN there reach the
        gradient as 0 * NaN.
        """

    @abstractmethod
    def valid(self, target: Tensor) -> Tensor:
        """The number of valid pixels in ``target``."""

    @abstractmethod
    def metric(self, device: torch.device | str) -> Metric:
        """A new accumulator."""

    # For people.

    @abstractmethod
    def compare(self, prediction: Tensor, target: Tensor) -> dict[str, np.ndarray]:
        """Tiles uint8 (H, W, 3) by caption, of an output (C, H, W) and its target on the CPU: truth, prediction,
        error."""

    @abstractmethod
    def tiles(self, target: Tensor | None, outputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Tiles by caption: the truth, if there is one, and each of ``outputs`` (C, H, W). All have the same scale of
        colours."""

    @abstractmethod
    def stored_tile(self, target: np.ndarray, statistics: Sequence[Counts]) -> np.ndarray:
        """A stored target as colours uint8 (H, W, 3); ``statistics`` are those of all splits."""

    def legend(self, width: int) -> np.ndarray | None:
        """What the colours mean, as a strip uint8 (h, width, 3)."""
        return None

    @abstractmethod
    def result(self, output: Tensor, size: tuple[int, int]) -> np.ndarray:
        """The prediction for people, from an output (C, H, W) on the CPU, resized to ``size`` (width, height)."""

    @abstractmethod
    def write(self, stem: Path, result: np.ndarray) -> None:
        """Write a ``result`` to a file whose name begins with ``stem``."""

    @abstractmethod
    def about_files(self) -> str:
        """One line on what the values in the files of ``write`` mean."""


class Draw(Protocol):
    """What a task needs to know of the augmentation of a sample; see ``data/augmentation.py``."""

    @property
    def scale(self) -> float:
        """The factor by which the image was enlarged."""

    @property
    def flip(self) -> bool:
        """Whether left and right were exchanged."""
