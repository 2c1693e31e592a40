"""Semantic segmentation: a class for each pixel. Cross-entropy (equation 3 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw

from mtunet_dist.errors import InputError
from mtunet_dist.tasks._task import Counts, Direction, ImageFormat, Task

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from torch import Tensor

VOID = 255  # class index of pixels without a class
MOST_CLASSES = VOID  # indices 0..254


@dataclass(frozen=True)
class ClassInfo:
    """A class and the RGB colour it is drawn in."""

    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True)
class Segmentation(Task):
    """Classes; target uint8 (N, H, W), 255 = void; output: a score for each class."""

    classes: tuple[ClassInfo, ...]

    KIND: ClassVar[str] = "segmentation"
    PART: ClassVar[str] = "label"
    METRICS: ClassVar[dict[str, Direction]] = {
        "miou": "max",
        "accuracy": "max",
        "legacy/miou": "max",
        "legacy/accuracy": "max",
    }
    MAIN: ClassVar[tuple[str, ...]] = ("miou", "accuracy")
    DTYPE = np.uint8
    IMAGE = ImageFormat("label", ("8-bit gray PNG",), np.uint8)

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Segmentation:
        """See ``Task``."""
        return cls(name, tuple(ClassInfo(c["name"], tuple(c["color"])) for c in value["classes"]))

    def problem(self, *, old: bool = False) -> str | None:
        """See ``Task``. Of an old dataset, only what makes its figures wrong."""
        sound = len(self.classes) <= MOST_CLASSES and len({c.name for c in self.classes}) == len(self.classes)
        return None if old and sound else class_problem(self.classes)

    def identity(self) -> object:
        """See ``Task``. That of the first dataset formats, so that runs of before resume."""
        return [c.name for c in self.classes] if self.name == self.KIND else super().identity()

    def blank(self, height: int, width: int) -> np.ndarray:
        """See ``Task``."""
        return np.full((height, width), VOID, dtype=np.uint8)

    def from_numbers(self, array: np.ndarray, name: str) -> np.ndarray:
        """-1 (void) and class indices, of any type."""
        valid = (array == np.rint(array)) & (array >= -1) & (array < len(self.classes))
        if not valid.all():
            raise InputError(f"{name}: label value {array[~valid][0]:g} is not one of -1..{len(self.classes) - 1}")
        indices = array.astype(np.int16)
        return np.where(indices < 0, VOID, indices).astype(np.uint8)

    def count(self, target: np.ndarray) -> Counts:
        """``classes``: the pixels of each class."""
        pixels = self.tally(target)
        valid = int(pixels.sum())
        return {
            "pixels": target.size,
            "valid": valid,
            "samples_without": int(valid == 0),
            "classes": pixels[: len(self.classes)].tolist(),
        }

    def rows(self, counts: Counts) -> dict[str, str]:
        """The share of each class, and of void."""
        total = max(counts["pixels"], 1)
        shares = {info.name: n for info, n in zip(self.classes, counts["classes"], strict=True)}
        return {name: f"{n / total:.1%}" for name, n in {**shares, "void": counts["pixels"] - counts["valid"]}.items()}

    def tally(self, target: np.ndarray) -> np.ndarray:
        """int64 (256,): pixels of each class index; void is not counted."""
        pixels = np.bincount(target.reshape(-1), minlength=256)
        pixels[VOID] = 0
        return pixels

    def chart(self, axes: Axes, splits: Mapping[str, tuple[Counts, np.ndarray]]) -> None:
        """The share of each class."""
        names = [*(c.name for c in self.classes), "void"]
        bar = 0.8 / len(splits)
        for n, (name, (counts, _)) in enumerate(splits.items()):
            pixels = np.array([*counts["classes"], counts["pixels"] - counts["valid"]])
            share = 100 * pixels / max(counts["pixels"], 1)
            axes.bar(np.arange(len(names)) + n * bar, share, bar, align="edge", label=name)
        axes.set_xticks(np.arange(len(names)) + 0.4, names, rotation=60, ha="right", fontsize=8, parse_math=False)
        axes.set_ylabel("share of all pixels (%)")
        axes.legend(fontsize=8)

    def constant(self, tally: np.ndarray) -> list[float]:
        """1 for the most frequent class, 0 for the others."""
        return [float(i == tally.argmax()) for i in range(len(self.classes))]

    @property
    def channels(self) -> int:
        """See ``Task``."""
        return len(self.classes)

    def loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy (eq. 3) of scores (N, C, H, W), in nats."""
        import torch
        from torch.nn import functional as F

        valid = target != VOID
        scores = torch.where(valid[:, None], prediction.float(), 0.0)
        # The sum of reduction="sum" uses atomics on CUDA, so it is neither reproducible nor pairwise.
        losses = F.cross_entropy(scores, target.long(), ignore_index=VOID, reduction="none")
        return losses.sum(), valid.sum()

    def valid(self, target: Tensor) -> Tensor:
        """The number of pixels that are not void."""
        return (target != VOID).sum()

    def metric(self, device: torch.device | str) -> SegmentationMetric:
        """See ``Task``."""
        return SegmentationMetric([info.name for info in self.classes], device)

    def compare(self, prediction: Tensor, target: Tensor) -> dict[str, np.ndarray]:
        """See ``Task``; errors are white."""
        predicted, label = prediction.argmax(0).numpy(), target.numpy()
        wrong = np.where(label == VOID, 0, np.where(predicted == label, 60, 255)).astype(np.uint8)
        return {
            self.part: self._colors(label),
            f"predicted {self.part}": self._colors(predicted),
            self.full("wrong (white)"): np.repeat(wrong[..., None], 3, axis=2),
        }

    def tiles(self, target: Tensor | None, outputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """See ``Task``."""
        truth = {} if target is None else {"truth": target}
        labels = truth | {name: output.argmax(0) for name, output in outputs.items()}
        return {name: self._colors(label.numpy()) for name, label in labels.items()}

    def stored_tile(self, target: np.ndarray, statistics: Sequence[Counts]) -> np.ndarray:
        """See ``Task``."""
        return self._colors(target)

    def legend(self, width: int) -> np.ndarray:
        """The names of the classes."""
        entry = 110
        per_line = max(1, width // entry)
        lines = -(-len(self.classes) // per_line)
        strip = Image.new("RGB", (width, lines * 18), "white")
        draw = ImageDraw.Draw(strip)
        for i, info in enumerate(self.classes):
            x, y = i % per_line * entry, i // per_line * 18
            draw.rectangle((x + 3, y + 3, x + 15, y + 15), fill=info.color, outline="black")
            draw.text((x + 20, y + 3), info.name, fill="black")
        return np.asarray(strip)

    def result(self, output: Tensor, size: tuple[int, int]) -> np.ndarray:
        """uint8 (height, width): class indices."""
        label = output.argmax(0).numpy().astype(np.uint8)
        return np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))

    def write(self, stem: Path, result: np.ndarray) -> None:
        """``STEM.label.png``, 8-bit."""
        Image.fromarray(result).save(f"{stem}.{self.part}.png")

    def about_files(self) -> str:
        """See ``Task``."""
        return f"{self.part} values: {', '.join(f'{i} {c.name}' for i, c in enumerate(self.classes))}"

    def _colors(self, label: np.ndarray) -> np.ndarray:
        """Class colours uint8 (H, W, 3) for class indices (H, W); void is black."""
        table = np.zeros((256, 3), dtype=np.uint8)
        table[: len(self.classes)] = [info.color for info in self.classes]
        table[VOID] = 0
        colors: np.ndarray = table[label]
        return colors


class SegmentationMetric:
    """Mean IoU and pixel accuracy from a confusion matrix.

    - ``miou``: mean IoU over the classes that occur in the predictions or labels of the whole set.
    - ``accuracy``: share of labelled pixels that are right (what the paper calls IoU).
    - ``legacy/miou``, ``legacy/accuracy``: the same for each image, averaged over the images with a labelled pixel, as
      the code behind the tables of the paper and of MTAN did.

    All are nan if nothing was labelled. Memory and time grow with the square of the number of classes.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str) -> None:
        import torch

        self.names = list(names)
        self.num_classes = num_classes = len(self.names)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)  # [label, prediction]
        self.legacy_sums = torch.zeros(2, dtype=torch.float64, device=device)  # mIoU, accuracy
        self.images = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: scores (N, C, H, W) and label uint8 (N, H, W) with VOID where there is none."""
        import torch

        with torch.no_grad():
            n, bins = len(target), self.num_classes**2 + 1  # the last bin of each image takes its void pixels
            cell = torch.where(target == VOID, bins - 1, target.long() * self.num_classes + prediction.argmax(1))
            index = (cell.flatten(1) + bins * torch.arange(n, device=cell.device)[:, None]).flatten()
            counts = torch.zeros(n * bins, dtype=torch.int64, device=cell.device)
            counts.scatter_add_(0, index, torch.ones_like(index))
            confusion = counts.view(n, bins)[:, :-1].view(n, self.num_classes, self.num_classes)
            self.confusion += confusion.sum(0)
            labelled = confusion.sum((1, 2)) > 0
            figures = torch.stack([_class_iou(confusion).nanmean(1), _accuracy(confusion)])
            self.legacy_sums += torch.where(labelled, figures, 0.0).sum(1)
            self.images += labelled.sum()

    def tensors(self) -> list[Tensor]:
        """See ``Metric``."""
        return [self.confusion, self.legacy_sums, self.images]

    def per_class(self) -> dict[str, float]:
        """IoU of each class; nan for a class that neither labels nor predictions contain."""
        return dict(zip(self.names, map(float, _class_iou(self.confusion).tolist()), strict=True))

    def compute(self) -> dict[str, float]:
        """See ``Metric``."""
        legacy_miou, legacy_accuracy = (self.legacy_sums / self.images).tolist()
        return {
            "miou": _class_iou(self.confusion).nanmean().item(),
            "accuracy": _accuracy(self.confusion).item(),
            "legacy/miou": legacy_miou,
            "legacy/accuracy": legacy_accuracy,
        }


def class_problem(classes: Sequence[ClassInfo]) -> str | None:
    """Why labels cannot have these classes, or None. Figures are kept by name, so that an equal name would hide a
    figure."""
    if not 0 < len(classes) <= MOST_CLASSES:
        return f"{len(classes)} classes; a dataset has 1 to {MOST_CLASSES}, as {VOID} means a pixel without a class"
    before: dict[str, str] = {}
    for info in classes:
        alike = "".join(info.name.split()).casefold()
        if not alike or not info.name.isprintable() or info.name != info.name.strip():
            return f"the class name {info.name!r} must be one line of text without blanks around it"
        if alike in before:
            return f"the class names {before[alike]!r} and {info.name!r} must differ in more than blanks and case"
        before[alike] = info.name
    return None


def _class_iou(confusion: Tensor) -> Tensor:
    """IoU (..., C) from confusion (..., C, C), nan where the union is empty."""
    intersection = confusion.diagonal(dim1=-2, dim2=-1).double()
    return intersection / (confusion.sum(-1) + confusion.sum(-2) - intersection)


def _accuracy(confusion: Tensor) -> Tensor:
    """Pixel accuracy (...) from confusion (..., C, C), nan without pixels."""
    return confusion.diagonal(dim1=-2, dim2=-1).sum(-1).double() / confusion.sum((-2, -1))


PLUGIN = Segmentation
