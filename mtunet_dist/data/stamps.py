"""Stamps and fingerprints of source files: they stay equal as long as the files and their meaning do not change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mtunet_dist.data.info import FORMAT, Settings
from mtunet_dist.errors import InputError
from mtunet_dist.sources._source import Sample, Source

Stamp = list[Any]
"""A sample with the size and modification time of each of its files, in types that JSON can hold."""


def files_of(sample: Sample) -> list[Path]:
    """The files that ``sample`` names."""
    values = [*vars(sample).values(), *getattr(sample, "targets", {}).values()]
    return [path for path in values if isinstance(path, Path)]


def stamp(sample: Sample) -> Stamp:
    """The stamp of ``sample``. InputError if one of its files is not there."""
    try:
        found = [path.stat() for path in files_of(sample)]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return [repr(sample), *([stat.st_size, stat.st_mtime_ns] for stat in found)]


def fingerprint(source: Source[Any], settings: Settings, stamps: Iterable[Stamp]) -> str:
    """A text that is equal if the same settings make the same samples from the same source files."""
    meaning = [repr(source.targets), repr(source.stamp)]
    content = [FORMAT, dataclasses.asdict(settings), meaning, list(stamps)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def what_changed(samples: Sequence[Sample], shard: Path) -> str:
    """Describe why ``samples`` no longer match the fingerprint of their ``shard``: name a file that is newer than the
    shard.

    If no file is newer (a sample was added, or a copy was made), name the range of samples.
    """
    made = shard.stat().st_mtime_ns if shard.is_file() else math.inf
    for path in (path for sample in samples for path in files_of(sample)):
        if path.stat().st_mtime_ns > made:
            return f"{path} has changed"
    return f"samples {samples[0].key} to {samples[-1].key}, or what describes them, are not as they were"
