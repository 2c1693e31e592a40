"""Figures that no training writes: of the best checkpoint on the reported split, and of constant predictions."""

from __future__ import annotations

from pathlib import Path

import torch

from mtunet_dist import distributed
from mtunet_dist.data.order import EvalOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.torch_loader import TorchLoader
from mtunet_dist.reproduction.experiments import DATASETS
from mtunet_dist.reproduction.trainings import Training
from mtunet_dist.runs.baselines import ConstantPredictor
from mtunet_dist.runs.evaluation import eval_loader, evaluate
from mtunet_dist.runs.loading import load_run, load_step
from mtunet_dist.system.files import write_json
from mtunet_dist.system.records import read_note

CPU = torch.device("cpu")


def measure_best(training: Training) -> None:
    """Evaluate the best checkpoint of a finished training of the protocol "best", once, and keep the result.

    Raises InputError if the run has no checkpoint that can be read.
    """
    state, config, _ = load_run(training.dir / "checkpoints" / "best.pt", ())
    device = distributed.pick_device(config.device)
    split = PreparedDataset(Path(config.data.root)).split(DATASETS[training.row.dataset].report.test)
    result = evaluate(load_step(state, config, device), eval_loader(config, split, device), device)
    write_json(training.best_file, {"step": state["step"], **result.as_dict()}, indent=2)


def constant_metrics(training: Training, split_name: str) -> dict[str, float]:
    """The figures that a network without a look at the image can reach. They are kept in a file beside the runs."""
    config = training.config
    dataset = PreparedDataset(Path(config.data.root))
    train, test = dataset.split(config.data.train), dataset.split(split_name)
    file = training.dir.parent.parent / "constant.json"
    key = [train.fingerprint, test.fingerprint, config.eval_batch_size]
    known = read_note(file)
    if known.get("of") != key or not isinstance(known.get("metrics"), dict):
        tasks = dataset.info.tasks(config.tasks)
        loader = TorchLoader(test, EvalOrder(len(test), batch_size=config.eval_batch_size), CPU)
        known = {"of": key, "metrics": evaluate(ConstantPredictor(tasks, train), loader, CPU).as_dict()["metrics"]}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known)
    return {name: value for name, value in known["metrics"].items() if value is not None}
