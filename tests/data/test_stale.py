"""A source that changes after it was prepared: found by every verb that could go on from what was prepared before."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from mtunet_dist.data.cached_loader import _content
from mtunet_dist.data.prepared import PreparedDataset, verify, verify_sums
from mtunet_dist.errors import InputError
from mtunet_dist.plugins import build
from mtunet_dist.prepare import prepare
from mtunet_dist.sources import nyuv2_mat

SETTINGS: dict[str, Any] = {"height": 16, "width": 32, "shard_size": 4, "workers": 0}
Change = Callable[[Path], None]


@pytest.fixture
def source(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.parent / "source", tmp_path / "source"))


def edit_label(source: Path) -> None:
    """Of the same size in bytes: the file is not compressed."""
    file = source / "train" / "label" / "005.png"
    Image.fromarray(np.asarray(Image.open(file)) % 2).save(file, compress_level=0)


def edit_rgb(source: Path) -> None:
    Image.fromarray(255 - np.asarray(Image.open(source / "val/rgb/001.png"))).save(source / "val/rgb/001.png")


def add_sample(source: Path) -> None:
    for part in ("rgb", "label", "depth"):
        shutil.copy2(source / "train" / part / "003.png", source / "train" / part / "0035.png")


def add_to_the_end(source: Path) -> None:
    for part in ("rgb", "label", "depth"):
        shutil.copy2(source / "val" / part / "003.png", source / "val" / part / "999.png")


def remove_sample(source: Path) -> None:
    for part in ("rgb", "label", "depth"):
        (source / "train" / part / "011.png").unlink()


def remove_label(source: Path) -> None:
    (source / "train" / "label" / "002.png").unlink()


def add_split(source: Path) -> None:
    shutil.copytree(source / "val", source / "test")


def remove_split(source: Path) -> None:
    shutil.rmtree(source / "val")


def edit_void(source: Path) -> None:
    (source / "dataset.yaml").write_text("classes: [floor, wall, box]\nvoid_ids: [255, 9]\n")


def edit_names(source: Path) -> None:
    (source / "dataset.yaml").write_text("classes: [ground, wall, box]\n")


def edit_scale(source: Path) -> None:
    (source / "dataset.yaml").write_text("classes: [floor, wall, box]\ndepth_scale: 1e-2\n")


CHANGES = [
    edit_label,
    edit_rgb,
    add_sample,
    add_to_the_end,
    remove_sample,
    remove_label,
    add_split,
    remove_split,
    edit_void,
    edit_names,
    edit_scale,
]
OPENS = [add_sample, add_to_the_end, add_split]  # the samples that were prepared are as they were


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != "dataset.json"}


def prepare_in(source: Path, out: Path, stored: str) -> PreparedDataset:
    return prepare("folder", source, out, **SETTINGS, stored=stored)  # type: ignore[arg-type]


@pytest.mark.parametrize("stored", ["shards", "source"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found_and_taken_up(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change, stored: str
) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    edit_label(source)  # uncompressed from the beginning
    prepare_in(source, out, stored)
    verify(out)
    change(source)
    with pytest.raises(InputError, match="prepare it again"):
        verify(out)
    capsys.readouterr()
    again = prepare_in(source, out, stored)
    assert "was complete, but " in capsys.readouterr().out
    new = prepare_in(source, fresh, stored)
    assert (contents(out), again.info.splits) == (contents(fresh), new.info.splits)
    assert again.info.targets == new.info.targets
    verify(out)
    prepare_in(source, out, stored)
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("change", CHANGES)
def test_samples_left_in_a_source_are_not_trained_on_once_they_have_changed(
    source: Path, tmp_path: Path, change: Change
) -> None:
    edit_label(source)
    dataset = prepare_in(source, tmp_path / "out", "source")
    dataset.split("train+val")
    change(source)
    if change in OPENS:
        assert len(dataset.split("train+val")) == 17
    else:
        with pytest.raises(InputError, match="prepare it again"):
            dataset.split("train+val")


def test_only_shards_of_changed_files_are_made_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare_in(source, out, "shards")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    edit_label(source)
    capsys.readouterr()
    prepare_in(source, out, "shards")
    printed = capsys.readouterr().out
    assert f"{source / 'train/label/005.png'} has changed: what has changed is made again" in printed
    assert "4 of 5 shards are there from an earlier run" in printed
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert [name for name in before if before[name] != after[name]] == ["train-00001.tar"]


@pytest.mark.parametrize("stored", ["shards", "source"])
def test_a_description_that_changes_before_the_end_counts_too(source: Path, tmp_path: Path, stored: str) -> None:
    """Shards of an unfinished run were taken over by the times of their images alone."""
    out, file = tmp_path / "out", source / "val" / "rgb" / "001.png"
    good = file.read_bytes()
    file.write_bytes(good[:-20])
    with pytest.raises(InputError, match="corrupt"):
        prepare_in(source, out, stored)
    file.write_bytes(good)
    (source / "dataset.yaml").write_text("classes: [wall, box]\nlabel_offset: 1\nvoid_ids: [0, 255]\n")
    again, new = prepare_in(source, out, stored), prepare_in(source, tmp_path / "fresh", stored)
    assert again.info.splits == new.info.splits


def test_the_one_file_of_nyuv2_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds all samples, which name no file of their own."""
    count, (width, height) = nyuv2_mat.COUNT, (4, 3)
    shapes = {"images": (count, 3, width, height), "labels": (count, width, height), "depths": (count, width, height)}
    types = {"images": np.uint8, "labels": np.uint16, "depths": np.float32}
    monkeypatch.setattr(nyuv2_mat, "DATASETS", {key: (shapes[key], types[key]) for key in shapes})

    def write(depth: float) -> None:
        with h5py.File(tmp_path / nyuv2_mat.FILE, "w") as file:
            for key, shape in shapes.items():
                file[key] = np.full(shape, depth if key == "depths" else 1, dtype=types[key])

    write(1.0)
    for stored in ("shards", "source"):
        make = functools.partial(prepare, "nyuv2_mat", tmp_path / nyuv2_mat.FILE, tmp_path.parent / f"{stored} of mat")
        write(1.0)
        make(height=3, width=4, workers=0, shard_size=900, stored=stored)
        write(2.0)
        with pytest.raises(InputError, match="prepare it again"):
            verify(tmp_path.parent / f"{stored} of mat")
        again = make(height=3, width=4, workers=0, shard_size=900, stored=stored)
        assert again.info.targets["depth"].statistics(again.info.splits["train"].targets["depth"])[0] == 2.0


