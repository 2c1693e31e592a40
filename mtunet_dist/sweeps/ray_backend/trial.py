"""One trial: an ordinary training in its own run folder, or its continuation, in a process that Ray Tune starts."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from ray import tune

from mtunet_dist.config import Config, config_from_text
from mtunet_dist.errors import InputError, MTUNetError, NonFiniteLossError
from mtunet_dist.runs import checkpoint, resume
from mtunet_dist.sweeps.config import Sweep, steps_per_epoch, trial_config
from mtunet_dist.sweeps.folder import (
    PATIENCE_S,
    Exploit,
    Failure,
    Trial,
    read_trial,
    wait_for_folder,
    write_exploit,
    write_outcome,
)
from mtunet_dist.sweeps.ray_backend.search import OBJECTIVE, active_parameters
from mtunet_dist.sweeps.ray_backend.workers import train_with_workers
from mtunet_dist.train import train

OFFERED, TAKEN = "offered", "taken"  # in the run folder: checkpoints for and from other trials, under a second name
KEPT = 3  # how many of them


def make_trainable(sweep: Sweep, base: Path) -> Callable[[dict[str, Any]], None]:
    """The class that Ray runs in a process per trial. Its config has the trial's id, see ``search.search``."""
    folder, base = Path.cwd(), base.resolve()

    def trial(config: dict[str, Any]) -> None:
        os.chdir(folder)  # Ray starts it in another folder
        # How long a process may take to leave a trial, with its last checkpoint, before it continues with another
        # trial.
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(int(PATIENCE_S))
        run_trial(sweep, base, config["trial"], active_parameters(config))

    return trial


