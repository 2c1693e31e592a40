"""All that touches Ray: a Tuner over ordinary trainings, and a Ray of this command's own to run it in."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from mtunet_dist.train import train
from sweep_config import Sweep, steps_per_epoch, trial_config
from sweep_report import Trial

# Read when ray is imported.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else one is left in the home folder
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one is never silent
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends here like a kill; Tune's own way looks like success
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # runs write their own TensorBoard events

import ray
from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

STATE = "ray_tune"  # in the folder of the sweep: what Tune knows of the trials
OBJECT_STORE_BYTES = 100_000_000  # nothing of size passes through it


class Progress(tune.Callback):  # type: ignore[misc]
    """One line for each evaluation and each end of a trial. Tune pickles it with the sweep."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """An evaluation."""
        say(trial, f"epoch {result['epoch']}  {self.metric} {result[self.metric]:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Finished, or stopped by the scheduler."""
        say(trial, "finished" if trial.last_result.get("finished") else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Failed."""
        say(trial, "failed")


def say(trial: Any, text: str) -> None:
    """Print a line about a Tune trial."""
    print(f"trial {number(trial.trial_id)}  {text}", flush=True)


class ResumableASHA(ASHAScheduler):  # type: ignore[misc]
    """ASHA that a resumed sweep does not begin anew: Tune keeps no scheduler's state, but the run folders know."""

    def __init__(self, sweep: Sweep, epochs: int) -> None:
        super().__init__("epoch", max_t=epochs, grace_period=sweep.grace_epochs, reduction_factor=sweep.reduction)
        self.trials, self.name = sweep.dir.resolve() / "trials", sweep.metric

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial, new or of before: tell ASHA its past evaluations."""
        super().on_trial_add(tune_controller, trial)
        for epoch, value in evaluations(self.trials / number(trial.trial_id), self.name):
            self.on_trial_result(tune_controller, trial, {"epoch": epoch, self.name: value})


def evaluations(run_dir: Path, metric: str) -> Iterator[tuple[int, float]]:
    """Epoch and ``metric`` (nan if undefined) of each evaluation that a run folder holds."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        if record["kind"] == "eval":
            value = record.get(metric)
            yield round(record["epoch"]), math.nan if value is None else value


def number(trial_id: str) -> str:
    """The part of a Tune trial's id that counts: 00003. With the sweep's seed it always has the same parameters."""
    return trial_id.rpartition("_")[2]


def make_trainable(sweep: Sweep, base: Path) -> Callable[[dict[str, Any]], None]:
    """What Ray runs in a process per trial: an ordinary training, or its continuation."""
    folder, base = Path.cwd(), base.resolve()

    def trial(parameters: dict[str, Any]) -> None:
        os.chdir(folder)  # Ray starts elsewhere
        torch.set_num_threads(sweep.cpus_per_trial)
        run_dir = sweep.dir / "trials" / number(tune.get_context().get_trial_id())
        config = trial_config(sweep, base, parameters, run_dir)
        steps = steps_per_epoch(config)

        def on_eval(step: int, metrics: dict[str, float]) -> None:
            if step < config.epochs * steps:
                tune.report({**metrics, "epoch": step // steps})

        # The last evaluation is reported when its checkpoint is safe; a run that had already finished reports it too.
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            metrics = train(config, on_eval)
        tune.report({**metrics, "epoch": config.epochs, "finished": True})

    return trial


def make_tuner(sweep: Sweep, base: Path, epochs: int) -> tune.Tuner:
    """A new sweep, or the rest of the one that the folder holds."""
    state = sweep.dir.resolve() / STATE
    resources = {"CPU": sweep.cpus_per_trial, "GPU": sweep.gpus_per_trial}
    trainable = tune.with_resources(make_trainable(sweep, base), resources)
    if tune.Tuner.can_restore(str(state)) and any(state.glob("experiment_state-*.json")):
        return tune.Tuner.restore(str(state), trainable, resume_unfinished=True)
    shutil.rmtree(state, ignore_errors=True)  # killed before it knew of any trial
    kinds = {"choice": tune.choice, "grid": tune.grid_search}
    ranges = {"uniform": tune.uniform, "loguniform": tune.loguniform}
    space = {
        key: ranges[d.kind](*d.values) if d.kind in ranges else kinds[d.kind](d.values)
        for key, d in sweep.dimensions.items()
    }
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=sweep.metric,
            mode=sweep.mode,
            num_samples=sweep.trials,
            scheduler=ResumableASHA(sweep, epochs) if sweep.scheduler == "asha" else None,
            search_alg=BasicVariantGenerator(random_state=sweep.seed, max_concurrent=sweep.max_concurrent),
            trial_dirname_creator=lambda trial: number(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name=STATE,
            storage_path=str(state.parent),
            callbacks=[JsonLoggerCallback(), Progress(sweep.metric)],
            verbose=0,
        ),
    )


def outcome(result: Any, metrics: list[str]) -> Trial:
    """How the trial behind a Tune result ended."""
    folder, last = Path(result.path), result.metrics or {}
    status = "failed" if result.error else "finished" if last.get("finished") else "stopped"
    return Trial(
        id=folder.name,
        status=status,
        parameters=json.loads((folder / "params.json").read_text(encoding="utf-8")),
        epoch=last.get("epoch"),
        metrics={name: last[name] for name in metrics if name in last},
        error=reason(result.error) if result.error else "",
    )


def reason(error: Exception) -> str:
    """One line: what the trial raised, or how its process died."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of this command's own; nothing of it stays."""
    # Ray's sockets lie below, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            num_gpus=torch.cuda.device_count(),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            _temp_dir=folder,
        )
        with _until_shutdown():
            yield


@contextmanager
def cluster_ray(address: str) -> Iterator[None]:
    """The Ray that runs at ``address``, started by others with the token in RAY_AUTH_TOKEN."""
    ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    with _until_shutdown():
        yield


@contextmanager
def _until_shutdown() -> Iterator[None]:
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # Tune would print each failed trial's traceback
    try:
        yield
    finally:
        ray.shutdown()
