"""Photos with an EXIF orientation: wherever an image is read, it is read as viewers and labelling tools show it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from helpers.training import TASKS
from mtunet_dist import predict
from mtunet_dist.config import Config, DataConfig
from mtunet_dist.data.loader import make_loader
from mtunet_dist.data.order import EvalOrder
from mtunet_dist.errors import InputError
from mtunet_dist.prepare import prepare
from mtunet_dist.sources._images import RGB, check_headers, decode, read_images
from mtunet_dist.sources._source import SampleFiles
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.segmentation import Segmentation
from mtunet_dist.train import train

PARTS = {"rgb": RGB, "label": Segmentation.IMAGE, "depth": Depth.IMAGE}
ORIENTATION = 0x0112
ORIENTATIONS = range(1, 9)
HEIGHT, WIDTH = 32, 48  # as shown
FORMAT: Any = pytest.mark.parametrize("file_format", ["JPEG", "PNG"])


def shown() -> np.ndarray:
    """Smooth, so that JPEG changes little; no symmetry."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([5 * x, 7 * y, 2 * (x + y)], axis=2).astype(np.uint8)


def stored(pixels: np.ndarray, orientation: int, file_format: str) -> bytes:
    """A file whose pixels lie as a camera of this ``orientation`` stores them, and that says so."""
    exif, file = Image.Exif(), io.BytesIO()
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    exif[ORIENTATION] = inverse
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(file))
    out = io.BytesIO()
    exif[ORIENTATION] = orientation
    turned.save(out, file_format, exif=exif, **({"quality": 98} if file_format == "JPEG" else {}))
    return out.getvalue()


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and float(np.abs(a.astype(int) - b).mean()) < 3


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("orientation", [*ORIENTATIONS, 0, 9])
def test_every_part_is_read_as_pil_would_show_it(part: str, orientation: int) -> None:
    random = np.random.default_rng(0)
    dtype, shape = (np.uint16, (4, 6)) if part == "depth" else (np.uint8, (4, 6, 3)[: 3 if part == "rgb" else 2])
    pixels = random.integers(0, 256, shape).astype(dtype)
    exif, file = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file))).astype(dtype)
    found = decode(file.getvalue(), PARTS[part], "x")
    assert found.dtype == dtype and found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


@FORMAT
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kept", ["shards", "source"])
def test_a_turned_photo_is_prepared_and_trained_on_as_its_label_lies(
    tmp_path: Path, file_format: str, orientation: int, kept: Literal["shards", "source"]
) -> None:
    """In shards and left in the source, by every loader."""
    for part in PARTS:
        (tmp_path / "source" / "train" / part).mkdir(parents=True)
    folder, suffix = tmp_path / "source" / "train", {"JPEG": "jpg", "PNG": "png"}[file_format]
    (folder / "rgb" / f"x.{suffix}").write_bytes(stored(shown(), orientation, file_format))
    label = (shown()[..., 0] > 100).astype(np.uint8)
    Image.fromarray(label).save(folder / "label" / "x.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 9, dtype=np.uint16)).save(folder / "depth" / "x.png")
    (tmp_path / "source" / "dataset.yaml").write_text("classes: [a, b]\n")
    made = prepare("folder", tmp_path / "source", tmp_path / "out", height=HEIGHT, width=WIDTH, workers=0, stored=kept)
    split = made.split("train")
    for options in ({"loader": "dali"}, {"loader": "torch", "threads": 1}, {"cache": "host"}):
        if options == {"loader": "torch", "threads": 1} and orientation != 6:
            continue  # a process for it takes seconds
        config = DataConfig(root="", **options)  # type: ignore[arg-type]
        (batch,) = make_loader(config, split, EvalOrder(1, batch_size=1), torch.device("cpu")).batches()
        assert near(batch["image"][0].permute(1, 2, 0).numpy(), shown()), options
        assert np.array_equal(batch["segmentation"][0].numpy(), label)


@FORMAT
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_sizes_are_compared_as_shown(tmp_path: Path, file_format: str, orientation: int) -> None:
    def check_and_read() -> None:
        check_headers(sample, targets)
        read_images(sample, targets, {"segmentation": np.zeros(256, dtype=np.int16)})

    targets = {task.name: task for task in TASKS}
    sample = SampleFiles("x", tmp_path / "x.img", {"segmentation": tmp_path / "x.png"})
    sample.rgb.write_bytes(stored(shown(), orientation, file_format))
    Image.fromarray(np.zeros((HEIGHT, WIDTH), dtype=np.uint8)).save(sample.targets["segmentation"])
    check_and_read()
    Image.fromarray(np.zeros((WIDTH, HEIGHT), dtype=np.uint8)).save(sample.targets["segmentation"])
    with pytest.raises(InputError, match="rgb 48x32, label 32x48, each turned as its EXIF orientation says"):
        check_and_read()


@FORMAT
def test_predict_gives_what_a_viewer_shows(
    tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    config = make_config("epochs=1")
    train(config)
    (tmp_path / "photos").mkdir()
    suffix = {"JPEG": "jpg", "PNG": "png"}[file_format]
    for orientation in ORIENTATIONS:
        (tmp_path / "photos" / f"{orientation}.{suffix}").write_bytes(stored(shown(), orientation, file_format))
    words = ["predict", config.run_dir, str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--device=cpu"]
    monkeypatch.setattr(sys, "argv", words)
    predict.main()
    upright = np.asarray(Image.open(tmp_path / "out" / "1.depth.png")).astype(int)
    for orientation in ORIENTATIONS:
        depth = np.asarray(Image.open(tmp_path / "out" / f"{orientation}.depth.png")).astype(int)
        assert depth.shape == (HEIGHT, WIDTH)
        assert np.abs(depth - upright).mean() < 0.02 * upright.mean()
        assert Image.open(tmp_path / "out" / f"{orientation}.label.png").size == (WIDTH, HEIGHT)
