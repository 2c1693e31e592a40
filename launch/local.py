"""Train on this machine, one process per GPU (or ``--nproc``): ``python launch/local.py CONFIG key=value...``.

The same as ``torchrun --standalone --nproc-per-node=N -m mtunet_dist.train CONFIG key=value...``, except that the
config is checked before any process starts and an error stays one line.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from mtunet_dist.config import load_config
from mtunet_dist.errors import command


def default_processes() -> int:
    """One per GPU; without one, two on the CPU cores there are."""
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


@command
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=default_processes(), help="processes (default: one per GPU)")
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    load_config(args.config, args.overrides)
    # Left alone torchrun gives every process one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.nproc)))
    worker = ["-m", "mtunet_dist.train", str(args.config), *args.overrides]
    torchrun = get_args_parser().parse_args(["--standalone", f"--nproc-per-node={args.nproc}", *worker])
    try:
        run(torchrun)
    except ChildFailedError as failure:
        # The process that failed first has said why; torchrun then ended the others.
        _, first = failure.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)


if __name__ == "__main__":
    main()
