"""Comparisons of metrics over tasks: which direction is better, and delta-m."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence

from mtunet_dist import plugins
from mtunet_dist.errors import InputError
from mtunet_dist.tasks._task import Direction

DELTA = "delta_m"  # the name under which the result of ``delta_m`` stands among the metrics


def higher_is_better(name: str) -> bool:
    """Whether a higher value of the metric ``name`` is better. Losses are better when lower. Raises InputError for a
    name that is no metric."""
    if name == DELTA:
        return True
    return not name.startswith("loss/") and _owner(name)[1] == "max"


def task_of(name: str) -> str:
    """The task that the metric ``name`` measures. Raises InputError for a name that is no metric."""
    return name.removeprefix("loss/") if name.startswith("loss/") else _owner(name)[0]


def delta_m(multi: Mapping[str, float], single: Mapping[str, float], names: Sequence[str]) -> float:
    """How much better ``multi`` is than ``single``, relative and in percent. Positive is better; nan if a value is
    unknown.

    The mean over tasks of (-1)^l (M_multi - M_single) / M_single, with l = 1 if lower is better: Maninis, Radosavovic,
    Kokkinos, "Attentive single-tasking of multiple tasks", CVPR 2019. A task with several metrics among ``names``
    counts with their mean, as in LibMTL.
    """
    gains: dict[str, list[float]] = {}
    for name in names:
        value, base = multi.get(name, math.nan), single.get(name, math.nan)
        relative = (value - base) / base if base else math.nan
        gains.setdefault(task_of(name), []).append(relative if higher_is_better(name) else -relative)
    return 100 * statistics.fmean(statistics.fmean(values) for values in gains.values())


def _owner(name: str) -> tuple[str, Direction]:
    """The task of a metric, and the direction. A task that is not named as its kind stands before the metric."""
    kinds = _kinds()
    task, _, metric = name.partition("/")
    for kind, metrics in kinds.items():
        if name in metrics:
            return kind, metrics[name]
    for metrics in kinds.values():
        if metric in metrics:
            return task, metrics[metric]
    known = ", ".join(metric for metrics in kinds.values() for metric in metrics)
    raise InputError(f"unknown metric '{name}'. Available: {known}; TASK/METRIC for a task with another name")


@functools.cache
def _kinds() -> dict[str, dict[str, Direction]]:
    """The metrics of each kind of task."""
    return {kind: plugins.find("task", kind).METRICS for kind in plugins.available("task")}  # type: ignore[attr-defined]
