"""Damaged files: of what kinds, and what a loader makes of shards that hold them.

As a script it is what the tests start apart, so that a decoder that crashes or hangs is a failure with a name:
``python tests/helpers/damage.py JOB...`` through DALI, a job being ``DAMAGED:INTACT:`` with ``zoom`` or nothing after
it.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mtunet_dist.config import DataConfig
from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.loader import make_loader
from mtunet_dist.data.order import EvalOrder, Plan
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.splits import Split
from mtunet_dist.errors import InputError
from mtunet_dist.sources._source import RawSample
from mtunet_dist.tasks.segmentation import VOID

NAMED, HARMLESS, UNDETECTABLE, WRONG = "named", "harmless", "undetectable", "WRONG"
LOADER_ONLY = "by DALI only"  # decoded, to other pixels
CPU = torch.device("cpu")
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
FOREIGN = ("BMP", "GIF", "WEBP", "TIFF", "PPM")
MODES = {  # that a part must not have
    "rgb png": ("L", "1", "P", "LA", "RGBA"),
    "rgb jpeg": ("L", "CMYK"),
    "label": ("RGB", "P", "1", "LA", "RGBA"),
    "depth": ("RGB", "P", "1", "LA", "RGBA"),
}


@dataclass(frozen=True)
class Damage:
    """What a file holds instead; None: it is a directory; a Path: it is a symlink to it."""

    kind: str
    content: bytes | Path | None


def encoded(pixels: np.ndarray, file_format: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    file, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, file_format, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels: np.ndarray, *, interlaced: bool = False, rows: int | None = None, **size: int) -> bytes:
    """A PNG with what PIL does not write: Adam7, 16-bit RGB, only the first ``rows``, another size in the header."""
    height, width = pixels.shape[:2]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    parts = (pixels[y::dy, x::dx] for x, y, dx, dy in passes)
    lines = [b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for part in parts for row in part if part.size]
    bits, color = 8 * pixels.itemsize, 2 if pixels.ndim == 3 else 0
    head = struct.pack(">IIBBBBB", size.get("width", width), size.get("height", height), bits, color, 0, 0, interlaced)
    data = zlib.compress(b"".join(lines[:rows]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def resized_header(jpeg: bytes, height: int, width: int) -> bytes:
    """A JPEG that says it is of another size."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def altered(data: bytes, random: np.random.Generator, count: int) -> Iterator[Damage]:
    """``count`` times each: a flipped bit, a block zeroed, a block overwritten; anywhere, at the start, at the end."""
    places = ((0, len(data)), (0, min(len(data), 200)), (len(data) - 20, len(data)))
    for n in range(count):
        for kind in ("bit flipped", "block zeroed", "block overwritten"):
            changed = bytearray(data)
            while changed == data:
                at = int(random.integers(*places[n % 3]))
                if kind == "bit flipped":
                    changed[at] ^= 1 << int(random.integers(8))
                else:
                    end = min(at + int(random.integers(1, 40)), len(data))
                    changed[at:end] = bytes(end - at) if kind == "block zeroed" else random.bytes(end - at)
            yield Damage(kind, bytes(changed))


