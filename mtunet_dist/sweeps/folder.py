"""The folder of a sweep. It is the whole state of the sweep: its search, and the parameters and progress of each trial.

``trials/00003`` is an ordinary run folder with three more files:

- ``trial.json``: its parameters, written before it starts;
- ``history.jsonl``: with population-based training, one line each time it copied another trial's weights;
- ``outcome.json``: how it ended; absent while it runs or waits to continue.

No file in the folder holds the folder's own path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtunet_dist.errors import InputError
from mtunet_dist.system import records
from mtunet_dist.system.files import read_json, write_json
from mtunet_dist.system.folder_lock import lock_folder

PATIENCE_S = 120.0  # time for another process to write a checkpoint, or to leave this one
# Time for another process to leave a run folder. After about three minutes Ray ends the processes on a node that is cut
# off, but after one minute it already starts their trials elsewhere.
ORPHAN_S = 360.0

Status = Literal["finished", "stopped", "failed", "unfinished"]
# The kind of a failed trial: a loss that is not finite and would be so again; an InputError, which the user must fix;
# or another error, such as a full disk or a killed process, which does not depend on the trial's parameters.
Failure = Literal["", "loss", "input", "lost"]
MENDABLE = ("input", "lost")


@dataclass(frozen=True)
class Evaluation:
    """The metrics after an epoch, nan where undefined."""

    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Exploit:
    """At ``epoch`` the trial continued from the weights of the trial ``source``, with new ``parameters``."""

    epoch: int
    source: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """The state of a trial in its folder. ``stopped`` means by the scheduler, because other trials were better."""

    id: str  # 00003
    parameters: dict[str, Any]  # of the active dimensions; after an exploit the newest ones
    status: Status
    evaluations: tuple[Evaluation, ...] = ()
    error: str = ""
    failure: Failure = ""
    history: tuple[Exploit, ...] = ()

    @property
    def last(self) -> Evaluation | None:
        """The newest evaluation."""
        return self.evaluations[-1] if self.evaluations else None


def trial_folder(sweep: Path, number: int) -> Path:
    """The folder of trial ``number`` of the sweep in the folder ``sweep``."""
    return sweep / "trials" / f"{number:05d}"


def wait_for_folder(folder: Path) -> None:
    """Wait until no process trains in the run folder: the process that Tune ended may still be shutting down."""
    deadline, busy = time.monotonic() + ORPHAN_S, f"another training is writing to {folder}"
    while True:
        try:
            lock_folder(folder, busy).close()
        except InputError as error:
            if str(error) != busy or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def read_trials(sweep: Path) -> list[Trial]:
    """The trials of the sweep in the folder ``sweep``, by id."""
    return [read_trial(file.parent) for file in sorted((sweep / "trials").glob("*/trial.json"))]


def read_trial(folder: Path) -> Trial:
    """The trial in the run folder ``folder``."""
    history = tuple(
        Exploit(record["epoch"], record["from"], record["parameters"])
        for record in records.read(folder / "history.jsonl", {"epoch": int, "from": str, "parameters": dict})
    )
    ended = (folder / "outcome.json").is_file()
    outcome: dict[str, Any] = _read(folder / "outcome.json") if ended else {"status": "unfinished"}
    return Trial(
        id=folder.name,
        parameters=history[-1].parameters if history else _read(folder / "trial.json")["parameters"],
        status=outcome["status"],
        evaluations=tuple(evaluations(folder)),
        error=outcome.get("error", ""),
        failure=outcome.get("failure", ""),
        history=history,
    )


def evaluations(folder: Path) -> Iterator[Evaluation]:
    """The evaluations after whole epochs from the run folder's metrics.jsonl, the newest of each epoch."""
    newest: dict[int, Evaluation] = {}
    for record in records.metrics(folder, "eval"):
        epoch = round(record["epoch"])
        metrics = {
            name: math.nan if value is None else float(value)
            for name, value in record.items()
            if (value is None or isinstance(value, int | float)) and name not in ("epoch", "step", "time")
        }
        newest[epoch] = Evaluation(epoch, metrics)
    yield from (newest[epoch] for epoch in sorted(newest))


def write_parameters(folder: Path, parameters: dict[str, Any]) -> None:
    """Make the trial that tries ``parameters``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "trial.json", {"parameters": parameters})


def write_exploit(folder: Path, exploit: Exploit) -> None:
    """Note that the trial continued from another trial's weights."""
    line = {"epoch": exploit.epoch, "from": exploit.source, "parameters": exploit.parameters}
    records.append(folder / "history.jsonl", line)


def write_outcome(
    folder: Path, status: Status, error: str = "", failure: Failure = "", seconds: float | None = None
) -> None:
    """Note how the trial ended and, if known, how long its training took since its last start."""
    outcome = {"status": status, "error": error, "failure": failure, "seconds": seconds}
    write_json(folder / "outcome.json", outcome)


def try_again(sweep: Path) -> list[str]:
    """Reopen the failed trials that may succeed now. Returns their ids."""
    again = [trial.id for trial in read_trials(sweep) if trial.failure in MENDABLE]
    for id in again:
        (sweep / "trials" / id / "outcome.json").unlink()
    return again


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = read_json(path)
    return value
