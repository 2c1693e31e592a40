"""Search for good settings with Ray Tune: ``mtunet sweep SWEEP.yaml key=value...``.

sweeps/config.py describes the sweep file. Each trial is an ordinary run in ``RUN_DIR/trials/ID``. The same command
resumes a sweep that was stopped or killed: trials that have ended are kept, the others continue from their checkpoints.
``--report`` only writes the report of the present results, also while the sweep runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from rich.console import Console

from mtunet_dist.config.typed_yaml import to_yaml
from mtunet_dist.errors import InputError, MachineError, needs
from mtunet_dist.sweeps.config import BASE, Sweep, check_trials, find_config, load_sweep
from mtunet_dist.sweeps.folder import read_trials, try_again
from mtunet_dist.sweeps.report.report import report
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command
from mtunet_dist.system.files import write_atomically, write_text
from mtunet_dist.system.folder_lock import lock_folder
from mtunet_dist.system.machine import cpus
from mtunet_dist.system.place import SWEEP

# Keys that may change when a sweep resumes. ``config`` is a path, and the content of that file must not change.
MAY_CHANGE = (
    *("name", "run_dir", "config", "trials", "hours"),
    *("workers_per_trial", "cpus_per_worker", "gpus_per_worker", "max_concurrent", "retries"),
)


@contextmanager
def opened(sweep: Sweep, config: Path) -> Iterator[Path]:
    """Lock the folder of the sweep and write its description there. Yields the folder's copy of the base config.

    Raises InputError if another command works in the folder, or if it holds another sweep.
    """
    base, file = sweep.dir / BASE, sweep.dir / SWEEP
    with lock_folder(sweep.dir, f"another sweep is running in {sweep.dir}", key="run_dir="):
        if file.is_file():
            check_same(sweep, load_sweep(file))
            if yaml.safe_load(base.read_text(encoding="utf-8")) != yaml.safe_load(config.read_text(encoding="utf-8")):
                raise InputError(f"{sweep.dir} holds a sweep over another {config}; choose another run_dir")
        else:
            write_atomically(base, lambda copy: copy.write(config.read_bytes()))
        write_text(file, to_yaml(sweep))
        yield base


def check_same(sweep: Sweep, before: Sweep) -> None:
    """Raise InputError if the folder holds another sweep."""
    now, then = dataclasses.asdict(sweep), dataclasses.asdict(before)
    changed = [f"{key}={then[key]} (now {now[key]})" for key in now if now[key] != then[key] and key not in MAY_CHANGE]
    if changed:
        raise InputError(f"{sweep.dir} holds a sweep with {', '.join(changed)}; choose another run_dir")
    if sweep.count < before.count:
        raise InputError(f"trials={sweep.count}, but {sweep.dir} holds a sweep of {before.count}; more are possible")


def run(sweep: Sweep, config: Path, address: str | None = None, nodes: int | None = None) -> None:
    """Run or resume ``sweep`` over the base ``config``, and report. Raises InputError before Ray starts.

    The trials run on this machine, or on those of the Ray at ``address``, once ``nodes`` have joined it.
    """
    configs = check_trials(sweep, config)
    if address is None:
        _tuner().check_room(sweep, cpus(), torch.cuda.device_count(), "this machine")
    console = Console()
    with opened(sweep, config) as base:
        console.print(f"{sweep.name}: {sweep.count} trials; sweep folder {sweep.dir}", markup=False, highlight=False)
        if again := try_again(sweep.dir):
            console.print(f"failed before, tried again: {', '.join(again)}", markup=False, highlight=False)
        in_time = True
        for _ in range(1 + sweep.retries):  # another round only if Tune has lost a trial
            if not in_time or not left(sweep):
                break
            try:
                in_time = _tuner().run_trials(sweep, base, max(c.epochs for c in configs), address, nodes, console)
            except KeyboardInterrupt:
                print("interrupted; the same command continues", file=sys.stderr, flush=True)
                raise
        trials = read_trials(sweep.dir)
        report(trials, sweep, base, console)
        if not in_time:
            console.print(f"stopped after hours={sweep.hours}; the same command continues", highlight=False)
        elif waiting := left(sweep):
            raise MachineError(f"{waiting} of {sweep.count} trials have not ended; the same command continues")
        elif lost := [trial for trial in trials if trial.failure == "lost"]:
            reason = f"{len(lost)} of {sweep.count} trials were lost, {lost[0].id} to {lost[0].error}"
            raise MachineError(f"{reason}; the same command tries them again")


def left(sweep: Sweep) -> int:
    """The number of trials that have not ended."""
    return sweep.count - sum(trial.status != "unfinished" for trial in read_trials(sweep.dir))


def _tuner() -> types.ModuleType:
    """The module that runs trials in Ray. Without Ray, reports can still be written."""
    try:
        return importlib.import_module("mtunet_dist.sweeps.ray_backend.tuner")
    except ModuleNotFoundError as error:
        raise needs("mtunet sweep", error) from None


@contextmanager
def _machine_named(sweep: Sweep) -> Iterator[None]:
    """Make an error of the machine, such as a full disk, a MachineError. Slurm queues such a job again."""
    try:
        yield
    except OSError as error:
        reason = f"{error.filename or sweep.dir}: {error.strerror or error}"
        raise MachineError(f"{reason}; the same command continues") from None


@command
def main() -> None:
    """The command line."""
    parser = arguments.parser("sweep", __doc__.splitlines()[0])
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="a Ray that runs already, as slurm/sweep.sbatch starts it"
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="with --address: begin when that Ray has N nodes")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report of what is there")
    parser.add_argument("sweep", type=arguments.path, metavar="SWEEP", help="a YAML file, as tune/lr.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    args = parser.parse_intermixed_args()
    if args.nodes is not None and (args.address is None or args.nodes < 1):
        raise InputError(f"--nodes={args.nodes} must be 1 or more, and is for --address")
    sweep = load_sweep(args.sweep, args.overrides)
    with _machine_named(sweep):
        if not args.report:
            run(sweep, find_config(sweep, args.sweep), args.address, args.nodes)
            return
        if not (sweep.dir / SWEEP).is_file():
            raise InputError(f"{sweep.dir} holds no sweep; run_dir says where it is")
        report(read_trials(sweep.dir), load_sweep(sweep.dir / SWEEP), sweep.dir / BASE, Console())


if __name__ == "__main__":
    main()
