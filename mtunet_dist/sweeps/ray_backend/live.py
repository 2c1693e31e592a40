"""The output of a running sweep, and the notes that the driver writes into the folders of the trials."""

from __future__ import annotations

import math
import pickle
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mtunet_dist.sweeps.config import Sweep
from mtunet_dist.sweeps.folder import Trial, read_trial, read_trials, write_outcome
from mtunet_dist.sweeps.ranking import text
from mtunet_dist.sweeps.report.hparams import write_hparams

BEST_SHOWN = 5  # of the trials that have ended; all running trials are shown


@dataclass
class Row:
    """The known state of a trial."""

    parameters: dict[str, Any]
    status: str  # as in the folder of the trial, or running, or waiting
    epoch: int | None = None
    values: tuple[float, ...] = ()


class WallTime(tune.Stopper):  # type: ignore[misc]
    """Ends the sweep, not its trials, after so many hours; 0 = never."""

    def __init__(self, hours: float) -> None:
        self.deadline = time.time() + hours * 3600 if hours else math.inf

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.time() >= self.deadline

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Always False: no trial stops by itself."""
        return False

    def stop_all(self) -> bool:
        """Tune calls it again and again."""
        return self.over


class Progress(tune.Callback):  # type: ignore[misc]
    """Shows a table that changes, or without a terminal a line for each evaluation and each end of a trial.

    It works while entered. Tune pickles it together with other objects, but never loads it.
    """

    def __init__(self, sweep: Sweep, clock: WallTime, console: Console) -> None:
        self.sweep, self.clock, self.console = sweep, clock, console
        self.goals = sweep.objective.goals
        self.rows = {trial.id: self._row(trial) for trial in read_trials(sweep.dir)}
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.began = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """The trial starts, for the first time or again."""
        folder = read_trial(self._folder(trial))
        row = self.rows[folder.id] = self._row(folder)
        row.status = "running"
        write_hparams(folder, self.sweep)
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """The trial has an evaluation."""
        row = self.rows[trial.config["trial"]]
        row.epoch, row.values = result["epoch"], self.sweep.objective.values(result)
        self._show()
        figures = "  ".join(f"{g.name} {_shown(v)}" for g, v in zip(self.goals, row.values, strict=True))
        self._say(trial, f"epoch {row.epoch}  {figures}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """The trial has lost a process. Tune starts it again."""
        self._say(trial, f"starts again after {reason(trial)}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """The trial has ended. Its process has noted whether it finished or failed; otherwise the scheduler or the time
        limit stopped it."""
        folder = self._folder(trial)
        if read_trial(folder).status == "unfinished" and not self.clock.over:
            write_outcome(folder, "stopped")
        self._ended(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """The trial has been lost as often as ``retries`` allows. The next command tries it again."""
        write_outcome(self._folder(trial), "failed", reason(trial), "lost")
        self._ended(trial)

    def _ended(self, trial: Any) -> None:
        folder = read_trial(self._folder(trial))
        self.rows[folder.id] = self._row(folder)
        write_hparams(folder, self.sweep)
        self._show()
        self._say(trial, f"{folder.status}{': ' if folder.error else ''}{folder.error}")

    def _folder(self, trial: Any) -> Any:
        return self.sweep.dir / "trials" / trial.config["trial"]

    def _row(self, trial: Trial) -> Row:
        last = trial.last
        status = "waiting" if trial.status == "unfinished" else trial.status
        values = self.sweep.objective.values(last.metrics) if last else ()
        return Row(trial.parameters, status, last.epoch if last else None, values)

    def _say(self, trial: Any, text: str) -> None:
        if self.live is None:
            print(f"trial {trial.config['trial']}  {text}", flush=True)

    def _show(self) -> None:
        if self.live:
            self.live.update(self._table(), refresh=True)

    def _table(self) -> Group:
        """The rows of the running trials and of the best ended ones."""
        table = Table(title=Text(self.sweep.name))
        for heading in ("trial", "status", "epoch", *(goal.name for goal in self.goals)):
            table.add_column(heading, justify="left" if heading in ("trial", "status") else "right")
        table.add_column("parameters", overflow="fold")
        ended = sorted((r for r in self.rows.items() if r[1].status in ("finished", "stopped")), key=self._rank)
        for name, row in [*(r for r in self.rows.items() if r[1].status == "running"), *ended[:BEST_SHOWN]]:
            values = [_shown(v) for v in row.values] or [""] * len(self.goals)
            settings = "  ".join(f"{key}={_shown(value)}" for key, value in row.parameters.items())
            epoch = "" if row.epoch is None else str(row.epoch)
            table.add_row(name, row.status, epoch, *values, Text(settings))
        counts = Counter(row.status for row in self.rows.values())
        minutes = (time.monotonic() - self.began) / 60
        line = ", ".join(f"{count} {status}" for status, count in counts.most_common())
        return Group(table, Text(f"{line}; {self.sweep.count} in all; {minutes:.1f} min"))

    def _rank(self, item: tuple[str, Row]) -> tuple[bool, float]:
        value = item[1].values[0] if item[1].values else math.nan
        return math.isnan(value), -value if self.goals[0].mode == "max" else value


def reason(trial: Any) -> str:
    """One line: the last error that a Tune trial raised, or how its process died."""
    file = trial.pickled_error_file  # Tune's own accessor looks in a place to which the file is not yet copied
    if file is None or not Path(file).is_file():  # a process that is lost before it starts leaves none
        return "no error that Tune has kept"
    error = pickle.loads(Path(file).read_bytes())
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else text(value)
