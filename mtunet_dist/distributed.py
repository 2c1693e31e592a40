"""The process group. It is made from torchrun's environment. Without a group every call here is a no-op."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mtunet_dist.errors import InputError, MTUNetError, PreemptedError
from mtunet_dist.system.addresses import use_route_to
from mtunet_dist.system.children import end_with_parent
from mtunet_dist.system.command import END_S

T = TypeVar("T")

LONGEST_S = 3e7  # a year; libraries that count in nanoseconds or in a C int overflow after about three hundred years
LEAVE_S = 0.1  # time for gloo's threads to drop their tensors; they cannot do it while the interpreter ends
_left: list[Any] = []  # groups; see ``leave``

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # from torchrun, for init_process_group


def is_on() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number among all processes; 0 without a group."""
    return dist.get_rank() if is_on() else 0


def world_size() -> int:
    """The number of processes; 1 without a group."""
    return dist.get_world_size() if is_on() else 1


def is_main() -> bool:
    """Whether this process prints, logs and saves."""
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """``auto`` means this process's GPU, or the CPU if there is no GPU. Raises InputError for a device that is
    absent."""
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
    """Join the group that torchrun describes, and leave it at the end.

    An existing group (Ray Train, a test) is used and not closed. Without torchrun's variables there is no group. A
    process that torchrun's agent has started ends with the agent, even if the agent is killed.
    """
    if is_on() or not all(name in os.environ for name in RENDEZVOUS):
        yield
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    # This limit is later than the watchdog's, whose message says more. Before the training loop there is no watchdog.
    timeout = timedelta(seconds=min(timeout_s, LONGEST_S) + 60)
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"  # one node, or Ray, which gives numeric addresses
    use_route_to(os.environ["MASTER_ADDR"], alone=alone)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    if alone:
        # torchrun's agent keeps its store over a restart. The store then has the addresses of the previous processes,
        # and gloo would connect to them. The agents of several nodes may count restarts differently; see
        # docs/distributed.md.
        store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    group: dict[str, Any] = {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **group)
    else:
        dist.init_process_group("gloo", **group)
    try:
        yield
    except PreemptedError:  # raised on every rank
        leave()
        raise
    leave()  # not after another error: leaving would wait for ranks that may be gone, and hide the error


def leave(destroy: Callable[[], None] = dist.destroy_process_group) -> None:
    """Destroy the process group, but keep a reference to it.

    Otherwise DDP holds the last reference, which is dropped while this thread holds the interpreter's lock. The
    destructor waits for gloo's threads. If one of them is dropping the tensors of the last collective, it needs the
    same lock, and both wait for ever. If this function takes longer than ``END_S``, the process is ended, with the
    stacks of its threads on stderr.
    """
    _left.append(dist.group.WORLD)
    faulthandler.dump_traceback_later(END_S, exit=True)
    destroy()
    faulthandler.cancel_dump_traceback_later()
    time.sleep(LEAVE_S)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all ranks in place, and return it."""
    if is_on():
        dist.all_reduce(tensor)
    return tensor


def gather_to_main(value: Any) -> list[Any] | None:
    """On rank 0: the picklable ``value`` of every rank, in rank order. On other ranks: None."""
    if not is_on():
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def from_main(value: Any) -> Any:
    """Return rank 0's picklable ``value`` on every rank."""
    if not is_on():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def all_gather_object(value: T) -> list[T]:
    """Return the picklable ``value`` of every rank, in rank order, on every rank."""
    values: list[T] = from_main(gather_to_main(value))
    return values


def on_main(choose: Callable[[], T]) -> T:
    """Call ``choose`` on rank 0 only, and return its result on every rank.

    If ``choose`` raises an MTUNetError, every rank raises it, so that no rank waits for one that has stopped.
    """
    outcome: Any = None
    if is_main():
        try:
            outcome = choose()
        except MTUNetError as error:
            outcome = error
    outcome = from_main(outcome)
    if isinstance(outcome, MTUNetError):
        raise outcome
    result: T = outcome
    return result


def running_statistics(module: torch.nn.Module) -> dict[str, Tensor]:
    """The batch-norm statistics by name. The statistics of each rank cover its own samples only."""
    return {n: b for n, b in module.named_buffers() if n.endswith(("running_mean", "running_var"))}


def mean_over_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means of equally shaped floating-point tensors over all ranks, by one all-reduce."""
    if world_size() == 1 or not tensors:
        return dict(tensors)
    flat = torch.cat([t.detach().reshape(-1) for t in tensors.values()])
    means = all_reduce_sum(flat).div_(world_size()).split([t.numel() for t in tensors.values()])
    return {name: mean.view_as(t) for (name, t), mean in zip(tensors.items(), means, strict=True)}


def average_statistics(module: torch.nn.Module) -> None:
    """Set the batch-norm statistics of all ranks to their mean: an evaluation that ranks share needs the same model on
    each."""
    statistics = running_statistics(module)
    for name, mean in mean_over_ranks(statistics).items():
        statistics[name].copy_(mean)
