"""What a loader is, and which one a config names. A loader turns an order of samples into batches on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from mtunet_dist.config import DataConfig
from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.order import Order
from mtunet_dist.data.prepared import PreparedSplit
from mtunet_dist.multitask import Batch


class Loader(Protocol):
    """A source of batches for one rank."""

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start`` + 1, ... of the order.

        Raises InputError that names the shard and key of a sample that cannot be decoded.
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
