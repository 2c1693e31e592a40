"""Shards: plain tar files as WebDataset reads them, with an index of byte spans for random access by mmap.

A sample is three members, ``KEY.rgb.jpg`` (or ``.png``), ``KEY.label.png`` and ``KEY.depth.png``. The bytes depend on
the samples alone (fixed owner, mode and time), so a checksum identifies the data. Files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mtunet_dist.errors import InputError

RgbFormat = Literal["jpeg", "png"]
Span = tuple[int, int]
"""Offset and size in bytes of a member's data in its shard; of a part left in the source, 0 and its file's size."""
_SUFFIX: dict[RgbFormat, str] = {"jpeg": "jpg", "png": "png"}


@dataclass(frozen=True)
class EncodedSample:
    """A sample as its shard holds it: three encoded images."""

    key: str
    rgb_format: RgbFormat
    rgb: bytes
    label: bytes
    depth: bytes


@dataclass
class Index:
    """Which samples files hold: columns of equal length. ``shard`` counts the shards of a split from 0.

    ``crc`` has the CRC-32 of RGB, label and depth as encoded; it is empty for samples left in the source, and in
    datasets prepared before there were any.
    """

    keys: list[str] = field(default_factory=list)
    shard: list[int] = field(default_factory=list)
    rgb: list[Span] = field(default_factory=list)
    label: list[Span] = field(default_factory=list)
    depth: list[Span] = field(default_factory=list)
    crc: list[tuple[int, int, int]] = field(default_factory=list)

    def extend(self, other: Index) -> None:
        """Append the samples of ``other``."""
        self.keys += other.keys
        self.shard += other.shard
        self.rgb += other.rgb
        self.label += other.label
        self.depth += other.depth
        self.crc += other.crc


def shard_name(split: str, number: int, *, listing: bool = False) -> str:
    """File name of a shard, or of the list that stands for one whose samples stay in the source."""
    return f"{split}-{number:05d}.{'list' if listing else 'tar'}"


def write_shard(path: Path, number: int, samples: list[EncodedSample]) -> Index:
    """Write ``samples`` to the tar file ``path``, shard ``number`` of its split, and return where they lie."""
    index = Index()

    def write(file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                index.keys.append(sample.key)
                index.shard.append(number)
                index.rgb.append(_add(tar, f"{sample.key}.rgb.{_SUFFIX[sample.rgb_format]}", sample.rgb))
                index.label.append(_add(tar, f"{sample.key}.label.png", sample.label))
                index.depth.append(_add(tar, f"{sample.key}.depth.png", sample.depth))
                index.crc.append((zlib.crc32(sample.rgb), zlib.crc32(sample.label), zlib.crc32(sample.depth)))

    write_atomically(path, write)
    return index


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> Span:
    member = tarfile.TarInfo(name)  # owner 0, time 0, mode 0644
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return offset, len(data)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have ``write`` fill a temporary file beside ``path``, flush it to disk, then give it its name."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write ``value`` as JSON, atomically."""
    text = json.dumps(value, indent=indent) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """The value in a JSON file. InputError names a file that is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: damaged JSON: {error}") from None


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
