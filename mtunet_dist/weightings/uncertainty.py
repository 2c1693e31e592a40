"""Homoscedastic uncertainty (Kendall, Gal, Cipolla 2018): weights that learn with the network, by its optimiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtunet_dist.errors import InputError

START = -0.5  # of each s, as in the MTAN code


class UncertaintyWeighting(nn.Module):
    """Total loss = sum_i L_i / (2 exp(s_i)) + s_i / 2, where s_i = log sigma_i^2 is learned from -0.5 on.

    The form of the MTAN code, which takes the one that the paper derives for regression for all losses. Its minimum
    over s is at exp(s_i) = L_i, where each term is (1 + log L_i) / 2: a loss below 1/e makes the total negative, which
    is no fault. The s are parameters: they are reduced over ranks, clipped, optimised and saved with the network's, in
    a group of their own that no schedule and no weight decay touches. Raises InputError for options out of range.

    Options:
        lr: learning rate of s. The MTAN code uses the network's, 1e-4 halved after 100 epochs.
    """

    def __init__(self, tasks: list[str], *, lr: float = 1e-3) -> None:
        super().__init__()
        if not lr > 0:
            raise InputError(f"lr must be > 0, got {lr}")
        self.tasks, self.lr = list(tasks), lr
        self.log_variances = nn.Parameter(torch.full((len(tasks),), START))

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        stacked = torch.stack([losses[task] for task in self.tasks])
        return (self._factors() * stacked + self.log_variances / 2).sum()

    def end_epoch(self) -> None:
        """Nothing to do: the optimiser updates the weights."""

    def weights(self) -> dict[str, Tensor]:
        """The factor of each loss: 1 / (2 exp(s))."""
        return dict(zip(self.tasks, self._factors().detach(), strict=True))

    def _factors(self) -> Tensor:
        return (-self.log_variances).exp() / 2


PLUGIN = UncertaintyWeighting
