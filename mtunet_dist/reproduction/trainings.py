"""The trainings behind a table: their configs, checked before anything starts, and what a finished one measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from mtunet_dist import checkpoint, records
from mtunet_dist.config import Config, load_config, save_config
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError
from mtunet_dist.multitask import build_step, check_model
from mtunet_dist.reproduction.budgets import Budget
from mtunet_dist.reproduction.experiments import DATASETS, SYSTEMS, Splits, Target
from mtunet_dist.resume import MAY_CHANGE, changed_settings

OURS = ("run_dir", "seed", "data.root", "data.train", "data.eval", "tasks", "model.name", "weighting.name")
# What may differ between a finished training and what is asked for now: not these, they change what it measures.
MAY_DIFFER = set(MAY_CHANGE) - {"data.root", "data.eval", "epochs", "eval_batch_size", "strategy"}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is common to all trainings of one command."""

    out: Path
    budget_name: str
    budget: Budget
    roots: dict[str, str]  # of the prepared datasets, by name of DATASETS
    overrides: tuple[str, ...] = ()  # the user's, for every training
    seeds: int | None = None  # instead of the budget's
    validation: bool = False

    def splits(self, target: Target) -> Splits:
        """What ``target`` trains and measures on. InputError if it is to choose settings and its dataset cannot."""
        dataset = DATASETS[target.dataset]
        if not (self.validation or target.validation):
            return dataset.report
        if dataset.validation is None:
            raise InputError(f"--validate: no validation part of {dataset.title} is known, only {dataset.report}")
        return dataset.validation


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of one system; an ordinary run."""

    system: str  # of SYSTEMS
    config: Config
    total_steps: int
    parameters: int  # trained numbers in the network

    @property
    def dir(self) -> Path:
        """Its run folder."""
        return Path(self.config.run_dir)

    @property
    def seed(self) -> int:
        """The seed of its initial weights and of its order of samples."""
        return self.config.seed

    @property
    def checkpoint(self) -> Path:
        """The checkpoint after its last step; what is reported is measured with it, nothing is selected."""
        return checkpoint.path_of(self.dir / "checkpoints", self.total_steps)

    @property
    def metrics(self) -> dict[str, float] | None:
        """What it measured after its last step; None if it has not got there, or its checkpoint has not."""
        if not self.checkpoint.is_file():
            return None
        found = [r for r in self.records("eval") if r["step"] == self.total_steps]
        if not found:  # it was asked to stop before that; or the disk was full, and on_write_error=continue
            saved = checkpoint.load(self.checkpoint)
            return saved["metrics"] if saved["evaluated"] == saved["step"] else None
        return {key: float("nan") if v is None else v for key, v in found[-1].items()}

    @property
    def minutes(self) -> float:
        """Time spent in training steps, however often it was interrupted; without start, evaluation and saving."""
        seconds, before = 0.0, 0
        for record in self.records("train", samples_per_s=float):
            seconds += (record["step"] - before) * self.config.batch_size / max(record["samples_per_s"], 1e-9)
            before = record["step"]
        return seconds / 60

    def records(self, kind: str, **keys: type) -> list[records.Record]:
        """Its lines of metrics.jsonl of a ``kind``, "train" or "eval", with these ``keys`` beside step and epoch."""
        return records.metrics(self.dir, kind, **keys)

    def write_config(self) -> Path:
        """Write config.yaml into its run folder, the file that it is started with."""
        self.dir.mkdir(parents=True, exist_ok=True)
        file = self.dir / "config.yaml"
        save_config(self.config, file)
        return file


def plan(target: Target, setup: Setup) -> list[Training]:
    """The trainings of ``target``, those of one system together.

    Raises InputError, before anything is written, if the dataset is not there (it says how to make it), a setting is
    wrong, a network does not fit the images, or a run folder holds a run with other settings.
    """
    splits = setup.splits(target)
    dataset = _open(target.dataset, setup)
    for split in (splits.train, splits.test):
        dataset.split(split)
    seeds = 1 if target.single_seed else setup.seeds or setup.budget.seeds
    trainings = []
    for system in target.systems:
        configs = [_config(system, target, splits, setup, seed) for seed in range(seeds)]
        parameters = _check_network(configs[0], dataset)
        for config in configs:
            samples = len(dataset.split(config.data.train))
            order = TrainOrder(samples, batch_size=config.batch_size, accumulate=config.optim.accumulate)
            training = Training(system, config, config.epochs * order.steps_per_epoch, parameters)
            _check_folder(training)
            trainings.append(training)
    return trainings


def _open(name: str, setup: Setup) -> PreparedDataset:
    try:
        return PreparedDataset(Path(setup.roots[name]))
    except InputError as error:
        known = DATASETS[name]
        raise InputError(
            f"{known.title}: {error}, such as: {known.prepare} (and name another place by --{name})"
        ) from None


def _config(system: str, target: Target, splits: Splits, setup: Setup, seed: int) -> Config:
    for word in setup.overrides:
        key = word.partition("=")[0]
        if key in OURS:
            raise InputError(f"{word}: {key} is set by reproduce itself")
    part = "" if splits == DATASETS[target.dataset].report else "-validation"
    run_dir = setup.out / setup.budget_name / f"{target.dataset}{part}" / system / f"seed{seed}"
    wanted = SYSTEMS[system]
    words = [
        f"run_dir={run_dir}",
        f"seed={seed}",
        f"data.root={setup.roots[target.dataset]}",
        f"data.train={splits.train}",
        f"data.eval={splits.test}",
        f"eval_every_epochs={int(bool(part))}",  # what is reported on is looked at once, after the last epoch
        *DATASETS[target.dataset].overrides,
        *setup.budget.common,
        *setup.budget.datasets.get(target.dataset, ()),
    ]
    epochs = load_config(None, [*words, *(w for w in setup.overrides if w.startswith("epochs="))]).epochs
    of_system = [word.replace("{epochs}", str(epochs)) for word in wanted.overrides]
    return load_config(None, [*words, *of_system, *setup.budget.families[wanted.family], *setup.overrides])


def _check_network(config: Config, dataset: PreparedDataset) -> int:
    """Build the network without memory or arithmetic; its number of parameters."""
    info = dataset.info
    with torch.device("meta"):
        step = build_step(config, info.classes, info.depth)
    check_model(step, info.height, info.width)
    return sum(p.numel() for p in step.model.parameters())


def _check_folder(training: Training) -> None:
    file = training.dir / "config.yaml"
    if not file.is_file():
        return
    if changed := changed_settings(load_config(file), training.config, MAY_DIFFER):
        raise InputError(f"{training.dir} holds a run with {', '.join(changed)}; choose another --out, or remove it")
