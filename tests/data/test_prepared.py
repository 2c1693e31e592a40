"""Reading a prepared dataset: byte spans, joined splits, pickling, and errors that name what is damaged."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mtunet_dist.data.prepared import PreparedDataset, verify
from mtunet_dist.errors import InputError


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared dataset, to be damaged."""
    return shutil.copytree(prepared, tmp_path / "copy")


def test_parts_are_the_bytes_of_the_tar_members(dataset: PreparedDataset) -> None:
    split = dataset.split("train")
    for i, key in enumerate(split.keys):
        with tarfile.open(dataset.root / split.shards[i // 4].file) as tar:
            for data, suffix in zip(split.stored(i).values(), ("rgb.jpg", "label.npy", "depth.npy"), strict=True):
                member = tar.extractfile(f"{key}.{suffix}")
                assert member is not None and data.tobytes() == member.read()
                assert data.dtype == np.uint8 and not data.flags.owndata


def test_splits_concatenate_in_the_order_given(dataset: PreparedDataset) -> None:
    both, train, val = (dataset.split(spec) for spec in ("val+train", "train", "val"))
    assert both.keys == val.keys + train.keys and len(both) == 17
    for i in range(17):
        expected = val.decode(i) if i < 5 else train.decode(i - 5)
        np.testing.assert_array_equal(both.decode(i).targets["depth"], expected.targets["depth"])
    assert both.describe(16) == f"011 in {dataset.root / 'train-00002.tar'}"


def test_fingerprint_differs_between_splits_and_their_order(dataset: PreparedDataset) -> None:
    assert len({dataset.split(spec).fingerprint for spec in ("train", "val", "train+val", "val+train")}) == 4
    assert dataset.split("train").fingerprint == dataset.split("train").fingerprint


@pytest.mark.parametrize("spec", ["test", "train+", "train+train"])
def test_wrong_split_lists_the_splits(dataset: PreparedDataset, spec: str) -> None:
    with pytest.raises(InputError, match="Available: train, val"):
        dataset.split(spec)


def test_a_split_pickles_without_its_maps(dataset: PreparedDataset) -> None:
    split = dataset.split("train")
    expected = [part.tobytes() for part in split.stored(3).values()]
    data = pickle.dumps(split)
    assert expected[0] not in data
    assert [part.tobytes() for part in pickle.loads(data).stored(3).values()] == expected


@pytest.mark.parametrize(("name", "part"), [("rgb", "rgb"), ("segmentation", "label"), ("depth", "depth")])
@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_one_changed_bit_is_named_by_part_shard_and_key(copy: Path, name: str, part: str, where: float) -> None:
    """Even where the file still decodes: in the middle of a JPEG, in an array."""
    split = PreparedDataset(copy).split("train")
    data = split.stored(5)[name].tobytes()
    changed = bytearray(data)
    changed[int(where * (len(data) - 1))] ^= 1
    shard = copy / "train-00001.tar"
    shard.write_bytes(shard.read_bytes().replace(data, changed))
    split = PreparedDataset(copy).split("train")
    split.decode(4)
    with pytest.raises(InputError, match=rf"{part} of 005 in .*train-00001\.tar is damaged: its checksum differs"):
        split.decode(5)


def test_opening_names_a_missing_and_a_short_shard(copy: Path) -> None:
    shard = copy / "val-00000.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(InputError, match=rf"val-00000\.tar: {len(data) - 1} bytes instead of {len(data)}"):
        PreparedDataset(copy)
    shard.unlink()
    with pytest.raises(InputError, match=r"val-00000\.tar: the shard is missing"):
        PreparedDataset(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1}', r"dataset\.json: format 1"),
        ('{"format": 2}', r"dataset\.json: damaged"),
        ('{"format": 3}', r"dataset\.json: damaged"),
        ('{"format": 4}', r"dataset\.json: format 4, but this version reads formats 2 and 3"),
        ("[]", r"dataset\.json: format None"),
        ("{", r"dataset\.json: damaged"),
    ],
)
def test_opening_names_a_foreign_or_damaged_description(copy: Path, text: str, message: str) -> None:
    (copy / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=message):
        PreparedDataset(copy)


def test_opening_a_folder_that_is_missing_or_incomplete(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        PreparedDataset(tmp_path / "nowhere")
    (copy / "dataset.json").unlink()
    with pytest.raises(InputError, match="copy is not a complete prepared dataset"):
        PreparedDataset(copy)


def test_damaged_index_is_named(copy: Path) -> None:
    path = copy / "train.index.json"
    index = json.loads(path.read_text())
    index["keys"].pop()
    for text, message in [(json.dumps(index), "lists 11 samples instead of 12"), ("{", "damaged"), ("{}", "0 samples")]:
        path.write_text(text)
        with pytest.raises(InputError, match=rf"train\.index\.json: .*{message}"):
            PreparedDataset(copy).split("train")


def test_verify_finds_a_changed_byte(copy: Path) -> None:
    assert verify(copy).info.splits["train"].count == 12
    shard = copy / "train-00001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    PreparedDataset(copy)
    with pytest.raises(InputError, match=r"train-00001\.tar: the checksum differs"):
        verify(copy)
