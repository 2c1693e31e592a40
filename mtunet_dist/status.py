"""The runs under a folder and their progress: ``mtunet status [FOLDER]``.

All information comes from the run folders, and from squeue if there is one. A run is queued or running if Slurm says so
of its job. It is also running if a process of this machine has locked its folder. Otherwise it is finished, stopped
(its job ended with that code, or without a code its last report is in a checkpoint), or failed.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from mtunet_dist.errors import InputError
from mtunet_dist.system import arguments, records
from mtunet_dist.system.command import PREEMPTED, command
from mtunet_dist.system.folder_lock import LOCK

INSIDE = {"checkpoints", "tensorboard", "pictures", "slurm", "ray_tune"}  # folders inside a run, without other runs
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING"}


@dataclass(frozen=True)
class Status:
    """One run."""

    folder: Path
    state: str  # queued, running, finished, stopped or failed
    epoch: float | None  # done
    epochs: int | None  # asked for
    metric: str  # the newest figure, with its name
    job: str


def runs(root: Path) -> Iterator[Path]:
    """The run folders under ``root``, sorted by name: all folders of a started or submitted training."""
    for folder, names, files in os.walk(root):
        path = Path(folder)
        if "environment.json" in files or any((path / "slurm").glob("*.json")):
            yield path
        names[:] = sorted(set(names) - INSIDE)


def status_of(folder: Path, queue: Mapping[str, str], locked: set[int]) -> Status:
    """The progress of a run. ``queue`` has the states of Slurm's jobs, ``locked`` the inodes of locked files."""
    job = job_of(folder)
    config = _yaml(folder / "config.yaml")
    said = records.metrics(folder)
    last = said[-1] if said else {}
    epoch, epochs = last.get("epoch"), config.get("epochs")
    steps = [int(m[1]) for p in (folder / "checkpoints").glob("step_*.pt") if (m := re.search(r"_(\d+)\.pt", p.name))]
    saved = bool(steps) and max(steps) >= last.get("step", 0)
    lock = folder / LOCK
    if job in queue:
        state = "queued" if queue[job] in WAITING else "running"
    elif lock.exists() and lock.stat().st_ino in locked:
        state = "running"
    elif saved and isinstance(epochs, int) and epoch is not None and epoch >= epochs and last["kind"] == "eval":
        state = "finished"
    else:
        code = _exit_code(folder / "slurm" / f"job-{job}.exit")
        stopped = code == PREEMPTED if code is not None else saved or not said
        state = "stopped" if stopped else "failed"
    return Status(folder, state, epoch, epochs, newest_figure(said, config), job)


def job_of(folder: Path) -> str:
    """The number of the last Slurm job of the folder, running, ended or submitted. Empty if there was none."""
    submissions = sorted((folder / "slurm").glob("[0-9]*.json"), key=lambda p: (len(p.stem), p.stem))
    submitted = records.read_note(submissions[-1]) if submissions else {}
    ran = records.read_note(folder / "environment.json")
    if ran.get("slurm_job") and str(ran.get("started")) >= str(submitted.get("started", "")):
        return str(ran["slurm_job"])
    jobs = submitted.get("jobs")
    return str(jobs[0]) if isinstance(jobs, list) and jobs else ""


def newest_figure(said: list[records.Record], config: Mapping[str, Any]) -> str:
    """The newest value of the metric that decides which model is the best. Before the first evaluation, the newest
    loss."""
    section = config.get("checkpoint")
    best = section.get("best", "") if isinstance(section, dict) else ""
    for name, kind in ((best, "eval"), ("loss/total", "train")):
        for record in reversed(said):
            value = record.get(name, "")
            if record["kind"] == kind and (value is None or isinstance(value, int | float)):
                return f"{name} {math.nan if value is None else value:.4g}"
    return ""


def queued_jobs() -> dict[str, str]:
    """The state of each waiting or running job of this user. Empty without Slurm."""
    try:
        done = subprocess.run(["squeue", "-h", "--me", "-o", "%A|%T"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    pairs = (line.partition("|") for line in done.stdout.splitlines())
    return {job: state for job, _, state in pairs}


def locked_files() -> set[int]:
    """Inodes of the files that processes of this machine have locked."""
    lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines() if Path("/proc/locks").exists() else []
    return {int(line.split()[-3].split(":")[-1]) for line in lines if "FLOCK" in line and "->" not in line}


def _yaml(file: Path) -> dict[str, Any]:
    """The config of a run. Empty if it is missing or cannot be read."""
    try:
        found = yaml.safe_load(file.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _exit_code(file: Path) -> int | None:
    words = file.read_bytes().split() if file.is_file() else []
    return int(words[0]) if words and words[0].isdigit() else None


def table(statuses: list[Status]) -> Table:
    """The table for the terminal."""
    drawn = Table()
    for heading in ("run", "state", "epoch", "newest", "job"):
        drawn.add_column(heading, overflow="fold")
    for status in statuses:
        epoch = "" if status.epoch is None else f"{status.epoch:.4g}"
        whole = "" if status.epochs is None else f"/{status.epochs}"
        drawn.add_row(str(status.folder), status.state, epoch + whole, status.metric, status.job)
    return drawn


@command
def main() -> None:
    """The command line."""
    parser = arguments.parser("status", __doc__.splitlines()[0])
    parser.add_argument("folder", type=arguments.path, nargs="?", default=Path("runs"), help="default: runs")
    folder: Path = parser.parse_args().folder
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    queue, locked = queued_jobs(), locked_files()
    console = Console()
    console.print(table([status_of(run, queue, locked) for run in runs(folder)]), markup=False)


if __name__ == "__main__":
    main()
