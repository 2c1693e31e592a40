"""What the tests of training and of resuming share: what a run left behind, and a process group of two."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from mtunet_dist import distributed
from mtunet_dist.config import Config
from mtunet_dist.runs import checkpoint
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.segmentation import ClassInfo, Segmentation
from mtunet_dist.train import train

MakeConfig = Callable[..., Config]
LAUNCH = [sys.executable, str(Path(__file__).parents[2] / "launch" / "local.py"), "--nproc=2"]
PRELOAD = [
    *("__main__", "mtunet_dist.train", "mtunet_dist.data.dali"),
    *("mtunet_dist.models.mtunet", "mtunet_dist.strategies.ddp", "mtunet_dist.tasks.normals"),
    *("mtunet_dist.weightings.learned", "torch.utils.tensorboard"),
    "torch._dynamo",  # which torch imports when a training begins, and which takes as long as torch itself
]
TASKS = [
    Segmentation("segmentation", tuple(ClassInfo(name, (0, 0, 0)) for name in "abc")),
    Depth.metric_depth(0.001),
]


LOSSES = {"loss/segmentation": 1.0, "loss/depth": 1.0}  # what every evaluation gives beside other metrics


def records(run_dir: str | Path, kind: str) -> list[dict[str, float]]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def steps_done(run_dir: Path) -> int:
    """How many steps have been reported, one by one, so far."""
    return len(records(run_dir, "train")) if (run_dir / "metrics.jsonl").is_file() else 0


def final_state(run_dir: str | Path) -> checkpoint.State:
    return checkpoint.load(checkpoint.by_age(Path(run_dir) / "checkpoints")[0])


def copy_as_of(step: int, run_dir: Path, copy: Path) -> None:
    """The run folder as if the run had died right after it saved ``step``; needs all checkpoints kept."""
    shutil.copytree(run_dir, copy)
    for path in checkpoint.by_age(copy / "checkpoints"):
        if path > checkpoint.path_of(copy / "checkpoints", step):
            path.unlink()
    (copy / "checkpoints" / "best.pt").unlink()


def assert_same_state(a: checkpoint.State, b: checkpoint.State) -> None:
    """To the bit: weights, optimiser, random generators, loss statistics, metrics; all but the configs' text."""
    a, b = ({key: value for key, value in state.items() if key != "config"} for state in (a, b))
    _assert_same(a, b, "")


def _assert_same(a: Any, b: Any, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key, value in a.items():
            _assert_same(value, b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_same(x, y, f"{where}/{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def on_two_ranks(function: Callable[..., object], *args: object) -> None:
    """``on_ranks`` with two."""
    on_ranks(2, function, *args)


def on_ranks(count: int, function: Callable[..., object], *args: object) -> None:
    """Call ``function(*args)`` in ``count`` new processes that form a group, with one thread each.

    They are forked from a server that has imported everything and has no threads: starting them takes no time, and
    DALI, which does not survive a fork once it has run, has not run there.
    """
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        mp.start_processes(_rank, (store, count, function, args), nprocs=count, start_method="forkserver")


def start(function: Callable[..., object], *args: object) -> multiprocessing.Process:
    """``function(*args)`` in a new process, forked as those of ``on_ranks`` are; it ends with this one."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    process = multiprocessing.get_context("forkserver").Process(target=function, args=args, daemon=True)
    process.start()
    return process


def _rank(rank: int, store: Path, count: int, function: Callable[..., object], args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    function(*args)
    distributed.leave()


def train_each(configs: Sequence[Config]) -> None:
    """Train the configs one after another; for ``on_ranks``."""
    for config in configs:
        train(config)


def paced(restarts: int) -> str:
    """The text of a sitecustomize.py: until Slurm has restarted its job so often, each step of a training takes PACE
    seconds (an environment variable)."""
    return f"""\
import os, time
if "LOCAL_RANK" in os.environ and int(os.environ.get("SLURM_RESTART_COUNT", "0")) < {restarts}:
    from mtunet_dist.runs.tracking import Tracker
    steps = Tracker.log_steps
    def slow(self, done, report):
        steps(self, done, report)
        time.sleep(float(os.environ.get("PACE", "0")))
    Tracker.log_steps = slow
"""


def kill_all(run_dir: Path) -> None:
    """End every process of the run; torchrun's workers have sessions of their own and outlive a killed agent."""
    word = f"run_dir={run_dir}".encode()
    while alive := [int(p.name) for p in Path("/proc").glob("[0-9]*") if word in _command(p)]:
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    """The processes that ``pid``'s main thread has started, in that order; they may have ended since."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], bool], *running: subprocess.Popen[str], patience_s: float = 300) -> None:
    """Until ``condition()`` is true, while the processes run."""
    deadline = time.monotonic() + patience_s
    while not condition():
        for process in running:
            if process.poll() is not None:
                said = process.stderr.read() if process.stderr else ""
                raise AssertionError(f"ended with {process.returncode}: {said}")
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _command(process: Path) -> list[bytes]:
    try:
        return (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
