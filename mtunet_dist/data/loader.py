"""What a loader is, and which one a config names. A loader turns an order of samples into batches on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from mtunet_dist.config import DataConfig
from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.order import Order, Plan
from mtunet_dist.data.prepared import PreparedSplit
from mtunet_dist.errors import InputError, SampleError
from mtunet_dist.multitask import Batch


class Loader(Protocol):
    """A source of batches for one rank."""

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start`` + 1, ... of the order.

        Raises SampleError that names the shard and key of a sample that cannot be decoded.
        """


def make_loader(
    config: DataConfig,
    split: PreparedSplit,
    order: Order,
    device: torch.device,
    augmentation: Augmentation | None = None,
) -> Loader:
    """The loader that ``config.loader`` names: ``dali``, or ``torch``, the slow and simple reference."""
    if config.loader == "torch":
        from mtunet_dist.data.torch_loader import TorchLoader

        return TorchLoader(split, order, device, augmentation, workers=config.threads, prefetch=config.prefetch)
    from mtunet_dist.data.dali import DaliLoader

    return DaliLoader(split, order, device, augmentation, threads=config.threads, prefetch=config.prefetch)


def as_batch(image: Tensor, label: Tensor, depth: Tensor, depth_scale: Tensor, sample: Tensor) -> Batch:
    """A batch from decoded tensors: image (N, H, W, 3) and label (N, H, W, 1) uint8, depth (N, H, W, 1) stored
    units as float32, and what multiplies each sample's depth (N,)."""
    return {
        "image": image.permute(0, 3, 1, 2),
        "segmentation": label.squeeze(3),
        "depth": depth.permute(0, 3, 1, 2) * depth_scale.view(-1, 1, 1, 1),
        "sample": sample,
    }


def name_broken_sample(split: PreparedSplit, plan: Plan) -> None:
    """After a batch failed to decode: decode its samples one by one; SampleError names the first that cannot be."""
    for i in plan.samples:
        try:
            split.decode(int(i))
        except InputError as error:
            raise SampleError(str(error)) from None
