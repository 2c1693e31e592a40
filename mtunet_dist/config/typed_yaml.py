"""Turns YAML files and ``key=value`` words into frozen dataclasses. Each error is a message of one line.

OmegaConf does the merging; no other file uses it. This file changes its behaviour in three points. A key that holds
text takes exactly the text of the file, although YAML reads ``2024_11_28``, ``1e3`` and ``on`` as other types. A text
that begins with ``~/`` is a path in the home folder. Messages name the key, its value and the allowed values.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import omegaconf
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, MissingMandatoryValue, ValidationError
from omegaconf.errors import OmegaConfBaseException as RefusedError

from mtunet_dist.config.key_hints import hint
from mtunet_dist.errors import InputError

T = TypeVar("T")
MISSING: Any = omegaconf.MISSING  # the default of a key that must be given
# Returns the dataclass of a section that the schema calls only a mapping, from the section's key and its ``name``.
SchemaOf = Callable[[str, str], type | None]
KeysOf = Callable[[], Sequence[str]]  # further keys that the user of a misspelt key may mean

_BROKEN_REFERENCE = "a '${' has no key or no '}' behind it"
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PLURALS = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}


def load_as(schema: type[T], source: Path | dict[str, Any], overrides: Sequence[str] = ()) -> T:
    """The dataclass ``schema`` filled from a YAML file or a mapping, then ``key=value`` overrides, typed and checked.

    Raises InputError that names the key, the value and, for a misspelt key, the likely one.
    """
    layer = read_yaml(source, schema) if isinstance(source, Path) else OmegaConf.create(_escaped(source))
    return merge(schema, [layer], overrides)


def merge(schema: type[T], layers: list[Any], overrides: Sequence[str], more_keys: KeysOf = tuple) -> T:
    """Merge ``layers`` from ``read_yaml`` or ``parse_yaml``, then the overrides. Later ones replace earlier ones."""
    layers = [*layers, _parse_overrides(schema, overrides)]
    for layer in layers:
        given = content(layer)
        _check_shape(schema, given, more_keys)
        _expand_homes(schema, layer, given)
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *layers))
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key} must be given") from None
    except RefusedError as error:
        raise InputError(_reason(schema, [content(layer) for layer in layers], error)) from None
    assert isinstance(merged, schema)
    for key, value in leaves(as_dict(merged)):
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise InputError(f"{key}={_shown(value)} must be finite")
    return merged


def content(layer: Any) -> dict[str, Any]:
    """The content of a layer. References stay as they are."""
    return cast(dict[str, Any], OmegaConf.to_container(layer))


def put_text(layer: Any, key: str, text: str) -> None:
    """Put exactly this ``text`` into a layer."""
    OmegaConf.update(layer, key, _escaped(text))


def to_yaml(config: object) -> str:
    """``config``, a dataclass, as YAML text in the order of its fields."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(as_dict(config))))


def as_dict(instance: object) -> dict[str, Any]:
    """A dataclass as a dictionary, with the dataclasses in it."""
    assert dataclasses.is_dataclass(instance) and not isinstance(instance, type)
    return dataclasses.asdict(instance)


def leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, without sections."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_yaml(path: Path, schema: type, schema_of: SchemaOf = lambda key, name: None) -> Any:
    """The YAML file at ``path`` as a layer for ``merge``. InputError if it cannot be read or is not a mapping."""
    if not path.is_file():
        raise InputError(f"config file {path} does not exist")
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line} is not UTF-8, which a YAML file must be; save it as UTF-8") from None
    try:
        return parse_yaml(text, schema, schema_of)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def parse_yaml(text: str, schema: type, schema_of: SchemaOf = lambda key, name: None) -> Any:
    """The YAML ``text`` as a layer for ``merge``. Values that are text in ``schema`` stay exactly as written."""
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        layer = OmegaConf.create(text) if root is not None else OmegaConf.create({})
        if root is not None and isinstance(root, yaml.MappingNode):
            _quote_texts(root, schema, schema_of)
            return OmegaConf.create(yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True))
    except GrammarParseError:
        raise InputError(f"{_BROKEN_REFERENCE}; a literal '${{' is written '\\${{'") from None
    except (yaml.YAMLError, RefusedError, RecursionError) as error:
        raise InputError(f"not a YAML file: {' '.join(str(error).split())}") from None
    if root is not None:
        raise InputError("a config must be a mapping of keys to values")
    return layer


