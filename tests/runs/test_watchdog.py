"""A process that does not move says where it stands and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import training
from mtunet_dist.config import Config
from mtunet_dist.runs.tracking import Tracker
from mtunet_dist.system.command import HUNG
from mtunet_dist.train import train

SLEEPER = """
import sys, time
from pathlib import Path
from mtunet_dist.runs.watchdog import Watchdog

def stuck_in_here(seconds):
    time.sleep(seconds)

with Watchdog(Path(sys.argv[1]), float(sys.argv[2]), compiles=True) as watchdog:
    time.sleep(1.5)
    for _ in range(int(sys.argv[3])):
        watchdog.beat()
        print("beat", flush=True)
        stuck_in_here(1.2)
    stuck_in_here(float(sys.argv[4]))
time.sleep(3)
"""

ENDLESS = """
import atexit, ctypes, sys, threading
from mtunet_dist.system import command

command.END_S = 2
wait = ctypes.PyDLL(None).sleep  # holds the interpreter's lock all the time

class Stuck:
    def __del__(self, wait=wait):
        wait(600)

@command.command
def main():
    if sys.argv[1] == "error":
        raise errors.InputError("the user's")

if sys.argv[1] == "at exit":
    atexit.register(wait, 600)
elif sys.argv[1] == "in a thread":
    threading.Thread(target=threading.Event().wait).start()
elif sys.argv[1] == "in a library":
    libc = ctypes.CDLL(None)
    libc.on_exit(ctypes.cast(libc.pause, ctypes.c_void_p), None)
else:
    stuck = Stuck()  # until the modules are torn down
main()
"""

EVALUATIONS = """
import sys, time
from pathlib import Path
from mtunet_dist.runs.watchdog import Watchdog

with Watchdog(Path(sys.argv[1]), 1, compiles=True) as watchdog:
    for _ in range(2):
        watchdog.beat()
        with watchdog.evaluation():
            time.sleep(2.5)
            watchdog.beat()
            time.sleep(2.5)
        print("evaluated", flush=True)
"""


def start(folder: Path, limit_s: float, beats: int, sleep_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLEEPER, str(folder), str(limit_s), str(beats), str(sleep_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_ends_a_process_that_no_longer_moves_and_shows_its_stacks(tmp_path: Path) -> None:
    (tmp_path / "hang").mkdir()
    (tmp_path / "hang" / "rank_0.txt").write_text("of a hang before")
    process = start(tmp_path / "hang", 1, 1, 600)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == HUNG
    assert f"rank 0 has not moved for 1 s (timeout_s); the stacks of its threads are in {tmp_path / 'hang'}" in errors
    assert "stuck_in_here" in (tmp_path / "hang" / "rank_0.txt").read_text()
    assert (tmp_path / "hang" / "rank_0.before.txt").read_text() == "of a hang before"


def test_it_leaves_alone_what_moves_what_has_ended_and_what_was_only_suspended(tmp_path: Path) -> None:
    process = start(tmp_path, 2.4, 4, 0)  # twice as long as a step; then 3 s after the end
    assert process.stdout
    for _ in range(2):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(120) == 0
    assert not list(tmp_path.iterdir())


def test_the_first_evaluation_may_take_its_time_to_compile(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EVALUATIONS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (HUNG, "evaluated\n")


@pytest.mark.parametrize("end", ["in a thread", "at exit", "modules torn down", "in a library", "error"])
def test_a_command_whose_libraries_do_not_let_it_end_is_ended(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDLESS, end], capture_output=True, text=True, timeout=120)
    if end == "in a library":  # Python has ended
        assert done.returncode == -signal.SIGALRM
    else:
        assert done.returncode == 1
        assert "Timeout (0:00:02)!" in done.stderr


def _train_with_a_tracker_that_does_not_close(config: Config) -> None:
    close = Tracker.close

    def stuck(tracker: Tracker) -> None:
        close(tracker)
        time.sleep(600)

    Tracker.close = stuck  # type: ignore[method-assign]
    torch.set_num_threads(1)
    train(config)


def test_a_training_that_cannot_be_closed_ends(make_config: training.MakeConfig) -> None:
    config = make_config("epochs=1", "timeout_s=20")
    process = training.start(_train_with_a_tracker_that_does_not_close, config)
    process.join(300)
    assert process.exitcode == HUNG
    assert "in stuck" in (Path(config.run_dir) / "hang" / "rank_0.txt").read_text()
