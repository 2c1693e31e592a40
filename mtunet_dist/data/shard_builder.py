"""The work of ``prepare`` on one shard: read, check, resize, encode, write. Imports no torch, so that workers start
fast.

A finished shard has a sidecar file, ``SHARD.done``. A later run reuses the shard if nothing in its source has changed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtunet_dist.data.info import DatasetInfo, Settings, ShardInfo, SplitInfo
from mtunet_dist.data.shards import (
    EncodedSample,
    Index,
    RgbFormat,
    TargetFormat,
    sha256,
    shard_name,
    write_shard,
)
from mtunet_dist.data.splits import file_sizes, npy_header, pixels_sha256, resized
from mtunet_dist.data.stamps import fingerprint, stamp, what_changed
from mtunet_dist.errors import InputError
from mtunet_dist.schema import VOID
from mtunet_dist.sources._images import decode, encode
from mtunet_dist.sources._source import RawSample, Sample, Source
from mtunet_dist.system.files import read_json, write_json

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


@dataclass
class Statistics:
    """Sums over stored pixels, depth in stored units. The sums of shards add up exactly in any order."""

    class_pixels: list[int]
    void_pixels: int = 0
    valid_depth_pixels: int = 0
    depth_sum: int = 0
    depth_min: int = 65535
    depth_max: int = 0
    samples_without_label: int = 0
    samples_without_depth: int = 0

    def add_sample(self, sample: RawSample) -> None:
        """Count the pixels of ``sample``."""
        counts: list[int] = np.bincount(sample.label.ravel(), minlength=256).tolist()
        valid = sample.depth[sample.depth > 0]
        self.add(
            Statistics(
                counts[: len(self.class_pixels)],
                counts[VOID],
                valid.size,
                int(valid.sum(dtype=np.int64)),
                int(valid.min(initial=65535)),
                int(valid.max(initial=0)),
                int(counts[VOID] == sample.label.size),
                int(valid.size == 0),
            )
        )

    def add(self, other: Statistics) -> None:
        """Add the counts of ``other``."""
        self.class_pixels = [a + b for a, b in zip(self.class_pixels, other.class_pixels, strict=True)]
        self.void_pixels += other.void_pixels
        self.valid_depth_pixels += other.valid_depth_pixels
        self.depth_sum += other.depth_sum
        self.depth_min = min(self.depth_min, other.depth_min)
        self.depth_max = max(self.depth_max, other.depth_max)
        self.samples_without_label += other.samples_without_label
        self.samples_without_depth += other.samples_without_depth

    def of_split(self, shards: Sequence[ShardInfo], depth_scale: float) -> SplitInfo:
        """The entry in ``dataset.json`` of the split that consists of these ``shards``."""
        valid = self.valid_depth_pixels
        return SplitInfo(
            count=sum(shard.count for shard in shards),
            shards=tuple(shards),
            class_pixels=tuple(self.class_pixels),
            void_pixels=self.void_pixels,
            valid_depth_pixels=valid,
            depth_mean=self.depth_sum / valid * depth_scale if valid else 0.0,
            depth_min=self.depth_min * depth_scale if valid else 0.0,
            depth_max=self.depth_max * depth_scale,
            samples_without_label=self.samples_without_label,
            samples_without_depth=self.samples_without_depth,
        )


@dataclass(frozen=True)
class ShardResult:
    """A finished shard."""

    shard: ShardInfo
    index: Index
    statistics: Statistics


def make_shard(task: ShardTask) -> ShardResult | list[str]:
    """Make the shard and its sidecar. If a sample is bad, write nothing and return what is wrong with each bad
    sample."""
    statistics = Statistics([0] * len(task.source.classes))
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
        statistics.add_sample(sample)
        if task.settings.stored == "source":
            listed.append((files.key, pixels_sha256(sample)))
        else:
            encoded.append(encode_sample(files.key, sample, task.settings.rgb_format, task.settings.target_format))
    if errors:
        return errors
    if task.settings.stored == "source":
        index = write_listing(task, listed)
    else:
        index = write_shard(task.path, task.number, encoded)
    shard = ShardInfo(task.path.name, len(task.samples), task.path.stat().st_size, sha256(task.path), made_from)
    result = ShardResult(shard, index, statistics)
    write_json(task.sidecar, dataclasses.asdict(result))
    return result


def finished(task: ShardTask) -> ShardResult | None:
    """The result of an earlier run with the same settings, if the shard is complete and its source unchanged."""
    if not (task.sidecar.is_file() and task.path.is_file()):
        return None
    try:
        value = read_json(task.sidecar)
        shard = ShardInfo(**value["shard"])
        result = ShardResult(shard, Index(**value["index"]), Statistics(**value["statistics"]))
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
        rgb, label, depth = ((0, size) for size in file_sizes(sample))
        index.extend(Index([sample.key], [task.number], [rgb], [label], [depth], [(0, 0, 0)]))
    return index


def encode_sample(key: str, sample: RawSample, rgb_format: RgbFormat, target_format: TargetFormat) -> EncodedSample:
    """Label and depth losslessly; RGB as JPEG of quality 95 without chroma subsampling, or as PNG."""
    if rgb_format == "jpeg":
        rgb = encode(sample.rgb, "JPEG", quality=95, subsampling="4:4:4")
    else:
        rgb = encode(sample.rgb, "PNG")
    if target_format == "npy":
        label, depth = (npy_header(x) + x.tobytes() for x in (sample.label, sample.depth))
    else:
        label, depth = encode(sample.label, "PNG"), encode(sample.depth, "PNG")
        assert np.array_equal(decode(label, "label", key), sample.label), key
        assert np.array_equal(decode(depth, "depth", key), sample.depth), key
    return EncodedSample(key, rgb_format, target_format, rgb, label, depth)
