"""A process that ends when its parent process ends, in any way. Otherwise its work would continue unseen."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

BORN = (os.getpid(), os.getppid())  # a forked process has other numbers
PR_SET_PDEATHSIG = 1  # from linux/prctl.h; stays after exec, but not after fork


def end_with_parent(parent: int | None = None) -> None:
    """From now on the kernel kills this process when its parent process ends (``parent``, if the number is known)."""
    if parent is None:
        parent = BORN[1] if os.getpid() == BORN[0] else os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has already ended
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run a command that is killed when the process PARENT_PID ends: ``python -m mtunet_dist.system.children PARENT_PID
    WORD...``."""
    parent, *words = sys.argv[1:]
    end_with_parent(int(parent))
    os.execvp(words[0], words)


if __name__ == "__main__":
    main()
