"""Sweeps: what a sweep file may say, and a whole sweep with a trial that fails, run twice."""

from __future__ import annotations

import dataclasses
import math
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from helpers.sweeping import command, logs_of, read_csv, run_sweep, write_sweep
from helpers.training import records, wait_until
from mtunet_dist.config import load_config
from mtunet_dist.errors import InputError
from mtunet_dist.runs import checkpoint
from mtunet_dist.sweep import main
from mtunet_dist.sweeps.config import Sweep, check_trials, find_config, load_sweep, trial_config
from mtunet_dist.sweeps.folder import read_trials
from mtunet_dist.system.folder_lock import LOCK
from mtunet_dist.system.machine import cpus
from mtunet_dist.train import train

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def sweep_file(tmp_path: Path, overrides: list[str]) -> Path:
    return write_sweep(tmp_path, overrides)


def check(file: Path, *words: str) -> Sweep:
    sweep = load_sweep(file, words)
    check_trials(sweep, find_config(sweep, file))
    return sweep


def test_a_space_may_nest_or_use_dots_and_values_survive_exactly(sweep_file: Path) -> None:
    words = ["space.weighting.name.choice=[learned,fixed]", "space.data.augment.scales.choice=[[1.0],[1.0,1.5]]"]
    sweep = check(sweep_file, "searcher=random", "trials=1", *words, "space.optim.weight_decay.uniform=[0,1]")
    kinds = {key: (dimension.kind, dimension.values) for key, dimension in sweep.dimensions.items()}
    assert kinds == {
        "optim.lr": ("choice", [1e-3, 1e30, 1e-2]),
        "weighting.name": ("choice", ["learned", "fixed"]),
        "data.augment.scales": ("choice", [[1.0], [1.0, 1.5]]),
        "optim.weight_decay": ("uniform", [0.0, 1.0]),
    }
    lr = math.pi * 1e-7
    parameters = {"optim.lr": lr, "weighting.name": "fixed", "data.augment.scales": [1.0, 1.5]}
    config = trial_config(sweep, find_config(sweep, sweep_file), parameters, Path("runs/a b"))
    assert (config.optim.lr, config.weighting["name"], config.run_dir) == (lr, "fixed", "runs/a b")
    assert config.data.augment.scales == (1.0, 1.5)
    assert config.optim.name == "sgd"  # of the base
    longer = load_sweep(sweep_file, ["epochs=7", "overrides=[data.root=a]"])
    assert trial_config(longer, find_config(longer, sweep_file), {}, Path("a")).epochs == 7


