"""Stop on request. The process notes the signal; all ranks agree at a step boundary, write a checkpoint and exit.

Schedulers send SIGTERM, or a signal that the job chose, before a preemption or a time limit. Ctrl-C in a terminal sends
SIGINT. The second SIGINT ends the process at once, at any point, without a traceback.
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
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides the cursor


class StopRequest:
    """While entered, the ``signals`` only set ``received``. The first SIGINT also prints ``on_interrupt``, and the
    second ends the process. Outside the main thread nothing changes, because Python allows no handlers there (a Ray
    worker has its own). An ignored SIGINT, as in background commands of a script, stays ignored."""

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
