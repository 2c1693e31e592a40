"""Strict image reading: an image that would silently decode to wrong values (RGB labels, 8-bit depth, ...) is an error.

PNGs have checksums, so every damage to their pixels is found. JPEGs have none. A JPEG that was cut short is an error,
but most altered bytes only change pixels. libjpeg's warnings, which PIL drops, would show only a part of such damage.
So this module cannot find every damaged source JPEG. Shards have their own checksums.

Images are read as viewers and labelling tools show them: turned and mirrored by their EXIF orientation.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image

from mtunet_dist.errors import InputError
from mtunet_dist.schema import VOID
from mtunet_dist.sources._source import RawSample, SampleFiles
from mtunet_dist.system.files import read_bytes

Part = Literal["rgb", "label", "depth"]
PARTS: tuple[Part, ...] = ("rgb", "label", "depth")
FORMATS: dict[Part, tuple[str, ...]] = {
    "rgb": ("8-bit RGB PNG", "RGB JPEG"),
    "label": ("8-bit gray PNG",),
    "depth": ("16-bit gray PNG",),
}
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_COLORS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray+alpha", 6: "RGBA"}
# The pixels that a PNG holds in each pass: first column and row, and steps.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_WHOLE = ((0, 0, 1, 1),)
_PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def decode(data: bytes, part: Part, name: str) -> np.ndarray:
    """The pixels of an encoded image, upright: uint8 (H, W, 3), uint8 (H, W) or uint16 (H, W).

    Raises InputError that starts with ``name`` for corrupt data and for formats other than ``FORMATS[part]``.
    """
    _header(io.BytesIO(data), part, name)
    try:
        # verify() checks the checksums that decoding skips. The image object cannot be used after it.
        Image.open(io.BytesIO(data)).verify()
        image = Image.open(io.BytesIO(data))
        pixels = np.asarray(image).astype(np.uint16 if part == "depth" else np.uint8, copy=False)
        if image.format == "PNG":
            _check_rows(data, pixels)
        return _upright(pixels, _orientation(image))
    except _PIL_ERRORS as error:
        raise InputError(f"{name}: corrupt image: {error}") from None


def encode(pixels: np.ndarray, file_format: Literal["PNG", "JPEG"], **options: int | str) -> bytes:
    """Encode these pixels as the bytes of an image file. ``options`` are those of PIL's ``Image.save``."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


def read_images(sample: SampleFiles, table: np.ndarray, hint: str = "") -> RawSample:
    """Read the files of ``sample``: labels through ``table`` (see ``id_table``), depth as stored.

    A missing part becomes all VOID or all 0. Raises InputError that names the file, or the sample and its sizes.
    ``hint`` ends the message about a label value that is not in the table.
    """
    images = _decoded(sample)
    _check_sizes(sample.key, {part: image.shape[:2] for part, image in images.items()})
    shape = images["rgb"].shape[:2]
    if "label" in images:
        label = to_classes(images["label"], table, sample.label, hint)
    else:
        label = np.full(shape, VOID, dtype=np.uint8)
    depth = images.get("depth", np.zeros(shape, dtype=np.uint16))
    return RawSample(images["rgb"], label, depth)


