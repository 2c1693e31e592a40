"""Samples that cannot be decoded, under ``data.on_error=skip``.

Such a sample keeps its place in the batch but adds nothing to any loss or metric. Its targets are blank. Its image is
that of the first good sample of the batch (black if there is none), so that batch norm sees normal values. The ranks
exchange no messages for this.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Literal

import numpy as np

from mtunet_dist.data.splits import Split
from mtunet_dist.errors import InputError

OnError = Literal["stop", "skip"]


class BrokenSamples:
    """The samples of a split found broken so far. ``skipped`` counts the places in batches that they took."""

    def __init__(self, on_error: OnError) -> None:
        self.on_error = on_error
        self.positions: set[int] = set()
        self.skipped = 0

    def add(self, position: int, reason: str, *, warn: bool = True) -> None:
        """Note a broken sample, with a warning the first time. Raises InputError if ``on_error`` is ``stop``."""
        if self.on_error == "stop":
            raise InputError(reason)
        if position not in self.positions and warn:
            warnings.warn(f"skipped: {reason}", stacklevel=2)
        self.positions.add(position)

    def search(self, split: Split, samples: np.ndarray) -> bool:
        """Decode ``samples`` one by one and ``add`` those that cannot be decoded. Returns whether any of them
        is new."""
        known = len(self.positions)
        for i in samples.tolist():
            if i not in self.positions:
                try:
                    split.decode(i)
                except InputError as error:
                    self.add(i, str(error))
        return len(self.positions) > known

    def count(self, samples: np.ndarray) -> None:
        """Count the broken samples in a batch that is handed out."""
        self.skipped += sum(i in self.positions for i in samples.tolist())


def stand_ins(samples: np.ndarray, broken: Collection[int]) -> np.ndarray:
    """int64 (N,): the sample whose image is shown for each of ``samples``. A batch without a good one keeps its own."""
    if not broken:
        return samples
    good = next((i for i in samples.tolist() if i not in broken), None)
    return np.array([i if i not in broken or good is None else good for i in samples.tolist()], dtype=np.int64)
