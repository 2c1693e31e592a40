"""Notes that are damaged: whoever reads them goes on, with what is left of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.training import MakeConfig, assert_same_state, final_state
from mtunet_dist import evaluate, status
from mtunet_dist.config import Config
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.reproduction import figures
from mtunet_dist.reproduction.experiments import Row
from mtunet_dist.reproduction.measuring import constant_metrics
from mtunet_dist.reproduction.trainings import Training
from mtunet_dist.runs.tracking import StepReport, Tracker
from mtunet_dist.sweeps import folder as sweep_folder
from mtunet_dist.system import records
from mtunet_dist.train import train

ROW = Row("mtunet", "nyuv2")
Damage = Callable[[bytes], bytes]
Reader = Callable[[Path, Config], object]


def bad_byte(text: bytes) -> bytes:
    """One in the middle of a line; no UTF-8."""
    return text[:30] + b"\xff" + text[31:]


def bad_bytes(text: bytes) -> bytes:
    """One in each line."""
    return b"\n".join(bad_byte(line) for line in text.split(b"\n"))


DAMAGES: dict[str, Damage] = {
    "a bad byte": bad_byte,
    "bad bytes": bad_bytes,
    "a lost block": lambda text: text[:50] + bytes(200) + text[250:],
    "cut short": lambda text: text[:-20],
    "nothing left": lambda text: b"",
    "an image": lambda text: bytes(range(256)) * 40,
    "other JSON": lambda text: b'null\n[]\n{}\n3\n"x"\n' + text,
    "without what it should have": lambda text: b'{"kind": "eval", "step": 3, "epoch": 1.0}\n' + text,
    "of other types": lambda text: b'{"kind": "train", "step": "3", "epoch": null, "samples_per_s": "x"}\n' + text,
    "nested deeply": lambda text: b"[" * 100_000 + b"\n" + text,
    "a renamed key": lambda text: text.replace(b'"samples_per_s"', b'"samplfs_per_s"').replace(b'"miou"', b'"mjou"'),
}


def by_training(folder: Path, config: Config) -> None:
    """A resumed one: what it says is a record again, whatever came before."""
    tracker = Tracker(folder, start_step=3, total_steps=6, steps_per_epoch=3, batch_size=4)
    tracker.log_steps(4, StepReport({"total": 1.0}, {}, lr=0.1, grad_norm=1.0))
    tracker.close()
    tracker.check()
    assert json.loads((folder / "metrics.jsonl").read_bytes().splitlines()[-1])["step"] == 4


def by_reproduce(folder: Path, config: Config) -> None:
    training = Training(ROW, dataclasses.replace(config, run_dir=str(folder)), total_steps=3, parameters=0)
    assert training.metrics is not None  # its checkpoint has them
    assert training.minutes >= 0
    dataset = PreparedDataset(Path(config.data.root))
    assert figures.weights([training], dataset.split("val")).size


def by_sweep(folder: Path, config: Config) -> None:
    (folder / "trial.json").write_text('{"parameters": {}}')
    shutil.copyfile(folder / "metrics.jsonl", folder / "history.jsonl")
    assert sweep_folder.read_trial(folder).history == ()
    sweep_folder.write_exploit(folder, sweep_folder.Exploit(1, "00001", {"optim.lr": 1.0}))
    assert len(sweep_folder.read_trial(folder).history) == 1


def by_status(folder: Path, config: Config) -> None:
    assert status.status_of(folder, {}, set()).state in ("finished", "stopped")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(make_config: MakeConfig, trained: Path, tmp_path: Path) -> tuple[Path, Config]:
    """A run folder of one epoch, to be spoilt."""
    config = make_config("epochs=1", f"run_dir={trained}")
    if not trained.is_dir():
        train(config)
    folder = Path(shutil.copytree(trained, tmp_path / "spoilt"))
    return folder, dataclasses.replace(config, run_dir=str(folder))


@pytest.mark.parametrize("reader", [by_training, by_reproduce, by_sweep, by_status])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metrics_stop_nobody(run: tuple[Path, Config], damage: str, reader: Reader) -> None:
    folder, config = run
    file = folder / "metrics.jsonl"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    reader(folder, config)


@pytest.mark.parametrize("reader", [by_reproduce, by_status])
def test_notes_that_are_not_there_stop_nobody(run: tuple[Path, Config], reader: Reader) -> None:
    folder, config = run
    for name in ("metrics.jsonl", "environment.json"):
        (folder / name).unlink()
        (folder / name).mkdir()
    (folder / "slurm").mkdir()
    (folder / "slurm" / "1.json").write_bytes(b'{"jobs": 3}')
    (folder / "slurm" / "notes.json").write_bytes(b"\xff")
    reader(folder, config)


@pytest.mark.parametrize("damage", DAMAGES)
def test_notes_beside_it_that_are_damaged_do_not_stop_a_status(run: tuple[Path, Config], damage: str) -> None:
    folder, _ = run
    (folder / "slurm").mkdir()
    (folder / "slurm" / "job-7.exit").write_bytes(DAMAGES[damage](b'75 step_00000003.pt"'))
    (folder / "slurm" / "1.json").write_bytes(DAMAGES[damage](b'{"jobs": ["7"], "started": "2024"}'))
    for name in ("environment.json", "config.yaml"):
        (folder / name).write_bytes(DAMAGES[damage]((folder / name).read_bytes()))
    status.status_of(folder, {}, set())


def test_a_run_with_all_its_notes_damaged_resumes_to_the_same_end_and_is_evaluated(
    run: tuple[Path, Config], make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = run
    for file in folder.rglob("*"):
        if file.is_file() and "checkpoints" not in file.parts and file.name not in ("config.yaml", "lock"):
            file.write_bytes(bad_bytes(file.read_bytes()) + b"\xff")
    (folder / "hang").mkdir()
    (folder / "hang" / "rank_0.txt").mkdir()  # cannot be renamed onto the next
    (folder / "hang" / "rank_0.before.txt").write_bytes(b"\xff")
    (folder / "evaluation-val.json").write_bytes(b"\xff")
    train(dataclasses.replace(config, epochs=2))
    whole = make_config("epochs=2", f"run_dir={tmp_path / 'whole'}")
    train(whole)
    assert_same_state(final_state(folder), final_state(whole.run_dir))
    assert {r["step"] for r in records.metrics(folder)} == {6}
    monkeypatch.setattr(sys, "argv", ["evaluate", str(folder)])
    evaluate.main()
    assert json.loads((folder / "evaluation-val.json").read_text())["step"] in (3, 6)


def test_what_is_known_of_the_constant_predictor_is_found_again_where_it_is_damaged(
    run: tuple[Path, Config], tmp_path: Path
) -> None:
    _, config = run
    config = dataclasses.replace(config, run_dir=str(tmp_path / "table" / "system" / "seed0"))
    training = Training(ROW, config, total_steps=3, parameters=0)
    metrics = constant_metrics(training, "val")
    for damage in (b"\xff", b"[]", b"", json.dumps({"of": None, "metrics": 3}).encode()):
        (tmp_path / "table" / "constant.json").write_bytes(damage)
        assert constant_metrics(training, "val") == metrics


def test_a_line_after_one_that_was_cut_short_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    records.append(file, {"n": 1})
    file.write_bytes(file.read_bytes() + b'{"n": ')
    records.append(file, {"n": 2})
    assert records.read(file, {"n": int}) == [{"n": 1}, {"n": 2}]
    assert records.read(file, {"n": str}) == []
