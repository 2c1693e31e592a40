"""The trainings of a table: their configs, which are checked before anything starts, and the results of
finished ones."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from mtunet_dist.config import Config, load_config, save_config
from mtunet_dist.core.step import build_step, check_model
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.targets import check_targets
from mtunet_dist.errors import InputError
from mtunet_dist.reproduction.budgets import Budget
from mtunet_dist.reproduction.experiments import DATASETS, SYSTEMS, Dataset, Row, Splits, Target
from mtunet_dist.runs import checkpoint
from mtunet_dist.runs.resume import MAY_CHANGE, changed_settings
from mtunet_dist.system import records

OURS = ("run_dir", "seed", "data.root", "data.train", "data.eval", "tasks", "model.name", "weighting.name")
# Keys that may differ between a finished training and the requested one: all but these, which change its results.
_MEASURED = {"data.root", "data.eval", "epochs", "eval_batch_size", "eval_last_epochs", "checkpoint", "strategy"}
MAY_DIFFER = (set(MAY_CHANGE) - _MEASURED) | {"checkpoint.every_epochs", "checkpoint.every_steps", "checkpoint.keep"}
LAST_EPOCHS = 10  # the protocol mean10 averages over so many epochs
Protocol = Literal["last", "best", "mean10"]
PROTOCOLS: dict[Protocol, str] = {
    "last": "the weights after the last epoch",
    "best": "the best epoch on the validation part, by checkpoint.best",
    "mean10": f"the mean over the last {LAST_EPOCHS} epochs, as MTAN's successors publish",
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """The common settings of all trainings of one command."""

    out: Path
    budget_name: str
    budget: Budget
    roots: dict[str, str]  # of the prepared datasets, by name of DATASETS
    overrides: tuple[str, ...] = ()  # the user's, for every training
    seeds: int | None = None  # instead of the budget's
    validation: bool = False  # choose settings: train without the validation part and measure on it
    protocol: Protocol = "last"

    def seeds_of(self, target: Target, dataset: Dataset) -> int:
        """The number of trainings of each row of ``target`` on ``dataset``."""
        return 1 if target.single_seed else self.seeds or self.budget.seeds[dataset.kind]

    def splits(self, dataset: Dataset) -> Splits:
        """The splits for training, and for measuring while it runs. InputError if ``dataset`` has none for choosing
        settings."""
        if not (self.validation or self.protocol == "best"):
            return dataset.report
        if dataset.validation is None:
            asked = "--validate" if self.validation else "--protocol best"
            raise InputError(
                f"{asked}: no validation part of {dataset.title} is known; its figures are published on "
                f"'{dataset.report.test}'"
            )
        return dataset.validation

    @property
    def part(self) -> str:
        """A name that separates trainings and tables of non-default measuring from the others."""
        return ("" if self.protocol == "last" else f"-{self.protocol}") + ("-validation" if self.validation else "")


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of one system. It is an ordinary run."""

    row: Row
    config: Config
    total_steps: int
    parameters: int  # trained numbers in the network
    protocol: Protocol = "last"

    @property
    def dir(self) -> Path:
        """Its run folder."""
        return Path(self.config.run_dir)

    @property
    def seed(self) -> int:
        """The seed of its initial weights and sample order."""
        return self.config.seed

    @property
    def checkpoint(self) -> Path:
        """The checkpoint after its last step. The reported results are of this one; there is no selection."""
        return checkpoint.path_of(self.dir / "checkpoints", self.total_steps)

    @property
    def metrics(self) -> dict[str, float] | None:
        """Its results by its protocol. None if it has not finished, or if its last checkpoint is missing."""
        if not self.checkpoint.is_file():
            return None
        return {"last": self._after_last_step, "best": self._of_best, "mean10": self._mean_of_last}[self.protocol]()

    @property
    def trained(self) -> bool:
        """Whether no training is left. With the protocol "best", measuring of the best checkpoint may be left."""
        return self.checkpoint.is_file() if self.protocol == "best" else self.metrics is not None

    @property
    def best_file(self) -> Path:
        """The file that ``measuring.measure_best`` writes."""
        return self.dir / f"best-{DATASETS[self.row.dataset].report.test}.json"

    def _after_last_step(self) -> dict[str, float] | None:
        found = [r for r in self.records("eval") if r["step"] == self.total_steps]
        if not found:  # stopped before the evaluation, or the disk was full with on_write_error=continue
            saved = checkpoint.load(self.checkpoint)
            return saved["metrics"] if saved["evaluated"] == saved["step"] else None
        return _numbers(found[-1])

    def _of_best(self) -> dict[str, float] | None:
        found = records.read_note(self.best_file).get("metrics")
        return _numbers(found) if isinstance(found, dict) else None

    def _mean_of_last(self) -> dict[str, float] | None:
        wanted = min(LAST_EPOCHS, self.config.epochs)
        by_step = {record["step"]: _numbers(record) for record in self.records("eval")}
        last = [by_step[step] for step in sorted(by_step)[-wanted:]]
        if len(last) < wanted or self.total_steps not in by_step:
            return None
        return {name: statistics.fmean(metrics.get(name, math.nan) for metrics in last) for name in last[0]}

    @property
    def minutes(self) -> float:
        """Time in training steps, also over interruptions; without start, evaluation and saving."""
        seconds, before = 0.0, 0
        for record in self.records("train", samples_per_s=float):
            seconds += (record["step"] - before) * self.config.batch_size / max(record["samples_per_s"], 1e-9)
            before = record["step"]
        return seconds / 60

    def records(self, kind: str, **keys: type) -> list[records.Record]:
        """The lines of its metrics.jsonl of a ``kind``, "train" or "eval", with these ``keys`` beside step and
        epoch."""
        return records.metrics(self.dir, kind, **keys)

    def write_config(self) -> Path:
        """Write config.yaml, the file that it is started with, into its run folder."""
        self.dir.mkdir(parents=True, exist_ok=True)
        file = self.dir / "config.yaml"
        save_config(self.config, file)
        return file


