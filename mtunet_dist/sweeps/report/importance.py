"""Which parameters of a sweep matter more than chance would show among so few trials."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator

from mtunet_dist.sweeps.config import Sweep
from mtunet_dist.sweeps.folder import Trial
from mtunet_dist.sweeps.ranking import text
from mtunet_dist.sweeps.space import Dimension

MIN_TRIALS = 12  # with fewer, the best quarter is one or two trials
BEST = 0.25  # the share of trials that count as good
SHUFFLES = 99
CHANCE = 0.95  # share of the shuffles that show less than the limit of chance


@dataclass(frozen=True)
class Importance:
    """How much a goal depends on a parameter, over the trials in which the parameter is active."""

    trials: int
    strength: float  # 1 = what chance reaches in one of twenty cases; nan with fewer than MIN_TRIALS
    good: tuple[Any, ...]  # its values in the best quarter of these trials


@dataclass(frozen=True)
class Importances:
    """The parameters for each goal, the most important first."""

    epoch: int | None  # compare the values after this epoch; None: of each trial's last evaluation
    by_goal: dict[str, dict[str, Importance]]


def importances(trials: Sequence[Trial], sweep: Sweep) -> Importances | None:
    """Judge each parameter. None if trials have taken over others' weights, because their values then belong to several
    settings.

    The importance is that of PED-ANOVA (Watanabe, Bansal, Hutter, IJCAI 2023): the distance between a parameter's
    distribution among the best quarter of the trials and among all. It is divided by the distance that the same trials
    show when their values are shuffled. A conditional parameter is judged among the trials that have it, and the best
    quarter is then taken among these.
    """
    if any(trial.history for trial in trials):
        return None
    epoch, metrics = _comparable(trials)
    dimensions = sweep.dimensions
    by_goal = {}
    for number, goal in enumerate(sweep.objective.goals):
        sign = -1 if goal.mode == "max" else 1
        losses = {id: sign * sweep.objective.values(of_trial)[number] for id, of_trial in metrics.items()}
        known = [trial for trial in trials if not math.isnan(losses.get(trial.id, math.nan))]
        found: dict[str, Importance] = {}
        for keys, group in _groups(known, list(dimensions)):
            found |= _judge({key: dimensions[key] for key in keys}, group, losses)
        by_goal[goal.name] = dict(sorted(found.items(), key=lambda item: -_or_zero(item[1].strength)))
    return Importances(epoch, by_goal)


def _comparable(trials: Sequence[Trial]) -> tuple[int | None, dict[str, dict[str, float]]]:
    """The epoch after which trials are compared (None: the end) and, by trial, the metrics then.

    If some trials were stopped because they were worse, their last values belong to other epochs, and the remaining
    trials alone are a selection. Therefore all are compared at the last epoch that each of them has reached. Failed
    trials are left out, and unfinished ones that have not got there.
    """
    ended = [t for t in trials if t.status in ("finished", "stopped") and t.evaluations]
    if all(trial.status == "finished" for trial in ended):
        return None, {trial.id: trial.evaluations[-1].metrics for trial in ended}
    epochs = set.intersection(*({e.epoch for e in trial.evaluations} for trial in ended))
    epoch = max(epochs, default=0)
    at = [(t.id, e) for t in trials if t.status != "failed" for e in t.evaluations]
    return epoch, {id: evaluation.metrics for id, evaluation in at if evaluation.epoch == epoch}


def _groups(trials: Sequence[Trial], names: Sequence[str]) -> list[tuple[list[str], list[Trial]]]:
    """The parameters in groups: those of a group are active in the same trials."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for key in names:
        groups.setdefault(tuple(t.id for t in trials if key in t.parameters), []).append(key)
    return [(keys, [t for t in trials if t.id in ids]) for ids, keys in groups.items()]


def _judge(
    dimensions: Mapping[str, Dimension], trials: Sequence[Trial], losses: Mapping[str, float]
) -> dict[str, Importance]:
    """The importance of each parameter among ``trials``, in all of which it is active."""
    keys = list(dimensions)
    ordered = sorted(trials, key=lambda trial: losses[trial.id])
    best = ordered[: math.ceil(BEST * len(ordered))]
    good = {key: tuple(trial.parameters[key] for trial in best) for key in keys}
    if len(trials) < MIN_TRIALS:
        return {key: Importance(len(trials), math.nan, good[key]) for key in keys}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    distributions = {key: _distribution(dimensions[key], [t.parameters[key] for t in trials]) for key in keys}
    for trial in trials:
        point = {key: _coordinate(dimensions[key], trial.parameters[key]) for key in keys}
        study.add_trial(optuna.create_trial(params=point, distributions=distributions, value=losses[trial.id]))
    values = [losses[trial.id] for trial in trials]
    real, rng = _ped_anova(study, keys, values), random.Random(0)
    shuffled = [_ped_anova(study, keys, rng.sample(values, len(values))) for _ in range(SHUFFLES)]
    found = {}
    for key in keys:
        chance = sorted(scores[key] for scores in shuffled)[math.ceil(CHANCE * SHUFFLES) - 1]
        found[key] = Importance(len(trials), real[key] / chance if chance else 0.0, good[key])
    return found


def _ped_anova(study: optuna.Study, keys: Sequence[str], losses: Sequence[float]) -> dict[str, float]:
    evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lower values are better
        return evaluator.evaluate(study, list(keys), target=lambda trial: losses[trial.number])


def _distribution(dimension: Dimension, values: Sequence[Any]) -> BaseDistribution:
    if dimension.kind == "choice":
        return CategoricalDistribution(list(dict.fromkeys(map(text, dimension.values))))
    low, high = dimension.values
    return FloatDistribution(min(low, *values), max(high, *values), log=dimension.kind.startswith("log"))


def _coordinate(dimension: Dimension, value: Any) -> str | float:
    return text(value) if dimension.kind == "choice" else float(value)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
