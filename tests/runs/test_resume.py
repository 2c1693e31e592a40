"""A run that was stopped and started again ends as if it had not been stopped, to the bit."""

from __future__ import annotations

import math
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.training import (
    LAUNCH,
    LOSSES,
    MakeConfig,
    assert_same_state,
    copy_as_of,
    final_state,
    kill_all,
    on_ranks,
    on_two_ranks,
    records,
)
from mtunet_dist.config import load_config
from mtunet_dist.errors import InputError
from mtunet_dist.runs import checkpoint, resume
from mtunet_dist.runs.evaluation import Evaluation
from mtunet_dist.train import train

EVERYTHING = [  # that is random or carried over; dropout and learned weights are on anyway
    "checkpoint.every_steps=2",
    "log.every_steps=1",
    "data.augment.flip=true",
    "data.augment.scales=[1.0,1.2]",
    "weighting.window=2",
]


def test_a_finished_run_started_again_does_nothing(make_config: MakeConfig) -> None:
    config = make_config("epochs=1")
    metrics = train(config)
    before = final_state(config.run_dir)
    assert train(config) == metrics
    assert_same_state(final_state(config.run_dir), before)
    assert len(records(config.run_dir, "eval")) == 1


def test_more_epochs_continue_a_finished_run(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config("epochs=1"))
    train(make_config("epochs=3"))
    whole = make_config("epochs=3", f"run_dir={tmp_path / 'whole'}")
    train(whole)
    assert_same_state(final_state(tmp_path / "run"), final_state(whole.run_dir))
    assert [r["step"] for r in records(tmp_path / "run", "train")] == [3, 6, 9]


def test_a_run_goes_on_from_anothers_checkpoint_with_its_own_settings(make_config: MakeConfig, tmp_path: Path) -> None:
    """Nothing of what it did before counts, but its records up to there."""
    other, ours = make_config("epochs=2"), tmp_path / "ours"
    train(other)
    train(make_config("epochs=3", f"run_dir={ours}", "optim.lr=1e-9"))
    config = make_config("epochs=3", f"run_dir={ours}", "optim.lr=1e-4")
    with pytest.raises(InputError, match=r"optim\.lr=1e-09 \(now 0\.0001\)"):
        train(config)
    source = checkpoint.path_of(tmp_path / "run" / "checkpoints", 6)
    resume.adopt(source, config)
    bests = [checkpoint.load(folder / "best.pt")["best"] for folder in (ours / "checkpoints", source.parent)]
    assert bests[0] == bests[1]
    train(config)
    assert [r["step"] for r in records(ours, "train")] == [3, 6, 9]
    assert [r["lr"] for r in records(ours, "train")] == [1e-9, 1e-9, 1e-4]

    again = make_config("epochs=3", f"run_dir={tmp_path / 'again'}", "optim.lr=1e-4")
    resume.adopt(source, again)
    train(again)
    assert_same_state(final_state(tmp_path / "again"), final_state(ours))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_in_mid_epoch_ends_with_the_same_bits(make_config: MakeConfig, tmp_path: Path, accumulate: int) -> None:
    settings = [*EVERYTHING, "checkpoint.keep=99", f"optim.accumulate={accumulate}"]
    whole, again = (make_config(*settings, f"run_dir={tmp_path / name}") for name in ("whole", "again"))
    train(whole)
    copy_as_of(2, Path(whole.run_dir), Path(again.run_dir))
    train(again)
    assert_same_state(final_state(again.run_dir), final_state(whole.run_dir))


@pytest.mark.parametrize(("ranks", "batch"), [(2, 4), (3, 3)])  # sums of three depend on their order
def test_ranks_resume_in_mid_epoch_with_the_same_bits(
    make_config: MakeConfig, tmp_path: Path, ranks: int, batch: int
) -> None:
    settings = [*EVERYTHING, "epochs=4", "checkpoint.keep=99", f"batch_size={batch}"]
    whole, again = (make_config(*settings, f"run_dir={tmp_path / name}") for name in ("whole", "again"))
    on_ranks(ranks, train, whole)
    copy_as_of(4, Path(whole.run_dir), Path(again.run_dir))
    on_ranks(ranks, train, again)
    a, b = final_state(again.run_dir), final_state(whole.run_dir)
    assert a["step"] == 48 // batch
    assert_same_state(a, b)


