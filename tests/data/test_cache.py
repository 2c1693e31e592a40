"""The cache: the same batches as without, shared by the ranks of a node, refused when too large, gone afterwards."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.training import final_state, on_two_ranks
from mtunet_dist import distributed
from mtunet_dist.config import Config, DataConfig
from mtunet_dist.core.step import Batch
from mtunet_dist.data import node_memory
from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.cached_loader import CachedLoader
from mtunet_dist.data.loader import make_loader
from mtunet_dist.data.order import EvalOrder, Order, TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError
from mtunet_dist.train import train

CPU = torch.device("cpu")
NONE = DataConfig(root="", loader="torch", threads=0)


def augmented(dataset: PreparedDataset) -> Augmentation:
    info = dataset.info
    return Augmentation(info.height, info.width, flip=True, scales=(1.0, 1.5), brightness=0.3, hue=0.1, seed=2)


def take(config: DataConfig, dataset: PreparedDataset, order: Order, n: int, *, start: int = 0) -> list[Batch]:
    batches = make_loader(config, dataset.split("train"), order, CPU, augmented(dataset)).batches(start)
    return list(itertools.islice(batches, n))


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.parametrize("place", ["host", "device"])
def test_batches_are_those_of_the_torch_loader_to_the_bit(dataset: PreparedDataset, place: str) -> None:
    order = TrainOrder(12, batch_size=4, seed=1)
    cached = DataConfig(root="", cache=place)  # type: ignore[arg-type]
    batches = take(cached, dataset, order, 7)
    assert_equal(batches, take(NONE, dataset, order, 7))
    assert_equal(batches[5:], take(cached, dataset, order, 2, start=5))
    assert batches[0]["image"].is_contiguous(memory_format=torch.channels_last)
    assert batches[0]["depth"].shape == (4, 1, 32, 48)


def test_evaluation_is_exactly_once_and_again(dataset: PreparedDataset) -> None:
    seen: list[int] = []
    for rank in range(4):  # 5 samples in batches of 2: ranks 0..2 have one batch, rank 3 none
        order = EvalOrder(5, batch_size=2, rank=rank, world_size=4)
        loader = make_loader(DataConfig(root="", cache="host"), dataset.split("val"), order, CPU)
        seen += [i for batch in loader.batches() for i in batch["sample"].tolist()]
        assert_equal(list(loader.batches()), list(make_loader(NONE, dataset.split("val"), order, CPU).batches()))
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_a_batch_may_be_changed_without_harm_to_the_cache(dataset: PreparedDataset) -> None:
    loader = make_loader(DataConfig(root="", cache="device"), dataset.split("val"), EvalOrder(5, batch_size=5), CPU)
    first = next(loader.batches())
    before = {key: value.clone() for key, value in first.items()}
    for value in first.values():
        value.zero_()
    assert_equal([next(loader.batches())], [before])


def test_training_from_the_cache_ends_with_the_same_weights(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """JPEGs decode alike in DALI and PIL on a CPU, so without a zoom all three are the same to the bit."""
    weights = []
    for cache in ("none", "host", "device"):
        config = make_config(f"data.cache={cache}", "data.augment.flip=true", f"run_dir={tmp_path / cache}")
        train(config)
        state = final_state(config.run_dir)
        weights.append(state["strategy"]["model"])
    for other in weights[1:]:
        assert all(torch.equal(value, other[key]) for key, value in weights[0].items())


def test_the_cache_may_change_when_a_run_goes_on(make_config: Callable[..., Config]) -> None:
    train(make_config("epochs=1"))
    train(make_config("epochs=2", "data.cache=host", "data.on_error=skip", "data.dali.affinity=true"))


def test_two_ranks_share_the_memory_and_decode_half_each(prepared: Path, tmp_path: Path) -> None:
    own = shutil.copytree(prepared, tmp_path / "own")  # of which no other test still has a copy in memory
    on_two_ranks(_take_share, own, tmp_path)
    alone = TrainOrder(12, batch_size=4, seed=1)
    together = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for step, batch in enumerate(take(NONE, PreparedDataset(prepared), alone, 4)):
        for key, value in batch.items():
            assert torch.equal(torch.cat([rank["batches"][step][key] for rank in together]), value), key
    assert together[0]["inodes"] == together[1]["inodes"] and len(together[0]["inodes"]) == 1
    assert [rank["decoded"] for rank in together] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]


def _take_share(prepared: Path, folder: Path) -> None:
    rank = distributed.rank()
    dataset = PreparedDataset(prepared)
    split, decoded = dataset.split("train"), []
    decode = split.decode
    split.decode = lambda i: (decoded.append(i), decode(i))[1]  # type: ignore[assignment,func-returns-value]
    order = TrainOrder(12, batch_size=4, rank=rank, world_size=2, seed=1)
    loader = CachedLoader(split, order, CPU, augmented(dataset))
    result = {
        "batches": list(itertools.islice(loader.batches(), 4)),
        "decoded": sorted(decoded),
        "inodes": {
            line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:mtunet" in line
        },
    }
    torch.save(result, folder / f"{rank}.pt")


def test_what_does_not_fit_or_decode_is_refused_on_all_ranks(prepared: Path, tmp_path: Path) -> None:
    own = shutil.copytree(prepared, tmp_path / "own")  # of which no other test still has a copy in memory
    broken = shutil.copytree(prepared, tmp_path / "broken")
    shard = broken / "train-00001.tar"  # samples 4 to 7, two for each rank
    shard.write_bytes(bytes(shard.stat().st_size))
    on_two_ranks(_be_refused, own, broken, tmp_path)
    needed = 12 * 32 * 48 * 6
    for rank in range(2):
        too_large, corrupt = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "data.cache=host for 12 samples of the split 'train'" in too_large
        assert f"needs {needed:,} bytes" in too_large
        assert f"{needed:,} are free" in too_large
        assert "rgb of 004 in" in corrupt


def _be_refused(prepared: Path, broken: Path, folder: Path) -> None:
    rank = distributed.rank()
    free = 12 * 32 * 48 * 6 if rank == 0 else 1 << 40  # rank 0 is the one that asks; nothing is to spare
    order = TrainOrder(12, batch_size=4, rank=rank, world_size=2)
    messages = []
    for root, memory in ((prepared, free), (broken, 1 << 40)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError) as error:
            patch.setattr(node_memory, "free_memory", lambda memory=memory: memory)
            make_loader(DataConfig(root="", cache="host"), PreparedDataset(root).split("train"), order, CPU)
        messages.append(str(error.value))
    (folder / f"{rank}.json").write_text(json.dumps(messages))


def test_free_memory_is_the_strictest_of_machine_and_cgroups(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal:  9000 kB\nMemFree: 10 kB\nMemAvailable:  8000 kB\n")
    write("proc/self/cgroup", "0::/slurm/job\n")
    assert node_memory.free_memory(tmp_path) == 8000 * 1024
    write("sys/fs/cgroup/slurm/job/memory.max", "max\n")
    write("sys/fs/cgroup/slurm/job/memory.current", "100\n")
    write("sys/fs/cgroup/slurm/job/memory.stat", "anon 50\ninactive_file 50\n")
    assert node_memory.free_memory(tmp_path) == 8000 * 1024
    write("sys/fs/cgroup/slurm/memory.max", "100000\n")  # of the parent
    write("sys/fs/cgroup/slurm/memory.current", "70000\n")
    write("sys/fs/cgroup/slurm/memory.stat", "anon 50000\ninactive_file 20000\n")
    assert node_memory.free_memory(tmp_path) == 50000
    write("proc/self/cgroup", "5:cpu:/\n4:memory:/not/seen/from/here\n0::/\n")  # cgroups of version 1
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9000\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "8000\n")
    write("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 500\n")
    assert node_memory.free_memory(tmp_path) == 1500
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "9900\n")
    assert node_memory.free_memory(tmp_path) == 0


HOLD = """
import sys, time, torch
from pathlib import Path
from mtunet_dist.config import DataConfig
from mtunet_dist.data.loader import make_loader
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
split = PreparedDataset(Path(sys.argv[1])).split("train")
loader = make_loader(DataConfig(root="", cache="host"), split, TrainOrder(12, batch_size=4), torch.device("cpu"))
next(loader.batches())
print("cached", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_nothing_is_left_behind(prepared: Path, tmp_path: Path, killed: bool) -> None:
    """Nothing that is the process's own ever has a name, so neither an end nor SIGKILL can leave it."""
    command = [sys.executable, "-c", HOLD, str(prepared), "60" if killed else "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "cached\n"
    if killed:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "memfd:mtunet_dist-" in maps
        assert not [line for line in maps.splitlines() if "/dev/shm/" in line or str(tmp_path) in line]
        process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not list(tmp_path.iterdir())
