"""A training in which faults happen: ``torchrun ... tests/faults/worker.py PLAN CONFIG key=value...``.

PLAN is a folder with a JSON file per fault, ``{"place", "count", "rank"}``. A process takes the first of them that has
not happened yet, and where the count-th call since its start would begin at that place, it marks the fault as happened
and kills itself with SIGKILL (or stops itself, with SIGSTOP, if ``place`` is "stopped").
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from mtunet_dist.runs import checkpoint
from mtunet_dist.strategies.ddp import DDPStrategy
from mtunet_dist.tasks.segmentation import SegmentationMetric
from mtunet_dist.train import main


def arm(plan: Path) -> None:
    """Wait for the next fault of the plan, if it is for this rank."""
    waiting = sorted(plan.glob("*.json"))
    if not waiting:
        return
    fault = json.loads(waiting[0].read_text())
    if fault["rank"] == int(os.environ["RANK"]):
        PLACES[fault["place"]](functools.partial(_happen, waiting[0], fault["place"]), fault["count"])


def _happen(file: Path, place: str) -> None:
    file.rename(file.with_suffix(".happened"))
    os.kill(os.getpid(), signal.SIGSTOP if place == "stopped" else signal.SIGKILL)


def _at(owner: Any, name: str, *, after: bool = False) -> Callable[[Callable[[], None], int], None]:
    """A place: the moment before, or ``after``, ``owner.name`` is called."""

    def arm_at(happen: Callable[[], None], count: int) -> None:
        original, calls = getattr(owner, name), itertools.count(1)

        def counted(*args: Any, **options: Any) -> Any:
            now = next(calls) == count
            if now and not after:
                happen()
            result = original(*args, **options)
            if now:
                happen()
            return result

        setattr(owner, name, counted)

    return arm_at


def _in_all_reduce(happen: Callable[[], None], count: int) -> None:
    """A place: a reduction has begun, and the other rank is, or will be, waiting for it."""
    reduce, calls = torch.distributed.all_reduce, itertools.count(1)

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if next(calls) == count:
            reduce(tensor, async_op=True)
            happen()
        return reduce(tensor, *args, **options)

    torch.distributed.all_reduce = counted


def _half_written(happen: Callable[[], None], count: int) -> None:
    """A place: half a checkpoint is on disk."""
    save, calls = torch.save, itertools.count(1)

    def counted(state: Any, file: Any, **options: Any) -> None:
        if isinstance(state, dict) and next(calls) == count:  # else it is a tensor that is being pickled
            whole = io.BytesIO()
            save(state, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            happen()
        save(state, file, **options)

    torch.save = counted


PLACES = {
    "in a step": _at(DDPStrategy, "backward"),
    "in all-reduce": _in_all_reduce,
    "saving: half written": _half_written,
    "saving: written, not named": _at(os, "fsync"),
    "saving: best named, newest not": _at(checkpoint, "publish", after=True),
    "in evaluation": _at(SegmentationMetric, "update"),
    "stopped": _at(DDPStrategy, "backward"),
}

if __name__ == "__main__":
    arm(Path(sys.argv.pop(1)))
    main()
