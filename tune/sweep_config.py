"""What a sweep file may say, and the check of all of it before anything starts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtunet_dist.config import Config, load_as, load_config
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError, closest
from mtunet_dist.evaluate import metric_names
from mtunet_dist.metrics import higher_is_better
from mtunet_dist.multitask import make_tasks


@dataclass(frozen=True)
class Sweep:
    """A sweep file."""

    name: str  # the title of the table
    run_dir: str  # the folder of the sweep; the same command resumes what it holds
    config: str  # the config that all trials start from; relative to the sweep file or to the working folder
    space: dict[str, Any]  # config key -> one of choice, grid, uniform, loguniform: see Dimension
    metric: str  # a metric of the evaluation, as in metrics.jsonl; shares (miou) are to be high, errors low
    overrides: tuple[str, ...] = ()  # key=value for all trials
    trials: int = 1  # samples of the space; each grid multiplies them
    scheduler: Literal["none", "asha"] = "none"  # asha stops trials that are worse than others at the same epoch
    grace_epochs: int = 1  # asha: no trial stops before
    reduction: int = 3  # asha: one in so many goes on, at grace_epochs, grace_epochs * reduction, ...
    seed: int = 0  # of the sampling; the seed of the trainings is the config's
    cpus_per_trial: int = 1  # also the number of threads
    gpus_per_trial: float = 0.0  # 0.5 = two trials share one; 0 = train on the CPU
    max_concurrent: int = 0  # trials at a time; 0 = as many as there is room for

    @property
    def dir(self) -> Path:
        """The folder of the sweep."""
        return Path(self.run_dir)

    @property
    def mode(self) -> Literal["max", "min"]:
        """Which values of the metric are the best."""
        return "max" if higher_is_better(self.metric) else "min"

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """The space by dotted key, whether the file nests its keys or writes them with dots."""
        return {key: _dimension(key, spec) for key, spec in _leaves(self.space)}


@dataclass(frozen=True)
class Dimension:
    """The values of one config key; exactly one of the fields is set."""

    choice: tuple[Any, ...] | None = None  # one of these at random
    grid: tuple[Any, ...] | None = None  # each of these
    uniform: tuple[Any, ...] | None = None  # a number between two
    loguniform: tuple[Any, ...] | None = None  # its logarithm is uniform

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(kind for kind, values in vars(self).items() if values is not None)

    @property
    def values(self) -> list[Any]:
        """The listed values, or the two ends of the range."""
        return list(getattr(self, self.kind))


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in a YAML file with ``key=value`` overrides. Raises InputError that names what is wrong with it."""
    sweep = load_as(Sweep, path, overrides)
    least = {"trials": 1, "grace_epochs": 1, "reduction": 2, "seed": 0, "cpus_per_trial": 1, "max_concurrent": 0}
    for key, smallest in {**least, "gpus_per_trial": 0}.items():
        if getattr(sweep, key) < smallest:
            raise InputError(f"{key}={getattr(sweep, key)} must be at least {smallest}")
    if sweep.gpus_per_trial > 1 and not sweep.gpus_per_trial.is_integer():
        raise InputError(f"gpus_per_trial={sweep.gpus_per_trial} must be a fraction of one or a whole number")
    if not sweep.dimensions:
        raise InputError("space is empty; name a config key, such as space.optim.lr.loguniform=[1e-4,1e-2]")
    for word in [*sweep.overrides, *(f"{key}=" for key in sweep.dimensions)]:
        if word.startswith("run_dir="):
            raise InputError("run_dir is not for overrides or space: each trial gets its own in the sweep's run_dir")
    return sweep


def find_config(sweep: Sweep, sweep_file: Path) -> Path:
    """The file that ``sweep.config`` means. Raises InputError when there is none."""
    for folder in (sweep_file.parent, Path()):
        if (folder / sweep.config).is_file():
            return folder / sweep.config
    raise InputError(f"config={sweep.config} exists neither beside {sweep_file} nor in the working folder")


