"""The nodes of a Ray that runs already: which have joined, and the waiting for those that have not."""

from __future__ import annotations

import sys
import time
from typing import Any

import ray

JOIN_S = 300.0  # as long as slurm/sweep.sbatch lets Ray take to start on a node


def wait_for_nodes(address: str, expected: int | None) -> None:
    """Return when ``expected`` nodes have joined the Ray at ``address``, and say which; at once where none is expected.

    Ends the command, with exit code 1, if fewer have joined in ``JOIN_S``: the sweep would go on without them for days.
    """
    deadline = time.monotonic() + JOIN_S
    while len(present := joined()) < (expected or 1):
        if time.monotonic() > deadline:
            sys.exit(
                f"error: only {len(present)} of {expected} nodes have joined the Ray at {address} in {JOIN_S:.0f} s: "
                f"{described(present)}; what Ray on the others says is in their logs"
            )
        time.sleep(0.5)
    print(f"the Ray at {address} has {len(present)} nodes: {described(present)}", flush=True)


def joined() -> list[dict[str, Any]]:
    """The nodes that are alive, by name."""
    return sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeManagerHostname"]))


def described(nodes: list[dict[str, Any]]) -> str:
    """Name, address, and what a node offers."""
    return ", ".join(
        f"{node['NodeManagerHostname']} {node['NodeManagerAddress']} "
        f"({node['Resources'].get('CPU', 0):g} CPUs, {node['Resources'].get('GPU', 0):g} GPUs)"
        for node in nodes
    )
