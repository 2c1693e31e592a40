"""DistributedDataParallel; with one process the same code without the wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtunet_dist import distributed
from mtunet_dist.config import Config
from mtunet_dist.core import optim
from mtunet_dist.core.step import Batch, MultiTaskStep, place
from mtunet_dist.data.batch import blank_batch

SIZE = 64  # of images that all models accept


class DDPStrategy:
    """Gradients averaged by DDP.

    Options:
        bucket_cap_mb: size of the buckets in which gradients are reduced while the backward pass goes on.
        gradient_as_bucket_view: let gradients live in those buckets, which saves one copy of them.
        static_graph: tell DDP that every step uses the same parameters, which spares it some bookkeeping.
        compress: send gradients as float32 (``none``) or as ``bf16``, half the bytes with 8 bits of precision.
    """

    def __init__(
        self,
        step: MultiTaskStep,
        config: Config,
        device: torch.device,
        *,
        bucket_cap_mb: int = 25,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
        compress: Literal["none", "bf16"] = "none",
    ) -> None:
        # Strides must be final before DDP copies them into its buckets. Otherwise the first gradient would be wrong.
        self.module = place(step, device, config.channels_last)
        self.clip_norm = config.optim.clip_norm
        self.optimizer = optim.build_optimizer(self.module, config.optim)
        if config.precision == "fp16":
            optim.start_momentum(self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.wrapped: nn.Module = self.module
        if distributed.is_on():
            self.wrapped = DistributedDataParallel(
                self.module,
                device_ids=[device.index] if device.type == "cuda" else None,
                # Running statistics are averaged before evaluation and saving, not broadcast at every step. A broadcast
                # would also overwrite each rank's own loss statistics.
                forward_sync_buffers=False,
                bucket_cap_mb=bucket_cap_mb,
                gradient_as_bucket_view=gradient_as_bucket_view,
                static_graph=static_graph,
            )
            if compress == "bf16":
                self.wrapped.register_comm_hook(None, lambda _, bucket: _mean_in_bf16(bucket))
            self._settle_buckets(device)

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        result: tuple[Tensor, dict[str, Tensor]] = self.wrapped(batch)
        return result

    def _settle_buckets(self, device: torch.device) -> None:
        """Make DDP sort its gradient buckets. It does this once per process, after the first backward pass.

        With three or more ranks, the order of the sums depends on the sorting, so a resumed run would drift from an
        uninterrupted one. The pass runs in evaluation mode and changes nothing: no statistics, random numbers or
        losses.
        """
        batch = blank_batch(self.module.tasks, SIZE, device)
        training = self.module.training
        self.module.eval()
        with torch.compiler.set_stance("force_eager"):
            self(batch)[0].backward()
        self.module.train(training)
        self.optimizer.zero_grad(set_to_none=True)

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def apply(self, lr: float) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clip_norm, norm)
        optim.set_lr(self.optimizer, lr)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @property
    def loss_scale(self) -> float:
        return self.scaler.get_scale()

    def full_weights(self) -> AbstractContextManager[MultiTaskStep]:
        return nullcontext(self.module)

    def save(self) -> dict[str, Any]:
        if not distributed.is_main():
            return {}
        return {
            "model": dict(self.module.state_dict()),
            "optimizer": optim.named_state(self.optimizer, self.module),
            "scaler": self.scaler.state_dict(),
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return optim.named_tensors(self.optimizer, self.module)

    def load(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["model"])
        optim.load_named_state(self.optimizer, self.module, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        pass


def _mean_in_bf16(bucket: Any) -> torch.futures.Future[Tensor]:
    """The mean over ranks of a bucket of gradients. torch's own hook for this does not support gloo."""
    halved = bucket.buffer().bfloat16().div_(distributed.world_size())
    work = dist.all_reduce(halved, async_op=True)
    assert work is not None

    def widened(reduced: torch.futures.Future[list[Tensor]]) -> Tensor:
        mean: Tensor = bucket.buffer().copy_(reduced.value()[0])
        return mean

    result: torch.futures.Future[Tensor] = work.get_future().then(widened)
    return result


PLUGIN = DDPStrategy
