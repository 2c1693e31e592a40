"""Equation 5: weights learned by gradient descent, scaled by how the average variance of each loss changes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtunet_dist import distributed
from mtunet_dist.errors import InputError, check_choice

FLOOR = 1e-2  # no weight falls below
ALPHA_RANGE = (0.1, 10.0)
EPSILON = 1e-8
BETAS = (0.9, 0.999)  # of Adam
Update = Literal["epoch", "step"]
Parametrization = Literal["linear", "exp"]
Optimizer = Literal["sgd", "adam"]


class LearnedWeighting(nn.Module):
    """Total loss = sum_i lambda_i L_i with lambda_i = W_i alpha_i / sum_j W_j alpha_j, so that the lambdas sum to 1.

    From the paper (eq. 5): alpha_i = (sigma_i(t - 1) + eps) / (sigma_i(t - 2) + eps) in epoch t, where sigma_i(t) is
    the average variance of L_i over a fixed number of epochs up to t. W learns at a rate of its own, 1e-3. Training
    alternates: the network learns while the lambdas are constant, W learns while the losses are constant.

    The rest is not in the paper; it is our reading. The variance of an epoch is that of the losses of its
    steps, on all ranks. sigma averages over the last ``window`` epochs, over fewer while fewer are done; alpha is 1
    until two epochs are done. alpha is clipped to [0.1, 10], eps is 1e-8. After each epoch W takes one step down the
    gradient of sum_i lambda_i(W) L_i, with L the mean losses of that epoch over all ranks. W keeps to W >= 0.01 and to
    a sum of the number of tasks.

    The gradient always moves weight to the smaller loss and nothing pulls it back. The paper reports that one task
    dominates at first and that the weights converge to about 0.5 each. With one small step per epoch the weights start
    at 0.5 (unless ``initial`` says otherwise) and hardly move; faster updates end with one task at the floor.

    The state is in buffers. Those named ``local_*`` are sums over this rank's running epoch, so they are saved and
    loaded per rank, added up when the number of ranks changes, and DDP must not broadcast them; the others are equal
    on all ranks. Sums of squares in float64 lose about 1e-16 * mean^2 / variance of the variance, which is nothing.
    Losses that are not finite are left out. Raises InputError for options out of range.

    Options:
        lr: step size of W.
        initial: W at the start, one number >= 0.01 per task in the order of the tasks, scaled to a sum of the number
            of tasks; empty: 1 for each.
        window: number of epochs over which sigma averages.
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
    variances: Tensor
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
        initial: tuple[float, ...] = (),
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
            check_choice(name, value, kind)
        self.tasks, self.lr, self.window = list(tasks), lr, window
        self.update, self.parametrization, self.optimizer = update, parametrization, optimizer
        n = len(tasks)
        self.register_buffer("raw_weights", _initial_weights(tasks, initial))
        self.register_buffer("alpha", torch.ones(n, dtype=torch.float64))
        for name in ("adam_mean", "adam_square", "local_count", "local_sum", "local_squares"):
            self.register_buffer(name, torch.zeros(n, dtype=torch.float64))
        self.register_buffer("variances", torch.zeros(window + 1, n, dtype=torch.float64))  # of epochs, newest first
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))  # with a variance
        self.register_buffer("adam_steps", torch.zeros((), dtype=torch.int64))

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        """The total (scalar) of the scalar losses. Records them if the module trains and gradients are on."""
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
        """One step of W down the gradient of sum_i lambda_i(W) L_i. The gradient is 0 if a loss is unknown (nan)."""
        losses = torch.where(losses.isfinite().all(), losses, 0.0)
        # d/dW_k of sum(W a L) / sum(W a) = a_k (L_k - sum_i lambda_i L_i) / sum(W a)
        expected = (self._lambdas() * losses).sum()
        gradient = self.alpha * (losses - expected) / (self.raw_weights * self.alpha).sum()
        exp = self.parametrization == "exp"
        if exp:
            gradient = gradient * self.raw_weights  # d/ds of W = exp(s)
        move = self.lr * (self._adam(gradient) if self.optimizer == "adam" else gradient)
        moved = self.raw_weights * (-move).exp() if exp else self.raw_weights - move
        # Share out only the part above the floor, so that normalising cannot push a weight below it.
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
        self.variances.copy_(torch.cat([variance[None], self.variances[:-1]]))
        self.epochs += 1
        epochs = int(self.epochs)
        if epochs >= 2:
            newest = self.variances[: min(epochs, self.window)].mean(0)
            before = self.variances[1 : 1 + min(epochs - 1, self.window)].mean(0)
            self.alpha.copy_(((newest + EPSILON) / (before + EPSILON)).clamp(*ALPHA_RANGE))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Also read older checkpoints, which hold the variance of the newest epoch, and ratios that are not used."""
        if (old := state_dict.pop(f"{prefix}variance", None)) is not None:
            state_dict.pop(f"{prefix}ratios")
            state_dict[f"{prefix}variances"] = torch.cat([old[None], torch.zeros_like(self.variances[1:])])
            state_dict[f"{prefix}epochs"] = state_dict[f"{prefix}epochs"].clamp(max=1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _initial_weights(tasks: list[str], initial: tuple[float, ...]) -> Tensor:
    """The initial W, float64, with the number of tasks as its sum. Raises InputError for numbers that do not fit."""
    if not initial:
        return torch.ones(len(tasks), dtype=torch.float64)
    if len(initial) != len(tasks):
        raise InputError(f"initial needs one number for each of {', '.join(tasks)}, got {tuple(initial)}")
    weights = torch.tensor(initial, dtype=torch.float64)
    weights = weights / weights.sum() * len(tasks)
    if not (weights >= FLOOR).all():  # this also finds numbers that are not finite
        raise InputError(f"initial must be >= {FLOOR} when scaled to a sum of {len(tasks)}, got {tuple(initial)}")
    return weights


PLUGIN = LearnedWeighting
