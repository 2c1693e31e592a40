"""What a command does before it imports anything that takes long, above all torch.

A library must not do this to the program that imports it: it happens where one of this package's commands is started,
as ``mtunet VERB``, ``python -m mtunet_dist.VERB`` or a script of the repository.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from itertools import pairwise

from mtunet_dist.machine import affinity, cpus
from mtunet_dist.terminal import end_on_interrupt

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them says how OpenMP's threads wait


def begin() -> None:
    """Ctrl-C gives no traceback while modules are imported; OpenMP's threads suit the machine."""
    end_on_interrupt()
    set_threads(os.environ)
    # Python's tracker of shared memory, a child, would say so for each process that ends at once on Ctrl-C.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")


def set_threads(environment: MutableMapping[str, str]) -> None:
    """Say in ``environment``, where it does not, how OpenMP's threads wait, and how many there are under a quota.

    Read when torch is loaded, here or in another process. Threads that spin while they wait for work, as libgomp's do,
    take the cores from those that have some: where other programs run they make a training five times slower
    (docs/distributed.md). OpenMP knows of the cores of a process, not of a container's share of their time.
    """
    if not any(name in environment for name in WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    if cpus() < affinity():
        environment.setdefault("OMP_NUM_THREADS", str(cpus()))


def is_module_of(package: str, words: list[str]) -> bool:
    """Whether ``words``, of ``sys.orig_argv``, start a module of ``package`` with ``-m``."""
    return any(word.startswith(f"{package}.") for before, word in pairwise(words) if before == "-m")
