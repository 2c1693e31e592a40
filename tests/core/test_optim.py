"""Learning rates, parameter groups, and what a strategy makes of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers.training import TASKS
from mtunet_dist.config import OptimConfig, load_config
from mtunet_dist.core.optim import build_optimizer, lr_at, set_lr
from mtunet_dist.core.step import Batch, MultiTaskStep, build_step
from mtunet_dist.strategies.ddp import DDPStrategy


def rates(config: OptimConfig, epochs: int = 10, steps_per_epoch: int = 5) -> list[float]:
    total = epochs * steps_per_epoch
    return [lr_at(step, config, steps_per_epoch, total) for step in range(total)]


def test_constant_is_the_papers_schedule() -> None:
    assert set(rates(OptimConfig())) == {1e-4}


def test_warmup_rises_linearly_to_the_rate() -> None:
    values = rates(OptimConfig(lr=1.0, warmup_epochs=2))
    assert values[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


def test_step_multiplies_every_so_many_epochs() -> None:
    values = rates(OptimConfig(lr=1.0, schedule="step", step_epochs=4, step_gamma=0.5))
    assert [values[0], values[19], values[20], values[39], values[40]] == [1.0, 1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.55), ("cosine", 0.55), ("poly", 0.1 + 0.9 * 0.5**0.9)])
def test_schedules_fall_from_the_rate_to_the_least(schedule: str, middle: float) -> None:
    values = rates(OptimConfig(lr=1.0, schedule=schedule, min_lr=0.1))  # type: ignore[arg-type]
    assert values[0] == 1.0
    assert values[25] == pytest.approx(middle)
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0.1


class TwoWeights(nn.Module):
    """A weighting that learns by gradient."""

    lr = 0.25

    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(2))

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        return sum((loss * w.exp() for loss, w in zip(losses.values(), self.logs, strict=True)), torch.zeros(()))

    def end_epoch(self) -> None: ...

    def weights(self) -> dict[str, Tensor]:
        return {}


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_groups_decay_kernels_only_and_schedule_spares_the_loss_weights(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = build_optimizer(
        MultiTaskStep(model, [], TwoWeights()),
        OptimConfig(name=name, lr=0.5, weight_decay=0.1),  # type: ignore[arg-type]
    )
    kernels, vectors, loss_weights = optimizer.param_groups
    assert [p.shape for p in kernels["params"]] == [(4, 3, 3, 3)]
    assert len(vectors["params"]) == 3
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert loss_weights["params"][0].shape == (2,)
    set_lr(optimizer, 0.125)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.125, 0.25]


def make_strategy(*overrides: str) -> DDPStrategy:
    """Plain gradient descent on a narrow network without dropout."""
    torch.manual_seed(0)
    names = ["run_dir=x", "data.root=x", "optim.name=sgd", "optim.momentum=0", "model.dropout=0"]
    config = load_config(None, [*names, "model.widths=[4,4,4,4]", "model.bottleneck=4", *overrides])
    step = build_step(config, TASKS)
    return DDPStrategy(step, config, torch.device("cpu"))


def backward(strategy: DDPStrategy) -> None:
    random = torch.Generator().manual_seed(1)
    batch: Batch = {
        "image": torch.randint(0, 256, (2, 3, 16, 16), generator=random).byte(),
        "segmentation": torch.randint(0, 3, (2, 16, 16), generator=random).byte(),
        "depth": torch.rand((2, 1, 16, 16), generator=random) + 1,
    }
    strategy.backward(strategy(batch)[0])


def norm(tensors: list[Tensor]) -> float:
    return torch.cat([t.flatten() for t in tensors]).norm().item()


@pytest.mark.parametrize("clip_norm", [0.0, 0.01])
def test_an_update_has_the_rate_given_and_the_clipped_norm_and_returns_the_unclipped(clip_norm: float) -> None:
    strategy = make_strategy(f"optim.clip_norm={clip_norm}")
    parameters = list(strategy.module.parameters())
    before = [p.detach().clone() for p in parameters]
    backward(strategy)
    unclipped = norm([p.grad for p in parameters if p.grad is not None])
    assert unclipped > 0.02
    assert strategy.apply(lr=0.5).item() == pytest.approx(unclipped)
    change = norm([p.detach() - old for p, old in zip(parameters, before, strict=True)])
    assert change == pytest.approx(0.5 * (clip_norm or unclipped), rel=1e-3)
    assert all(p.grad is None for p in parameters)


def test_the_rate_reaches_the_groups_that_follow_the_schedule() -> None:
    strategy = make_strategy()
    strategy = DDPStrategy(
        MultiTaskStep(strategy.module.model, strategy.module.tasks, TwoWeights()),
        load_config(None, ["run_dir=x", "data.root=x"]),
        torch.device("cpu"),
    )
    backward(strategy)
    strategy.apply(lr=0.125)
    assert [group["lr"] for group in strategy.optimizer.param_groups] == [0.125, 0.125, 0.25]


def test_the_norm_under_fp16_is_that_of_the_unscaled_gradient() -> None:
    norms = []
    for precision in ("fp32", "fp16"):
        strategy = make_strategy(f"precision={precision}", "optim.clip_norm=0.01")
        backward(strategy)
        norms.append(strategy.apply(lr=0.5).item())
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_an_overflow_in_the_first_step_leaves_nothing_behind(name: str) -> None:
    words = [f"optim.name={name}", "optim.momentum=0.9", "precision=fp16"]
    disturbed, undisturbed = make_strategy(*words), make_strategy(*words)
    backward(disturbed)
    next(disturbed.module.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    disturbed.apply(lr=0.1)
    undisturbed.scaler = torch.amp.GradScaler("cpu", init_scale=disturbed.loss_scale)
    for _ in range(2):
        for strategy in (disturbed, undisturbed):
            backward(strategy)
            strategy.apply(lr=0.1)
    for a, b in zip(disturbed.module.parameters(), undisturbed.module.parameters(), strict=True):
        assert torch.equal(a, b)
