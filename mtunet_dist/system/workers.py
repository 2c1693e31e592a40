"""Worker processes that leave Ctrl-C to their parent process, and end when it ends, in any way."""

from __future__ import annotations

import multiprocessing
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from mtunet_dist.system.children import end_with_parent
from mtunet_dist.system.terminal import deaf_children


class Pool(ProcessPoolExecutor):
    """Python's process pool with ``workers`` processes. They are spawned, because a fork is unsafe if the parent has
    threads."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, multiprocessing.get_context("spawn"), initializer=end_with_parent)

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """As in the base class, which starts its processes in this method."""
        with deaf_children(signal.SIGINT):
            return super().submit(*args, **kwargs)
