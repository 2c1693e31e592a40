"""A split that is decoded once and kept in memory. Batches are taken and augmented from there, on the device."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from mtunet_dist import distributed
from mtunet_dist.core.step import Batch
from mtunet_dist.data import node_memory
from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.batch import Pixels, as_batch, as_stored, draws_of, factors_of
from mtunet_dist.data.broken import BrokenSamples, OnError, stand_ins
from mtunet_dist.data.order import Order, Plan
from mtunet_dist.data.sending import send
from mtunet_dist.data.shared_cache import digest, node_copy
from mtunet_dist.data.splits import Split
from mtunet_dist.data.torch_augmentation import augmented
from mtunet_dist.errors import InputError

PACKAGE = Path(__file__).parent.parent
RGB_BYTES = 3


class CachedLoader:
    """Batches from pixels in host memory, one copy per node, or with ``on_device`` on the device of each rank.

    All ranks construct it together. Each rank decodes its share of the split with ``threads`` threads. The user's other
    trainings with the same data use the same copy in host memory (``shared_cache.py``). If one of them already has it,
    nothing is decoded. Raises InputError on all ranks if the split does not fit (the message says how many bytes are
    needed and free), and for a sample that cannot be decoded, unless ``on_error`` is ``skip``. On a CPU both places are
    the same.
    """

    def __init__(
        self,
        split: Split,
        order: Order,
        device: torch.device,
        augmentation: Augmentation | None = None,
        *,
        on_device: bool = False,
        threads: int = 2,
        on_error: OnError = "stop",
    ) -> None:
        self.split, self.order, self.device, self.augmentation = split, order, device, augmentation
        self.broken = BrokenSamples(on_error)
        place = "device" if on_device else "host"
        what = f"data.cache={place} for {len(split)} samples of the split '{'+'.join(split.names)}'"
        if on_device:
            node_memory.raise_any(_device_shortage(what, _bytes(split), device))
        self.stored = self._load(what, threads, shared=not on_device or device.type == "cpu")
        if on_device:
            moved = {name: x.to(device) for name, x in self.stored.targets.items()}
            self.stored = Pixels(self.stored.image.to(device), moved)

    @property
    def skipped(self) -> int:
        """See ``Loader.skipped``."""
        return self.broken.skipped

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start`` + 1, ... of the order; see ``Loader.batches``."""
        index = start
        while self.order.batches is None or index < self.order.batches:
            yield self._batch(self.order.plan(index))
            index += 1

    def _batch(self, plan: Plan) -> Batch:
        self.broken.count(plan.samples)
        draws = draws_of(plan, self.augmentation)
        shown = torch.from_numpy(stand_ins(plan.samples, self.broken.positions))
        samples = torch.from_numpy(plan.samples)
        taken = {name: self._take(x, samples) for name, x in self.stored.targets.items()}
        pixels, tasks = Pixels(self._take(self.stored.image, shown), taken), self.split.targets
        factors = {name: send(x, self.device) for name, x in factors_of(tasks, draws, len(samples)).items()}
        return as_batch(*augmented(pixels, tasks, draws), factors, send(samples, self.device))

    def _take(self, stored: Tensor, index: Tensor) -> Tensor:
        """Copy the entries ``index`` to the device. It uses pinned memory if this makes the copy asynchronous."""
        if stored.device.type == self.device.type:
            return stored.index_select(0, send(index, self.device))
        pinned = torch.empty((len(index), *stored.shape[1:]), dtype=stored.dtype, pin_memory=True)
        return send(torch.index_select(stored, 0, index, out=pinned), self.device)

    def _load(self, what: str, threads: int, *, shared: bool) -> Pixels:
        """The whole split in the memory that the node shares. It is decoded if no other training has it."""
        split = self.split
        positions, decode = range(len(split)), partial(_decode, split)
        key = _content(split) if shared else None
        data, broken = node_copy(_bytes(split), positions, decode, key=key, threads=threads, what=what)
        for position, reason in broken.items():
            self.broken.add(position, reason, warn=distributed.is_main())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # no code writes to it
            image, targets = _arrays(split, data)
            return Pixels(torch.from_numpy(image), {name: as_stored(target) for name, target in targets.items()})


def _decode(split: Split, data: np.ndarray, i: int) -> str | None:
    """Put sample ``i`` into ``data``, uint8 (bytes,) of zeros. Returns the reason if it cannot be decoded."""
    image, targets = _arrays(split, data)
    try:
        raw = split.decode(i)
    except InputError as error:
        for name, task in split.targets.items():
            targets[name][i] = task.blank(split.info.height, split.info.width)
        return str(error)
    image[i] = raw.rgb
    for name, target in targets.items():
        target[i] = raw.targets[name]
    return None


def _arrays(split: Split, data: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Views of ``data``: image uint8 (N, H, W, 3), and each target as stored, (N, H, W) or (N, H, W, planes)."""
    n, height, width = len(split), split.info.height, split.info.width
    targets, start = {}, 0
    # The widest numbers first, so that they are aligned.
    for name, task in sorted(split.targets.items(), key=lambda item: -np.dtype(item[1].DTYPE).itemsize):
        shape = (n, *task.shape(height, width))
        end = start + int(np.prod(shape)) * np.dtype(task.DTYPE).itemsize
        targets[name] = data[start:end].view(task.DTYPE).reshape(shape)
        start = end
    return data[start:].reshape(n, height, width, RGB_BYTES), {name: targets[name] for name in split.targets}


def _content(split: Split) -> str:
    """A key that is equal if decoding gives equal pixels: the same unchanged files, decoded by the same code."""
    files = [(split.root / shard.file).stat() for shard in split.shards]
    code = [
        path.read_text() for folder in ("data", "sources", "tasks") for path in sorted((PACKAGE / folder).glob("*.py"))
    ]
    which = [[file.st_dev, file.st_ino, file.st_mtime_ns] for file in files]
    return digest(split.fingerprint, split.version, which, sys.prefix, PIL.__version__, code)


def _bytes(split: Split) -> int:
    per_pixel = RGB_BYTES + sum(task.PLANES * np.dtype(task.DTYPE).itemsize for task in split.targets.values())
    return len(split) * split.info.height * split.info.width * per_pixel


def _device_shortage(what: str, needed: int, device: torch.device) -> str | None:
    """The reason why ``needed`` bytes cannot be kept on ``device``, or None."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return node_memory.shortage(what, needed, free, "device memory")
