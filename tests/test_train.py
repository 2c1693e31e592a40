"""Training end to end on the tiny dataset: it learns, ranks agree, faults are named."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shutil
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch._dynamo.utils import counters

from helpers.training import LAUNCH, MakeConfig, final_state, kill_all, on_two_ranks, records, start
from mtunet_dist import distributed
from mtunet_dist.config import Config, load_config
from mtunet_dist.core.comparison import delta_m
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError, NonFiniteLossError
from mtunet_dist.runs import checkpoint, resume
from mtunet_dist.strategies.ddp import DDPStrategy
from mtunet_dist.train import _optimiser_step, train


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


def test_learned_loss_weights_change_between_epochs_and_not_within(make_config: MakeConfig) -> None:
    config = make_config("log.every_steps=1", "weighting.lr=0.1", "eval_every_epochs=0")
    train(config)
    weights = {r["step"]: r["weight/segmentation"] for r in records(config.run_dir, "train")}
    assert weights[1] == weights[2] == 0.5
    assert weights[4] == weights[5]
    assert abs(weights[4] - 0.5) > 1e-3


def test_the_best_by_delta_m_is_the_one_that_gains_most_over_the_reference(make_config: MakeConfig) -> None:
    reference = {"miou": 0.2, "depth_abs": 2.0}
    config = make_config("epochs=4", "checkpoint.best=delta_m", "checkpoint.reference={miou: 0.2, depth_abs: 2.0}")
    metrics = train(config)
    evaluations = {r["step"]: r for r in records(config.run_dir, "eval")}
    gains = {step: delta_m(r, reference, list(reference)) for step, r in evaluations.items()}
    assert {step: r["delta_m"] for step, r in evaluations.items()} == gains
    assert metrics["delta_m"] == gains[max(gains)]
    best = checkpoint.load(Path(config.run_dir) / "checkpoints" / "best.pt")
    assert best["step"] == max(gains, key=gains.__getitem__)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint.best=delta_m"], "checkpoint.best=delta_m needs what single-task networks reach"),
        (["checkpoint.best=miu"], "checkpoint.best=miu is no metric.*delta_m"),
        (["checkpoint.reference={miu: 0.2}"], "checkpoint.reference: miu is no metric. Did you mean 'miou'?"),
        (["checkpoint.reference={miou: 0}"], "checkpoint.reference.miou=0.0 must be > 0"),
    ],
)
def test_a_best_that_cannot_be_told_is_refused(make_config: MakeConfig, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(make_config(*words))


def test_the_last_epochs_are_evaluated_too_and_nothing_else_changes(make_config: MakeConfig, tmp_path: Path) -> None:
    def run(*words: str) -> tuple[list[float], dict[str, float]]:
        config = make_config("epochs=5", "eval_every_epochs=0", *words)
        metrics = train(config)
        return [r["epoch"] for r in records(config.run_dir, "eval")], metrics

    assert run(f"run_dir={tmp_path / 'one'}")[0] == [5.0]
    epochs, metrics = run(f"run_dir={tmp_path / 'three'}", "eval_last_epochs=3")
    assert epochs == [3.0, 4.0, 5.0]
    assert metrics == run(f"run_dir={tmp_path / 'again'}")[1]


def test_checkpoints_last_best_and_pruned(make_config: MakeConfig) -> None:
    config = make_config("epochs=5", "checkpoint.keep=2", "checkpoint.best=depth_abs")
    train(config)
    folder = Path(config.run_dir) / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best.pt", "step_00000012.pt", "step_00000015.pt"]
    errors = {r["step"]: r["depth_abs"] for r in records(config.run_dir, "eval")}
    assert checkpoint.load(folder / "best.pt")["step"] == min(errors, key=errors.__getitem__)


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


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed"])
def test_a_compiled_step_is_the_eager_one_under_the_same_names(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """Traced for real; the backend that then runs the graph as it is spares the compiler's time."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would write it all down
    torch.compiler.reset()
    counters.clear()
    settings = ["optim.name=sgd", "optim.lr=1.0", "model.dropout=0.0", "log.pictures=0", f"strategy.name={strategy}"]
    eager = _updated_weights(make_config(*settings))
    assert not counters["stats"]["unique_graphs"]
    compiled = _updated_weights(make_config(*settings, "compile=true", f"run_dir={tmp_path / 'compiled'}"))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert compiled.keys() == eager.keys()
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_accumulation_equals_the_whole_batch(make_config: MakeConfig, tmp_path: Path) -> None:
    settings = ["optim.name=sgd", "optim.lr=1.0", "model.dropout=0.0"]
    one = _updated_weights(make_config(*settings))
    two = _updated_weights(make_config(*settings, "optim.accumulate=2", f"run_dir={tmp_path / 'two'}"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)


def test_two_ranks_equal_one_rank_with_the_double_batch(
    make_config: MakeConfig, dataset: PreparedDataset, tmp_path: Path
) -> None:
    """Void and invalid pixels are spread unevenly over the ranks."""
    split = dataset.split("train")
    ranks = [TrainOrder(12, batch_size=4, rank=rank, world_size=2).plan(0).samples for rank in range(2)]
    for void in (lambda raw: raw.targets["segmentation"] == 255, lambda raw: raw.targets["depth"] == 0):
        counts = [sum(void(split.decode(int(i))).sum() for i in samples) for samples in ranks]
        assert abs(counts[0] - counts[1]) > 50
    settings = ["optim.name=sgd", "optim.lr=1.0", "model.dropout=0.0", "data.augment.flip=true"]
    one = _updated_weights(make_config(*settings))
    on_two_ranks(_save_updated_weights, make_config(*settings, f"run_dir={tmp_path / 'two'}"), tmp_path)
    for rank in range(2):
        two = torch.load(tmp_path / f"rank{rank}.pt")
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)


