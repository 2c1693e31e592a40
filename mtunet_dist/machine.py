"""What of the machine is this process's to use. Imports nothing: commands that need no torch start without it."""

from __future__ import annotations

import os


def cpus() -> int:
    """CPU cores that this process may use, which a job or container may have fewer of than the machine."""
    return len(os.sched_getaffinity(0))