RANDOM = ["searcher=random", "trials=2"]
PBT = ["scheduler=pbt", "max_concurrent=0"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["objectiv.metrics=[miou]"], ["objectiv", "Did you mean", "objective"]),
        (["scheduler=ashaa"], ["scheduler", "ashaa", "asha"]),
        (["searcher=random"], ["trials=0", "at least 1"]),
        (["trials=3"], ["searcher=grid", "all 3 combinations", "trials=3"]),
        (["gpus_per_worker=1.5"], ["gpus_per_worker=1.5", "at most 1", "workers_per_trial"]),
        (["gpus_per_worker=2"], ["gpus_per_worker=2", "at most 1", "workers_per_trial"]),
        (["gpus_per_worker=0.5", "workers_per_trial=2"], ["gpus_per_worker=0.5", "0 or 1"]),
        (["space.device.choice=[cuda]"], ["device=cuda needs gpus_per_worker"]),
        (["asha.reduction=1"], ["asha.reduction=1", "at least 2"]),
        (["pbt.quantile=0.7"], ["quantile=0.7", "(0, 0.5]"]),
        (["space.optim.lrr.choice=[1]"], ["optim.lrr", "Did you mean", "lr"]),
        (["space.optim.weight_decay.unifrm=[0,1]"], ["space.optim.weight_decay", "Did you mean", "uniform"]),
        (["space.epochs=3"], ["space.epochs", "choice, uniform, loguniform"]),
        (["space.optim.weight_decay={choice: [1], share: [0, 1]}"], ["exactly one", "choice and share"]),
        (["space.optim.weight_decay.uniform=[0,1]"], ["searcher=grid", "space.optim.weight_decay is uniform"]),
        ([*RANDOM, "space.optim.weight_decay.uniform=[-1,1]"], ["optim.weight_decay=-1.0", "negative"]),
        ([*RANDOM, "space.epochs.uniform=[1,4]"], ["epochs=1.0", "whole number"]),
        (["space.optim.name.choice=[adam,adamm]"], ['optim.name="adamm"', "adamw"]),
        (["space.weighting.name.choice=[learned,fixd]"], ['weighting.name="fixd"', "Did you mean 'fixed'"]),
        (["space.batch_size.choice=[4,16]"], ["batch_size=16", "12 samples"]),
        (["workers_per_trial=3"], ["batch_size=4", "multiple of 3", "workers_per_trial"]),
        (["space.data.root.choice=[/no/such]"], ["/no/such", "does not exist"]),
        (["space.run_dir.choice=[a]"], ["run_dir", "each trial gets its own"]),
        (["overrides=[run_dir=a]"], ["run_dir", "each trial gets its own"]),
        (["epochs=2", "overrides=[epochs=3]"], ["epochs", "the sweep's own"]),
        (["objective.metrics=[mio]"], ["mio is no metric", "Did you mean 'miou'", "depth_abs"]),
        (["objective.metrics=[miou,depth_abs]"], ["objective.reference.miou", "got nothing"]),
        (
            ["scheduler=asha", "objective.metrics=[miou,depth_abs]", "objective.combine=pareto"],
            ["one figure", "pareto"],
        ),
        (["scheduler=asha", "asha.grace_epochs=9"], ["asha.grace_epochs=9", "epochs=2"]),
        (["scheduler=asha", "space.eval_every_epochs.choice=[0]"], ["eval_every_epochs=0", "last"]),
        (["scheduler=pbt"], ["take turns", "max_concurrent must be 0"]),
        ([*PBT, "searcher=optuna", "trials=4"], ["pbt", "searcher=random"]),
        ([*PBT, "space.optim.lr.choice=[0.1]"], ["compares trials", "there is 1"]),
        (
            [*PBT, "space.optim.name.choice=[adam,sgd]"],
            ["space.optim.name cannot change", "optim.accumulate"],
        ),
        ([*PBT, "space.model.dropout.choice=[0.1,0.2]"], ["space.model.dropout cannot change"]),
        (
            [*PBT, "space.checkpoint.every_epochs.choice=[2]"],
            ["space.checkpoint.every_epochs cannot change"],
        ),
        (["config=none.yaml"], ["config=none.yaml", "neither"]),
    ],
)
def test_what_is_wrong_is_named(sweep_file: Path, words: list[str], expected: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        check(sweep_file, *words)
    for text in expected:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lr", "weighting", "schedule", "pbt"])
def test_the_ready_sweeps_are_sweeps(name: str, prepared: Path) -> None:
    file = REPOSITORY / "tune" / f"{name}.yaml"
    sweep = load_sweep(file)
    check(file, f"overrides={[*sweep.overrides, f'data.root={prepared}', 'batch_size=4']}")


def disturb_after(line: str, file: Path, disturb: Callable[[psutil.Process], None]) -> tuple[int, list[str]]:
    """Start the sweep, and ``disturb`` its driver as soon as it prints ``line``; its exit code and what it printed."""
    # A script that runs these tests with "&" has them ignore SIGINT, and whatever they start.
    listening = ["env", "--default-signal=INT", *command(file)]
    with subprocess.Popen(listening, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = []
        for said in process.stdout:
            seen.append(said)
            if line in said:
                break
        assert line in seen[-1], seen  # it may have ended before
        disturb(psutil.Process(process.pid))
        seen += process.stdout
    return process.returncode, seen


def kill_its_worker(driver: psutil.Process, run_dir: Path) -> None:
    """End the process that trains in ``run_dir``, as the kernel does when memory runs out."""
    wait_until(lambda: checkpoint.latest(run_dir / "checkpoints") is not None)
    for process in driver.children(recursive=True):
        if any(Path(file.path) == run_dir / LOCK for file in process.open_files()):
            process.kill()


def test_a_ray_that_cannot_be_joined_is_named_at_once(sweep_file: Path) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unheard.getsockname()[1]}"
        done = run_sweep(sweep_file, "--address", address)
    assert done.returncode == 1  # not 2: a job may try again
    assert len(done.stderr.splitlines()) == 1
    assert f"error: cannot join the Ray at --address {address}" in done.stderr and "refused" in done.stderr


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """``here(file, word...)``: the sweep as ``run_sweep``, but in this process; its exit code and its errors."""

    def run(file: Path, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["sweep", str(file), *words])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, capfd.readouterr().err

    return run


def test_a_sweep_survives_a_kill_and_a_failing_trial_and_repeats_no_work(
    sweep_file: Path, tmp_path: Path, here: Callable[..., tuple[int, str]]
) -> None:
    folder = tmp_path / "sweep"
    code, _ = disturb_after("trial 00000  finished", sweep_file, psutil.Process.kill)
    assert code == -signal.SIGKILL
    done = run_sweep(sweep_file)
    assert done.returncode == 0, done.stderr
    rows = read_csv(folder / "results.csv")
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"]
    assert [row["epoch"] for row in rows] == ["2", "2", ""]
    assert rows[2]["optim.lr"] == "1e+30"
    assert rows[2]["error"].startswith("NonFiniteLossError: ")
    assert float(rows[0]["depth_abs"]) < float(rows[1]["depth_abs"])
    assert "NonFiniteLossError" in (folder / "report.md").read_text(encoding="utf-8")
    logs = logs_of(folder)
    assert [text.count("; starting;") for text in logs.values()] == [1, 1, 1]

    code, errors = here(sweep_file, "max_concurrent=2")
    assert code == 0, errors
    assert here(sweep_file, "--report")[0] == 0
    assert read_csv(folder / "results.csv") == rows and logs_of(folder) == logs
    code, errors = here(sweep_file, "seed=1")
    assert code == 2
    assert errors.startswith("error: ") and "seed=0 (now 1)" in errors

    code, errors = here(sweep_file, "--report", f"run_dir={tmp_path / 'none'}")
    assert code == 2 and "holds no sweep" in errors

    best = load_config(folder / "best.yaml")
    trial_run = load_config(folder / "trials" / rows[0]["trial"] / "config.yaml")
    assert best == dataclasses.replace(trial_run, run_dir=str(folder / "best"))
    # To the bit: that the process had trained other trials before does not matter.
    assert train(best)["depth_abs"] == float(rows[0]["depth_abs"])


def test_optuna_and_asha_survive_a_lost_worker_and_ctrl_c(sweep_file: Path, tmp_path: Path) -> None:
    base = yaml.safe_load(sweep_file.read_text(encoding="utf-8"))
    overrides = [word for word in base["overrides"] if not word.startswith("epochs=")]
    space = {"optim.lr": {"loguniform": [1e-4, 1e-2]}}
    settings = {"searcher": "optuna", "scheduler": "asha", "asha": {"reduction": 2}, "trials": 4, "epochs": 3}
    file = sweep_file.with_name("optuna.yaml")
    file.write_text(yaml.safe_dump({**base, **settings, "space": space, "overrides": overrides}), encoding="utf-8")

    run_dir = tmp_path / "sweep" / "trials" / "00000"
    code, seen = disturb_after("trial 00000  epoch 1", file, lambda driver: kill_its_worker(driver, run_dir))
    assert code == 0, seen
    (lost,) = [line for line in seen if "starts again" in line]
    rows = {row["trial"]: row for row in read_csv(tmp_path / "sweep" / "results.csv")}
    assert sorted(rows) == ["00000", "00001", "00002", "00003"]
    assert {row["status"] for row in rows.values()} <= {"finished", "stopped"}
    assert "trial 00000" in lost and "ActorDied" in lost and rows["00000"]["epoch"] == "3"
    assert logs_of(tmp_path / "sweep")["00000"].count("; resuming at step ") == 1

    file.write_text(file.read_text(encoding="utf-8").replace("trials: 4", "trials: 8"), encoding="utf-8")
    code, seen = disturb_after("trial 00004  ", file, lambda driver: driver.send_signal(signal.SIGINT))
    assert code == 130, seen
    more = run_sweep(file)
    assert more.returncode == 0, more.stderr
    assert {row["trial"]: row for row in read_csv(tmp_path / "sweep" / "results.csv")}.items() >= rows.items()
    assert len(rows) == 4 and len(read_csv(tmp_path / "sweep" / "results.csv")) == 8


def test_population_based_training_changes_running_trials(sweep_file: Path, tmp_path: Path) -> None:
    """One trial of two has a rate at which nothing is learned; it takes over the other's weights and new settings."""
    base = yaml.safe_load(sweep_file.read_text(encoding="utf-8"))
    overrides = [word for word in base["overrides"] if not word.startswith("epochs=")]
    settings = {
        "searcher": "random",
        "scheduler": "pbt",
        "pbt": {"quantile": 0.5, "resample": 0.0},
        "trials": 2,
        "epochs": 4,
        "max_concurrent": 0,
        "cpus_per_worker": cpus(),  # one at a time: they take turns
        "overrides": [*overrides, "weighting.name=fixed"],
        "space": {"optim.lr": {"loguniform": [1e-6, 1e-2]}, "weighting.weights": {"share": [0.3, 0.7]}},
    }
    sweep_file.write_text(yaml.safe_dump({**base, **settings}), encoding="utf-8")
    done = run_sweep(sweep_file, RAY_memory_usage_threshold="0.0")  # would have Ray end all workers
    assert done.returncode == 0, done.stderr
    trials = read_trials(tmp_path / "sweep")
    assert [trial.status for trial in trials] == ["finished", "finished"]
    (changed,) = [trial for trial in trials if trial.history]
    source = next(trial for trial in trials if trial is not changed)
    exploit = changed.history[-1]
    assert exploit.source == source.id
    for key, value in exploit.parameters.items():
        factor = value / source.parameters[key]
        assert factor == pytest.approx(0.8) or factor == pytest.approx(1.2) or value in (0.3, 0.7, 1e-6, 1e-2)
    folder = tmp_path / "sweep" / "trials" / changed.id
    first, last = 3 * exploit.epoch + 1, 3 * (exploit.epoch + 1)
    steps = [record for record in records(folder, "train") if first <= record["step"] <= last]
    assert steps and {record["lr"] for record in steps} == {exploit.parameters["optim.lr"]}
    share = exploit.parameters["weighting.weights"]
    assert steps[0]["weight/segmentation"] == pytest.approx(2 * share)
    assert steps[0]["weight/depth"] == pytest.approx(2 - 2 * share)
    assert f"the weights of trial {source.id} after epoch {exploit.epoch}" in logs_of(tmp_path / "sweep")[changed.id]
    # What it trained on from is the other's checkpoint: its evaluation then continues the other's, not its own.
    assert load_config(folder / "config.yaml").optim.lr == changed.parameters["optim.lr"]
