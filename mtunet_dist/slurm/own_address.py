"""Print this node's address as another node reaches it: ``python -m mtunet_dist.slurm.own_address OTHER``.

The batch scripts call it first and give the address to the other nodes, which meet there.
"""

from __future__ import annotations

import sys

from mtunet_dist.errors import InputError
from mtunet_dist.system.addresses import numbers_of, source_towards
from mtunet_dist.system.command import command


@command
def main() -> None:
    """The command line."""
    other = sys.argv[1]
    try:
        print(source_towards(numbers_of(other)))
    except OSError as error:
        raise InputError(f"this node does not know {other}, another node of the job: {error.strerror}") from None


if __name__ == "__main__":
    main()
