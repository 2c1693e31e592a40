"""What a strategy is: it owns wrapping, gradients and the optimiser; the training loop owns everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from mtunet_dist.multitask import Batch, MultiTaskStep


class Strategy(Protocol):
    """``PLUGIN(step, config, device, **options)``."""

    module: MultiTaskStep
    """The bare module. Its buffers are whole on every rank, its parameters perhaps only in ``whole``."""

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the step on one micro-batch: total loss, and the losses per task."""

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch; gradients are reduced only with the ``last``."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""

    def apply(self, lr: float) -> Tensor:
        """Clip, step, forget the gradients; returns their norm before clipping, a scalar on the device."""

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before the backward pass, 1 if not fp16; asking waits for the device."""

    def whole(self) -> AbstractContextManager[MultiTaskStep]:
        """A module with all weights and buffers as they are now, to evaluate with; entered on every rank."""

    def save(self) -> dict[str, Any]:
        """State of the module, optimiser and loss scaler on rank 0, nothing elsewhere; called on every rank.

        All strategies write and read one form, whatever the number of ranks: ``model`` is the state dict of the bare
        module, ``optimizer`` what ``optim.named_state`` returns, ``scaler`` the state of a ``torch.amp.GradScaler``.
        """

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of this rank that ``save`` makes its state of, by name, as it lies; nothing is gathered."""

    def load(self, state: dict[str, Any]) -> None:
        """Restore what ``save`` of any strategy returned on rank 0; called with the same state on every rank."""

    def close(self) -> None:
        """Give back what the strategy holds outside itself."""
