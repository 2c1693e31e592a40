"""The metrics of a network, or of any other predictor, over a whole split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mtunet_dist import distributed
from mtunet_dist.config import Config
from mtunet_dist.data.loader import Loader, make_loader
from mtunet_dist.data.order import EvalOrder
from mtunet_dist.data.splits import Split
from mtunet_dist.errors import InputError
from mtunet_dist.tasks._task import Task


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
        figures |= {task.full(key): value for key, value in metric.compute().items()}
        total, count = losses[task.name].tolist()
        figures[f"loss/{task.name}"] = total / max(count, 1.0)
        class_iou |= {task.full(key): value for key, value in metric.per_class().items()}
    return Evaluation(int(samples), figures, class_iou)


def metric_names(tasks: Sequence[Task]) -> list[str]:
    """The names of the metrics that ``evaluate`` returns for ``tasks``."""
    return [name for task in tasks for name in (*map(task.full, task.METRICS), f"loss/{task.name}")]


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
