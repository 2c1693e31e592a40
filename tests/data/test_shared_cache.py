"""One decoded copy for all trainings on a node: found, waited for, taken over, trusted or not, and gone afterwards."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import FileIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.training import on_two_ranks, start
from mtunet_dist import distributed
from mtunet_dist.data import cached_loader, node_memory, shared_cache
from mtunet_dist.data.cached_loader import CachedLoader
from mtunet_dist.data.loader import Loader
from mtunet_dist.data.order import EvalOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.torch_loader import TorchLoader
from mtunet_dist.errors import InputError

CPU = torch.device("cpu")
ALL = list(range(12))


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    """A prepared dataset of which no other test still has a copy in memory."""
    return shutil.copytree(prepared, tmp_path / "data")


def load(
    root: Path, on_error: str = "skip", device: torch.device = CPU, *, slow: bool = False
) -> tuple[CachedLoader, list[int]]:
    """A loader of the whole split, and which samples it decoded for that."""
    split, decoded = PreparedDataset(root).split("train"), []
    decode = split.decode

    def counted(i: int) -> Any:
        decoded.append(i)
        time.sleep(0.05 if slow else 0)
        return decode(i)

    split.decode = counted  # type: ignore[method-assign]
    order = EvalOrder(len(split), batch_size=4, rank=distributed.rank(), world_size=distributed.world_size())
    loader = CachedLoader(split, order, device, on_device=device != CPU, on_error=on_error)  # type: ignore[arg-type]
    return loader, sorted(decoded)


def plain(loader: Loader) -> list[dict[str, Any]]:
    return [{key: value.tolist() for key, value in batch.items()} for batch in loader.batches()]


def inodes(pid: int | str) -> set[str]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:mtunet" in line}


def name_of(root: Path) -> str:
    content = cached_loader._content(PreparedDataset(root).split("train"))
    return f"mtunet_dist-{shared_cache.digest(content, node_memory.node())}"


class Training:
    """A process that loads the split, says what it decoded, and lives on until it is killed."""

    def __init__(self, root: Path, **how: bool) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = start(_train, root, theirs, how)

    def says(self) -> Any:
        assert self.pipe.poll(100)
        return self.pipe.recv()

    def result(self) -> Any:
        """What it decoded, the inodes of its copies, and its batches."""
        while (said := self.says()) == "waits":
            pass
        return said

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def training(data: Path) -> Iterator[Callable[..., Training]]:
    with ExitStack() as stack:

        def begin(**how: bool) -> Training:
            training = Training(data, **how)
            stack.callback(training.kill)
            return training

        yield begin


def _train(root: Path, pipe: Connection, how: dict[str, bool]) -> None:
    lock = shared_cache._lock

    def told(name: str) -> Any:
        if (taken := lock(name)) is None:
            pipe.send("waits")
        return taken

    shared_cache._lock = told
    if how.get("no_memory"):
        node_memory.free_memory = lambda root=None: 0  # type: ignore[assignment]
    if how.get("stuck"):
        PreparedDataset.split = _stuck(pipe)  # type: ignore[method-assign]
    loader, decoded = load(root, slow=how.get("slow", False))
    pipe.send((decoded, inodes("self"), plain(loader)))
    threading.Event().wait()


def _stuck(pipe: Connection) -> Any:
    original = PreparedDataset.split

    def split(self: PreparedDataset, spec: str) -> Any:
        found = original(self, spec)
        decode = found.decode

        def decode_some(i: int) -> Any:
            if i == 5:
                pipe.send("stuck")
                threading.Event().wait()
            return decode(i)

        found.decode = decode_some  # type: ignore[method-assign]
        return found

    return split


def test_later_trainings_map_what_the_first_has_decoded_and_outlive_it(
    training: Callable[..., Training], data: Path, dataset: PreparedDataset
) -> None:
    first = training()
    decoded, inode, batches = first.says()
    assert decoded == ALL and len(inode) == 1
    split, order = dataset.split("train"), EvalOrder(12, batch_size=4)
    assert batches == plain(TorchLoader(split, order, CPU))
    second = training(no_memory=True)  # as it needs none
    assert second.says()[:2] == ([], inode)
    first.kill()
    third = training(no_memory=True)
    decoded, its_inode, its_batches = third.says()
    assert (decoded, its_inode) == ([], inode)
    assert its_batches == batches
    second.kill()
    third.kill()
    assert shared_cache._look(name_of(data), 1) == (None, {})
    assert load(data)[1] == ALL


def test_of_two_that_start_at_once_one_decodes(training: Callable[..., Training]) -> None:
    said = [one.result() for one in [training(slow=True), training(slow=True)]]
    assert sorted(decoded for decoded, _, _ in said) == [[], ALL]
    assert said[0][1] == said[1][1]


def test_who_waits_takes_over_when_the_decoder_is_killed(training: Callable[..., Training]) -> None:
    decoder = training(stuck=True)
    assert decoder.says() == "stuck"
    waiting = training()
    assert waiting.says() == "waits"
    decoder.kill()
    assert waiting.result()[0] == ALL


def test_who_waits_for_a_copy_that_does_not_grow_decodes_its_own(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the decoder is suspended, or a stranger has bound the name."""
    monkeypatch.setattr(shared_cache, "PATIENCE_S", 0.5)
    taken = shared_cache._lock(name_of(data))
    assert taken is not None
    with taken:
        assert load(data)[1] == ALL


