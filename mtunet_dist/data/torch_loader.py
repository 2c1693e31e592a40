"""The reference loader: PIL and torch only. Its batches equal DALI's, but it is slower. For checks and unusual
machines."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mtunet_dist.core.step import Batch
from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.batch import Pixels, as_batch, as_stored, draws_of, factors_of
from mtunet_dist.data.broken import BrokenSamples, OnError, stand_ins
from mtunet_dist.data.order import Order, Plan
from mtunet_dist.data.sending import send
from mtunet_dist.data.splits import Split
from mtunet_dist.data.torch_augmentation import augmented
from mtunet_dist.errors import InputError, LostProcessError
from mtunet_dist.system.preemption import STOPPED_BY


@dataclass(frozen=True)
class Item:
    """The arguments of ``as_batch``, and the reason for each sample that could not be decoded.

    ``parts`` has image, sample, target/TASK and factors/TASK.
    """

    parts: dict[str, Tensor] | dict[str, np.ndarray]
    broken: dict[int, str]

    def tensors(self) -> dict[str, Tensor]:
        """The parts as tensors."""
        return {name: torch.as_tensor(x) for name, x in self.parts.items()}

    def batch(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        sent = {name: send(x, device) for name, x in self.tensors().items()}
        targets, factors = (
            {name.removeprefix(kind): x for name, x in sent.items() if name.startswith(kind)}
            for kind in ("target/", "factors/")
        )
        return as_batch(sent["image"], targets, factors, sent["sample"])

    def to_send(self) -> Item:
        """Prepare the parts for another process: in /dev/shm, or for a pipe if that has no room, as in many containers.

        Without this, the queue loses a tensor that finds no room, and the receiver waits for ever.
        """
        try:
            return Item({name: x.share_memory_() for name, x in self.tensors().items()}, self.broken)
        except RuntimeError:
            return Item({name: x.numpy() for name, x in self.tensors().items()}, self.broken)

    def pin_memory(self) -> Item:
        """The ``DataLoader`` calls this for a GPU, so that copies to it are asynchronous."""
        return Item({name: x.pin_memory() for name, x in self.tensors().items()}, self.broken)


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
            generator=torch.Generator(),  # otherwise a start would change the global generator
            pin_memory=self.device.type == "cuda",
            # A forked child hangs once CUDA or DALI has threads in this process.
            multiprocessing_context="spawn" if self.workers else None,
        )
        with _lost_workers(), _deaf_children():
            items = iter(loader)
        for index in itertools.count(start):
            with _lost_workers():
                item = next(items, None)
            if item is None:
                return
            for position, why in item.broken.items():
                self.broken.add(position, why)
            if item.broken:
                self.broken.count(self.order.plan(index).samples)
            yield item.batch(self.device)


@contextmanager
def _lost_workers() -> Iterator[None]:
    """Inside, the end of a worker process is a LostProcessError. torch's signal handler may raise it anywhere."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        killed = "a worker process of data.loader=torch was killed, perhaps for its memory: use fewer data.threads"
        again = f"({' '.join(str(error).split())}); the same command goes on from the newest checkpoint"
        raise LostProcessError(f"{killed} {again}") from None


class _DecodedBatches(Dataset[Item]):
    """Decoded and augmented batches by plan."""

    def __init__(self, split: Split, augmentation: Augmentation | None) -> None:
        self.split, self.augmentation = split, augmentation

    def __getitem__(self, plan: Plan) -> Item:
        n, height, width = len(plan.samples), self.split.info.height, self.split.info.width
        tasks = self.split.targets
        image = np.zeros((n, height, width, 3), dtype=np.uint8)
        targets = {name: np.stack([task.blank(height, width)] * n) for name, task in tasks.items()}
        broken: dict[int, str] = {}
        for row, i in enumerate(plan.samples.tolist()):
            try:
                raw = self.split.decode(i)
            except InputError as error:
                broken[row] = str(error)
            else:
                image[row] = raw.rgb
                for name, target in targets.items():
                    target[row] = raw.targets[name]
        if broken:
            image = image[stand_ins(np.arange(n), broken)]
        draws = draws_of(plan, self.augmentation)
        pixels = Pixels(torch.from_numpy(image), {name: as_stored(target) for name, target in targets.items()})
        changed, numbers = augmented(pixels, tasks, draws)
        parts = {"image": changed, "sample": torch.from_numpy(plan.samples.copy())}
        parts |= {f"target/{name}": target for name, target in numbers.items()}
        parts |= {f"factors/{name}": torch.from_numpy(x) for name, x in factors_of(tasks, draws, n).items()}
        item = Item(parts, {int(plan.samples[row]): reason for row, reason in broken.items()})
        return item.to_send() if get_worker_info() else item


@contextmanager
def _deaf_children() -> Iterator[None]:
    """While entered, new processes ignore requests to stop: Slurm sends them to every process of a job.

    This process also ignores the SIGCHLD when such a process ends, which could come at any point. ``next`` notices the
    end within seconds.
    """
    main = threading.current_thread() is threading.main_thread()
    at_end_of_child = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPED_BY)  # children inherit it
    resource_tracker.ensure_running()  # its process starts with the first child, and unblocks SIGTERM here
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPED_BY)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main and at_end_of_child is not None:
            signal.signal(signal.SIGCHLD, at_end_of_child)


def _obey_only_the_parent(worker: int) -> None:
    """Runs in a process that blocks signals. SIGTERM from the parent ends it, as Python expects of child processes."""

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
