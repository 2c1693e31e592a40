"""Train on this machine, or on many: ``mtunet launch CONFIG key=value...``.

On one machine it starts one process per GPU, or ``--nproc``. On many nodes the same command runs on each::

    mtunet launch --head HOST --nnodes N CONFIG key=value...

HOST is one of the nodes. The command finds the interface, the addresses and the numbers of processes and threads;
docs/distributed.md has examples. All nodes need the same code, config and data, and a run folder on a shared disk.

``torchrun -m mtunet_dist.train CONFIG`` trains too. This command also chooses the number of processes, checks the
config before any process starts, and prints an error as one line. Its ``--max-restarts`` does not repeat a failure that
would come again (see launching/agent.py).
"""

from __future__ import annotations

import argparse
import sys
import uuid

from mtunet_dist.config import Config, load_config
from mtunet_dist.errors import InputError
from mtunet_dist.launching import agent, nodes
from mtunet_dist.launching.network import Endpoint
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = arguments.parser("launch", __doc__.splitlines()[0])
    made.add_argument("--nproc", type=int, help="processes per node (default: one per GPU that the batch suits)")
    made.add_argument("--max-restarts", type=int, metavar="R", help="start again after R failures at most")
    many = made.add_argument_group("many nodes")
    many.add_argument("--head", metavar="HOST[:PORT]", help="a node that all others can reach")
    many.add_argument("--nnodes", metavar="N|LEAST:MOST", help="a range lets nodes come and go")
    many.add_argument("--rdzv", choices=("c10d", "static"), help="how they meet (default: c10d)")
    many.add_argument("--node-rank", type=int, metavar="I", help="with static, if there are more than two nodes")
    many.add_argument("--interface", metavar="IF", help="network interface (default: that of the route to the head)")
    made.add_argument("config", type=arguments.path, metavar="CONFIG")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    return made


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError if only some of the options of many nodes are given."""
    of_many = ("nnodes", "rdzv", "node_rank", "interface")
    given = [f"--{name.replace('_', '-')}" for name in of_many if getattr(args, name) is not None]
    if args.head is None and given:
        raise InputError(f"{given[0]} is for many nodes, which meet at a head; --head=HOST names it")
    if args.head is not None and args.nnodes is None:
        raise InputError("--nnodes is missing: the number of nodes, or LEAST:MOST")


def local_job(args: argparse.Namespace, config: Config) -> agent.Job:
    """A job on this machine alone."""
    return agent.Job(
        run_id=uuid.uuid4().hex,
        head=Endpoint("127.0.0.1", 0),
        is_host=True,
        address="127.0.0.1",
        nodes=(1, 1),
        node_rank=None,
        processes=agent.processes_per_node(config, args.nproc),
        max_restarts=agent.restarts(args.max_restarts, default=0),
        words=(str(args.config), *args.overrides),
    )


@command
def main() -> None:
    """The command line."""
    args = parser().parse_args()
    check_options(args)
    config = load_config(args.config, args.overrides)
    job = local_job(args, config) if args.head is None else nodes.job_of(args, config)
    sys.exit(agent.run(job))


if __name__ == "__main__":
    main()
