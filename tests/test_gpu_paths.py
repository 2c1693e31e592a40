"""What a GPU would do, as far as it can be checked without one."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import backend, pipeline_def

from helpers.training import TASKS, MakeConfig
from mtunet_dist import distributed, plugins
from mtunet_dist.config import DaliConfig, load_config
from mtunet_dist.core.step import set_fp32_precision
from mtunet_dist.data import dali
from mtunet_dist.data.dali import DaliLoader, _graph, _mixed_options
from mtunet_dist.data.order import EvalOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.sending import Loans
from mtunet_dist.errors import PreemptedError
from mtunet_dist.strategies._deepspeed_settings import settings
from mtunet_dist.tasks.normals import Normals
from mtunet_dist.train import train

FAKE_CUDA = Path(__file__).parent / "fake_cuda"


class SlowStream:
    """A stream that has done ``done`` of the events recorded on it."""

    def __init__(self) -> None:
        self.recorded = self.done = 0

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, stream: SlowStream) -> None:
        self.stream, self.number = stream, -1

    def record(self) -> None:
        self.stream.recorded += 1
        self.number = self.stream.recorded

    def query(self) -> bool:
        return 0 < self.number <= self.stream.done


def test_loans_end_when_the_stream_has_come_so_far_and_not_before() -> None:
    stream = SlowStream()
    loans = Loans(stream.event)
    references = []
    for i in range(5):
        tensor = torch.full((2,), i)
        references.append(weakref.ref(tensor))
        loans.keep(tensor)
        del tensor
    assert len(loans) == 5 and all(reference() is not None for reference in references)
    stream.done = 3
    loans.keep(torch.zeros(1))
    assert [reference() is not None for reference in references] == [False] * 3 + [True] * 2
    stream.done = 6
    loans.keep(torch.zeros(1))
    assert len(loans) == 1


def test_batches_on_a_gpu_are_copies_and_dalis_memory_lives_until_they_are_made(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI's memory is written over as soon as nobody holds it, which a queued copy must not see."""
    stream, views = SlowStream(), []

    def outputs(self: DaliLoader, start: int) -> Iterator[list[dict[str, torch.Tensor]]]:
        for i in range(3):
            made = {
                "part/rgb": torch.full((2, 4, 4, 3), i, dtype=torch.uint8),
                "part/segmentation": torch.full((2, 4, 4, 1), i, dtype=torch.uint8),
                "part/depth": torch.full((2, 4, 4, 1), float(i)),
                "factors/depth": torch.ones(2, 1),
                "sample": torch.arange(2),
            }
            views.append({name: weakref.ref(x) for name, x in made.items()})
            storages = {name: x.untyped_storage().data_ptr() for name, x in made.items()}
            pointers.append(storages)
            yield [made]

    pointers: list[dict[str, int]] = []
    monkeypatch.setattr(DaliLoader, "_iterator", outputs)
    monkeypatch.setattr(dali, "Loans", lambda: Loans(stream.event))
    split = dataset.split("val")
    loader = DaliLoader(split, EvalOrder(6, batch_size=2), torch.device("cuda", 0))
    for number, batch in enumerate(loader.batches()):
        ours = {x.untyped_storage().data_ptr() for x in batch.values()}
        assert ours.isdisjoint(pointers[number].values())
        held = [all(ref() is not None for ref in of_batch.values()) for of_batch in views]
        assert held == ([True] * (number + 1) if number < 2 else [False, False, True])
        if number == 1:
            stream.done = 2  # seen with the next batch


@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_graph_of_dali_can_be_built(on_gpu: bool) -> None:
    """Serialised, which checks operators and arguments; to run them takes a driver."""
    switches = itertools.product((False, True), repeat=5)
    tasks = {task.name: task for task in (*TASKS, Normals("normals"))}
    for rgb, targets, zooms, colors, flips in switches:
        if targets and not rgb:
            continue  # nobody stores that
        pipeline = pipeline_def(_graph)(
            lambda info: [],
            tasks=tasks,
            multiplied=["depth", "normals"],
            size=(32, 48),
            encoded={"rgb": rgb, "segmentation": targets, "depth": targets, "normals": False},
            zooms=zooms,
            colors=colors,
            flips=flips,
            on_gpu=on_gpu,
            mixed=_mixed_options(32, 48, DaliConfig()) if on_gpu else {},
            batch_size=2,
            num_threads=1,
            device_id=None,
        )
        graph = pipeline.serialize()
        assert (b"mixed" in graph) == (on_gpu and rgb)


