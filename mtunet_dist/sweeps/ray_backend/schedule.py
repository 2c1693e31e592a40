"""The schedulers of Ray Tune, which decide which trials continue and with which parameters. They can restart from a
sweep's folder.

Tune does not keep a scheduler's state. Here the scheduler learns it from the folder.
"""

from __future__ import annotations

import random
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from mtunet_dist.sweeps.config import Sweep
from mtunet_dist.sweeps.folder import read_trial, read_trials
from mtunet_dist.sweeps.ray_backend.search import OBJECTIVE
from mtunet_dist.sweeps.space import random_value


def scheduler_of(sweep: Sweep, epochs: int) -> TrialScheduler:
    """Ray Tune's scheduler for trials of at most ``epochs`` epochs."""
    if sweep.scheduler == "asha":
        return Asha(sweep, epochs)
    if sweep.scheduler == "pbt":
        return Population(sweep, epochs)
    return FIFOScheduler()


class Asha(ASHAScheduler):  # type: ignore[misc]
    """Asynchronous successive halving (Li et al., MLSys 2020) that knows earlier trials."""

    def __init__(self, sweep: Sweep, epochs: int) -> None:
        super().__init__(
            "epoch",
            OBJECTIVE,
            sweep.objective.goals[0].mode,
            max_t=epochs,
            grace_period=sweep.asha.grace_epochs,
            reduction_factor=sweep.asha.reduction,
        )
        for trial in read_trials(sweep.dir):
            past = _Known(trial.id)
            super().on_trial_add(None, past)
            for evaluation in trial.evaluations:
                value = sweep.objective.values(evaluation.metrics)[0]
                super().on_trial_result(None, past, {"epoch": evaluation.epoch, OBJECTIVE: value})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A new or continued trial. Its earlier evaluations are known and not judged again."""
        known = _Known(trial.config["trial"])
        if known.trial_id not in self._trial_info:
            super().on_trial_add(tune_controller, known)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial continues."""
        action: str = super().on_trial_result(tune_controller, _Known(trial.config["trial"]), result)
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The trial has finished or stopped."""
        super().on_trial_complete(tune_controller, _Known(trial.config["trial"]), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """The trial will not come back."""
        super().on_trial_remove(tune_controller, _Known(trial.config["trial"]))


class _Known:
    """The part of a trial that ASHA uses, under our id. Tune gives it a new id each time the sweep starts."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """Population-based training (Jaderberg et al., 2017) that keeps values in their range, and the ids of
    trials apart."""

    def __init__(self, sweep: Sweep, epochs: int) -> None:
        exploits = sum(len(trial.history) for trial in read_trials(sweep.dir))
        seed = f"{sweep.seed}/{exploits}"  # a continued sweep must not repeat its draws
        rng = random.Random(seed)
        mutations = {
            key: d.values if d.kind == "choice" else (lambda d=d: random_value(d, rng))
            for key, d in sweep.dimensions.items()
        }

        def within(config: dict[str, Any]) -> dict[str, Any]:
            return {key: sweep.dimensions[key].nearest(v) if key in mutations else v for key, v in config.items()}

        random.seed(f"Tune {seed}")  # Tune draws from this generator
        super().__init__(
            "epoch",
            OBJECTIVE,
            sweep.objective.goals[0].mode,
            perturbation_interval=sweep.pbt.interval_epochs,
            hyperparam_mutations=mutations,
            quantile_fraction=sweep.pbt.quantile,
            resample_probability=sweep.pbt.resample,
            custom_explore_fn=within,
            log_config=False,
            require_attrs=False,
        )
        self.sweep, self.epochs = sweep, epochs

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial continues unchanged. Not asked at its end, because new parameters would have no effect."""
        action: str = TrialScheduler.CONTINUE
        if result.get("epoch", 0) < self.epochs:
            action = super().on_trial_result(tune_controller, trial, result)
        return action

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A new or unfinished trial. Comparisons continue at the same epochs as before."""
        super().on_trial_add(tune_controller, trial)
        before = read_trial(self.sweep.dir / "trials" / trial.config["trial"])
        if before.last is not None:
            interval, state = self.sweep.pbt.interval_epochs, self._trial_state[trial]
            state.last_perturbation_time = before.last.epoch // interval * interval
            state.last_train_time = before.last.epoch

    def _checkpoint_or_exploit(self, trial: Any, tune_controller: Any, upper: list[Any], lower: list[Any]) -> None:
        """Compare the trials. Tune has a checkpoint only of trials that were among the best at their last report."""
        for other in upper:
            if self._trial_state[other].last_checkpoint is None:
                self._trial_state[other].last_checkpoint = other.checkpoint
        super()._checkpoint_or_exploit(trial, tune_controller, upper, lower)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The changed parameters of the other trial, with the trial's own id."""
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return {**config, "trial": trial.config["trial"]}, operations