def test_a_source_that_is_gone_is_no_change(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_in(source, tmp_path / "out", "shards")
    source.rename(tmp_path / "elsewhere")
    verify(tmp_path / "out")
    capsys.readouterr()
    prepare_in(source, tmp_path / "out", "shards")
    assert f"out is complete; {source}, which it was made from, is not there" in capsys.readouterr().out


@pytest.mark.parametrize("stored", ["shards", "source"])
def test_a_dataset_that_does_not_say_what_it_was_made_from_is_complete(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stored: str
) -> None:
    """As those of earlier versions."""
    out = tmp_path / "out"
    prepare_in(source, out, stored)
    for sidecar in out.glob("*.done"):
        sidecar.unlink()
    value = json.loads((out / "dataset.json").read_text())
    for split in value["splits"].values():
        for shard in split["shards"]:
            del shard["source"]
    (out / "dataset.json").write_text(json.dumps(value))
    verify(out)
    edit_void(source)
    capsys.readouterr()
    assert len(prepare_in(source, out, stored).split("train")) == 12
    assert "is complete" in capsys.readouterr().out
    verify_sums(out)


def test_a_memory_copy_of_samples_left_in_a_source_is_that_of_their_files(source: Path, tmp_path: Path) -> None:
    """Even of a dataset that does not say what it was made from."""
    out = tmp_path / "out"
    prepare_in(source, out, "source")
    value = json.loads((out / "dataset.json").read_text())
    for split in value["splits"].values():
        for shard in split["shards"]:
            del shard["source"]
    (out / "dataset.json").write_text(json.dumps(value))
    before = PreparedDataset(out).split("train")
    key = _content(before)
    file = source / "train" / "rgb" / "000.png"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    after = PreparedDataset(out).split("train")
    assert after.fingerprint == before.fingerprint and _content(after) != key


@pytest.mark.parametrize("name", ["cityscapes", "folder", "mtan", "nyuv2", "nyuv2_mat"])
def test_every_source_says_what_its_samples_depend_on(tmp_path: Path, name: str) -> None:
    (tmp_path / "dataset.yaml").write_text("classes: [a]\n")
    (tmp_path / nyuv2_mat.FILE).touch()
    first, second = (repr(build("source", {"name": name}, tmp_path).stamp) for _ in range(2))
    assert first == second and "0x" not in first  # no address, which differs from process to process
