"""Ctrl-C: the first stops a training with a checkpoint, the second ends it at once; whoever started it. And the end of
a process that is killed takes along what it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_preemption import SETTINGS, signal_after

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
from mtunet_dist import distributed
from mtunet_dist.config import Config, save_config
from mtunet_dist.errors import PreemptedError
from mtunet_dist.system.command import PREEMPTED
from mtunet_dist.train import INTERRUPTED, train

ALONE = [sys.executable, "-m", "mtunet_dist.train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TORCHRUN += ["-m", "mtunet_dist.train"]
STUCK = "import time, mtunet_dist.train as t; t._optimiser_step = lambda *_: time.sleep(600); t.main()"
REPRODUCE = (  # with the three classes of the tiny data
    "import dataclasses; from mtunet_dist.reproduction.experiments import DATASETS as sets\n"
    "sets['nyuv2'] = dataclasses.replace(sets['nyuv2'], classes=3); from mtunet_dist.reproduce import main; main()"
)
LONG = ["log.every_steps=1", "eval_every_epochs=0", "epochs=1000000"]


@pytest.fixture
def words(make_config: MakeConfig, tmp_path: Path) -> Iterator[list[str]]:
    """A config and overrides of a training that goes on for ever, as a list that ``kill_all`` knows."""
    save_config(make_config("data.loader=torch"), tmp_path / "tiny.yaml")
    yield [str(tmp_path / "tiny.yaml"), f"run_dir={tmp_path / 'run'}", *LONG]
    kill_all(tmp_path / "run")


@contextmanager
def started(line: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """As in a terminal: a group of processes of its own, that hears SIGINT; what it says goes to ``folder/said``."""
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            ["env", "--default-signal=INT", *line],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def press(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, which a terminal sends to the whole group."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_stops_at_a_step_with_a_checkpoint_and_the_same_command_goes_on(
    make_config: MakeConfig, tmp_path: Path, ranks: int
) -> None:
    """Alone it need not wait for a report, on which ranks must agree."""
    asked, whole = (make_config(*SETTINGS, f"run_dir={tmp_path / name}") for name in ("asked", "whole"))
    if ranks == 1:
        _train_until_interrupted(asked)
    else:
        on_two_ranks(_train_until_interrupted, asked)
    assert final_state(asked.run_dir)["step"] == (7 if ranks == 1 else 8)
    for config in (asked, whole):
        train(config) if ranks == 1 else on_two_ranks(train, config)
    assert_same_state(final_state(asked.run_dir), final_state(whole.run_dir))


def _train_until_interrupted(config: Config) -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests run
    rank = distributed.world_size() - 1
    reason = "SIGINT received" if distributed.rank() == rank else "another process was asked to stop"
    with pytest.MonkeyPatch.context() as patch:
        signal_after(6, rank, signal.SIGINT, patch)
        with pytest.raises(PreemptedError, match=f"{reason}: stopped after step [78], which is saved"):
            train(config)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_where_it_is_ignored_it_still_is(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of the commands that a script starts with ``&``."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signal_after(2, 0, signal.SIGINT, monkeypatch)
        config = make_config(*SETTINGS, "epochs=1")
        train(config)
    finally:
        signal.signal(signal.SIGINT, before)
    assert final_state(config.run_dir)["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(("line", "code"), [(ALONE, PREEMPTED), (LAUNCH, PREEMPTED), (TORCHRUN, 1)])
def test_in_a_terminal_it_says_so_and_leaves_a_checkpoint(
    words: list[str], tmp_path: Path, line: list[str], code: int
) -> None:
    """torchrun has an exit code and a traceback of its own."""
    run_dir = tmp_path / "run"
    with started([*line, *words], tmp_path) as process:
        wait_until(lambda: process.poll() is not None or steps_done(run_dir) > 4)
        press(process)
        assert process.wait(60) == code, said(tmp_path)
    assert said(tmp_path).count(INTERRUPTED) == 1
    assert said(tmp_path).count("SIGINT received: stopped after step ") >= 1
    if line != TORCHRUN:
        assert "Traceback" not in said(tmp_path)
    assert "KeyboardInterrupt" not in said(tmp_path)
    assert final_state(run_dir)["step"] == records(run_dir, "train")[-1]["step"]


def said(folder: Path) -> str:
    return (folder / "said").read_text(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True])
def test_the_second_ends_it_at_once_wherever_it_is(words: list[str], tmp_path: Path, launched: bool) -> None:
    """A step that never ends; under a launcher because another rank is stopped, in a collective."""
    run_dir = tmp_path / "run"
    with started([*(LAUNCH if launched else [sys.executable, "-c", STUCK]), *words], tmp_path) as process:
        if launched:
            wait_until(lambda: process.poll() is not None or steps_done(run_dir) > 2)
            ranks = children(process.pid)
            os.kill(ranks[1], signal.SIGSTOP)
            time.sleep(1)
        else:
            wait_until(lambda: process.poll() is not None or "starting; run folder" in said(tmp_path))
            time.sleep(1)
        press(process)
        time.sleep(2)
        assert process.poll() is None, said(tmp_path)
        press(process)
        assert process.wait(20) == (128 + signal.SIGINT if launched else -signal.SIGINT), said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    if launched:
        wait_until(lambda: not any(alive(rank) for rank in ranks), patience_s=10)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    found = [int(c) for f in Path(f"/proc/{pid}/task").glob("*/children") for c in f.read_text().split()]
    return [*found, *(inner for child in found for inner in descendants(child))]


@pytest.mark.slow
def test_ranks_do_not_outlive_a_torchrun_that_is_killed(words: list[str], tmp_path: Path) -> None:
    with started([*TORCHRUN, *words, "checkpoint.every_steps=1"], tmp_path) as process:
        wait_until(lambda: process.poll() is not None or steps_done(tmp_path / "run") > 2)
        ranks = descendants(process.pid)
        assert len(ranks) > 2  # and the workers of their loaders
        process.kill()
        process.wait()
        wait_until(lambda: not any(alive(rank) for rank in ranks), patience_s=20)
    assert final_state(tmp_path / "run")["step"] >= 1


@pytest.mark.slow
def test_a_training_that_was_started_alone_outlives_its_shell(words: list[str], tmp_path: Path) -> None:
    """As with nohup."""
    shell = subprocess.run(
        ["sh", "-c", '"$@" >"$0" 2>&1 & echo $!', str(tmp_path / "said"), *ALONE, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    pid = int(shell.stdout)
    wait_until(lambda: not alive(pid) or steps_done(tmp_path / "run") > 2)
    assert alive(pid), said(tmp_path)


@pytest.mark.slow
def test_trainings_do_not_outlive_a_reproduce_that_is_killed(three_splits: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-c", REPRODUCE, "table2", "--nyuv2", str(three_splits), "--out", str(tmp_path / "out")]
    with started([*line, "epochs=1000000", "device=cpu", "log.every_steps=1"], tmp_path) as process:
        wait_until(lambda: process.poll() is not None or any((tmp_path / "out").glob("**/metrics.jsonl")))
        trainings = descendants(process.pid)
        try:
            assert len(trainings) > 1, said(tmp_path)
            process.kill()
            process.wait()
            wait_until(lambda: not any(alive(pid) for pid in trainings), patience_s=20)
        finally:
            for pid in filter(alive, trainings):
                os.kill(pid, signal.SIGKILL)
