"""DALI and the torch reference give the same batches, in our order, from any start."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from mtunet_dist.config import DataConfig
from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.loader import make_loader
from mtunet_dist.data.order import EvalOrder, Order, TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError
from mtunet_dist.multitask import Batch

CPU = torch.device("cpu")


def take(
    dataset: PreparedDataset,
    loader: str,
    order: Order,
    n: int,
    *,
    start: int = 0,
    split: str = "train",
    augmentation: Augmentation | None = None,
    threads: int = 1,
    prefetch: int = 2,
) -> list[Batch]:
    config = DataConfig(root="", loader=loader, threads=0 if loader == "torch" else threads, prefetch=prefetch)  # type: ignore[arg-type]
    batches = make_loader(config, dataset.split(split), order, CPU, augmentation).batches(start)
    return list(itertools.islice(batches, n))


def augmented(dataset: PreparedDataset) -> Augmentation:
    info = dataset.info
    return Augmentation(info.height, info.width, info.depth.kind, flip=True, scales=(1.0, 1.2, 1.5), seed=3)


def assert_equal(a: Batch, b: Batch, image_tolerance: int = 0) -> None:
    assert a.keys() == b.keys()
    for key in ("segmentation", "depth", "sample"):
        assert torch.equal(a[key], b[key]), key
    assert (a["image"].int() - b["image"].int()).abs().max() <= image_tolerance


def test_batches_have_the_promised_types_and_layout(dataset: PreparedDataset) -> None:
    for loader in ("dali", "torch"):
        (batch,) = take(dataset, loader, TrainOrder(12, batch_size=4), 1)
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].shape == (4, 3, 32, 48)
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        assert (batch["segmentation"].dtype, batch["segmentation"].shape) == (torch.uint8, (4, 32, 48))
        assert (batch["depth"].dtype, batch["depth"].shape) == (torch.float32, (4, 1, 32, 48))
        assert (batch["sample"].dtype, batch["sample"].shape) == (torch.int64, (4,))


def test_dali_gives_what_is_stored(dataset: PreparedDataset) -> None:
    split = dataset.split("train")
    for batch in take(dataset, "dali", TrainOrder(12, batch_size=4), 3):
        for n, i in enumerate(batch["sample"].tolist()):
            raw = split.decode(i)
            assert torch.equal(batch["image"][n], torch.from_numpy(raw.rgb.copy()).permute(2, 0, 1))
            assert torch.equal(batch["segmentation"][n], torch.from_numpy(raw.label.copy()))
            expected = torch.from_numpy(raw.depth.astype("float32")) * torch.tensor(0.001)
            assert torch.equal(batch["depth"][n, 0], expected)


def test_dali_and_torch_agree(dataset: PreparedDataset) -> None:
    order = TrainOrder(12, batch_size=4, seed=1)
    pairs = zip(take(dataset, "dali", order, 7), take(dataset, "torch", order, 7), strict=True)
    for a, b in pairs:
        assert_equal(a, b)


def test_dali_and_torch_agree_under_augmentation(dataset: PreparedDataset) -> None:
    order, augmentation = TrainOrder(12, batch_size=4, seed=1), augmented(dataset)
    a = take(dataset, "dali", order, 9, augmentation=augmentation)
    b = take(dataset, "torch", order, 9, augmentation=augmentation)
    plain = take(dataset, "dali", order, 9)
    for x, y in zip(a, b, strict=True):
        assert_equal(x, y, image_tolerance=1)  # linear interpolation is rounded differently
    assert not all(torch.equal(x["image"], y["image"]) for x, y in zip(a, plain, strict=True))


def test_augmentation_moves_image_label_and_depth_together(dataset: PreparedDataset) -> None:
    """The red boxes of the tiny dataset are class 2, so after any augmentation red pixels still are."""
    for batch in take(dataset, "dali", TrainOrder(12, batch_size=4), 6, augmentation=augmented(dataset)):
        red = (batch["image"][:, 0] > 150) & (batch["image"][:, 1] < 80)
        assert red.sum() > 50
        assert (batch["segmentation"][red] == 2).float().mean() > 0.97


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_starting_in_the_middle_continues_the_same_sequence(dataset: PreparedDataset, loader: str) -> None:
    order, augmentation = TrainOrder(12, batch_size=4, seed=2), augmented(dataset)
    whole = take(dataset, loader, order, 8, augmentation=augmentation)
    rest = take(dataset, loader, order, 3, start=5, augmentation=augmentation)
    for a, b in zip(whole[5:], rest, strict=True):
        assert_equal(a, b)


def test_threads_and_prefetch_do_not_change_the_batches(dataset: PreparedDataset) -> None:
    order, augmentation = TrainOrder(12, batch_size=4), augmented(dataset)
    one = take(dataset, "dali", order, 6, augmentation=augmentation, threads=1, prefetch=1)
    two = take(dataset, "dali", order, 6, augmentation=augmentation, threads=3, prefetch=4)
    for a, b in zip(one, two, strict=True):
        assert_equal(a, b)


def test_evaluation_is_exactly_once_over_uneven_ranks(dataset: PreparedDataset) -> None:
    seen: list[int] = []
    for rank in range(4):  # 5 samples in batches of 2: ranks 0..2 have one batch, rank 3 none
        order = EvalOrder(5, batch_size=2, rank=rank, world_size=4)
        for batch in take(dataset, "dali", order, 9, split="val"):
            seen += batch["sample"].tolist()
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_a_loader_can_be_iterated_again(dataset: PreparedDataset) -> None:
    loader = make_loader(DataConfig(root=""), dataset.split("val"), EvalOrder(5, batch_size=2), CPU)
    first, second = list(loader.batches()), list(loader.batches())
    assert len(first) == len(second) == 3
    for a, b in zip(first, second, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("loader", ["dali", "torch"])
@pytest.mark.parametrize("batch", [0, 2])
def test_a_corrupt_sample_is_named(dataset: PreparedDataset, tmp_path: Path, loader: str, batch: int) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset.root, copy)
    order = TrainOrder(12, batch_size=4)
    bad = int(order.plan(batch).samples[2])
    shard = copy / f"train-{bad // 4:05d}.tar"
    data = bytearray(shard.read_bytes())
    start = data.find(dataset.split("train").parts(bad)[0].tobytes())
    data[start : start + 300] = bytes(300)
    shard.write_bytes(data)
    good = take(PreparedDataset(copy), loader, order, batch)
    assert len(good) == batch
    with pytest.raises(InputError, match=rf"{bad:03d} in .*train-{bad // 4:05d}\.tar"):
        take(PreparedDataset(copy), loader, order, 3)
