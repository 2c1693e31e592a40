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
from mtunet_dist.data.batch import Pixels, as_batch, depth_scales, draws_of
from mtunet_dist.data.broken import BrokenSamples, OnError, stand_ins
from mtunet_dist.data.order import Order, Plan
from mtunet_dist.data.sending import send
from mtunet_dist.data.shared_cache import digest, node_copy
from mtunet_dist.data.splits import Split
from mtunet_dist.data.torch_augmentation import augmented
from mtunet_dist.errors import InputError
from mtunet_dist.schema import VOID

PACKAGE = Path(__file__).parent.parent
BYTES_PER_PIXEL = 6  # RGB, label, depth


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
            self.stored = Pixels(*(x.to(device) for x in self.stored))

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
        pixels = Pixels(*(self._take(x, i) for x, i in zip(self.stored, (shown, samples, samples), strict=True)))
        scales = depth_scales(plan, draws, self.split.info.depth.scale)
        return as_batch(*augmented(pixels, draws), send(scales, self.device), send(samples, self.device))

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
            image, label, depth = _arrays(split, data)
            return Pixels(*map(torch.from_numpy, (image, label, depth.view(np.int16))))


def _decode(split: Split, data: np.ndarray, i: int) -> str | None:
    """Put sample ``i`` into ``data``, uint8 (bytes,) of zeros. Returns the reason if it cannot be decoded."""
    stored = _arrays(split, data)
    try:
        raw = split.decode(i)
    except InputError as error:
        stored[1][i] = VOID  # image and depth stay 0
        return str(error)
    for array, pixels in zip(stored, (raw.rgb, raw.label, raw.depth), strict=True):
        array[i] = pixels
    return None


def _arrays(split: Split, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views of ``data``: image uint8 (N, H, W, 3), label uint8 (N, H, W), depth uint16 (N, H, W)."""
    shape = (len(split), split.info.height, split.info.width)
    # Depth first, so that its 2-byte numbers are aligned.
    depth, label, image = np.split(data, [2 * int(np.prod(shape)), 3 * int(np.prod(shape))])
    return image.reshape(*shape, 3), label.reshape(shape), depth.view(np.uint16).reshape(shape)


def _content(split: Split) -> str:
    """A key that is equal if decoding gives equal pixels: the same unchanged files, decoded by the same code."""
    files = [(split.root / shard.file).stat() for shard in split.shards]
    code = [path.read_text() for folder in ("data", "sources") for path in sorted((PACKAGE / folder).glob("*.py"))]
    which = [[file.st_dev, file.st_ino, file.st_mtime_ns] for file in files]
    return digest(split.fingerprint, split.version, which, sys.prefix, PIL.__version__, code)


def _bytes(split: Split) -> int:
    return len(split) * split.info.height * split.info.width * BYTES_PER_PIXEL


def _device_shortage(what: str, needed: int, device: torch.device) -> str | None:
    """The reason why ``needed`` bytes cannot be kept on ``device``, or None."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return node_memory.shortage(what, needed, free, "device memory")
