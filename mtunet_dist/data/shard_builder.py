"""The work of ``prepare`` on one shard: read, check, resize, encode, write. Imports no torch, so that workers start
fast.

A finished shard has a sidecar file, ``SHARD.done``. A later run reuses the shard if nothing in its source has changed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtunet_dist.data.info import DatasetInfo, Settings, ShardInfo
from mtunet_dist.data.shards import (
    EncodedSample,
    Index,
    sha256,
    shard_name,
    write_shard,
)
from mtunet_dist.data.splits import file_sizes, npy_header, pixels_sha256, resized
from mtunet_dist.data.stamps import fingerprint, stamp, what_changed
from mtunet_dist.errors import InputError
from mtunet_dist.sources._images import decode, encode
from mtunet_dist.sources._source import RawSample, Sample, Source
from mtunet_dist.system.files import read_json, write_json
from mtunet_dist.tasks._task import Counts, Task

SIDECAR = ".done"


@dataclass(frozen=True)
class ShardTask:
    """Shard ``number`` of ``split``, to be made in the folder ``out``."""

    source: Source[Any]
    settings: Settings
    out: Path
    split: str
    number: int
    samples: Sequence[Sample]

    @property
    def path(self) -> Path:
        """The path of the shard."""
        return self.out / shard_name(self.split, self.number, listing=self.settings.stored == "source")

    @property
    def sidecar(self) -> Path:
        """The path of the sidecar. It shows that the shard is finished, and holds its source fingerprint, index and
        statistics."""
        return self.path.with_name(self.path.name + SIDECAR)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A key that is equal for tasks that make the same shard from the same source files. It holds the files' state
        at its first use, so that the next run notices a file that changes during the work."""
        return fingerprint(self.source, self.settings, map(stamp, self.samples))


@dataclass(frozen=True)
class ShardResult:
    """A finished shard."""

    shard: ShardInfo
    index: Index
    counts: dict[str, Counts]  # of each target


def make_shard(task: ShardTask) -> ShardResult | list[str]:
    """Make the shard and its sidecar. If a sample is bad, write nothing and return what is wrong with each bad
    sample."""
    counts: dict[str, Counts] = {}
    encoded: list[EncodedSample] = []
    listed: list[tuple[str, str]] = []
    errors = []
    made_from = task.fingerprint
    for files in task.samples:
        try:
            raw = task.source.read(files)
        except InputError as error:
            errors.append(str(error))
            continue
        sample = resized(raw, task.settings.height, task.settings.width)
        counts = add_counts(task.source.targets, counts, count_sample(task.source.targets, sample))
        if task.settings.stored == "source":
            listed.append((files.key, pixels_sha256(sample)))
        else:
            encoded.append(encode_sample(files.key, sample, task.source.targets, task.settings))
    if errors:
        return errors
    if task.settings.stored == "source":
        index = write_listing(task, listed)
    else:
        index = write_shard(task.path, task.number, encoded)
    shard = ShardInfo(task.path.name, len(task.samples), task.path.stat().st_size, sha256(task.path), made_from)
    result = ShardResult(shard, index, counts)
    write_json(task.sidecar, dataclasses.asdict(result))
    return result


def finished(task: ShardTask) -> ShardResult | None:
    """The result of an earlier run with the same settings, if the shard is complete and its source unchanged."""
    if not (task.sidecar.is_file() and task.path.is_file()):
        return None
    try:
        value = read_json(task.sidecar)
        shard = ShardInfo(**value["shard"])
        result = ShardResult(shard, Index(**value["index"]), value["counts"])
    except (InputError, KeyError, TypeError):  # damaged, or of another version
        return None
    return result if shard.source == task.fingerprint and shard.bytes == task.path.stat().st_size else None


def tasks_of(source: Source[Any], settings: Settings, out: Path) -> list[ShardTask]:
    """The shards of all splits. InputError if the source is not valid."""
    size = settings.shard_size
    tasks = [
        ShardTask(source, settings, out, split, number, samples[start : start + size])
        for split, samples in source.splits().items()
        for number, start in enumerate(range(0, len(samples), size))
    ]

    def look(task: ShardTask) -> None:
        with suppress(InputError):  # a check of all samples, which comes later, names every file that is missing
            _ = task.fingerprint

    with ThreadPoolExecutor(16) as pool:  # threads hide the latency of network disks
        list(pool.map(look, tasks))
    return tasks


def changed(info: DatasetInfo, tasks: Sequence[ShardTask]) -> str | None:
    """A description of what has changed in the source of a prepared dataset; ``tasks`` are its shards as they would be
    made now. None if nothing has changed, or if the dataset's version did not record its source."""
    before = {shard.file: shard.source for split in info.splits.values() for shard in split.shards}
    if not all(before.values()):
        return None
    for task in tasks:
        if before.get(task.path.name) != task.fingerprint:
            return what_changed(task.samples, task.path)
    left = before.keys() - {task.path.name for task in tasks}
    return f"samples of {min(left)} have gone" if left else None


def write_listing(task: ShardTask, listed: list[tuple[str, str]]) -> Index:
    """Write the keys and checksums of samples that stay in the source. Returns the result as for a shard."""
    write_json(task.path, listed)
    index = Index()
    for sample in task.samples:
        sizes = file_sizes(sample, ("rgb", *task.source.targets))
        index.append(sample.key, task.number, {part: ((0, size), 0) for part, size in sizes.items()})
    return index


def encode_sample(key: str, sample: RawSample, targets: Mapping[str, Task], settings: Settings) -> EncodedSample:
    """Targets losslessly; RGB as JPEG of quality 95 without chroma subsampling, or as PNG."""
    if settings.rgb_format == "jpeg":
        parts = {"rgb": ("rgb.jpg", encode(sample.rgb, "JPEG", quality=95, subsampling="4:4:4"))}
    else:
        parts = {"rgb": ("rgb.png", encode(sample.rgb, "PNG"))}
    for name, task in targets.items():
        target = sample.targets[name]
        if settings.target_format == "npy" or not task.LOSSLESS:
            parts[name] = (f"{task.part}.npy", npy_header(target) + target.tobytes())
        else:
            parts[name] = (f"{task.part}.png", encode(target, "PNG"))
            assert np.array_equal(decode(parts[name][1], task.IMAGE, key), target), key
    return EncodedSample(key, parts)


def count_sample(targets: Mapping[str, Task], sample: RawSample) -> dict[str, Counts]:
    """The counts of each target of ``sample``."""
    return {name: task.count(sample.targets[name]) for name, task in targets.items()}


def add_counts(
    targets: Mapping[str, Task], one: Mapping[str, Counts], other: Mapping[str, Counts]
) -> dict[str, Counts]:
    """The counts of both together. An empty one counts nothing. The sums of shards are exact in any order."""
    if not one or not other:
        return {**one, **other}
    return {name: task.add(one[name], other[name]) for name, task in targets.items()}
