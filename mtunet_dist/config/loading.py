"""Makes a config: defaults, then a YAML file, then ``key=value`` words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtunet_dist import plugins
from mtunet_dist.config.checks import check
from mtunet_dist.config.schema import Config
from mtunet_dist.config.typed_yaml import (
    all_keys,
    as_dict,
    content,
    leaves,
    load_as,
    merge,
    parse_yaml,
    put_text,
    read_yaml,
    to_yaml,
)
from mtunet_dist.errors import InputError
from mtunet_dist.system.files import write_text
from mtunet_dist.system.place import own_run_dir

PLUGIN_SECTIONS = ("model", "weighting", "strategy")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file at ``path``, then ``key=value`` overrides. Missing plugin options get their
    defaults.

    The config.yaml of a run folder means the folder where it now lies, even if the folder was moved. A sweep's
    best.yaml means the folder ``best`` beside it. A ``run_dir`` among the overrides has priority. Raises InputError
    that names the key, the value and, for a misspelt key, the likely one.
    """
    return _load(
        [_placed(read_yaml(Path(path), Config, _schema_of), Path(path))] if path is not None else [], overrides
    )


def _placed(layer: Any, path: Path) -> Any:
    """``layer``, read from ``path``. If the place of ``path`` means a run folder, this run folder is put in."""
    folder = own_run_dir(path)
    if folder is not None:
        written = content(layer).get("run_dir")
        if not isinstance(written, str) or Path(written).resolve() != folder.resolve():
            whole = folder == Path() or str(folder).startswith("~")  # a leading ~ would be read as the home folder
            put_text(layer, "run_dir", str(folder.resolve() if whole else folder))
    return layer


def config_from_text(text: str, overrides: Sequence[str] = ()) -> Config:
    """The config from the ``text`` of ``to_yaml``, with ``overrides``. Errors as in ``load_config``."""
    return _load([parse_yaml(text, Config, _schema_of)], overrides)


def _load(layers: list[Any], overrides: Sequence[str]) -> Config:
    words: dict[str, list[str]] = {section: [] for section in ("", *PLUGIN_SECTIONS)}
    for word in overrides:
        section, dot, rest = word.partition(".")
        belongs_to_plugin = dot and section in PLUGIN_SECTIONS
        words[section if belongs_to_plugin else ""].append(rest if belongs_to_plugin else word)
    config = merge(Config, layers, words[""], _keys_of_default_plugins)
    sections: dict[str, Any] = {s: _plugin_section(s, getattr(config, s), words[s]) for s in PLUGIN_SECTIONS}
    config = dataclasses.replace(config, **sections)
    check(config)
    if not config.checkpoint.best:
        best = _best_metric(config.tasks)
        config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, best=best))
    return config


def _best_metric(tasks: Sequence[str]) -> str:
    """The metric for best.pt: the first one of segmentation if that is trained, else of the first task."""
    first = "segmentation" if "segmentation" in tasks else tasks[0]
    if first not in plugins.available("task"):
        raise InputError(f"checkpoint.best is missing: for tasks={list(tasks)} a metric such as {first}/miou")
    main: tuple[str, ...] = plugins.find("task", first).MAIN  # type: ignore[attr-defined]
    return main[0]


def _schema_of(section: str, name: str) -> type | None:
    """The fields of the section if it names the plugin ``name``. None if there is no such plugin."""
    known = section in PLUGIN_SECTIONS and name in plugins.available(section)
    return plugins.options_schema(section, name) if known else None


def _keys_of_default_plugins() -> list[str]:
    names = {section: getattr(Config(), section)["name"] for section in PLUGIN_SECTIONS}
    return [f"{s}.{key}" for s, name in names.items() for key in all_keys(plugins.options_schema(s, name))]


def save_config(config: Config, path: Path) -> None:
    """Write ``config`` as YAML, so that ``load_config`` reads back an equal config. A kill leaves the previous file."""
    write_text(path, to_yaml(config))


def flat(config: Config) -> dict[str, Any]:
    """Return ``config`` as a flat dictionary of dotted keys."""
    return dict(leaves(dataclasses.asdict(config)))


def plugin_options(
    kind: str, name: str, given: dict[str, Any] | Sequence[str], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The typed options of a plugin: its defaults, then ``given`` (a mapping or ``key=value`` words), then
    ``overrides``.

    Raises InputError that names plugin, key and value.
    """
    schema = plugins.options_schema(kind, name)
    try:
        options: object = load_as(schema, given, overrides) if isinstance(given, dict) else load_as(schema, {}, given)
    except InputError as error:
        raise InputError(f"{kind} '{name}': {error}") from None
    return as_dict(options)


def _plugin_section(kind: str, section: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``section`` with ``overrides`` (words whose keys start inside the section). Missing options come from the
    plugin."""
    options = dict(section)
    name = options.pop("name", None)
    for word in overrides:
        if word.startswith("name=") and word.removeprefix("name=") != name:
            name, options = word.removeprefix("name="), {}
    if not isinstance(name, str):
        raise InputError(f"{kind}.name is missing. Available: {', '.join(plugins.available(kind))}")
    words = [word for word in overrides if not word.startswith("name=")]
    return {"name": name, **plugin_options(kind, name, options, words)}
