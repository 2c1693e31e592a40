"""A folder's lock, and what becomes of a process that is alive when Slurm starts its successor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mtunet_dist.errors import InputError
from mtunet_dist.runs import checkpoint
from mtunet_dist.system.folder_lock import LOCK, FolderLock, lock_folder

Begin = Callable[..., "subprocess.Popen[str]"]
HOLD = "lock = lock_folder(Path(sys.argv[1]), 'busy'); print('taken', flush=True); time.sleep(600)"
SAVE = """
lock = lock_folder(Path(sys.argv[1]), 'busy')
print('taken', flush=True)
sys.stdin.readline()
from mtunet_dist.runs import checkpoint
checkpoint.save(Path(sys.argv[1]), {'step': 8}, keep=3, best=True, check_owner=lock.end_if_lost)
"""


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """``begin(program, NAME=value...)``: a process that has the folder ``run`` and an environment of Slurm's."""
    begun: list[subprocess.Popen[str]] = []

    def begin(program: str, **slurm: str) -> subprocess.Popen[str]:
        imports = "import sys, time; from pathlib import Path; from mtunet_dist.system.folder_lock import lock_folder"
        code = f"{imports}\n{program}"
        outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        process = subprocess.Popen(command, env={**outside, **slurm}, text=True, **pipes)
        begun.append(process)
        assert process.stdout and process.stdout.readline() == "taken\n"
        return process

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def take(monkeypatch: pytest.MonkeyPatch, folder: Path, **slurm: str) -> FolderLock:
    """The lock, in a job of Slurm's, or in none."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_DEPENDENCY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    return lock_folder(folder, "busy", takeover_s=60)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"SLURM_JOB_ID": "42"}, {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "1"}),
        ({"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "9"}, {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "10"}),
        ({"SLURM_JOB_ID": "42"}, {"SLURM_JOB_ID": "43", "SLURM_JOB_DEPENDENCY": "afternotok:42(failed)"}),
    ],
)
def test_a_successor_gets_the_folder_and_its_predecessor_ends(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: dict[str, str], after: dict[str, str]
) -> None:
    orphan = begin(HOLD, **before)
    with take(monkeypatch, tmp_path / "run", **after) as lock:
        _, errors = orphan.communicate(timeout=60)
        lock.end_if_lost()  # does nothing
    assert orphan.returncode == 2
    assert errors.startswith(f"error: job {after['SLURM_JOB_ID']}, restart ")
    assert f"has taken over {tmp_path / 'run'}; job 42, restart " in errors


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        ({}, {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "1"}),
        ({"SLURM_JOB_ID": "42"}, {}),
        ({"SLURM_JOB_ID": "42"}, {"SLURM_JOB_ID": "42"}),
        ({"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "42"}),
        ({"SLURM_JOB_ID": "42"}, {"SLURM_JOB_ID": "43", "SLURM_RESTART_COUNT": "1"}),
        ({"SLURM_JOB_ID": "42"}, {"SLURM_JOB_ID": "43", "SLURM_JOB_DEPENDENCY": "afternotok:142"}),
    ],
)
def test_who_is_no_successor_is_refused_and_changes_nothing(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: dict[str, str], after: dict[str, str]
) -> None:
    owner = begin(HOLD, **before)
    said = (tmp_path / "run" / LOCK).read_bytes()
    with pytest.raises(InputError, match=r"^busy$"):
        take(monkeypatch, tmp_path / "run", **after)
    assert (tmp_path / "run" / LOCK).read_bytes() == said
    assert owner.poll() is None


def test_who_has_lost_its_lock_writes_no_checkpoint(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a network disk, which gives the lock of a node that is cut off to another."""
    folder = tmp_path / "run"
    orphan = begin(SAVE)
    (folder / LOCK).rename(folder / "lost")
    with take(monkeypatch, folder):
        checkpoint.save(folder, {"step": 8, "of": torch.ones(1)}, keep=3, best=True)
        _, errors = orphan.communicate("go on\n", timeout=120)
    assert (orphan.returncode, "has taken over" in errors) == (2, True), errors
    for name in ("step_00000008.pt", "best.pt"):
        assert "of" in checkpoint.load(folder / name)


def test_a_lock_file_of_before_or_of_nobody_means_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for text in (b"", b"{}", b"[1]", b"no json", b"\xff"):
        (tmp_path / LOCK).write_bytes(text)
        with take(monkeypatch, tmp_path, SLURM_JOB_ID="42") as lock:
            (tmp_path / LOCK).write_bytes(text)
            lock.end_if_lost()
