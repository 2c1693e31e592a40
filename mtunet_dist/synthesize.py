"""``python -m mtunet_dist.synthesize OUT``: write a synthetic street dataset in the tree layout of Cityscapes."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from mtunet_dist.errors import InputError, LostProcessError
from mtunet_dist.sources.folder import check_outside
from mtunet_dist.synthetic.tree import CITIES, GENERATOR, Settings, scene_files, write_scene
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command
from mtunet_dist.system.machine import cpus
from mtunet_dist.system.workers import Pool

RECORD = "synthetic.json"
_LEAST = {"train": 0, "val": 0, "test": 0, "height": 32, "width": 32, "seed": 0}


def synthesize(out: Path, settings: Settings, workers: int = 1) -> None:
    """Write the missing files of a tree with this many processes. The files do not depend on their number.

    A scene is a pure function of (seed, split, index). So a tree from a version that wrote fewer kinds of files gets
    the others, and the files that it has stay as they are.

    Raises InputError for settings out of range, and for a folder with other content than a tree of the same settings.
    Raises LostProcessError if a worker was killed.
    """
    _check(settings, workers)
    _claim(out, settings)
    jobs = [(split, index) for split in CITIES for index in range(getattr(settings, split))]
    jobs = [job for job in jobs if not all(path.is_file() for path in scene_files(out, *job).values())]
    console, start = Console(), time.perf_counter()
    with _pool(min(workers, len(jobs))) as run:
        done = run(partial(write_scene, out, settings), jobs)
        for _ in track(done, "scenes", total=len(jobs), console=console, disable=not console.is_terminal):
            pass
    total = settings.train + settings.val + settings.test
    seconds = time.perf_counter() - start
    print(f"{len(jobs)} scenes written in {seconds:.1f} s, {total - len(jobs)} were there already: {out}", flush=True)


@contextmanager
def _pool(workers: int) -> Iterator[partial[Iterator[None]] | type[map[None]]]:
    """A ``map`` over processes, or the plain one."""
    if workers <= 1:
        yield map
        return
    executor = Pool(workers)
    try:
        yield partial(executor.map, chunksize=2)
    except BrokenProcessPool:
        reason = "a worker process was killed, perhaps for its memory: use fewer workers"
        raise LostProcessError(f"{reason}; the same command goes on from here") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _check(settings: Settings, workers: int) -> None:
    for name, value in {**asdict(settings), "workers": workers}.items():
        least = _LEAST.get(name, 1)
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")


def _claim(out: Path, settings: Settings) -> None:
    """Record the settings in a new or empty folder. Accept a folder that has recorded the same settings."""
    wanted, record = {"generator": GENERATOR, **asdict(settings)}, out / RECORD
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder")
    check_outside(out, "OUT")
    if record.is_file():
        try:
            found = json.loads(record.read_text())
        except json.JSONDecodeError as error:
            raise InputError(f"{record} is not JSON: {error}; choose another folder") from error
        differing = [key for key, value in wanted.items() if not isinstance(found, dict) or found.get(key) != value]
        if differing:
            wishes = ", ".join(f"{key}={wanted[key]}" for key in differing)
            made = found if not isinstance(found, dict) else ", ".join(f"{key}={found.get(key)}" for key in differing)
            raise InputError(f"{out} was made with {made}, not {wishes}; choose another folder")
        return
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and has no {RECORD}; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    scratch = out / f".{RECORD}.{os.getpid()}"
    scratch.write_text(json.dumps(wanted, indent=2) + "\n")
    scratch.replace(record)


@command
def main() -> None:
    """Parse the command line and synthesize."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = arguments.parser("synthesize", __doc__, formatter_class=defaults)
    parser.add_argument("out", type=arguments.folder, help="folder to write; a run that was cut off goes on there")
    meaning = {"train": "scenes", "val": "scenes", "test": "scenes", "height": "pixels", "width": "pixels"}
    for setting in fields(Settings):
        text = meaning.get(setting.name, "number that all scenes derive from")
        parser.add_argument(f"--{setting.name}", type=int, default=setting.default, metavar="N", help=text)
    parser.add_argument("--workers", type=int, default=cpus(), metavar="N", help="processes")
    given = vars(parser.parse_args())
    out, workers = given.pop("out"), given.pop("workers")
    synthesize(out, Settings(**given), workers)


if __name__ == "__main__":
    main()
