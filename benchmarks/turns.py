"""The common part of the benchmarks: work that takes turns in separate processes, and the tables of results."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from mtunet_dist import distributed
from mtunet_dist.runs.provenance import environment

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
Work = Callable[[], object]


@dataclass(frozen=True)
class Turn:
    """The cost of one turn. For several processes: the slowest's time, the largest memory, and the sum of CPU time."""

    steps: int
    seconds: float
    cpu_s: float
    mib: float  # since the processes began: most memory that the work has added


def take_turns(works: Mapping[Key, Callable[[], Result]], rounds: int) -> dict[Key, list[Result]]:
    """Call each in turn, ``rounds`` times after a warm-up round. A machine that changes its speed affects all
    equally."""
    found: dict[Key, list[Result]] = {key: [] for key in works}
    for current in range(rounds + 1):
        for key, work in works.items():
            result = work()
            if current:
                found[key].append(result)
    return found


class Crew:
    """New processes, with a process group if there are several, that repeat ``prepare(device)()`` when called.

    A turn lasts about ``seconds`` and at least one step. It is None if the work does not fit into the GPU's memory.
    """

    def __init__(
        self,
        prepare: Callable[[torch.device], Work],
        *,
        seconds: float,
        threads: int,
        device: torch.device,
        processes: int = 1,
    ) -> None:
        # They are forked from a server that has imported everything, so that they start at once and with equal memory.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "mtunet_dist.strategies.ddp"])
        self.folder = tempfile.TemporaryDirectory()
        self.ends: list[Connection] = []
        self.processes = []
        for rank in range(processes):
            ours, theirs = context.Pipe()
            group = (rank, processes, self.folder.name) if processes > 1 else None
            args = (theirs, prepare, seconds, threads, torch.device(device.type, rank), group)
            process = context.Process(target=_work, args=args, daemon=True)
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def __call__(self) -> Turn | None:
        for end in self.ends:
            end.send(True)
        try:
            turns: list[Turn | None] = [end.recv() for end in self.ends]
        except EOFError:
            sys.exit("error: a process that was measured has ended; see above")
        done = [turn for turn in turns if turn is not None]
        if len(done) < len(turns):
            return None
        return Turn(
            steps=done[0].steps,
            seconds=max(turn.seconds for turn in done),
            cpu_s=sum(turn.cpu_s for turn in done),
            mib=max(turn.mib for turn in done),
        )

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _work(
    orders: Connection,
    prepare: Callable[[torch.device], Work],
    seconds: float,
    threads: int,
    device: torch.device,
    group: tuple[int, int, str] | None,
) -> None:
    """The work of one process of a crew until it is killed."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if group:
        rank, count, folder = group
        os.environ["LOCAL_RANK"] = str(rank)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=count)
    before = _resident_mib("VmRSS")
    try:
        work = prepare(device)
        while orders.recv():
            steps, elapsed, cpu = _turn(work, seconds, device)
            mib = _resident_mib("VmHWM") - before
            if device.type == "cuda":
                mib = torch.cuda.max_memory_allocated() / 2**20
                torch.cuda.empty_cache()  # for the next turn's process
            orders.send(Turn(steps, elapsed, cpu, mib))
    except torch.OutOfMemoryError:
        work = None
        torch.cuda.empty_cache()
        while True:
            orders.send(None)
            orders.recv()


def _turn(work: Work, seconds: float, device: torch.device) -> tuple[int, float, float]:
    """Steps done, and the wall and CPU seconds that they took; equally many steps on all ranks."""
    if device.type == "cuda":
        work()  # the allocator must first get its memory again
    distributed.all_reduce_sum(torch.zeros(1, device=device))
    _finish(device)
    start, cpu = time.perf_counter(), time.process_time()
    work()
    _finish(device)
    more = distributed.from_main(round(seconds / (time.perf_counter() - start))) - 1
    for _ in range(more):
        work()
    _finish(device)
    return 1 + max(0, more), time.perf_counter() - start, time.process_time() - cpu


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _resident_mib(field: str) -> float:
    """``VmRSS``, the memory this process has now, or ``VmHWM``, the most that it had."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def median(turns: Sequence[Turn], figure: Callable[[Turn], float]) -> float:
    """Of one figure of the turns."""
    return statistics.median(map(figure, turns))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def about(script: str) -> str:
    """A line that names the command, the software and the machine."""
    known = environment()
    versions = ", ".join(f"{name} {known[name]}" for name in ("mtunet_dist", "git", "python", "torch") if known[name])
    units = torch.backends.cpu.get_cpu_capability()
    gpus = "" if known["gpus"] == "none" else f", {known['gpus']}"
    machine = f"{known['cpus']} cores of {known['cpu']} ({units}){gpus}"
    return f"`python benchmarks/{script} {' '.join(sys.argv[1:])}`; {versions}; {machine}"
