"""Constant weights: L = W1 L1 + W2 L2, the "fixed weights" of the paper's figure 4."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtunet_dist.errors import InputError


class FixedWeighting(nn.Module):
    """The sum of the losses, each times its constant weight. Raises InputError for weights that do not fit.

    Options:
        weights: one number >= 0 per task, in the order of the tasks. Not normalised.
    """

    constants: Tensor

    def __init__(self, tasks: list[str], *, weights: tuple[float, ...] = (1.0, 1.0)) -> None:
        super().__init__()
        if len(weights) != len(tasks):
            raise InputError(f"weights needs one number for each of {', '.join(tasks)}, got {tuple(weights)}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise InputError(f"weights must be finite and >= 0, got {tuple(weights)}")
        self.tasks = list(tasks)
        # Not persistent: on resume the config decides, not the checkpoint.
        self.register_buffer("constants", torch.tensor(weights), persistent=False)

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        return (self.constants * torch.stack([losses[task] for task in self.tasks])).sum()

    def end_epoch(self) -> None:
        """Nothing to do."""

    def weights(self) -> dict[str, Tensor]:
        return dict(zip(self.tasks, self.constants.clone(), strict=True))


PLUGIN = FixedWeighting
