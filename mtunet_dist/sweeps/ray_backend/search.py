"""The trials of a sweep: searchers of Ray Tune that can restart from the folder of a sweep.

Tune keeps a searcher's state only in snapshots. Here the searcher learns the state from the folder, so that a sweep
that was killed at any moment continues from there.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from ray import tune
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Searcher

from mtunet_dist.sweeps.config import Sweep
from mtunet_dist.sweeps.folder import Evaluation, Trial, read_trial, read_trials, trial_folder, write_parameters
from mtunet_dist.sweeps.space import Dimension, Parameters, draw, grid, sample

OBJECTIVE = "objective"  # the name under which trials report the figure that schedulers compare
RUNNING_OUT = 1_000_000  # the number of trials for Tune; our searcher decides how many there really are

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def parameters_of(sweep: Sweep) -> list[Parameters]:
    """All trials of a random or grid search."""
    dimensions = sweep.dimensions
    if sweep.searcher == "grid":
        return grid(dimensions)
    return [sample(dimensions, sweep.seed, number) for number in range(sweep.trials)]


def open_trials(sweep: Sweep) -> list[Trial]:
    """Gives out the trials that must run or continue. In random and grid search all are known before the first one
    starts."""
    for number, parameters in enumerate(parameters_of(sweep)):
        folder = trial_folder(sweep.dir, number)
        if not (folder / "trial.json").is_file():
            write_parameters(folder, parameters)
    return [trial for trial in read_trials(sweep.dir)[: sweep.count] if trial.status == "unfinished"]


def search(sweep: Sweep) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the Tuner for the rest of the sweep: its param_space, and those of its TuneConfig.

    A Tune trial's config has the id of the trial as ``trial``. With population-based training it also has the
    parameters, because Tune changes them there.
    """
    if sweep.searcher == "optuna":
        searcher: Any = OptunaSearch(sweep)
        if sweep.max_concurrent:
            searcher = ConcurrencyLimiter(searcher, sweep.max_concurrent)
        return {}, {"search_alg": searcher, "num_samples": RUNNING_OUT}
    known = {trial.id: trial.parameters for trial in open_trials(sweep)}
    space: dict[str, Any] = {"trial": tune.grid_search(list(known))}
    if sweep.scheduler == "pbt":
        for key in sweep.dimensions:
            space[key] = tune.sample_from(lambda spec, key=key: known[spec.config["trial"]][key])
    return space, {"search_alg": BasicVariantGenerator(max_concurrent=sweep.max_concurrent)}


