"""A tiny dataset that every test may use, and the smallest useful config over it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mtunet_dist.config import Config, load_config
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.prepare import prepare

torch.set_num_threads(1)  # as each rank has in these tests: with more, convolutions round differently

HEIGHT, WIDTH = 32, 48
COUNTS = {"train": 12, "val": 5}
CLASSES = ["floor", "wall", "box"]
LONGEST = [  # longest first
    *("test_slurm_real.py", "test_faults.py", "test_sweep.py", "test_slurm_hosts.py", "test_deepspeed.py"),
    *("test_interrupts.py", "test_reproduce.py", "test_launch_nodes.py", "test_sweep_workers.py"),
    *("test_benchmarks.py", "test_launch_local.py", "test_preemption.py", "test_resume.py"),
]


def write_folder_source(root: Path) -> None:
    """A folder source: a floor below a wall, and boxes of a tell-tale colour at random depths.

    How many pixels are void, how many invalid, differs from sample to sample.
    """
    random, holes = np.random.default_rng(0), np.random.default_rng(10)
    for split, count in COUNTS.items():
        for part in ("rgb", "label", "depth"):
            (root / split / part).mkdir(parents=True)
        for i in range(count):
            horizon = int(random.integers(10, 22))
            label = np.where(np.arange(HEIGHT)[:, None] < horizon, 1, 0).repeat(WIDTH, 1).astype(np.uint8)
            depth = np.where(label == 1, 6000, 5000 - 100 * np.arange(HEIGHT)[:, None]).astype(np.uint16)
            top, left = int(random.integers(0, 20)), int(random.integers(0, 36))
            box = np.s_[top : top + 10, left : left + 10]
            label[box], depth[box] = 2, int(random.integers(500, 3000))
            colors = np.array([[90, 90, 90], [160, 150, 120], [200, 40, 40]])[label]
            rgb = np.clip(colors + random.normal(0, 12, colors.shape), 0, 255).astype(np.uint8)
            pixel = np.arange(label.size).reshape(label.shape)
            void, invalid = holes.integers(300, size=2)
            label[(label != 2) & (pixel < void)], depth[pixel >= label.size - invalid] = 255, 0
            Image.fromarray(rgb).save(root / split / "rgb" / f"{i:03d}.png")
            Image.fromarray(label).save(root / split / "label" / f"{i:03d}.png")
            Image.fromarray(depth).save(root / split / "depth" / f"{i:03d}.png")
    (root / "dataset.yaml").write_text(yaml.safe_dump({"classes": CLASSES}), encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes that share the files end at about the same time if they begin with the longest."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Each test leaves the environment as it found it. A training sets variables for the processes that it starts."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset: 12 training and 5 validation samples of 32x48 in shards of 4."""
    folder = tmp_path_factory.mktemp("dataset")
    write_folder_source(folder / "source")
    prepare("folder", folder / "source", folder / "prepared", height=HEIGHT, width=WIDTH, shard_size=4, workers=0)
    return folder / "prepared"


@pytest.fixture(scope="session")
def three_splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of splits train, val and test, 12, 5 and 5 samples of 32x64, which every network takes."""
    folder = tmp_path_factory.mktemp("splits")
    write_folder_source(folder / "source")
    shutil.copytree(folder / "source" / "val", folder / "source" / "test")
    prepare("folder", folder / "source", folder / "prepared", height=32, width=64, workers=0)
    return folder / "prepared"


@pytest.fixture
def dataset(prepared: Path) -> PreparedDataset:
    """The prepared dataset, opened."""
    return PreparedDataset(prepared)


@pytest.fixture
def overrides(prepared: Path, tmp_path: Path) -> list[str]:
    """Overrides for a training of seconds: a narrow network, batch 4 of 12 samples, CPU."""
    return [
        f"run_dir={tmp_path / 'run'}",
        f"data.root={prepared}",
        "model.widths=[4,4,8,8]",
        "model.bottleneck=8",
        "batch_size=4",
        "eval_batch_size=2",
        "epochs=2",
        "device=cpu",
        "log.pictures=1",
        "optim.lr=0.003",
    ]


@pytest.fixture
def make_config(overrides: list[str]) -> Callable[..., Config]:
    """``make_config("epochs=1", ...)``: the tiny config with further overrides."""
    return lambda *more: load_config(None, [*overrides, *more])
