"""One node's part of a job, on one node or on many: torch's elastic agent. It starts the processes, ends them together,
and restarts them after a failure.

It differs from ``torchrun``, which is the same agent, in four points. It does not restart a failure that would come
again. Its exit code is that of the process that failed, or 75 when asked to stop. Its processes end when it is killed.
A restart works (see ``_set_environment``).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousHandler,
    RendezvousTimeoutError,
)

from mtunet_dist.config import Config
from mtunet_dist.errors import InputError
from mtunet_dist.launching import rendezvous
from mtunet_dist.launching.network import Endpoint
from mtunet_dist.system import startup
from mtunet_dist.system.command import HUNG, PREEMPTED
from mtunet_dist.system.machine import cpus
from mtunet_dist.system.preemption import STOPPED_BY

# torchrun's own list lacks the last two signals, and these would end it.
PASSED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
FINAL = (2, PREEMPTED)  # exit codes after which another try would not help: the user's error, and a request to stop
SAVING_S = 120  # time that processes have to write a checkpoint after a request to stop
PATIENCE_S = 600  # time that nodes wait for one another
PARTING_S = 30.0  # after a failed job, the head serves the rendezvous and waits so long for the other nodes


@dataclass(frozen=True)
class Job:
    """The settings of an agent."""

    run_id: str  # the same on all nodes, different for different jobs
    head: Endpoint  # the agents meet here; port 0 means any port, for one node
    is_host: bool  # whether this agent serves the rendezvous
    address: str  # this node's address as the other nodes see it
    nodes: tuple[int, int]  # least and most number of nodes
    node_rank: int | None  # for a static rendezvous; None: c10d
    processes: int  # on this node
    max_restarts: int
    words: tuple[str, ...]  # CONFIG key=value...


class Agent(LocalElasticAgent):
    """torch's agent. Before it restarts the processes, it checks the exit code of the first process that failed."""

    failure: ProcessFailure | None = None
    signals = 0  # number of signals that have made it shut down its processes

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # torch's manual calls it an extension point
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state != WorkerState.FAILED:
            return result
        self.failure = min(result.failures.values(), key=lambda failure: failure.timestamp)
        code = self.failure.exitcode
        if code == PREEMPTED and worker_group.spec.rdzv_handler.num_nodes_waiting():
            # A node joins, and another node's agent has already asked its processes to stop; this agent will do so
            # next.
            return RunResult(WorkerState.HEALTHY)
        if code in FINAL:
            self._remaining_restarts = 0
        if self._remaining_restarts:
            print(
                f"process {self.failure.local_rank} of this node ended with {code}; starting all again, "
                f"{self._remaining_restarts} of {worker_group.spec.max_restarts} restarts left",
                file=sys.stderr,
                flush=True,
            )
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self.signals += isinstance(sys.exception(), SignalException)  # a restart shuts down too, without a signal
        if self.interrupted:
            death_sig, timeout = signal.SIGKILL, 1
        super()._shutdown(death_sig, timeout)

    @property
    def interrupted(self) -> bool:
        """Whether a second signal came while the processes were ending after the first one."""
        return self.signals > 1

    @property
    def exit_codes(self) -> set[int | None]:
        """The exit codes of the processes of the last start."""
        return {handler.proc.returncode for handler in getattr(self._pcontext, "subprocess_handlers", {}).values()}

    @property
    def killed(self) -> bool:
        """Whether a process had to be killed."""
        return -signal.SIGKILL in self.exit_codes

    def part(self, *, is_host: bool) -> None:
        """Tell the other nodes that this one leaves. The host waits for all of them, because its end would be an error
        to them."""
        group: Any = self.get_worker_group()  # torch's annotation ignores that a rendezvous may fail
        if group.store is None:
            return
        deadline = time.monotonic() + PARTING_S
        with suppress(RuntimeError, SignalException):  # the host has gone, or a second signal came
            gone = group.store.add("parted", 1)
            while is_host and gone < group.group_world_size and time.monotonic() < deadline:
                time.sleep(0.1)
                gone = group.store.add("parted", 0)


