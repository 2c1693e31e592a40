"""The worker processes of ``prepare``. They end with their parent, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from mtunet_dist.data.shard_builder import ShardResult, ShardTask, make_shard
from mtunet_dist.errors import LostProcessError

Outcome = tuple[ShardTask, ShardResult | list[str]]


def run(tasks: list[ShardTask], workers: int) -> Generator[Outcome, None, None]:
    """Tasks with what ``make_shard`` returned, as they finish; ``workers`` 0 works in this process.

    Closing the generator waits for the tasks that run and drops the others. LostProcessError if a worker was killed.
    """
    if workers == 0:
        for task in tasks:
            yield task, make_shard(task)
        return
    context = multiprocessing.get_context("spawn")  # threads of the parent make fork unsafe
    with ProcessPoolExecutor(min(workers, len(tasks) or 1), context, initializer=_start_worker) as pool:
        try:
            futures = {pool.submit(make_shard, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            reason = "a worker process was killed, perhaps for its memory: use fewer workers or smaller shards"
            raise LostProcessError(f"{reason}; the same command goes on from here") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Initialise a worker process: Ctrl-C is the parent's to handle, and a killed parent takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
