"""A run: its parts and its folder.

The folder holds config.yaml, environment.json, metrics.jsonl, tensorboard/, checkpoints/ and pictures/.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from mtunet_dist import distributed, plugins
from mtunet_dist.config import CheckpointConfig, Config
from mtunet_dist.core.comparison import DELTA
from mtunet_dist.core.step import Batch, MultiTaskStep, build_step, check_model
from mtunet_dist.core.sync_batchnorm import synchronise
from mtunet_dist.data.loader import Loader, make_augmentation, make_loader
from mtunet_dist.data.order import EvalOrder, TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.splits import Split
from mtunet_dist.data.targets import check_targets, unjudged
from mtunet_dist.data.torch_loader import TorchLoader
from mtunet_dist.errors import InputError, closest
from mtunet_dist.runs import checkpoint
from mtunet_dist.runs.evaluation import eval_loader, metric_names
from mtunet_dist.runs.progress import Progress
from mtunet_dist.strategies._strategy import Strategy
from mtunet_dist.system.folder_lock import FolderLock


@dataclasses.dataclass
class Run:
    """The objects that the training loop uses."""

    config: Config
    device: torch.device
    dataset: PreparedDataset
    train_split: Split
    order: TrainOrder
    loader: Loader
    eval_loader: Loader
    strategy: Strategy
    parameters: int  # trained numbers in the model
    picture_batch: Batch | None  # on rank 0, if pictures are wanted
    writer: checkpoint.Writer  # used on rank 0

    lock: FolderLock | None = None  # on rank 0; keeps other trainings out of the run folder

    progress: Progress = dataclasses.field(default_factory=Progress)

    @property
    def module(self) -> MultiTaskStep:
        """The bare module under the strategy."""
        return self.strategy.module

    @property
    def dir(self) -> Path:
        """The run folder."""
        return Path(self.config.run_dir)

    @property
    def total_steps(self) -> int:
        """Optimiser steps in the whole run."""
        return self.config.epochs * self.order.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether all steps are done, and the last evaluation."""
        return self.progress.step == self.total_steps and self.progress.evaluated == self.progress.step

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation is due after the current step, also when a resumed run starts there."""
        epoch, step_in_epoch = divmod(self.progress.step, self.order.steps_per_epoch)
        every, last = self.config.eval_every_epochs, self.config.eval_last_epochs
        wanted = self.progress.step == self.total_steps or (every > 0 and epoch % every == 0)
        wanted |= epoch > self.config.epochs - last
        return step_in_epoch == 0 and wanted and self.progress.evaluated < self.progress.step

    def close(self) -> None:
        """Finish writing, unlock the run folder, and free the resources of the strategy."""
        self.writer.close()
        self.strategy.close()
        if self.lock is not None:
            self.lock.close()


def build(config: Config, device: torch.device) -> Run:
    """Build everything that ``config`` names, untrained. Raises InputError if its parts do not fit together."""
    dataset = PreparedDataset(Path(config.data.root))
    info = dataset.info
    train_split, eval_split = dataset.split(config.data.train), dataset.split(config.data.eval)
    check_targets(info, config.data.train, config.tasks)
    for line in unjudged(info, config.data.eval, config.tasks) if distributed.is_main() else []:
        warnings.warn(line, stacklevel=2)
    order = TrainOrder(
        len(train_split),
        batch_size=config.batch_size,
        accumulate=config.optim.accumulate,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=config.seed,
    )
    augmentation = make_augmentation(config.data.augment, info, config.seed)
    torch.manual_seed(config.seed)  # the same initial weights on every rank
    step = build_step(config, info.tasks(config.tasks))
    ranks = distributed.world_size()
    samples = config.batch_size // config.optim.accumulate // (1 if config.sync_batchnorm else ranks)
    check_model(step, info.height, info.width, samples)
    if config.sync_batchnorm:
        synchronise(step.model, device)
    _check_best(config.checkpoint, metric_names(step.tasks))
    parameters = sum(p.numel() for p in step.model.parameters())
    if config.compile:
        step.model.compile(mode=config.compile_mode)  # in place, so that no name in a checkpoint changes
    strategy = plugins.build("strategy", config.strategy, step, config, device)
    picture_batch = None
    if config.log.pictures and distributed.is_main():
        count = min(config.log.pictures, len(eval_split))
        order_of_pictures = EvalOrder(count, batch_size=count)
        loader = TorchLoader(eval_split, order_of_pictures, device, on_error=config.data.on_error)
        picture_batch = next(loader.batches())
    return Run(
        config=config,
        device=device,
        dataset=dataset,
        train_split=train_split,
        order=order,
        loader=make_loader(config.data, train_split, order, device, augmentation),
        eval_loader=eval_loader(config, eval_split, device),
        strategy=strategy,
        parameters=parameters,
        picture_batch=picture_batch,
        writer=checkpoint.Writer(Path(config.run_dir) / "checkpoints", keep=config.checkpoint.keep),
    )


def _check_best(config: CheckpointConfig, known: Sequence[str]) -> None:
    """Raise InputError if best.pt needs a metric that evaluations do not give, or if delta_m cannot use a reference."""
    if config.best not in (*known, DELTA):
        raise InputError(f"checkpoint.best={config.best} is no metric. Available: {', '.join([*known, DELTA])}")
    for name, value in config.reference.items():
        if name not in known:
            near = closest(name, known)
            raise InputError(f"checkpoint.reference: {name} is no metric.{near} Available: {', '.join(known)}")
        if not value > 0:
            raise InputError(f"checkpoint.reference.{name}={value} must be > 0, what a single-task network reaches")
    if config.best == DELTA and not config.reference:
        raise InputError(
            "checkpoint.best=delta_m needs what single-task networks reach, such as "
            "checkpoint.reference={miou: 0.24, depth_abs: 0.61}"
        )
