"""Ending on request: a signal is noted, all ranks agree at a step boundary, write a checkpoint and leave.

Schedulers announce preemption and time limits by SIGTERM, or by the signal that a job asked for. A terminal's Ctrl-C is
SIGINT; the second ends a process at once, without a traceback, wherever it is.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPPED_BY = (*SIGNALS, signal.SIGINT)
SHOW_CURSOR = "\x1b[?25h"  # which a progress bar hides


class StopRequest:
    """While entered, the ``signals`` only set ``received``; at the first SIGINT ``on_interrupt`` is said, and the next
    ends the process. Outside the main thread, where Python allows no handlers (a Ray worker has its own), nothing
    changes, and where SIGINT is ignored, as of a script's commands in the background, it still is."""

    def __init__(self, signals: Sequence[signal.Signals] = STOPPED_BY, on_interrupt: str = "") -> None:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        self.signals = [number for number in signals if number != signal.SIGINT or not ignored]
        self.on_interrupt = on_interrupt
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            _heed_once(self.on_interrupt)


def _heed_once(say: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with suppress(OSError):
        os.write(2, (SHOW_CURSOR if os.isatty(2) else "").encode() + (f"\n{say}\n" if say else "").encode())
