"""The benchmarks of steps and of starting run, and their tables say what they should."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(script: str, *words: str) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    line = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr


def tables(path: Path) -> list[dict[str, list[str]]]:
    """Each table as a mapping of its first column to the others."""
    found: list[dict[str, list[str]]] = []
    inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("| "):
            inside = False
            continue
        first, *others = [cell.strip() for cell in line.strip("|").split("|")]
        if not inside:
            found.append({})
        elif first != "---":
            found[-1][first] = others
        inside = True
    return found


def test_step_measures_modes_batches_and_processes(tmp_path: Path) -> None:
    out = tmp_path / "step.md"
    tiny = ["--size=16x32", "--batch=1", "--batches", "1", "2", "--processes=2", "--matrix=64"]
    without = ["--rounds=1", "--seconds=0.05", "--without", "compiled", "stage 0", "stage 1", "stage 3"]
    run("step.py", f"--out={out}", "--width", "narrow", *tiny, *without, "device=cpu", "model.widths=[4,4,8,8]")
    modes, batches, processes = tables(out)
    assert list(modes) == ["fp32, NCHW", "fp32, channels-last", "fp32, channels-last, DeepSpeed stage 2"]
    assert list(batches) == ["batch 1", "batch 2"]
    assert list(processes) == ["1 x batch 1", "2 x batch 1", "2 x batch 1, gradients not reduced"]
    for table in (modes, batches, processes):
        for rate, ratio, cpu, mib, _, share in table.values():
            assert all(0 < float(figure) < math.inf for figure in (rate, ratio, cpu, mib))
            assert 0 <= float(share.rstrip("%")) < 1000
        assert next(iter(table.values()))[1] == "1.00"


def test_startup_accounts_for_all_the_time(overrides: list[str], tmp_path: Path) -> None:
    out = tmp_path / "startup.md"
    config = tmp_path / "empty.yaml"
    config.write_text("{}", encoding="utf-8")
    words = [word for word in overrides if not word.startswith("run_dir=")]
    run("startup.py", f"--out={out}", "--rounds=1", str(config), *words)
    (table,) = tables(out)
    total = table.pop("**command to end of first step**")
    assert {"launcher", "import torch", "import nvidia.dali", "build", "first batch", "first step"} <= table.keys()
    for column, seconds in enumerate(total):
        parts = [float(row[column]) for row in table.values()]
        assert math.isclose(sum(parts), float(seconds.strip("*")), abs_tol=0.1)
        assert float(table["import torch"][column]) > 0.1
        assert float(table["build"][column]) > 0
