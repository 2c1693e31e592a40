"""Seconds from a command to the end of its first training step, and where the time goes.

python benchmarks/startup.py configs/demo.yaml --out benchmarks/results/startup_cpu.md

It runs ``python -m mtunet_dist.train CONFIG key=value...`` and ``python launch/local.py --nproc N CONFIG key=value...``
as a user would, in turn for ``--rounds`` rounds, after a first round that warms up the disk cache. Python itself loads
a hook (``startup_hooks/``). In every process it notes when packages are imported and when stages begin, and it ends the
process after one step. The table has the medians of rank 0's notes over the rounds. If one package imports another, the
time counts for the imported one. "launcher" is the time of launch/local.py before rank 0's interpreter runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mtunet_dist.config import load_config
from mtunet_dist.errors import InputError
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command
from turns import about, markdown, take_turns

HERE = Path(__file__).parent
STAGES = ("launcher", "other imports", "read the config", "process group", "build", "first batch", "first step")
LIMIT_S = 300.0


def spent(events: Sequence[tuple[float, str, str]], started: float) -> dict[str, float]:
    """Seconds per stage without its imports, and per imported package without its own imports."""
    seconds: dict[str, float] = defaultdict(float)
    stage, importing, before = "launcher", list[str](), started
    for at, event, name in events:
        seconds[f"import {importing[-1]}" if importing else stage] += at - before
        before = at
        if event == "begin":
            importing.append(name)
        elif event == "end":
            importing.remove(name)
        else:
            stage = name
    return dict(seconds)


def start(words: Sequence[str], config: Sequence[str]) -> dict[str, float]:
    """Run a command up to its first step. Returns the times of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        hooks = os.pathsep.join([str(HERE / "startup_hooks"), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": hooks, "STARTUP_TRACE": folder}
        line = [sys.executable, *words, *config, f"run_dir={folder}/run"]
        started = time.time()
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        notes = Path(folder) / "rank0.json"
        if done.returncode or not notes.is_file():
            raise InputError(f"{' '.join(words)} failed: {done.stderr.strip()[-2000:]}")
        return spent(json.loads(notes.read_text(encoding="utf-8")), started)


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    """A row per stage or package, a column per command."""
    packages = {part for rounds in runs.values() for found in rounds for part in found if part not in STAGES}
    medians = {name: {p: _median(p, found) for p in (*packages, *STAGES)} for name, found in runs.items()}
    first = next(iter(medians.values()))
    imports = sorted(packages, key=lambda part: -first[part])
    order = [STAGES[0], *imports, *STAGES[1:]]
    rows = [[part, *(f"{found[part]:.2f}" for found in medians.values())] for part in order]
    totals = (statistics.median(sum(found.values()) for found in rounds) for rounds in runs.values())
    rows.append(["**command to end of first step**", *(f"**{total:.2f}**" for total in totals)])
    return markdown(["seconds", *runs], rows)


def _median(part: str, rounds: Sequence[dict[str, float]]) -> float:
    return statistics.median(found.get(part, 0.0) for found in rounds)


@command
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=arguments.file(".md"), required=True, metavar="FILE", help="Markdown")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of launch/local.py")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    args = parser.parse_intermixed_args()
    words = [args.config, *args.overrides]
    load_config(args.config, [*args.overrides, "run_dir=unused"])  # report the user's errors before anything runs
    launchers = {
        "1 process": ["-m", "mtunet_dist.train"],
        f"launch/local.py, {args.processes} processes": [
            str(HERE.parent / "launch" / "local.py"),
            f"--nproc={args.processes}",
        ],
    }
    works = {name: partial(start, launcher, words) for name, launcher in launchers.items()}
    text = f"{about('startup.py')}; medians of {args.rounds} rounds\n\n{table(take_turns(works, args.rounds))}"
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
