"""Weights that change over the epochs by settings of the config. Our own; the paper has no schedules."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mtunet_dist.errors import InputError, check_choice

Shape = Literal["constant", "linear", "cosine", "step"]


class ScheduledWeighting(nn.Module):
    """The sum of the losses, each times a weight that is constant within an epoch and known beforehand.

    Up to epoch ``begin_epoch`` (the first is 0) the weights are ``start``, from epoch ``end_epoch`` on they are
    ``end``. The number of epochs done is in a buffer, so a resumed run goes on where it was. Raises InputError for
    options that do not fit.

    Options:
        start: one number >= 0 per task, in the order of the tasks. Not normalised.
        end: likewise.
        shape: how the weights get from one to the other: "linear"; "cosine", which is slow at both ends; "step", in
            equal jumps; "constant": they stay at ``start``, to compare with.
        begin_epoch: as above.
        end_epoch: as above; must be greater.
        steps: of "step", how many jumps, evenly spread, the last at ``end_epoch``.
    """

    start: Tensor
    end: Tensor
    epochs: Tensor

    def __init__(
        self,
        tasks: list[str],
        *,
        start: tuple[float, ...] = (1.0, 1.0),
        end: tuple[float, ...] = (1.0, 1.0),
        shape: Shape = "linear",
        begin_epoch: int = 0,
        end_epoch: int = 100,
        steps: int = 1,
    ) -> None:
        super().__init__()
        for name, weights in (("start", start), ("end", end)):
            if len(weights) != len(tasks):
                raise InputError(f"{name} needs one number for each of {', '.join(tasks)}, got {tuple(weights)}")
            if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
                raise InputError(f"{name} must be finite and >= 0, got {tuple(weights)}")
        check_choice("shape", shape, Shape)
        if not 0 <= begin_epoch < end_epoch:
            raise InputError(f"epochs must be 0 <= begin_epoch < end_epoch, got {begin_epoch} and {end_epoch}")
        if steps < 1:
            raise InputError(f"steps must be >= 1, got {steps}")
        self.tasks, self.shape, self.steps = list(tasks), shape, steps
        self.begin_epoch, self.span = begin_epoch, end_epoch - begin_epoch
        # Not persistent: on resume the config decides, not the checkpoint.
        self.register_buffer("start", torch.tensor(start, dtype=torch.float64), persistent=False)
        self.register_buffer("end", torch.tensor(end, dtype=torch.float64), persistent=False)
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        stacked = torch.stack([losses[task] for task in self.tasks])
        return (self._current().to(stacked.dtype) * stacked).sum()

    def end_epoch(self) -> None:
        """Take the weights of the next epoch."""
        self.epochs += 1

    def weights(self) -> dict[str, Tensor]:
        return dict(zip(self.tasks, self._current(), strict=True))

    def _current(self) -> Tensor:
        return self.start.lerp(self.end, self._way())

    def _way(self) -> Tensor:
        """The completed share of the way from start to end, float64 in [0, 1]."""
        done = (self.epochs - self.begin_epoch).clamp(0, self.span)
        if self.shape == "linear":
            return done.double() / self.span
        if self.shape == "cosine":
            return (1 - torch.cos(math.pi * done.double() / self.span)) / 2
        if self.shape == "step":  # in integers, so that rounding delays no jump
            return torch.div(done * self.steps, self.span, rounding_mode="floor").double() / self.steps
        return torch.zeros_like(done, dtype=torch.float64)


PLUGIN = ScheduledWeighting