def test_the_operators_that_a_gpu_needs_exist() -> None:
    on_gpu = set(backend.RegisteredGPUOps())
    assert {"Cast", "Slice", "Resize", "Flip", "CoordTransform"} <= on_gpu
    assert "decoders__Image" in backend.RegisteredMixedOps()


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that lets a torch for CPUs make fake CUDA tensors; gcc is among what the README asks for."""
    library, root = tmp_path_factory.mktemp("guard") / "libfakecuda.so", Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", str(FAKE_CUDA / "guard.cpp")]
    try:
        subprocess.run([*command, f"-L{root / 'lib'}", "-lc10", "-o", str(library)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("g++, which compiles a stand-in for CUDA, is not installed")
    return library


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_step_of_every_model_stays_on_the_gpu(guard: Path, precision: str) -> None:
    command = [sys.executable, str(FAKE_CUDA / "steps.py"), str(guard), precision]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{name} fine" for name in plugins.available("model")]


def test_fp32_means_fp32_unless_tf32_is_asked_for(make_config: MakeConfig) -> None:
    config = make_config("epochs=1")
    try:
        set_fp32_precision(tf32=True)
        train(config)
        recorded = json.loads((Path(config.run_dir) / "environment.json").read_text())
        assert (recorded["fp32_convolution"], recorded["fp32_matmul"]) == ("ieee", "ieee")
        assert {"cudnn", "nccl", "driver"} <= recorded.keys()
        train(make_config("epochs=2", "tf32=true"))
        recorded = json.loads((Path(config.run_dir) / "environment.json").read_text())
        assert (recorded["fp32_convolution"], recorded["fp32_matmul"]) == ("tf32", "tf32")
    finally:
        set_fp32_precision(tf32=False)


def test_a_training_that_is_asked_to_stop_leaves_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Any] = []
    monkeypatch.setattr(distributed, "leave", lambda: left.append(True))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda *args, **kwargs: iter([(None, 0, 1)]))
    monkeypatch.setattr(distributed, "PrefixStore", lambda *args: None)
    for name in distributed.RENDEZVOUS:
        monkeypatch.setenv(name, "1")
    for error, expected in ((PreemptedError("asked"), [True]), (RuntimeError("lost"), [])):
        left.clear()
        with pytest.raises(type(error)), distributed.process_group(torch.device("cpu"), 60.0):
            raise error
        assert left == expected


def test_deepspeed_reduces_in_buckets_smaller_than_the_network_and_a_file_may_say_others(tmp_path: Path) -> None:
    config = load_config(None, ["run_dir=r", "data.root=d"])
    options: dict[str, Any] = {"stage": 2, "offload_optimizer": False, "config_file": ""}
    zero = settings(config, 1, **options)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] < 69_863_624 / 2
    file = tmp_path / "file.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}}))
    changed = settings(config, 1, **{**options, "config_file": str(file)})["zero_optimization"]
    assert (changed["reduce_bucket_size"], changed["allgather_bucket_size"]) == (1000, zero["allgather_bucket_size"])
    assert "reduce_bucket_size" not in settings(config, 1, **{**options, "stage": 0})["zero_optimization"]


def test_samples_in_their_source_are_read_ahead_of_the_training(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI calls for a batch on the thread that trains, which then must not have to wait for a decoder."""
    loader = DaliLoader(dataset.split("train"), EvalOrder(12, batch_size=3), torch.device("cpu"), prefetch=2)
    asked: list[int] = []

    class Pool:
        def submit(self, read: Any, i: int) -> Any:
            asked.append(i)
            return type("Done", (), {"result": lambda self: read(i)})()

    monkeypatch.setattr(loader, "pool", Pool())
    for number, expected in enumerate(([*range(9)], [*range(12)], [*range(12)], [*range(12)])):
        found = list(loader._reads(number, np.arange(3 * number, 3 * number + 3)))
        assert len(found) == 3 and asked == expected
    assert not loader.ahead
