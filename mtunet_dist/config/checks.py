"""Checks of a config beyond its types: the bounds, which stand with the keys, and what keys ask of one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mtunet_dist import plugins
from mtunet_dist.errors import InputError

if TYPE_CHECKING:
    from mtunet_dist.config.schema import Config

BOUNDS = "bounds"  # in the metadata of a field: a test of the value (nan must fail), and what it asks for


def positive(default: float) -> Any:
    """A field for numbers above 0."""
    return _bounded(default, lambda value: value > 0, "must be positive")


def not_negative(default: float) -> Any:
    """A field for numbers from 0."""
    return _bounded(default, lambda value: value >= 0, "must not be negative")


def within(default: float, least: float, most: float) -> Any:
    """A field for numbers from ``least`` to ``most``."""
    return _bounded(default, lambda value: least <= value <= most, f"must be {least} to {most}")


def _bounded(default: float, fits: Callable[[float], bool], text: str) -> Any:
    return dataclasses.field(default=default, metadata={BOUNDS: (fits, text)})


def check_bounds(section: Any, prefix: str = "") -> None:
    """Raise InputError for the first number in a dataclass, or in one within it, that is out of its bounds."""
    for field in dataclasses.fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{key}.")
        if BOUNDS in field.metadata:
            fits, text = field.metadata[BOUNDS]
            if not fits(value):
                raise InputError(f"{key}={value} {text}")


def check(config: Config) -> None:
    """Check what types cannot express. Raises InputError that names the key and the value."""
    for key, text in {"run_dir": config.run_dir, "data.root": config.data.root}.items():
        if not text:
            raise InputError(f"{key} is empty; give a folder")
    check_bounds(config)
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise InputError(f"optim.betas={list(config.optim.betas)} must be two numbers in [0, 1)")
    if not 0 <= config.optim.momentum < 1:
        raise InputError(f"optim.momentum={config.optim.momentum} must be in [0, 1)")
    if config.compile and config.compile_mode != "default" and config.optim.accumulate > 1:
        # Otherwise gradients lie in memory of the CUDA graph, and the next micro-batch overwrites them.
        raise InputError(
            f"compile_mode={config.compile_mode} uses CUDA graphs, which optim.accumulate={config.optim.accumulate} "
            "does not work with; compile_mode=default does"
        )
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        known = ", ".join(plugins.available("task"))
        raise InputError(
            f"tasks={list(config.tasks)} must be one or more different targets of the dataset, such as {known}"
        )
    if not config.data.augment.scales or min(config.data.augment.scales) < 1:
        raise InputError(f"data.augment.scales={list(config.data.augment.scales)} must be one or more numbers >= 1")
