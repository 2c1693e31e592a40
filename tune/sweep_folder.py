"""The folder of a sweep, which is all its state: what it searches, and for each trial what it tries and how it goes.

``trials/00003`` is an ordinary run folder with three files more:

- ``trial.json``: its parameters, written before it starts;
- ``history.jsonl``: with population-based training, one line each time it took over another trial's weights;
- ``outcome.json``: how it ended; absent while it runs or waits to go on.

Nothing in the folder says where it lies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtunet_dist import records
from mtunet_dist.errors import InputError
from mtunet_dist.files import read_json, write_json
from mtunet_dist.folder_lock import lock_folder

PATIENCE_S = 120.0  # for another process to write a checkpoint, or to leave this one
# For another process to leave a run folder. Ray ends those on a node that is cut off after about three minutes, while
# it starts their trials elsewhere after one.
ORPHAN_S = 360.0

Status = Literal["finished", "stopped", "failed", "unfinished"]
# Of a failed trial: a loss that is not finite, which would come again; something to be mended that an InputError names;
# or anything else, as a full disk or a killed process, which says nothing of what the trial tries.
Failure = Literal["", "loss", "input", "lost"]
MENDABLE = ("input", "lost")


@dataclass(frozen=True)
class Evaluation:
    """The metrics after an epoch, nan where undefined."""

    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Exploit:
    """At ``epoch`` the trial went on from the weights of the trial ``source``, with new ``parameters``."""

    epoch: int
    source: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """What its folder says of a trial. ``stopped`` means by the scheduler, because others were better."""

    id: str  # 00003
    parameters: dict[str, Any]  # of the active dimensions; after an exploit the newest
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
    """Where trial ``number`` of the sweep in the folder ``sweep`` lives."""
    return sweep / "trials" / f"{number:05d}"


def wait_for_folder(folder: Path) -> None:
    """Return when no process trains in the run folder: the one that Tune ended before may still be ending."""
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
    """The trial in its run folder."""
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
    """What the run folder's metrics.jsonl says of evaluations after whole epochs, the newest of each."""
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
    """Note that the trial went on from another's weights."""
    line = {"epoch": exploit.epoch, "from": exploit.source, "parameters": exploit.parameters}
    records.append(folder / "history.jsonl", line)


def write_outcome(
    folder: Path, status: Status, error: str = "", failure: Failure = "", seconds: float | None = None
) -> None:
    """Note how the trial ended, and, where it is known, how long its training took since it last started."""
    outcome = {"status": status, "error": error, "failure": failure, "seconds": seconds}
    write_json(folder / "outcome.json", outcome)


def try_again(sweep: Path) -> list[str]:
    """Open those failed trials that may do better now; returns their ids."""
    again = [trial.id for trial in read_trials(sweep) if trial.failure in MENDABLE]
    for id in again:
        (sweep / "trials" / id / "outcome.json").unlink()
    return again


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = read_json(path)
    return value
