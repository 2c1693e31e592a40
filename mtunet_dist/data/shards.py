"""Shards: plain tar files in the layout of WebDataset, with an index of byte spans for random access by mmap.

A sample has a member ``KEY.rgb.jpg`` (or ``.png``) and one for each target, such as ``KEY.label.npy`` (or ``.png``).
The bytes depend only on the samples (fixed owner, mode and time), so a checksum identifies the data. A file has its
name only when it is complete. The index also has a CRC-32 of each member, because JPEG and npy do not show a flipped
bit.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from mtunet_dist.errors import InputError
from mtunet_dist.system.files import write_atomically

RgbFormat = Literal["jpeg", "png"]
TargetFormat = Literal["npy", "png"]
Span = tuple[int, int]
"""Offset and size in bytes of a member's data in its shard. A part that stays in the source has 0 and its
file's size."""


@dataclass(frozen=True)
class EncodedSample:
    """A sample as its shard holds it: for each part the end of its member's name, and its bytes."""

    key: str
    parts: dict[str, tuple[str, bytes]]  # "rgb", then the tasks -> such as "label.npy", bytes


@dataclass
class Index:
    """The samples that the files hold, as columns of equal length. ``shard`` counts the shards of a split from 0.

    ``spans`` and ``crc32`` have a column for each part: "rgb", then the tasks. A CRC of a part that is not stored is 0.
    """

    keys: list[str] = field(default_factory=list)
    shard: list[int] = field(default_factory=list)
    spans: dict[str, list[Span]] = field(default_factory=dict)
    crc32: dict[str, list[int]] = field(default_factory=dict)

    def append(self, key: str, shard: int, parts: Mapping[str, tuple[Span, int]]) -> None:
        """Add a sample: for each part its span and its CRC."""
        self.keys.append(key)
        self.shard.append(shard)
        for part, (span, crc) in parts.items():
            self.spans.setdefault(part, []).append(span)
            self.crc32.setdefault(part, []).append(crc)

    def extend(self, other: Index) -> None:
        """Append the samples of ``other``."""
        self.keys += other.keys
        self.shard += other.shard
        for part in other.spans:
            self.spans.setdefault(part, []).extend(other.spans[part])
            self.crc32.setdefault(part, []).extend(other.crc32[part])

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Index:
        """Make it from the JSON of ``dataclasses.asdict``, or of a dataset in format 2. TypeError or KeyError for
        others."""
        if "rgb" in value:
            old = {"rgb": "rgb", "segmentation": "label", "depth": "depth"}
            spans = {part: value[name] for part, name in old.items()}
            crc32 = {part: [crc[i] for crc in value["crc32"]] for i, part in enumerate(old)}
            return cls(value["keys"], value["shard"], spans, crc32)
        return cls(**value)

    @property
    def is_whole(self) -> bool:
        """Whether all columns have an entry for each sample."""
        columns: list[list[Any]] = [self.shard, *self.spans.values(), *self.crc32.values()]
        return all(len(column) == len(self.keys) for column in columns)


def shard_name(split: str, number: int, *, listing: bool = False) -> str:
    """File name of a shard, or of the list for samples that stay in the source."""
    return f"{split}-{number:05d}.{'list' if listing else 'tar'}"


def write_shard(path: Path, number: int, samples: list[EncodedSample]) -> Index:
    """Write ``samples`` to the tar file ``path``, shard ``number`` of its split. Returns their positions in it."""
    index = Index()

    def write(file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                spans = {}
                for part, (member, data) in sample.parts.items():
                    spans[part] = (_add(tar, f"{sample.key}.{member}", data), zlib.crc32(data))
                index.append(sample.key, number, spans)

    write_atomically(path, write)
    return index


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> Span:
    member = tarfile.TarInfo(name)  # owner 0, time 0, mode 0644
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return offset, len(data)


class Shard:
    """A shard mapped into memory. A read beyond the end of a shortened file would end the process by SIGBUS, without a
    message. Therefore ``span`` first checks the file's current length. This takes a microsecond; reading into our own
    memory takes fifteen."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: the file is empty
            raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)

    def span(self, start: int, end: int) -> np.ndarray:
        """A read-only uint8 view of the bytes from ``start`` to ``end``. InputError if the file no longer has them."""
        size = self._map.size()
        if end > size:
            raise InputError(f"{self.path}: cut short: it has only {size} bytes; prepare it again")
        return self._bytes[start:end]


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal. InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
