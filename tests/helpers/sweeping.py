"""A sweep over the tiny dataset, as a command."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]


def write_sweep(folder: Path, overrides: list[str]) -> Path:
    """A sweep file in ``folder`` for a sweep in ``folder/sweep``; the base config lies beside it."""
    (folder / "base.yaml").write_text("optim: {name: sgd}\n", encoding="utf-8")
    sweep = {
        "name": "tiny",
        "run_dir": str(folder / "sweep"),
        "config": "base.yaml",
        "overrides": [word for word in overrides if not word.startswith("run_dir=")],
        "space": {"optim.lr": {"choice": [1e-3, 1e30, 1e-2]}},
        "objective": {"metrics": ["depth_abs"]},
        "searcher": "grid",
        "max_concurrent": 1,
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return file


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def command(file: Path, *words: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "tune" / "sweep.py"), str(file), *words]


def run_sweep(file: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(command(file, *words), capture_output=True, text=True, timeout=300, env=env)


def logs_of(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text(encoding="utf-8") for path in folder.glob("trials/*/log.txt")}
