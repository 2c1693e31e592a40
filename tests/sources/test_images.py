"""Strict reading of image files: whatever would decode to wrong values is an error that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.damage import encoded, png, resized_header
from helpers.training import TASKS
from mtunet_dist.errors import InputError
from mtunet_dist.sources._images import check_headers, id_table, nearest, read_images, resize_rgb
from mtunet_dist.sources._source import RawSample, SampleFiles


def read(sample: SampleFiles) -> RawSample:
    """With label ids as classes."""
    return read_images(sample, TARGETS, {"segmentation": id_table({i: i for i in range(256)})})


def check_only(sample: SampleFiles) -> None:
    check_headers(sample, TARGETS)


def path_of(sample: SampleFiles, part: str) -> Path:
    return sample.rgb if part == "rgb" else sample.targets[NAMES[part]]


TARGETS = {task.name: task for task in TASKS}
NAMES = {"label": "segmentation", "depth": "depth"}
checks = pytest.mark.parametrize("check", [check_only, read])


@pytest.fixture
def sample(tmp_path: Path) -> SampleFiles:
    """A good sample: three PNGs of 4x4 pixels."""
    sample = SampleFiles(
        "x", tmp_path / "rgb.png", {"segmentation": tmp_path / "label.png", "depth": tmp_path / "depth.png"}
    )
    rgb = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(sample.rgb)
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(sample.targets["segmentation"])
    Image.fromarray(np.arange(0, 64000, 4000, dtype=np.uint16).reshape(4, 4)).save(sample.targets["depth"])
    return sample


def test_pixels_come_as_stored(sample: SampleFiles) -> None:
    raw = read(sample)
    rgb, label, depth = raw.rgb, raw.targets["segmentation"], raw.targets["depth"]
    assert rgb.shape == (4, 4, 3) and rgb.dtype == np.uint8
    assert label.dtype == np.uint8 and label.ravel().tolist() == list(range(16))
    assert depth.dtype == np.uint16 and depth.ravel().tolist() == list(range(0, 64000, 4000))


@checks
@pytest.mark.parametrize(
    ("part", "mode", "found"),
    [
        ("label", "RGB", "8-bit RGB PNG"),
        ("label", "P", "1-bit palette PNG"),
        ("label", "I;16", "16-bit gray PNG"),
        ("label", "1", "1-bit gray PNG"),
        ("depth", "L", "8-bit gray PNG"),
        ("depth", "RGB", "8-bit RGB PNG"),
        ("rgb", "L", "8-bit gray PNG"),
        ("rgb", "RGBA", "8-bit RGBA PNG"),
    ],
)
def test_wrong_pixel_format_is_named(
    sample: SampleFiles, check: Callable[[SampleFiles], Any], part: str, mode: str, found: str
) -> None:
    path = path_of(sample, part)
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(InputError, match=rf"{part}\.png: {found}; expected .* for {part}") as error:
        check(sample)
    assert str(error.value).startswith(str(path))


@checks
def test_16_bit_rgb_which_pil_would_cut_to_8_bit_is_named(
    sample: SampleFiles, check: Callable[[SampleFiles], Any]
) -> None:
    data = bytearray(sample.rgb.read_bytes())
    data[24] = 16
    sample.rgb.write_bytes(data)
    with pytest.raises(InputError, match=r"rgb\.png: 16-bit RGB PNG"):
        check(sample)


@checks
@pytest.mark.parametrize(("part", "mode"), [("rgb", "L"), ("rgb", "CMYK"), ("label", "L")])
def test_wrong_jpeg_is_named(sample: SampleFiles, check: Callable[[SampleFiles], Any], part: str, mode: str) -> None:
    Image.new(mode, (4, 4)).save(path_of(sample, part), "JPEG")
    with pytest.raises(InputError, match=rf"{part}\.png: (gray|CMYK) JPEG; expected"):
        check(sample)


@checks
def test_missing_file_is_named(sample: SampleFiles, check: Callable[[SampleFiles], Any]) -> None:
    sample.targets["depth"].unlink()
    with pytest.raises(InputError, match=r"depth\.png: cannot be read"):
        check(sample)


@checks
def test_size_mismatch_names_sample_and_sizes(sample: SampleFiles, check: Callable[[SampleFiles], Any]) -> None:
    Image.fromarray(np.zeros((4, 7), dtype=np.uint16)).save(sample.targets["depth"])
    with pytest.raises(InputError, match=r"sample x: .*rgb 4x4, label 4x4, depth 7x4"):
        check(sample)


@pytest.mark.parametrize("part", ["rgb", "label", "depth"])
@pytest.mark.parametrize("keep", [0, 20, 60, -5])
def test_truncated_png_is_named(sample: SampleFiles, part: str, keep: int) -> None:
    path = path_of(sample, part)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"{part}\.png: (not an image|corrupt)"):
        read(sample)


def test_flipped_bit_in_a_png_is_named(sample: SampleFiles) -> None:
    data = bytearray(sample.targets["depth"].read_bytes())
    data[data.index(b"IDAT") + 8] ^= 1
    sample.targets["depth"].write_bytes(data)
    with pytest.raises(InputError, match=r"depth\.png: corrupt"):
        read(sample)


def test_truncated_jpeg_is_named(sample: SampleFiles) -> None:
    Image.new("RGB", (64, 64), (200, 100, 0)).save(sample.rgb, "JPEG")
    sample.rgb.write_bytes(sample.rgb.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"rgb\.png: corrupt"):
        read(sample)


@pytest.mark.parametrize("part", ["rgb", "label", "depth"])
@pytest.mark.parametrize("interlaced", [False, True])
def test_png_that_lacks_its_last_row_is_named(sample: SampleFiles, part: str, interlaced: bool) -> None:
    """With the right checksums; PIL leaves the row black. A black row that is there is taken."""
    path = path_of(sample, part)
    pixels = np.asarray(Image.open(path)).copy()
    pixels[-1] = 0
    path.write_bytes(png(pixels, interlaced=interlaced))
    found = read(sample)
    assert np.array_equal(found.rgb if part == "rgb" else found.targets[NAMES[part]], pixels)
    lines = 7 if interlaced else 4
    path.write_bytes(png(pixels, interlaced=interlaced, rows=lines - 1))
    with pytest.raises(InputError, match=rf"{part}\.png: corrupt image: \d+ of \d+ bytes"):
        read(sample)


@checks
def test_header_that_asks_for_gigabytes_is_named(sample: SampleFiles, check: Callable[[SampleFiles], Any]) -> None:
    sample.rgb.write_bytes(resized_header(encoded(np.zeros((4, 4, 3), dtype=np.uint8), "JPEG"), 65000, 65000))
    with pytest.raises(InputError, match=r"rgb\.png: Image size \(4225000000 pixels\) exceeds limit"):
        check(sample)


def test_rgb_resize_is_antialiased() -> None:
    stripes = np.zeros((8, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    inner = resize_rgb(stripes, 2, 8)[:, 1:-1]
    assert np.abs(inner.astype(int) - 127).max() < 10


@pytest.mark.parametrize("size", [(5, 7), (16, 32), (40, 9)])
def test_resize_of_targets_agrees_with_pil_nearest(size: tuple[int, int]) -> None:
    depth = np.random.default_rng(0).integers(0, 65536, (16, 32)).astype(np.uint16)
    expected = Image.fromarray(depth).resize(size[::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(nearest(depth, *size), expected)
