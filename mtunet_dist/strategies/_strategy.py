"""The interface of a strategy: it does wrapping, gradients and the optimiser. The training loop does everything
else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from mtunet_dist.core.step import Batch, MultiTaskStep


class Strategy(Protocol):
    """``PLUGIN(step, config, device, **options)``."""

    module: MultiTaskStep
    """The bare module. Every rank has all its buffers, but perhaps all its parameters only in ``full_weights``."""

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the step on one micro-batch. Returns the total loss and the losses per task."""

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Context around forward and backward of one micro-batch. Gradients are reduced only with ``last``."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""

    def apply(self, lr: float) -> Tensor:
        """Clip, step and clear the gradients. Returns their norm before clipping, a scalar on the device."""

    @property
    def loss_scale(self) -> float:
        """The factor of the loss before the backward pass, 1 if not fp16. Reading it waits for the device."""

    def full_weights(self) -> AbstractContextManager[MultiTaskStep]:
        """A module with all current weights and buffers, for evaluation. Every rank enters it."""

    def save(self) -> dict[str, Any]:
        """The state of the module, optimiser and loss scaler on rank 0, and None on other ranks. Every rank calls it.

        All strategies write and read the same form for any number of ranks: ``model`` is the state dict of the bare
        module, ``optimizer`` is the result of ``optim.named_state``, ``scaler`` is the state of a
        ``torch.amp.GradScaler``.
        """

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of this rank from which ``save`` makes its state, by name, in their own layout. Nothing is
        gathered."""

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state that ``save`` of any strategy returned on rank 0. Every rank calls it with the same state."""

    def close(self) -> None:
        """Free the resources that the strategy holds outside itself."""
