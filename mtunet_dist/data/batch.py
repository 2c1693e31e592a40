"""The common part of the loaders: decoded samples, and how to make a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mtunet_dist.core.step import Batch
from mtunet_dist.data.augmentation import Augmentation, Draw
from mtunet_dist.data.order import Plan


class Pixels(NamedTuple):
    """Decoded samples: image uint8 (N, H, W, 3), label uint8 (N, H, W), depth (N, H, W) in stored units.

    Depth holds the bits of uint16 as int16, which torch can index on every device.
    """

    image: Tensor
    label: Tensor
    depth: Tensor


def draws_of(plan: Plan, augmentation: Augmentation | None) -> list[Draw]:
    """The augmentation of each sample of ``plan``; empty without one."""
    return [augmentation.draw(plan.epoch, int(i)) for i in plan.samples] if augmentation is not None else []


def depth_scales(plan: Plan, draws: Sequence[Draw], scale: float) -> np.ndarray:
    """float32 (N,): the factor from the stored depth of each sample to the dataset's unit, after its zoom."""
    factors = [draw.depth_factor for draw in draws] or [1.0] * len(plan.samples)
    return np.array([scale * factor for factor in factors], dtype=np.float32)


def as_batch(image: Tensor, label: Tensor, depth: Tensor, depth_scale: Tensor, sample: Tensor) -> Batch:
    """A batch from augmented tensors: image (N, H, W, 3) and label (N, H, W) uint8, depth (N, H, W) in stored units as
    float32, the depth factor of each sample (N,), and the samples' positions int64 (N,)."""
    return {
        "image": image.permute(0, 3, 1, 2),
        "segmentation": label,
        "depth": (depth * depth_scale.view(-1, 1, 1)).unsqueeze(1),
        "sample": sample,
    }
