"""Trainings as processes: a fixed number at a time. On request they stop with a checkpoint. A failure does not end the
rest."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mtunet_dist.config import Config
from mtunet_dist.errors import InputError, PreemptedError
from mtunet_dist.reproduction.trainings import Training
from mtunet_dist.system.machine import cpus
from mtunet_dist.system.preemption import StopRequest

LOG = "train.log"
POLL_S = 0.2
STOP_PATIENCE_S = 150.0  # torchrun gives its processes 30 seconds, launch/local.py 120


@dataclass(frozen=True)
class Launcher:
    """How to start a training: a command line in which ``{config}`` is replaced by the config file. None: torchrun
    here.

    ``jobs`` trainings run at the same time. The command must not return before its training has ended.
    """

    template: str | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise InputError(f"--jobs={self.jobs} must be at least 1")
        if self.template is not None:
            try:
                words = shlex.split(self.template)
            except ValueError as error:
                raise InputError(f"--launcher='{self.template}': {error}") from None
            if not any("{config}" in word for word in words):
                raise InputError(f"--launcher='{self.template}' must contain {{config}}, the training's config file")
            if shutil.which(words[0]) is None:
                raise InputError(f"--launcher='{self.template}': there is no command {words[0]}")

    def command(self, training: Training, config_file: Path) -> list[str]:
        """The words of the command that trains ``config_file``."""
        if self.template is not None:
            return [word.replace("{config}", str(config_file)) for word in shlex.split(self.template)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
        count = f"--nproc-per-node={self.processes(training.config)}"
        return [*torchrun, count, signals, "-m", "mtunet_dist.train", str(config_file)]

    def processes(self, config: Config) -> int:
        """The number of processes for torchrun: one per GPU, or two on CPU cores, which the jobs share. It is smaller
        if the batch cannot be shared."""
        gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
        wanted = gpus or max(1, min(2, cpus()) // self.jobs)
        samples = config.batch_size // config.optim.accumulate
        return max(n for n in range(1, wanted + 1) if samples % n == 0)

    def environment(self, training: Training) -> dict[str, str]:
        """The environment of the process. By default torchrun gives each of its processes one thread."""
        if self.template is not None:
            return dict(os.environ)
        threads = max(1, cpus() // (self.processes(training.config) * self.jobs))
        return {"OMP_NUM_THREADS": str(threads), **os.environ}


@dataclass
class _Started:
    training: Training
    process: subprocess.Popen[bytes]
    log: Path
    offset: int  # where the output of this attempt starts in the log


def run_all(
    trainings: Sequence[Training], launcher: Launcher, stop: StopRequest, on_end: Callable[[Training, str | None], None]
) -> None:
    """Run or resume ``trainings``. After each one it calls ``on_end(training, reason of a failure or None)``.

    After ``stop`` has received a signal, the running trainings are asked to stop, which leaves a checkpoint, and
    PreemptedError is raised.
    """
    waiting, running = list(trainings), list[_Started]()
    try:
        while (waiting or running) and stop.received is None:
            while waiting and len(running) < launcher.jobs:
                running.append(_start(waiting.pop(0), launcher))
            for started in [s for s in running if s.process.poll() is not None]:
                running.remove(started)
                on_end(started.training, _failure(started))
            time.sleep(POLL_S)
    finally:
        _stop(running)
    if stop.received is not None:
        raise PreemptedError(
            f"{stop.received.name} received: {len(running)} running trainings were stopped, which leaves a checkpoint; "
            f"{len(waiting)} had not begun; the same command goes on"
        )


def _start(training: Training, launcher: Launcher) -> _Started:
    """Start through ``children.py``: if this process is killed, the training must not continue."""
    file = training.write_config()
    log = training.dir / LOG
    with log.open("ab") as output:
        offset = output.tell()
        # In a new session, so that only this process gets Ctrl-C. It then asks the training to stop.
        process = subprocess.Popen(
            [sys.executable, "-m", "mtunet_dist.system.children", str(os.getpid()), *launcher.command(training, file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=launcher.environment(training),
            start_new_session=True,
        )
    return _Started(training, process, log, offset)


def _stop(running: Sequence[_Started]) -> None:
    for started in running:
        _signal(started, signal.SIGTERM)
    deadline = time.monotonic() + STOP_PATIENCE_S
    for started in running:
        while _signal(started, 0) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        _signal(started, signal.SIGKILL)
        started.process.wait()


def _signal(started: _Started, number: int) -> bool:
    """Send a signal to all processes of the command, because a shell script would not pass it on. Returns whether any
    exist."""
    started.process.poll()
    try:
        os.killpg(started.process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _failure(started: _Started) -> str | None:
    """The reason of a failure, or None."""
    code = started.process.returncode
    if code == 0:
        if started.training.trained:
            return None
        return f"the command returned, but the training is not finished ({started.log})"
    with started.log.open("rb") as file:
        file.seek(started.offset)
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.startswith("error: ")] or [line.strip() for line in lines[-1:]]
    return f"exit code {code}: {said[-1] if said else 'it said nothing'} ({started.log})"
