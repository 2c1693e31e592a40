"""Reading a prepared dataset: ``dataset.json`` says what it is, shards hold the encoded samples, indexes find them.

``python -m mtunet_dist.prepare`` writes one; ``dataset.json`` comes last, so a folder that has it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mtunet_dist.data.shards import Index, RgbFormat, read_json, sha256
from mtunet_dist.errors import InputError
from mtunet_dist.schema import ClassInfo, DepthInfo
from mtunet_dist.sources._images import PARTS, decode
from mtunet_dist.sources._source import RawSample

FORMAT = 1
INFO_FILE = "dataset.json"


@dataclass(frozen=True)
class Settings:
    """What a dataset was prepared from and how. ``root`` as the user gave it, ``options`` those of the source."""

    source: str
    root: str
    options: dict[str, Any]
    height: int
    width: int
    rgb_format: RgbFormat
    shard_size: int
    resize: Literal["stretch"] = "stretch"

    def flat(self) -> dict[str, Any]:
        """All settings by name, the source's options among them."""
        settings = dataclasses.asdict(self)
        options = settings.pop("options")
        return {**settings, **options}


@dataclass(frozen=True)
class ShardInfo:
    """A shard of ``count`` samples, with its size and checksum."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """A split and its statistics over all pixels as stored; depth in the dataset's unit, 0 where none is valid.

    A sample is without label or depth when it has not one labelled or valid pixel. Datasets prepared before these
    were counted say 0.
    """

    count: int
    shards: tuple[ShardInfo, ...]
    class_pixels: tuple[int, ...]
    void_pixels: int
    valid_depth_pixels: int
    depth_mean: float
    depth_min: float
    depth_max: float
    samples_without_label: int = 0
    samples_without_depth: int = 0


@dataclass(frozen=True)
class DatasetInfo:
    """The content of ``dataset.json``."""

    format: int
    name: str
    created_by: str
    height: int
    width: int
    classes: tuple[ClassInfo, ...]
    depth: DepthInfo
    splits: dict[str, SplitInfo]
    settings: Settings

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DatasetInfo:
        """From the parsed JSON of ``dataclasses.asdict``. KeyError or TypeError when it is not that."""
        return cls(
            **{
                **value,
                "classes": tuple(ClassInfo(c["name"], tuple(c["color"])) for c in value["classes"]),
                "depth": DepthInfo(**value["depth"]),
                "splits": {name: _split_info(split) for name, split in value["splits"].items()},
                "settings": Settings(**value["settings"]),
            }
        )


def index_name(split: str) -> str:
    """File name of a split's index."""
    return f"{split}.index.json"


class PreparedDataset:
    """A complete prepared dataset in the folder ``root``; ``info`` is its ``dataset.json``.

    Opening checks that every shard is there with the right size, without reading it. Raises InputError that names
    what is missing, of another format or of the wrong size.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.info = _read_info(self.root)
        for split in self.info.splits.values():
            for shard in split.shards:
                path = self.root / shard.file
                if not path.is_file():
                    raise InputError(f"{path}: the shard is missing; delete {self.root} and prepare it again")
                if path.stat().st_size != shard.bytes:
                    raise InputError(f"{path}: {path.stat().st_size} bytes instead of {shard.bytes}")

    def split(self, spec: str) -> PreparedSplit:
        """The split ``spec``, or several in the given order: ``train+val``. InputError lists the splits there are."""
        names = spec.split("+")
        unknown = [name for name in names if name not in self.info.splits]
        if unknown or len(set(names)) < len(names):
            wrong = f"no split '{unknown[0]}'" if unknown else f"'{spec}' names a split twice"
            raise InputError(f"{self.root}: {wrong}. Available: {', '.join(self.info.splits)}")
        return PreparedSplit(self.root, self.info, names)


class PreparedSplit:
    """The samples of one split, or of several after one another, by position. Cheap to pickle."""

    def __init__(self, root: Path, info: DatasetInfo, names: list[str]) -> None:
        self.root, self.info, self.names = root, info, names
        self.shards: list[ShardInfo] = []
        self.keys: list[str] = []
        shard_numbers, spans = [], []
        for name in names:
            index = _read_index(root / index_name(name), info.splits[name])
            shard_numbers.append(np.array(index.shard, dtype=np.int32) + len(self.shards))
            spans.append(np.array([index.rgb, index.label, index.depth], dtype=np.int64))
            self.keys += index.keys
            self.shards += info.splits[name].shards
        self._shard = np.concatenate(shard_numbers)  # (N,)
        self._spans = np.concatenate(spans, axis=1)  # (part, N, offset and size)
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.keys)

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
        where = self.describe(i)
        shape = (self.info.height, self.info.width)
        images = []
        for part, data in zip(PARTS, self.parts(i), strict=True):
            image = decode(data.tobytes(), part, f"{part} of {where}")
            if image.shape[:2] != shape:
                raise InputError(f"{part} of {where}: size {image.shape[:2]} instead of {shape}")
            images.append(image)
        return RawSample(*images)

    def describe(self, i: int) -> str:
        """``KEY in SHARD``, for messages."""
        return f"{self.keys[i]} in {self.root / self.shards[int(self._shard[i])].file}"

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


def verify(root: Path) -> PreparedDataset:
    """Read every shard again and compare its checksum. Raises InputError that names the shard that differs."""
    dataset = PreparedDataset(root)
    for name, split in dataset.info.splits.items():
        dataset.split(name)
        for shard in split.shards:
            if sha256(dataset.root / shard.file) != shard.sha256:
                raise InputError(f"{dataset.root / shard.file}: the checksum differs: the file is damaged")
    return dataset


def _read_info(root: Path) -> DatasetInfo:
    path = root / INFO_FILE
    if not path.is_file():
        state = "is not a complete prepared dataset" if root.is_dir() else "does not exist"
        raise InputError(f"{root} {state} (no {INFO_FILE}); make it with python -m mtunet_dist.prepare")
    value = read_json(path)
    version = value.get("format") if isinstance(value, dict) else None
    if version != FORMAT:
        raise InputError(f"{path}: format {version}, but this version reads format {FORMAT}; prepare it again")
    try:
        return DatasetInfo.from_json(value)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged: {error}") from None


def _split_info(value: dict[str, Any]) -> SplitInfo:
    shards = tuple(ShardInfo(**shard) for shard in value["shards"])
    return SplitInfo(**{**value, "shards": shards, "class_pixels": tuple(value["class_pixels"])})


def _read_index(path: Path, split: SplitInfo) -> Index:
    try:
        index = Index(**read_json(path))
    except TypeError as error:
        raise InputError(f"{path}: damaged: {error}") from None
    columns = (index.keys, index.shard, index.rgb, index.label, index.depth)
    if {len(column) for column in columns} != {split.count}:
        raise InputError(f"{path}: lists {len(index.keys)} samples instead of {split.count}")
    return index
