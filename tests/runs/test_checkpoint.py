"""Checkpoint files: whole or absent, checked to the bit, written while the training goes on."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.training import LOSSES, MakeConfig, final_state
from mtunet_dist.errors import InputError, MTUNetError
from mtunet_dist.runs import checkpoint, provenance, resume
from mtunet_dist.runs.evaluation import Evaluation
from mtunet_dist.train import train


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint of a few tensors."""
    state = {"step": 7, "weights": {str(i): torch.full((100,), float(i)) for i in range(8)}}
    return checkpoint.save(tmp_path, state, keep=2, best=False)


def test_any_bit_that_is_read_and_flipped_is_noticed(file: Path) -> None:
    """Here and there among the entries, and all bits of every fifth byte of the directory at the end."""
    whole = file.read_bytes()
    expected = checkpoint.load(file)
    directory = whole.index(b"PK\x01\x02")
    flips = [(position, 16) for position in range(0, directory, 37)]
    flips += [(position, 1 << bit) for position in range(directory, len(whole), 5) for bit in range(8)]
    noticed = 0
    for position, bit in flips:
        file.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        try:
            checkpoint.check(file)
            state = checkpoint.load(file)
        except InputError as error:
            assert str(file) in str(error)
            noticed += 1
        else:  # padding between the entries, or what nothing depends on, such as dates
            assert state["step"] == 7
            assert all(torch.equal(state["weights"][key], value) for key, value in expected["weights"].items())
    assert noticed > len(flips) // 2


def test_a_file_cut_short_an_absent_and_a_foreign_one_are_named(file: Path, tmp_path: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(InputError, match=rf"checkpoint {file} is damaged"):
        checkpoint.check(file)
    with pytest.raises(InputError, match=r"gone\.pt does not exist"):
        checkpoint.check(tmp_path / "gone.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    checkpoint.check(tmp_path / "foreign.pt")
    with pytest.raises(InputError, match=r"foreign.pt is not a checkpoint of this program"):
        checkpoint.load(tmp_path / "foreign.pt")


def test_the_writer_keeps_the_state_as_it_was_and_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, sync = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        disk.wait(60)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    writer = checkpoint.Writer(tmp_path, keep=2)
    weights = torch.zeros(5)
    writer.submit({"step": 1, "deep": [{"weights": weights}]}, best=True)
    weights += 1
    assert not writer.failed
    assert checkpoint.by_age(tmp_path) == []
    disk.set()
    writer.wait()
    assert torch.equal(checkpoint.load(tmp_path / "best.pt")["deep"][0]["weights"], torch.zeros(5))
    writer.close()


def test_a_write_that_failed_is_told_once_and_leaves_nothing_behind(file: Path) -> None:
    folder = file.parent
    checkpoint.path_of(folder, 8).mkdir()  # in the way
    writer = checkpoint.Writer(folder, keep=1)
    writer.submit({"step": 8}, best=False)
    while not writer.failed:
        time.sleep(0.01)
    with pytest.raises(MTUNetError, match=r"cannot save checkpoint .*step_00000008.pt: Is a directory"):
        writer.wait()
    writer.wait()
    assert not writer.failed
    assert {path.name for path in folder.iterdir()} == {file.name, "step_00000008.pt"}
    writer.close()


@pytest.mark.parametrize("on_write_error", ["stop", "continue"])
def test_a_checkpoint_that_cannot_be_written_stops_the_training_unless_told_otherwise(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, on_write_error: str
) -> None:
    save = checkpoint.save

    def fail_once(folder: Path, state: checkpoint.State, **options: Any) -> Path:
        if state["step"] == 2:
            raise MTUNetError("cannot save checkpoint: no disk")
        return save(folder, state, **options)

    monkeypatch.setattr(checkpoint, "save", fail_once)
    words = ["checkpoint.every_steps=1", "log.every_steps=1", "epochs=2", f"on_write_error={on_write_error}"]
    config = make_config(*words)
    if on_write_error == "stop":
        with pytest.raises(MTUNetError, match="no disk"):
            train(config)
        assert final_state(config.run_dir)["step"] == 1
    else:
        with pytest.warns(UserWarning, match="no disk; training goes on, as on_write_error=continue"):
            train(config)
        assert final_state(config.run_dir)["step"] == 6


def test_a_best_model_that_could_not_be_written_leaves_room_for_the_next(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, values = checkpoint.save, iter([0.3, 0.9, 0.5, 0.4])

    def fail_once(folder: Path, state: checkpoint.State, **options: Any) -> Path:
        if state["step"] == 6:
            raise MTUNetError("cannot save checkpoint: no disk")
        return save(folder, state, **options)

    monkeypatch.setattr(checkpoint, "save", fail_once)
    monkeypatch.setattr(
        "mtunet_dist.train.evaluate", lambda *_, **__: Evaluation(5, {"miou": next(values), **LOSSES}, {})
    )
    config = make_config("epochs=4", "on_write_error=continue")
    with pytest.warns(UserWarning, match="no disk"):
        train(config)
    best = checkpoint.load(Path(config.run_dir) / "checkpoints" / "best.pt")
    assert (best["step"], best["best"]["value"]) == (9, 0.5)
    assert final_state(config.run_dir)["best"]["value"] == 0.5


def test_a_resume_with_other_versions_warns_that_bits_may_differ(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_config("epochs=1"))
    now = provenance.fingerprint()
    assert {"torch", "nvidia-dali-cuda130", "cpu", "gpus"} <= now.keys()
    monkeypatch.setattr(provenance, "fingerprint", lambda: {**now, "torch": "9.9"})
    with pytest.warns(UserWarning, match=r"was written with torch 2\..* \(now 9\.9\): the last bits may differ"):
        resume.start(make_config("epochs=2"), torch.device("cpu")).close()
