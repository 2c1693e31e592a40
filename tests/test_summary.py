"""The summary of a prepared dataset: its figures, and that the picture shows what is in it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtunet_dist import summary
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.runs.baselines import tally


def test_the_histogram_counts_every_pixel_of_a_small_split(dataset: PreparedDataset) -> None:
    split = dataset.split("train+val")
    counts = tally([split.targets["depth"]], split, summary.SAMPLES)["depth"]
    depths = np.concatenate([split.decode(i).targets["depth"].reshape(-1) for i in range(len(split))])
    assert counts.sum() == (depths > 0).sum() > 0
    assert counts[0] == 0
    assert counts[5000] == (depths == 5000).sum()


def test_the_sheet_shows_each_split_with_image_label_and_depth(dataset: PreparedDataset) -> None:
    sheet = summary.sample_sheet(dataset)
    tile = np.asarray(dataset.split("val").decode(0).rgb)
    height, width, _ = tile.shape
    found = np.lib.stride_tricks.sliding_window_view(sheet, (height, width, 3))[:, :, 0]
    assert (found == tile).all(axis=(2, 3, 4)).sum() == 1
    assert sheet.shape[0] > 6 * height  # image, label and depth of two splits


def test_the_command_prints_and_draws(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["summary", str(prepared), "--out", str(out)])
    summary.main()
    printed = capsys.readouterr().out
    for word in ("train", "val", "12", "floor", "wall", "box", "void", "valid depth", str(out)):
        assert word in printed
    assert Image.open(out).width > 1000
