"""The Ray in which a sweep runs, and the run of a Tuner in it."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from mtunet_dist.errors import InputError, MachineError
from mtunet_dist.sweeps.config import Sweep
from mtunet_dist.system import startup
from mtunet_dist.system.machine import cpus

# ray reads these variables when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output cannot be switched off
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C shall end like a kill; Tune's handler makes it a success
os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that fails has no metric
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # runs write their own TensorBoard events

import ray
from ray import tune
from rich.console import Console

from mtunet_dist.sweeps.ray_backend.live import Progress, WallTime
from mtunet_dist.sweeps.ray_backend.nodes import wait_for_nodes
from mtunet_dist.sweeps.ray_backend.schedule import scheduler_of
from mtunet_dist.sweeps.ray_backend.search import OBJECTIVE, search
from mtunet_dist.sweeps.ray_backend.trial import OFFERED, make_trainable
from mtunet_dist.sweeps.ray_backend.workers import resources

STATE = "ray_tune"  # in the folder of a running sweep: the files that Tune writes
OBJECT_STORE_BYTES = 100_000_000  # no large objects pass through it
PATIENCE_S = 120.0  # time for the nodes of a cluster to join


def run_trials(sweep: Sweep, base: Path, epochs: int, address: str | None, nodes: int | None, console: Console) -> bool:
    """Run the rest of the sweep, with trials of at most ``epochs``. Returns False if its time ended first.

    It runs in its own Ray, or in the Ray at ``address``, which must have ``nodes`` nodes. Raises InputError if that Ray
    has no room for a trial, MachineError if it cannot be joined. OSError, such as of a full disk, stays one. Ends the
    command if a node does not join.
    """
    state = sweep.dir.resolve() / STATE
    shutil.rmtree(state, ignore_errors=True)  # left by a command that was killed
    clock = WallTime(sweep.hours)
    with joined_ray(address, nodes, sweep) if address else local_ray(), Progress(sweep, clock, console) as progress:
        space, search_arguments = search(sweep)
        asked = {"CPU": sweep.cpus_per_worker, "GPU": sweep.gpus_per_worker}
        if sweep.workers_per_trial > 1:
            asked = resources(sweep.workers_per_trial, sweep.cpus_per_worker, sweep.gpus_per_worker)
        tuner = tune.Tuner(
            tune.with_resources(make_trainable(sweep, base), asked),
            param_space=space,
            tune_config=tune.TuneConfig(
                # Some schedulers set both themselves.
                metric=None if sweep.scheduler in ("asha", "pbt") else OBJECTIVE,
                mode=None if sweep.scheduler in ("asha", "pbt") else sweep.objective.goals[0].mode,
                scheduler=scheduler_of(sweep, epochs),
                reuse_actors=True,  # otherwise each trial would start a process and import torch
                trial_dirname_creator=lambda trial: trial.config["trial"],
                **search_arguments,
            ),
            run_config=tune.RunConfig(
                name=STATE,
                storage_path=str(state.parent),
                failure_config=tune.FailureConfig(max_failures=sweep.retries),
                callbacks=[progress],
                stop=clock,
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except tune.TuneError as error:
            raise _cause(error) or error from None
    shutil.rmtree(state, ignore_errors=True)
    if not clock.over:
        for offered in sweep.dir.glob(f"trials/*/{OFFERED}"):
            shutil.rmtree(offered, ignore_errors=True)
    return not clock.over


def check_room(sweep: Sweep, cpus: float, gpus: float, where: str) -> None:
    """Raise InputError if ``where`` has less than a trial needs."""
    for key, each, present in (
        ("cpus_per_worker", sweep.cpus_per_worker, cpus),
        ("gpus_per_worker", sweep.gpus_per_worker, gpus),
    ):
        if (needed := sweep.workers_per_trial * each) > present:
            times = f"workers_per_trial={sweep.workers_per_trial} times " if sweep.workers_per_trial > 1 else ""
            raise InputError(f"{times}{key}={each} is {needed:g}, but {where} has {present:g}")


def room(sweep: Sweep, node: Mapping[str, float]) -> int:
    """The number of workers for which a node with these resources has room."""
    asked = {"CPU": sweep.cpus_per_worker, "GPU": sweep.gpus_per_worker}
    return min(int(node.get(name, 0) / each + 1e-6) for name, each in asked.items() if each)


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray that belongs to this command. Nothing of it remains afterwards."""
    # Without Ray's memory monitor, the kernel ends processes when memory is short, Ray's workers first, and Tune tries
    # these again. If the monitor ends a process, Tune ends too.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    startup.set_threads(os.environ)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # otherwise Ray leaves a token in the home folder
    # Ray's sockets are in this folder, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=cpus(),
            num_gpus=torch.cuda.device_count(),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            _temp_dir=folder,
        )
        with _until_shutdown():
            yield


@contextmanager
def joined_ray(address: str, nodes: int | None, sweep: Sweep) -> Iterator[None]:
    """A Ray that others have started at ``address``. RAY_AUTH_MODE and RAY_AUTH_TOKEN must match it."""
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, ValueError, OverflowError, ray.exceptions.AuthenticationError) as error:
        hint = "does it run there, and do RAY_AUTH_MODE and RAY_AUTH_TOKEN say what it was started with?"
        raise MachineError(f"cannot join the Ray at --address {address}; {hint} ({error})") from None
    with _until_shutdown():
        wait_for_nodes(address, nodes)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                present = ray.cluster_resources()
                check_room(sweep, present.get("CPU", 0), present.get("GPU", 0), f"the Ray at {address}")
                workers = sum(room(sweep, node["Resources"]) for node in ray.nodes() if node["Alive"])
                if workers < sweep.workers_per_trial:
                    worker = f"cpus_per_worker={sweep.cpus_per_worker}, gpus_per_worker={sweep.gpus_per_worker}"
                    raise InputError(
                        f"the nodes of the Ray at {address} have room for {workers} workers of {worker}, "
                        f"but workers_per_trial={sweep.workers_per_trial}"
                    )
                break
            except InputError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)
        yield


def _cause(error: tune.TuneError) -> OSError | None:
    """The OSError that Tune has wrapped, if there is one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


@contextmanager
def _until_shutdown() -> Iterator[None]:
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # Tune would print the traceback of each failed trial
    try:
        yield
    finally:
        ray.shutdown()
