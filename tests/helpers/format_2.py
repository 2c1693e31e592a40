"""A prepared dataset as the versions with format 2 wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PARTS = {"rgb": "rgb", "segmentation": "label", "depth": "depth"}


def write_format_2(root: Path) -> None:
    """Turn the descriptions of a dataset with labels and depth back into format 2. The shards are the same in both."""
    path = root / "dataset.json"
    value = json.loads(path.read_text())
    assert list(value["targets"]) == ["segmentation", "depth"]
    meaning = value.pop("targets")
    depth = meaning["depth"]
    value |= {
        "format": 2,
        "classes": meaning["segmentation"]["classes"],
        "depth": {"kind": depth["depth"], "unit": depth["unit"], "scale": depth["scale"]},
    }
    for name, split in value["splits"].items():
        split |= _statistics(split.pop("targets"), value["depth"]["scale"])
        _write_index(root / f"{name}.index.json")
    path.write_text(json.dumps(value, indent=1))


def _statistics(counts: dict[str, Any], scale: float) -> dict[str, Any]:
    label, depth = counts["segmentation"], counts["depth"]
    return {
        "class_pixels": label["classes"],
        "void_pixels": label["pixels"] - label["valid"],
        "valid_depth_pixels": depth["valid"],
        "depth_mean": depth["sum"] / depth["valid"] * scale if depth["valid"] else 0.0,
        "depth_min": depth["min"] * scale if depth["valid"] else 0.0,
        "depth_max": depth["max"] * scale,
        "samples_without_label": label["samples_without"],
        "samples_without_depth": depth["samples_without"],
    }


def _write_index(path: Path) -> None:
    index = json.loads(path.read_text())
    old = {"keys": index["keys"], "shard": index["shard"]}
    old |= {PARTS[part]: spans for part, spans in index["spans"].items()}
    old["crc32"] = list(zip(*(index["crc32"][part] for part in PARTS), strict=True))
    path.write_text(json.dumps(old))