def test_broken_samples_are_shared_too(data: Path) -> None:
    shard = data / "train-00001.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    loaders = []
    for expected in (ALL, []):
        with pytest.warns(UserWarning, match="skipped: rgb of 00[4-7] in"):
            loader, decoded = load(data)
        assert decoded == expected
        assert loader.broken.positions == {4, 5, 6, 7}
        loaders.append(loader)
    assert plain(loaders[0]) == plain(loaders[1])
    with pytest.raises(InputError, match="rgb of 004 in"):
        load(data, on_error="stop")


def test_only_what_is_complete_and_ours_and_of_the_same_files_is_taken(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 12 * 32 * 48 * 6
    with ExitStack() as stack:
        for length, seals in ((size, 0), (size - 1, shared_cache.SEALS)):  # not finished; of another layout
            file = stack.enter_context(FileIO(os.memfd_create(name_of(data), os.MFD_ALLOW_SEALING), "r+"))
            file.truncate(length)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        first, decoded = load(data)
        assert decoded == ALL
    second, decoded = load(data)
    assert decoded == [] and len(inodes("self")) >= 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # to whom it is another user's
        assert load(data)[1] == ALL
    shutil.copytree(data, tmp_path / "copy")
    assert load(tmp_path / "copy")[1] == ALL
    (data / "train-00002.tar").touch()
    assert load(data)[1] == ALL
    assert plain(first) == plain(second)


def test_what_only_passes_through_memory_on_its_way_to_a_device_is_not_shared(data: Path) -> None:
    elsewhere, decoded = load(data, device=torch.device("meta"))
    assert decoded == ALL
    assert {x.device.type for x in (elsewhere.stored.image, *elsewhere.stored.targets.values())} == {"meta"}
    first, decoded = load(data)
    assert decoded == ALL
    assert load(data, device=torch.device("meta"))[1] == ALL
    assert first.stored.image.any()


def test_nobody_can_write_to_a_copy(data: Path) -> None:
    loader, _ = load(data)
    file, _ = shared_cache._look(name_of(data), 1)
    assert file is not None
    with file, FileIO(f"/proc/self/fd/{file.fileno()}", "r+") as writable, pytest.raises(PermissionError):
        writable.write(b"x")
    assert loader.stored.image.any()


def test_ranks_map_what_is_there_and_only_a_node_without_decodes(data: Path, tmp_path: Path) -> None:
    """Two nodes of a rank each, and the first has a copy, of a training on that node alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_memory, "node", lambda: ("node 0", 0, 0))
        loader, _ = load(data)
    on_two_ranks(_as_two_nodes, data, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [decoded for decoded, _ in results] == [[], ALL]
    assert [results[i % 2][1][i // 2] for i in range(3)] == plain(loader)


def _as_two_nodes(root: Path, folder: Path) -> None:
    rank = distributed.rank()
    node_memory.node = lambda: (f"node {rank}", 0, 0)
    loader, decoded = load(root)
    torch.save((decoded, plain(loader)), folder / f"{rank}.pt")


def test_who_waits_on_one_node_keeps_no_other_node_waiting(data: Path) -> None:
    on_two_ranks(_wait_on_one_node)


def _wait_on_one_node() -> None:
    """Rank 1's node is free, but not rank 0's, until rank 1 has let go of its own two times."""
    rank = distributed.rank()
    name = f"mtunet_dist-test-{os.getppid()}-{rank}"
    taken = shared_cache._lock(name) if rank == 0 else None
    rounds = []

    def sleep(seconds: float) -> None:
        rounds.append(seconds)
        if rank == 1:
            lock = shared_cache._lock(name)
            assert lock is not None
            lock.close()
        elif len(rounds) == 2:
            assert taken is not None
            taken.close()

    shared_cache.time.sleep = sleep  # type: ignore[assignment]
    found, lock = shared_cache._find_or_lock(name, 1, search=True)
    assert found is None and lock is not None and len(rounds) == 2
