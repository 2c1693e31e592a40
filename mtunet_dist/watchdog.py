"""A training that no longer moves ends, and says where each rank stood, instead of waiting for ever."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from mtunet_dist import distributed
from mtunet_dist.errors import HUNG

DUMP_S = 2.0  # that a rank waits after its dump: the end of the first makes torchrun end the others


class Watchdog:
    """While entered, a process that does not call ``beat`` for ``limit_s`` seconds writes the stacks of all its threads
    to ``folder/rank_N.txt`` and ends with exit code ``HUNG``.

    Where one rank hangs, all soon wait for it, so all write theirs; one that is stopped or gone writes none. torchrun
    then ends what is left, and starts anew if it was given ``--max-restarts``.
    """

    def __init__(self, folder: Path, limit_s: float) -> None:
        self.folder, self.limit_s = folder, limit_s
        self.rank = distributed.rank()
        self.last_beat = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def beat(self) -> None:
        """The process has moved on."""
        self.last_beat = time.monotonic()

    def _watch(self) -> None:
        while not self._end.wait(self.last_beat + self.limit_s - time.monotonic()):
            # A process that was itself stopped (SIGSTOP, a suspended machine) gets the time to move again.
            seen, woken = self.last_beat, time.monotonic()
            if woken - seen < self.limit_s or self._end.wait(min(1.0, self.limit_s)) or self.last_beat != seen:
                continue
            self._give_up()

    def _give_up(self) -> None:
        path = self.folder / f"rank_{self.rank}.txt"
        print(
            f"error: rank {self.rank} has not moved for {self.limit_s:g} s (timeout_s); where its threads are is in "
            f"{path}, and so for the other ranks. One without such a file was stopped or lost",
            file=sys.stderr,
            flush=True,
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            faulthandler.dump_traceback()
        time.sleep(DUMP_S)
        os._exit(HUNG)
