"""Training end to end on the tiny dataset: it learns, it resumes to the bit, ranks agree, faults are named."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from mtunet_dist import checkpoint
from mtunet_dist import run as runs
from mtunet_dist.config import Config, load_config
from mtunet_dist.errors import InputError, NonFiniteLossError
from mtunet_dist.train import _optimiser_step, train

MakeConfig = Callable[..., Config]
REPOSITORY = Path(__file__).parent.parent


def records(run_dir: str, kind: str) -> list[dict[str, float]]:
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def final_state(run_dir: str | Path) -> checkpoint.State:
    path = checkpoint.latest(Path(run_dir) / "checkpoints")
    assert path is not None
    return checkpoint.load(path)


def assert_same_weights(a: checkpoint.State, b: checkpoint.State) -> None:
    for key, value in a["strategy"]["model"].items():
        assert torch.equal(value, b["strategy"]["model"][key]), key
    for index, slots in a["strategy"]["optimizer"]["state"].items():
        for name, value in slots.items():
            assert torch.equal(value, b["strategy"]["optimizer"]["state"][index][name]), (index, name)


def test_it_learns_and_the_run_folder_explains_itself(make_config: MakeConfig) -> None:
    config = make_config("epochs=25", "eval_every_epochs=5", "optim.lr=0.01", "model.dropout=0.0")
    metrics = train(config)
    assert metrics["accuracy"] > 0.8  # the most frequent class has about half of the pixels
    assert metrics["depth_abs"] < 1.2  # metres; the median of the training set is off by about 1.5
    run_dir = Path(config.run_dir)
    assert load_config(run_dir / "config.yaml") == config
    assert json.loads((run_dir / "environment.json").read_text())["torch"] == torch.__version__
    assert Image.open(run_dir / "pictures" / "latest.png").width > 300
    train_records = records(config.run_dir, "train")
    assert [r["step"] for r in train_records][-1] == 75
    assert train_records[-1]["loss/total"] < train_records[0]["loss/total"]
    keys = {
        "loss/segmentation",
        "loss/depth",
        "weight/segmentation",
        "weight/depth",
        "lr",
        "grad_norm",
        "samples_per_s",
    }
    assert keys <= train_records[0].keys()
    assert [r["step"] for r in records(config.run_dir, "eval")] == [15, 30, 45, 60, 75]
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert {"train/loss/total", "eval/miou", "eval/legacy/miou", "eval/iou/box"} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["predictions"]


def test_checkpoints_last_best_and_pruned(make_config: MakeConfig) -> None:
    config = make_config("epochs=5", "checkpoint.keep=2", "checkpoint.best=depth_abs")
    train(config)
    folder = Path(config.run_dir) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best.pt", "step_00000012.pt", "step_00000015.pt"]
    errors = {r["step"]: r["depth_abs"] for r in records(config.run_dir, "eval")}
    assert checkpoint.load(folder / "best.pt")["step"] == min(errors, key=errors.__getitem__)


def test_a_finished_run_started_again_does_nothing(make_config: MakeConfig) -> None:
    config = make_config("epochs=1")
    metrics = train(config)
    before = final_state(config.run_dir)
    assert train(config) == metrics
    assert_same_weights(final_state(config.run_dir), before)
    assert len(records(config.run_dir, "eval")) == 1


def test_more_epochs_continue_a_finished_run(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config("epochs=1"))
    train(make_config("epochs=3"))
    whole = make_config("epochs=3", f"run_dir={tmp_path / 'whole'}")
    train(whole)
    assert_same_weights(final_state(tmp_path / "run"), final_state(whole.run_dir))
    assert [r["step"] for r in records(str(tmp_path / "run"), "train")] == [3, 6, 9]


def test_resume_in_mid_epoch_drops_what_was_logged_beyond_and_ends_the_same(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    more = ["epochs=2", "checkpoint.every_steps=2", "log.every_steps=1", "data.augment.flip=true"]
    broken = make_config(*more, f"run_dir={tmp_path / 'broken'}", "checkpoint.keep=9")
    train(broken)
    for path in checkpoint.by_age(tmp_path / "broken" / "checkpoints")[:-1]:
        path.unlink()  # as if it had died after step 2 of 6
    whole = make_config(*more, f"run_dir={tmp_path / 'whole'}")
    train(whole)
    train(broken)
    assert_same_weights(final_state(broken.run_dir), final_state(whole.run_dir))
    assert [r["step"] for r in records(broken.run_dir, "train")] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(make_config: MakeConfig) -> None:
    config = make_config("epochs=2")
    train(config)
    newest, older = checkpoint.by_age(Path(config.run_dir) / "checkpoints")[:2]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=newest.name):
        assert checkpoint.latest(Path(config.run_dir) / "checkpoints") == older


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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains(make_config: MakeConfig, precision: str) -> None:
    config = make_config("epochs=1", f"precision={precision}", "eval_every_epochs=0")
    assert math.isfinite(train(config)["loss/segmentation"])
    assert final_state(config.run_dir)["strategy"]["model"]["model.bottleneck.0.0.weight"].dtype == torch.float32


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_one_task_alone(make_config: MakeConfig, task: str) -> None:
    best = {"segmentation": "miou", "depth": "depth_abs"}[task]
    metrics = train(make_config("epochs=1", f"tasks=[{task}]", f"checkpoint.best={best}", "weighting.name=equal"))
    assert best in metrics
    assert len([k for k in metrics if k.startswith("loss/")]) == 1


def test_accumulation_equals_the_whole_batch(make_config: MakeConfig) -> None:
    one = _updated_weights(make_config("optim.name=sgd", "optim.lr=1.0", "model.dropout=0.0"))
    two = _updated_weights(make_config("optim.name=sgd", "optim.lr=1.0", "model.dropout=0.0", "optim.accumulate=2"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)


def test_two_ranks_equal_one_rank_with_the_double_batch(make_config: MakeConfig, tmp_path: Path) -> None:
    """Void and invalid pixels are spread unevenly over the ranks, and the order is DALI's real one."""
    config = make_config("optim.name=sgd", "optim.lr=1.0", "model.dropout=0.0", "data.augment.flip=true")
    one = _updated_weights(config)
    mp.spawn(_rank, args=(config, tmp_path), nprocs=2)
    for rank in range(2):
        two = torch.load(tmp_path / f"rank{rank}.pt")
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)


