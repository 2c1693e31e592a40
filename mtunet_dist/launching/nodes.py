"""What the options of many nodes mean: how many nodes, how they meet, and which of them this one is."""

from __future__ import annotations

import argparse
import os

from mtunet_dist.config import Config
from mtunet_dist.errors import InputError
from mtunet_dist.launching import agent, network
from mtunet_dist.system.addresses import interfaces, source_towards, use_interface

ELASTIC_RESTARTS = 3  # default; each lost node takes one


def node_range(text: str) -> tuple[int, int]:
    """Parse ``N`` or ``LEAST:MOST``. Raises InputError."""
    words = text.split(":")
    if not 1 <= len(words) <= 2 or not all(word.isdecimal() for word in words):
        raise InputError(f"--nnodes={text} is neither a number of nodes nor LEAST:MOST")
    least, most = int(words[0]), int(words[-1])
    if not 1 <= least <= most:
        raise InputError(f"--nnodes={text} must be 1 or more, LEAST not above MOST")
    return least, most


def check_rendezvous(way: str, node_rank: int | None, nodes: tuple[int, int]) -> None:
    """Raise InputError if the options do not fit together."""
    if way == "c10d" and node_rank is not None:
        raise InputError(f"--node-rank={node_rank} is for --rdzv=static; with c10d the nodes agree on their ranks")
    if way == "static" and nodes[0] != nodes[1]:
        raise InputError(f"--rdzv=static needs a fixed number of nodes, not {nodes[0]}:{nodes[1]}; use --rdzv=c10d")


def static_rank(given: int | None, count: int, *, on_head: bool) -> int:
    """This node's rank among ``count``: 0 on the head, 1 on the other of two nodes, else ``given``.

    Raises InputError if the rank is missing, out of range, or belongs to the head.
    """
    if given is None:
        if on_head:
            return 0
        if count == 2:
            return 1
        raise InputError(
            f"--node-rank is missing: this node is not the head, so 1 to {count - 1}, another on each node"
        )
    if not 0 <= given < count:
        raise InputError(f"--node-rank={given} is not within 0 to {count - 1}, for --nnodes={count}")
    if given == 0 and not on_head:
        raise InputError("--node-rank=0 is the head's, and the address of --head is none of this node's")
    return given


def job_of(args: argparse.Namespace, config: Config) -> agent.Job:
    """This node's part of the job that the options of ``mtunet launch --head HOST`` describe.

    Finds this node's interface and address by its route to the head, and makes the processes use them. Waits for the
    head. Raises InputError for options that cannot be, and if the head does not answer.
    """
    nodes = node_range(args.nnodes)
    rdzv = args.rdzv or "c10d"
    check_rendezvous(rdzv, args.node_rank, nodes)
    processes = agent.processes_per_node(config, args.nproc, nodes)
    max_restarts = agent.restarts(args.max_restarts, default=0 if nodes[0] == nodes[1] else ELASTIC_RESTARTS)

    head = network.resolve(args.head)
    present = interfaces()
    wanted = args.interface or os.environ.get("GLOO_SOCKET_IFNAME") or network.way_out(args.head, head, present)
    interface, address = network.choose(head, wanted, present, source_towards(head.address))
    is_host = network.is_here(head, present)
    node_rank = None
    if rdzv == "static":
        node_rank = static_rank(args.node_rank, nodes[1], on_head=is_host)
        is_host = node_rank == 0
    use_interface(interface, force=args.interface is not None)
    if is_host:
        network.check_free(head)
    else:
        network.wait_for(head, agent.PATIENCE_S)
    who = "" if node_rank is None else f"node {node_rank}, "
    print(f"{who}{interface} {address}, {processes} processes; {rdzv} rendezvous at {head}", flush=True)
    return agent.Job(
        run_id=config.run_dir,
        head=head,
        is_host=is_host,
        address=address,
        nodes=nodes,
        node_rank=node_rank,
        processes=processes,
        max_restarts=max_restarts,
        words=(str(args.config), *args.overrides),
    )
