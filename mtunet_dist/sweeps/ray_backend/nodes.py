"""The nodes of a running Ray: which of them have joined, and the wait for the others."""

from __future__ import annotations

import sys
import time
from typing import Any

import ray

JOIN_S = 300.0  # slurm/sweep.sbatch gives Ray the same time to start on a node


def wait_for_nodes(address: str, expected: int | None) -> None:
    """Wait until ``expected`` nodes have joined the Ray at ``address``, and print their names. None means no wait.

    If fewer have joined after ``JOIN_S``, ends the command with exit code 1. Otherwise the sweep would run for days
    without the missing nodes.
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
    """The names of the nodes that are alive."""
    return sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeManagerHostname"]))


def described(nodes: list[dict[str, Any]]) -> str:
    """Name, address and resources of a node."""
    return ", ".join(
        f"{node['NodeManagerHostname']} {node['NodeManagerAddress']} "
        f"({node['Resources'].get('CPU', 0):g} CPUs, {node['Resources'].get('GPU', 0):g} GPUs)"
        for node in nodes
    )
