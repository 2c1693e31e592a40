"""Files that have their final name only when they are whole, even if the process that writes them is killed."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from mtunet_dist.errors import InputError

EXPONENT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, sync: bool = True) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, then rename it to ``path``.

    The name of the temporary file has the process in it, because two processes may write the same file. Without
    ``sync`` a power cut may leave an empty file; thousands of small files are then written faster.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write ``value`` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write ``rows`` as CSV, atomically."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def read_bytes(path: Path) -> bytes:
    """The content of a file that the user gave. InputError names the file if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def entries(folder: Path) -> list[Path]:
    """The sorted entries of a folder that the user gave. InputError names the folder if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file. InputError names a file that is missing or damaged."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise InputError(f"{path}: damaged JSON: {error}") from None


def read_yaml(path: Path) -> Any:
    """The value in a YAML file in UTF-8. InputError names a file that is missing, is not YAML, or has a key twice."""
    try:
        return yaml.load(read_bytes(path).decode(), _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """A loader that reads 1e-3 as a number, as YAML 1.2 does. PyYAML follows YAML 1.1, where it is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there twice. PyYAML would silently use the last one."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
