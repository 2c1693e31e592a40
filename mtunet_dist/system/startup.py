"""The first steps of a command, before it imports anything slow, above all torch.

A library must not change the program that imports it. Therefore this runs only where a command of this package starts:
``mtunet VERB``, ``python -m mtunet_dist.VERB`` or a script of the repository.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from itertools import pairwise

from mtunet_dist.system.machine import affinity, cpus
from mtunet_dist.system.terminal import end_on_interrupt

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # each of them sets how OpenMP's threads wait


def begin() -> None:
    """Set up Ctrl-C, so that it prints no traceback while modules are imported, and OpenMP's threads for this
    machine."""
    end_on_interrupt()
    set_threads(os.environ)
    # When Ctrl-C ends a process at once, the child process that tracks shared memory would print a warning.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")


def set_threads(environment: MutableMapping[str, str]) -> None:
    """Set in ``environment`` how OpenMP's threads wait, and under a quota how many there are. Existing values stay.

    torch reads these variables when it is loaded, here or in another process. By default libgomp's threads spin while
    they wait for work, and take the cores from threads that have work. Next to other programs this makes a training
    five times slower (docs/distributed.md). OpenMP knows which cores a process may use, but not a container's share of
    their time.
    """
    if not any(name in environment for name in WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    if cpus() < affinity():
        environment.setdefault("OMP_NUM_THREADS", str(cpus()))


def is_module_of(package: str, words: list[str]) -> bool:
    """Whether ``words``, from ``sys.orig_argv``, start a module of ``package`` with ``-m``."""
    return any(word.startswith(f"{package}.") for before, word in pairwise(words) if before == "-m")
