"""What a strategy is: it owns wrapping, gradients and the optimiser; the training loop owns everything else."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from mtunet_dist.multitask import Batch, MultiTaskStep


class Strategy(Protocol):
    """``PLUGIN(step, config, device, **options)``."""

    module: MultiTaskStep
    """The bare module, for evaluation."""

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the step on one micro-batch: total loss, and the losses per task."""

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch; gradients are reduced only with the ``last``."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""

    def apply(self, lr: float) -> Tensor:
        """Clip, step, forget the gradients; returns their norm before clipping, a scalar on the device."""

    def save(self) -> dict[str, Any]:
        """State of the module (its state dict, as ``model``), optimiser and loss scaler; called on every rank."""

    def load(self, state: dict[str, Any]) -> None:
        """Restore what ``save`` returned."""
