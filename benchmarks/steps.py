"""One training step, as ``mtunet_dist.train`` makes it, for the benchmarks to repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mtunet_dist import plugins
from mtunet_dist.config import Config
from mtunet_dist.core.step import Batch, build_step, share_valid_counts
from mtunet_dist.strategies._strategy import Strategy
from mtunet_dist.tasks._task import Task
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.segmentation import ClassInfo, Segmentation

CLASSES = tuple(ClassInfo(f"class {i}", (i, i, i)) for i in range(13))  # as many as NYUv2 has
TASKS: list[Task] = [Segmentation("segmentation", CLASSES), Depth.metric_depth(0.001)]


def training(
    config: Config, device: torch.device, tasks: Sequence[Task], *, reduce: bool = True
) -> Callable[[Batch], None]:
    """A function that trains on one batch. Without ``reduce`` (only DDP supports it) each rank uses its own
    gradients."""
    torch.manual_seed(config.seed)
    step = build_step(config, tasks)
    if config.compile:
        step.model.compile(mode=config.compile_mode)
    strategy: Strategy = plugins.build("strategy", config.strategy, step, config, device)

    def train_on(batch: Batch) -> None:
        share_valid_counts([batch], strategy.module.tasks)
        with strategy.accumulate(last=reduce):
            total, _ = strategy(batch)
            strategy.backward(total)
        strategy.apply(config.optim.lr)

    return train_on


def random_batch(count: int, height: int, width: int, device: torch.device) -> Batch:
    """Random noise in the form of a batch, with the targets of TASKS."""
    batch = {
        "image": torch.randint(256, (count, 3, height, width), dtype=torch.uint8),
        "segmentation": torch.randint(len(CLASSES), (count, height, width), dtype=torch.uint8),
        "depth": torch.rand(count, 1, height, width) * 5,
    }
    batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
    return {name: tensor.to(device) for name, tensor in batch.items()}
