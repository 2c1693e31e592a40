"""Print this node's address as another node reaches it: ``python slurm/own_address.py OTHER``, a name or an address.

The batch scripts call it first and give the address to the other nodes, which meet there.
"""

from __future__ import annotations

import sys

from mtunet_dist.addresses import numbers_of, source_towards
from mtunet_dist.errors import InputError, command


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
