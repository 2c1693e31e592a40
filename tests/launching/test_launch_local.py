"""launch/local.py: a killed process is started again, what would fail again is not, and none outlives the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.training import (
    LAUNCH,
    MakeConfig,
    assert_same_state,
    children,
    final_state,
    kill_all,
    on_two_ranks,
    records,
    steps_done,
    wait_until,
)
from mtunet_dist.errors import InputError
from mtunet_dist.launching import agent
from mtunet_dist.system.command import PREEMPTED
from mtunet_dist.train import train

SETTINGS = ["log.every_steps=1", "eval_every_epochs=0", "checkpoint.every_steps=2", "data.augment.flip=true"]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(overrides: list[str], tmp_path: Path) -> Iterator[Start]:
    """``start(option..., override...)``: the launcher with two processes; whatever is left of it ends with the test."""
    config_file = tmp_path / "config.yaml"
    config_file.write_text("{}\n")

    def launch(*words: str) -> subprocess.Popen[str]:
        options = [word for word in words if word.startswith("--")]
        keys = [*overrides, *SETTINGS, *(word for word in words if not word.startswith("--"))]
        return subprocess.Popen(
            [*LAUNCH, *options, str(config_file), *keys],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    yield launch
    kill_all(tmp_path / "run")


@pytest.mark.slow
def test_killed_processes_are_started_again_and_end_with_the_same_bits(
    start: Start, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Twice, as a second restart meets what the first has left behind."""
    run_dir = tmp_path / "run"
    process = start("--max-restarts=2", "epochs=20")
    for rank, step in ((1, 3), (0, 24)):
        wait_until(lambda step=step: steps_done(run_dir) >= step, process)
        before = children(process.pid)
        os.kill(before[rank], signal.SIGKILL)
        wait_until(lambda before=before: not set(before) & set(children(process.pid)), process)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "ended with -9; starting all again, 2 of 2 restarts left" in errors
    assert "ended with -9; starting all again, 1 of 2 restarts left" in errors

    whole = make_config(*SETTINGS, "epochs=20", f"run_dir={tmp_path / 'whole'}")
    on_two_ranks(train, whole)
    assert_same_state(final_state(run_dir), final_state(whole.run_dir))
    assert [r["step"] for r in records(run_dir, "train")] == list(range(1, 61))


def test_without_restarts_the_exit_code_is_that_of_the_process(start: Start, tmp_path: Path) -> None:
    process = start("epochs=1000000")
    wait_until(lambda: steps_done(tmp_path / "run") >= 1, process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGKILL
    assert "starting all again" not in errors


def test_fewer_than_no_restarts_are_refused() -> None:
    with pytest.raises(InputError, match="--max-restarts=-1 must be 0 or more"):
        agent.restarts(-1, default=0)
    assert (agent.restarts(0, default=3), agent.restarts(None, default=3)) == (0, 3)


def test_an_error_of_the_users_is_not_tried_again(start: Start) -> None:
    process = start("--max-restarts=3", "data.root=/no/such/folder")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.count("error: ") == 1
    assert "starting all again" not in errors


def test_a_request_to_a_process_to_stop_is_not_taken_for_a_failure(start: Start, tmp_path: Path) -> None:
    process = start("--max-restarts=3", "epochs=1000000")
    wait_until(lambda: steps_done(tmp_path / "run") >= 3, process)
    os.kill(children(process.pid)[0], signal.SIGUSR1)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == PREEMPTED
    assert "starting all again" not in errors
    assert final_state(tmp_path / "run")["step"] == records(tmp_path / "run", "train")[-1]["step"]


def test_a_stop_without_a_checkpoint_is_a_failure(start: Start, tmp_path: Path) -> None:
    process = start("epochs=1000000", "checkpoint.every_steps=0", "checkpoint.every_epochs=1000000")
    wait_until(lambda: steps_done(tmp_path / "run") >= 1, process)
    (tmp_path / "run" / "checkpoints").write_text("no folder, so nothing can be written to it")
    process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    assert "error: cannot save checkpoint" in errors


def test_processes_do_not_outlive_a_killed_launcher(start: Start, tmp_path: Path) -> None:
    process = start("epochs=1000000")
    wait_until(lambda: steps_done(tmp_path / "run") >= 1, process)
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
