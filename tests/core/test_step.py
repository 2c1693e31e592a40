"""The training step: nothing in it waits for the device or for Python's garbage, and DDP's options do what they say."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.training import MakeConfig, on_two_ranks
from mtunet_dist import distributed
from mtunet_dist.config import Config
from mtunet_dist.runs import resume
from mtunet_dist.runs.run import Run
from mtunet_dist.runs.tracking import StepReport, Tracker
from mtunet_dist.train import _optimiser_step, train

CPU = torch.device("cpu")
# What makes the host wait for the device: a number or a size that depends on data is asked for, or a tensor fetched.
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "is_nonzero")
FETCHING = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__")


class HostSyncs(TorchDispatchMode):
    """Counts, while entered, what would synchronise if the tensors were on a GPU."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        for name in FETCHING:
            patch.setattr(Tensor, name, self._counted(name, getattr(Tensor, name)))

    def _counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.counts[name] += 1
            return function(*args, **options)

        return call

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in SYNCHRONISING or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.counts[name] += 1
        return function(*args, **kwargs or {})


def syncs_of_a_step(run: Run) -> Counter[str]:
    run.module.train()
    batches = run.loader.batches()
    _optimiser_step(run, batches, lr=0.01)
    with pytest.MonkeyPatch.context() as patch, HostSyncs(patch) as syncs:
        for _ in range(2):
            _optimiser_step(run, batches, lr=0.01)
    return syncs.counts


@pytest.mark.parametrize("weighting", ["learned", "equal", "fixed", "dwa", "uncertainty", "scheduled"])
@pytest.mark.parametrize("more", [["optim.clip_norm=0.5"], ["optim.accumulate=2"], ["precision=fp16"]])
def test_a_step_never_waits_for_the_device(make_config: MakeConfig, weighting: str, more: list[str]) -> None:
    words = {"fixed": ["weighting.weights=[1,2]"]}.get(weighting, [])
    run = resume.start(make_config(f"weighting.name={weighting}", *words, *more, "data.loader=torch"), CPU)
    assert syncs_of_a_step(run) == {}
    run.close()


def test_the_count_finds_what_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(6.0)
    with HostSyncs(monkeypatch) as syncs:
        float(x[0])
        x[x > 2]
        torch.nonzero(x)
        x.tolist()
        if x.sum() > 3:
            x += 1
    assert syncs.counts.keys() >= {"__float__", "index", "nonzero", "tolist", "__bool__", "_local_scalar_dense"}


def test_garbage_is_collected_after_reports_alone(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, collections = Tracker.log_steps, []

    def note(self: Tracker, done: int, report: StepReport) -> None:
        steps(self, done, report)
        collections.append(("report", done))

    monkeypatch.setattr(Tracker, "log_steps", note)
    gc.callbacks.append(lambda phase, info: collections.append(("collect", info["generation"])))
    try:
        train(make_config("log.every_steps=2", "epochs=2", "eval_every_epochs=0", "log.pictures=0"))
    finally:
        gc.callbacks.pop()
    begun = collections.index(("report", 2))
    assert [done for what, done in collections[begun:] if what == "report"] == [2, 3, 4, 6]
    between = "".join("r" if what == "report" else "c" for what, _ in collections[begun:])
    assert between.startswith("rccrccrccrcc"), between  # each collection begins and ends
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


# Options of DDP.


def _gradients(config: Config, file: Path) -> None:
    run = resume.start(config, CPU)
    run.module.eval()  # no dropout, no statistics of a rank's own
    for _ in range(2):
        _optimiser_step(run, run.loader.batches(), lr=0.0)
    momentum = {n: s["exp_avg"].clone() for n, s in run.strategy.save().get("optimizer", {}).items()}
    if distributed.is_main():
        torch.save(momentum, file)
    run.close()


def _each_option(configs: dict[str, Config], folder: Path) -> None:
    for name, config in configs.items():
        _gradients(config, folder / f"{name}.pt")


def test_options_of_ddp_leave_gradients_as_they_are_or_nearly(make_config: MakeConfig, tmp_path: Path) -> None:
    options = {
        "plain": [],
        "static": ["strategy.static_graph=true"],
        "copied": ["strategy.gradient_as_bucket_view=false", "strategy.bucket_cap_mb=1"],
        "bf16": ["strategy.compress=bf16"],
    }
    configs = {}
    for accumulate in (1, 2):
        for name, words in options.items():
            words = [*words, f"optim.accumulate={accumulate}", f"run_dir={tmp_path / f'{name}{accumulate}'}"]
            configs[f"{name}{accumulate}"] = make_config(*words)
    on_two_ranks(_each_option, configs, tmp_path)
    for accumulate in (1, 2):
        found = {name: torch.load(tmp_path / f"{name}{accumulate}.pt") for name in options}
        assert found["plain"]
        for name, value in found["plain"].items():
            assert torch.equal(found["static"][name], value)
            assert torch.equal(found["copied"][name], value)
            torch.testing.assert_close(found["bf16"][name], value, rtol=0.02, atol=1e-2 * value.abs().max().item())
        rounded = [not torch.equal(found["bf16"][name], value) for name, value in found["plain"].items()]
        assert sum(rounded) > len(rounded) / 2