def trial_config(sweep: Sweep, base: Path, parameters: Mapping[str, Any], run_dir: Path) -> Config:
    """The whole config of the trial with these ``parameters`` (config key -> value)."""
    # JSON is YAML, and writes floats so that they read back equal; a string is taken as it stands.
    words = [f"{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in parameters.items()]
    return load_config(base, [*sweep.overrides, *words, f"run_dir={run_dir}"])


def steps_per_epoch(config: Config) -> int:
    """Optimiser steps per epoch of one process. Raises InputError if data and batch size do not fit together."""
    split = PreparedDataset(Path(config.data.root)).split(config.data.train)
    order = TrainOrder(len(split), batch_size=config.batch_size, accumulate=config.optim.accumulate)
    return order.steps_per_epoch


def metrics_of(config: Config) -> list[str]:
    """The metrics that an evaluation of ``config`` gives."""
    info = PreparedDataset(Path(config.data.root)).info
    return metric_names(make_tasks(config.tasks, info.classes, info.depth))


def check_trials(sweep: Sweep, base: Path) -> list[Config]:
    """The configs with every listed value and range end of ``space``, each beside the first values of the others.

    Raises InputError when one is refused, or does not fit the data, the metric or the scheduler.
    """
    dimensions = sweep.dimensions
    first = {key: dimension.values[0] for key, dimension in dimensions.items()}
    configs = []
    for key, dimension in dimensions.items():
        for value in dimension.values:
            parameters = {**first, key: value}
            try:
                config = trial_config(sweep, base, parameters, sweep.dir / "trials")
                steps_per_epoch(config)
            except InputError as error:
                words = ", ".join(f"{k}={json.dumps(v)}" for k, v in parameters.items())
                raise InputError(f"a trial with {words}: {error}") from None
            configs.append(config)
    for config in {(c.data.root, c.tasks): c for c in configs}.values():
        if sweep.metric not in (names := metrics_of(config)):
            near = closest(sweep.metric, names)
            raise InputError(f"metric={sweep.metric} is no metric.{near} Available: {', '.join(names)}")
    if sweep.scheduler == "asha":
        for config in configs:
            if not config.eval_every_epochs:
                raise InputError("scheduler=asha compares evaluations, and eval_every_epochs=0 has only the last")
            if sweep.grace_epochs > config.epochs:
                raise InputError(f"grace_epochs={sweep.grace_epochs} is beyond epochs={config.epochs}")
    return configs


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and what stands there, from a mapping that nests; ``{loguniform: [a, b]}`` does not nest."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value and all(isinstance(inner, Mapping) for inner in value.values()):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _dimension(key: str, spec: Any) -> Dimension:
    where, kinds = f"space.{key}", ", ".join(Dimension.__dataclass_fields__)
    if not isinstance(spec, dict):
        raise InputError(f"{where} must be one of {kinds} with a list, such as {{choice: [{spec}]}}")
    try:
        dimension = load_as(Dimension, spec)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    given = [kind for kind, values in vars(dimension).items() if values is not None]
    if len(given) != 1:
        raise InputError(f"{where} must be exactly one of {kinds}, got {' and '.join(given) or 'none'}")
    values = dimension.values
    if dimension.kind in ("uniform", "loguniform"):
        if len(values) != 2 or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise InputError(f"{where}.{dimension.kind}={values} must be two numbers")
        low, high = map(float, values)  # so that a range over a whole-number key is refused
        if low >= high or (dimension.kind == "loguniform" and low <= 0):
            need = "0 < a < b" if dimension.kind == "loguniform" else "a < b"
            raise InputError(f"{where}.{dimension.kind}={values} must be [a, b] with {need}")
        return Dimension(**{dimension.kind: (low, high)})
    if not values:
        raise InputError(f"{where}.{dimension.kind} lists no value")
    return dimension
