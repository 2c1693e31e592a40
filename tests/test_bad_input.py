"""Wrong input to each command: one line that names the thing, exit code 2, nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mtunet_dist import evaluate, launch, predict, prepare, train
from mtunet_dist.config import Config
from mtunet_dist.launching import agent

REPOSITORY = Path(__file__).parent.parent
Fail = Callable[..., str]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fail:
    """``fail(main, word, ...)``: run a command in this process and return its one-line error."""

    def run(main: Callable[[], None], *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture
def empty_config(tmp_path: Path) -> Path:
    file = tmp_path / "empty.yaml"
    file.write_text("{}\n")
    return file


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.root=/no/such/folder", ["/no/such/folder", "does not exist"]),
        ("data.train=training", ["training", "train, val"]),
        ("optim.learning_rate=1", ["optim", "learning_rate"]),
        ("epochs=many", ["epochs", "many"]),
        ("batch_size=16", ["12 samples", "batch_size=16"]),
        ("optim.accumulate=3", ["batch_size=4", "3"]),
        ("checkpoint.best=iou", ["iou", "miou", "depth_abs"]),
        ("tasks=[segmentation,dpeth]", ["unknown task 'dpeth'", "Did you mean 'depth'", "segmentation, depth"]),
        ("tasks=[segmentation,normals]", ["unknown task 'normals'", "segmentation, depth"]),
        ("model.widths=[4,8]", ["widths", "4"]),
        ("weighting.name=fixed weighting.weights=[1,2,3]", ["weights", "3"]),
        ("device=cuda", ["device=cuda", "no GPU"]),
        ("device=tpu", ["tpu", "cuda"]),
    ],
)
def test_train_refuses(
    fail: Fail,
    empty_config: Path,
    overrides: list[str],
    override: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = fail(train.main, empty_config, *overrides, *override.split(" "))
    for word in words:
        assert word in message
    run_dir = Path(overrides[0].removeprefix("run_dir="))
    assert not run_dir.exists()


def test_train_refuses_an_image_size_that_the_model_cannot_take(
    fail: Fail, empty_config: Path, overrides: list[str], prepared: Path, tmp_path: Path
) -> None:
    source = prepared.parent / "source"
    prepare.prepare("folder", source, tmp_path / "odd", height=30, width=50, workers=0)
    message = fail(train.main, empty_config, *overrides, f"data.root={tmp_path / 'odd'}")
    assert "30x50" in message
    assert "16" in message


def test_a_shard_cut_short_is_named_before_training(
    fail: Fail, empty_config: Path, overrides: list[str], prepared: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shard = copy / "train-00001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert "train-00001.tar" in fail(train.main, empty_config, *overrides, f"data.root={copy}")


def test_prepare_refuses(fail: Fail, prepared: Path, tmp_path: Path) -> None:
    source, out = prepared.parent / "source", tmp_path / "out"
    assert "/no/such/folder" in fail(prepare.main, "folder", "/no/such/folder", out)
    message = fail(prepare.main, "cityscape", source, out)
    assert "Did you mean 'cityscapes'" in message and "nyuv2" in message
    assert "valid" in fail(prepare.main, "nyuv2", source, out, "valid=true")
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    image = copy / "train" / "rgb" / "003.png"
    image.write_bytes(image.read_bytes()[:600])
    assert str(image) in fail(prepare.main, "folder", copy, out, "--workers", 0)


def test_evaluate_and_predict_refuse(fail: Fail, tmp_path: Path) -> None:
    assert "nowhere" in fail(evaluate.main, tmp_path / "nowhere")
    foreign = tmp_path / "foreign.pt"
    foreign.write_bytes(b"not a checkpoint")
    assert "foreign.pt" in fail(evaluate.main, foreign)
    assert "no.png does not exist" in fail(predict.main, foreign, tmp_path / "no.png", "--out", tmp_path)


def test_more_processes_than_samples_end_with_one_line_and_no_hang(overrides: list[str], empty_config: Path) -> None:
    """Under plain torchrun: both workers refuse, the first says why, torchrun ends with a failure."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = ["-m", "mtunet_dist.train", str(empty_config), *overrides, "batch_size=13"]
    result = subprocess.run([*command, *worker], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode != 0
    assert result.stderr.count("error: batch_size=13 cannot be divided among 2 processes") == 1


@pytest.mark.parametrize("count", ["0", "-1"])
def test_the_launcher_refuses_no_processes(fail: Fail, overrides: list[str], empty_config: Path, count: str) -> None:
    assert f"--nproc={count} must be at least 1" in fail(launch.main, f"--nproc={count}", empty_config, *overrides)


@pytest.mark.parametrize(
    ("gpus", "words", "processes"),
    [
        (4, ["device=auto", "batch_size=8"], 4),
        (4, ["device=auto", "batch_size=2"], 2),
        (8, ["device=auto", "batch_size=12", "optim.accumulate=2"], 6),
        (3, ["device=auto", "batch_size=7"], 1),
        (8, ["device=cpu", "batch_size=8"], 2),
        (0, ["device=auto", "batch_size=8"], 2),
        (0, ["device=auto", "batch_size=3"], 1),
    ],
)
def test_the_launcher_starts_as_many_processes_as_can_share_the_batch(
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpus: int,
    words: list[str],
    processes: int,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    config = make_config(*words)
    assert agent.processes_per_node(config, None) == processes
    fewer = processes < (gpus if gpus and config.device != "cpu" else 2)
    assert (f"processes: {processes}, not" in capsys.readouterr().out) == fewer


def test_the_launcher_checks_before_it_starts_anything_and_passes_on_failure(
    overrides: list[str], empty_config: Path
) -> None:
    command = [sys.executable, str(REPOSITORY / "launch" / "local.py"), "--nproc=2", str(empty_config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for wrong, words in (("optim.lr=fast", "optim.lr"), ("batch_size=14", "12 samples, fewer than batch_size=14")):
        result = subprocess.run([*command, wrong], capture_output=True, text=True, timeout=120, env=environment)
        assert result.returncode == 2
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert words in errors[0]
        assert "Traceback" not in result.stderr
