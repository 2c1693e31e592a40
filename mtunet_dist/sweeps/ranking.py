"""Which trials of a sweep are better: the order of every table and figure, and the trial to train again."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtunet_dist.sweeps.config import Sweep
from mtunet_dist.sweeps.folder import Trial
from mtunet_dist.sweeps.objective import Goal

ORDER = {"finished": 0, "stopped": 1, "unfinished": 1, "failed": 2}  # a trial that was cut short says less


@dataclass(frozen=True)
class Ranking:
    """The trials of a sweep, best first: finished ones by their last evaluation, then the others by theirs."""

    trials: tuple[Trial, ...]
    best: Trial | None  # the best that finished; if none did, the best that was stopped; None if none has a value
    front: tuple[
        Trial, ...
    ]  # with several goals: those among which ``best`` is chosen that no other beats in every one
    candidates: tuple[Trial, ...]  # ``best`` is chosen among these


def rank(trials: Sequence[Trial], sweep: Sweep) -> Ranking:
    """Order ``trials``. Among several goals the mean relative gain over the median trial decides within the front."""
    candidates: list[Trial] = []
    for status in ("finished", "stopped"):
        candidates = candidates or [t for t in trials if t.status == status and is_known(values_of(t, sweep))]
    front = front_of(candidates, sweep) if len(sweep.objective.goals) > 1 else []
    medians = [statistics.median(column) for column in zip(*(values_of(t, sweep) for t in candidates), strict=True)]

    def key(trial: Trial) -> tuple[int, bool, bool, float, str]:
        values = values_of(trial, sweep)
        known = is_known(values)
        worse = -_merit(values, medians, sweep) if known else 0.0
        return ORDER[trial.status], not known, trial not in front, worse, trial.id

    ordered = sorted(trials, key=key)
    best = next((trial for trial in ordered if trial in candidates), None)
    return Ranking(tuple(ordered), best, tuple(t for t in ordered if t in front), tuple(candidates))


def values_of(trial: Trial, sweep: Sweep) -> tuple[float, ...]:
    """The value of each goal at the trial's last evaluation; nan where there is none."""
    if trial.last is None:
        return (math.nan,) * len(sweep.objective.goals)
    return sweep.objective.values(trial.last.metrics)


def is_known(values: Sequence[float]) -> bool:
    """Whether none of ``values`` is nan."""
    return not any(math.isnan(value) for value in values)


def front_of(trials: Sequence[Trial], sweep: Sweep) -> list[Trial]:
    """Those of ``trials`` (all with known values) for which no other trial is at least equal in every goal and better
    in one."""
    signs = [1 if goal.mode == "max" else -1 for goal in sweep.objective.goals]
    gains = {t.id: [s * v for s, v in zip(signs, values_of(t, sweep), strict=True)] for t in trials}

    def beaten(mine: list[float]) -> bool:
        return any(other != mine and all(o >= m for o, m in zip(other, mine, strict=True)) for other in gains.values())

    return [trial for trial in trials if not beaten(gains[trial.id])]


def limits(values: Sequence[float], goal: Goal) -> tuple[float, float]:
    """Ends of an axis that shows the better values. A few much worse values would press the others into a line."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return 0.0, 1.0
    best, worst = (max(known), min(known)) if goal.mode == "max" else (min(known), max(known))
    middle = statistics.median(known)
    reach = 4 * (middle - best)
    worst = max(worst, best + reach) if goal.mode == "max" else min(worst, best + reach)
    margin = 0.05 * (best - worst) or 0.05 * (abs(best) or 1.0)
    low, high = sorted((worst - margin, best + margin))
    return low, high


def text(value: Any) -> str:
    """A parameter's value as it is written on the command line, in full."""
    return value if isinstance(value, str) else json.dumps(value)


def _merit(values: Sequence[float], medians: Sequence[float], sweep: Sweep) -> float:
    """One number, the higher the better: a single goal's value, else the mean relative gain over ``medians``."""
    signs = [1 if goal.mode == "max" else -1 for goal in sweep.objective.goals]
    if len(signs) == 1 or not medians:
        return signs[0] * values[0]
    return statistics.fmean(s * (v - m) / (abs(m) or 1.0) for s, v, m in zip(signs, values, medians, strict=True))
