"""From the host to a device: copies that do not make the host wait, and memory of others that a stream still reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Event(Protocol):
    """As ``torch.cuda.Event``."""

    def record(self) -> None: ...
    def query(self) -> bool: ...


def send(x: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``, where it is not there yet.

    A copy to a GPU is asynchronous from pinned memory alone; from any other the host waits until the stream has come to
    it. Pinned memory is torch's, which gives it to nobody else before the copy is done.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Loans:
    """Keeps tensors of another library alive until the stream has executed everything that reads them.

    That library takes its memory back when the last reference goes, and does not know of work on torch's stream that is
    queued and not done.
    """

    def __init__(self, make_event: Callable[[], Event] = torch.cuda.Event) -> None:
        self._make_event = make_event
        self._kept: deque[tuple[Event, tuple[Tensor, ...]]] = deque()

    def __len__(self) -> int:
        """How many calls of ``keep`` still hold what they were given."""
        return len(self._kept)

    def keep(self, *tensors: Tensor) -> None:
        """Hold ``tensors`` until all is done that the current stream has been given by now; let go of earlier ones."""
        event = self._make_event()
        event.record()
        self._kept.append((event, tensors))
        while self._kept and self._kept[0][0].query():  # they become done in this order
            self._kept.popleft()