def run_trial(sweep: Sweep, base: Path, name: str, parameters: dict[str, Any]) -> None:
    """Train trial ``name`` to its end, and note in its folder how it ended.

    An error that would come again at once ends the trial. Other errors are raised, and Tune tries again: out of memory,
    a lost process, a full disk.
    """
    gc.collect()  # of the previous trial in this process
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    folder = sweep.dir / "trials" / name
    wait_for_folder(folder)
    began = time.monotonic()
    with (folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            trial = read_trial(folder)
            config = trial_config(sweep, base, parameters or trial.parameters, folder)
            if not sweep.gpus_per_worker:  # Ray hides no GPU then
                config = dataclasses.replace(config, device="cpu")
            if sweep.scheduler == "pbt":
                take_over(sweep, trial, parameters, config)
            metrics = train_reporting(sweep, config, log=folder / "log.txt")
        except (InputError, NonFiniteLossError) as error:
            print(f"error: {error}", flush=True)
            failure: Failure = "input" if isinstance(error, InputError) else "loss"
            write_outcome(folder, "failed", f"{type(error).__name__}: {error}", failure)
            return
    write_outcome(folder, "finished", seconds=time.monotonic() - began)
    report(sweep, config, config.epochs, metrics)


def train_reporting(sweep: Sweep, config: Config, log: Path) -> dict[str, float]:
    """Train. Every evaluation but the last goes to Tune, which may then end the process."""
    steps = steps_per_epoch(config)

    def on_eval(step: int, metrics: dict[str, float]) -> None:
        if step < config.epochs * steps:
            if sweep.scheduler == "pbt":  # it may stop the trial, and restart it or another one from here
                offer(config, step)
            report(sweep, config, step // steps, metrics)

    if sweep.workers_per_trial > 1:
        return train_with_workers(
            config, sweep.workers_per_trial, sweep.cpus_per_worker, sweep.gpus_per_worker, on_eval, log
        )
    torch.set_num_threads(sweep.cpus_per_worker)
    return train(config, on_eval)


def report(sweep: Sweep, config: Config, epoch: int, metrics: dict[str, float]) -> None:
    """Report an evaluation to Tune; with population-based training also the trial and epoch that others may copy."""
    figures = {**metrics, OBJECTIVE: sweep.objective.values(metrics)[0], "epoch": epoch}
    if sweep.scheduler != "pbt":
        tune.report(figures)
        return
    with tempfile.TemporaryDirectory() as folder:
        pointer = {"trial": Path(config.run_dir).name, "epoch": epoch}
        (Path(folder) / "pointer.json").write_text(json.dumps(pointer), encoding="utf-8")
        tune.report(figures, checkpoint=tune.Checkpoint.from_directory(folder))


def take_over(sweep: Sweep, trial: Trial, parameters: dict[str, Any], config: Config) -> None:
    """Continue the trial from the weights of the trial that Tune chose, or from its own with its newest parameters."""
    folder, steps = sweep.dir / "trials" / trial.id, steps_per_epoch(config)
    pointer: dict[str, Any] = {"trial": trial.id, "epoch": 0}
    if (chosen := tune.get_checkpoint()) is not None:
        with chosen.as_directory() as where:
            pointer = json.loads((Path(where) / "pointer.json").read_text(encoding="utf-8"))
    wanted = Exploit(pointer["epoch"], pointer["trial"], parameters)
    if wanted.source == trial.id or (trial.history and trial.history[-1] == wanted):  # done before a process was lost
        own = checkpoint.latest(folder / "checkpoints")
        if own is not None and config_from_text(checkpoint.load(own)["config"]) != config:
            resume.adopt(own, config)
        return
    file, best = take(sweep.dir / "trials" / wanted.source, wanted.epoch * steps, folder)
    resume.adopt(file, config, best)
    write_exploit(folder, wanted)
    for given in (folder / OFFERED).glob("step_*.pt"):  # from a past that this trial no longer has
        if checkpoint.step_of(given) > checkpoint.step_of(file):
            given.unlink()
    shutil.rmtree(folder / TAKEN)
    print(
        f"from here on the weights of trial {wanted.source} after epoch {wanted.epoch}, with {parameters}",
        flush=True,
    )


def offer(config: Config, step: int) -> None:
    """Keep the checkpoint of ``step`` for other trials. Raises MTUNetError if it takes too long to be written."""
    checkpoints, folder = Path(config.run_dir) / "checkpoints", Path(config.run_dir) / OFFERED
    file = checkpoint.path_of(checkpoints, step)
    deadline = time.monotonic() + PATIENCE_S
    while not file.is_file():
        if time.monotonic() > deadline:
            raise MTUNetError(f"{file} is not written after {PATIENCE_S:.0f} s")
        time.sleep(0.01)
    folder.mkdir(exist_ok=True)
    if (checkpoints / "best.pt").is_file():
        checkpoint.publish(checkpoints / "best.pt", best_beside(folder / file.name))
    checkpoint.publish(file, folder / file.name)
    for old in checkpoint.by_age(folder)[KEPT:]:
        old.unlink()
        best_beside(old).unlink(missing_ok=True)


def take(source: Path, step: int, folder: Path) -> tuple[Path, Path | None]:
    """Give the checkpoint of ``step`` that another trial offers a name below ``folder``, and the best one until then.

    If that checkpoint is no longer offered, take the next newer one. Raises InputError if there is none.
    """
    mine = folder / TAKEN
    mine.mkdir(exist_ok=True)
    for _ in range(KEPT):
        files = checkpoint.by_age(source / OFFERED)
        if not files:
            break
        file = next((file for file in reversed(files) if checkpoint.step_of(file) >= step), files[0])
        try:
            best = best_beside(file) if best_beside(file).is_file() else None
            for each in (file, best):
                if each is not None:
                    checkpoint.publish(each, mine / each.name)
        except FileNotFoundError:  # the other trial has just moved on
            continue
        return mine / file.name, mine / best.name if best else None
    raise InputError(f"{source} offers no checkpoint to go on from")


def best_beside(file: Path) -> Path:
    """The path of the best model up to an offered checkpoint."""
    return file.with_name(f"best_of_{file.name}")
