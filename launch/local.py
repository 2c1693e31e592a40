"""Train on this machine, one process per GPU (or ``--nproc``): ``python launch/local.py CONFIG key=value...``.

The same as ``torchrun --standalone --nproc-per-node=N -m mtunet_dist.train CONFIG key=value...``, except that N need
not be given, the config is checked before any process starts, an error is one line, and ``--max-restarts`` does not
repeat a failure that would come again (see agent.py).
"""

from __future__ import annotations

import sys
import uuid

import agent
from mtunet_dist.config import load_config
from mtunet_dist.errors import command
from network import Endpoint


@command
def main() -> None:
    """The command line."""
    args = agent.parser(__doc__.splitlines()[0]).parse_args()
    config = load_config(args.config, args.overrides)
    job = agent.Job(
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
    sys.exit(agent.run(job))


if __name__ == "__main__":
    main()
