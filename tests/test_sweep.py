"""Sweeps: what a sweep file may say, and a whole sweep with a trial that fails, run twice."""

from __future__ import annotations

import csv
import dataclasses
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtunet_dist.config import load_config
from mtunet_dist.errors import InputError, MTUNetError
from mtunet_dist.train import train
from sweep_config import Sweep, check_trials, find_config, load_sweep, trial_config
from sweep_report import Trial, best_of, ranked, write_csv

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def sweep_file(tmp_path: Path, overrides: list[str]) -> Path:
    """A sweep over the tiny dataset; the base config lies beside it."""
    base = [word for word in overrides if not word.startswith("run_dir=")]
    (tmp_path / "base.yaml").write_text("optim: {name: sgd}\n", encoding="utf-8")
    sweep = {
        "name": "tiny",
        "run_dir": str(tmp_path / "sweep"),
        "config": "base.yaml",
        "overrides": base,
        "space": {"optim.lr": {"grid": [1e-3, 1e30, 1e-2]}},
        "metric": "depth_abs",
        "max_concurrent": 1,
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return file


def check(file: Path, *words: str) -> Sweep:
    sweep = load_sweep(file, words)
    check_trials(sweep, find_config(sweep, file))
    return sweep


def test_a_space_may_nest_or_use_dots_and_values_survive_exactly(sweep_file: Path) -> None:
    words = ["space.weighting.name.choice=[learned,fixed]", "space.data.augment.scales.choice=[[1.0],[1.0,1.5]]"]
    sweep = check(sweep_file, *words, "space.optim.weight_decay.uniform=[0,1]")
    kinds = {key: (dimension.kind, dimension.values) for key, dimension in sweep.dimensions.items()}
    assert kinds == {
        "optim.lr": ("grid", [1e-3, 1e30, 1e-2]),
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


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("metrc=miou", ["metrc", "Did you mean", "metric"]),
        ("scheduler=ashaa", ["scheduler", "ashaa", "asha"]),
        ("trials=0", ["trials=0", "at least 1"]),
        ("gpus_per_trial=1.5", ["gpus_per_trial=1.5", "whole"]),
        ("space.optim.lrr.choice=[1]", ["optim.lrr", "Did you mean", "lr"]),
        ("space.optim.weight_decay.unifrm=[0,1]", ["space.optim.weight_decay", "Did you mean", "uniform"]),
        ("space.epochs=3", ["space.epochs", "choice, grid, uniform, loguniform"]),
        ("space.optim.weight_decay={choice: [1], grid: [2]}", ["exactly one", "choice and grid"]),
        ("space.optim.weight_decay.uniform=[1,0]", ["space.optim.weight_decay.uniform", "a < b"]),
        ("space.optim.weight_decay.loguniform=[0,1]", ["0 < a < b"]),
        ("space.optim.weight_decay.uniform=[0,x]", ["space.optim.weight_decay.uniform", "two numbers"]),
        ("space.optim.weight_decay.choice=[]", ["space.optim.weight_decay.choice", "no value"]),
        ("space.optim.weight_decay.uniform=[-1,1]", ["optim.weight_decay=-1.0", "negative"]),
        ("space.epochs.uniform=[1,4]", ["epochs=1.0", "Integer"]),
        ("space.optim.name.choice=[adam,adamm]", ['optim.name="adamm"', "adamw"]),
        ("space.weighting.name.choice=[learned,fixd]", ['weighting.name="fixd"', "Did you mean 'fixed'"]),
        ("space.batch_size.choice=[4,16]", ["batch_size=16", "12 samples"]),
        ("space.data.root.choice=[/no/such]", ["/no/such", "does not exist"]),
        ("space.run_dir.choice=[a]", ["run_dir", "each trial gets its own"]),
        ("overrides=[run_dir=a]", ["run_dir", "each trial gets its own"]),
        ("metric=mio", ["metric=mio", "Did you mean 'miou'", "depth_abs"]),
        ("config=none.yaml", ["config=none.yaml", "neither"]),
    ],
)
def test_what_is_wrong_is_named(sweep_file: Path, word: str, expected: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        check(sweep_file, word)
    for text in expected:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"), [(["grace_epochs=9"], "epochs=2"), (["space.eval_every_epochs.choice=[0]"], "last")]
)
def test_asha_needs_something_to_compare(sweep_file: Path, words: list[str], expected: str) -> None:
    check(sweep_file, *words)
    with pytest.raises(InputError, match=expected):
        check(sweep_file, "scheduler=asha", *words)


