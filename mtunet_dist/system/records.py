"""Records in JSON Lines, and JSON files that only inform. Damage loses only the damaged records and stops nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtunet_dist.system.files import write_atomically

METRICS = "metrics.jsonl"  # in a run folder
METRICS_KEYS = {"kind": str, "step": int, "epoch": float}  # in each line of metrics.jsonl

Record = dict[str, Any]
Keys = dict[str, type]


def metrics(run_dir: Path, kind: str | None = None, **keys: type) -> list[Record]:
    """The lines of metrics.jsonl in a run folder that also have these ``keys``; with ``kind`` only the lines of that
    kind."""
    found = read(run_dir / METRICS, METRICS_KEYS | keys)
    return [record for record in found if kind in (None, record["kind"])]


def read(path: Path, keys: Keys) -> list[Record]:
    """The records in ``path`` that have ``keys`` of these types. Empty if the file cannot be read.

    Lines that a kill cut short and lines that are not text are left out.
    """
    return [record for line in _lines(path) if (record := _parsed(line, keys)) is not None]


def append(path: Path, record: Record) -> None:
    """Append a line. Raises OSError if the line cannot be written whole; the file is then as before."""
    line = (json.dumps(record) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if before and os.pread(file.fileno(), 1, before - 1) != b"\n":
            line = b"\n" + line  # separate it from a line that was cut short before it
        if file.write(line) != len(line):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def keep(path: Path, keys: Keys, wanted: Callable[[Record], bool]) -> None:
    """Rewrite ``path``, if it exists, with only those records that ``read`` would return and that are ``wanted``. Their
    bytes stay."""
    if path.is_file():
        kept = [line + b"\n" for line in _lines(path) if (record := _parsed(line, keys)) is not None and wanted(record)]
        write_atomically(path, lambda file: file.writelines(kept))


def read_note(path: Path) -> Record:
    """The JSON object in a file that only informs. Empty if the file is missing or damaged."""
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
