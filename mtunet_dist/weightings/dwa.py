"""Dynamic weight average (Liu, Johns, Davison 2019, eq. 7): a loss that falls slowly gets a larger weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtunet_dist import distributed
from mtunet_dist.errors import InputError

EPSILON = 1e-12  # so that a loss that was 0 has a rate


class DWAWeighting(nn.Module):
    """Total loss = sum_i lambda_i L_i with lambda = K softmax(w / T) for K tasks, constant within an epoch.

    w_i = L_i(t - 1) / L_i(t - 2), where L_i(t) is the unweighted mean of loss i over epoch t and all ranks. In epochs 0
    and 1 all weights are 1. They always sum to K. Losses that are not finite are left out, and an epoch without losses
    does not count. Raises InputError for options out of range.

    The state is in buffers. Those named ``local_*`` are sums over this rank's running epoch (see ``LearnedWeighting``).
    The others are equal on all ranks.

    Options:
        temperature: T; a larger T makes the weights more equal.
    """

    factors: Tensor
    previous: Tensor
    epochs: Tensor
    local_count: Tensor
    local_sum: Tensor

    def __init__(self, tasks: list[str], *, temperature: float = 2.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"temperature must be > 0, got {temperature}")
        self.tasks, self.temperature = list(tasks), temperature
        n = len(tasks)
        self.register_buffer("factors", torch.ones(n, dtype=torch.float64))
        for name in ("previous", "local_count", "local_sum"):
            self.register_buffer(name, torch.zeros(n, dtype=torch.float64))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))  # with losses

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        """The total (scalar) of the scalar losses. Records them if the module trains and gradients are on."""
        stacked = torch.stack([losses[task] for task in self.tasks])
        if self.training and torch.is_grad_enabled():
            values = stacked.detach().double()
            finite = values.isfinite()
            self.local_count += finite
            self.local_sum += torch.where(finite, values, 0.0)
        return (self.factors.to(stacked.dtype) * stacked).sum()

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Set the weights of the next epoch from the losses of this epoch and the previous one. Collective over
        ranks."""
        count, total = distributed.all_reduce_sum(torch.stack([self.local_count, self.local_sum]))
        if (count > 0).all():
            mean = total / count
            if self.epochs > 0:
                rates = mean / self.previous.clamp(min=EPSILON)
                self.factors.copy_(len(self.tasks) * torch.softmax(rates / self.temperature, dim=0))
            self.previous.copy_(mean)
            self.epochs += 1
        self.local_count.zero_()
        self.local_sum.zero_()

    def weights(self) -> dict[str, Tensor]:
        """The current lambda of each task."""
        return dict(zip(self.tasks, self.factors.clone(), strict=True))


PLUGIN = DWAWeighting
