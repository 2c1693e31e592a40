"""Weightings: one epoch by hand, limits, exact resume, and agreement of ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.training import on_two_ranks
from mtunet_dist import distributed
from mtunet_dist.errors import InputError
from mtunet_dist.weightings.equal import EqualWeighting
from mtunet_dist.weightings.fixed import FixedWeighting
from mtunet_dist.weightings.learned import FLOOR, LearnedWeighting

TASKS = ["segmentation", "depth"]
VARIANTS = [
    {"update": u, "parametrization": p, "optimizer": o}
    for u, p, o in itertools.product(("epoch", "step"), ("linear", "exp"), ("sgd", "adam"))
]


def losses(*values: float) -> dict[str, Tensor]:
    return {task: torch.tensor(value) for task, value in zip(TASKS, values, strict=True)}


def run_epoch(weighting: LearnedWeighting, steps: list[tuple[float, float]]) -> None:
    for step in steps:
        weighting(losses(*step))
    weighting.end_epoch()


def random_epochs(epochs: int, steps: int, seed: int = 0) -> list[list[tuple[float, float]]]:
    values = torch.rand(epochs, steps, 2, generator=torch.Generator().manual_seed(seed)) + torch.tensor([1.0, 0.1])
    return [[(a, b) for a, b in epoch] for epoch in values.tolist()]


def lambdas(weighting: LearnedWeighting) -> list[float]:
    return [w.item() for w in weighting.weights().values()]


def test_equal_is_the_sum() -> None:
    weighting = EqualWeighting(TASKS)
    assert weighting(losses(2.0, 0.5)).item() == 2.5
    weighting.end_epoch()
    assert {task: w.item() for task, w in weighting.weights().items()} == {"segmentation": 1.0, "depth": 1.0}


def test_fixed_multiplies_in_task_order() -> None:
    weighting = FixedWeighting(TASKS, weights=(0.25, 4.0))
    assert weighting(losses(2.0, 0.5)).item() == 0.25 * 2 + 4 * 0.5
    weighting.end_epoch()
    assert {task: w.item() for task, w in weighting.weights().items()} == {"segmentation": 0.25, "depth": 4.0}


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0), (1.0, -0.1), (1.0, float("nan"))])
def test_fixed_refuses_wrong_weights(weights: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="weights"):
        FixedWeighting(TASKS, weights=weights)


@pytest.mark.parametrize(
    "options", [{"lr": 0.0}, {"window": 0}, {"update": "batch"}, {"parametrization": "log"}, {"optimizer": "lbfgs"}]
)
def test_learned_refuses_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        LearnedWeighting(TASKS, **options)


def test_learned_epochs_by_hand() -> None:
    weighting = LearnedWeighting(TASKS, lr=0.1)
    assert weighting(losses(2.0, 0.5)).item() == pytest.approx(0.5 * 2 + 0.5 * 0.5)
    weighting(losses(4.0, 1.5))
    weighting.end_epoch()
    # Means 3 and 1, lambda 1/2 each: gradient (3 - 2) / 2 and (1 - 2) / 2; the sum of W stays 2. Variances 2, 1/2.
    torch.testing.assert_close(weighting.raw_weights, torch.tensor([0.95, 1.05], dtype=torch.float64))
    assert weighting.alpha.tolist() == [1.0, 1.0]
    assert lambdas(weighting) == pytest.approx([0.475, 0.525])

    run_epoch(weighting, [(2.0, 1.0), (4.0, 3.0)])
    # Means 3 and 2, sum lambda L = 2.475: gradient 0.525 / 2 and -0.475 / 2. Variances 2, 2, so sigma is 2 after both
    # epochs for the first task, 1/2 and then (1/2 + 2) / 2 for the second: alpha 1 and 2.5.
    moved = torch.tensor([0.95 - 0.02625, 1.05 + 0.02375], dtype=torch.float64)
    expected = FLOOR + (moved - FLOOR) / (moved - FLOOR).sum() * 2 * (1 - FLOOR)
    torch.testing.assert_close(weighting.raw_weights, expected)
    torch.testing.assert_close(weighting.alpha, torch.tensor([1.0, 2.5], dtype=torch.float64), rtol=1e-7, atol=0)
    scaled = expected * weighting.alpha
    assert lambdas(weighting) == pytest.approx((scaled / scaled.sum()).tolist())

    run_epoch(weighting, [(2.0, 1.0), (2.0, 1.2)])
    # Variances 0 and 0.02: sigma 4/3 after 2, and 2.52 / 3 after 1.25.
    expected = torch.tensor([(4 / 3) / 2, (2.52 / 3) / 1.25], dtype=torch.float64)
    torch.testing.assert_close(weighting.alpha, expected, rtol=1e-6, atol=0)


def with_variance(variance: float) -> tuple[float, float]:
    """Two losses whose sample variance (n - 1) is ``variance``, around 1."""
    half = (variance / 2) ** 0.5
    return 1 - half, 1 + half


def alphas_of(history: list[tuple[float, float]], window: int) -> list[list[float]]:
    """alpha of both tasks after each epoch, for a history of the variances (task 1, task 2) of the epochs."""
    weighting, alphas = LearnedWeighting(TASKS, window=window), []
    for first, second in history:
        weighting.local_count.fill_(2)
        pairs = torch.tensor([with_variance(first), with_variance(second)], dtype=torch.float64)
        weighting.local_sum.copy_(pairs.sum(1))
        weighting.local_squares.copy_(pairs.square().sum(1))
        weighting.end_epoch()
        alphas.append(weighting.alpha.tolist())
    return alphas


def test_alpha_is_equation_5_as_the_paper_writes_it() -> None:
    history = [(0.9, 0.2), (0.5, 0.3), (0.4, 0.3), (0.1, 0.25), (0.2, 0.05), (0.05, 0.05)]
    window, epsilon = 3, 1e-8
    sigma = [[sum(v) / len(v) for v in zip(*history[max(0, t - window) : t], strict=True)] for t in range(1, 7)]
    for t, alpha in enumerate(alphas_of(history, window), start=1):
        by_hand = [(s + epsilon) / (b + epsilon) for s, b in zip(sigma[t - 1], sigma[t - 2], strict=True)]
        assert alpha == pytest.approx(by_hand if t >= 2 else [1.0, 1.0], rel=1e-9)


def test_alpha_is_a_ratio_of_averages_and_not_an_average_of_ratios() -> None:
    alternating = alphas_of([(1.0, 4.0), (4.0, 1.0)] * 3, window=5)[-1]
    assert alternating == pytest.approx([2.8 / 2.2, 2.2 / 2.8])
    assert alphas_of([(1e-10, 0.0)] * 6, window=5)[-1] == pytest.approx([1.0, 1.0], abs=1e-6)


def test_initial_weights_are_scaled_and_in_task_order() -> None:
    weighting = LearnedWeighting(TASKS, initial=(3.0, 9.0))
    assert weighting.raw_weights.tolist() == [0.5, 1.5]
    assert lambdas(weighting) == [0.25, 0.75]
    for wrong in ((1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, 1e9)):
        with pytest.raises(InputError, match="initial"):
            LearnedWeighting(TASKS, initial=wrong)


def test_checkpoints_of_before_the_ratio_of_averages_still_load() -> None:
    weighting = LearnedWeighting(TASKS, window=3)
    state = weighting.state_dict()
    del state["variances"]
    old = {"variance": torch.tensor([4.0, 2.0]).double(), "ratios": torch.ones(3, 2).double()}
    weighting.load_state_dict({**state, **old, "epochs": torch.tensor(7)})
    run_epoch(weighting, [with_variance(2.0), with_variance(2.0)])
    assert weighting.epochs == 2
    assert weighting.variances[1].tolist() == [4.0, 2.0]


@pytest.mark.parametrize("parametrization", ["linear", "exp"])
def test_learned_step_is_the_gradient_of_the_weighted_losses(parametrization: Any) -> None:
    lr, values = 1e-4, torch.tensor([2.0, 0.7, 1.1], dtype=torch.float64)
    weighting = LearnedWeighting(["a", "b", "c"], lr=lr, parametrization=parametrization)
    weighting.alpha.copy_(torch.tensor([0.5, 2.0, 1.0]))
    start = torch.tensor([1.2, 0.5, 1.3], dtype=torch.float64)
    weighting.raw_weights.copy_(start)
    leaf = (start.log() if parametrization == "exp" else start.clone()).requires_grad_()
    scaled = (leaf.exp() if parametrization == "exp" else leaf) * weighting.alpha
    (scaled / scaled.sum() * values).sum().backward()
    stepped = leaf.detach() - lr * leaf.grad
    expected = stepped.exp() if parametrization == "exp" else stepped
    weighting(dict(zip(weighting.tasks, values, strict=True)))
    weighting.end_epoch()
    torch.testing.assert_close(weighting.raw_weights, expected / expected.sum() * 3, rtol=0, atol=lr * 1e-2)
    assert not torch.allclose(weighting.raw_weights, start, rtol=0, atol=lr * 1e-1)


@pytest.mark.parametrize("options", VARIANTS)
def test_weight_moves_toward_the_smaller_loss(options: dict[str, Any]) -> None:
    weighting = LearnedWeighting(TASKS, **options)
    run_epoch(weighting, [(2.0, 1.0)] * 3)
    big, small = lambdas(weighting)
    assert big < 0.5 < small
    assert abs(small - 0.5) < 2e-3


def test_adam_per_step_collapses_and_sgd_per_epoch_stays_near_half() -> None:
    collapsing, steady = LearnedWeighting(TASKS, update="step", optimizer="adam"), LearnedWeighting(TASKS)
    for _ in range(2000):
        collapsing(losses(1.0, 0.1))
    assert collapsing.raw_weights[0] < 1.01 * FLOOR
    for _ in range(200):
        run_epoch(steady, [(1.0, 0.1)])
    assert lambdas(steady) == pytest.approx([0.5, 0.5], abs=0.05)


def test_network_gradient_is_scaled_by_lambda_and_lambda_is_constant() -> None:
    weighting = LearnedWeighting(TASKS, update="step", lr=0.5)
    for step in [(3.0, 1.0), (2.0, 1.0)]:
        weighting(losses(*step))
    share = lambdas(weighting)
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    total = weighting({"segmentation": x[0] ** 2, "depth": x[1] ** 3})
    assert lambdas(weighting) != share  # the step is taken after the total, and must not disturb its backward
    total.backward()
    assert total.dtype == torch.float32
    assert x.grad.tolist() == pytest.approx([share[0] * 4, share[1] * 27])
    assert not list(weighting.parameters())


def test_only_training_with_gradients_is_noted() -> None:
    weighting = LearnedWeighting(TASKS)
    with torch.no_grad():
        weighting(losses(1.0, 2.0))
    weighting.eval()
    weighting(losses(1.0, 2.0))
    assert weighting.local_count.tolist() == [0, 0]
    weighting.train()
    weighting(losses(1.0, 2.0))
    assert weighting.local_count.tolist() == [1, 1]


def test_forward_never_waits_for_the_device() -> None:
    for update in ("epoch", "step"):
        weighting = LearnedWeighting(TASKS, update=update, optimizer="adam").to("meta")  # meta tensors have no values
        assert weighting({task: torch.empty((), device="meta") for task in TASKS}).is_meta


def test_variance_survives_a_large_offset() -> None:
    weighting = LearnedWeighting(TASKS)
    values = [(1e4 + i * 2**-9, 1e-4 * i) for i in range(50)]
    run_epoch(weighting, values)
    seen = torch.tensor(values).double()
    torch.testing.assert_close(weighting.variances[0], seen.var(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", [{}, {"update": "step"}, {"parametrization": "exp", "optimizer": "adam"}])
def test_limits_hold_over_adversarial_epochs(options: dict[str, Any]) -> None:
    weighting = LearnedWeighting(TASKS, lr=0.5, **options)
    hostile = [0.0, 1e-30, 1.0, 1e9, 1e30, float("inf"), float("nan")]
    picks = torch.randint(len(hostile), (1000, 2, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for epoch in picks:
        run_epoch(weighting, [(hostile[a], hostile[b]) for a, b in epoch])
        assert (weighting.raw_weights >= FLOOR).all()
        assert weighting.raw_weights.sum().item() == pytest.approx(2)
        assert (weighting.alpha >= 0.1).all() and (weighting.alpha <= 10).all()
        assert sum(lambdas(weighting)) == pytest.approx(1)


def test_epoch_without_losses_changes_nothing() -> None:
    weighting = LearnedWeighting(TASKS)
    for epoch in random_epochs(3, 4):
        run_epoch(weighting, epoch)
    before = {name: b.clone() for name, b in weighting.named_buffers()}
    run_epoch(weighting, [(float("nan"), 1.0)])
    weighting.end_epoch()
    for name, buffer in weighting.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", VARIANTS)
def test_resume_in_mid_epoch_is_exact(options: dict[str, Any]) -> None:
    epochs = random_epochs(9, 5)
    straight, first, second = (LearnedWeighting(TASKS, window=3, **options) for _ in range(3))
    for epoch in epochs:
        run_epoch(straight, epoch)
    for epoch in epochs[:6]:
        run_epoch(first, epoch)
    for step in epochs[6][:2]:
        first(losses(*step))
    second.load_state_dict({name: t.clone() for name, t in first.state_dict().items()})
    for epoch in (epochs[6][2:], *epochs[7:]):
        run_epoch(second, epoch)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def _train_share(folder: Path) -> None:
    rank = distributed.rank()
    weightings = {update: LearnedWeighting(TASKS, window=3, update=update) for update in ("epoch", "step")}
    for number, epoch in enumerate(random_epochs(6, 8)):
        uneven = 2 + number % 3
        run_epoch(weightings["epoch"], epoch[:uneven] if rank == 0 else epoch[uneven:])
        run_epoch(weightings["step"], epoch[:4] if rank == 0 else epoch[4:])
    torch.save({update: w.state_dict() for update, w in weightings.items()}, folder / f"{rank}.pt")


def test_two_processes_agree_with_one_that_sees_all(tmp_path: Path) -> None:
    on_two_ranks(_train_share, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = {update: LearnedWeighting(TASKS, window=3) for update in ("epoch", "step")}
    for epoch in random_epochs(6, 8):
        run_epoch(alone["epoch"], epoch)
        # Per step, W sees the mean over the ranks; the variance sees every loss.
        for pair in zip(epoch[:4], epoch[4:], strict=True):
            alone["step"]._step(torch.tensor(pair).double().mean(0))
        stepped = alone["step"].raw_weights.clone()
        run_epoch(alone["step"], epoch)
        alone["step"].raw_weights.copy_(stepped)
    for update, weighting in alone.items():
        for name in ("raw_weights", "alpha", "variances", "epochs"):
            expected = weighting.state_dict()[name]
            assert torch.equal(first[update][name], second[update][name])
            torch.testing.assert_close(first[update][name], expected, rtol=1e-12, atol=1e-12)
