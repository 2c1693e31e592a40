"""Worker processes that leave Ctrl-C to their parent, and end with it, however it ends."""

from __future__ import annotations

import multiprocessing
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from mtunet_dist.children import end_with_parent
from mtunet_dist.terminal import deaf_children


class Pool(ProcessPoolExecutor):
    """Python's own, of ``workers`` processes. They are spawned, since threads of the parent make a fork unsafe."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, multiprocessing.get_context("spawn"), initializer=end_with_parent)

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """As in the base; it is here that processes are started."""
        with deaf_children(signal.SIGINT):
            return super().submit(*args, **kwargs)
