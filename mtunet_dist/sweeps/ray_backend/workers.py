"""A trial of several processes: in Tune the same as ``torchrun -m mtunet_dist.train``, with the same result.

Each process is an actor in a bundle of the trial's own placement group, so that all of them end with the trial, however
it ends, and what they held is free again. The trial itself only waits, as torchrun's agent does. Ray Train is not used:
it reserves a second placement group, which outlives a trial that Tune stops, and the next trial then waits for ever.

Import tuner.py first: it sets what Ray reads when it is imported.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import tune
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mtunet_dist.config import Config
from mtunet_dist.errors import InputError, MTUNetError
from mtunet_dist.sweeps.folder import wait_for_folder
from mtunet_dist.system.command import PATIENCE_S
from mtunet_dist.train import OnEval, train

LOST = (RayActorError, OutOfMemoryError)  # raised when a process is gone; the second if Ray ended it


class WorkerLostError(RuntimeError):
    """A process of the trial ended by itself: killed, out of memory, lost with its node, or hung."""


def resources(workers: int, cpus: int, gpus: float) -> Any:
    """The resources of Tune for a trial of ``workers`` processes with ``cpus`` and ``gpus`` each, on one or more nodes.

    Raises InputError for a share of a GPU: NCCL needs a whole one for each process.
    """
    if gpus not in (0, 1):
        raise InputError(f"gpus={gpus} for each of {workers} workers must be 0 or 1")
    return tune.PlacementGroupFactory([{}] + [{"CPU": cpus, "GPU": gpus}] * workers)


def train_with_workers(
    config: Config, workers: int, cpus: int, gpus: float, on_eval: OnEval, log: Path
) -> dict[str, float]:
    """Train in ``workers`` processes from within a trial that has ``resources(workers, cpus, gpus)``.

    ``on_eval(step, metrics)`` is called here after each evaluation; the training waits until it returns. What the
    processes print is appended to ``log``. Returns the metrics of the last evaluation. Raises what ``train`` raises in
    any process, and WorkerLostError when one dies: the same call then continues from the newest checkpoint. No process
    is left at the end.
    """
    wait_for_folder(Path(config.run_dir))  # processes of an earlier try end at once, but not before their trial
    address = ray.util.get_node_ip_address()
    # On a free port.
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    group = ray.util.get_current_placement_group()
    assert group is not None and group.bundle_count == workers  # Ray drops the empty bundle of the trial itself
    actors = []
    try:
        for rank in range(workers):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            actor = ray.remote(Worker).options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=place)
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(workers),
                "LOCAL_RANK": "0",  # Ray shows a process only its own GPU
                "MASTER_ADDR": address,
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",  # torchrun's flag for: the store exists, rank 0 opens none
                "OMP_NUM_THREADS": str(cpus),
            }
            actors.append(actor.remote(config, str(Path.cwd()), variables, str(log)))
        return _follow(actors, on_eval)
    finally:
        for actor in actors:
            ray.kill(actor)


class Worker:
    """One process of a trial. Each call of ``advance`` continues its training to the next evaluation."""

    def __init__(self, config: Config, folder: str, variables: Mapping[str, str], log: str) -> None:
        os.chdir(folder)  # Ray starts it in another folder
        os.environ.update(variables)
        with Path(log).open("a", encoding="utf-8") as file:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        self._config, self._threads, self._main = config, int(variables["OMP_NUM_THREADS"]), variables["RANK"] == "0"
        self._go: SimpleQueue[None] = SimpleQueue()
        self._said: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        # A thread, because it can wait between two calls.
        self._training = ThreadPoolExecutor(1).submit(self._train)
        self._training.add_done_callback(lambda _: self._said.put(None))

    def advance(self) -> tuple[int, dict[str, float]] | dict[str, float]:
        """Return the next evaluation, on rank 0, as (step, metrics). At the end, all ranks return the result of
        ``train``."""
        self._go.put(None)
        evaluation = self._said.get()
        if evaluation is not None:
            return evaluation
        sys.stdout.flush()
        return self._training.result()

    def _train(self) -> dict[str, float]:
        self._go.get()
        torch.set_num_threads(self._threads)
        try:
            return train(self._config, self._on_eval if self._main else None)
        except MTUNetError:
            raise  # its message is one line, which the trial notes
        except Exception:
            traceback.print_exc()  # into the log; the trial notes only the last line
            raise

    def _on_eval(self, step: int, metrics: dict[str, float]) -> None:
        self._said.put((step, metrics))
        self._go.get()


def _follow(actors: Sequence[Any], on_eval: OnEval) -> dict[str, float]:
    """Move the workers to the end of their training. Returns the metrics of rank 0."""
    waiting = {actor.advance.remote(): rank for rank, actor in enumerate(actors)}
    metrics: dict[str, float] = {}
    while waiting:
        (ready,), _ = ray.wait(list(waiting))
        rank = waiting.pop(ready)
        try:
            answer = ray.get(ready)
        except (RayTaskError, *LOST) as error:
            # "from error" could make a circle (the error may be or hold the cause), and Ray would follow it for ever.
            raise _cause(error, rank, waiting) from None
        if isinstance(answer, tuple):
            on_eval(*answer)
            waiting[actors[rank].advance.remote()] = rank
        elif rank == 0:
            metrics = answer
    return metrics


def _cause(first: Exception, rank: int, waiting: Mapping[Any, int]) -> Exception:
    """The error to raise when a worker has failed. A collective of one worker may fail because another worker ended."""
    failures = {rank: first}
    if waiting and not isinstance(getattr(first, "cause", None), MTUNetError):
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=PATIENCE_S)
        for reference in done:
            try:
                ray.get(reference)
            except (RayTaskError, *LOST) as error:
                failures[waiting[reference]] = error
    for failure in failures.values():
        if isinstance(failure, RayTaskError) and isinstance(failure.cause, MTUNetError):
            return failure.cause
    for lost, failure in failures.items():
        if isinstance(failure, LOST):
            return WorkerLostError(f"rank {lost} of the trial was lost: {str(failure).splitlines()[0]}")
    return getattr(first, "cause", first)  # the worker's own error, whose traceback is in the log
