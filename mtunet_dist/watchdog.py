"""A training that no longer moves ends, and says where each rank stood, instead of waiting for ever."""

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
from mtunet_dist.errors import HUNG

DUMP_S = 2.0  # that a rank waits after its dump: the end of the first makes torchrun end the others


class Watchdog:
    """While entered, a process that does not call ``beat`` for ``limit_s`` seconds writes the stacks of all its threads
    to ``folder/rank_N.txt`` and ends with exit code ``HUNG``. With ``compiles`` it may take any time to the first, and
    in the first ``evaluation``.

    Where one rank hangs, all soon wait for it, so all write theirs; one that is stopped or gone writes none. torchrun
    then ends what is left, and starts anew if it was given ``--max-restarts``; the file is then ``rank_N.before.txt``.
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
        with suppress(OSError):  # of a hang before; torchrun may have started this process because of it
            self.file.replace(self.file.with_suffix(".before.txt"))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def beat(self) -> None:
        """The process has moved on."""
        self.beats += 1
        self._patient = self._evaluating

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """What is done inside is compiled for itself, as are its last and smaller batches."""
        self._evaluating = self._patient = self._first_evaluation
        try:
            yield
        finally:
            self._evaluating = self._patient = self._first_evaluation = False

    def _watch(self) -> None:
        tick = min(1.0, self.limit_s / 4)
        seen, still = 0, 0.0
        # Ticks are counted, not the clock: while the process is suspended, which is no fault of its, there are none.
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
