"""A run folder works wherever it lies: moved, copied, linked, reached from elsewhere; by every verb."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.training import LAUNCH, MakeConfig, final_state, records, steps_done
from mtunet_dist import evaluate, export, predict, submit
from mtunet_dist import train as training_loop
from mtunet_dist.config import load_config, save_config
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError
from mtunet_dist.runs import checkpoint
from mtunet_dist.slurm import node_agent
from mtunet_dist.slurm.job_script import Options
from mtunet_dist.train import train

Place = Callable[[Path], Path]


@pytest.fixture
def run(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one epoch of three steps that was started as ``run_dir=runs/a`` from the folder above ``runs``."""
    monkeypatch.chdir(tmp_path)
    train(make_config("epochs=1", "run_dir=runs/a"))
    return tmp_path / "runs" / "a"


def moved(run: Path) -> Path:
    return run.rename(run.with_name("b")) / "config.yaml"


def copied(run: Path) -> Path:
    return Path(shutil.copytree(run, run.with_name("b"))) / "config.yaml"


def moved_without_notes(run: Path) -> Path:
    (run / "environment.json").unlink()
    (run / "lock").unlink()
    return moved(run)


def linked_folder(run: Path) -> Path:
    run.with_name("b").symlink_to("a")
    return run.with_name("b") / "config.yaml"


def linked_file(run: Path) -> Path:
    file = moved(run)
    (run.parent / "latest.yaml").symlink_to(file)
    return run.parent / "latest.yaml"


def from_elsewhere(run: Path) -> Path:
    os.chdir(run.parents[1].parent)
    return run / "config.yaml"


def from_inside(run: Path) -> Path:
    os.chdir(moved(run).parent)
    return Path("config.yaml")


def relative_and_moved(run: Path) -> Path:
    return Path(os.path.relpath(moved(run)))


PLACES = [
    *(moved, copied, moved_without_notes, linked_folder, linked_file, from_elsewhere, from_inside, relative_and_moved)
]


@pytest.mark.parametrize("place", PLACES)
def test_its_config_resumes_it_wherever_it_lies(
    run: Path, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place(run)
    folder = config.resolve().parent
    others = {p for p in run.parent.iterdir() if p.is_dir() and not p.samefile(folder)}
    before = {file: file.read_bytes() for other in others for file in other.rglob("*") if file.is_file()}
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["train", str(config), "epochs=2"])
    training_loop.main()
    assert "resuming at step 3" in capsys.readouterr().out
    assert final_state(folder)["step"] == steps_done(folder) * 3 == 6
    assert {p for p in run.parent.iterdir() if p.is_dir() and not p.samefile(folder)} == others
    assert {file: file.read_bytes() for other in others for file in other.rglob("*") if file.is_file()} == before


def by_torchrun(config: Path, *words: str) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    call([*line, "-m", "mtunet_dist.train", str(config), *words])


def by_launcher(config: Path, *words: str) -> None:
    call([*LAUNCH, str(config), *words])


def by_submission(config: Path, *words: str) -> None:
    """The job's own script, run here: a config that ``submit`` writes, and Slurm's agent of a node."""
    work = submit.train_work([str(config), *words], Options())
    assert work.folder.resolve() == config.resolve().parent
    script, _ = submit.write(work, Options())
    agent = [sys.executable, str(Path(node_agent.__file__)), "--standalone", "--nproc-per-node=1"]
    call([*agent, "-m", "mtunet_dist.train", str(script.with_suffix(".yaml"))])
    newest = node_agent.newest_checkpoint(["-m", "mtunet_dist.train", str(config)])
    assert newest == final_name(config.resolve().parent)


def final_name(folder: Path) -> str:
    return checkpoint.by_age(folder / "checkpoints")[0].name


def call(line: list[str]) -> None:
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 3" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launch", [by_torchrun, by_launcher, by_submission])
def test_every_launcher_resumes_a_moved_run_where_it_lies(run: Path, launch: Callable[..., None]) -> None:
    config = relative_and_moved(run)
    launch(config, "epochs=2")
    assert final_state(config.parent)["step"] == 6
    assert [r["step"] for r in records(config.parent, "eval")] == [3, 6]
    assert not run.exists()


def test_evaluate_predict_and_export_work_in_a_moved_run_and_leave_the_place_of_before_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = moved(run).parent
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "photo.png")
    for verb, words in (
        (evaluate, ()),
        (predict, (str(tmp_path / "photo.png"), "--out", str(tmp_path / "out"), "--device=cpu")),
        (export, ("--out", str(tmp_path / "out" / "weights.safetensors"))),
    ):
        monkeypatch.setattr(sys, "argv", ["verb", str(folder), *words])
        verb.main()
    assert json.loads((folder / "evaluation-val.json").read_text())["step"] == 3
    assert not run.exists()


def test_a_run_dir_on_the_command_line_wins(run: Path, tmp_path: Path) -> None:
    assert load_config(run / "config.yaml", ["run_dir=elsewhere"]).run_dir == "elsewhere"


def test_in_its_place_the_folder_is_called_as_before(run: Path) -> None:
    for file in ("runs/a/config.yaml", run / "config.yaml"):
        assert load_config(file).run_dir == "runs/a"


@pytest.mark.parametrize("name", ["config.yaml", "mine.yaml"])
def test_a_config_that_is_no_run_folders_means_the_run_dir_that_it_names(
    make_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    """Also where one copied it out of a run folder."""
    (tmp_path / "configs" / "checkpoints").mkdir(parents=True)  # no checkpoint of ours is in it
    save_config(make_config("run_dir=runs/a"), tmp_path / "configs" / name)
    assert load_config(tmp_path / "configs" / name).run_dir == "runs/a"


def test_a_folder_whose_name_looks_like_a_reference_is_taken_as_it_stands(run: Path) -> None:
    file = run.rename(run.with_name("${a} b")) / "config.yaml"
    assert load_config(file).run_dir == str(file.parent)


def test_relative_data_that_is_not_found_says_from_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"^data/mine \(in the working folder {tmp_path}\) does not exist"):
        PreparedDataset(Path("data/mine"))
    with pytest.raises(InputError, match=rf"^{tmp_path}/mine does not exist"):
        PreparedDataset(tmp_path / "mine")
