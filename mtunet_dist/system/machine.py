"""The part of the machine that this process may use. No slow imports: commands that need no torch start without it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

TOP = Path("/")


def cpus(root: Path = TOP) -> int:
    """The number of CPU cores that this process may use, at least 1.

    A process may be bound to some cores. A container may have only a share of their time; half a core counts as one. A
    Slurm job may have fewer cores than it sees.
    """
    counts = [affinity(), *(math.ceil(share) for share in _shares(root))]
    if (slurm := os.environ.get("SLURM_CPUS_ON_NODE", "")).isdecimal():
        counts.append(int(slurm))
    return max(1, min(counts))


def affinity() -> int:
    """The number of CPU cores that this process is bound to."""
    return len(os.sched_getaffinity(0))


def control_groups(controller: str, root: Path = TOP) -> Iterator[tuple[Path, bool]]:
    """The folders of the control groups of this process, its own first, each with whether it is of version 2.

    A parent group may have a stricter limit. In a container the path may be the host's path, and only the topmost
    folder exists.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        if controllers and not top.is_dir():
            top = root / "sys/fs/cgroup" / controller
        folder = top / path.lstrip("/")
        for group in [folder, *folder.parents[: len(folder.parts) - len(top.parts)]]:
            yield group, not controllers


def _shares(root: Path) -> Iterator[float]:
    """The number of cores that each limit allows."""
    for group, is_v2 in control_groups("cpu", root):
        with suppress(OSError, ValueError):
            if is_v2:
                quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
            else:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota, period = ((group / name).read_text(encoding="utf-8").strip() for name in names)
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)
