"""Nothing that is not finite is saved or becomes the best: weights, buffers, optimiser, weighting; by any strategy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.training import MakeConfig, on_two_ranks, records
from mtunet_dist import distributed
from mtunet_dist import train as training_loop
from mtunet_dist.config import Config
from mtunet_dist.core.finite import count_broken, first_broken
from mtunet_dist.errors import NonFiniteLossError
from mtunet_dist.runs import checkpoint, resume
from mtunet_dist.runs.evaluation import Evaluation
from mtunet_dist.runs.run import Run
from mtunet_dist.train import train

CPU = torch.device("cpu")
STRATEGIES = {
    "ddp": [],
    **{f"zero{stage}": ["strategy.name=deepspeed", f"strategy.stage={stage}"] for stage in range(4)},
    "offloaded": ["strategy.name=deepspeed", "strategy.stage=1", "strategy.offload_optimizer=true"],
}
PLACES = {  # the beginning or the end of a name
    "weight": "model.",
    "statistics": "running_var",
    "optimiser": "exp_avg_sq of ",
    "loss weights": "weighting.alpha",
    "loss statistics": "weighting.variances",
}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_number_is_found_and_named(value: float, kind: torch.dtype) -> None:
    tensors = {
        "a": torch.ones(3, 4),
        "b": torch.zeros(5, dtype=kind),
        "none": torch.zeros(0),
        "count": torch.tensor(1 << 60),
        "scalar": torch.tensor(-1e300, dtype=torch.float64),
    }
    assert count_broken(tensors.items(), CPU) == 0
    assert first_broken(tensors.items()) is None
    tensors["b"][3] = value
    assert count_broken(tensors.items(), CPU) == 1
    assert first_broken(tensors.items()) == f"b became {abs(value)}"


def test_what_would_not_be_finite_as_a_sum_over_ranks_is_found() -> None:
    tensors = [("a", torch.tensor([3e38]))]
    assert count_broken(tensors, CPU) == 0
    assert count_broken(tensors, CPU, factor=2) == 1
    assert first_broken(tensors, factor=2) == "a became inf"


@pytest.mark.slow
def test_every_strategy_looks_at_all_that_it_saves_and_one_rank_ends_all(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    configs = [
        make_config("epochs=3", "log.pictures=0", f"run_dir={tmp_path / name}", *words)
        for name, words in STRATEGIES.items()
    ]
    on_two_ranks(_spoil_each, configs)
    for config in configs:
        assert_nothing_after(3, config)


def _spoil_each(configs: list[Config]) -> None:
    """Rank 1's state of the optimiser, which may lie in parts; and then, one after another, tensors of all kinds."""
    for config in configs:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "close", lambda run: None)
            kept = spoil(patch, "exp_avg_sq of ", step=6, rank=1)
            with pytest.raises(NonFiniteLossError, match=r"^exp_avg_sq of .* became inf within the steps 4 to 6"):
                train(config)
        look_at_some(kept[0])
        kept[0].close()


def look_at_some(run: Run) -> None:
    spoilt = next((t for n, t in run.strategy.tensors() if n.startswith("exp_avg_sq") and not t.isfinite().all()), None)
    assert (spoilt is not None) == (distributed.rank() == 1)
    if spoilt is not None:
        spoilt.zero_()
    named = list(run.strategy.tensors())
    assert count_broken(named, CPU) == 0
    floating = [(name, tensor) for name, tensor in named if tensor.is_floating_point() and tensor.numel()]
    for name, tensor in floating[::9]:
        index = tuple(n // 2 for n in tensor.shape)
        kept = tensor[index].clone()
        with torch.no_grad():
            tensor[index] = math.nan
            assert count_broken(run.strategy.tensors(), CPU) >= 1, name
            assert first_broken(run.strategy.tensors()) is not None, name
            tensor[index] = kept
    state = run.strategy.save()
    if distributed.is_main():
        names = " ".join(name for name, _ in named)
        assert all(name in names for name in state["model"])
        slots = {slot for of_parameter in state["optimizer"].values() for slot in of_parameter}
        assert slots >= {"step", "exp_avg", "exp_avg_sq"} and all(f"{slot} of " in names for slot in slots)
        numbers = sum(value["exp_avg"].numel() for value in state["optimizer"].values())
    mine = torch.tensor(sum(tensor.numel() for name, tensor in floating if name.startswith("exp_avg of")))
    total = int(distributed.all_reduce_sum(mine))  # whole on each rank, or in parts that make up the whole
    if distributed.is_main():
        assert total >= numbers


@pytest.mark.parametrize("place", PLACES)
def test_a_training_whose_state_is_not_finite_ends_and_saves_none_of_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The losses are finite all the while; an epoch's checkpoint, a later one and an evaluation are due then."""
    config = make_config("epochs=3")
    spoil(monkeypatch, PLACES[place], step=6)
    with pytest.raises(
        NonFiniteLossError, match=r"became (inf|nan) within the steps 4 to 6, while the losses are finite"
    ):
        train(config)
    assert_nothing_after(3, config)


def spoil(patch: pytest.MonkeyPatch, name: str, step: int, rank: int = 0) -> list[Run]:
    """Make the first tensor whose name begins or ends so infinite on ``rank`` in the optimiser's step ``step``.

    The run that will be is added to the list.
    """
    start, kept = resume.start, list[Run]()

    def start_spoilt(config: Config, device: torch.device) -> Run:
        run = start(config, device)
        kept.append(run)
        apply = run.strategy.apply

        def apply_and_spoil(lr: float) -> Tensor:
            norm = apply(lr)
            if run.progress.step == step - 1 and distributed.rank() == rank:
                named = (t for n, t in run.strategy.tensors() if (n.startswith(name) or n.endswith(name)) and t.numel())
                next(named).detach().fill_(math.inf)
            return norm

        patch.setattr(run.strategy, "apply", apply_and_spoil)
        return run

    patch.setattr(resume, "start", start_spoilt)
    return kept


def assert_nothing_after(step: int, config: Config) -> None:
    folder = Path(config.run_dir) / "checkpoints"
    assert checkpoint.by_age(folder) == [checkpoint.path_of(folder, step)]
    assert [r["step"] for r in records(config.run_dir, "eval")] == [step]
    for file in folder.iterdir():
        state = checkpoint.load(file)
        assert state["step"] == step
        assert all(tensor.isfinite().all() for tensor in _tensors(state))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


@pytest.mark.parametrize("broken", [{"miou": math.inf}, {"miou": math.nan}, {"loss/depth": math.nan}])
def test_an_evaluation_that_is_not_finite_is_of_no_best_model(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, broken: dict[str, float]
) -> None:
    """In low precision a network of finite weights may say what is not finite."""
    evaluate = training_loop.evaluate

    def spoilt(*args: Any, **options: Any) -> Evaluation:
        result = evaluate(*args, **options)
        return Evaluation(result.samples, {**result.metrics, **broken}, result.class_iou)

    monkeypatch.setattr(training_loop, "evaluate", spoilt)
    config = make_config("epochs=1")
    train(config)
    assert not (Path(config.run_dir) / "checkpoints" / "best.pt").exists()
