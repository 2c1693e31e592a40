"""From the host to a device: copies without a wait of the host, and borrowed memory that a stream still reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Event(Protocol):
    """Has the methods of ``torch.cuda.Event``."""

    def record(self) -> None: ...
    def query(self) -> bool: ...


def send(x: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``. It is copied only if it is not there yet.

    A copy to a GPU is asynchronous only from pinned memory. From other memory, the host waits until the stream has
    reached the copy. torch owns the pinned memory and reuses it only after the copy is done.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Loans:
    """Keeps tensors of another library alive until the stream has executed everything that reads them.

    That library reuses the memory of a tensor when the last reference is dropped. It does not know of work that is
    queued on torch's stream and not done.
    """

    def __init__(self, make_event: Callable[[], Event] = torch.cuda.Event) -> None:
        self._make_event = make_event
        self._kept: deque[tuple[Event, tuple[Tensor, ...]]] = deque()

    def __len__(self) -> int:
        """The number of ``keep`` calls whose tensors are still held."""
        return len(self._kept)

    def keep(self, *tensors: Tensor) -> None:
        """Hold ``tensors`` until the current stream has executed all work queued so far. Release earlier tensors that
        are done."""
        event = self._make_event()
        event.record()
        self._kept.append((event, tensors))
        while self._kept and self._kept[0][0].query():  # they complete in this order
            self._kept.popleft()
