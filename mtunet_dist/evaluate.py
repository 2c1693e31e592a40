"""Evaluate a run or a checkpoint on a split: ``python -m mtunet_dist.evaluate RUN_OR_CHECKPOINT [--split test]``.

A run folder means its ``best.pt``, else its newest checkpoint.

Works under torchrun too; the figures do not depend on the number of processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mtunet_dist import arguments, checkpoint, distributed
from mtunet_dist.baselines import ConstantPredictor
from mtunet_dist.config import Config, config_from_text
from mtunet_dist.data.info import DatasetInfo
from mtunet_dist.data.loader import Loader, make_loader
from mtunet_dist.data.order import EvalOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.splits import Split
from mtunet_dist.errors import InputError, MTUNetError, command
from mtunet_dist.files import write_json
from mtunet_dist.metrics import SegmentationMetric, higher_is_better
from mtunet_dist.multitask import MultiTaskStep, Segmentation, Task, build_step, place

HEADINGS = {"trained": "trained", "constant": "best constant"}  # headings of the table, by key in the JSON


class Predictor(Protocol):
    """An object that can be evaluated."""

    tasks: list[Task]

    def predict(self, image: Tensor) -> dict[str, Tensor]:
        """Outputs {task: float32 (N, channels, H, W)} for uint8 images (N, 3, H, W)."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures over a whole split, equal on all ranks. ``class_iou`` is NaN for classes that do not occur."""

    samples: int
    metrics: dict[str, float]
    class_iou: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """The figures as JSON values. NaN becomes null."""
        clean = [{k: None if math.isnan(v) else v for k, v in d.items()} for d in (self.metrics, self.class_iou)]
        return {"samples": self.samples, "metrics": clean[0], "class_iou": clean[1]}


@torch.no_grad()
def evaluate(
    predictor: Predictor, loader: Loader, device: torch.device, on_batch: Callable[[], None] = lambda: None
) -> Evaluation:
    """Run ``predictor``, in evaluation mode, on this rank's share of a split, and sum the results over all ranks.

    The metrics are those of ``metric_names``. ``on_batch`` is called after each batch.
    """
    metrics = {task.name: task.metric(device) for task in predictor.tasks}
    losses = {task.name: torch.zeros(2, dtype=torch.float64, device=device) for task in predictor.tasks}
    samples = torch.zeros((), dtype=torch.int64, device=device)
    for batch in loader.batches():
        outputs = predictor.predict(batch["image"])
        samples += len(batch["image"])
        for task in predictor.tasks:
            prediction, target = outputs[task.name], batch[task.name]
            metrics[task.name].update(prediction, target)
            losses[task.name] += torch.stack(task.loss(prediction, target)).double()
        on_batch()
    state = [samples, *losses.values(), *(t for m in metrics.values() for t in m.tensors())]
    for tensor in state:
        distributed.all_reduce_sum(tensor)

    figures: dict[str, float] = {}
    class_iou: dict[str, float] = {}
    for task in predictor.tasks:
        metric = metrics[task.name]
        figures |= metric.compute()
        total, count = losses[task.name].tolist()
        figures[f"loss/{task.name}"] = total / max(count, 1.0)
        if isinstance(task, Segmentation) and isinstance(metric, SegmentationMetric):
            class_iou = dict(zip((c.name for c in task.classes), metric.iou_per_class(), strict=True))
    return Evaluation(int(samples), figures, class_iou)


def metric_names(tasks: Sequence[Task]) -> list[str]:
    """The names of the metrics that ``evaluate`` returns for ``tasks``."""
    return [n for t in tasks for n in (*t.metric(torch.device("cpu")).compute(), f"loss/{t.name}")]


