"""Asked to stop: a checkpoint at a step boundary, exit code 75, and the same command ends with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.training import LAUNCH, MakeConfig, assert_same_state, final_state, kill_all, on_two_ranks, records
from mtunet_dist import distributed
from mtunet_dist.config import Config, load_config
from mtunet_dist.errors import PreemptedError
from mtunet_dist.runs import checkpoint
from mtunet_dist.runs.tracking import StepReport, Tracker
from mtunet_dist.system.command import PREEMPTED
from mtunet_dist.system.preemption import SIGNALS, StopRequest
from mtunet_dist.train import train

SETTINGS = ["epochs=4", "log.every_steps=2", "eval_every_epochs=2", "data.augment.flip=true"]


def signal_after(step: int, rank: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``rank`` send itself a signal once ``step`` has been reported."""
    steps = Tracker.log_steps

    def send(self: Tracker, done: int, report: StepReport) -> None:
        steps(self, done, report)
        if done == step and distributed.rank() == rank:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Tracker, "log_steps", send)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_training_at_the_next_report_with_a_checkpoint(
    make_config: MakeConfig, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, whole = (make_config(*SETTINGS, f"run_dir={tmp_path / name}") for name in ("asked", "whole"))
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_after(6, 0, number, patch)
        with pytest.raises(PreemptedError, match=rf"{number.name} received: stopped after step 8"):
            train(asked)
    assert signal.getsignal(number) == before
    assert final_state(asked.run_dir)["step"] == 8  # in the middle of an epoch of 3 steps
    train(asked)
    train(whole)
    assert_same_state(final_state(asked.run_dir), final_state(whole.run_dir))
    assert [r["step"] for r in records(asked.run_dir, "train")] == [r["step"] for r in records(whole.run_dir, "train")]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(make_config: MakeConfig, tmp_path: Path) -> None:
    asked, whole = (make_config(*SETTINGS, f"run_dir={tmp_path / name}") for name in ("asked", "whole"))
    on_two_ranks(_train_until_asked, asked)
    assert final_state(asked.run_dir)["step"] == 4
    on_two_ranks(train, asked)
    on_two_ranks(train, whole)
    assert_same_state(final_state(asked.run_dir), final_state(whole.run_dir))


def test_no_rank_leaves_before_the_checkpoint_is_written(make_config: MakeConfig, tmp_path: Path) -> None:
    """torchrun ends all processes some time after the first has ended."""
    config = make_config(*SETTINGS)
    on_two_ranks(_train_and_save_slowly, config, tmp_path / "left")
    assert (tmp_path / "left").stat().st_mtime >= checkpoint.path_of(
        Path(config.run_dir) / "checkpoints", 4
    ).stat().st_mtime


def _train_and_save_slowly(config: Config, left: Path) -> None:
    save = checkpoint.save

    def save_slowly(*args: Any, **options: Any) -> Path:
        time.sleep(2)
        return save(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        signal_after(3, 1, signal.SIGUSR1, patch)
        patch.setattr(checkpoint, "save", save_slowly)
        with pytest.raises(PreemptedError):
            train(config)
    if distributed.rank() == 1:
        left.touch()


def _train_until_asked(config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        signal_after(3, 1, signal.SIGUSR1, patch)
        reason = "SIGUSR1 received" if distributed.rank() == 1 else "another process was asked to stop"
        with pytest.raises(PreemptedError, match=rf"{reason}: stopped after step 4"):
            train(config)


@pytest.mark.parametrize("step", [3, 9])
def test_an_evaluation_that_a_request_came_before_is_made_up_for(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """At the end of an epoch, and after the last step, as the report before says."""
    words = ["epochs=4", "log.every_steps=100"]
    asked, whole = (make_config(*words, f"run_dir={tmp_path / name}") for name in ("asked", "whole"))
    with monkeypatch.context() as patch:
        signal_after(step, 0, signal.SIGTERM, patch)
        with pytest.raises(PreemptedError, match=rf"stopped after step {step + 3}"):
            train(asked)
    assert [r["step"] for r in records(asked.run_dir, "eval")] == list(range(3, step + 1, 3))
    seen: list[int] = []
    metrics = train(asked, lambda done, _: seen.append(done))
    assert seen == list(range(step + 3, 13, 3))
    assert metrics == train(whole)
    assert_same_state(final_state(asked.run_dir), final_state(whole.run_dir))
    best = [checkpoint.load(Path(c.run_dir) / "checkpoints" / "best.pt") for c in (asked, whole)]
    assert_same_state(*best)


def test_other_threads_than_the_main_one_leave_the_handlers_alone() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen: list[object] = []

    def enter() -> None:
        with StopRequest():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_launcher_passes_the_request_on_and_says_try_again(
    overrides: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    config_file, run_dir = tmp_path / "config.yaml", tmp_path / "run"
    config_file.write_text("{}\n")
    words = [str(config_file), *overrides, "log.every_steps=1", "eval_every_epochs=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen(
            [*LAUNCH, *words, "epochs=1000000"], env=environment, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while not ((run_dir / "metrics.jsonl").is_file() and len(records(run_dir, "train")) > 4):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        kill_all(run_dir)
    assert process.returncode == PREEMPTED
    assert f"{number.name} received: stopped after step " in errors
    assert "Traceback" not in errors
    step = final_state(run_dir)["step"]
    assert step == records(run_dir, "train")[-1]["step"]
    config = load_config(config_file, [*words[1:], f"epochs={step // 3 + 1}"])
    on_two_ranks(train, config)
    assert final_state(run_dir)["step"] == (step // 3 + 1) * 3
