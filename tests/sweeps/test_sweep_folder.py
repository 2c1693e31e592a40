"""The folder of a sweep: it works wherever it lies, and a trial that the machine failed is tried again."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from helpers.sweeping import logs_of, read_csv, run_sweep, write_sweep
from mtunet_dist import sweep as sweep_script
from mtunet_dist.config import load_config
from mtunet_dist.errors import InputError, MTUNetError, NonFiniteLossError
from mtunet_dist.sweeps.config import find_config, load_sweep
from mtunet_dist.sweeps.folder import read_trial, read_trials, trial_folder, try_again, write_outcome, write_parameters
from mtunet_dist.sweeps.ray_backend import trial as sweep_trial
from mtunet_dist.sweeps.ray_backend.live import Progress, WallTime
from mtunet_dist.sweeps.report import report as sweep_report


@pytest.fixture
def sweep_file(tmp_path: Path, overrides: list[str]) -> Path:
    """It names its folder relative to the working folder."""
    os.chdir(tmp_path)
    file = write_sweep(tmp_path, [*overrides, "epochs=1"])
    file.write_text(file.read_text(encoding="utf-8").replace(str(tmp_path / "sweep"), "sweep"), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def here() -> Iterator[None]:
    """The working folder stays what it was."""
    before = Path.cwd()
    yield
    os.chdir(before)


@pytest.fixture
def ended(sweep_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a sweep of two trials that have ended, the first better, and its report, without pictures."""
    monkeypatch.setattr(sweep_report, "draw", lambda *_: {})
    sweep = load_sweep(sweep_file)
    with sweep_script.opened(sweep, find_config(sweep, sweep_file)):
        for number, rate in enumerate((1e-3, 1e-2)):
            folder = trial_folder(sweep.dir, number)
            write_parameters(folder, {"optim.lr": rate})
            result(folder, 1.0 + number)
            write_outcome(folder, "finished")
    report(str(sweep_file))
    return sweep.dir.resolve()


def result(folder: Path, value: float) -> None:
    record = {"kind": "eval", "step": 3, "epoch": 1.0, "depth_abs": value}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")


def report(*words: str) -> None:
    arguments, sys.argv = sys.argv, ["sweep", "--report", *words]
    try:
        sweep_script.main()
    finally:
        sys.argv = arguments


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def moved(folder: Path) -> Path:
    return folder.rename(folder.with_name("other"))


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.with_name("other")))


def copied_without_lock(folder: Path) -> Path:
    other = copied(folder)
    (other / "lock").unlink()
    return other


def linked(folder: Path) -> Path:
    other = moved(folder)
    folder.with_name("link").symlink_to(other)
    return folder.with_name("link")


def relative(folder: Path) -> Path:
    return Path(os.path.relpath(copied(folder)))


def elsewhere(folder: Path) -> Path:
    other = copied(folder)
    os.chdir(other.parent.parent)
    return other


def inside(folder: Path) -> Path:
    os.chdir(copied(folder))
    return Path()


PLACES = [moved, copied, copied_without_lock, linked, relative, elsewhere, inside]


@pytest.mark.parametrize("by_run_dir", [False, True], ids=["its own file", "run_dir="])
@pytest.mark.parametrize("place", PLACES)
def test_its_report_and_its_best_config_are_those_of_the_place_where_it_lies(
    ended: Path, sweep_file: Path, place: Callable[[Path], Path], by_run_dir: bool
) -> None:
    other = place(ended)
    result(trial_folder(other, 1), 0.5)  # now the second is better
    before = contents(ended) if ended.exists() else {}
    report(*[str(sweep_file), f"run_dir={other}"] if by_run_dir else [str(other / "sweep.yaml")])
    assert [row["trial"] for row in read_csv(other / "results.csv")] == ["00001", "00000"]
    assert "Trial 00001, depth_abs 0.5" in (other / "report.md").read_text(encoding="utf-8")
    best = load_config(other / "best.yaml")
    assert best.optim.lr == 1e-2 and Path(best.run_dir).resolve() == (other / "best").resolve()
    assert (contents(ended) if ended.exists() else {}) == before


@pytest.mark.parametrize("place", PLACES)
def test_its_best_config_trains_beside_it_before_any_new_report(ended: Path, place: Callable[[Path], Path]) -> None:
    other = place(ended)
    assert Path(load_config(other / "best.yaml").run_dir).resolve() == (other / "best").resolve()
    assert load_config(other / "best.yaml", ["run_dir=mine"]).run_dir == "mine"