def _quote_texts(node: yaml.MappingNode, schema: type, schema_of: SchemaOf) -> None:
    """Make scalars of ``node`` strings if their keys hold text in ``schema``."""
    kinds = get_type_hints(schema)
    for name, value in node.value:
        kind = kinds.get(name.value)
        if isinstance(value, yaml.MappingNode):
            if get_origin(kind) is dict:
                names = [v.value for k, v in value.value if k.value == "name" and isinstance(v, yaml.ScalarNode)]
                kind = schema_of(name.value, names[0]) if names else None
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                _quote_texts(value, kind, schema_of)
            continue
        is_list = get_origin(kind) is tuple and isinstance(value, yaml.SequenceNode)
        for item in value.value if is_list else [value]:
            text = _is_text(get_args(kind)[0] if is_list else kind)
            if text and isinstance(item, yaml.ScalarNode) and item.tag != "tag:yaml.org,2002:null":
                item.tag, item.style = "tag:yaml.org,2002:str", item.style or '"'


def _parse_overrides(schema: type, words: Sequence[str]) -> Any:
    layer = OmegaConf.create({})
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise InputError(f"'{word}' is not of the form key=value")
        if any("\ud800" <= character <= "\udfff" for character in word):  # so Python reads bytes that are not text
            raise InputError(f"{word!a} is not UTF-8, which config.yaml is")
        try:
            kind = kind_of(schema, key)
            if _is_text(kind) and not (value == "null" and type(None) in get_args(kind)):
                put_text(layer, key, value)
            else:
                layer.merge_with_dotlist([word])
        except yaml.YAMLError as error:
            raise InputError(f"cannot read '{word}': {' '.join(str(error).split())}") from None
        except GrammarParseError:
            raise InputError(f"cannot read '{word}': {_BROKEN_REFERENCE}") from None
        except (RefusedError, TypeError, ValueError, AttributeError):
            raise InputError(f"cannot read '{word}' as key=value with a value in YAML") from None
    return layer


def kind_of(schema: Any, key: str) -> Any:
    """The type of the dotted ``key`` in ``schema``. None if there is no such key."""
    kind = schema
    for name in key.split("."):
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            return None
        kind = get_type_hints(kind).get(name)
    return kind


def _is_text(kind: Any) -> bool:
    """Whether a key of this type holds text. It may also allow null."""
    if get_origin(kind) in (Union, types.UnionType):
        return all(part is type(None) or _is_text(part) for part in get_args(kind))
    return kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))


def _expand_homes(schema: type, layer: Any, given: Mapping[str, Any], prefix: str = "") -> None:
    """Put the home folder into the texts of ``layer`` that begin with ``~/``; ``given`` is its content."""
    kinds = get_type_hints(schema)
    for name, value in given.items():
        kind = kinds[name]
        if isinstance(value, dict):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                _expand_homes(kind, layer, value, f"{prefix}{name}.")
        elif isinstance(value, str) and _is_text(kind):
            OmegaConf.update(layer, f"{prefix}{name}", expand_home(value, f"{prefix}{name}"))
        elif isinstance(value, list) and get_origin(kind) is tuple and _is_text(get_args(kind)[0]):
            expanded = [expand_home(v, f"{prefix}{name}") if isinstance(v, str) else v for v in value]
            OmegaConf.update(layer, f"{prefix}{name}", expanded)


def expand_home(text: str, what: str) -> str:
    """Replace a leading ``~`` or ``~user`` in ``text``. InputError about ``what`` if there is no such home folder."""
    if not re.match(r"~[^/]*(/|$)", text):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise InputError(f"{what}={text}: there is no such home folder; a name that begins with ~ is ./~...") from None