def eval_loader(config: Config, split: Split, device: torch.device) -> Loader:
    """A loader of this rank's share of ``split``, with every sample once. InputError if there is no such split."""
    if not len(split):
        raise InputError(f"{split.root}: the split '{'+'.join(split.names)}' has no samples to evaluate on")
    order = EvalOrder(
        len(split),
        batch_size=config.eval_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    return make_loader(config.data, split, order, device)


def load_step(state: checkpoint.State, config: Config, device: torch.device) -> MultiTaskStep:
    """The trained MultiTaskStep of a checkpoint, in evaluation mode on ``device``."""
    info = DatasetInfo.from_json(json.loads(state["dataset"]))
    step = build_step(config, info.classes, info.depth)
    step.load_state_dict(state["strategy"]["model"])
    return place(step, device, config.channels_last).eval()


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the ``path`` that ``load_run`` takes to a command line."""
    parser.add_argument(
        "path",
        type=arguments.path,
        metavar="RUN_OR_CHECKPOINT",
        help="a checkpoint, or a run folder: its best.pt, else its newest",
    )


def load_run(path: Path, overrides: Sequence[str]) -> tuple[checkpoint.State, Config, Path]:
    """The checkpoint of ``path`` (a run folder or a checkpoint), its config with ``overrides``, and its file."""
    file = checkpoint.resolve(path)
    checkpoint.check(file)
    state = checkpoint.load(file)
    return state, config_from_text(state["config"], overrides), file


def check_same_meaning(dataset: DatasetInfo, state: checkpoint.State) -> None:
    """Raise InputError if the classes or depth of a dataset differ from those that the checkpoint was trained on."""
    trained = DatasetInfo.from_json(json.loads(state["dataset"]))
    for what in ("classes", "depth"):
        here, there = getattr(dataset, what), getattr(trained, what)
        if here != there:
            raise InputError(f"the dataset's {what} {here} are not those the checkpoint was trained on: {there}")


def table(title: str, columns: dict[str, Evaluation]) -> Table:
    """A table of metrics, one row each and one column per evaluation, then the IoU of each class."""
    # Text, because rich reads strings with [] or colons as markup.
    result = Table(title=Text(title), title_justify="left", title_style="bold")
    result.add_column("metric")
    for name in columns:
        result.add_column(name, justify="right")
    evaluations = list(columns.values())
    for key in evaluations[0].metrics:
        result.add_row(key, *(_cell(key, e.metrics.get(key, math.nan)) for e in evaluations))
    result.add_section()
    for name in evaluations[0].class_iou:
        result.add_row(Text(f"IoU {name}"), *(_cell("miou", e.class_iou.get(name, math.nan)) for e in evaluations))
    return result


def _cell(key: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2%}" if higher_is_better(key) else f"{value:.4f}"  # only shares are better when higher


@command
def main() -> None:
    """Print the table and write ``evaluation-SPLIT.json`` beside the checkpoints."""
    parser = arguments.parser("evaluate", __doc__.splitlines()[0])
    add_run_argument(parser)
    parser.add_argument("--split", help="a split of the dataset, or several: train+val (default: the run's data.eval)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run's config, as data.root=")
    arguments.add_device(parser)
    args = parser.parse_intermixed_args()
    state, config, file = load_run(args.path, arguments.overrides(args))
    device = distributed.pick_device(config.device)
    with distributed.process_group(device, config.timeout_s):
        dataset = PreparedDataset(Path(config.data.root))
        check_same_meaning(dataset.info, state)
        name = args.split or config.data.eval
        step = load_step(state, config, device)
        loader = eval_loader(config, dataset.split(name), device)
        results = {"trained": evaluate(step, loader, device)}
        if set(config.data.train.split("+")) <= dataset.info.splits.keys():  # datasets for tests may lack it
            constant = ConstantPredictor(step.tasks, dataset.split(config.data.train), config.data.on_error)
            results["constant"] = evaluate(constant, loader, device)
        main_rank = distributed.is_main()
        if main_rank:
            title = f"{file}, step {state['step']}, on {name} ({results['trained'].samples} samples)"
            Console().print(table(title, {HEADINGS[key]: result for key, result in results.items()}))
    if main_rank:
        what = {"checkpoint": str(file), "step": state["step"], "split": name}
        folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
        output = folder / f"evaluation-{name}.json"
        try:
            write_json(output, {**what, **{key: result.as_dict() for key, result in results.items()}}, indent=2)
        except OSError as error:
            raise MTUNetError(f"{output} cannot be written: {error.strerror}; the figures are those above") from error
        print(f"written to {output}")


if __name__ == "__main__":
    main()
