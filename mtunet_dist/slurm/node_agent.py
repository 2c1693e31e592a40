"""The agent of one node: ``python -m mtunet_dist.slurm.node_agent [torchrun's options] -m mtunet_dist.train CONFIG``.

It is torchrun with exit codes that a batch script can use. It passes SIGTERM, SIGUSR1 and SIGUSR2 on to the processes
and waits while they write a checkpoint; Slurm sets the time limit for this. The exit code is that of the process that
failed first, or 75 after a stop on request.

If ``MTUNET_EXIT_FILE`` is set (to the same path on all nodes), the exit code is 0 instead of 75, because ``srun
--kill-on-bad-exit`` would kill the nodes that still write. Node 0 then writes the line ``CODE CHECKPOINT RESTART`` to
that file: the exit code before this change, the name of the run's newest checkpoint or ``none``, and how often Slurm
had queued the job again. If this node is cut off, the next restart may already have begun.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from mtunet_dist.errors import InputError
from mtunet_dist.system.command import PREEMPTED
from mtunet_dist.system.preemption import SIGNALS


def pass_on(number: int, frame: FrameType | None) -> None:
    """Send a request to stop to the processes. If there are none, there is nothing to save."""
    children = [int(word) for file in Path("/proc/self/task").glob("*/children") for word in file.read_text().split()]
    if not children:
        sys.exit(PREEMPTED)
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, number)


def run(words: list[str]) -> int:
    """Run torchrun with ``words`` and return its exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    torchrun = get_args_parser().parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *words])
    try:
        run(torchrun)
    except SignalException as request:
        return 128 + int(request.sigval)
    except ChildFailedError as failure:
        # The process that failed first has printed the error; torchrun then ended the others.
        _, first = failure.get_first_failure()
        # The stop came before the process could handle it: there was nothing to save.
        if -first.exitcode in SIGNALS:
            return PREEMPTED
        return int(first.exitcode) if first.exitcode > 0 else 128 - int(first.exitcode)
    return 0


def newest_checkpoint(words: list[str]) -> str:
    """Name of the newest checkpoint of the run or reproduction that ``words`` describe, or ``none``."""
    from mtunet_dist.config import load_config
    from mtunet_dist.runs.checkpoint import by_age

    if "mtunet_dist.reproduce" in words:
        from mtunet_dist.reproduce import parser

        out = parser().parse_intermixed_args(words[words.index("mtunet_dist.reproduce") + 1 :]).out
        newest = max(out.glob("**/checkpoints/step_*.pt"), key=lambda file: file.stat().st_mtime, default=None)
        return "none" if newest is None else str(newest.relative_to(out)).replace(" ", "_")
    if "mtunet_dist.train" not in words:
        return "none"
    config, *overrides = words[words.index("mtunet_dist.train") + 1 :]
    try:
        files = by_age(Path(load_config(config, overrides).run_dir) / "checkpoints")
    except InputError:
        return "none"
    return files[0].name if files else "none"


def main() -> None:
    """The command line."""
    for number in SIGNALS:
        signal.signal(number, pass_on)
    words = sys.argv[1:]
    try:
        code = run(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    exit_file = os.environ.get("MTUNET_EXIT_FILE")
    if exit_file and os.environ.get("SLURM_NODEID", "0") == "0":
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        Path(exit_file).write_text(f"{code} {newest_checkpoint(words)} {restart}\n", encoding="utf-8")
    sys.exit(0 if exit_file and code == PREEMPTED else code)


if __name__ == "__main__":
    main()