class OptunaSearch(Searcher):  # type: ignore[misc]
    """Optuna's TPE over a space with conditions. With several goals it is the multi-objective TPE.

    Ray's own OptunaSearch cannot learn earlier trials if the space has conditions. Trials that ASHA stopped count with
    their last value, as Optuna's pruned trials do. Failed trials do not count.
    """

    def __init__(self, sweep: Sweep) -> None:
        goals = sweep.objective.goals
        super().__init__(metric=OBJECTIVE, mode=goals[0].mode)
        self.sweep = sweep
        self.ids: dict[str, str] = {}  # Tune's id -> our id
        self.asked: dict[str, optuna.trial.Trial] = {}  # our id -> Optuna's trial, of the running trials
        self.reported: set[tuple[str, int]] = set()  # trial and epoch; a restarted trial repeats some
        before = read_trials(sweep.dir)
        # Use a new seed each time. Otherwise the first trials, which are random, would come again.
        sampler = optuna.samplers.TPESampler(
            seed=sweep.seed * 1_000_003 + len(before),
            n_startup_trials=max(4, min(10, sweep.trials // 3)),
            multivariate=True,
            group=True,  # for conditions
            constant_liar=True,  # keeps simultaneous trials apart
        )
        to = optuna.study.StudyDirection
        directions = [to.MAXIMIZE if goal.mode == "max" else to.MINIMIZE for goal in goals]
        self.study = optuna.create_study(sampler=sampler, directions=directions)
        for trial in before:
            if trial.status != "unfinished":
                self.study.add_trial(self._frozen(trial))
        self.waiting = [trial for trial in before if trial.status == "unfinished"]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The id of the next trial. Its parameters are in its folder."""
        if self.waiting:
            trial = self.waiting.pop(0)
            self.study.enqueue_trial(self._encoded(trial.parameters))
            self.asked[trial.id] = asked = self.study.ask()
            draw(self.sweep.dimensions, lambda key, dimension: _suggest(asked, key, dimension))
            self.ids[trial_id] = trial.id
            return {"trial": trial.id}
        # Not the number of trials: one may have been deleted, so that it is tried again.
        folders = (trial_folder(self.sweep.dir, number) for number in range(self.sweep.trials))
        folder = next((folder for folder in folders if not (folder / "trial.json").is_file()), None)
        if folder is None:
            finished: str = Searcher.FINISHED
            return finished
        asked = self.study.ask()
        write_parameters(folder, draw(self.sweep.dimensions, lambda key, d: _suggest(asked, key, d)))
        self.asked[folder.name], self.ids[trial_id] = asked, folder.name
        return {"trial": folder.name}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The trial has an evaluation. TPE learns from it if the trial is stopped later."""
        name, value = self.ids[trial_id], result.get(OBJECTIVE, math.nan)
        if len(self.study.directions) > 1 or math.isnan(value) or (name, result["epoch"]) in self.reported:
            return
        self.reported.add((name, result["epoch"]))
        self.asked[name].report(value, result["epoch"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The trial has finished, stopped or failed."""
        name = self.ids.pop(trial_id)
        asked = self.asked.pop(name)
        trial = read_trial(self.sweep.dir / "trials" / name)
        values = self._values(trial)
        if error or trial.status == "failed" or values is None:
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        elif trial.status == "finished":
            self.study.tell(asked, values)
        elif len(values) == 1:
            self.study.tell(asked, state=optuna.trial.TrialState.PRUNED)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the folder of the sweep is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called: Tune restores no sweep."""
        raise NotImplementedError

    def _values(self, trial: Trial) -> tuple[float, ...] | None:
        values = self.sweep.objective.values(trial.last.metrics) if trial.last else (math.nan,)
        return None if any(math.isnan(value) for value in values) else values

    def _frozen(self, trial: Trial) -> optuna.trial.FrozenTrial:
        """An earlier trial in Optuna's form."""
        dimensions = {key: d for key, d in self.sweep.dimensions.items() if key in trial.parameters}
        values, states = self._values(trial), optuna.trial.TrialState
        if trial.status == "failed" or values is None:
            state = states.FAIL
        elif trial.status == "finished":
            state = states.COMPLETE
        else:
            state = states.PRUNED
        steps = {} if len(self.sweep.objective.goals) > 1 else self._steps(trial.evaluations)
        return optuna.trial.create_trial(
            state=state,
            values=list(values) if values is not None and state == states.COMPLETE else None,
            params=self._encoded(trial.parameters),
            distributions={key: _distribution(dimension) for key, dimension in dimensions.items()},
            intermediate_values=steps,
        )

    def _steps(self, evaluations: tuple[Evaluation, ...]) -> dict[int, float]:
        values = {e.epoch: self.sweep.objective.values(e.metrics)[0] for e in evaluations}
        return {epoch: value for epoch, value in values.items() if not math.isnan(value)}

    def _encoded(self, parameters: Parameters) -> Parameters:
        return {key: _encode(self.sweep.dimensions[key], value) for key, value in parameters.items()}


def _encode(dimension: Dimension, value: Any) -> Any:
    """A value in Optuna's form, which has no lists."""
    return json.dumps(value) if dimension.kind == "choice" else value


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    if dimension.kind == "choice":
        return optuna.distributions.CategoricalDistribution([_encode(dimension, v) for v in dimension.values])
    low, high = dimension.values
    if dimension.kind in ("integer", "loginteger"):
        return optuna.distributions.IntDistribution(low, high, log=dimension.is_log)
    return optuna.distributions.FloatDistribution(low, high, log=dimension.is_log)


def _suggest(asked: optuna.trial.Trial, key: str, dimension: Dimension) -> Any:
    """The value that Optuna proposes for one dimension."""
    if dimension.kind == "choice":
        return json.loads(asked.suggest_categorical(key, [_encode(dimension, v) for v in dimension.values]))
    low, high = dimension.values
    if dimension.kind in ("integer", "loginteger"):
        return asked.suggest_int(key, low, high, log=dimension.is_log)
    return asked.suggest_float(key, low, high, log=dimension.is_log)


def active_parameters(config: Mapping[str, Any]) -> Parameters:
    """The parameters in a Tune trial's config, if it has them."""
    return {key: value for key, value in config.items() if key != "trial"}
