"""Become ``python WORD...``, killed by the kernel when its parent ends: ``python launch/worker.py PARENT_PID WORD...``.

A launcher that is killed cannot end its processes, and they would train on: each is started through this.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of linux/prctl.h; outlives exec, not fork


def main() -> None:
    """The command line."""
    parent, *words = sys.argv[1:]
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or os.getppid() != int(parent):
        sys.exit(f"the launcher, process {parent}, has ended")  # before it was asked for
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    main()
