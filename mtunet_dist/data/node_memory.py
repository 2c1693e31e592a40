"""Which ranks share a node, and how much memory is free there."""

from __future__ import annotations

import os
from pathlib import Path

from mtunet_dist import distributed
from mtunet_dist.errors import InputError
from mtunet_dist.system.machine import control_groups

MARGIN = 0.9  # the share of free memory that a cache may take


def node() -> tuple[str, int, int]:
    """A key that is equal for processes that can reach each other's files in /proc: same boot, process namespace and
    user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, Path("/proc/self/ns/pid").stat().st_ino, os.getuid()


def ranks_of_node() -> list[int]:
    """The ranks that can share memory with this one, including itself. All ranks call it together."""
    nodes = distributed.all_gather_object(node())
    return [rank for rank, other in enumerate(nodes) if other == nodes[distributed.rank()]]


def raise_any(problem: str | None) -> None:
    """Raise the first ``problem`` of any rank as InputError on all ranks, so that no rank waits for one that has
    stopped."""
    for found in distributed.all_gather_object(problem):
        if found is not None:
            raise InputError(found)


def shortage(what: str, needed: int, free: int, kind: str) -> str | None:
    """The reason why ``needed`` of ``free`` bytes cannot be taken, or None."""
    if needed <= MARGIN * free:
        return None
    return f"{what} needs {needed:,} bytes of {kind}; {free:,} are free, of which at most {MARGIN:.0%} may be taken"


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still allocate: the free memory of the machine, or less if a cgroup limits it."""
    meminfo = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    for group, is_v2 in control_groups("memory", root):
        names = ("memory.max", "memory.current", "inactive_file")
        if not is_v2:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        free = min(free, _left_in(group, *names, otherwise=free))
    return max(free, 0)


def _left_in(group: Path, limit: str, usage: str, cache: str, otherwise: int) -> int:
    """Bytes left under a cgroup's limit. The file cache that the kernel would drop first counts as free."""
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return otherwise
    return otherwise if most == "max" else int(most) - used + int(statistics.get(cache, 0))