def test_what_was_logged_beyond_the_checkpoint_is_dropped(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(*EVERYTHING, "checkpoint.keep=99")
    again = make_config(*EVERYTHING, "checkpoint.keep=99", f"run_dir={tmp_path / 'again'}")
    train(config)
    copy_as_of(2, Path(config.run_dir), Path(again.run_dir))
    time.sleep(1)  # TensorBoard orders the files of a run by the second in their names
    train(again)
    assert [r["step"] for r in records(again.run_dir, "train")] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records(again.run_dir, "eval")] == [3, 6]
    board = EventAccumulator(str(Path(again.run_dir) / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss/total")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in board.Scalars("eval/miou")] == [3, 6]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(make_config: MakeConfig) -> None:
    config = make_config("epochs=2")
    train(config)
    before = final_state(config.run_dir)
    newest = checkpoint.by_age(Path(config.run_dir) / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=newest.name):
        train(config)
    assert_same_state(final_state(config.run_dir), before)


def test_best_is_remembered_over_a_resume(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    best = Path(make_config().run_dir) / "checkpoints" / "best.pt"
    for epochs, miou, best_step in ((1, 0.5, 3), (2, 0.4, 3), (3, 0.6, 9)):
        evaluation = Evaluation(5, {"miou": miou, **LOSSES}, {})
        monkeypatch.setattr("mtunet_dist.train.evaluate", lambda *_, result=evaluation, **__: result)
        train(make_config(f"epochs={epochs}"))
        assert checkpoint.load(best)["step"] == best_step


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optim.lr=0.5", r"optim\.lr=0\.003 \(now 0\.5\)"),
        ("model.widths=[4,4,4,8]", r"model\.widths"),
        ("seed=4", r"seed=0 \(now 4\)"),
        ("epochs=1", r"step 6, beyond epochs=1"),
        ("data.train=val", r"other data"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(make_config: MakeConfig, change: str, words: str) -> None:
    train(make_config())
    with pytest.raises(InputError, match=words):
        train(make_config(change))


def test_resume_with_fewer_processes_carries_on_the_epochs_loss_statistics(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    settings = ["epochs=1", "checkpoint.every_steps=2", "checkpoint.keep=9"]
    two, one, other = (make_config(*settings, f"run_dir={tmp_path / name}") for name in ("two", "one", "other"))
    on_two_ranks(train, two)
    for copy in (one, other):
        copy_as_of(2, Path(two.run_dir), Path(copy.run_dir))
    ranks = [rank["local"] for rank in final_state(one.run_dir)["ranks"]]
    assert [rank["weighting.local_count"].tolist() for rank in ranks] == [[2, 2], [2, 2]]
    assert not torch.equal(ranks[0]["weighting.local_sum"], ranks[1]["weighting.local_sum"])

    run = resume.start(one, torch.device("cpu"))
    assert run.progress.step == 2
    restored = dict(run.module.named_buffers())
    for name in ("weighting.local_count", "weighting.local_sum", "weighting.local_squares"):
        assert torch.equal(restored[name], ranks[0][name] + ranks[1][name]), name
    assert math.isfinite(train(other)["miou"])
    assert final_state(other.run_dir)["step"] == 3


def test_killed_under_torchrun_and_started_again_ends_with_the_same_bits(overrides: list[str], tmp_path: Path) -> None:
    """SIGKILL to all processes, wherever they are. Left alone the first run would not end, so none is late."""
    config_file = tmp_path / "config.yaml"
    config_file.write_text("eval_every_epochs: 4\n")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    settings = [*overrides[1:], *EVERYTHING]
    launch = [*LAUNCH, str(config_file), *settings, f"run_dir={killed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen([*launch, "epochs=1000000"], env=environment)
        _wait_for_lines(killed / "metrics.jsonl", 8, process)
        process.kill()
        process.wait()
        kill_all(killed)
        step = final_state(killed)["step"]
        epochs = f"epochs={step // 3 + 2}"
        subprocess.run([*launch, epochs], env=environment, check=True, timeout=120)
    finally:
        kill_all(killed)

    on_two_ranks(train, load_config(config_file, [*settings, f"run_dir={whole}", epochs]))
    assert_same_state(final_state(killed), final_state(whole))
    steps = [r["step"] for r in records(killed, "train")]
    assert steps == list(range(1, 3 * (step // 3 + 2) + 1))


def _wait_for_lines(file: Path, lines: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not (file.is_file() and file.read_text().count("\n") >= lines):
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)
