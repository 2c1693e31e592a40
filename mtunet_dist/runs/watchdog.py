"""Ends a training that makes no progress, instead of waiting for ever, and records the position of each rank."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from mtunet_dist import distributed
from mtunet_dist.system.command import HUNG

DUMP_S = 2.0  # time that a rank waits after its dump: the end of the first rank makes torchrun end the others


class Watchdog:
    """While entered, a process that does not call ``beat`` for ``limit_s`` seconds writes the stacks of all its threads
    to ``folder/rank_N.txt`` and ends with exit code ``HUNG``. With ``compiles`` there is no limit before the first
    ``beat`` and in the first ``evaluation``.

    If one rank hangs, all ranks soon wait for it, so that each writes its file. A suspended or lost rank writes none.
    torchrun then ends the remaining processes. With ``--max-restarts`` it starts them again; the file is then
    ``rank_N.before.txt``.
    """

    def __init__(self, folder: Path, limit_s: float, *, compiles: bool = False) -> None:
        self.limit_s = limit_s
        self._patient = self._first_evaluation = compiles
        self.rank = distributed.rank()
        self.file = folder / f"rank_{self.rank}.txt"
        self.beats = 0
        self._evaluating = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        with suppress(OSError):  # from an earlier hang; torchrun may have started this process because of it
            self.file.replace(self.file.with_suffix(".before.txt"))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def beat(self) -> None:
        """Record progress."""
        self.beats += 1
        self._patient = self._evaluating

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Context of an evaluation. With ``compiles`` the first evaluation has no limit: its graph, and that of its
        smaller last batch, must be compiled."""
        self._evaluating = self._patient = self._first_evaluation
        try:
            yield
        finally:
            self._evaluating = self._patient = self._first_evaluation = False

    def _watch(self) -> None:
        tick = min(1.0, self.limit_s / 4)
        seen, still = 0, 0.0
        # Count ticks instead of reading the clock: a suspended process makes no ticks, and suspension is not a hang.
        while not self._end.wait(tick):
            still += tick
            if self.beats != seen or self._patient:
                seen, still = self.beats, 0.0
            if still >= self.limit_s:
                self._give_up()

    def _give_up(self) -> None:
        print(
            f"error: rank {self.rank} has not moved for {self.limit_s:g} s (timeout_s); the stacks of its threads are "
            f"in {self.file}, those of other ranks beside it; a rank without such a file was itself stopped or lost",
            file=sys.stderr,
            flush=True,
        )
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("w") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            faulthandler.dump_traceback()
        time.sleep(DUMP_S)
        os._exit(HUNG)