def file_damages(part: str, data: bytes, pixels: np.ndarray, random: np.random.Generator) -> Iterator[Damage]:
    """For a file of ``part`` (a key of ``MODES``) that holds ``data``, encoded with no options from ``pixels``."""
    lengths = [0, 1, 7, 8, 20, 25, 26, 33, 40, 60, len(data) // 4, len(data) // 2, -60, -20, -12, -8, -4, -2, -1]
    yield from (Damage("cut short", data[:n]) for n in lengths)
    yield from altered(data, random, 18)
    yield from (Damage("trailing garbage", data + random.bytes(n)) for n in (1, 5000))
    yield Damage("text", b"this is no image\n")
    yield Damage("directory", None)
    yield Damage("dangling link", Path("nowhere.png"))
    rgb = pixels if pixels.ndim == 3 else np.stack([pixels.astype(np.uint8)] * 3, 2)
    gray = rgb[..., 0]
    yield from (Damage("other format", encoded(rgb, name)) for name in FOREIGN)
    file_format = "JPEG" if part == "rgb jpeg" else "PNG"
    yield from (Damage("wrong mode", encoded(rgb, file_format, mode)) for mode in MODES[part])
    yield Damage("wrong size", encoded(pixels[:, :-1], file_format))
    if part == "rgb jpeg":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown rotated by 90 degrees
        yield Damage("rotated by EXIF", encoded(pixels, "JPEG", exif=exif))
        yield Damage("progressive", encoded(pixels, "JPEG", progressive=True))
        yield from (Damage("huge header", resized_header(data, n, n)) for n in (3000, 30000, 65000))
        return
    yield Damage("wrong mode", png(rgb.astype(np.uint16)))
    yield Damage("wrong mode", encoded(gray if part == "depth" else gray.astype(np.uint16)))
    yield Damage("interlaced", png(pixels, interlaced=True))
    yield from (Damage("huge header", png(pixels, height=n, width=n)) for n in (3000, 30000, 2**31 - 1))
    yield from (Damage("rows missing", png(pixels, rows=n)) for n in (0, 1, len(pixels) - 1))
    yield from (Damage("rows missing", png(pixels, rows=n, interlaced=True)) for n in (0, 1, len(pixels)))
    wrong = bytearray(data)
    wrong[data.index(b"IEND") - 5] ^= 0xFF
    yield Damage("wrong checksum", bytes(wrong))
    if part == "label":
        yield from (Damage("foreign class", encoded(np.full_like(pixels, n))) for n in (3, 77, 254))


def member_damages(part: str, data: bytes, pixels: np.ndarray, random: np.random.Generator) -> Iterator[Damage]:
    """Of the same length, for the bytes of a shard's member; ``part`` is a key of ``MODES``."""
    yield from altered(data, random, 12)
    rgb = np.zeros((4, 4, 3), dtype=np.uint8)
    others = {name: encoded(rgb, name) for name in ("BMP", "GIF", "WEBP")}
    others |= {f"{mode} JPEG": encoded(rgb, "JPEG", mode, quality=1, optimize=True) for mode in ("L", "RGB", "CMYK")}
    others |= {f"{mode} PNG": encoded(rgb, mode=mode) for mode in ("L", "RGB", "P", "RGBA", "1")}
    others |= {"16-bit PNG": encoded(rgb[..., 0].astype(np.uint16)), "16-bit RGB PNG": png(rgb.astype(np.uint16))}
    others |= {"huge PNG": png(pixels[:1, :1], height=30000, width=30000)}
    for name, other in others.items():
        if len(other) <= len(data):
            yield Damage(f"{name} inside", other + bytes(len(data) - len(other)))
    if part == "rgb jpeg":
        sizes = ((64, 48), (16, 48), (32, 49), (32, 40), (3000, 3000), (30000, 30000), (65000, 65000))
        yield from (Damage("other size in header", resized_header(data, *size)) for size in sizes)


class Logged(EvalOrder):
    """Says which samples come next, so that a crash has a name."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__(len(keys), batch_size=5)
        self.keys = keys

    def plan(self, index: int) -> Plan:
        plan = super().plan(index)
        print("decoding", *(self.keys[i] for i in plan.samples), flush=True)
        return plan


class One:
    """An order of one batch, of sample ``i``."""

    batches = 1

    def __init__(self, i: int) -> None:
        self.i = i

    def plan(self, index: int) -> Plan:
        return Plan(0, np.array([self.i]))


def outcomes(
    damaged: Path, intact: Path, loader: dict[str, Any], *, zoom: bool = False, log: bool = False
) -> dict[str, str]:
    """What the loader makes of each training sample, by key; each is damaged. A zoom leaves pixels unjudged."""
    data, good = PreparedDataset(damaged), PreparedDataset(intact).split("train")
    split, info = data.split("train"), data.info
    augmentation = Augmentation(info.height, info.width, scales=(1.3,)) if zoom else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = DataConfig(root="", on_error="skip", **loader)
        order = Logged(split.keys) if log else EvalOrder(len(split), batch_size=5)
        batches = list(make_loader(config, split, order, CPU, augmentation).batches())
    texts = [str(warning.message) for warning in caught]
    found = {}
    for batch in batches:
        for row, i in enumerate(batch["sample"].tolist()):
            named = any(split.describe(i) in text for text in texts)
            masked = bool((batch["segmentation"][row] == VOID).all() and (batch["depth"][row] == 0).all())
            pixels = batch["image"][row].permute(1, 2, 0), batch["segmentation"][row], batch["depth"][row, 0]
            if named or masked or zoom:
                found[split.keys[i]] = NAMED if named and masked else WRONG if named or masked else HARMLESS
            else:
                found[split.keys[i]] = _judged(split, i, good.decode(i), pixels)
    return found


def _judged(split: Split, i: int, good: RawSample, pixels: tuple[Tensor, ...]) -> str:
    """Of a sample that was decoded: as PIL decodes it, and as it was? Only a JPEG's pixels may differ from that."""
    image, label, depth = (x.numpy() for x in pixels)
    scale = np.float32(split.info.targets["depth"].scale)
    same = np.array_equal(label, good.targets["segmentation"]) and np.array_equal(depth, good.targets["depth"] * scale)
    if not same:
        return WRONG
    if np.array_equal(image, good.rgb):
        return HARMLESS
    try:
        here = split.decode(i).rgb
    except InputError:
        return LOADER_ONLY
    return UNDETECTABLE if np.abs(image.astype(int) - here).max() <= 1 else WRONG


if __name__ == "__main__":
    jobs = [job.split(":") for job in sys.argv[1:]]
    found = [outcomes(Path(a), Path(b), {"threads": 1}, zoom=zoom == "zoom", log=True) for a, b, zoom in jobs]
    print(json.dumps(found))
