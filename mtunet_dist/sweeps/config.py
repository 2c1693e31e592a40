"""The content of a sweep file, and the check of all of it before anything starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mtunet_dist.config import Config, load_config
from mtunet_dist.config.typed_yaml import load_as
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.targets import check_targets
from mtunet_dist.errors import InputError
from mtunet_dist.runs.evaluation import metric_names
from mtunet_dist.sweeps.objective import Objective
from mtunet_dist.sweeps.space import Dimension, Parameters, corners, dimensions_of, grid, words
from mtunet_dist.system.place import SWEEP, SWEEP_SIGNS, own_folder

BASE = "base.yaml"  # in the folder of a sweep: the config from which all trials start
# Keys that population-based training may change in a training that continues from a checkpoint. It must not change keys
# that give the network, the optimiser's state or the order of the samples another shape.
CHANGEABLE = ("optim.", "weighting.", "data.augment.")
NOT_CHANGEABLE = ("optim.name", "optim.accumulate", "weighting.name", "weighting.optimizer", "weighting.window")


@dataclass(frozen=True)
class Asha:
    """scheduler=asha: a trial continues while it is among the best (the best third, say) of the trials that got
    as far."""

    grace_epochs: int = 1  # no trial stops before this epoch
    reduction: int = 3  # one of so many trials continues, at grace_epochs, grace_epochs * reduction, ...


@dataclass(frozen=True)
class Pbt:
    """scheduler=pbt: population-based training. All trials run to the end. The worst copy the weights of the best."""

    interval_epochs: int = 1  # epochs between comparisons
    quantile: float = 0.25  # the share of trials that copy at each comparison, and of those that are copied
    resample: float = 0.25  # how often a new value is drawn at random; otherwise it is the copied one times 1.2 or 0.8


@dataclass(frozen=True)
class Sweep:
    """A sweep file."""

    name: str  # the title of the report
    run_dir: str  # the folder of the sweep; the same command resumes what it holds
    config: str  # the config from which all trials start; relative to the sweep file or to the working folder
    space: dict[str, Any]  # config key -> one of choice, uniform, loguniform, ...: see Dimension in space.py
    objective: Objective = field(default_factory=Objective)
    overrides: tuple[str, ...] = ()  # key=value for all trials

    searcher: Literal["random", "grid", "optuna"] = "random"  # optuna: TPE, which learns from earlier trials
    scheduler: Literal["none", "asha", "pbt"] = "none"
    asha: Asha = field(default_factory=Asha)
    pbt: Pbt = field(default_factory=Pbt)
    seed: int = 0  # of the search; the trainings take their seed from the config

    trials: int = 0  # how many; with grid it must stay 0: there are as many as combinations
    epochs: int = 0  # of each trial; 0 = as the config says
    hours: float = 0.0  # the sweep stops after this time, and the same command resumes it; 0 = no limit

    workers_per_trial: int = 1  # processes of one training, on one or several nodes
    cpus_per_worker: int = 1  # also the number of threads
    gpus_per_worker: float = 0.0  # 0.5 = two trials share one; 0 = train on the CPU, whatever the config's device
    max_concurrent: int = 0  # trials at the same time; 0 = as many as there is room for
    retries: int = 2  # restarts of a trial that runs out of memory or whose process is killed

    @property
    def dir(self) -> Path:
        """The folder of the sweep."""
        return Path(self.run_dir)

    @cached_property
    def dimensions(self) -> dict[str, Dimension]:
        """The space by dotted key. Each key comes after those that it depends on."""
        return dimensions_of(self.space)

    @property
    def count(self) -> int:
        """The number of trials of the sweep."""
        return len(grid(self.dimensions)) if self.searcher == "grid" else self.trials


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep from a YAML file with ``key=value`` overrides. Raises InputError that names what is wrong with it.

    The sweep.yaml of a sweep's folder means the folder where it now lies, even if the folder was moved. A ``run_dir``
    among the overrides has priority.
    """
    sweep = load_as(Sweep, path, overrides)
    folder = own_folder(path, SWEEP, SWEEP_SIGNS)
    named = any(word.startswith("run_dir=") for word in overrides)
    if folder is not None and not named and sweep.dir.resolve() != folder.resolve():
        whole = folder == Path() or str(folder).startswith("~")  # a leading ~ would be read as the home folder
        sweep = dataclasses.replace(sweep, run_dir=str(folder.resolve() if whole else folder))
    least = {"seed": 0, "trials": 0, "epochs": 0, "hours": 0, "workers_per_trial": 1, "cpus_per_worker": 1}
    least |= {"gpus_per_worker": 0, "max_concurrent": 0, "retries": 0}
    least |= {"asha.grace_epochs": 1, "asha.reduction": 2, "pbt.interval_epochs": 1}
    for key, smallest in least.items():
        section, _, name = key.rpartition(".")
        value = getattr(getattr(sweep, section) if section else sweep, name)
        if value < smallest:
            raise InputError(f"{key}={value} must be at least {smallest}")
    if not 0 < sweep.pbt.quantile <= 0.5 or not 0 <= sweep.pbt.resample <= 1:
        raise InputError(
            f"pbt: quantile={sweep.pbt.quantile} must be in (0, 0.5], resample={sweep.pbt.resample} in [0, 1]"
        )
    if sweep.gpus_per_worker > 1:
        raise InputError(
            f"gpus_per_worker={sweep.gpus_per_worker:g} must be at most 1: a process trains on one GPU; "
            "for more GPUs per trial raise workers_per_trial"
        )
    if not sweep.dimensions:
        raise InputError("space is empty; name a config key, such as space.optim.lr.loguniform=[1e-4,1e-2]")
    own = {"run_dir": "each trial gets its own in the sweep's run_dir"}
    if sweep.epochs:
        own["epochs"] = "the sweep's own epochs is set"
    for word in [*sweep.overrides, *(f"{key}=" for key in sweep.dimensions)]:
        if (key := word.partition("=")[0]) in own:
            raise InputError(f"{key} is not for overrides or space: {own[key]}")
    _check_parts(sweep)
    return sweep


