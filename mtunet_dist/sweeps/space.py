"""The search space: the values that a config key may have, their conditions, and how a trial draws them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtunet_dist.config.typed_yaml import load_as
from mtunet_dist.errors import InputError, closest

Parameters = dict[str, Any]  # config key -> value, of the dimensions that are active in a trial
Pick = Callable[[str, "Dimension"], Any]
RANGES = ("uniform", "loguniform", "integer", "loginteger", "share")


@dataclass(frozen=True)
class Dimension:
    """The values of one config key: exactly one of the fields is set, besides ``when``."""

    choice: tuple[Any, ...] | None = None  # one of these
    uniform: tuple[Any, ...] | None = None  # a number between two
    loguniform: tuple[Any, ...] | None = None  # its logarithm is uniform
    integer: tuple[Any, ...] | None = None  # a whole number between two, both included
    loginteger: tuple[Any, ...] | None = None  # likewise, small ones are as likely as large ones
    # For a key with one weight per task and two tasks: the first weight's share s of their sum, which is two. The
    # config then has [2s, 2 - 2s].
    share: tuple[Any, ...] | None = None
    # The key is active only in trials where each of these other keys has one of these values, as {weighting.name:
    # [fixed]}.
    when: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(kind for kind, values in vars(self).items() if values is not None)

    @property
    def values(self) -> list[Any]:
        """The listed values, or the two ends of the range."""
        return list(getattr(self, self.kind))

    @property
    def is_log(self) -> bool:
        """Whether ratios of values matter, not differences."""
        return self.kind.startswith("log")

    def active(self, parameters: Parameters) -> bool:
        """Whether a trial with these ``parameters`` needs a value."""
        return all(key in parameters and parameters[key] in values for key, values in self.when.items())

    def config_value(self, value: Any) -> Any:
        """The config's value for a drawn ``value``."""
        return [2 * value, 2 - 2 * value] if self.kind == "share" else value

    def nearest(self, value: Any) -> Any:
        """``value``, or the nearest end of its range if it is outside."""
        if self.kind == "choice":
            return value
        low, high = self.values
        return min(max(value, low), high)


def dimensions_of(space: Mapping[str, Any]) -> dict[str, Dimension]:
    """The space by dotted key. Each key comes after those that it depends on. A file may nest its keys or write dots.

    Raises InputError that names what is wrong with it.
    """
    # If a file writes dots and the command line nests, the later one, the command line, has priority.
    dimensions = {key: _dimension(key, spec) for key, spec in _leaves(space)}
    for key, dimension in dimensions.items():
        for other, values in dimension.when.items():
            _check_condition(key, other, values, dimensions)
    ordered: dict[str, Dimension] = {}
    while len(ordered) < len(dimensions):
        ready = [k for k, d in dimensions.items() if k not in ordered and all(o in ordered for o in d.when)]
        if not ready:
            circle = ", ".join(k for k in dimensions if k not in ordered)
            raise InputError(f"space: the conditions of {circle} depend on each other")
        ordered |= {key: dimensions[key] for key in ready}
    return ordered


def draw(dimensions: Mapping[str, Dimension], pick: Pick) -> Parameters:
    """A trial's parameters: ``pick`` gives the value for each active dimension."""
    parameters: Parameters = {}
    for key, dimension in dimensions.items():
        if dimension.active(parameters):
            parameters[key] = pick(key, dimension)
    return parameters


def sample(dimensions: Mapping[str, Dimension], seed: int, number: int) -> Parameters:
    """Trial ``number`` of a random search. It depends only on the seed, not on how many trials there are."""

    def pick(key: str, dimension: Dimension) -> Any:
        return random_value(dimension, random.Random(f"{seed}/{number}/{key}"))

    return draw(dimensions, pick)


def random_value(dimension: Dimension, rng: random.Random) -> Any:
    """A value from the dimension's distribution."""
    if dimension.kind == "choice":
        return rng.choice(dimension.values)
    low, high = dimension.values
    if dimension.kind == "integer":
        return rng.randint(low, high)
    if dimension.kind == "loginteger":
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))
    if dimension.kind == "loguniform":
        return dimension.nearest(math.exp(rng.uniform(math.log(low), math.log(high))))
    return rng.uniform(low, high)


