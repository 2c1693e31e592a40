"""A file that is cut short while it is in use: named, by every reader, where a map of it would end the process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# In a process of its own, as SIGBUS would end it. The first batch has opened every shard.
LOADER = """
import sys, torch
from pathlib import Path
from mtunet_dist.config import DataConfig
from mtunet_dist.data.loader import make_loader
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError

if __name__ == "__main__":
    root, loader, on_error, size = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    split = PreparedDataset(root).split("train")
    config = DataConfig(root="", loader=loader, threads=1, prefetch=1, on_error=on_error)
    if loader == "torch":
        from mtunet_dist.data.torch_loader import TorchLoader
        made = TorchLoader(split, TrainOrder(12, batch_size=12), torch.device("cpu"), on_error=on_error)
    else:
        made = make_loader(config, split, TrainOrder(12, batch_size=12), torch.device("cpu"))
    batches = made.batches()
    next(batches)
    with (root / "train-00001.tar").open("r+b") as file:
        file.truncate(size)
    try:
        for _ in range(4):
            next(batches)
        print("skipped", sorted(made.broken.positions))
    except InputError as error:
        print("error:", error)
"""
SPLIT = """
import sys
from pathlib import Path
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError

split = PreparedDataset(Path(sys.argv[1])).split("train")
for i in range(4, 8):
    split.decode(i)
with (Path(sys.argv[1]) / "train-00001.tar").open("r+b") as file:
    file.truncate(int(sys.argv[4]))
for i in range(4, 8):
    try:
        split.decode(i)
    except InputError as error:
        print("error:", error)
"""
MTAN = """
import sys
from pathlib import Path
from mtunet_dist.errors import InputError
from mtunet_dist.sources import mtan

source = mtan.MTAN(Path(sys.argv[1]))
sample = source.splits()["train"][0]
source.check(sample)
rgb = mtan._rgb

def cut(image, name):
    for part in (sample.rgb, sample.targets["segmentation"], sample.targets["depth"]):
        with part.open("r+b") as file:
            file.truncate(200)
    return rgb(image, name)

mtan._rgb = cut
try:
    print("read", source.read(sample).targets["depth"].shape)
    source.read(sample)
except InputError as error:
    print("error:", error)
"""


def run(code: str, folder: Path, *words: object) -> str:
    """What the code prints, in a file of its own for the workers that it may start."""
    file = folder.parent / "script.py"
    file.write_text(code)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(file), str(folder), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, f"exit code {result.returncode}: {result.stderr[-2000:]}"
    return result.stdout


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.mark.parametrize("loader", ["dali", "torch"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_shard_under_a_loader(data: Path, loader: str, on_error: str) -> None:
    printed = run(LOADER, data, loader, on_error, 0)
    if on_error == "skip":
        assert "skipped [4, 5, 6, 7]" in printed
    else:
        assert "train-00001.tar: cut short: it has only 0 bytes" in printed and "error: sample 00" in printed


def test_a_shard_keeps_the_samples_before_the_cut(data: Path) -> None:
    size = (data / "train-00001.tar").stat().st_size // 2
    printed = run(SPLIT, data, "-", "-", size)
    assert [line.split(":")[1].strip() for line in printed.splitlines()] == ["sample 006", "sample 007"]


def test_an_array_of_a_source(tmp_path: Path) -> None:
    arrays = {"image": np.zeros((64, 64, 3)), "label": np.zeros((64, 64)), "depth": np.zeros((64, 64, 1))}
    for split in ("train", "val"):
        for name, array in arrays.items():
            (tmp_path / "mtan" / split / name).mkdir(parents=True)
            np.save(tmp_path / "mtan" / split / name / "0.npy", array + (0.5 if name == "image" else 0))
    printed = run(MTAN, tmp_path / "mtan")
    assert "read (64, 64)" in printed and "0.npy: not a complete npy file" in printed
