"""Metrics over a whole set, accumulated on the device and exact over ranks and uneven shards.

``update`` never makes the host wait. The caller sums ``tensors()`` over ranks in place and then calls ``compute``.
The ``legacy/`` figures average per image or per batch, as the code behind the tables of the paper and of MTAN did.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtunet_dist.schema import VOID

DELTA = "delta_m"  # the name under which the result of ``delta_m`` stands among the metrics


def higher_is_better(name: str) -> bool:
    """Whether a higher value of the metric ``name`` (also a ``legacy/`` one) is better: yes for shares and delta_m, no
    for errors."""
    return name.endswith(("miou", "accuracy", "delta1")) or name == DELTA


def task_of(name: str) -> str:
    """The task that the metric ``name`` measures."""
    return "segmentation" if name.endswith(("miou", "accuracy", "/segmentation")) else "depth"


def delta_m(multi: Mapping[str, float], single: Mapping[str, float], names: Sequence[str]) -> float:
    """How much better ``multi`` is than ``single``, relative and in percent. Positive is better; nan if a value is
    unknown.

    The mean over tasks of (-1)^l (M_multi - M_single) / M_single, with l = 1 if lower is better: Maninis, Radosavovic,
    Kokkinos, "Attentive single-tasking of multiple tasks", CVPR 2019. A task with several metrics among ``names``
    counts with their mean, as in LibMTL.
    """
    gains: dict[str, list[float]] = {}
    for name in names:
        value, base = multi.get(name, math.nan), single.get(name, math.nan)
        relative = (value - base) / base if base else math.nan
        gains.setdefault(task_of(name), []).append(relative if higher_is_better(name) else -relative)
    return 100 * statistics.fmean(statistics.fmean(values) for values in gains.values())


class SegmentationMetric:
    """Mean IoU and pixel accuracy from a confusion matrix.

    - ``miou``: mean IoU over the classes that occur in the predictions or labels of the whole set.
    - ``accuracy``: share of labelled pixels that are right (what the paper calls IoU).
    - ``legacy/miou``, ``legacy/accuracy``: the same for each image, averaged over the images with a labelled pixel.

    All are nan if nothing was labelled. Memory and time grow with the square of the number of classes.
    """

    def __init__(self, num_classes: int, device: torch.device | str) -> None:
        self.num_classes = num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)  # [label, prediction]
        self.legacy_sums = torch.zeros(2, dtype=torch.float64, device=device)  # mIoU, accuracy
        self.images = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, scores: Tensor, label: Tensor) -> None:
        """Add a batch: scores or logits (N, C, H, W) and label uint8 (N, H, W) with VOID where there is none."""
        n, bins = len(label), self.num_classes**2 + 1  # the last bin of each image takes its void pixels
        cell = torch.where(label == VOID, bins - 1, label.long() * self.num_classes + scores.argmax(1))
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
        """The state; its sum over parts of a set is the state of the set."""
        return [self.confusion, self.legacy_sums, self.images]

    def iou_per_class(self) -> list[float]:
        """IoU of each class; nan for a class that neither labels nor predictions contain."""
        return [float(iou) for iou in _class_iou(self.confusion).tolist()]

    def compute(self) -> dict[str, float]:
        legacy_miou, legacy_accuracy = (self.legacy_sums / self.images).tolist()
        return {
            "miou": _class_iou(self.confusion).nanmean().item(),
            "accuracy": _accuracy(self.confusion).item(),
            "legacy/miou": legacy_miou,
            "legacy/accuracy": legacy_accuracy,
        }


class DepthMetric:
    """Errors of depth over the pixels whose true depth is positive and finite.

    - ``depth_abs``, ``depth_rmse``: mean absolute and root mean squared error in the unit of depth.
    - ``depth_rel``: mean of absolute error / true depth, as a fraction.
    - ``depth_delta1``: share with max(p / g, g / p) < 1.25; a prediction that is not positive counts as wrong.
    - ``legacy/depth_abs``, ``legacy/depth_rel``: the mean of each batch, averaged over the batches with a valid
      pixel; they depend on how the set was cut into batches.

    All are nan if no pixel was valid.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # absolute, relative, squared error
        self.legacy_sums = torch.zeros(2, dtype=torch.float64, device=device)  # batch means of absolute, relative
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # pixels, pixels within delta, batches

    @torch.no_grad()
    def update(self, prediction: Tensor, depth: Tensor) -> None:
        """Add a batch: prediction and depth (N, 1, H, W)."""
        assert prediction.shape == depth.shape, (prediction.shape, depth.shape)
        valid = (depth > 0) & depth.isfinite()
        p = torch.where(valid, prediction.double(), 1.0)
        g = torch.where(valid, depth.double(), 1.0)
        error = (p - g).abs()
        close = valid & (p > 0) & (torch.maximum(p / g, g / p) < 1.25)
        sums = torch.stack([error.sum(), (error / g).sum(), error.square().sum()])
        pixels = valid.sum()
        self.sums += sums
        self.legacy_sums += sums[:2] / pixels.clamp(min=1)
        self.counts += torch.stack([pixels, close.sum(), (pixels > 0).long()])

    def tensors(self) -> list[Tensor]:
        """The state; its sum over parts of a set is the state of the set."""
        return [self.sums, self.legacy_sums, self.counts]

    def compute(self) -> dict[str, float]:
        pixels, close, batches = self.counts.double()
        absolute, relative, squared = (self.sums / pixels).tolist()
        legacy_absolute, legacy_relative = (self.legacy_sums / batches).tolist()
        return {
            "depth_abs": absolute,
            "depth_rel": relative,
            "depth_rmse": math.sqrt(squared),
            "depth_delta1": (close / pixels).item(),
            "legacy/depth_abs": legacy_absolute,
            "legacy/depth_rel": legacy_relative,
        }


def _class_iou(confusion: Tensor) -> Tensor:
    """IoU (..., C) from confusion (..., C, C), nan where the union is empty."""
    intersection = confusion.diagonal(dim1=-2, dim2=-1).double()
    return intersection / (confusion.sum(-1) + confusion.sum(-2) - intersection)


def _accuracy(confusion: Tensor) -> Tensor:
    """Pixel accuracy (...) from confusion (..., C, C), nan without pixels."""
    return confusion.diagonal(dim1=-2, dim2=-1).sum(-1).double() / confusion.sum((-2, -1))
