"""Whether numbers are finite, asked of the device without waiting for its answer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

Named = Iterable[tuple[str, Tensor]]


def count_broken(tensors: Named, device: torch.device, factor: int = 1) -> Tensor:
    """How many of ``tensors`` hold a number that is not finite, or would not be ``factor`` times as large.

    A scalar on ``device``, which computes it; integers are finite.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for _, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            alike[tensor.device, tensor.dtype].append(tensor.detach())
    broken = torch.zeros((), device=device)
    for group in alike.values():
        largest = torch.stack(torch._foreach_norm(group, math.inf))  # of each, and nan where there is one
        broken += (~largest.mul_(factor).isfinite()).sum().to(device, non_blocking=True)
    return broken


def first_broken(tensors: Named, factor: int = 1) -> str | None:
    """The first that ``count_broken`` counts, as ``NAME became inf``, None if there is none; waits for the device."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            largest = tensor.detach().abs().max().mul(factor).item()
            if not math.isfinite(largest):
                return f"{name} became {largest}"
    return None
