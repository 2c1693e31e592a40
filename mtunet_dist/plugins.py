"""Plugins: the name of a file is the name of its plugin.

``models/mtunet.py`` is ``model.name=mtunet``. A plugin file ends with ``PLUGIN = TheClass``. The program passes the
positional parameters of that class. Its keyword-only parameters are the options that a config may set. To add a model,
weighting, source or strategy, add one file; no other code changes.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Mapping
from typing import Any

from mtunet_dist.errors import InputError, closest, needs

PACKAGES = {
    "task": "tasks",
    "model": "models",
    "weighting": "weightings",
    "source": "sources",
    "strategy": "strategies",
}


def available(kind: str) -> list[str]:
    """Names of the plugins of ``kind`` (a key of ``PACKAGES``): the public files of its folder."""
    package = importlib.import_module(f"mtunet_dist.{PACKAGES[kind]}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def find(kind: str, name: str) -> type:
    """The class of plugin ``name``. Raises InputError that lists the valid names, or that names a file without a
    plugin."""
    names = available(kind)
    if name not in names:
        raise InputError(f"unknown {kind} '{name}'.{closest(name, names)} Available: {', '.join(names)}")
    try:
        module = importlib.import_module(f"mtunet_dist.{PACKAGES[kind]}.{name}")
    except ModuleNotFoundError as error:
        raise needs(f"{kind} '{name}'", error) from None
    plugin: object = getattr(module, "PLUGIN", None)
    if not isinstance(plugin, type):
        raise InputError(f"{module.__file__} must end with PLUGIN = TheClass, as every file of a {kind} does")
    return plugin


def options_schema(kind: str, name: str) -> type:
    """A dataclass of the options of plugin ``name`` (its keyword-only parameters), with types and defaults.

    Raises InputError that names the plugin's file if an option has no type or no default.
    """
    plugin = find(kind, name)
    options = [p for p in inspect.signature(plugin).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    where = f"{inspect.getfile(plugin)}: {plugin.__name__}"
    try:
        hints = typing.get_type_hints(plugin.__init__)  # type: ignore[misc]
    except NameError as error:
        raise InputError(f"{where}: the type of an option cannot be read: {error}") from None
    for option in options:
        if option.name not in hints:
            raise InputError(f"{where}: the option {option.name} has no type")
        if option.default is inspect.Parameter.empty:
            raise InputError(f"{where}: the option {option.name} has no default")
        if not _is_option(hints[option.name]):
            kind_of_it = inspect.formatannotation(hints[option.name])
            may_be = "bool, int, float, str, a Literal of them, a tuple of one of them, or None instead"
            raise InputError(f"{where}: the option {option.name} is {kind_of_it}; an option may be {may_be}")
    fields: list[Any] = [(p.name, hints[p.name], dataclasses.field(default=p.default)) for p in options]
    return dataclasses.make_dataclass(f"{kind} '{name}'", fields, frozen=True, namespace={"__module__": __name__})


def _is_option(kind: Any) -> bool:
    """Whether a config can hold values of this type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType, tuple):
        return all(part in (..., types.NoneType) or _is_option(part) for part in parts)
    return kind in (bool, int, float, str) or origin is typing.Literal


def build(kind: str, section: Mapping[str, Any], *args: Any) -> Any:
    """Make the plugin ``section["name"]`` with the program's arguments ``args``. The rest of ``section`` are its
    options."""
    return find(kind, section["name"])(*args, **{key: value for key, value in section.items() if key != "name"})
