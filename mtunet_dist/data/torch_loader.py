"""The reference loader: PIL and torch only, the same batches as DALI's, slower. For checks and odd machines."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mtunet_dist.data.augmentation import Augmentation, Draw
from mtunet_dist.data.batch import as_batch, name_broken_sample
from mtunet_dist.data.order import Order
from mtunet_dist.data.prepared import PreparedSplit
from mtunet_dist.errors import InputError
from mtunet_dist.multitask import Batch

Item = tuple[Tensor, Tensor, Tensor, float, int]


class TorchLoader:
    """Batches through ``torch.utils.data.DataLoader``; ``workers`` 0 decodes in this process."""

    def __init__(
        self,
        split: PreparedSplit,
        order: Order,
        device: torch.device,
        augmentation: Augmentation | None = None,
        *,
        workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        self.order, self.device = order, device
        self.samples = _Samples(split, augmentation)
        self.workers, self.prefetch = workers, prefetch

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start`` + 1, ... of the order; see ``Loader.batches``."""
        loader = DataLoader(
            self.samples,
            batch_sampler=_planned(self.order, start),
            collate_fn=_collate,
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            generator=torch.Generator(),  # else starting would draw from, and so change, the global one
            pin_memory=self.device.type == "cuda",
            # A forked child hangs once CUDA or DALI has threads in this process.
            multiprocessing_context="spawn" if self.workers else None,
        )
        iterator = iter(loader)
        for index in itertools.count(start):
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except InputError:
                name_broken_sample(self.samples.split, self.order.plan(index))
                raise
            yield as_batch(*(x.to(self.device, non_blocking=True) for x in batch))


class _Samples(Dataset[Item]):
    """Decoded and augmented samples by (epoch, position)."""

    def __init__(self, split: PreparedSplit, augmentation: Augmentation | None) -> None:
        self.split, self.augmentation = split, augmentation

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, i = key
        raw = self.split.decode(i)
        image = torch.from_numpy(np.array(raw.rgb))
        label = torch.from_numpy(np.array(raw.label)).unsqueeze(2)
        depth = torch.from_numpy(raw.depth.astype(np.float32)).unsqueeze(2)
        scale = self.split.info.depth.scale
        if self.augmentation is not None:
            draw = self.augmentation.draw(epoch, i)
            image, label, depth = _augmented(image, label, depth, draw)
            scale *= draw.depth_factor
        return image, label, depth, scale, i


def _augmented(image: Tensor, label: Tensor, depth: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    size = (image.shape[0], image.shape[1])
    if (draw.height, draw.width) != size:
        image = _resized(_window(image, draw), size, "bilinear").round().clamp(0, 255)
        label = _resized(_window(label, draw), size, "nearest-exact")
        depth = _resized(_window(depth, draw), size, "nearest-exact")
    if draw.flip:
        image, label, depth = image.flip(1), label.flip(1), depth.flip(1)
    return image.to(torch.uint8), label.to(torch.uint8), depth


def _window(x: Tensor, draw: Draw) -> Tensor:
    return x[draw.top : draw.top + draw.height, draw.left : draw.left + draw.width]


def _resized(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize (H, W, C) to ``size``, as float32."""
    return F.interpolate(x.permute(2, 0, 1)[None].float(), size=size, mode=mode)[0].permute(1, 2, 0)


def _planned(order: Order, start: int) -> Iterator[list[tuple[int, int]]]:
    index = start
    while order.batches is None or index < order.batches:
        plan = order.plan(index)
        yield [(plan.epoch, int(i)) for i in plan.samples]
        index += 1


def _collate(items: list[Item]) -> tuple[Tensor, ...]:
    images, labels, depths, scales, samples = zip(*items, strict=True)
    return (
        torch.stack(images),
        torch.stack(labels),
        torch.stack(depths),
        torch.tensor(scales, dtype=torch.float32),
        torch.tensor(samples, dtype=torch.int64),
    )
