"""The samples of a split by position: encoded in shards, or in the form that the source has."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mtunet_dist import plugins
from mtunet_dist.data.info import DatasetInfo, ShardInfo, SplitInfo, Stored, index_name
from mtunet_dist.data.shards import Index, Shard
from mtunet_dist.data.stamps import fingerprint, stamp, what_changed
from mtunet_dist.errors import InputError
from mtunet_dist.sources._images import PARTS, decode, resize
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
        self.shards: list[ShardInfo] = []
        self.keys: list[str] = []
        shard_numbers, spans, crcs = [], [], []
        for name in names:
            index = _read_index(root / index_name(name), info.splits[name])
            shard_numbers.append(np.array(index.shard, dtype=np.int32) + len(self.shards))
            spans.append(np.array([index.rgb, index.label, index.depth], dtype=np.int64))
            self.keys += index.keys
            self.shards += info.splits[name].shards
            crcs.append(np.array(index.crc32, dtype=np.int64).reshape(-1, len(PARTS)))
        self._shard = np.concatenate(shard_numbers)  # (N,)
        self._spans = np.concatenate(spans, axis=1)  # (part, N, offset and size)
        self._crc = np.concatenate(crcs)  # (N, part)

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
            [c.name for c in self.info.classes],
            [self.info.depth.kind, self.info.depth.unit, self.info.depth.scale],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class ShardSplit(Split):
    """Samples encoded in shards."""

    def __init__(self, root: Path, info: DatasetInfo, names: list[str]) -> None:
        super().__init__(root, info, names)
        self.encoded_targets = info.settings.target_format == "png"
        size = (info.height, info.width)
        self._headers = [npy_header(np.empty(size, dtype)) for dtype in (np.uint8, np.uint16)]
        self._maps: dict[int, Shard] = {}
        self._checked = np.zeros(len(self), dtype=bool)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def parts(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The encoded RGB, label and depth of sample ``i``: read-only uint8 views into the mapped shard.

        Raises InputError that names shard and key if they are damaged or missing. The checksums of a sample are
        compared when it is first read.
        """
        number = int(self._shard[i])
        try:
            if number not in self._maps:
                self._maps[number] = Shard(self.root / self.shards[number].file)
            shard, spans = self._maps[number], self._spans[:, i].tolist()
            rgb, label, depth = (shard.span(offset, offset + size) for offset, size in spans)
        except InputError as error:
            raise InputError(f"sample {self.keys[i]}: {error}") from None
        if not self._checked[i]:
            for part, data, crc in zip(PARTS, (rgb, label, depth), self._crc[i].tolist(), strict=True):
                if zlib.crc32(data.data) != crc:
                    raise InputError(f"{part} of {self.describe(i)} is damaged: its checksum differs")
            self._checked[i] = True
        return rgb, label, depth

    def targets(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Label uint8 and depth uint16 (H, W) of sample ``i``, if they are stored as arrays: read-only views.

        Raises InputError as ``parts``.
        """
        assert not self.encoded_targets
        arrays = []
        for data, header, dtype in zip(self.parts(i)[1:], self._headers, (np.uint8, np.uint16), strict=True):
            assert data[: len(header)].tobytes() == header, self.describe(i)
            arrays.append(data[len(header) :].view(dtype).reshape(self.info.height, self.info.width))
        label, depth = arrays
        return label, depth

    def decode(self, i: int) -> RawSample:
        """Sample ``i`` decoded with PIL, in read-only arrays. Raises InputError that names shard and key."""
        where = self.describe(i)
        encoded = PARTS if self.encoded_targets else PARTS[:1]
        images = [decode(x.tobytes(), p, f"{p} of {where}") for p, x in zip(encoded, self.parts(i), strict=False)]
        return RawSample(*images) if self.encoded_targets else RawSample(images[0], *self.targets(i))

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
            for i, sizes in enumerate(pool.map(file_sizes, self.samples)):
                if sizes != self._spans[:, i, 1].tolist():
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
    """``raw`` at the size (height, width)."""
    return RawSample(*(resize(getattr(raw, part), part, height, width) for part in PARTS))


def npy_header(array: np.ndarray) -> bytes:
    """The header before the data of ``array`` in an npy file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    return file.getvalue()


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
    columns = (index.keys, index.shard, index.rgb, index.label, index.depth, index.crc32)
    if {len(column) for column in columns} != {split.count}:
        raise InputError(f"{path}: lists {len(index.keys)} samples instead of {split.count}")
    return index