def _escaped(value: Any) -> Any:
    """Escape ``value`` so that OmegaConf keeps each ``${`` in its strings as text instead of a reference."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, Mapping):
        return {key: _escaped(inner) for key, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list | tuple) else value


def _check_shape(schema: Any, given: Mapping[str, Any], more_keys: KeysOf, prefix: str = "", top: Any = None) -> None:
    """Refuse unknown keys, and values that are not the section or list of their key. OmegaConf's messages say less."""
    kinds, top = get_type_hints(schema), top or schema
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            near = hint(key, value, [f"{prefix}{known}" for known in kinds], all_keys(top), more_keys)
            raise InputError(f"unknown key '{key}'.{near} Available: {', '.join(kinds) or 'none'}")
        kind = kinds[name]
        if _is_reference(value):
            continue
        if dataclasses.is_dataclass(kind) or get_origin(kind) is dict:
            if not isinstance(value, dict):
                raise InputError(f"{key}={_shown(value)}: {key} is a section{_how_to_write(schema, name, key, value)}")
            if dataclasses.is_dataclass(kind):
                _check_shape(kind, value, more_keys, f"{key}.", top)
        elif get_origin(kind) is tuple:
            _check_list(key, value, get_args(kind))


def all_keys(schema: type, prefix: str = "") -> list[str]:
    """The dotted keys of ``schema``. A section that is a mapping gives the keys of its default."""
    keys = []
    for field in dataclasses.fields(schema):
        key, kind = f"{prefix}{field.name}", get_type_hints(schema)[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            keys += all_keys(kind, f"{key}.")
        elif get_origin(kind) is dict and callable(field.default_factory):
            keys += [f"{key}.{name}" for name in field.default_factory()]
        else:
            keys.append(key)
    return keys


def _how_to_write(schema: type, name: str, key: str, value: Any) -> str:
    names = [k.removeprefix(f"{name}.") for k in all_keys(schema) if k.startswith(f"{name}.")]
    if isinstance(value, str) and "name" in names:
        return f"; write {key}.name={value}"
    return f" of the keys {', '.join(dict.fromkeys(n.split('.')[0] for n in names))}" if names else ""


def _check_list(key: str, value: Any, kinds: tuple[Any, ...]) -> None:
    """Raise InputError if ``value`` is not a list of ``kinds``, given as in ``tuple[kinds]``."""
    if not isinstance(value, list | tuple):
        example = "" if isinstance(value, dict) else f", such as {key}=[{_shown(value)}]"
        raise InputError(f"{key}={_shown(value)} must be a list{example}")
    if kinds[-1] is not ... and len(value) != len(kinds):
        raise InputError(f"{key}={_shown(value)} must be a list of {len(kinds)}")
    if not all(_is_item(kinds[0], item) for item in value if not _is_reference(item)):
        raise InputError(f"{key}={_shown(value)} must be {_list_meaning(kinds)}")


def _is_item(kind: Any, value: Any) -> bool:
    """Whether ``value`` can be in a list of ``kind``. OmegaConf does not say which item it refuses."""
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return kind is not str or isinstance(value, str | int | float)


def _is_reference(value: Any) -> bool:
    """Whether ``value`` refers to another key. OmegaConf checks the value of that key."""
    return isinstance(value, str) and "${" in value


def _shown(value: Any) -> str:
    """``value`` as the user would write it on the command line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_shown(inner)}' for key, inner in value.items())}}}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _reason(schema: type, layers: list[Any], error: RefusedError) -> str:
    """The reason why OmegaConf refuses a value: the key, the given value, and the allowed values."""
    key = (error.full_key or "").split("[")[0]
    value: Any = next((f.default for f in dataclasses.fields(schema) if f.name == key), None)
    for layer in layers:
        value = _value_at(layer, key, value)
    if isinstance(error, InterpolationResolutionError) and not isinstance(error, ValidationError):
        return f"{key}={_shown(value)}: there is nothing that it refers to; a literal '${{' is written '\\${{'"
    kind = kind_of(schema, key)
    return f"{key}={_shown(value)} must be {_meaning(kind)}"


def _value_at(section: Any, key: str, otherwise: Any) -> Any:
    for name in key.split("."):
        if not isinstance(section, dict) or name not in section:
            return otherwise
        section = section[name]
    return section


def _meaning(kind: Any) -> str:
    """A description of the values that a key of this type may have."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(_shown, arguments))}"
    if get_origin(kind) is tuple:
        return _list_meaning(arguments)
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _meaning(part) for part in arguments)
    return _WORDS.get(kind, "a section" if dataclasses.is_dataclass(kind) else "something else")


def _list_meaning(kinds: tuple[Any, ...]) -> str:
    items = _PLURALS.get(kinds[0], "values")
    return f"a list of {items if kinds[-1] is ... else f'{len(kinds)} {items}'}"