def check_headers(sample: SampleFiles) -> None:
    """Check format and size of a sample's files without decoding them. Raises InputError as ``read_images``."""
    sizes: dict[str, tuple[int, ...]] = {}
    for part, path in _paths(sample).items():
        try:
            with path.open("rb") as file:
                sizes[part] = _header(file, part, str(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(set(sizes.values())) > 1:  # a PNG may have its EXIF orientation at any place in the file
        sizes = {part: image.shape[:2] for part, image in _decoded(sample).items()}
    _check_sizes(sample.key, sizes)


def resize(pixels: np.ndarray, part: Part, height: int, width: int) -> np.ndarray:
    """Resize to (height, width): RGB with Lanczos over all source pixels that it covers (antialiased), the rest
    nearest."""
    if part == "rgb":
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    rows, columns = _nearest(pixels.shape[0], height), _nearest(pixels.shape[1], width)
    return pixels.take(rows, axis=0).take(columns, axis=1)


def id_table(classes: Mapping[int, int], void: Iterable[int] = (), size: int = 256) -> np.ndarray:
    """int16 (size,): label id -> class index or VOID; -1 for an id that is not allowed in a file."""
    table = np.full(size, -1, dtype=np.int16)
    table[list(classes)] = list(classes.values())
    table[list(void)] = VOID
    return table


def to_classes(ids: np.ndarray, table: np.ndarray, name: object, hint: str = "") -> np.ndarray:
    """Label ids -> class indices, uint8. An id beyond the table counts as the table's last id.

    InputError starts with ``name``, gives an id that is not in the table, and ends with ``hint``.
    """
    classes = table.take(ids, mode="clip")
    if classes.min() < 0:
        value = int(ids[classes < 0][0])
        raise InputError(f"{name}: label value {value} is not one of {_ranges(np.flatnonzero(table >= 0))}{hint}")
    return classes.astype(np.uint8)


def _nearest(size: int, new_size: int) -> np.ndarray:
    """The source pixel under the centre of each of ``new_size`` pixels."""
    return (2 * np.arange(new_size) + 1) * size // (2 * new_size)


def _paths(sample: SampleFiles) -> dict[Part, Path]:
    paths: dict[Part, Path | None] = {"rgb": sample.rgb, "label": sample.label, "depth": sample.depth}
    return {part: path for part, path in paths.items() if path is not None}


def _decoded(sample: SampleFiles) -> dict[Part, np.ndarray]:
    return {part: decode(read_bytes(path), part, str(path)) for part, path in _paths(sample).items()}


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. 1 is upright, and the value for a file without one."""
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored ``pixels`` (H, W, ...) to the orientation that viewers show; from 5 on rows and columns are
    exchanged."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _header(file: BinaryIO, part: Part, name: str) -> tuple[int, int]:
    """(H, W) from the file's header, after a check that the format is right for ``part``; for a JPEG of the upright
    image."""
    start = file.read(26)
    if start.startswith(_PNG) and start[12:16] == b"IHDR" and len(start) == 26:
        # PIL reads 16-bit RGB as 8-bit and cannot tell the difference, so the header is read here.
        width, height, bits, color = struct.unpack(">IIBB", start[16:])
        found = f"{bits}-bit {_PNG_COLORS.get(color, 'unknown')} PNG"
    else:
        file.seek(0)
        try:
            image = Image.open(file)
            turned = _orientation(image) >= 5
        except Image.DecompressionBombError as error:
            raise InputError(f"{name}: {error}") from None
        except _PIL_ERRORS:
            raise InputError(f"{name}: not an image; expected {_expected(part)}") from None
        width, height = image.size[::-1] if turned else image.size
        found = f"{'gray' if image.mode == 'L' else image.mode} {image.format}"
    if found not in FORMATS[part]:
        raise InputError(f"{name}: {found}; expected {_expected(part)}")
    return height, width


def _check_rows(png: bytes, pixels: np.ndarray) -> None:
    """Raise ValueError for a PNG whose data ends before its last row. PIL silently leaves the missing part black.

    The check must decompress again. So it looks only at images whose last row is black, or may be stored earlier.
    """
    interlaced = png[28] == 1
    if pixels[-1].any() and not interlaced:
        return
    parts = [pixels[y::dy, x::dx] for x, y, dx, dy in (_ADAM7 if interlaced else _WHOLE)]
    expected = sum(len(part) + part.nbytes for part in parts if part.size)  # each row has a byte for its filter
    found = len(zlib.decompressobj().decompress(b"".join(_chunks(png, b"IDAT")), expected))
    if found < expected:
        raise ValueError(f"{found} of {expected} bytes are there")


def _chunks(png: bytes, wanted: bytes) -> Iterator[bytes]:
    """The data of the chunks named ``wanted``."""
    at, name = len(_PNG), b""
    while name != b"IEND":
        size, name = struct.unpack_from(">I4s", png, at)
        if name == wanted:
            yield png[at + 8 : at + 8 + size]
        at += 12 + size


def _expected(part: Part) -> str:
    return f"{' or '.join(FORMATS[part])} for {part}"


def _check_sizes(key: str, sizes: Mapping[str, tuple[int, ...]]) -> None:
    if len(set(sizes.values())) > 1:
        text = ", ".join(f"{part} {width}x{height}" for part, (height, width) in sizes.items())
        sideways = any(size[::-1] in sizes.values() for size in sizes.values() if size[0] != size[1])
        hint = ", each turned as its EXIF orientation says" if sideways else ""
        raise InputError(f"sample {key}: images differ in size (width x height): {text}{hint}")


def _ranges(values: np.ndarray) -> str:
    """``0..13, 255`` for sorted integers."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
