"""One trial: an ordinary training in its own run folder, or its continuation, in a process that Ray Tune starts."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from ray import tune

from mtunet_dist import checkpoint, resume
from mtunet_dist.config import Config, config_from_text
from mtunet_dist.errors import InputError, MTUNetError
from mtunet_dist.train import train
from sweep_config import Sweep, steps_per_epoch, trial_config
from sweep_folder import PATIENCE_S, Exploit, Trial, read_trial, wait_for_folder, write_exploit, write_outcome
from sweep_search import OBJECTIVE, active_parameters
from sweep_workers import train_with_workers

OFFERED = "offered"  # in the run folder: checkpoints for other trials, by a second name of the same file
KEPT = 3  # of them


def make_trainable(sweep: Sweep, base: Path) -> Callable[[dict[str, Any]], None]:
    """What Ray runs in a process per trial. Its config has the trial's id, see ``sweep_search.search``."""
    folder, base = Path.cwd(), base.resolve()

    def trial(config: dict[str, Any]) -> None:
        os.chdir(folder)  # Ray starts elsewhere
        run_trial(sweep, base, config["trial"], active_parameters(config))

    return trial


def run_trial(sweep: Sweep, base: Path, name: str, parameters: dict[str, Any]) -> None:
    """Train trial ``name`` to its end, and note in its folder how it ended.

    An error that would come again ends it. Others are raised, and Tune tries again: out of memory, a lost process.
    """
    folder = sweep.dir / "trials" / name
    wait_for_folder(folder)
    began = time.monotonic()
    with (folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            trial = read_trial(folder)
            config = trial_config(sweep, base, parameters or trial.parameters, folder)
            if sweep.scheduler == "pbt":
                take_over(sweep, trial, parameters, config)
            metrics = train_reporting(sweep, config, log=folder / "log.txt")
        except MTUNetError as error:
            print(f"error: {error}", flush=True)
            write_outcome(folder, "failed", f"{type(error).__name__}: {error}")
            return
    write_outcome(folder, "finished", seconds=time.monotonic() - began)
    report(sweep, config, config.epochs, metrics)


def train_reporting(sweep: Sweep, config: Config, log: Path) -> dict[str, float]:
    """Train; every evaluation but the last goes to Tune, which may then end the process."""
    steps = steps_per_epoch(config)

    def on_eval(step: int, metrics: dict[str, float]) -> None:
        if step < config.epochs * steps:
            if sweep.scheduler == "pbt":  # which may stop the trial, and start it or another again from here
                offer(config, step)
            report(sweep, config, step // steps, metrics)

    if sweep.workers_per_trial > 1:
        return train_with_workers(
            config, sweep.workers_per_trial, sweep.cpus_per_worker, sweep.gpus_per_worker, on_eval, log
        )
    torch.set_num_threads(sweep.cpus_per_worker)
    return train(config, on_eval)


def report(sweep: Sweep, config: Config, epoch: int, metrics: dict[str, float]) -> None:
    """Tell Tune of an evaluation; with population-based training also from which trial and epoch others may copy."""
    figures = {**metrics, OBJECTIVE: sweep.objective.values(metrics)[0], "epoch": epoch}
    if sweep.scheduler != "pbt":
        tune.report(figures)
        return
    with tempfile.TemporaryDirectory() as folder:
        pointer = {"trial": Path(config.run_dir).name, "epoch": epoch}
        (Path(folder) / "pointer.json").write_text(json.dumps(pointer), encoding="utf-8")
        tune.report(figures, checkpoint=tune.Checkpoint.from_directory(folder))


def take_over(sweep: Sweep, trial: Trial, parameters: dict[str, Any], config: Config) -> None:
    """Let the trial go on from the weights of the trial that Tune chose, or from its own with its newest parameters."""
    folder, source = sweep.dir / "trials" / trial.id, None
    if (chosen := tune.get_checkpoint()) is not None:
        with chosen.as_directory() as where:
            pointer = json.loads((Path(where) / "pointer.json").read_text(encoding="utf-8"))
        known = trial.history[-1].parameters if trial.history else trial.parameters
        if pointer["trial"] != trial.id and parameters != known:  # else it was done before a process was lost
            source = sweep.dir / "trials" / pointer["trial"]
    if source is not None:
        steps = steps_per_epoch(config)
        file = offered(source, pointer["epoch"] * steps)
        epoch = checkpoint.step_of(file) // steps
        # First the note: a process that is lost between the two goes on with the new parameters.
        write_exploit(folder, Exploit(epoch, source.name, parameters))
        resume.adopt(file, config)
        print(f"from here on with the weights of trial {source.name} after epoch {epoch} and {parameters}", flush=True)
        return
    own = checkpoint.latest(folder / "checkpoints")
    if own is not None and config_from_text(checkpoint.load(own)["config"]) != config:
        resume.adopt(own, config)


def offer(config: Config, step: int) -> None:
    """Keep the checkpoint of ``step`` for other trials. Raises MTUNetError if it takes too long to be written."""
    run_dir = Path(config.run_dir)
    file = checkpoint.path_of(run_dir / "checkpoints", step)
    deadline = time.monotonic() + PATIENCE_S
    while not file.is_file():
        if time.monotonic() > deadline:
            raise MTUNetError(f"{file} is not written after {PATIENCE_S:.0f} s")
        time.sleep(0.01)
    (run_dir / OFFERED).mkdir(exist_ok=True)
    checkpoint.publish(file, run_dir / OFFERED / file.name)
    for old in checkpoint.by_age(run_dir / OFFERED)[KEPT:]:
        old.unlink()


def offered(folder: Path, step: int) -> Path:
    """The checkpoint of ``step`` that the trial in ``folder`` offers; if it is there no more, the next newer one."""
    files = checkpoint.by_age(folder / OFFERED)
    if not files:
        raise InputError(f"{folder} has no checkpoint to go on from")
    return next((file for file in reversed(files) if checkpoint.step_of(file) >= step), files[0])
