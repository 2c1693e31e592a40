"""Learning rates and parameter groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtunet_dist.config import OptimConfig
from mtunet_dist.multitask import MultiTaskStep
from mtunet_dist.optim import build_optimizer, lr_at, set_lr


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