def grid(dimensions: Mapping[str, Dimension]) -> list[Parameters]:
    """All combinations of the listed values. Raises InputError if there is a range."""
    for key, dimension in dimensions.items():
        if dimension.kind != "choice":
            raise InputError(f"searcher=grid needs listed values, and space.{key} is {dimension.kind}; list a choice")
    found: list[Parameters] = [{}]
    for key, dimension in dimensions.items():
        values = dimension.values
        found = [
            {**before, **more}
            for before in found
            for more in ([{key: value} for value in values] if dimension.active(before) else [{}])
        ]
    return found


def corners(dimensions: Mapping[str, Dimension]) -> Iterator[Parameters]:
    """Sets of parameters in which every listed value and range end occurs. Other active dimensions have first
    values."""

    def first(fixed: Parameters) -> Parameters:
        return draw(dimensions, lambda key, dimension: fixed.get(key, dimension.values[0]))

    for key, dimension in dimensions.items():
        fixed = {}
        wanted = [dimension]
        while wanted:
            for other, values in wanted.pop().when.items():
                fixed[other] = values[0]
                wanted.append(dimensions[other])
        for value in dimension.values:
            yield first({**fixed, key: value})


def words(dimensions: Mapping[str, Dimension], parameters: Parameters) -> list[str]:
    """``key=value`` words that put ``parameters`` into a config, exactly."""
    values = {key: dimensions[key].config_value(value) for key, value in parameters.items()}
    # JSON is YAML, and its floats read back equal. A string is used as it is.
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values, from a nested mapping. ``{loguniform: [a, b]}`` counts as a value."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value and all(isinstance(inner, Mapping) for inner in value.values()):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_condition(key: str, other: str, values: Sequence[Any], dimensions: Mapping[str, Dimension]) -> None:
    where = f"space.{key}.when"
    if other not in dimensions:
        near = closest(other, list(dimensions))
        raise InputError(f"{where}: {other} is not in space.{near} There: {', '.join(dimensions)}")
    if dimensions[other].kind != "choice":
        raise InputError(f"{where}: {other} must be a choice, not {dimensions[other].kind}")
    for value in values:
        if value not in dimensions[other].values:
            listed = ", ".join(map(str, dimensions[other].values))
            raise InputError(f"{where}: {other}={value} is not among its values: {listed}")


def _dimension(key: str, spec: Any) -> Dimension:
    where, kinds = f"space.{key}", ", ".join(("choice", *RANGES))
    if not isinstance(spec, Mapping):
        raise InputError(f"{where} must be one of {kinds} with a list, such as {{choice: [{spec}]}}")
    try:
        dimension = load_as(Dimension, dict(spec))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    given = [kind for kind in ("choice", *RANGES) if getattr(dimension, kind) is not None]
    if len(given) != 1:
        raise InputError(f"{where} must be exactly one of {kinds}, got {' and '.join(given) or 'none'}")
    when = {other: values if isinstance(values, list | tuple) else [values] for other, values in dimension.when.items()}
    for other, values in when.items():
        if not values:
            raise InputError(f"{where}.when.{other} lists no value")
    kind = given[0]
    values = tuple(_checked_values(f"{where}.{kind}", kind, dimension.values))
    return Dimension(when={other: tuple(v) for other, v in when.items()}, **{kind: values})


def _checked_values(where: str, kind: str, values: list[Any]) -> list[Any]:
    if kind == "choice":
        if not values:
            raise InputError(f"{where} lists no value")
        return values
    whole = kind in ("integer", "loginteger")
    wanted: type | Any = int if whole else int | float
    if len(values) != 2 or not all(isinstance(v, wanted) and not isinstance(v, bool) for v in values):
        raise InputError(f"{where}={values} must be two {'whole ' if whole else ''}numbers")
    if not all(math.isfinite(v) for v in values):
        raise InputError(f"{where}={values} must be two numbers that are finite")
    low, high = values if whole else map(float, values)  # so that a range over a whole-number key is refused
    need = {"loguniform": "0 < a < b", "loginteger": "0 < a < b", "share": "0 <= a < b <= 1"}.get(kind, "a < b")
    if low >= high or (need.startswith("0 < a") and low <= 0) or (kind == "share" and not 0 <= low < high <= 1):
        raise InputError(f"{where}={values} must be [a, b] with {need}")
    return [low, high]