def _save_updated_weights(config: Config, folder: Path) -> None:
    torch.save(_updated_weights(config), folder / f"rank{torch.distributed.get_rank()}.pt")


def _updated_weights(config: Config) -> dict[str, torch.Tensor]:
    """Parameters after one optimiser step with frozen batch norm, whose statistics would differ between ranks."""
    run = resume.start(config, torch.device("cpu"))
    run.module.train()
    for module in run.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    _optimiser_step(run, run.loader.batches(), lr=config.optim.lr)
    run.close()
    return {name: p.detach().clone() for name, p in run.module.named_parameters()}


def test_ranks_have_the_same_weights_and_different_dropout(make_config: MakeConfig, tmp_path: Path) -> None:
    on_two_ranks(_save_outputs, make_config(), tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert torch.equal(one["eval"], two["eval"])
    assert not torch.equal(one["train"], two["train"])


def _save_outputs(config: Config, folder: Path) -> None:
    """Depth of the same picture on every rank, with dropout and without."""
    step = resume.start(config, torch.device("cpu")).module
    image = torch.full((2, 3, 32, 48), 128, dtype=torch.uint8)
    outputs = {mode: step.train(mode == "train").predict(image)["depth"].detach() for mode in ("eval", "train")}
    torch.save(outputs, folder / f"rank{torch.distributed.get_rank()}.pt")


@pytest.mark.parametrize("more", [[], ["log.every_steps=1000", "checkpoint.every_steps=1", "checkpoint.keep=99"]])
def test_a_loss_that_is_not_finite_stops_before_a_save_with_task_step_and_epoch(
    make_config: MakeConfig, more: list[str]
) -> None:
    config = make_config("optim.name=sgd", "optim.lr=1e18", "weighting.name=equal", "epochs=4", *more)
    what = r"(loss '(segmentation|depth)'|gradient norm)"
    with pytest.raises(NonFiniteLossError, match=rf"the {what} became (nan|inf) at step \d+ \(epoch"):
        train(config)
    saved = checkpoint.by_age(Path(config.run_dir) / "checkpoints")
    assert [path.name for path in saved] == (["step_00000001.pt"] if more else [])


def test_fp16_gradients_that_are_finite_at_no_scale_stop_the_training(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overflow now and then only leaves out its step; the loss itself stays finite."""
    backward = DDPStrategy.backward

    def broken(self: DDPStrategy, loss: torch.Tensor) -> None:
        backward(self, loss)
        parameter = next(self.module.parameters())
        assert parameter.grad is not None
        parameter.grad.fill_(math.nan)

    monkeypatch.setattr(DDPStrategy, "backward", broken)
    config = make_config("precision=fp16", "epochs=20", "eval_every_epochs=0", "log.every_steps=1")
    with pytest.raises(NonFiniteLossError, match=r"the gradient norm became nan at step 2\d "):
        train(config)


def test_a_sample_that_cannot_be_decoded_ends_two_processes_with_one_line(
    overrides: list[str], prepared: Path, tmp_path: Path
) -> None:
    """The second process meets it in step 3, while the first waits for it in a collective."""
    copy, config_file, run_dir = tmp_path / "copy", tmp_path / "config.yaml", tmp_path / "run"
    shutil.copytree(prepared, copy)
    config_file.write_text("{}\n")
    bad = int(TrainOrder(12, batch_size=4, rank=1, world_size=2).plan(2).samples[0])
    split = PreparedDataset(copy).split("train")
    shard = copy / f"train-{bad // 4:05d}.tar"
    data = bytearray(shard.read_bytes())
    start = data.find(split.stored(bad)["rgb"].tobytes())
    data[start : start + 300] = bytes(byte ^ 0xFF for byte in data[start : start + 300])
    shard.write_bytes(data)
    try:
        result = subprocess.run(
            [*LAUNCH, str(config_file), *overrides, f"data.root={copy}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        kill_all(run_dir)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert split.describe(bad) in errors[0]


def join_and_leave() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with distributed.process_group(torch.device("cpu"), 60):
        group = weakref.ref(torch.distributed.group.WORLD)
    assert not distributed.is_on()
    assert group() is not None


def test_a_process_group_outlives_the_ddp_that_uses_it() -> None:
    """Else its end hangs now and then: see ``distributed.leave``."""
    process = start(join_and_leave)
    process.join(60)
    assert process.exitcode == 0