def plan(target: Target, setup: Setup) -> list[Training]:
    """The trainings of ``target``, in a group per row.

    Raises InputError before anything is written: if the dataset is missing (the message says how to make it), a setting
    is wrong, a network does not fit the images, or a run folder holds a run with other settings.
    """
    datasets = {name: _open(name, setup) for name in target.datasets}
    trainings = []
    for row in target.all_rows:
        dataset = datasets[row.dataset]
        made = configs(row, target, setup)
        parameters = _check_network(made[0], dataset)
        for config in made:
            samples = len(dataset.split(config.data.train))
            check_targets(dataset.info, config.data.train, config.tasks)
            order = TrainOrder(samples, batch_size=config.batch_size, accumulate=config.optim.accumulate)
            total_steps = config.epochs * order.steps_per_epoch
            training = Training(row, config, total_steps, parameters, setup.protocol)
            _check_folder(training)
            trainings.append(training)
    return trainings


def configs(row: Row, target: Target, setup: Setup) -> list[Config]:
    """The config of each training of a row of ``target``, one per seed. Raises InputError if a setting is wrong."""
    for word in setup.overrides:
        key = word.partition("=")[0]
        if key in OURS:
            raise InputError(f"{word}: {key} is set by reproduce itself")
    folder = setup.out / setup.budget_name / f"{row.dataset}{setup.part}" / row.system
    config = load_config(None, [f"run_dir={folder}", *settings(row, setup)])
    seeds = range(setup.seeds_of(target, DATASETS[row.dataset]))
    return [dataclasses.replace(config, run_dir=str(folder / f"seed{seed}"), seed=seed) for seed in seeds]


def settings(row: Row, setup: Setup) -> list[str]:
    """The common ``key=value`` words of a row's trainings: system, dataset, budget, then the user's."""
    dataset, system = DATASETS[row.dataset], SYSTEMS[row.system]
    splits = setup.splits(dataset)
    evaluated = {"last": [], "best": ["eval_every_epochs=1"], "mean10": [f"eval_last_epochs={LAST_EPOCHS}"]}
    words = [
        f"data.root={setup.roots[row.dataset]}",
        f"data.train={splits.train}",
        f"data.eval={splits.test}",
        f"eval_every_epochs={int(setup.validation)}",  # the reported split is used once, after the last epoch
        *evaluated[setup.protocol],
        *dataset.overrides,
        *setup.budget.common,
        *setup.budget.datasets.get(dataset.kind, ()),
    ]
    epochs = [word for word in (*words, *setup.overrides) if word.startswith("epochs=")][-1].removeprefix("epochs=")
    of_system = [word.replace("{epochs}", epochs) for word in system.overrides]
    return [*words, *of_system, *setup.budget.families[system.family], *setup.overrides]


def _open(name: str, setup: Setup) -> PreparedDataset:
    known = DATASETS[name]
    try:
        dataset = PreparedDataset(Path(setup.roots[name]))
    except InputError as error:
        raise InputError(
            f"{known.title}: {error}, such as: {known.prepare} (and name another place by --{name})"
        ) from None
    classes = dataset.info.targets["segmentation"].channels
    if classes != known.classes:
        raise InputError(f"--{name}={setup.roots[name]} has {classes} classes instead of {known.classes}")
    splits = setup.splits(known)
    for split in (splits.train, splits.test, known.report.test):
        dataset.split(split)
    return dataset


def _check_network(config: Config, dataset: PreparedDataset) -> int:
    """Build the network without memory or arithmetic. Returns its number of parameters."""
    info = dataset.info
    with torch.device("meta"):
        step = build_step(config, info.tasks(config.tasks))
    check_model(step, info.height, info.width)
    return sum(p.numel() for p in step.model.parameters())


def _check_folder(training: Training) -> None:
    file = training.dir / "config.yaml"
    if not file.is_file():
        return
    if changed := changed_settings(load_config(file), training.config, MAY_DIFFER):
        raise InputError(f"{training.dir} holds a run with {', '.join(changed)}; choose another --out, or remove it")


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the values of a record. null becomes nan."""
    given = {key: math.nan if value is None else value for key, value in record.items()}
    return {key: float(value) for key, value in given.items() if isinstance(value, int | float)}
