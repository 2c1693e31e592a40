"""The interface of a loader, and the loader that a config names. A loader makes batches on the device from an order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from mtunet_dist.config import AugmentConfig, DataConfig
from mtunet_dist.core.step import Batch
from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.info import DatasetInfo
from mtunet_dist.data.order import Order
from mtunet_dist.data.splits import Split


class Loader(Protocol):
    """A source of batches for one rank."""

    @property
    def skipped(self) -> int:
        """How often an undecodable sample has taken a place in this rank's batches so far (data.on_error=skip)."""

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start`` + 1, ... of the order.

        A sample that cannot be decoded raises InputError that names its shard and key. With data.on_error=skip one
        UserWarning names it instead, and it adds nothing to any loss or metric (``broken.py``).
        """


def make_loader(
    config: DataConfig,
    split: Split,
    order: Order,
    device: torch.device,
    augmentation: Augmentation | None = None,
) -> Loader:
    """The loader that ``config`` names: over a cache, or ``dali``, or ``torch``, the slow and simple reference.

    With a cache all ranks must call it together. See ``CachedLoader`` for its errors.
    """
    common = (split, order, device, augmentation)
    threads, on_error = config.threads, config.on_error
    if config.cache != "none":
        from mtunet_dist.data.cached_loader import CachedLoader

        return CachedLoader(*common, on_device=config.cache == "device", threads=threads, on_error=on_error)
    if config.loader == "torch":
        from mtunet_dist.data.torch_loader import TorchLoader

        return TorchLoader(*common, workers=threads, prefetch=config.prefetch, on_error=on_error)
    from mtunet_dist.data.dali import DaliLoader

    return DaliLoader(*common, threads=threads, prefetch=config.prefetch, on_error=on_error, settings=config.dali)


def make_augmentation(config: AugmentConfig, info: DatasetInfo, seed: int) -> Augmentation | None:
    """The augmentation that ``config`` describes. None if it changes nothing."""
    augmentation = Augmentation(
        info.height,
        info.width,
        flip=config.flip,
        scales=config.scales,
        brightness=config.brightness,
        contrast=config.contrast,
        saturation=config.saturation,
        hue=config.hue,
        seed=seed,
    )
    return augmentation if augmentation.changes else None
