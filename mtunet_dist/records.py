"""Notes in JSON Lines, and JSON files that only inform: damage costs what it touches, and stops nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtunet_dist.files import write_atomically

METRICS = "metrics.jsonl"  # of a run folder
METRICS_KEYS = {"kind": str, "step": int, "epoch": float}  # in each of its lines

Record = dict[str, Any]
Keys = dict[str, type]


def metrics(run_dir: Path, kind: str | None = None, **keys: type) -> list[Record]:
    """The lines of a run folder's metrics.jsonl that also have these ``keys``, or those of one ``kind`` of them."""
    found = read(run_dir / METRICS, METRICS_KEYS | keys)
    return [record for record in found if kind in (None, record["kind"])]


def read(path: Path, keys: Keys) -> list[Record]:
    """The records in ``path`` that have ``keys`` of these types; empty where it cannot be read.

    Left out is a line that was cut short by a kill, or has bytes that are no text.
    """
    return [record for line in _lines(path) if (record := _parsed(line, keys)) is not None]


def append(path: Path, record: Record) -> None:
    """Add a line. Raises OSError if it cannot be written whole; nothing of it is then there."""
    line = (json.dumps(record) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if before and os.pread(file.fileno(), 1, before - 1) != b"\n":
            line = b"\n" + line  # what was cut short before it must not take it along
        if file.write(line) != len(line):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def keep(path: Path, keys: Keys, wanted: Callable[[Record], bool]) -> None:
    """Leave in ``path``, if it is there, the records that ``read`` gives and that are ``wanted``, as they stand."""
    if path.is_file():
        kept = [line + b"\n" for line in _lines(path) if (record := _parsed(line, keys)) is not None and wanted(record)]
        write_atomically(path, lambda file: file.writelines(kept))


def read_note(path: Path) -> Record:
    """The JSON object in a file that only informs; empty where there is none, or it is damaged."""
    try:
        return _parsed(path.read_bytes(), {}) or {}
    except OSError:
        return {}


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")
    except OSError:
        return []


def _parsed(line: bytes, keys: Keys) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not all(_is(record.get(key), kind) for key, kind in keys.items()):
        return None
    return record


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) or (kind is float and isinstance(value, int))
