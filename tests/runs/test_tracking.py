"""What a run tells the world is told once, whatever it was resumed from."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.training import MakeConfig, copy_as_of, records
from mtunet_dist.runs import tracking
from mtunet_dist.runs.tracking import StepReport, Tracker
from mtunet_dist.train import train


def shown(run_dir: Path) -> dict[str, list[int]]:
    """The steps that TensorBoard shows, by tag."""
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    scalars = {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    return scalars | {tag: [event.step for event in board.Images(tag)] for tag in board.Tags()["images"]}


def next_second() -> None:
    """TensorBoard orders the files of a run by the second in their names."""
    time.sleep(1)


@pytest.mark.parametrize("saved", [0, 2, 4])
def test_a_run_that_was_killed_and_goes_on_from_an_older_step_shows_each_once(
    make_config: MakeConfig, tmp_path: Path, saved: int
) -> None:
    """Before the first checkpoint, before the first evaluation, after it."""
    words = ["checkpoint.every_steps=1", "checkpoint.keep=99", "log.every_steps=1"]
    config, killed = make_config(*words), tmp_path / "killed"
    train(config)
    copy_as_of(saved, Path(config.run_dir), killed)
    next_second()
    train(make_config(*words, f"run_dir={killed}"))
    steps, evaluations = [1, 2, 3, 4, 5, 6], [3, 6]
    assert [r["step"] for r in records(killed, "train")] == steps
    assert [r["step"] for r in records(killed, "eval")] == evaluations
    found = shown(killed)
    assert found == {tag: steps if tag.startswith("train/") else evaluations for tag in found}
    assert {"train/lr", "eval/miou", "predictions"} <= found.keys()


@pytest.fixture
def make_tracker(tmp_path: Path) -> Callable[..., Tracker]:
    def make(start: int, **more: Any) -> Tracker:
        return Tracker(tmp_path, start_step=start, total_steps=6, steps_per_epoch=3, batch_size=4, **more)

    return make


def tell(tracker: Tracker, step: int) -> None:
    tracker.log_steps(step, StepReport({"total": float(step)}, {}, lr=0.1, grad_norm=1.0))


def evaluate(tracker: Tracker, step: int) -> None:
    tracker.evaluation(step, {"miou": 0.5}, {})
    tracker.picture(step, np.zeros((4, 4, 3), np.uint8))


def test_an_evaluation_that_was_told_but_not_saved_is_told_once(
    make_tracker: Callable[..., Tracker], tmp_path: Path
) -> None:
    """Asked to stop after step 3, its evaluation was left to the next start, which was killed before it was saved."""
    first = make_tracker(0)
    tell(first, 3)
    first.close()
    for last in (False, True):
        next_second()
        again = make_tracker(3, evaluation_due=True)
        evaluate(again, 3)
        if last:
            tell(again, 6)
            evaluate(again, 6)
        again.close()
    for kind in ("train", "eval"):
        assert [r["step"] for r in records(tmp_path, kind)] == [3, 6]
    found = shown(tmp_path)
    assert found == {tag: [3, 6] for tag in found}
    assert {"train/loss/total", "train/grad_norm", "eval/miou", "predictions"} <= found.keys()
    assert not {"train/kind", "train/step", "train/time", "train/epoch"} & found.keys()


def test_what_comes_again_is_known_also_where_the_disk_was_full_at_the_start(
    make_tracker: Callable[..., Tracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_tracker(0)
    tell(first, 3)
    first.close()
    next_second()

    class Full(tracking.SummaryWriter):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking, "BOARD_RETRY_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "SummaryWriter", Full)
        again = make_tracker(0, on_write_error="continue")
    for file in sorted((tmp_path / "tensorboard").iterdir())[1:]:
        file.write_bytes(b"")  # none of it came to the disk
    next_second()
    tell(again, 3)
    again.close()
    assert shown(tmp_path)["train/loss/total"] == [3]
