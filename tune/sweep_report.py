"""What a sweep leaves behind: a table, results.csv, and the best trial's config to train again."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mtunet_dist.config import save_config
from mtunet_dist.errors import MTUNetError
from sweep_config import Sweep, trial_config


@dataclass(frozen=True)
class Trial:
    """How one trial ended; ``metrics`` are those of its last evaluation, and ``epoch`` its epoch."""

    id: str
    status: str  # finished, stopped (by the scheduler) or failed
    parameters: dict[str, Any]
    epoch: int | None
    metrics: dict[str, float]
    error: str = ""


def ranked(trials: Sequence[Trial], sweep: Sweep) -> list[Trial]:
    """Best first by the sweep's metric; those without a number come last, by id."""
    sign = -1 if sweep.mode == "max" else 1

    def key(trial: Trial) -> tuple[float, str]:
        value = trial.metrics.get(sweep.metric, math.nan)
        return (math.inf if math.isnan(value) else sign * value, trial.id)

    return sorted(trials, key=key)


def best_of(trials: Sequence[Trial], sweep: Sweep) -> Trial:
    """The best finished trial; if none finished, the best that was stopped.

    A stopped or failed trial's last metric says little of what a whole training with its config gives.
    Raises MTUNetError when no trial has a number to go by.
    """
    for status in ("finished", "stopped"):
        for trial in ranked(trials, sweep):
            if trial.status == status and not math.isnan(trial.metrics.get(sweep.metric, math.nan)):
                return trial
    reason = next((f": {trial.error}" for trial in trials if trial.error), "")
    raise MTUNetError(f"none of the {len(trials)} trials has a {sweep.metric}{reason}")


def report(trials: Sequence[Trial], sweep: Sweep, base: Path, console: Console) -> None:
    """Write results.csv, print the table, write best.yaml. Raises MTUNetError if no trial got to an evaluation."""
    write_csv(sweep.dir / "results.csv", ranked(trials, sweep), sweep)
    console.print(table(trials, sweep))
    for trial in trials:
        if trial.error:
            console.print(f"{trial.id} failed: {trial.error}", markup=False, highlight=False, soft_wrap=True)
    best = best_of(trials, sweep)
    file = sweep.dir / "best.yaml"
    save_config(trial_config(sweep, base, best.parameters, sweep.dir / "best"), file)
    lines = [
        f"best: {best.id}, {sweep.metric} {best.metrics[sweep.metric]:.6g}, {best.status} at epoch {best.epoch}",
        f"again:   python -m mtunet_dist.train {file}",
        f"results: {sweep.dir / 'results.csv'}; run folders: {sweep.dir / 'trials'}",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def table(trials: Sequence[Trial], sweep: Sweep) -> Table:
    """The trials, best first."""
    keys = list(sweep.dimensions)
    drawn = Table(title=sweep.name)
    for heading in ("trial", "status", "epoch", *keys, sweep.metric):
        drawn.add_column(heading, overflow="fold", justify="right" if heading == sweep.metric else "left")
    for trial in ranked(trials, sweep):
        epoch = "" if trial.epoch is None else str(trial.epoch)
        parameters = [_text(trial.parameters.get(key)) for key in keys]
        drawn.add_row(trial.id, trial.status, epoch, *parameters, _text(trial.metrics.get(sweep.metric, "")))
    return drawn


def write_csv(path: Path, trials: Sequence[Trial], sweep: Sweep) -> None:
    """One line per trial: id, status, epoch, every parameter, every metric, error. Floats in full."""
    keys = list(sweep.dimensions)
    metrics = list(dict.fromkeys(name for trial in trials for name in trial.metrics))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "status", "epoch", *keys, *metrics, "error"])
        for trial in trials:
            values = [trial.parameters.get(key) for key in keys]
            words = [value if isinstance(value, str) else json.dumps(value) for value in values]
            figures = [trial.metrics.get(name, "") for name in metrics]
            writer.writerow([trial.id, trial.status, trial.epoch, *words, *figures, trial.error])


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
