"""The worker processes of ``prepare``."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool

from mtunet_dist.data.shard_builder import ShardResult, ShardTask, make_shard
from mtunet_dist.errors import LostProcessError
from mtunet_dist.system.workers import Pool

Outcome = tuple[ShardTask, ShardResult | list[str]]


def run(tasks: list[ShardTask], workers: int) -> Generator[Outcome, None, None]:
    """Yield tasks and the results of ``make_shard`` as they finish. With ``workers`` 0 this process does the work.

    Closing the generator waits for the running tasks and drops the others. LostProcessError if a worker was killed.
    """
    if workers == 0:
        for task in tasks:
            yield task, make_shard(task)
        return
    with Pool(min(workers, len(tasks) or 1)) as pool:
        try:
            futures = {pool.submit(make_shard, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            reason = "a worker process was killed, perhaps for its memory: use fewer workers or smaller shards"
            raise LostProcessError(f"{reason}; the same command goes on from here") from None
        finally:
            pool.shutdown(cancel_futures=True)
