"""How a run starts and resumes: what a checkpoint carries over, and from which checkpoint a run continues."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtunet_dist import distributed
from mtunet_dist.config import Config, config_from_text, flat, save_config
from mtunet_dist.config.typed_yaml import to_yaml
from mtunet_dist.core.comparison import DELTA
from mtunet_dist.errors import InputError, MTUNetError
from mtunet_dist.runs import checkpoint
from mtunet_dist.runs import provenance as environments
from mtunet_dist.runs.run import Run, build
from mtunet_dist.system.files import write_json
from mtunet_dist.system.folder_lock import TAKEOVER_S, lock_folder
from mtunet_dist.system.place import CONFIG

# Keys that may differ between a checkpoint and the run that continues it. Most of them change what is learned only by
# rounding (loader, cache and device: one level of RGB; strategy.compress: eight bits of a gradient). Others, such as
# epochs and on_error, are changes that the user wants.
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
    "eval_last_epochs",
    "channels_last",
    "tf32",
    "compile",
    "compile_mode",
    "device",
    "timeout_s",
    "on_write_error",
    "checkpoint",
    "log",
)


def start(config: Config, device: torch.device) -> Run:
    """Build everything that ``config`` names, lock its run folder, and restore its newest checkpoint.

    Raises InputError, before anything is written, if config, data and checkpoint do not fit together or if another
    training has the folder. Raises MTUNetError if the folder cannot be written.
    """
    run = build(config, device)
    try:
        distributed.on_main(lambda: _claim(run))
        _restore(run)
        if not run.finished:
            distributed.on_main(lambda: _describe(run))
    except MTUNetError:
        run.close()
        raise
    return run


def save(run: Run, *, best: bool, wait: bool) -> None:
    """Write a checkpoint. Every rank calls it. It changes nothing in the run.

    Returns when the state is copied. With ``wait`` it returns when the file is on disk; no rank may exit before. Raises
    MTUNetError on all ranks if this or the previous checkpoint could not be written.
    """
    check_written(run)
    ranks = distributed.gather_to_main(_rank_state(run))
    strategy_state = run.strategy.save()
    statistics = distributed.mean_over_ranks(distributed.running_statistics(run.module))
    if distributed.is_main():
        strategy_state["model"] |= statistics
        state: checkpoint.State = {
            "step": run.progress.step,
            "strategy": strategy_state,
            "ranks": ranks,
            "best": {**_best_of(run.config), "value": run.progress.best},
            "metrics": run.progress.metrics,
            "evaluated": run.progress.evaluated,
            "config": to_yaml(run.config),
            "dataset": json.dumps(run.dataset.info.to_json()),
            "fingerprint": run.train_split.fingerprint,
            "environment": environments.fingerprint(),
        }
        run.writer.submit(state, best=best)
    run.progress.submitted()
    if wait:
        distributed.on_main(run.writer.wait)


def adopt(file: Path, config: Config, best: Path | None = None) -> None:
    """Make the run folder of ``config`` continue from the checkpoint ``file`` of another run folder, or of its own.

    The settings of ``config`` must fit the checkpoint: other learning rates are allowed, another network is not. If the
    file is from another run, ``best`` is its best model up to that checkpoint. No other process may work in the run
    folder. Raises InputError if the file is damaged, MTUNetError if the run folder cannot be written.
    """
    state = checkpoint.load(file)
    state["config"] = to_yaml(config)
    folder = Path(config.run_dir) / "checkpoints"
    if best is not None:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.publish(best, folder / "best.pt")
    checkpoint.save(folder, state, keep=config.checkpoint.keep, best=False)


def check_written(run: Run) -> None:
    """Wait until the last checkpoint is on disk. Every rank calls it.

    If it could not be written, raises MTUNetError on all ranks, or with ``on_write_error=continue`` only warns.
    """

    def written() -> bool:
        try:
            run.writer.wait()
        except MTUNetError as error:
            if run.config.on_write_error == "stop":
                raise
            warnings.warn(f"{error}; training goes on, as on_write_error=continue", stacklevel=2)
            return False
        return True

    run.progress.written(distributed.on_main(written))


def _claim(run: Run) -> None:
    """Lock the run folder until the run is closed. Raises InputError as ``lock_folder`` does."""
    busy = f"another training is writing to {run.dir}; stop it, or choose another run_dir"
    # The other ranks wait during this time, a little longer than timeout_s.
    takeover_s = min(TAKEOVER_S, run.config.timeout_s)
    run.lock = lock_folder(run.dir, busy, key="run_dir=", takeover_s=takeover_s)
    run.writer.check_owner = run.lock.end_if_lost


def _describe(run: Run) -> None:
    """Write the files that describe the run. A run needs its config.yaml to resume, so without it the run does not
    start."""
    try:
        save_config(run.config, run.dir / CONFIG)
    except OSError as error:
        raise MTUNetError(f"cannot write to the run folder {run.dir}: {error.strerror}") from error
    try:
        write_json(run.dir / "environment.json", environments.environment(), indent=2)
    except OSError as error:
        warnings.warn(f"cannot write {run.dir / 'environment.json'}: {error.strerror}", stacklevel=2)


def _restore(run: Run) -> None:
    """Continue from the newest checkpoint, or start with a random state that differs for each rank."""
    torch.manual_seed(run.config.seed * 1_000_003 + distributed.rank() + 1)  # dropout differs between ranks
    file = distributed.on_main(lambda: checkpoint.latest(run.dir / "checkpoints"))
    if file is None:
        return
    if not file.is_file():
        reason = "run_dir must lie on a disk that all nodes share"
        raise InputError(f"rank {distributed.rank()} does not see {file}, which rank 0 has; {reason}")
    state = checkpoint.load(file)
    _check_same_training(run, state)
    if distributed.is_main() and (changed := environments.changes(state["environment"], environments.fingerprint())):
        warnings.warn(f"{file} was written with {', '.join(changed)}: the last bits may differ", stacklevel=2)
    run.strategy.load(state["strategy"])
    _restore_rank(run, state["ranks"])
    run.progress.step = state["step"]
    run.progress.metrics = state["metrics"]
    run.progress.evaluated = state["evaluated"]
    if {**state["best"], **_best_of(run.config)} == state["best"]:
        run.progress.best = run.progress.best_written = run.progress.best_submitted = state["best"]["value"]


def _best_of(config: Config) -> dict[str, Any]:
    """The metric and data that the value of the best model belongs to."""
    best = config.checkpoint.best
    of: dict[str, Any] = {"metric": best, "split": config.data.eval, "batch": config.eval_batch_size}
    return {**of, "reference": config.checkpoint.reference} if best == DELTA else of


def _check_same_training(run: Run, state: checkpoint.State) -> None:
    """Raise InputError if the checkpoint belongs to another training."""
    where = f"{run.dir} holds a checkpoint"
    if state["fingerprint"] != run.train_split.fingerprint:
        raise InputError(f"{where} trained on other data than {run.config.data.root}; choose another run_dir")
    if changed := changed_settings(config_from_text(state["config"]), run.config, MAY_CHANGE):
        raise InputError(f"{where} trained with {', '.join(changed)}; choose another run_dir")
    if state["step"] > run.total_steps:
        raise InputError(f"{where} of step {state['step']}, beyond epochs={run.config.epochs}")


def changed_settings(before: Config, now: Config, may_change: Collection[str]) -> list[str]:
    """The differences between two configs, such as ``optim.lr=0.1 (now 0.2)``, without the keys and sections that may
    differ."""
    old, new = flat(before), flat(now)
    return [
        f"{key}={old.get(key)} (now {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == k or key.startswith(f"{k}.") for k in may_change)
    ]


def _rank_state(run: Run) -> dict[str, Any]:
    """The state that differs between ranks: random generators, batch-norm statistics, and the loss sums of this
    epoch."""
    local = {name: buffer.cpu() for name, buffer in _local_buffers(run.module).items()}
    state: dict[str, Any] = {"rng": torch.get_rng_state(), "local": local}
    if run.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(run.device)
    return state


def _restore_rank(run: Run, ranks: list[dict[str, Any]]) -> None:
    """Restore this rank's own state.

    If the number of ranks has changed, the random state starts anew. All ranks continue from the mean of the batch-norm
    statistics, which is in the model's state, and rank 0 continues with the sums of the losses.
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
    """The buffers that differ between ranks."""
    return distributed.running_statistics(module) | _local_sums(module)


def _local_sums(module: torch.nn.Module) -> dict[str, Tensor]:
    """Sums that a weighting keeps for this rank alone."""
    return {name: buffer for name, buffer in module.named_buffers() if name.split(".")[-1].startswith("local_")}
