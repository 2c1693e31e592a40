"""Equation 5: weights learned by gradient descent, scaled by how each loss's variance changes over epochs."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mtunet_dist import distributed
from mtunet_dist.errors import InputError

FLOOR = 1e-2  # no weight falls below
ALPHA_RANGE = (0.1, 10.0)
EPSILON = 1e-8
BETAS = (0.9, 0.999)  # of Adam
Update = Literal["epoch", "step"]
Parametrization = Literal["linear", "exp"]
Optimizer = Literal["sgd", "adam"]


class LearnedWeighting(nn.Module):
    """Total loss = sum_i lambda_i L_i with lambda_i = W_i alpha_i / sum_j W_j alpha_j, so that the lambdas sum to 1.

    The paper alternates: the network learns with lambda constant, W learns with the losses constant. Where it is
    silent, our reading: after each epoch W takes one step down the gradient of sum_i lambda_i(W) L_i, with L the
    mean losses of that epoch over all ranks; W starts at 1, keeps to W >= 0.01 and to a sum of the number of tasks.
    Then alpha_i becomes the mean, over the last ``window`` epochs, of the variance of loss i within the epoch
    divided by the one of the epoch before (+ 1e-8), clipped to [0.1, 10]; it is 1 before there are two epochs.

    The gradient always moves weight to the smaller loss and nothing pulls it back. One small step per epoch keeps
    two tasks near the paper's "about 0.5 each"; faster updates end with one task at the floor.

    The state is in buffers. Those named ``local_*`` are sums over this rank's running epoch, so they are saved and
    loaded per rank, added up when the number of ranks changes, and DDP must not broadcast them; the others are equal
    on all ranks. Sums of squares in float64 lose about 1e-16 * mean^2 / variance of the variance, which is nothing.
    Losses that are not finite are left out. Raises InputError for options out of range.

    Options:
        lr: step size of W.
        window: epochs over which alpha is averaged.
        update: "epoch" as above; "step" updates W at each training forward, after using it, from that step's losses
            averaged over ranks (one more all-reduce per forward): weights drift hundreds of times as fast.
        parametrization: "linear" steps W itself; "exp" steps s in W = exp(s), which makes relative moves, so a small
            weight shrinks ever more slowly.
        optimizer: "sgd" moves W in proportion to the difference of the losses; "adam" moves about lr each time
            whatever the difference is. Adam per step collapses: at lr 1e-3 the larger loss is at the floor within
            2000 steps.
    """

    raw_weights: Tensor
    alpha: Tensor
    variance: Tensor
    ratios: Tensor
    epochs: Tensor
    adam_mean: Tensor
    adam_square: Tensor
    adam_steps: Tensor
    local_count: Tensor
    local_sum: Tensor
    local_squares: Tensor

    def __init__(
        self,
        tasks: list[str],
        *,
        lr: float = 1e-3,
        window: int = 5,
        update: Update = "epoch",
        parametrization: Parametrization = "linear",
        optimizer: Optimizer = "sgd",
    ) -> None:
        super().__init__()
        if not lr > 0 or window < 1:
            raise InputError(f"lr must be > 0 and window >= 1, got {lr} and {window}")
        for name, value, kind in (
            ("update", update, Update),
            ("parametrization", parametrization, Parametrization),
            ("optimizer", optimizer, Optimizer),
        ):
            if value not in get_args(kind):
                raise InputError(f"{name} must be one of {', '.join(get_args(kind))}, got '{value}'")
        self.tasks, self.lr, self.window = list(tasks), lr, window
        self.update, self.parametrization, self.optimizer = update, parametrization, optimizer
        n = len(tasks)
        for name in ("raw_weights", "alpha"):
            self.register_buffer(name, torch.ones(n, dtype=torch.float64))
        for name in ("variance", "adam_mean", "adam_square", "local_count", "local_sum", "local_squares"):
            self.register_buffer(name, torch.zeros(n, dtype=torch.float64))
        self.register_buffer("ratios", torch.zeros(window, n, dtype=torch.float64))  # a ring, see _update_alpha
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))  # with a variance
        self.register_buffer("adam_steps", torch.zeros((), dtype=torch.int64))

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        """The total (scalar) of the scalar losses; notes them if the module trains and gradients are on."""
        stacked = torch.stack([losses[task] for task in self.tasks])
        total = (self._lambdas().to(stacked.dtype) * stacked).sum()
        if self.training and torch.is_grad_enabled():
            self._note(stacked.detach().double())
        return total

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Update W and alpha from the epoch's losses and start a new epoch. Collective over ranks."""
        count, total, squares = self._sum_over_ranks(self.local_count, self.local_sum, self.local_squares)
        mean = total / count
        if self.update == "epoch":
            self._step(mean)
        if (count >= 2).all():
            self._update_alpha((squares - total * mean).clamp(min=0) / (count - 1))
        for buffer in (self.local_count, self.local_sum, self.local_squares):
            buffer.zero_()

    def weights(self) -> dict[str, Tensor]:
        """The current lambda of each task."""
        return dict(zip(self.tasks, self._lambdas(), strict=True))

    def _lambdas(self) -> Tensor:
        scaled = self.raw_weights * self.alpha
        return scaled / scaled.sum()

    @torch.no_grad()
    def _note(self, values: Tensor) -> None:
        finite = values.isfinite()
        values = torch.where(finite, values, 0.0)
        self.local_count += finite
        self.local_sum += values
        self.local_squares += values.square()
        if self.update == "step":
            count, total = self._sum_over_ranks(finite.double(), values)
            self._step(total / count)

    @staticmethod
    def _sum_over_ranks(*values: Tensor) -> list[Tensor]:
        stacked = torch.stack(values)
        distributed.all_reduce_sum(stacked)
        return list(stacked)

    def _step(self, losses: Tensor) -> None:
        """One step of W down the gradient of sum_i lambda_i(W) L_i; the gradient is 0 if a loss is unknown (nan)."""
        losses = torch.where(losses.isfinite().all(), losses, 0.0)
        # d/dW_k of sum(W a L) / sum(W a) = a_k (L_k - sum_i lambda_i L_i) / sum(W a)
        expected = (self._lambdas() * losses).sum()
        gradient = self.alpha * (losses - expected) / (self.raw_weights * self.alpha).sum()
        exp = self.parametrization == "exp"
        if exp:
            gradient = gradient * self.raw_weights  # d/ds of W = exp(s)
        move = self.lr * (self._adam(gradient) if self.optimizer == "adam" else gradient)
        moved = self.raw_weights * (-move).exp() if exp else self.raw_weights - move
        # Share out what lies above the floor, so that normalising cannot push a weight below it.
        n = len(self.tasks)
        excess = moved.clamp(FLOOR, n) - FLOOR + 1e-30  # equal shares if all are at the floor
        self.raw_weights.copy_(FLOOR + excess / excess.sum() * n * (1 - FLOOR))

    def _adam(self, gradient: Tensor) -> Tensor:
        self.adam_steps += 1
        self.adam_mean.lerp_(gradient, 1 - BETAS[0])
        self.adam_square.lerp_(gradient.square(), 1 - BETAS[1])
        mean = self.adam_mean / (1 - BETAS[0] ** self.adam_steps)
        square = self.adam_square / (1 - BETAS[1] ** self.adam_steps)
        return mean / (square.sqrt() + EPSILON)

    def _update_alpha(self, variance: Tensor) -> None:
        epochs = int(self.epochs)
        if epochs > 0:
            self.ratios[(epochs - 1) % self.window] = variance / (self.variance + EPSILON)
            self.alpha.copy_(self.ratios[: min(epochs, self.window)].mean(0).clamp(*ALPHA_RANGE))
        self.variance.copy_(variance)
        self.epochs += 1


PLUGIN = LearnedWeighting
