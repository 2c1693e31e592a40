"""Equation 4: L = L1 + L2, all weights 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EqualWeighting(nn.Module):
    """The sum of the losses. No options."""

    def __init__(self, tasks: list[str]) -> None:
        super().__init__()
        self.tasks = list(tasks)

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        return torch.stack([losses[task] for task in self.tasks]).sum()

    def end_epoch(self) -> None:
        """Nothing to do."""

    def weights(self) -> dict[str, Tensor]:
        return {task: torch.ones(()) for task in self.tasks}


PLUGIN = EqualWeighting