def run(job: Job) -> int:
    """Run this node's processes to their end. Returns their exit code, or after signal n the code 75 or 128 + n.

    Raises InputError if the nodes do not meet.
    """
    _set_environment(job.processes)
    try:
        handler = _meet(job)
    except RendezvousError as error:
        raise InputError(f"no rendezvous at {job.head}: {error.__cause__ or error}") from None
    # A killed launcher cannot end its processes. Without this they would continue to train.
    ended_with = ("-m", "mtunet_dist.system.children", str(os.getpid()))
    worker = (*ended_with, sys.executable, "-u", "-m", "mtunet_dist.train")
    spec = WorkerSpec(
        role="train",
        local_world_size=job.processes,
        entrypoint=sys.executable,
        args=(*worker, *job.words),
        rdzv_handler=handler,
        max_restarts=job.max_restarts,
        local_addr=job.address,
    )
    agent = Agent(spec, DefaultLogsSpecs(), shutdown_timeout=SAVING_S)
    try:
        result = agent.run()
    except SignalException as request:
        # The processes got the signal too, and had SAVING_S to write a checkpoint.
        agent.part(is_host=job.is_host)
        for unsaved in (2, HUNG):
            if unsaved in agent.exit_codes:
                return unsaved
        if request.sigval in STOPPED_BY and not agent.killed:
            return PREEMPTED
        if agent.killed and not agent.interrupted:
            print(f"error: a process did not stop within {SAVING_S} s and was killed", file=sys.stderr, flush=True)
        return 128 + int(request.sigval)
    except (RendezvousError, DistError) as error:
        handler.shutdown()
        agent.part(is_host=job.is_host)
        if agent.failure is None:
            raise InputError(_why(error, job)) from None
        print(f"not started again: {_why(error, job)}", file=sys.stderr, flush=True)
        return _exit_code(agent.failure)
    if agent.failure is not None and result.is_failed():
        # The process that failed first has printed the error; the agent then ended the others.
        handler.shutdown()
        agent.part(is_host=job.is_host)
        return _exit_code(agent.failure)
    if job.is_host:
        handler.shutdown()
    return 0


def _set_environment(processes: int) -> None:
    """Set the environment variables of the agent and its processes."""
    # By default the agent gives every process all cores, and torchrun gives one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus() // processes)))
    startup.set_threads(os.environ)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = PASSED_ON
    # Without this variable a c10d agent makes one store for its processes and keeps it over restarts
    # (dynamic_rendezvous.py, _shared_tcp_store_server). init_process_group expects a new store for every try
    # (rendezvous.py, _create_c10d_store). In the kept store, gloo's keys default_pg/0//cpu//0/RANK still hold the
    # addresses of ended processes, and a rank that reads such a key before it is overwritten cannot connect. With the
    # variable, the first process of each try serves a new store at a new port.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


def _meet(job: Job) -> RendezvousHandler:
    if job.node_rank is None:
        return rendezvous.dynamic(
            str(job.head),
            is_host=job.is_host,
            nodes=job.nodes,
            run_id=job.run_id,
            address=job.address,
            timeout_s=PATIENCE_S,
        )
    address, port = job.head.address, job.head.port
    return rendezvous.Static(address, port, job.node_rank, job.nodes[1], job.run_id, PATIENCE_S, job.address)


def _why(error: Exception, job: Job) -> str:
    if isinstance(error, RendezvousClosedError):
        return "another node has ended the job"
    if isinstance(error, RendezvousTimeoutError):
        return f"fewer than {job.nodes[0]} nodes came to {job.head} in {PATIENCE_S} s"
    return f"the rendezvous at {job.head} failed: {error.__cause__ or error}"


def _exit_code(failure: ProcessFailure) -> int:
    """The exit code as a shell would give it."""
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def processes_per_node(config: Config, wanted: int | None, nodes: tuple[int, int] = (1, 1)) -> int:
    """The number ``wanted``; else one per GPU; else two on CPU cores. Prints a line if the batch allows only fewer.

    Raises InputError if for some number of ``nodes`` (least, most) the batch cannot be shared evenly among the
    processes.
    """
    if wanted is not None and wanted < 1:
        raise InputError(f"--nproc={wanted} must be at least 1")
    samples = config.batch_size // config.optim.accumulate
    possible = range(nodes[0], nodes[1] + 1)
    if wanted is None:
        gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
        there = gpus or min(2, cpus())
        count = next((n for n in range(there, 0, -1) if not _misfits(samples, n, possible)), 1)
    else:
        there = count = wanted
    if wrong := _misfits(samples, count, possible):
        listed = ", ".join(f"{n} x {count}" for n in wrong)
        raise InputError(
            f"a micro-batch of {samples} samples (batch_size / optim.accumulate) cannot be shared evenly among "
            f"{listed} (nodes x processes); change batch_size, --nnodes or --nproc"
        )
    if count < there:
        print(f"processes: {count}, not {there}, as a micro-batch of {samples} samples cannot be shared among more")
    return count


def _misfits(samples: int, processes: int, nodes: range) -> list[int]:
    """The numbers of nodes for which the samples cannot be shared evenly among the processes."""
    return [n for n in nodes if samples % (n * processes)]


def restarts(wanted: int | None, default: int) -> int:
    """The value of ``--max-restarts``. Raises InputError if it is negative."""
    if wanted is not None and wanted < 0:
        raise InputError(f"--max-restarts={wanted} must be 0 or more")
    return default if wanted is None else wanted
