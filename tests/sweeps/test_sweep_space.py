"""What a sweep may search and look for: spaces with conditions, objectives, and what is wrong with them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from mtunet_dist.errors import InputError
from mtunet_dist.sweeps.objective import Goal, Objective
from mtunet_dist.sweeps.space import corners, dimensions_of, draw, grid, sample, words

SPACE: dict[str, Any] = {
    "weighting": {
        "lr": {"loguniform": [1e-4, 1e-1], "when": {"weighting.name": ["learned", "uncertainty"]}},
        "name": {"choice": ["equal", "fixed", "learned", "uncertainty"]},
        "weights": {"share": [0.25, 0.75], "when": {"weighting.name": "fixed"}},
        "window": {"integer": [2, 4], "when": {"weighting.name": ["learned"]}},
    },
    "batch_size": {"loginteger": [1, 64]},
}


def test_conditions_decide_what_a_trial_needs() -> None:
    dimensions = dimensions_of(SPACE)
    assert list(dimensions).index("weighting.name") < list(dimensions).index("weighting.lr")
    needs = {
        "equal": set(),
        "fixed": {"weighting.weights"},
        "learned": {"weighting.lr", "weighting.window"},
        "uncertainty": {"weighting.lr"},
    }
    trials = [sample(dimensions, seed=0, number=n) for n in range(200)]
    for trial in trials:
        assert set(trial) == {"weighting.name", "batch_size", *needs[trial["weighting.name"]]}
    assert set(Counter(trial["weighting.name"] for trial in trials)) == set(needs)


def test_samples_fill_their_ranges_and_do_not_depend_on_each_other() -> None:
    dimensions = dimensions_of(SPACE)
    trials = [sample(dimensions, seed=3, number=n) for n in range(400)]
    assert trials[7] == sample(dimensions, seed=3, number=7) != sample(dimensions, seed=4, number=7)
    sizes = [trial["batch_size"] for trial in trials]
    assert (min(sizes), max(sizes)) == (1, 64)
    assert 0.3 < sum(size <= 8 for size in sizes) / len(sizes) < 0.7  # as many below the geometric mean as above
    rates = [trial["weighting.lr"] for trial in trials if "weighting.lr" in trial]
    assert 1e-4 <= min(rates) < 2e-4 and 5e-2 < max(rates) <= 1e-1
    windows = {trial["weighting.window"] for trial in trials if "weighting.window" in trial}
    assert windows == {2, 3, 4}


def test_a_share_stands_for_a_weight_per_task() -> None:
    dimensions = dimensions_of({"weighting.weights": {"share": [0.0, 1.0]}, "optim.name": {"choice": ["sgd"]}})
    made = words(dimensions, {"weighting.weights": 0.375, "optim.name": "sgd"})
    assert made == ["weighting.weights=[0.75, 1.25]", "optim.name=sgd"]


def test_a_grid_has_the_combinations_that_conditions_leave() -> None:
    space = {
        "a": {"choice": [1, 2]},
        "b": {"choice": ["x", "y", "z"], "when": {"a": 2}},
        "c": {"choice": [[1, 2], None], "when": {"b": ["x"]}},
    }
    found = grid(dimensions_of(space))
    assert found == [
        {"a": 1},
        {"a": 2, "b": "x", "c": [1, 2]},
        {"a": 2, "b": "x", "c": None},
        {"a": 2, "b": "y"},
        {"a": 2, "b": "z"},
    ]
    with pytest.raises(InputError, match=r"searcher=grid needs listed values, and space\.batch_size is loginteger"):
        grid(dimensions_of(SPACE))


def test_corners_show_every_value_and_end() -> None:
    dimensions = dimensions_of(SPACE)
    seen: dict[str, set[Any]] = {}
    for parameters in corners(dimensions):
        assert parameters == draw(dimensions, lambda key, _, p=parameters: p[key])  # what is active, and no more
        for key, value in parameters.items():
            seen.setdefault(key, set()).add(value)
    assert seen == {key: set(dimension.values) for key, dimension in dimensions.items()}


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({"a": {"choice": [1], "when": {"b": 1}}}, "space.a.when: b is not in space"),
        ({"a": {"uniform": [0, 1]}, "b": {"choice": [1], "when": {"a": 1}}}, "space.b.when: a must be a choice"),
        ({"a": {"choice": [1, 2]}, "b": {"choice": [1], "when": {"a": 3}}}, "a=3 is not among its values: 1, 2"),
        ({"a": {"choice": [1]}, "b": {"choice": [1], "when": {"a": []}}}, "space.b.when.a lists no value"),
        (
            {"a": {"choice": [1], "when": {"b": 1}}, "b": {"choice": [1], "when": {"a": 1}}},
            "conditions of a, b depend on each other",
        ),
        ({"a": {"integer": [1, 2.5]}}, r"space.a.integer=\[1, 2.5\] must be two whole numbers"),
        ({"a": {"loginteger": [0, 4]}}, "0 < a < b"),
        ({"a": {"share": [0.5, 1.5]}}, "0 <= a < b <= 1"),
        ({"a": {"uniform": [0, True]}}, "two numbers"),
    ],
)
def test_what_is_wrong_with_a_space_is_named(space: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        dimensions_of(space)


def test_an_objective_is_one_figure_or_several() -> None:
    metrics = {"miou": 0.5, "accuracy": 0.6, "depth_abs": 1.8}
    assert Objective(("depth_abs",)).goals == [Goal("depth_abs", "min")]
    assert Objective(("depth_abs",)).values(metrics) == (1.8,)
    delta = Objective(("miou", "accuracy", "depth_abs"), reference={"miou": 0.4, "accuracy": 0.5, "depth_abs": 2.0})
    assert delta.goals == [Goal("delta_m", "max")]
    assert delta.values(metrics) == (pytest.approx(((25 + 20) / 2 + 10) / 2),)  # percent
    assert math.isnan(delta.values({**metrics, "accuracy": math.nan})[0])
    front = Objective(("miou", "depth_abs"), combine="pareto")
    assert front.goals == [Goal("miou", "max"), Goal("depth_abs", "min")]
    assert front.values({"miou": 0.5})[0] == 0.5 and math.isnan(front.values({"miou": 0.5})[1])


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Objective(("mio",)), "mio is no metric. Did you mean 'miou'"),
        (Objective(()), "lists no metric"),
        (Objective(("miou",), reference={"miou": 0.5}), "for several metrics"),
        (Objective(("miou", "depth_abs"), reference={"miou": 0.5}), "depth_abs must be a number > 0.*got nothing"),
        (Objective(("miou", "depth_abs"), reference={"miou": 0.5, "depth_abs": 0.0}), "got 0.0"),
        (
            Objective(("miou", "depth_abs"), reference={"miou": 0.5, "depth_abs": 1.0, "x": 1.0}),
            "reference has x, which",
        ),
    ],
)
def test_what_is_wrong_with_an_objective_is_named(objective: Objective, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        objective.check(["miou", "accuracy", "depth_abs"])
