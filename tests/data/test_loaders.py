"""All loaders give the same batches, in our order, from any start, and past samples that cannot be decoded."""

from __future__ import annotations

import itertools
import multiprocessing
import re
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def

from helpers.training import final_state, on_two_ranks, records, train_each
from mtunet_dist.config import Config, DaliConfig, DataConfig
from mtunet_dist.core.step import Batch
from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.dali import DaliLoader, _mixed_options
from mtunet_dist.data.loader import make_loader
from mtunet_dist.data.order import EvalOrder, Order, Plan, TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError
from mtunet_dist.runs.baselines import ConstantPredictor
from mtunet_dist.runs.evaluation import evaluate
from mtunet_dist.system.preemption import SIGNALS
from mtunet_dist.tasks.segmentation import VOID
from mtunet_dist.train import train

CPU = torch.device("cpu")
LOADERS = ("dali", "torch", "cache")


def config_of(loader: str, **options: Any) -> DataConfig:
    """A config of one of LOADERS; torch decodes in this process, not in workers that take seconds to start."""
    named = {"cache": "host"} if loader == "cache" else {"loader": loader}
    return DataConfig(**{"root": "", "threads": 0 if loader == "torch" else 1, **named, **options})


def take(
    dataset: PreparedDataset,
    loader: str,
    order: Order,
    n: int,
    *,
    start: int = 0,
    split: str = "train",
    augmentation: Augmentation | None = None,
    **options: Any,
) -> list[Batch]:
    config = config_of(loader, **options)
    batches = make_loader(config, dataset.split(split), order, CPU, augmentation).batches(start)
    return list(itertools.islice(batches, n))


def augmented(dataset: PreparedDataset) -> Augmentation:
    info = dataset.info
    return Augmentation(info.height, info.width, flip=True, scales=(1.0, 1.2, 1.5), seed=3)


def assert_equal(a: Batch, b: Batch, image_tolerance: int = 0) -> None:
    assert a.keys() == b.keys()
    for key in ("segmentation", "depth", "sample"):
        assert torch.equal(a[key], b[key]), key
    assert (a["image"].int() - b["image"].int()).abs().max() <= image_tolerance


def test_batches_have_the_promised_types_and_layout(dataset: PreparedDataset) -> None:
    for loader in LOADERS:
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
            assert torch.equal(batch["segmentation"][n], torch.from_numpy(raw.targets["segmentation"].copy()))
            expected = torch.from_numpy(raw.targets["depth"].astype("float32")) * torch.tensor(0.001)
            assert torch.equal(batch["depth"][n, 0], expected)


AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "flip": {"flip": True},
    "zoom": {"scales": (1.0, 1.2, 1.5)},
    "zoom always": {"scales": (1.3,)},
    "colors": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "all": {"flip": True, "scales": (1.0, 1.2, 1.5), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_loaders_agree(dataset: PreparedDataset, name: str) -> None:
    info, order = dataset.info, TrainOrder(12, batch_size=4, seed=1)
    augmentation = Augmentation(info.height, info.width, seed=3, **AUGMENTATIONS[name])
    used = augmentation if augmentation.changes else None
    dali, torch_, cached = (take(dataset, loader, order, 9, augmentation=used) for loader in LOADERS)
    # Linear interpolation and colours are rounded differently.
    tolerance = int(augmentation.zooms or augmentation.colors)
    for a, b, c in zip(dali, torch_, cached, strict=True):
        assert_equal(a, b, image_tolerance=tolerance)
        assert_equal(b, c)
    plain = take(dataset, "dali", order, 9)
    changed = [not torch.equal(x["image"], y["image"]) for x, y in zip(dali, plain, strict=True)]
    assert any(changed) == augmentation.changes


def test_augmentation_moves_image_label_and_depth_together(dataset: PreparedDataset) -> None:
    """The red boxes of the tiny dataset are class 2, so after any augmentation red pixels still are."""
    for batch in take(dataset, "dali", TrainOrder(12, batch_size=4), 6, augmentation=augmented(dataset)):
        red = (batch["image"][:, 0] > 150) & (batch["image"][:, 1] < 80)
        assert red.sum() > 50
        assert (batch["segmentation"][red] == 2).float().mean() > 0.97


@pytest.mark.parametrize("loader", LOADERS)
def test_starting_in_the_middle_continues_the_same_sequence(dataset: PreparedDataset, loader: str) -> None:
    order, augmentation = TrainOrder(12, batch_size=4, seed=2), augmented(dataset)
    whole = take(dataset, loader, order, 8, augmentation=augmentation)
    rest = take(dataset, loader, order, 3, start=5, augmentation=augmentation)
    for a, b in zip(whole[5:], rest, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize(("loader", "few"), [("dali", 1), ("torch", 0), ("cache", 1)])
def test_threads_and_prefetch_do_not_change_the_batches(dataset: PreparedDataset, loader: str, few: int) -> None:
    order, augmentation = TrainOrder(12, batch_size=4), augmented(dataset)
    one = take(dataset, loader, order, 6, augmentation=augmentation, threads=few, prefetch=1)
    two = take(dataset, loader, order, 6, augmentation=augmentation, threads=2, prefetch=4)
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


def broken_copy(dataset: PreparedDataset, folder: Path, broken: dict[int, str]) -> PreparedDataset:
    """A copy of the dataset in which these training samples have a broken part."""
    copy = shutil.copytree(dataset.root, folder / "copy")
    for i, part in broken.items():
        data = dataset.split("train").stored(i)[part].tobytes()
        shard = copy / f"train-{i // 4:05d}.tar"
        keep = 0 if part == "rgb" else 45  # bytes; DALI finds the one by the header, the other when decoding
        shard.write_bytes(shard.read_bytes().replace(data, data[:keep] + bytes(len(data) - keep)))
    return PreparedDataset(copy)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("batch", [0, 2])
def test_a_corrupt_sample_is_named(dataset: PreparedDataset, tmp_path: Path, loader: str, batch: int) -> None:
    order = TrainOrder(12, batch_size=4)
    bad = int(order.plan(batch).samples[2])
    copy = broken_copy(dataset, tmp_path, {bad: "rgb"})
    if loader != "cache":  # which finds it at once
        assert len(take(copy, loader, order, batch)) == batch
    with pytest.raises(InputError, match=rf"{bad:03d} in .*train-{bad // 4:05d}\.tar"):
        take(copy, loader, order, 3)


@pytest.mark.parametrize(
    ("loader", "prefetch"), [("dali", 1), ("dali", 2), ("dali", 3), ("dali", 4), ("torch", 2), ("cache", 2)]
)
def test_broken_samples_are_skipped_and_all_else_stays_in_place(
    dataset: PreparedDataset, tmp_path: Path, loader: str, prefetch: int
) -> None:
    """One in the first batch, two in the next, and a batch with nothing good; over two epochs, with augmentation."""
    order, augmentation = TrainOrder(12, batch_size=4, seed=1), augmented(dataset)
    first, second, third = (order.plan(i).samples.tolist() for i in range(3))
    parts = itertools.cycle(["rgb", "segmentation", "depth"])
    broken = dict(zip([first[0], second[1], second[3], *third], parts, strict=False))
    copy = broken_copy(dataset, tmp_path, broken)
    config = config_of(loader, on_error="skip", prefetch=prefetch)
    with pytest.warns(UserWarning, match="skipped: ") as warned:
        made = make_loader(config, copy.split("train"), order, CPU, augmentation)
        batches = list(itertools.islice(made.batches(), 6))
    named = sorted(re.search(r" of (\d+) in ", str(w.message))[1] for w in warned)  # type: ignore[index]
    assert named == sorted(f"{i:03d}" for i in broken)
    assert made.skipped == 2 * len(broken)
    intact = take(dataset, loader, order, 6, augmentation=augmentation)
    for a, b in zip(batches, intact, strict=True):
        assert a["image"].shape == b["image"].shape
        assert a["sample"].tolist() == b["sample"].tolist()
        for n, i in enumerate(a["sample"].tolist()):
            if i in broken:
                assert (a["segmentation"][n] == VOID).all()
                assert (a["depth"][n] == 0).all()
            else:
                assert all(torch.equal(a[key][n], b[key][n]) for key in a)
        good = [i not in broken for i in a["sample"].tolist()]
        assert (a["image"].flatten(1).float().std(1) > 0).all() == any(good)
    if loader == "dali":
        reference = take_skipping(copy, "torch", order, 6, augmentation)
        for a, b in zip(batches, reference, strict=True):
            assert_equal(a, b, image_tolerance=1)


def take_skipping(
    dataset: PreparedDataset, loader: str, order: Order, n: int, augmentation: Augmentation
) -> list[Batch]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return take(dataset, loader, order, n, augmentation=augmentation, on_error="skip")


@pytest.mark.parametrize("loader", LOADERS)
def test_skipped_samples_add_nothing_to_metrics_and_losses(
    dataset: PreparedDataset, tmp_path: Path, loader: str
) -> None:
    """Evaluating with two broken samples gives the figures of the other ten."""
    copy = broken_copy(dataset, tmp_path, {5: "depth", 9: "rgb"})
    split, tasks = copy.split("train"), dataset.info.tasks(["segmentation", "depth"])
    predictor = ConstantPredictor(tasks, split, "skip")
    config = config_of(loader, on_error="skip")
    with pytest.warns(UserWarning, match="skipped"):
        whole = evaluate(predictor, make_loader(config, split, EvalOrder(12, batch_size=1), CPU), CPU)
    order = Listed([i for i in range(12) if i not in (5, 9)])
    rest = evaluate(predictor, make_loader(config, split, order, CPU), CPU) if loader != "cache" else None
    expected = rest or evaluate(predictor, make_loader(config_of("torch"), split, order, CPU), CPU)
    assert whole.metrics == pytest.approx(expected.metrics, rel=1e-12)


class Listed:
    """These samples, one to a batch."""

    def __init__(self, samples: list[int]) -> None:
        self.samples, self.batches = samples, len(samples)

    def plan(self, index: int) -> Plan:
        return Plan(0, np.array([self.samples[index]]))


def test_an_error_that_no_sample_explains_is_not_swallowed(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that DALI refuses although every sample decodes."""
    split = dataset.split("train")
    junk = np.zeros(100, dtype=np.uint8)
    target = np.zeros((32, 48, 1), dtype=np.uint8)
    columns = [junk, target, target.astype(np.uint16)]
    monkeypatch.setattr(DaliLoader, "_parts", lambda self, index, samples: [[x] * len(samples) for x in columns])
    loader = make_loader(config_of("dali", on_error="skip"), split, TrainOrder(12, batch_size=4), CPU)
    with pytest.raises(RuntimeError, match=r"DALI|pipeline"):
        next(loader.batches())
    assert loader.skipped == 0


def test_two_ranks_train_past_a_broken_sample(
    dataset: PreparedDataset, tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    """With each loader; the rank that has the sample and the one that has not go on together."""
    copy = broken_copy(dataset, tmp_path, {3: "rgb"})
    words = {"dali": [], "torch": ["data.loader=torch", "data.threads=1"], "cache": ["data.cache=host"]}
    common = [f"data.root={copy.root}", "data.on_error=skip", "epochs=1", "log.pictures=0"]
    configs = [make_config(*common, f"run_dir={tmp_path / name}", *words[name]) for name in LOADERS]
    on_two_ranks(train_each, configs)
    for config in configs:
        state = final_state(config.run_dir)
        assert state["step"] == 3
        assert records(config.run_dir, "train")[-1]["skipped"] == 1
        assert all(torch.isfinite(v).all() for v in state["strategy"]["model"].values())


def test_a_request_to_stop_does_not_end_the_processes_that_decode(dataset: PreparedDataset) -> None:
    """Slurm sends it to every process of a job; the batches until the next report are still needed."""
    split = dataset.split("train")
    batches = make_loader(config_of("torch", threads=1), split, TrainOrder(12, batch_size=4), CPU, None).batches()
    next(batches)
    (child,) = multiprocessing.active_children()
    for number in SIGNALS:
        subprocess.run(["kill", f"-{int(number)}", str(child.pid)], check=True)
    assert len(list(itertools.islice(batches, 9))) == 9
    with suppress(RuntimeError):  # of torch's handler of SIGCHLD, where it is quicker
        child.terminate()  # as Python does at its own end, and then it waits
        child.join(60)
    child.join(60)
    assert child.exitcode == 128 + signal.SIGTERM


def test_training_does_not_depend_on_threads_and_prefetch(make_config: Callable[..., Config], tmp_path: Path) -> None:
    weights = []
    for threads, prefetch in ((1, 1), (3, 4)):
        run_dir = tmp_path / f"{threads}"
        more = ["data.augment.flip=true", "data.augment.scales=[1.0,1.2]", "data.augment.hue=0.1"]
        train(make_config(*more, f"run_dir={run_dir}", f"data.threads={threads}", f"data.prefetch={prefetch}"))
        state = final_state(run_dir)
        weights.append(state["strategy"]["model"])
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_options_of_the_gpu_decoder_are_known_to_dali() -> None:
    """DALI checks their names and types when a graph is made, GPU or not."""

    def make(**options: Any) -> None:
        graph = pipeline_def(lambda: fn.decoders.image(fn.external_source(name="x"), device="mixed", **options))
        graph(batch_size=1, num_threads=1, device_id=0)

    make(**_mixed_options(128, 256, DaliConfig(hw_decoder_load=0.5, affinity=True)))
    for wrong in ({"hw_decoder_lod": 0.5}, {"hw_decoder_load": "x"}):
        with pytest.raises((KeyError, ValueError)):
            make(**wrong)
