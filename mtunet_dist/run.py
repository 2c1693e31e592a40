"""A run: what it is built from, its folder, and the state that a checkpoint carries over.

The folder explains itself: config.yaml, environment.json, metrics.jsonl, tensorboard/, checkpoints/, pictures/.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mtunet_dist import checkpoint, distributed, plugins, tracking
from mtunet_dist.config import Config, config_from_text, flat, save_config, to_yaml
from mtunet_dist.data.loader import Loader, make_augmentation, make_loader
from mtunet_dist.data.order import EvalOrder, TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.splits import Split
from mtunet_dist.data.torch_loader import TorchLoader
from mtunet_dist.errors import InputError, MTUNetError
from mtunet_dist.evaluate import eval_loader, metric_names
from mtunet_dist.folder_lock import lock_folder
from mtunet_dist.multitask import Batch, MultiTaskStep, build_step, check_model
from mtunet_dist.strategies._strategy import Strategy

# What may differ between a checkpoint and the run that continues it: none of it changes what is learned beyond
# rounding (loader, cache and device may differ by one level of RGB), or (epochs, on_error) the user means it to.
MAY_CHANGE = (
    "run_dir",
    "data.root",
    "data.eval",
    "data.loader",
    "data.threads",
    "data.prefetch",
    "data.cache",
    "data.on_error",
    "data.dali",
    "strategy",
    "epochs",
    "eval_batch_size",
    "eval_every_epochs",
    "channels_last",
    "compile",
    "device",
    "timeout_s",
    "checkpoint",
    "log",
)


@dataclasses.dataclass
class Run:
    """What the training loop works with."""

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

    lock: IO[bytes] | None = None  # on rank 0; keeps other trainings out of the run folder

    # How far the run is.
    step: int = 0  # optimiser steps done
    best: float | None = None  # value of the metric checkpoint.best on the split data.eval
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of the newest evaluation

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
        """Whether nothing is left to do."""
        return self.step == self.total_steps

    def close(self) -> None:
        """Let others have the run folder, and the strategy what it took."""
        self.strategy.close()
        if self.lock is not None:
            self.lock.close()


def start(config: Config, device: torch.device) -> Run:
    """Build everything that ``config`` names, take its run folder, restore the newest checkpoint there.

    Raises InputError, before anything is written, if config, data and checkpoint do not fit together or another
    training has the folder.
    """
    run = _build(config, device)
    try:
        distributed.decide(lambda: _claim(run))
        _restore(run)
    except MTUNetError:
        run.close()
        raise
    if distributed.is_main() and not run.finished:
        (run.dir / "pictures").mkdir(exist_ok=True)
        save_config(config, run.dir / "config.yaml")
        text = json.dumps(tracking.environment(), indent=2) + "\n"
        (run.dir / "environment.json").write_text(text, encoding="utf-8")
    return run


def save(run: Run, *, best: bool) -> None:
    """Write a checkpoint; called on every rank. Changes nothing in the run."""
    ranks = distributed.gather_to_main(_rank_state(run))
    strategy_state = run.strategy.save()
    statistics = distributed.mean_over_ranks(distributed.running_statistics(run.module))
    state: checkpoint.State = {}
    if distributed.is_main():
        strategy_state["model"] |= statistics
        state = {
            "step": run.step,
            "strategy": strategy_state,
            "ranks": ranks,
            "best": {**_best_of(run.config), "value": run.best},
            "metrics": run.metrics,
            "config": to_yaml(run.config),
            "dataset": json.dumps(dataclasses.asdict(run.dataset.info)),
            "fingerprint": run.train_split.fingerprint,
        }

    def write() -> None:
        try:
            checkpoint.save(run.dir / "checkpoints", state, keep=run.config.checkpoint.keep, best=best)
        except OSError as error:
            raise MTUNetError(f"cannot save a checkpoint in {run.dir}: {error.strerror}") from error

    distributed.decide(write)  # no rank goes on, and perhaps ends, before the file is there


def _build(config: Config, device: torch.device) -> Run:
    dataset = PreparedDataset(Path(config.data.root))
    info = dataset.info
    train_split, eval_split = dataset.split(config.data.train), dataset.split(config.data.eval)
    order = TrainOrder(
        len(train_split),
        batch_size=config.batch_size,
        accumulate=config.optim.accumulate,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=config.seed,
    )
    augmentation = make_augmentation(config.data.augment, info, config.seed)
    torch.manual_seed(config.seed)  # the same initial weights everywhere
    step = build_step(config, info.classes, info.depth)
    check_model(step, info.height, info.width)
    known = metric_names(step.tasks)
    if config.checkpoint.best not in known:
        raise InputError(f"checkpoint.best={config.checkpoint.best} is no metric. Available: {', '.join(known)}")
    parameters = sum(p.numel() for p in step.model.parameters())
    if config.compile:
        step.model.compile()  # in place, so that no name in a checkpoint changes
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
    )


def _restore(run: Run) -> None:
    """Continue from the newest checkpoint, or begin with a random state of this rank's own."""
    torch.manual_seed(run.config.seed * 1_000_003 + distributed.rank() + 1)  # dropout differs between ranks
    file = distributed.decide(lambda: checkpoint.latest(run.dir / "checkpoints"))
    if file is None:
        return
    if not file.is_file():
        reason = "run_dir must lie on a disk that all nodes share"
        raise InputError(f"rank {distributed.rank()} does not see {file}, which rank 0 has; {reason}")
    state = checkpoint.load(file)
    _check_same_training(run, state)
    run.strategy.load(state["strategy"])
    _restore_rank(run, state["ranks"])
    run.step = state["step"]
    run.metrics = state["metrics"]
    if {**state["best"], **_best_of(run.config)} == state["best"]:
        run.best = state["best"]["value"]


