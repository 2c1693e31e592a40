"""The optimiser, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtunet_dist.config import OptimConfig
from mtunet_dist.core.step import MultiTaskStep
from mtunet_dist.errors import InputError

NamedState = dict[str, dict[str, Tensor]]
"""The state of an optimiser, by the name of the parameter: ``step``, a scalar; every other entry (``exp_avg``,
``exp_avg_sq``, ``momentum_buffer``) has the parameter's shape. It is empty for a parameter that was never updated. It
does not depend on the order of parameters and groups, nor on how ranks share them, so that any strategy can write and
read it."""


def build_optimizer(step: MultiTaskStep, config: OptimConfig) -> Optimizer:
    """The configured optimiser over ``step``.

    Biases and norm parameters have no weight decay. Loss weights that learn by gradient form their own group with the
    weighting's ``lr``, which no schedule changes.
    """
    model = [p for p in step.model.parameters() if p.requires_grad]
    weighting: Any = step.weighting
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model if p.ndim > 1], "scheduled": True},
        {"params": [p for p in model if p.ndim <= 1], "scheduled": True, "weight_decay": 0.0},
    ]
    if learned := list(weighting.parameters()):
        groups.append({"params": learned, "scheduled": False, "weight_decay": 0.0, "lr": weighting.lr})
    builders: dict[str, Callable[[], Optimizer]] = {
        "adam": lambda: torch.optim.Adam(
            groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        ),
        "adamw": lambda: torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        ),
        "sgd": lambda: torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        ),
    }
    return builders[config.name]()


def start_momentum(optimizer: Optimizer) -> None:
    """Give SGD a momentum of zero, as if it had been updated before. Other optimisers are not changed.

    If gradients overflow in the first step, a GradScaler makes fused SGD skip it. In the second step fused SGD would
    then use uninitialised memory as momentum.
    """
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else []:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give ``lr`` to every group that follows the schedule."""
    for group in optimizer.param_groups:
        if group["scheduled"]:
            group["lr"] = lr


def lr_at(step: int, config: OptimConfig, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of optimiser step ``step`` (from 0)."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    factors: dict[str, Callable[[], float]] = {
        "constant": lambda: 1.0,
        "step": lambda: config.step_gamma ** math.floor(step / steps_per_epoch / config.step_epochs),
        "linear": lambda: 1 - progress,
        "cosine": lambda: (1 + math.cos(math.pi * progress)) / 2,
        "poly": lambda: (1 - progress) ** config.poly_power,
    }
    floor = config.min_lr if config.schedule in ("linear", "cosine", "poly") else 0.0
    return floor + (config.lr - floor) * factors[config.schedule]()


def named_state(optimizer: Optimizer, module: nn.Module) -> NamedState:
    """The state of ``optimizer``, which holds the whole trained parameters of ``module``. Tensors are not copied."""
    return {name: dict(optimizer.state.get(p, {})) for name, p in module.named_parameters() if p.requires_grad}


def named_tensors(optimizer: Optimizer, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state of ``module``, whole, and of ``optimizer``, by name."""
    yield from module.state_dict().items()
    for name, slots in named_state(optimizer, module).items():
        yield from ((f"{slot} of {name}", value) for slot, value in slots.items())


def load_named_state(optimizer: Optimizer, module: nn.Module, state: NamedState) -> None:
    """Restore a state from ``named_state``. InputError if it belongs to other parameters."""
    check_names(module, state)
    optimizer.state.clear()
    for name, parameter in module.named_parameters():
        if state.get(name):
            # Fused optimisers read memory in order, not by index: the moments need the memory layout of their parameter
            # here.
            optimizer.state[parameter] = {
                slot: value.to(parameter.device, copy=True)
                if slot == "step"
                else torch.empty_like(parameter, requires_grad=False).copy_(value)
                for slot, value in state[name].items()
            }


def check_names(module: nn.Module, state: NamedState) -> None:
    """Raise InputError unless ``state`` belongs to exactly the trained parameters of ``module``."""
    expected = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if odd := sorted(expected ^ state.keys()):
        raise InputError(f"the optimiser's state in the checkpoint is of other parameters; first difference: {odd[0]}")
