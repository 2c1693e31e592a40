"""Trials of two processes each, inside Tune: the result of two ranks, a killed process, a stop, an error."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.training import assert_same_state, final_state, on_two_ranks, records, steps_done, wait_until
from mtunet_dist.config import load_config
from mtunet_dist.errors import InputError
from mtunet_dist.runs import checkpoint
from mtunet_dist.sweeps.ray_backend.tuner import local_ray, ray, tune  # it sets what Ray reads when it is imported
from mtunet_dist.sweeps.ray_backend.workers import resources, train_with_workers
from mtunet_dist.train import train

EPOCHS = 3
TRIALS = {"stopped": ["epochs=1000"], "killed": [], "broken": []}  # with settings of their own


def trained_by(log: Path) -> list[int]:
    """The workers that write to ``log``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = (process / "cmdline").read_bytes().startswith(b"ray::Worker")  # not their children
            if ours and (process / "fd" / "1").readlink() == log:
                found.append(int(process.name))
        except OSError:
            continue
    return sorted(found)


def trial(parameters: dict[str, Any], folder: Path, overrides: list[str]) -> None:
    """Trains in ``folder/NAME``; notes there what came of it."""
    name, run_dir = parameters["name"], folder / parameters["name"]
    config = load_config(None, [*overrides, f"run_dir={run_dir}", *TRIALS[name]])
    log, outcome = folder / f"{name}.log", folder / f"{name}.json"

    def on_eval(step: int, metrics: dict[str, float]) -> None:
        assert steps_done(run_dir) == step  # the training waits
        if name == "killed" and step == 6 and not outcome.exists():
            wait_until(checkpoint.path_of(run_dir / "checkpoints", step).is_file)
            os.kill(trained_by(log)[-1], signal.SIGKILL)
            outcome.write_text("killed")
        tune.report({"name": name, "step": step, "stop": int(name == "stopped")})

    if name == "stopped":
        refused = load_config(None, [*overrides, f"run_dir={folder / 'refused'}", "checkpoint.best=no_metric"])
        with pytest.raises(InputError, match=r"^checkpoint.best=no_metric"):
            train_with_workers(refused, 2, 1, 0, on_eval, log)
    if name == "broken":  # in a way that is not the user's error
        config = dataclasses.replace(config, seed="no number")  # type: ignore[arg-type]
    metrics = train_with_workers(config, 2, 1, 0, on_eval, log)
    outcome.write_text(json.dumps(metrics))


@pytest.mark.slow
def test_trials_of_two_processes_end_as_two_ranks_do_and_leave_nothing(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of Ray's processes
    overrides = [*overrides, f"epochs={EPOCHS}", "log.every_steps=1"]
    reference = tmp_path / "run"
    on_two_ranks(train, load_config(None, overrides))
    with local_ray():
        trainable = tune.with_parameters(trial, folder=tmp_path, overrides=overrides)
        results = tune.Tuner(
            tune.with_resources(trainable, resources(2, cpus=1, gpus=0)),
            param_space={"name": tune.grid_search(list(TRIALS))},
            tune_config=tune.TuneConfig(max_concurrent_trials=1),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(tmp_path),
                stop={"stop": 1},
                failure_config=tune.FailureConfig(max_failures=1),
                verbose=0,
            ),
        ).fit()
        wait_until(lambda: not any(trained_by(tmp_path / f"{name}.log") for name in TRIALS), patience_s=60)
        wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], patience_s=60)
        assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}

    (error,) = results.errors
    assert isinstance(error.cause, ValueError) and "no number" in str(error.cause)
    assert "\nValueError: invalid literal" in (tmp_path / "broken.log").read_text()
    log = (tmp_path / "killed.log").read_text()
    assert [log.count(f"; {how}; run folder") for how in ("starting", "resuming at step 6")] == [1, 1]
    assert_same_state(final_state(tmp_path / "killed"), final_state(reference))
    metrics = json.loads((tmp_path / "killed.json").read_text())
    assert metrics.items() <= records(reference, "eval")[-1].items()

    assert [r["step"] for r in records(tmp_path / "stopped", "eval")] == [3]


def test_a_process_takes_a_whole_gpu_or_none() -> None:
    assert resources(2, cpus=3, gpus=1).bundles == [{"CPU": 3, "GPU": 1}] * 2
    with pytest.raises(InputError, match=r"gpus=0\.5"):
        resources(2, cpus=1, gpus=0.5)