def _best_of(config: Config) -> dict[str, str | int]:
    """What the value of the best model is a value of."""
    return {"metric": config.checkpoint.best, "split": config.data.eval, "batch": config.eval_batch_size}


def _check_same_training(run: Run, state: checkpoint.State) -> None:
    """Refuse to continue a checkpoint of another training."""
    where = f"{run.dir} holds a checkpoint"
    if state["fingerprint"] != run.train_split.fingerprint:
        raise InputError(f"{where} trained on other data than {run.config.data.root}; choose another run_dir")
    before = flat(config_from_text(state["config"]))
    now = flat(run.config)
    changed = [
        f"{key}={before.get(key)} (now {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == k or key.startswith(k + ".") for k in MAY_CHANGE)
    ]
    if changed:
        raise InputError(f"{where} trained with {', '.join(changed)}; choose another run_dir")
    if state["step"] > run.total_steps:
        raise InputError(f"{where} of step {state['step']}, beyond epochs={run.config.epochs}")


def _rank_state(run: Run) -> dict[str, Any]:
    """What differs between ranks: random generators, batch-norm statistics, and the losses of the epoch so far."""
    local = {name: buffer.cpu() for name, buffer in _local_buffers(run.module).items()}
    state: dict[str, Any] = {"rng": torch.get_rng_state(), "local": local}
    if run.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(run.device)
    return state


def _restore_rank(run: Run, ranks: list[dict[str, Any]]) -> None:
    """Give this rank its own state back.

    With another number of ranks the random state starts anew, all continue from the mean of the batch-norm
    statistics, which is in the model's state, and rank 0 carries on the sums of the losses.
    """
    mine = _local_buffers(run.module)
    if len(ranks) == distributed.world_size():
        state = ranks[distributed.rank()]
        torch.set_rng_state(state["rng"])
        if run.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], run.device)
        for name, buffer in mine.items():
            buffer.copy_(state["local"][name])
        return
    for name, buffer in _local_sums(run.module).items():
        buffer.zero_()
        if distributed.is_main():
            buffer.copy_(torch.stack([state["local"][name] for state in ranks]).sum(0))


def _local_buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    """The buffers that are not the same on all ranks."""
    return distributed.running_statistics(module) | _local_sums(module)


def _local_sums(module: torch.nn.Module) -> dict[str, Tensor]:
    """Sums that a weighting keeps for this rank alone."""
    return {name: buffer for name, buffer in module.named_buffers() if name.split(".")[-1].startswith("local_")}


def _claim(run: Run) -> None:
    """Take the run folder until the run is closed. Raises InputError as ``lock_folder``."""
    run.lock = lock_folder(run.dir, f"another training is writing to {run.dir}; stop it, or choose another run_dir")
