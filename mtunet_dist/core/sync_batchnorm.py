"""Batch norm over the samples of all ranks, for batches with too few samples per rank."""

from __future__ import annotations

import torch
import torch.distributed.nn.functional as collectives
from torch import Tensor, nn

from mtunet_dist import distributed


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.SyncBatchNorm`` for CPUs (torch's works only on GPUs): images (N, C, H, W), N equal on all ranks."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            x = input if input.dtype == torch.float64 else input.float()
            mean = _mean_over_ranks(x.mean((0, 2, 3)))
            centered = x - mean[:, None, None]
            variance = _mean_over_ranks(centered.square().mean((0, 2, 3)))
            self._update(mean.detach(), variance.detach(), count=x.numel() // len(mean) * distributed.world_size())
            scale = self.weight * (variance + self.eps).rsqrt()
            return (centered * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)


def synchronise(model: nn.Module, device: torch.device) -> None:
    """Replace the batch norms of ``model`` by synchronised ones. The names in its state stay the same."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d  # only the forward pass differs


def _mean_over_ranks(tensor: Tensor) -> Tensor:
    total: Tensor = collectives.all_reduce(tensor)
    return total / distributed.world_size()
