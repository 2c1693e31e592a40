"""The samples of a split by position: encoded in shards, or in the form that the source has."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mtunet_dist import plugins
from mtunet_dist.data.info import DatasetInfo, ShardInfo, SplitInfo, Stored, index_name
from mtunet_dist.data.shards import Index, Shard
from mtunet_dist.data.stamps import fingerprint, stamp, what_changed
from mtunet_dist.errors import InputError
from mtunet_dist.sources._images import RGB, decode, nearest, resize_rgb
from mtunet_dist.sources._source import RawSample, Sample, Source
from mtunet_dist.system.files import read_json


class Split(ABC):
    """The samples by position of one split, or of several splits in sequence. It is cheap to pickle.

    This is the common part for all ways of storing; ``make_split`` returns the right subclass. If files have been
    changed, ``version`` differs even if ``fingerprint`` is the same.
    """

    version = ""

    def __init__(self, root: Path, info: DatasetInfo, names: list[str]) -> None:
        self.root, self.info, self.names = root, info, names
        self.targets = info.targets
        self.parts = ("rgb", *self.targets)  # the order of the parts of a sample
        self.shards: list[ShardInfo] = []
        self.keys: list[str] = []
        shard_numbers, spans, crcs = [], [], []
        for name in names:
            index = _read_index(root / index_name(name), info.splits[name])
            shard_numbers.append(np.array(index.shard, dtype=np.int32) + len(self.shards))
            spans.append([np.array(index.spans.get(part, []), dtype=np.int64).reshape(-1, 2) for part in self.parts])
            self.keys += index.keys
            self.shards += info.splits[name].shards
            crcs.append([np.array(index.crc32.get(part, []), dtype=np.int64) for part in self.parts])
        self._shard = np.concatenate(shard_numbers)  # (N,)
        self._spans = np.concatenate(spans, axis=1)  # (part, N, offset and size)
        self._crc = np.concatenate(crcs, axis=1)  # (part, N)

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def decode(self, i: int) -> RawSample:
        """Sample ``i`` at the dataset's size. Raises InputError that names the sample and its file if it is damaged."""

    @abstractmethod
    def describe(self, i: int) -> str:
        """Sample ``i`` for messages: its key and its place."""

    def spread(self, most: int) -> list[int]:
        """Positions of at most ``most`` samples, evenly spaced over the split: enough for statistics in seconds."""
        count = len(self)
        return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})

    @property
    def fingerprint(self) -> str:
        """A key for the content and its meaning: equal for equal shards, size, classes and depth."""
        content = [
            [shard.sha256 for shard in self.shards],
            [self.info.height, self.info.width],
            *(task.identity() for task in self.targets.values()),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class ShardSplit(Split):
    """Samples encoded in shards."""

    def __init__(self, root: Path, info: DatasetInfo, names: list[str]) -> None:
        super().__init__(root, info, names)
        png = info.settings.target_format == "png"
        self.encoded = {name: png and task.LOSSLESS for name, task in self.targets.items()}  # as images, not arrays
        self._headers = {name: npy_header(task.blank(info.height, info.width)) for name, task in self.targets.items()}
        self._maps: dict[int, Shard] = {}
        self._checked = np.zeros(len(self), dtype=bool)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def stored(self, i: int) -> dict[str, np.ndarray]:
        """The encoded parts of sample ``i``: read-only uint8 views into the mapped shard.

        Raises InputError that names shard and key if they are damaged or missing. The checksums of a sample are
        compared when it is first read.
        """
        number = int(self._shard[i])
        try:
            if number not in self._maps:
                self._maps[number] = Shard(self.root / self.shards[number].file)
            shard, spans = self._maps[number], self._spans[:, i].tolist()
            found = {part: shard.span(a, a + size) for part, (a, size) in zip(self.parts, spans, strict=True)}
        except InputError as error:
            raise InputError(f"sample {self.keys[i]}: {error}") from None
        if not self._checked[i]:
            for part, crc in zip(self.parts, self._crc[:, i].tolist(), strict=True):
                if zlib.crc32(found[part].data) != crc:
                    raise InputError(f"{self._what(part)} of {self.describe(i)} is damaged: its checksum differs")
            self._checked[i] = True
        return found

    def array(self, name: str, data: np.ndarray) -> np.ndarray:
        """The target ``name`` from its part of ``stored``, if it is stored as an array: a read-only view."""
        task, header = self.targets[name], self._headers[name]
        assert data[: len(header)].tobytes() == header, name
        return data[len(header) :].view(task.DTYPE).reshape(task.shape(self.info.height, self.info.width))

    def decode(self, i: int) -> RawSample:
        """Sample ``i`` decoded with PIL, in read-only arrays. Raises InputError that names shard and key."""
        where, parts = self.describe(i), self.stored(i)
        targets = {}
        for name, task in self.targets.items():
            if self.encoded[name]:
                targets[name] = decode(parts[name].tobytes(), task.IMAGE, f"{task.part} of {where}")
            else:
                targets[name] = self.array(name, parts[name])
        return RawSample(decode(parts["rgb"].tobytes(), RGB, f"rgb of {where}"), targets)

    def _what(self, part: str) -> str:
        """What people call a part."""
        return part if part == "rgb" else self.targets[part].part

    def describe(self, i: int) -> str:
        """``KEY in SHARD``, for messages."""
        return f"{self.keys[i]} in {self.root / self.shards[int(self._shard[i])].file}"


class SourceSplit(Split):
    """Samples that stay in the source. Each access decodes them at full size and resizes them.

    Raises InputError if the source lacks one of them, or if its files have changed since the dataset was prepared.
    """

    def __init__(self, root: Path, info: DatasetInfo, names: list[str]) -> None:
        super().__init__(root, info, names)
        settings = info.settings
        options = {"name": settings.source, **settings.options}
        self.source: Source[Any] = plugins.build("source", options, Path(settings.root))
        splits = self.source.splits()
        found: dict[tuple[str, str], Sample] = {(n, sample.key): sample for n in names for sample in splits.get(n, [])}
        wanted = list(zip(np.repeat(names, [info.splits[n].count for n in names]).tolist(), self.keys, strict=True))
        missing = [key for name, key in wanted if (name, key) not in found]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"{settings.root}: sample {missing[0]}{more} has gone since it was prepared as {root}; prepare it again"
            )
        self.samples = [found[sample] for sample in wanted]
        with ThreadPoolExecutor(16) as pool:  # threads hide the latency of network disks
            for i, sizes in enumerate(pool.map(partial(file_sizes, parts=self.parts), self.samples)):
                if sizes != dict(zip(self.parts, self._spans[:, i, 1].tolist(), strict=True)):
                    raise InputError(
                        f"{self.describe(i)}: its files have changed since it was prepared as {root}; prepare it again"
                    )
            stamps = list(pool.map(stamp, self.samples))
        for number, shard in enumerate(self.shards):
            of_shard = np.flatnonzero(self._shard == number)
            if shard.source not in ("", fingerprint(self.source, settings, (stamps[i] for i in of_shard))):
                what = what_changed([self.samples[i] for i in of_shard], root / shard.file)
                raise InputError(f"{root} is out of date: {what}; prepare it again")
        self.version = fingerprint(self.source, settings, stamps)

    def decode(self, i: int) -> RawSample:
        """See ``Split.decode``."""
        return resized(self.source.read(self.samples[i]), self.info.height, self.info.width)

    def describe(self, i: int) -> str:
        """``KEY in ROOT``."""
        return f"{self.keys[i]} in {self.info.settings.root}"


