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
from mtunet_dist.sources._arrays import load_numbers, map_numbers
from mtunet_dist.sources._source import RawSample, SampleFiles
from mtunet_dist.system.files import read_bytes
from mtunet_dist.tasks._task import ImageFormat, Task
from mtunet_dist.tasks.segmentation import VOID

RGB = ImageFormat("rgb", ("8-bit RGB PNG", "RGB JPEG"), np.uint8)
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_COLORS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray+alpha", 6: "RGBA"}
# The pixels that a PNG holds in each pass: first column and row, and steps.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_WHOLE = ((0, 0, 1, 1),)
_PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def decode(data: bytes, expected: ImageFormat, name: str) -> np.ndarray:
    """The pixels of an encoded image, upright: (H, W, 3) for RGB, else (H, W).

    Raises InputError that starts with ``name`` for corrupt data and for formats other than the ``expected``.
    """
    _header(io.BytesIO(data), expected, name)
    try:
        # verify() checks the checksums that decoding skips. The image object cannot be used after it.
        Image.open(io.BytesIO(data)).verify()
        image = Image.open(io.BytesIO(data))
        pixels = np.asarray(image).astype(expected.dtype, copy=False)
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


def read_images(
    sample: SampleFiles, targets: Mapping[str, Task], tables: Mapping[str, np.ndarray] | None = None, hint: str = ""
) -> RawSample:
    """Read the files of ``sample``. Labels go through the table of their task (see ``id_table``).

    A missing target is blank. Raises InputError that names the file, or the sample and its sizes. ``hint`` ends the
    message about a label value that is not in the table.
    """
    rgb, found = _decoded(sample, targets)
    height, width = rgb.shape[:2]
    for name, table in (tables or {}).items():
        if name in found:
            found[name] = to_classes(found[name], table, sample.targets[name], hint)
    return RawSample(rgb, {name: found.get(name, task.blank(height, width)) for name, task in targets.items()})


def check_headers(sample: SampleFiles, targets: Mapping[str, Task]) -> None:
    """Check format and size of a sample's files without decoding them. Raises InputError as ``read_images``."""
    sizes = {"rgb": _size_of(sample.rgb, RGB)}
    for name, path in sample.targets.items():
        sizes[targets[name].part] = _size_of(path, targets[name].IMAGE)
    if len(set(sizes.values())) > 1:  # a PNG may have its EXIF orientation at any place in the file
        _decoded(sample, targets)


def resize_rgb(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize with Lanczos over all source pixels that a new pixel covers (antialiased)."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def nearest(target: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize by taking the pixel under the centre of each new pixel."""
    rows, columns = _nearest(target.shape[0], height), _nearest(target.shape[1], width)
    return target.take(rows, axis=0).take(columns, axis=1)


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


def _decoded(sample: SampleFiles, targets: Mapping[str, Task]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """RGB, and the targets that the sample has, with a check that all have the same size."""
    rgb = decode(read_bytes(sample.rgb), RGB, str(sample.rgb))
    found = {name: _target(path, targets[name]) for name, path in sample.targets.items()}
    sizes = {"rgb": rgb.shape[:2]} | {targets[name].part: target.shape[:2] for name, target in found.items()}
    _check_sizes(sample.key, sizes)
    return rgb, found


def _target(path: Path, task: Task) -> np.ndarray:
    """The stored target of a file: an image, or an array in an npy file."""
    if path.suffix == ".npy":
        return task.from_numbers(load_numbers(path), str(path))
    return task.from_image(decode(read_bytes(path), task.IMAGE, str(path)), str(path))


def _size_of(path: Path, expected: ImageFormat) -> tuple[int, ...]:
    """(H, W) from the header of a file."""
    if path.suffix == ".npy":
        return map_numbers(path).shape[:2]
    try:
        with path.open("rb") as file:
            return _header(file, expected, str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


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


def _header(file: BinaryIO, expected: ImageFormat, name: str) -> tuple[int, int]:
    """(H, W) from the file's header, after a check of the format; for a JPEG of the upright image."""
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
            raise InputError(f"{name}: not an image; expected {_expected(expected)}") from None
        width, height = image.size[::-1] if turned else image.size
        found = f"{'gray' if image.mode == 'L' else image.mode} {image.format}"
    if found not in expected.names:
        raise InputError(f"{name}: {found}; expected {_expected(expected)}")
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


def _expected(expected: ImageFormat) -> str:
    return f"{' or '.join(expected.names)} for {expected.what}"


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
