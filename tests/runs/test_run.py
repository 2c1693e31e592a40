"""The run folder and its checkpoints: whose it is, what is kept, what a saved state gives back."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
import torch

from helpers.training import MakeConfig, on_two_ranks, train_each
from mtunet_dist import distributed
from mtunet_dist.config import Config
from mtunet_dist.errors import InputError, NonFiniteLossError
from mtunet_dist.runs import checkpoint, resume
from mtunet_dist.runs.run import Run
from mtunet_dist.strategies.ddp import DDPStrategy
from mtunet_dist.train import train

CPU = torch.device("cpu")


def test_a_run_folder_has_one_training_at_a_time(make_config: MakeConfig) -> None:
    config = make_config("epochs=1")
    with closing(resume.start(config, CPU)), pytest.raises(InputError, match="another training is writing to"):
        train(config)
    train(config)


@pytest.mark.parametrize("kind", ["a file", "beside a file"])
def test_a_run_dir_that_cannot_be_a_folder_is_refused(make_config: MakeConfig, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    run_dir = tmp_path / "file" if kind == "a file" else tmp_path / "file" / "run"
    with pytest.raises(InputError, match=rf"run_dir={run_dir} cannot be written"):
        train(make_config(f"run_dir={run_dir}"))


def test_saving_never_removes_what_it_wrote_and_removes_what_could_not_be_read(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        checkpoint.save(tmp_path, {"step": step}, keep=9, best=False)
    checkpoint.path_of(tmp_path, 9).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint.latest(tmp_path) == checkpoint.path_of(tmp_path, 3)
    checkpoint.save(tmp_path, {"step": 4}, keep=1, best=False)
    assert checkpoint.by_age(tmp_path) == [checkpoint.path_of(tmp_path, 4)]


def test_moments_follow_the_strides_of_their_parameters(make_config: MakeConfig) -> None:
    """A run may go on with another channels_last; the fused optimiser would mix up elements silently."""
    train(make_config("epochs=1", "channels_last=true"))
    with closing(resume.start(make_config("channels_last=false"), CPU)) as run:
        assert isinstance(run.strategy, DDPStrategy)
        path = checkpoint.latest(run.dir / "checkpoints")
        assert path is not None
        saved = checkpoint.load(path)["strategy"]["optimizer"]
        parameters = dict(run.module.named_parameters())
        assert saved.keys() == parameters.keys()
        checked = 0
        for name, value in saved.items():
            parameter, slots = parameters[name], run.strategy.optimizer.state[parameters[name]]
            assert torch.equal(slots["exp_avg"], value["exp_avg"])
            assert slots["exp_avg"].stride() == parameter.stride()
            assert slots["step"] == value["step"] == 3
            checked += value["exp_avg"].stride() != parameter.stride()
        assert checked


def test_the_best_value_counts_for_its_own_metric_and_split(make_config: MakeConfig) -> None:
    train(make_config("epochs=1"))
    for change, known in (("epochs=2", True), ("data.eval=train", False), ("checkpoint.best=depth_abs", False)):
        with closing(resume.start(make_config(change), CPU)) as run:
            assert (run.progress.best is not None) == known, change


def test_a_gradient_that_is_not_finite_is_never_saved(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    start = resume.start

    def start_with_fault(config: Config, device: torch.device) -> Run:
        run = start(config, device)
        next(run.module.parameters()).register_hook(
            lambda grad: grad * float("nan") if run.progress.step == 4 else grad
        )
        return run

    monkeypatch.setattr(resume, "start", start_with_fault)
    config = make_config("log.every_steps=100")
    with pytest.raises(NonFiniteLossError, match=r"the gradient norm became nan at step 5 \(epoch 2\)"):
        train(config)
    assert checkpoint.by_age(Path(config.run_dir) / "checkpoints") == [
        checkpoint.path_of(Path(config.run_dir) / "checkpoints", 3)
    ]


def test_saving_changes_nothing_in_the_run(make_config: MakeConfig, tmp_path: Path) -> None:
    """Two ranks, whose batch-norm statistics differ: the end does not depend on how often they were saved."""
    configs = [
        make_config(f"run_dir={tmp_path / name}", f"checkpoint.every_steps={n}", "checkpoint.keep=9")
        for name, n in (("often", 1), ("seldom", 0))
    ]
    on_two_ranks(train_each, configs)
    often, seldom = (checkpoint.load(checkpoint.path_of(Path(c.run_dir) / "checkpoints", 6)) for c in configs)
    _assert_equal(often["strategy"]["model"], seldom["strategy"]["model"])
    for a, b in zip(often["ranks"], seldom["ranks"], strict=True):
        _assert_equal(a["local"], b["local"])
    # Between evaluations, which average them, the ranks' own statistics are kept apart.
    first, second = checkpoint.load(checkpoint.path_of(Path(configs[0].run_dir) / "checkpoints", 5))["ranks"]
    assert not any(torch.equal(first["local"][key], second["local"][key]) for key in first["local"] if "mean" in key)


def _assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(a[key], b[key]) for key in a | b)


def test_what_rank_0_refuses_every_rank_refuses() -> None:
    on_two_ranks(_decide)


def _decide() -> None:
    def refuse() -> None:
        assert distributed.is_main()
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        distributed.on_main(refuse)
    assert distributed.on_main(os.getpid) == distributed.from_main(os.getpid())
