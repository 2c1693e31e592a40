"""The objective of a sweep: one metric, several metrics in one figure, or several goals at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mtunet_dist.core.comparison import DELTA, delta_m, higher_is_better
from mtunet_dist.errors import InputError, closest


@dataclass(frozen=True)
class Goal:
    """A figure that compares trials."""

    name: str
    mode: Literal["max", "min"]


@dataclass(frozen=True)
class Objective:
    """The section ``objective`` of a sweep file.

    The direction follows from the metric: shares (miou, accuracy, delta1) shall be high, errors low.
    """

    metrics: tuple[str, ...] = ("miou",)  # of the evaluation, as in metrics.jsonl
    # How to compare several metrics. delta_m: mean relative gain over ``reference`` in percent, over tasks and the
    # metrics of a task. pareto: no common figure; the sweep ends with the trials that no other trial beats in every
    # metric.
    combine: Literal["delta_m", "pareto"] = "delta_m"
    reference: dict[str, float] = field(default_factory=dict)  # for delta_m: metric -> value of a single-task network

    @property
    def goals(self) -> list[Goal]:
        """One goal, or with ``pareto`` one per metric."""
        if len(self.metrics) > 1 and self.combine == "delta_m":
            return [Goal(DELTA, "max")]
        return [Goal(name, "max" if higher_is_better(name) else "min") for name in self.metrics]

    def values(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """The value of each goal, from an evaluation's ``metrics``; nan where one is not known."""
        goals = self.goals
        if goals[0].name == DELTA:
            return (delta_m(metrics, self.reference, self.metrics),)
        return tuple(metrics.get(goal.name, math.nan) for goal in goals)

    def check(self, known: list[str]) -> None:
        """Raise InputError if evaluations with the metrics ``known`` do not give the objective."""
        if not self.metrics:
            raise InputError(f"objective.metrics lists no metric. Available: {', '.join(known)}")
        for name in self.metrics:
            if name not in known:
                raise InputError(
                    f"objective.metrics: {name} is no metric.{closest(name, known)} Available: {', '.join(known)}"
                )
        if len(self.metrics) == 1 or self.combine == "pareto":
            if self.reference:
                raise InputError("objective.reference is for several metrics with combine=delta_m only")
            return
        for name in self.metrics:
            if not self.reference.get(name, 0.0) > 0:
                got = self.reference.get(name, "nothing")
                raise InputError(
                    f"objective.reference.{name} must be a number > 0, the value of a single-task network; got {got}"
                )
        if extra := set(self.reference) - set(self.metrics):
            raise InputError(f"objective.reference has {', '.join(sorted(extra))}, which objective.metrics lacks")
