"""The process group: started from torchrun's environment, or absent, in which case every call here is a no-op."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtunet_dist.errors import InputError


def is_on() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number among all, 0 without a group."""
    return dist.get_rank() if is_on() else 0


def world_size() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if is_on() else 1


def is_main() -> bool:
    """Whether this process prints, logs and saves."""
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """``auto``: this process's GPU where there is one, else the CPU. Raises InputError for a device that is absent."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("device=cuda, but torch sees no GPU; use device=cpu or device=auto")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} present; "
            "start fewer processes per node"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_group(device: torch.device, timeout_s: float) -> Iterator[None]:
    """Join the group that torchrun describes, leave it at the end.

    An existing group (Ray Train, a test) is used and left alone; without torchrun's variables there is none.
    """
    if is_on() or "WORLD_SIZE" not in os.environ:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all ranks in place, and return it."""
    if is_on():
        dist.all_reduce(tensor)
    return tensor


def gather_to_main(value: Any) -> list[Any] | None:
    """Every rank's picklable ``value`` in rank order on rank 0, None elsewhere."""
    if not is_on():
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def from_main(value: Any) -> Any:
    """Rank 0's picklable ``value`` on every rank."""
    if not is_on():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Wait for every rank."""
    if is_on():
        dist.barrier()


def average_buffers(module: torch.nn.Module) -> None:
    """Give all ranks the mean of the batch-norm running statistics.

    Each rank's statistics saw its own samples only; before evaluation and saving they must agree.
    One all-reduce for all of them.
    """
    if world_size() == 1:
        return
    statistics = [b for n, b in module.named_buffers() if n.endswith(("running_mean", "running_var"))]
    if not statistics:
        return
    flat = torch.cat([b.detach().reshape(-1) for b in statistics])
    all_reduce_sum(flat).div_(world_size())
    for buffer, mean in zip(statistics, flat.split([b.numel() for b in statistics]), strict=True):
        buffer.copy_(mean.view_as(buffer))
