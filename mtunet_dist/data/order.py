"""Which samples make up which batch: pure functions of (seed, epoch, rank, world size), without any reader state.

An order maps a running batch number to a ``Plan``. Training orders never end. Evaluation orders visit every sample
exactly once over all ranks, without padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mtunet_dist.errors import InputError


@dataclass(frozen=True)
class Plan:
    """One batch of one rank: the epoch it belongs to and the positions of its samples in the split."""

    epoch: int
    samples: np.ndarray  # int64 (n,)


class Order(Protocol):
    """A sequence of plans for one rank."""

    @property
    def batches(self) -> int | None:
        """The number of plans; None = endless."""

    def plan(self, index: int) -> Plan:
        """Batch number ``index`` of this rank."""


class TrainOrder:
    """Endless training batches: every epoch a new permutation of ``count`` samples, cut into global batches.

    A global batch of ``batch_size`` samples is one optimiser step. It is dealt to ``accumulate`` micro-batches of
    ``world_size`` ranks, so that the same samples enter step ``i`` for any number of processes. Samples that do not
    fill a last global batch are left out of that epoch. Raises InputError when the sizes do not divide.
    """

    batches = None

    def __init__(
        self, count: int, *, batch_size: int, accumulate: int = 1, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        parts = world_size * accumulate
        if batch_size % parts:
            raise InputError(
                f"batch_size={batch_size} cannot be divided among {world_size} processes x "
                f"{accumulate} micro-batches (optim.accumulate); use a multiple of {parts}"
            )
        if count < batch_size:
            raise InputError(f"the training set has {count} samples, fewer than batch_size={batch_size}")
        self.count = count
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.seed = seed
        self.micro_size = batch_size // parts
        self.steps_per_epoch = count // batch_size
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def plan(self, index: int) -> Plan:
        """Micro-batch number ``index`` since the start of training."""
        step, micro = divmod(index, self.accumulate)
        epoch, step = divmod(step, self.steps_per_epoch)
        start = step * self.batch_size + (self.rank * self.accumulate + micro) * self.micro_size
        return Plan(epoch, self._shuffled(epoch)[start : start + self.micro_size])

    def _shuffled(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, shuffled(self.count, self.seed, epoch)
        return self._permutation


class EvalOrder:
    """Every sample once, in the order of the split; batch ``j`` belongs to rank ``j % world_size``.

    The batches are the same for any number of ranks, so metrics that average over batches are too. A rank may get
    one batch fewer than another, or none; the last batch may be short.
    """

    def __init__(self, count: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.count = count
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.batches: int | None = len(range(rank, math.ceil(count / batch_size), world_size))

    def plan(self, index: int) -> Plan:
        """Batch number ``index`` of this rank."""
        start = (self.rank + index * self.world_size) * self.batch_size
        return Plan(0, np.arange(start, min(start + self.batch_size, self.count), dtype=np.int64))


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of ``count`` samples in ``epoch``."""
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)
