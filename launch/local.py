"""Train on this machine, one process per GPU (or ``--nproc``): ``python launch/local.py CONFIG key=value...``.

The same as ``torchrun --standalone --nproc-per-node=N -m mtunet_dist.train CONFIG key=value...``, except that N need
not be given, the config is checked before any process starts, and an error stays one line.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from mtunet_dist.config import Config, load_config
from mtunet_dist.errors import PREEMPTED, InputError, command
from mtunet_dist.preemption import SIGNALS

# torchrun's own list lacks the last two, and it dies of them.
PASSED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


def default_processes(config: Config) -> int:
    """One per GPU, or two on the CPU cores there are; says so if the batch can be shared among fewer only."""
    gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    wanted = gpus or min(2, cpus())
    samples = config.batch_size // config.optim.accumulate
    count = max(n for n in range(1, wanted + 1) if samples % n == 0)
    if count < wanted:
        print(f"processes: {count}, not {wanted}, as a micro-batch of {samples} samples cannot be shared among more")
    return count


def cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@command
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, help="processes (default: one per GPU that the batch can be shared among)")
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    if args.nproc is not None and args.nproc < 1:
        raise InputError(f"--nproc={args.nproc} must be at least 1")
    processes = args.nproc or default_processes(config)
    # Left alone torchrun gives every process one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus() // processes)))
    worker = ["-m", "mtunet_dist.train", str(args.config), *args.overrides]
    options = ["--standalone", f"--nproc-per-node={processes}", f"--signals-to-handle={PASSED_ON}"]
    torchrun = get_args_parser().parse_args([*options, *worker])
    try:
        run(torchrun)
    except SignalException as request:
        # It went on to the processes, which had half a minute to write a checkpoint.
        sys.exit(PREEMPTED if request.sigval in SIGNALS else 128 + request.sigval)
    except ChildFailedError as failure:
        # The process that failed first has said why; torchrun then ended the others.
        _, first = failure.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)


if __name__ == "__main__":
    main()
