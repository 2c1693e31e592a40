"""Configurations per hour: a sweep against a shell that trains the same configurations one after another.

    OMP_NUM_THREADS=2 python benchmarks/sweep_overhead.py tune/schedule.yaml --out benchmarks/results/sweep_cpu.md

Three ways on the same cores: ``python -m mtunet_dist.train`` for each configuration, which may take all cores; the
sweep without a scheduler, which trains several at a time with as many threads as its file says; and the sweep as it
is, which stops the worse early. The configurations are those that the sweep tried, so with searcher=optuna the three
differ in what they could learn from; use searcher=random to compare like with like. ``key=value`` words change the
sweep. The overhead of a trial is the time of the slots that the sweep kept busy, less what its trainings took, divided
by the trials; it holds the start of Ray and the report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtunet_dist.errors import InputError
from mtunet_dist.sweeps.config import Sweep, load_sweep
from mtunet_dist.sweeps.folder import Trial, evaluations, read_trials
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command
from mtunet_dist.system.machine import cpus
from turns import about, markdown

REPOSITORY = Path(__file__).parents[1]

HEADER = ("way", "trained to the end", "minutes", "configurations per hour", "ratio", "best found")


@dataclass(frozen=True)
class Outcome:
    """The result of one way."""

    seconds: float
    best: float  # among the configurations that were trained to the end
    finished: int


def call(words: Sequence[str], log: Path) -> float:
    """Run a command to its end. Returns its seconds. Raises InputError with the end of its output if it fails."""
    started = time.monotonic()
    with log.open("ab") as file:
        code = subprocess.run([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        end = " ".join(log.read_text(encoding="utf-8", errors="replace")[-1000:].split())
        raise InputError(f"{' '.join(words)} ended with exit code {code}: {end}")
    return time.monotonic() - started


def best_of(trials: Sequence[Trial], sweep: Sweep) -> float:
    """The best value of the sweep's goal at the end of a training that finished."""
    goal = sweep.objective.goals[0]
    values = [sweep.objective.values(t.last.metrics)[0] for t in trials if t.status == "finished" and t.last]
    return max(values) if goal.mode == "max" else min(values)


def run_sweep(file: Path, words: Sequence[str], folder: Path) -> tuple[Outcome, list[Trial], Sweep]:
    """Run the sweep by its command."""
    words = [*words, f"run_dir={folder}"]
    seconds = call([str(REPOSITORY / "tune" / "sweep.py"), str(file), *words], folder.with_suffix(".log"))
    sweep, trials = load_sweep(file, words), read_trials(folder)
    finished = sum(trial.status == "finished" for trial in trials)
    return Outcome(seconds, best_of(trials, sweep), finished), trials, sweep


def run_shell(trials: Sequence[Trial], sweep: Sweep, tried: Path, folder: Path) -> Outcome:
    """Run one training after the other, with the configurations that another folder has ``tried``."""
    folder.mkdir()
    seconds, ended = 0.0, []
    for trial in trials:
        run_dir = folder / trial.id
        config = tried / "trials" / trial.id / "config.yaml"
        seconds += call(["-m", "mtunet_dist.train", str(config), f"run_dir={run_dir}"], folder / f"{trial.id}.log")
        ended.append(Trial(trial.id, trial.parameters, "finished", tuple(evaluations(run_dir))))
    return Outcome(seconds, best_of(ended, sweep), len(ended))


def overhead(outcome: Outcome, trials: Sequence[Trial], sweep: Sweep, folder: Path) -> float:
    """Seconds per trial beyond the training itself, of a sweep without early stopping."""
    trained: list[float] = [
        json.loads((folder / "trials" / t.id / "outcome.json").read_text())["seconds"] for t in trials
    ]
    slots = cpus() // (sweep.cpus_per_worker * sweep.workers_per_trial)
    busy = min(slots, sweep.max_concurrent or slots) * outcome.seconds
    return (busy - sum(trained)) / len(trials)


@command
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="a sweep file whose scheduler is asha")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--out", type=arguments.file(".md"), help="a Markdown file for the table")
    args = parser.parse_args()
    if load_sweep(args.sweep, args.overrides).scheduler != "asha":
        raise InputError(f"{args.sweep}: scheduler must be asha, the others stop no trial")
    with tempfile.TemporaryDirectory() as folder:
        stopping, whole, shell = (Path(folder) / name for name in ("stopping", "whole", "shell"))
        early, trials, sweep = run_sweep(args.sweep, args.overrides, stopping)
        full, full_trials, full_sweep = run_sweep(args.sweep, [*args.overrides, "scheduler=none"], whole)
        one_by_one = run_shell(trials, sweep, stopping, shell)
        per_trial = overhead(full, full_trials, full_sweep, whole)
    rows = []
    for name, outcome in (
        ("shell, one after another", one_by_one),
        ("sweep, no scheduler", full),
        ("sweep, asha", early),
    ):
        rate = len(trials) * 3600 / outcome.seconds
        ratio = one_by_one.seconds / outcome.seconds
        best = f"{outcome.best:.4g}"
        rows.append([name, str(outcome.finished), f"{outcome.seconds / 60:.1f}", f"{rate:.0f}", f"{ratio:.2f}", best])
    goal = sweep.objective.goals[0]
    title = f"### {sweep.name}: {len(trials)} configurations; best found: {goal.name}, {goal.mode}"
    overheads = f"Overhead of a trial beyond its training: {per_trial:.1f} s."
    text = f"{about('sweep.py')}\n\n{title}\n\n{markdown(HEADER, rows)}\n{overheads}\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
