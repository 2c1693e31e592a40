"""The content of a prepared dataset's ``dataset.json``.

Format 3 keeps targets by the names of their tasks. Format 2 had one label and one depth per sample; it is still read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mtunet_dist import plugins
from mtunet_dist.data.shards import RgbFormat, TargetFormat
from mtunet_dist.errors import InputError, closest
from mtunet_dist.tasks._task import Counts, Task

FORMAT = 3
READABLE = (2, 3)
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
    """A split, and for each target its counts over all stored pixels (see ``Counts``)."""

    count: int
    shards: tuple[ShardInfo, ...]
    targets: dict[str, Counts]


@dataclass(frozen=True)
class DatasetInfo:
    """The content of ``dataset.json``. ``targets`` are the tasks that the dataset has targets for, by name."""

    format: int
    name: str
    created_by: str
    height: int
    width: int
    targets: dict[str, Task]
    splits: dict[str, SplitInfo]
    settings: Settings

    def to_json(self) -> dict[str, Any]:
        """The content as JSON values."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **plain,
            "targets": {name: task.to_json() for name, task in self.targets.items()},
            "splits": {name: dataclasses.asdict(split) for name, split in self.splits.items()},
            "settings": dataclasses.asdict(self.settings),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DatasetInfo:
        """Make it from the values of ``to_json``, or of format 2. KeyError, TypeError or InputError for others."""
        value = _from_format_2(value) if value["format"] == 2 else value
        targets = {}
        for name, meaning in value["targets"].items():
            targets[name] = plugins.find("task", meaning["kind"]).from_json(name, meaning)  # type: ignore[attr-defined]
        return cls(
            **{
                **value,
                "targets": targets,
                "splits": {name: _split_info(split) for name, split in value["splits"].items()},
                "settings": Settings(**value["settings"]),
            }
        )

    def tasks(self, names: Sequence[str]) -> list[Task]:
        """The targets ``names``. InputError for a name that the dataset does not have."""
        for name in names:
            if name not in self.targets:
                known = ", ".join(self.targets)
                raise InputError(
                    f"unknown task '{name}'.{closest(name, list(self.targets))} The dataset '{self.name}' has: {known}"
                )
        return [self.targets[name] for name in names]


def index_name(split: str) -> str:
    """File name of a split's index."""
    return f"{split}.index.json"


def _split_info(value: dict[str, Any]) -> SplitInfo:
    return SplitInfo(value["count"], tuple(ShardInfo(**shard) for shard in value["shards"]), value["targets"])


def _from_format_2(value: dict[str, Any]) -> dict[str, Any]:
    """The values of format 3. The fingerprints of the source files are dropped: they were made in another way."""
    depth, pixels = value["depth"], value["height"] * value["width"]
    splits = {}
    for name, split in value["splits"].items():
        count, scale = split["count"], depth["scale"]
        segmentation = {
            "pixels": count * pixels,
            "valid": sum(split["class_pixels"]),
            "samples_without": split.get("samples_without_label", 0),
            "classes": split["class_pixels"],
        }
        valid = split["valid_depth_pixels"]
        distances = {
            "pixels": count * pixels,
            "valid": valid,
            "samples_without": split.get("samples_without_depth", 0),
            "sum": round(split["depth_mean"] / scale * valid),
            "min": round(split["depth_min"] / scale) if valid else 65535,
            "max": round(split["depth_max"] / scale),
        }
        shards = [{**shard, "source": ""} for shard in split["shards"]]
        splits[name] = {"count": count, "shards": shards}
        splits[name]["targets"] = {"segmentation": segmentation, "depth": distances}
    meaning = {"kind": "depth", "depth": depth["kind"], "unit": depth["unit"], "scale": depth["scale"]}
    targets = {"segmentation": {"kind": "segmentation", "classes": value["classes"]}, "depth": meaning}
    rest = {key: v for key, v in value.items() if key not in ("classes", "depth")}
    return {**rest, "format": FORMAT, "targets": targets, "splits": splits}
