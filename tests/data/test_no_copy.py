"""A dataset whose samples stay in the source: what each loader gives of it, and what of a source that changes."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.training import MakeConfig, assert_same_state, final_state
from mtunet_dist.data.loader import make_loader
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset, verify
from mtunet_dist.errors import InputError
from mtunet_dist.prepare import prepare
from mtunet_dist.runs import checkpoint
from mtunet_dist.train import train

SIZE = {"height": 16, "width": 32}  # smaller than the source's 32x48: every read resizes


@pytest.fixture
def source(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.parent / "source", tmp_path / "source"))


@pytest.fixture
def listed(source: Path, tmp_path: Path) -> Path:
    """The dataset, its samples left in ``source``."""
    prepare("folder", source, tmp_path / "listed", **SIZE, shard_size=5, stored="source")
    return tmp_path / "listed"


def test_it_is_the_dataset_that_lossless_shards_hold(listed: Path, source: Path, tmp_path: Path) -> None:
    prepare("folder", source, tmp_path / "shards", **SIZE, rgb_format="png")
    here, there = PreparedDataset(listed), PreparedDataset(tmp_path / "shards")
    assert not list(listed.glob("*.tar"))
    for name, split in there.info.splits.items():
        figures = [f for f in vars(split) if f != "shards"]
        assert {f: getattr(here.info.splits[name], f) for f in figures} == {f: getattr(split, f) for f in figures}
    a, b = here.split("train+val"), there.split("train+val")
    assert a.keys == b.keys
    for i in range(len(b)):
        here_raw, there_raw = a.decode(i), b.decode(i)
        assert np.array_equal(here_raw.rgb, there_raw.rgb)
        for name in ("segmentation", "depth"):
            assert np.array_equal(here_raw.targets[name], there_raw.targets[name])


@pytest.mark.parametrize("change", [{"loader": "dali"}, {"loader": "torch"}, {"cache": "host"}])
def test_every_loader_gives_its_samples(
    listed: Path, make_config: MakeConfig, change: dict[str, Any], source: Path
) -> None:
    split = PreparedDataset(listed).split("train")
    words = [f"data.{key}={value}" for key, value in change.items()]
    config = make_config(f"data.root={listed}", *words)
    order = TrainOrder(len(split), batch_size=4)
    batches = make_loader(config.data, split, order, torch.device("cpu")).batches(start=2)
    for batch, index in zip(itertools.islice(batches, 3), itertools.count(2), strict=False):
        positions = order.plan(index).samples.tolist()
        assert batch["sample"].tolist() == positions
        for row, i in enumerate(positions):
            # Straight from the files: every second row and the middle of every 1.5 columns.
            label = np.asarray(Image.open(source / "train" / "label" / f"{i:03d}.png"))
            depth = np.asarray(Image.open(source / "train" / "depth" / f"{i:03d}.png"))
            rows, columns = np.arange(16) * 2 + 1, ((np.arange(32) + 0.5) * 1.5).astype(int)
            assert np.array_equal(batch["segmentation"][row].numpy(), label[rows][:, columns])
            expected = depth[rows][:, columns].astype(np.float32) * np.float32(0.001)
            np.testing.assert_allclose(batch["depth"][row, 0].numpy(), expected, rtol=1e-6)
            assert np.array_equal(batch["image"][row].permute(1, 2, 0).numpy(), split.decode(i).rgb)


@pytest.mark.parametrize("loader", ["dali", "torch"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_file_damaged_after_preparing_is_named_or_skipped(
    listed: Path, source: Path, make_config: MakeConfig, loader: str, on_error: str
) -> None:
    file = source / "train" / "rgb" / "007.png"
    data = bytearray(file.read_bytes())
    data[60:90] = bytes(byte ^ 0xFF for byte in data[60:90])  # the same size
    before = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk damages it: nobody wrote to it
    with pytest.raises(InputError, match=r"007\.png"):
        verify(listed)
    config = make_config(f"data.root={listed}", f"data.loader={loader}", f"data.on_error={on_error}", "epochs=1")
    if on_error == "stop":
        with pytest.raises(InputError, match=r"007\.png: corrupt image"):
            train(config)
    else:
        with pytest.warns(UserWarning, match=r"skipped: .*007\.png"):
            train(config)
        assert final_state(config.run_dir)["step"] == 3


def _remove(file: Path) -> None:
    for part in ("rgb", "label", "depth"):
        (file.parent.parent / part / file.name).unlink()


def _lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize(("change", "words"), [(_remove, "sample 003 has gone"), (_lengthen, "003 in .* have changed")])
def test_a_source_that_has_changed_is_refused(
    listed: Path, source: Path, change: Callable[[Path], None], words: str
) -> None:
    verify(listed)
    change(source / "train" / "rgb" / "003.png")
    with pytest.raises(InputError, match=words):
        PreparedDataset(listed).split("train")


def test_after_a_bad_sample_only_its_shard_is_read_again(source: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", source / "train" / "depth" / "007.png"
    good = file.read_bytes()
    file.write_bytes(good[:-20])
    with pytest.raises(InputError, match=r"007\.png: corrupt image"):
        prepare("folder", source, out, **SIZE, shard_size=5, stored="source")
    assert sorted(p.name for p in out.glob("*.list")) == ["train-00000.list", "train-00002.list", "val-00000.list"]
    before = (out / "train-00000.list").stat().st_ino
    file.write_bytes(good)
    prepare("folder", source, out, **SIZE, shard_size=5, stored="source")
    assert (out / "train-00000.list").stat().st_ino == before
    verify(out)


def test_training_resumes_with_the_same_bits(listed: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    settings = [f"data.root={listed}", "data.augment.flip=true", "checkpoint.every_steps=2", "checkpoint.keep=9"]
    whole, again = (make_config(*settings, f"run_dir={tmp_path / name}") for name in ("whole", "again"))
    train(whole)
    shutil.copytree(whole.run_dir, again.run_dir)
    for path in checkpoint.by_age(Path(again.run_dir) / "checkpoints")[:-1]:
        path.unlink()
    train(again)
    assert_same_state(final_state(again.run_dir), final_state(whole.run_dir))