def _rank(rank: int, config: Config, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.save(_updated_weights(config), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def _updated_weights(config: Config) -> dict[str, torch.Tensor]:
    """Parameters after one optimiser step with frozen batch norm, whose statistics would differ between ranks."""
    run = runs.start(config, torch.device("cpu"))
    run.module.train()
    for module in run.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    _optimiser_step(run, run.loader.batches(), lr=config.optim.lr)
    run.close()
    return {name: p.detach().clone() for name, p in run.module.named_parameters()}


def test_resume_with_fewer_processes_carries_on_the_epochs_loss_statistics(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config("epochs=1", "checkpoint.every_steps=2", "checkpoint.keep=9", "eval_every_epochs=0")
    mp.spawn(_train_rank, args=(config, tmp_path), nprocs=2)
    checkpoint.path_of(Path(config.run_dir) / "checkpoints", 3).unlink()
    with closing(runs.start(config, torch.device("cpu"))) as run:
        assert run.step == 2
        assert run.module.weighting.local_count.tolist() == [4, 4]  # type: ignore[attr-defined]  # 2 steps of 2 ranks
    assert math.isfinite(train(config)["miou"])
    assert final_state(config.run_dir)["step"] == 3


def _train_rank(rank: int, config: Config, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    train(config)
    torch.distributed.destroy_process_group()


def test_a_loss_that_is_not_finite_stops_with_task_step_and_epoch(make_config: MakeConfig) -> None:
    config = make_config("optim.name=sgd", "optim.lr=1e18", "weighting.name=equal", "epochs=4")
    with pytest.raises(
        NonFiniteLossError,
        match=r"the (loss '(segmentation|depth)'|gradient norm) became (nan|inf) at step \d+ \(epoch",
    ):
        train(config)
    folder = Path(config.run_dir) / "checkpoints"
    assert all(
        torch.isfinite(v).all()
        for p in checkpoint.by_age(folder)
        for v in checkpoint.load(p)["strategy"]["model"].values()
    )


def test_killed_in_mid_epoch_under_torchrun_and_started_again_ends_with_the_same_bits(
    overrides: list[str], tmp_path: Path
) -> None:
    """Two processes, DALI order, augmentation, dropout and learned weights; SIGKILL to all while they train."""
    config_file = tmp_path / "config.yaml"
    config_file.write_text("epochs: 12\n")
    settings = [
        *overrides[1:],
        "epochs=12",
        "checkpoint.every_steps=2",
        "log.every_steps=1",
        "eval_every_epochs=4",
        "data.augment.flip=true",
        "data.augment.scales=[1.0,1.2]",
        "weighting.window=2",
    ]
    launch = [sys.executable, str(REPOSITORY / "launch" / "local.py"), "--nproc=2", str(config_file), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    killed = tmp_path / "killed"
    process = subprocess.Popen([*launch, f"run_dir={killed}"], env=environment, start_new_session=True)
    log = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) > 13):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _wait_until_gone(killed)
    assert 0 < final_state(killed)["step"] < 36

    for folder in (killed, tmp_path / "whole"):
        subprocess.run([*launch, f"run_dir={folder}"], env=environment, check=True, timeout=300)
    a, b = final_state(killed), final_state(tmp_path / "whole")
    assert a["step"] == b["step"] == 36
    assert_same_weights(a, b)
    assert a["metrics"] == b["metrics"]


def _wait_until_gone(run_dir: Path) -> None:
    """torchrun's workers have sessions of their own and outlive a killed agent until they notice; end them."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"run_dir={run_dir}".encode() in words:
                os.kill(int(entry.name), signal.SIGKILL)
    time.sleep(0.5)


def test_sample_order_does_not_depend_on_numpy_global_state(make_config: MakeConfig) -> None:
    run = runs.start(make_config(), torch.device("cpu"))
    first = run.order.plan(4).samples.copy()
    np.random.seed(99)
    assert np.array_equal(run.order.plan(4).samples, first)
