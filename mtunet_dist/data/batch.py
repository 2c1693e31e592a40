"""The common part of the loaders: decoded samples, and how to make a batch of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtunet_dist.core.step import Batch
from mtunet_dist.data.augmentation import Augmentation, Draw
from mtunet_dist.data.order import Plan
from mtunet_dist.tasks._task import Task


class Pixels(NamedTuple):
    """Decoded samples: image uint8 (N, H, W, 3), and each target as stored, (N, H, W) or (N, H, W, planes).

    uint16 is held as int16 with the same bits, which torch can index on every device.
    """

    image: Tensor
    targets: dict[str, Tensor]


def draws_of(plan: Plan, augmentation: Augmentation | None) -> list[Draw]:
    """The augmentation of each sample of ``plan``; empty without one."""
    return [augmentation.draw(plan.epoch, int(i)) for i in plan.samples] if augmentation is not None else []


def factors_of(tasks: Mapping[str, Task], draws: Sequence[Draw], count: int) -> dict[str, np.ndarray]:
    """For each task whose stored numbers are multiplied: float32 (count, planes)."""
    found = {name: task.factors(draws, count) for name, task in tasks.items()}
    return {name: factors for name, factors in found.items() if factors is not None}


def blank_batch(tasks: Sequence[Task], size: int, device: torch.device) -> Batch:
    """A black image of ``size`` x ``size`` without a valid pixel, for a pass that only goes through the network."""
    stored = {task.name: as_stored(task.blank(size, size)[None]) for task in tasks}
    targets = {task.name: as_numbers(stored[task.name], task) for task in tasks}
    factors = factors_of({task.name: task for task in tasks}, (), 1)
    image = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    numbers = {name: torch.from_numpy(x) for name, x in factors.items()}
    batch = as_batch(image, targets, numbers, torch.zeros(1, dtype=torch.int64))
    return {name: x.to(device) for name, x in batch.items()}


def as_stored(array: np.ndarray) -> Tensor:
    """A stored target as a tensor. uint16 becomes int16 with the same bits."""
    return torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)


def as_numbers(stored: Tensor, task: Task) -> Tensor:
    """A stored target for arithmetic: float32, or unchanged if nothing is multiplied."""
    if not task.multiplied:
        return stored
    return (stored.view(torch.uint16) if task.DTYPE is np.uint16 else stored).float()


def as_batch(image: Tensor, targets: Mapping[str, Tensor], factors: Mapping[str, Tensor], sample: Tensor) -> Batch:
    """A batch from augmented tensors: image uint8 (N, H, W, 3), targets (N, H, W) or (N, H, W, planes), the factors
    (N, planes) of those that are multiplied, and the samples' positions int64 (N,)."""
    batch = {"image": image.permute(0, 3, 1, 2), "sample": sample}
    for name, target in targets.items():
        if name in factors:
            n, height, width = target.shape[:3]
            target = target.reshape(n, height, width, -1) * factors[name].view(n, 1, 1, -1)
            target = target.permute(0, 3, 1, 2)
        batch[name] = target
    return batch
