"""Plugins: the file name is the registry.

``models/mtunet.py`` is ``model.name=mtunet``. A plugin file ends with ``PLUGIN = TheClass``; the positional
parameters of that class are what the program hands it, its keyword-only parameters are the options that a config
may set. To add a model, weighting, source or strategy, add one file; nothing else needs to know about it.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Mapping
from typing import Any

from mtunet_dist.errors import InputError, closest

PACKAGES = {"model": "models", "weighting": "weightings", "source": "sources", "strategy": "strategies"}


def available(kind: str) -> list[str]:
    """Names of the plugins of ``kind`` (a key of ``PACKAGES``): the public files of its folder."""
    package = importlib.import_module(f"mtunet_dist.{PACKAGES[kind]}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def find(kind: str, name: str) -> type:
    """The class behind ``name``. Raises InputError that lists the valid names."""
    names = available(kind)
    if name not in names:
        raise InputError(f"unknown {kind} '{name}'.{closest(name, names)} Available: {', '.join(names)}")
    plugin: type = importlib.import_module(f"mtunet_dist.{PACKAGES[kind]}.{name}").PLUGIN
    return plugin


def options_schema(kind: str, name: str) -> type:
    """A dataclass of the options of plugin ``name`` (its keyword-only parameters) with types and defaults."""
    plugin = find(kind, name)
    hints = typing.get_type_hints(plugin.__init__)  # type: ignore[misc]
    fields: list[Any] = [
        (p.name, hints[p.name], dataclasses.field(default=p.default))
        for p in inspect.signature(plugin).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return dataclasses.make_dataclass(f"{kind} '{name}'", fields, frozen=True, namespace={"__module__": __name__})


def build(kind: str, section: Mapping[str, Any], *args: Any) -> Any:
    """Make the plugin ``section["name"]`` from what the program hands it (``args``); the rest are its options."""
    return find(kind, section["name"])(*args, **{key: value for key, value in section.items() if key != "name"})
