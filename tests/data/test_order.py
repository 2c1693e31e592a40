"""The order of samples: exactly once, the same for every number of processes, a pure function."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from mtunet_dist.config import DataConfig
from mtunet_dist.core.step import Batch
from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.loader import make_loader
from mtunet_dist.data.order import EvalOrder, TrainOrder, shuffled
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError
from mtunet_dist.tasks.depth import Depth


def global_batch(step: int, world_size: int, accumulate: int, count: int = 29, batch_size: int = 8) -> list[int]:
    """The samples of one optimiser step, gathered from all ranks and micro-batches."""
    samples: list[int] = []
    for rank in range(world_size):
        order = TrainOrder(count, batch_size=batch_size, accumulate=accumulate, rank=rank, world_size=world_size)
        for micro in range(accumulate):
            samples += order.plan(step * accumulate + micro).samples.tolist()
    return samples


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (8, 1)])
def test_a_step_has_the_same_samples_however_it_is_dealt(world_size: int, accumulate: int) -> None:
    for step in range(7):
        assert global_batch(step, world_size, accumulate) == global_batch(step, 1, 1)


def test_an_epoch_has_no_sample_twice_and_epochs_differ() -> None:
    order = TrainOrder(29, batch_size=8)
    assert order.steps_per_epoch == 3
    epochs = [[int(i) for s in range(3) for i in order.plan(3 * e + s).samples] for e in range(3)]
    assert all(len(set(epoch)) == 24 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order.plan(i).epoch for i in range(7)] == [0, 0, 0, 1, 1, 1, 2]


def test_plans_do_not_depend_on_what_was_asked_before() -> None:
    order = TrainOrder(29, batch_size=8, seed=5)
    later = order.plan(20).samples.copy()
    order.plan(3)
    assert np.array_equal(order.plan(20).samples, later)
    assert np.array_equal(TrainOrder(29, batch_size=8, seed=5).plan(20).samples, later)


def test_seeds_and_epochs_give_different_permutations() -> None:
    permutations = {tuple(shuffled(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(permutations) == 16


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 31])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_visits_every_sample_exactly_once(count: int, world_size: int) -> None:
    seen: list[int] = []
    sizes = []
    for rank in range(world_size):
        order = EvalOrder(count, batch_size=4, rank=rank, world_size=world_size)
        for i in range(order.batches or 0):
            plan = order.plan(i)
            seen += plan.samples.tolist()
            sizes.append(len(plan.samples))
    assert sorted(seen) == list(range(count))
    assert min(sizes) > 0


def test_evaluation_batches_are_the_same_for_any_number_of_ranks() -> None:
    def batches(world_size: int) -> set[tuple[int, ...]]:
        orders = [EvalOrder(31, batch_size=4, rank=r, world_size=world_size) for r in range(world_size)]
        return {tuple(o.plan(i).samples.tolist()) for o in orders for i in range(o.batches or 0)}

    assert batches(1) == batches(3)


def test_sizes_that_do_not_divide_and_sets_that_are_too_small_are_refused() -> None:
    with pytest.raises(InputError, match=r"batch_size=8 .* 3 processes x 1"):
        TrainOrder(100, batch_size=8, world_size=3)
    with pytest.raises(InputError, match=r"batch_size=8 .* 2 processes x 3"):
        TrainOrder(100, batch_size=8, world_size=2, accumulate=3)
    with pytest.raises(InputError, match=r"7 samples, fewer than batch_size=8"):
        TrainOrder(7, batch_size=8)


def test_augmentation_is_a_function_of_seed_epoch_and_sample() -> None:
    make = lambda seed: Augmentation(128, 256, flip=True, scales=(1.0, 1.2, 1.5), seed=seed)  # noqa: E731
    assert make(0).draw(3, 7) == make(0).draw(3, 7)
    draws = {make(s).draw(e, i) for s in range(3) for e in range(3) for i in range(20)}
    assert len(draws) > 100  # nearly all of 180 differ; scale 1 without flip recurs


def test_augmentation_windows_lie_inside_and_depth_follows_the_zoom() -> None:
    augmentation = Augmentation(128, 256, flip=True, scales=(1.0, 1.2, 1.5))
    draws = [augmentation.draw(0, i) for i in range(300)]
    assert {d.flip for d in draws} == {True, False}
    metric, inverse = (task.factors(draws, 300) for task in (Depth.metric_depth(0.001), Depth.inverse_depth(0.001)))
    for d, divided, multiplied in zip(draws, metric, inverse, strict=True):
        assert 0 <= d.top <= 128 - d.height
        assert 0 <= d.left <= 256 - d.width
        zoom = min((1.0, 1.2, 1.5), key=lambda s: abs(128 / s - d.height))
        assert (divided, multiplied) == (pytest.approx(0.001 / zoom), pytest.approx(0.001 * zoom))


def test_augmentation_off_changes_nothing() -> None:
    augmentation = Augmentation(32, 48)
    assert not augmentation.zooms
    draw = augmentation.draw(0, 0)
    assert (draw.top, draw.left, draw.height, draw.width, draw.scale, draw.flip) == (0, 0, 32, 48, 1.0, False)


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_order_and_augmentation_neither_use_nor_change_the_global_generators(
    dataset: PreparedDataset, loader: str
) -> None:
    """Else dropout would depend on the loader, and the order on whatever else draws."""

    def batches(seed: int) -> list[Batch]:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        config = DataConfig(root="", loader=loader, threads=0 if loader == "torch" else 1)  # type: ignore[arg-type]
        augmentation = Augmentation(32, 48, flip=True, scales=(1.0, 1.2, 1.5))
        order, cpu = TrainOrder(12, batch_size=4), torch.device("cpu")
        made = make_loader(config, dataset.split("train"), order, cpu, augmentation)
        taken = list(itertools.islice(made.batches(), 4))
        drawn.append((random.random(), np.random.random(), torch.rand(1).item()))
        return taken

    drawn: list[tuple[float, ...]] = []
    for a, b in zip(batches(1), batches(2), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert drawn[0] == (random.random(), np.random.random(), torch.rand(1).item())
