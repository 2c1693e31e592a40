"""Checks of the GPU paths in at most eight minutes on a GPU. Run it before anything else on a new GPU machine.

python benchmarks/gpu_check.py --out gpu_check        # on a machine with a GPU
python benchmarks/gpu_check.py --out gpu_check --dry  # on a CPU: as far as it goes

The cheapest checks come first. Each check runs in its own process, so that a crash does not end the others. Its result
is written at once to OUT/results.jsonl, and its output to OUT/NAME.log. At the end OUT/table.md lists what was expected
and what was found. The exit code is the number of failed checks. A check that the machine cannot run (no DALI,
DeepSpeed or GPU) is listed but not counted. ``gpu_carry.sh`` copies the needed files to a machine without a network.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from gpu_checks import CHECKS, DRY_SECONDS, Check, Found
from mtunet_dist.system.files import write_text
from mtunet_dist.system.records import append, read

RESULTS = "results.jsonl"
BUDGET_S = 480.0
KEYS = {"check": str, "verdict": str, "found": str, "seconds": float}
VERDICTS = {True: "as expected", False: "NOT as expected", None: "not checked"}


def run_apart(name: str, check: Check, out: Path, dry: bool, left_s: float) -> dict[str, str | float]:
    """Run one check in its own process and return its line of the results."""
    limit = min(3 * max(check.seconds, DRY_SECONDS if dry else 0) + 30, left_s)
    if limit < 10:
        return {"check": name, "verdict": "not checked", "found": "no time was left", "seconds": 0.0}
    start, result = time.monotonic(), out / f"{name}.result"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, f"--out={out}", f"--only={name}", *(["--dry"] if dry else [])]
    with (out / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | str = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = f"no result after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
            process.wait()
    seconds = round(time.monotonic() - start, 1)
    found = read(result, {"verdict": str, "found": str})
    if found:
        return {"check": name, **found[-1], "seconds": seconds}
    return {"check": name, "verdict": "FAILED", "found": f"it ended with {code}; see {name}.log", "seconds": seconds}


def run_here(name: str, out: Path, dry: bool) -> None:
    """Run one check in this process and write its result."""
    found: Found = CHECKS[name].run(out, dry)
    append(out / f"{name}.result", {"verdict": VERDICTS[found.good], "found": found.text})


def table(lines: list[dict[str, str | float]]) -> str:
    """All results as Markdown."""
    rows = [
        f"| {x['check']} | {CHECKS[str(x['check'])].expected} | {x['found']} | {x['verdict']} | {x['seconds']} |"
        for x in lines
    ]
    return "\n".join(["| check | expected | found | verdict | s |", "| --- | --- | --- | --- | ---: |", *rows]) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--dry", action="store_true", help="on a CPU, with small sizes")
    parser.add_argument(
        "--only", choices=list(CHECKS), metavar="NAME", help=f"one check, in this process: {', '.join(CHECKS)}"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only:
        run_here(args.only, args.out.resolve(), args.dry)
        return
    out, end = args.out.resolve(), time.monotonic() + (1e9 if args.dry else BUDGET_S)
    (out / RESULTS).unlink(missing_ok=True)
    for name, check in CHECKS.items():
        line = run_apart(name, check, out, args.dry, end - time.monotonic())
        append(out / RESULTS, line)
        print(f"{name}: {line['verdict']}: {line['found']} ({line['seconds']} s)", flush=True)
    lines = read(out / RESULTS, KEYS)
    write_text(out / "table.md", table(lines))
    print(f"\n{table(lines)}")
    sys.exit(sum(line["verdict"] in ("FAILED", VERDICTS[False]) for line in lines))


if __name__ == "__main__":
    main()
