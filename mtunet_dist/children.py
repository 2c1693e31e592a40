"""A process that does not outlive the one that started it, however that ends: what it did would go on unseen."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

BORN = (os.getpid(), os.getppid())  # a fork has others
PR_SET_PDEATHSIG = 1  # of linux/prctl.h; outlives exec, not fork


def end_with_parent(parent: int | None = None) -> None:
    """From now on the kernel kills this process when the one that started it (``parent``, where it is known) ends."""
    if parent is None:
        parent = BORN[1] if os.getpid() == BORN[0] else os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Become WORD..., killed when PARENT_PID ends: ``python -m mtunet_dist.children PARENT_PID WORD...``."""
    parent, *words = sys.argv[1:]
    end_with_parent(int(parent))
    os.execvp(words[0], words)


if __name__ == "__main__":
    main()
