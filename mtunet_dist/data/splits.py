"""The samples of a split by position: encoded in shards, or as the source has them."""

from __future__ import annotations

import hashlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mtunet_dist import plugins
from mtunet_dist.data.info import DatasetInfo, ShardInfo, SplitInfo, Stored, index_name
from mtunet_dist.data.shards import Index, read_json
from mtunet_dist.errors import InputError
from mtunet_dist.sources._images import PARTS, check_header, decode, resize
from mtunet_dist.sources._source import RawSample, Sample, Source


class Split:
    """The samples of one split, or of several after one another, by position. Cheap to pickle.

    What is common to all ways of storing; ``make_split`` gives the right one.
    """

    def __init__(self, root: Path, info: DatasetInfo, names: list[str]) -> None:
        self.root, self.info, self.names = root, info, names
        self.shards: list[ShardInfo] = []
        self.keys: list[str] = []
        shard_numbers, spans, crcs = [], [], []
        for name in names:
            index = _read_index(root / index_name(name), info.splits[name])
            shard_numbers.append(np.array(index.shard, dtype=np.int32) + len(self.shards))
            spans.append(np.array([index.rgb, index.label, index.depth], dtype=np.int64))
            crcs.append(np.array(index.crc or [(-1, -1, -1)] * len(index.keys), dtype=np.int64))
            self.keys += index.keys
            self.shards += info.splits[name].shards
        self._shard = np.concatenate(shard_numbers)  # (N,)
        self._spans = np.concatenate(spans, axis=1)  # (part, N, offset and size)
        self._crcs = np.concatenate(crcs)  # (N, part), -1 where the index has none

    def __len__(self) -> int:
        return len(self.keys)

    def decode(self, i: int) -> RawSample:
        """Sample ``i`` at the dataset's size. Raises InputError that names it and its file if that is damaged."""
        raise NotImplementedError

    def describe(self, i: int) -> str:
        """Sample ``i``, for messages: its key and where it is."""
        raise NotImplementedError

    def spread(self, most: int) -> list[int]:
        """Positions of at most ``most`` samples, evenly spaced over the split: enough for statistics in seconds."""
        count = len(self)
        return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})

    @property
    def fingerprint(self) -> str:
        """Identifies the content and its meaning: equal for equal shards, size, classes and depth."""
        content = [
            [shard.sha256 for shard in self.shards],
            [self.info.height, self.info.width],
            [c.name for c in self.info.classes],
            [self.info.depth.kind, self.info.depth.unit, self.info.depth.scale],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class ShardSplit(Split):
    """Samples encoded in shards."""

    def __init__(self, root: Path, info: DatasetInfo, names: list[str]) -> None:
        super().__init__(root, info, names)
        self._maps: dict[int, np.ndarray] = {}
        self._checked: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def parts(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The encoded RGB, label and depth of sample ``i``: read-only uint8 views into the mapped shard."""
        number = int(self._shard[i])
        if number not in self._maps:
            self._maps[number] = np.memmap(self.root / self.shards[number].file, mode="r").view(np.ndarray)
        shard = self._maps[number]
        rgb, label, depth = (shard[offset : offset + size] for offset, size in self._spans[:, i])
        return rgb, label, depth

    def decode(self, i: int) -> RawSample:
        """Sample ``i`` decoded with PIL, in read-only arrays. Raises InputError that names shard and key."""
        self.check(i)
        where = self.describe(i)
        parts = zip(PARTS, self.parts(i), strict=True)
        return RawSample(*(decode(data.tobytes(), part, f"{part} of {where}") for part, data in parts))

    def check(self, i: int) -> None:
        """The first time, look whether sample ``i`` is damaged. Raises InputError as ``decode``.

        Costs little where the index has checksums; without them only headers can be looked at (format and size).
        """
        if i in self._checked:
            return
        where, size = self.describe(i), (self.info.height, self.info.width)
        for part, view, crc in zip(PARTS, self.parts(i), self._crcs[i].tolist(), strict=True):
            data, name = view.tobytes(), f"{part} of {where}"
            if crc < 0:
                check_header(data, part, name, size)
            elif zlib.crc32(data) != crc:
                check_header(data, part, name, size)
                decode(data, part, name)  # may say more
                raise InputError(f"{name}: the checksum differs: the file is damaged")
        self._checked.add(i)

    def describe(self, i: int) -> str:
        """``KEY in SHARD``, for messages."""
        return f"{self.keys[i]} in {self.root / self.shards[int(self._shard[i])].file}"


class SourceSplit(Split):
    """Samples left in the source, decoded at full size and resized each time they are asked for.

    Raises InputError if the source lacks one of them, or if a file's size has changed since the dataset was prepared.
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
            raise InputError(f"{settings.root}: sample {missing[0]}{more} has gone since it was prepared as {root}")
        self.samples = [found[sample] for sample in wanted]
        with ThreadPoolExecutor(16) as pool:  # threads hide the latency of network disks
            for i, sizes in enumerate(pool.map(file_sizes, self.samples)):
                if sizes != self._spans[:, i, 1].tolist():
                    raise InputError(f"{self.describe(i)}: its files have changed since it was prepared as {root}")

    def decode(self, i: int) -> RawSample:
        """See ``Split.decode``."""
        return resized(self.source.read(self.samples[i]), self.info.height, self.info.width)

    def describe(self, i: int) -> str:
        """``KEY in ROOT``."""
        return f"{self.keys[i]} in {self.info.settings.root}"


def make_split(root: Path, info: DatasetInfo, names: list[str]) -> Split:
    """The splits ``names`` after one another, however the dataset in ``root`` is stored."""
    kinds: dict[Stored, type[Split]] = {"shards": ShardSplit, "source": SourceSplit}
    return kinds[info.settings.stored](root, info, names)


def resized(raw: RawSample, height: int, width: int) -> RawSample:
    """``raw`` at the size (height, width)."""
    return RawSample(*(resize(getattr(raw, part), part, height, width) for part in PARTS))


def pixels_sha256(sample: RawSample) -> str:
    """Checksum of the pixels of ``sample``, in hexadecimal."""
    digest = hashlib.sha256()
    for pixels in (sample.rgb, sample.label, sample.depth):
        digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def file_sizes(sample: Sample) -> list[int]:
    """Bytes of the files of RGB, label and depth; 0 for a part that has no file of its own."""
    files = [getattr(sample, part, None) for part in PARTS]
    try:
        return [file.stat().st_size if isinstance(file, Path) else 0 for file in files]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _read_index(path: Path, split: SplitInfo) -> Index:
    try:
        index = Index(**read_json(path))
    except TypeError as error:
        raise InputError(f"{path}: damaged: {error}") from None
    columns = (index.keys, index.shard, index.rgb, index.label, index.depth)
    if {len(column) for column in columns} != {split.count}:
        raise InputError(f"{path}: lists {len(index.keys)} samples instead of {split.count}")
    if len(index.crc) not in (0, split.count):
        raise InputError(f"{path}: lists {len(index.crc)} checksums instead of {split.count}")
    return index