def test_in_its_place_all_is_called_as_before(ended: Path, sweep_file: Path) -> None:
    assert load_sweep(ended / "sweep.yaml").run_dir == "sweep"
    assert load_config(ended / "best.yaml").run_dir == "sweep/best"
    assert load_sweep(ended / "sweep.yaml", ["run_dir=mine"]).run_dir == "mine"
    shutil.copyfile(ended / "best.yaml", ended.parent / "best.yaml")  # one that only names a folder
    assert load_config(ended.parent / "best.yaml").run_dir == "sweep/best"


def test_its_own_file_goes_on_with_the_config_that_it_keeps(ended: Path) -> None:
    other = moved(ended)
    (ended.parent / "base.yaml").unlink()
    file = other / "sweep.yaml"
    assert find_config(load_sweep(file), file) == other / "base.yaml"
    with pytest.raises(InputError, match=r"config=none\.yaml exists neither"):
        find_config(load_sweep(file, ["config=none.yaml"]), file)


@pytest.mark.slow
def test_a_copy_goes_on_where_it_lies_and_the_original_stays_as_it_is(ended: Path) -> None:
    before = contents(ended)
    other = copied(ended)
    shutil.rmtree(trial_folder(other, 1))
    done = run_sweep(other / "sweep.yaml")
    assert done.returncode == 0, done.stderr
    assert [trial.status for trial in read_trials(other)] == ["finished", "failed", "finished"]
    assert set(logs_of(other)) == {"00001", "00002"}
    assert contents(ended) == before


def of(number: int) -> OSError:
    return OSError(number, os.strerror(number))


MACHINE = [
    *(of(number) for number in (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENOMEM, errno.EACCES)),
    MTUNetError("cannot save checkpoint step_3.pt: No space left on device"),
    RuntimeError("unable to write to file </torch_1>: No space left on device (28)"),
    torch.OutOfMemoryError("out of memory"),
    MemoryError(),
    InputError("data.cache=host needs 3 MiB, /dev/shm has 1"),
    InputError("data/train/shard_0.tar cannot be read: Input/output error"),
    InputError("data does not exist"),
]


@pytest.mark.parametrize("error", [*MACHINE, NonFiniteLossError("the loss became nan")], ids=repr)
def test_only_what_a_trial_itself_comes_to_ends_it_for_good(
    error: Exception, sweep_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, (folder, file) = load_sweep(sweep_file), (trial_folder(Path("sweep"), 0), Path("error.pkl"))
    write_parameters(folder, {"optim.lr": 1e-3})

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(sweep_trial, "train_reporting", fail)
    try:
        sweep_trial.run_trial(sweep, find_config(sweep, sweep_file), "00000", {"optim.lr": 1e-3})
    except Exception as raised:  # as Tune, that has tried often enough
        file.write_bytes(pickle.dumps(raised))
        tried = SimpleNamespace(config={"trial": "00000"}, pickled_error_file=str(file))
        Progress(sweep, WallTime(0), Console()).on_trial_error(0, [], tried)
    trial = read_trial(folder)
    assert trial.status == "failed" and trial.error.startswith(f"{type(error).__name__}: ")
    assert try_again(sweep.dir) == ([] if isinstance(error, NonFiniteLossError) else ["00000"])
    assert read_trial(folder).status == ("failed" if isinstance(error, NonFiniteLossError) else "unfinished")


@pytest.fixture
def disk(sweep_file: Path) -> Iterator[Path]:
    """The folder of the sweep as a disk of its own, of 3 MB."""
    folder = sweep_file.with_name("sweep")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can only be mounted as root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Until ``leave`` bytes are left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        state = os.statvfs(folder)
        file.write(bytes(state.f_bavail * state.f_bsize - leave))
    return filler


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leave", "said"),
    [
        (150_000, "No space left on device; the same command continues"),  # for the notes of one trial
        (300_000, "2 of 2 trials were lost, 00000 to MTUNetError: cannot save checkpoint "),
    ],
)
def test_after_room_is_made_on_a_full_disk_the_same_command_trains_every_trial(
    disk: Path, sweep_file: Path, leave: int, said: str
) -> None:
    words = ["space.optim.lr.choice=[1e-3,1e-2]", "retries=1"]
    filler = fill(disk, leave)
    full = run_sweep(sweep_file, *words)
    assert full.returncode == 1  # not 2: a job may try again
    assert len(full.stderr.splitlines()) == 1 and said in full.stderr, full.stderr
    filler.unlink()
    done = run_sweep(sweep_file, *words)
    assert done.returncode == 0, done.stderr
    assert [trial.status for trial in read_trials(disk)] == ["finished", "finished"]
