"""The reference loader: PIL and torch only, the same batches as DALI's, slower. For checks and odd machines."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.batch import Pixels, as_batch, depth_scales, draws_of
from mtunet_dist.data.broken import BrokenSamples, OnError, stand_ins
from mtunet_dist.data.order import Order, Plan
from mtunet_dist.data.sending import send
from mtunet_dist.data.splits import Split
from mtunet_dist.data.torch_augmentation import augmented
from mtunet_dist.errors import InputError
from mtunet_dist.multitask import Batch
from mtunet_dist.preemption import STOPPED_BY
from mtunet_dist.schema import VOID

Item = tuple[tuple[Tensor, ...], dict[int, str]]
"""The arguments of ``as_batch``, and why which samples could not be decoded."""


class TorchLoader:
    """Batches through ``torch.utils.data.DataLoader``; ``workers`` 0 decodes in this process."""

    def __init__(
        self,
        split: Split,
        order: Order,
        device: torch.device,
        augmentation: Augmentation | None = None,
        *,
        workers: int = 0,
        prefetch: int = 2,
        on_error: OnError = "stop",
    ) -> None:
        self.order, self.device = order, device
        self.decoded = _DecodedBatches(split, augmentation)
        self.workers, self.prefetch = workers, prefetch
        self.broken = BrokenSamples(on_error)

    @property
    def skipped(self) -> int:
        """See ``Loader.skipped``."""
        return self.broken.skipped

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start`` + 1, ... of the order; see ``Loader.batches``."""
        loader = DataLoader(
            self.decoded,
            batch_size=None,  # an item is a whole batch
            sampler=_plans(self.order, start),
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            worker_init_fn=_obey_only_the_parent,
            generator=torch.Generator(),  # else starting would draw from, and so change, the global one
            pin_memory=self.device.type == "cuda",
            # A forked child hangs once CUDA or DALI has threads in this process.
            multiprocessing_context="spawn" if self.workers else None,
        )
        with _deaf_children():
            items = iter(loader)
        for index, (tensors, broken) in zip(itertools.count(start), items):
            for position, reason in broken.items():
                self.broken.add(position, reason)
            if broken:
                self.broken.count(self.order.plan(index).samples)
            yield as_batch(*(send(x, self.device) for x in tensors))


class _DecodedBatches(Dataset[Item]):
    """Decoded and augmented batches by plan."""

    def __init__(self, split: Split, augmentation: Augmentation | None) -> None:
        self.split, self.augmentation = split, augmentation

    def __getitem__(self, plan: Plan) -> Item:
        n, height, width = len(plan.samples), self.split.info.height, self.split.info.width
        image = np.zeros((n, height, width, 3), dtype=np.uint8)
        label = np.full((n, height, width), VOID, dtype=np.uint8)
        depth = np.zeros((n, height, width), dtype=np.uint16)
        broken: dict[int, str] = {}
        for row, i in enumerate(plan.samples.tolist()):
            try:
                raw = self.split.decode(i)
            except InputError as error:
                broken[row] = str(error)
            else:
                image[row], label[row], depth[row] = raw.rgb, raw.label, raw.depth
        if broken:
            image = image[stand_ins(np.arange(n), broken)]
        draws = draws_of(plan, self.augmentation)
        pixels = Pixels(*map(torch.from_numpy, (image, label, depth.view(np.int16))))
        scales = torch.from_numpy(depth_scales(plan, draws, self.split.info.depth.scale))
        tensors = (*augmented(pixels, draws), scales, torch.from_numpy(plan.samples.copy()))
        return tensors, {int(plan.samples[row]): reason for row, reason in broken.items()}


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started inside do not act upon a request to stop: Slurm sends it to every process of a job."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPED_BY)  # children inherit it
    resource_tracker.ensure_running()  # it comes with the first child, and unblocks SIGTERM here
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPED_BY)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_only_the_parent(worker: int) -> None:
    """In a process that was started deaf: SIGTERM of the parent ends it, as Python expects of its children."""

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _plans(order: Order, start: int) -> Iterator[Plan]:
    index = start
    while order.batches is None or index < order.batches:
        yield order.plan(index)
        index += 1
