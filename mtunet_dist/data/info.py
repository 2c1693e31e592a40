"""The content of a prepared dataset's ``dataset.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from mtunet_dist.data.shards import RgbFormat, TargetFormat
from mtunet_dist.schema import ClassInfo, DepthInfo

FORMAT = 2
INFO_FILE = "dataset.json"
Stored = Literal["shards", "source"]


@dataclass(frozen=True)
class Settings:
    """How a dataset was prepared, and from which source.

    ``root`` is as the user gave it; ``options`` are those of the source. ``stored`` says where the samples are: resized
    in shards, or still in the source at full size (``root`` is then absolute, and the formats have no meaning).
    """

    source: str
    root: str
    options: dict[str, Any]
    height: int
    width: int
    rgb_format: RgbFormat
    target_format: TargetFormat
    shard_size: int
    resize: Literal["stretch"] = "stretch"
    stored: Stored = "shards"

    def flat(self) -> dict[str, Any]:
        """All settings by name, with the options of the source."""
        settings = dataclasses.asdict(self)
        options = settings.pop("options")
        return {**settings, **options}


@dataclass(frozen=True)
class ShardInfo:
    """A shard of ``count`` samples, with its size and checksum.

    ``source`` is the fingerprint (``stamps.py``) of the source files of the shard. It is "" in datasets from versions
    without it.
    """

    file: str
    count: int
    bytes: int
    sha256: str
    source: str = ""


@dataclass(frozen=True)
class SplitInfo:
    """A split and its statistics over all stored pixels. Depth is in the dataset's unit, 0 if no pixel is valid.

    A sample without a single labelled or valid pixel counts as one without label or depth. Datasets from versions that
    did not count these samples have 0.
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
        """Make it from the parsed JSON of ``dataclasses.asdict``. KeyError or TypeError for other JSON."""
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


def _split_info(value: dict[str, Any]) -> SplitInfo:
    shards = tuple(ShardInfo(**shard) for shard in value["shards"])
    return SplitInfo(**{**value, "shards": shards, "class_pixels": tuple(value["class_pixels"])})
