"""torchrun for tests that start many trainings: processes that are forked instead of started.

torchrun and two ranks are three interpreters that import torch, which takes most of the time of a training of seconds.
Here they are forked from the server of ``training.start``, which has imported everything. What a training sees of
torchrun is kept: the variables that describe the group, a port of its own for each start, and what happens to the ranks
when one fails and when a signal comes. What is not kept is torchrun itself, which each kind of fault has to meet in at
least one test.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import torch

from helpers.training import PRELOAD

KILL_AFTER_S = 30  # after SIGTERM, as torchrun
POLL_S = 0.1  # likewise
STOPPED_BY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # likewise


class Torchrun:
    """``torchrun --standalone --nproc-per-node=RANKS --max-restarts=RESTARTS words...``, with output to a file.

    It has the methods of a Popen that tests need. The first of the words is a script.
    """

    def __init__(self, words: Sequence[str], output: Path, ranks: int, restarts: int) -> None:
        multiprocessing.set_forkserver_preload(PRELOAD)
        context = multiprocessing.get_context("forkserver")
        self._agent = context.Process(target=_agent, args=(list(words), output, ranks, restarts))
        self._agent.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None as long as it runs."""
        return self._agent.exitcode

    def poll(self) -> int | None:
        """As ``returncode``."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises TimeoutExpired."""
        self._agent.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("torchrun", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the agent, if it is still there."""
        if self.returncode is None and self._agent.pid is not None:
            os.kill(self._agent.pid, number)

    def kill(self) -> None:
        """End the agent and all that it has started, and see them end."""
        assert self._agent.pid is not None
        self.send_signal(signal.SIGKILL)
        with suppress(ProcessLookupError):
            while True:
                os.killpg(self._agent.pid, signal.SIGKILL)
                self._agent.join(0.05)  # reaped, it is no longer of the group


def _agent(words: list[str], output: Path, ranks: int, restarts: int) -> None:
    """Start the ranks, and start them again as long as one fails and restarts are left."""
    os.setpgid(0, 0)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda n, _: received.append(n)) for number in STOPPED_BY}
    for attempt in range(restarts + 1):
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        started = [_fork(words, rank, ranks, port, attempt, restarts, handlers) for rank in range(ranks)]
        running, failed = set(started), False
        while running and not failed and not received:
            time.sleep(POLL_S)
            failed = any(code != 0 for code in _ended(running))
        _end(running, received[0] if received else signal.SIGTERM)
        if not failed or received:
            break
    sys.exit(1 if failed or received else 0)


def _ended(running: set[int]) -> list[int]:
    """The exit codes of those that have ended, which are taken from ``running``."""
    codes = []
    for pid in list(running):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            running.remove(pid)
            codes.append(os.waitstatus_to_exitcode(status))
    return codes


def _end(running: set[int], number: int) -> None:
    """Ask the ranks to end; those that do not are killed."""
    deadline = time.monotonic() + KILL_AFTER_S
    for pid in running:
        os.kill(pid, number)
    while running:
        _ended(running)
        if time.monotonic() > deadline:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S / 10)


def _fork(
    words: list[str],
    rank: int,
    ranks: int,
    port: int,
    attempt: int,
    restarts: int,
    handlers: dict[signal.Signals, signal.Handlers | int | None],
) -> int:
    """Start a rank; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            setattr(sys, name, io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), write_through=True))
        os.environ |= {
            **{name: str(rank) for name in ("RANK", "LOCAL_RANK", "ROLE_RANK")},
            **{name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")},
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "preloaded",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "TORCHELASTIC_MAX_RESTARTS": str(restarts),
            "OMP_NUM_THREADS": "1",
        }
        torch.set_num_threads(1)
        code = _run(words)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _run(words: list[str]) -> int:
    """Run the script as the interpreter would, to the end of its exit handlers; the exit code."""
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return code