def _check_parts(sweep: Sweep) -> None:
    """Check that searcher, scheduler, space and objective fit together."""
    if sweep.workers_per_trial > 1 and sweep.gpus_per_worker not in (0, 1):
        raise InputError(f"gpus_per_worker={sweep.gpus_per_worker} must be 0 or 1 with several workers_per_trial")
    if sweep.searcher == "grid" and sweep.trials:
        raise InputError(f"searcher=grid tries all {sweep.count} combinations; leave out trials={sweep.trials}")
    if sweep.count < 1:
        raise InputError(f"trials={sweep.trials} must be at least 1 with searcher={sweep.searcher}")
    if sweep.scheduler != "none" and len(sweep.objective.goals) > 1:
        raise InputError(f"scheduler={sweep.scheduler} compares one figure; combine=pareto needs scheduler=none")
    if sweep.scheduler != "pbt":
        return
    if sweep.searcher == "optuna":
        raise InputError("scheduler=pbt searches by itself; use searcher=random for where it begins")
    if sweep.max_concurrent:
        raise InputError("scheduler=pbt lets all trials take turns; max_concurrent must be 0")
    if sweep.count < 2:
        raise InputError(f"scheduler=pbt compares trials, and there is {sweep.count}")
    for key, dimension in sweep.dimensions.items():
        if dimension.when:
            raise InputError(f"space.{key}.when: scheduler=pbt needs a space without conditions")
        if not key.startswith(CHANGEABLE) or key in NOT_CHANGEABLE:
            raise InputError(
                f"space.{key} cannot change within a training, as scheduler=pbt makes it; what can begins with "
                f"{', '.join(CHANGEABLE)} and is none of {', '.join(NOT_CHANGEABLE)}"
            )


def find_config(sweep: Sweep, sweep_file: Path) -> Path:
    """The file that ``sweep.config`` means; in a sweep's folder it is the copy there. Raises InputError if there is
    none."""
    own = own_folder(sweep_file, SWEEP, SWEEP_SIGNS)
    if own is not None and load_as(Sweep, sweep_file).config == sweep.config:
        return own / BASE
    for folder in (sweep_file.parent, Path()):
        if (folder / sweep.config).is_file():
            return folder / sweep.config
    raise InputError(f"config={sweep.config} exists neither beside {sweep_file} nor in the working folder")


def trial_config(sweep: Sweep, base: Path, parameters: Parameters, run_dir: Path) -> Config:
    """The whole config of the trial with these ``parameters`` (config key -> value)."""
    epochs = [f"epochs={sweep.epochs}"] if sweep.epochs else []
    own = words(sweep.dimensions, parameters)
    return load_config(base, [*sweep.overrides, *epochs, *own, f"run_dir={run_dir}"])


def steps_per_epoch(config: Config) -> int:
    """Optimiser steps per epoch. Raises InputError if data and batch size do not fit together."""
    dataset = PreparedDataset(Path(config.data.root))
    split = dataset.split(config.data.train)
    check_targets(dataset.info, config.data.train, config.tasks)
    order = TrainOrder(len(split), batch_size=config.batch_size, accumulate=config.optim.accumulate)
    return order.steps_per_epoch


def metrics_of(config: Config) -> list[str]:
    """The metrics that an evaluation of ``config`` gives."""
    info = PreparedDataset(Path(config.data.root)).info
    return metric_names(info.tasks(config.tasks))


def check_trials(sweep: Sweep, base: Path) -> list[Config]:
    """The configs in which every listed value and range end of ``space`` occurs.

    Raises InputError if one of them is not valid, or does not fit the data, the objective, the scheduler or the
    workers.
    """
    configs = []
    for parameters in corners(sweep.dimensions):
        try:
            config = trial_config(sweep, base, parameters, sweep.dir / "trials")
            steps_per_epoch(config)
            _check_trial(sweep, config)
        except InputError as error:
            shown = ", ".join(f"{k}={json.dumps(v)}" for k, v in parameters.items())
            raise InputError(f"a trial with {shown}: {error}") from None
        configs.append(config)
    for config in {(c.data.root, c.tasks): c for c in configs}.values():
        sweep.objective.check(metrics_of(config))
    return configs


def _check_trial(sweep: Sweep, config: Config) -> None:
    """Check what scheduler and workers require of a trial's config."""
    parts = sweep.workers_per_trial * config.optim.accumulate
    if config.batch_size % parts:
        raise InputError(
            f"batch_size={config.batch_size} must be a multiple of {parts}, workers_per_trial x optim.accumulate"
        )
    if config.device == "cuda" and not sweep.gpus_per_worker:
        raise InputError("device=cuda needs gpus_per_worker > 0")
    if sweep.scheduler == "none":
        return
    every = config.eval_every_epochs
    if not every:
        raise InputError(f"scheduler={sweep.scheduler} compares evaluations, and eval_every_epochs=0 has only the last")
    if sweep.scheduler == "asha" and sweep.asha.grace_epochs > config.epochs:
        raise InputError(f"asha.grace_epochs={sweep.asha.grace_epochs} is beyond epochs={config.epochs}")
    if sweep.scheduler == "pbt" and every % config.checkpoint.every_epochs:
        raise InputError(
            f"scheduler=pbt copies checkpoints: checkpoint.every_epochs={config.checkpoint.every_epochs} must divide "
            f"eval_every_epochs={every}"
        )