def make_split(root: Path, info: DatasetInfo, names: list[str]) -> Split:
    """The splits ``names`` in sequence, for any way of storing the dataset in ``root``."""
    kinds: dict[Stored, type[Split]] = {"shards": ShardSplit, "source": SourceSplit}
    return kinds[info.settings.stored](root, info, names)


def resized(raw: RawSample, height: int, width: int) -> RawSample:
    """``raw`` at the size (height, width): RGB with Lanczos, targets with the nearest pixel."""
    targets = {name: nearest(target, height, width) for name, target in raw.targets.items()}
    return RawSample(resize_rgb(raw.rgb, height, width), targets)


def npy_header(array: np.ndarray) -> bytes:
    """The header before the data of ``array`` in an npy file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    return file.getvalue()


def pixels_sha256(sample: RawSample) -> str:
    """Checksum of the pixels of ``sample``, in hexadecimal."""
    digest = hashlib.sha256()
    for pixels in (sample.rgb, *sample.targets.values()):
        digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def file_sizes(sample: Sample, parts: Sequence[str]) -> dict[str, int]:
    """Bytes of the file of each part; 0 for a part that has no file of its own."""
    files = {"rgb": getattr(sample, "rgb", None), **getattr(sample, "targets", {})}
    try:
        return {part: file.stat().st_size if (file := files.get(part)) else 0 for part in parts}
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _read_index(path: Path, split: SplitInfo) -> Index:
    try:
        index = Index.from_json(read_json(path))
    except (TypeError, KeyError) as error:
        raise InputError(f"{path}: damaged: {error}") from None
    if not index.is_whole or len(index.keys) != split.count:
        raise InputError(f"{path}: lists {len(index.keys)} samples instead of {split.count}")
    return index