def trial(id: str, status: str, value: float | None, **more: Any) -> Trial:
    metrics = {} if value is None else {"depth_abs": value, "miou": value}
    return Trial(id, status, {"optim.lr": 1e-3}, 1, metrics, **more)


def test_the_best_is_the_best_finished_trial(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file)
    trials = [
        trial("0", "finished", 3.0),
        trial("1", "failed", None, error="InputError: bad"),
        trial("2", "stopped", 1.0),
        trial("3", "finished", math.nan),
        trial("4", "finished", 2.0),
    ]
    assert [t.id for t in ranked(trials, sweep)] == ["2", "4", "0", "1", "3"]
    assert best_of(trials, sweep).id == "4"
    assert best_of(trials, dataclasses.replace(sweep, metric="miou")).id == "0"
    assert best_of(trials[1:4], sweep).id == "2"
    with pytest.raises(MTUNetError, match="InputError: bad"):
        best_of([trials[1], trials[3]], sweep)


def test_results_csv_reads_back_exactly(sweep_file: Path, tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file)
    values = [trial("0", "finished", 1 / 3), trial("1", "failed", None, error='a, "b"')]
    write_csv(tmp_path / "results.csv", values, sweep)
    first, second = read_csv(tmp_path / "results.csv")
    assert (float(first["depth_abs"]), float(first["optim.lr"]), first["error"]) == (1 / 3, 1e-3, "")
    assert (second["depth_abs"], second["error"]) == ("", 'a, "b"')


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def command(file: Path, *words: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "tune" / "sweep.py"), str(file), *words]


def run_sweep(file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(file, *words), capture_output=True, text=True, timeout=300)


def kill_after(line: str, file: Path) -> None:
    """Start the sweep, kill it with SIGKILL as soon as it prints ``line``."""
    with subprocess.Popen(command(file), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [next(process.stdout)]
        while line not in seen[-1]:
            seen.append(next(process.stdout, line))
        process.kill()
    assert process.returncode == -signal.SIGKILL, seen


def test_a_sweep_survives_a_kill_and_a_failing_trial_and_repeats_no_work(sweep_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    kill_after("trial 00000  finished", sweep_file)
    done = run_sweep(sweep_file)
    assert done.returncode == 0, done.stderr
    rows = read_csv(folder / "results.csv")
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"]
    assert [row["epoch"] for row in rows] == ["2", "2", ""]
    assert rows[2]["optim.lr"] == "1e+30"
    assert rows[2]["error"].startswith("NonFiniteLossError: ")
    assert float(rows[0]["depth_abs"]) < float(rows[1]["depth_abs"])
    logs = {path: path.read_text(encoding="utf-8") for path in folder.glob("trials/*/log.txt")}
    assert [text.count("; starting;") for text in logs.values()] == [1, 1, 1]

    again = run_sweep(sweep_file)
    assert again.returncode == 0, again.stderr
    assert read_csv(folder / "results.csv") == rows
    assert {path: path.read_text(encoding="utf-8") for path in folder.glob("trials/*/log.txt")} == logs
    other = run_sweep(sweep_file, "seed=1")
    assert other.returncode == 2
    assert other.stderr.startswith("error: ") and "seed=0 (now 1)" in other.stderr

    best = load_config(folder / "best.yaml")
    trial_run = load_config(folder / "trials" / rows[0]["trial"] / "config.yaml")
    assert best == dataclasses.replace(trial_run, run_dir=str(folder / "best"))
    assert train(best)["depth_abs"] == pytest.approx(float(rows[0]["depth_abs"]), rel=1e-4)
