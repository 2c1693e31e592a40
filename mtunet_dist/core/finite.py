"""Tests whether numbers are finite, without waiting for the device."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

Named = Iterable[tuple[str, Tensor]]


def count_broken(tensors: Named, device: torch.device, factor: int = 1) -> Tensor:
    """Count the ``tensors`` that hold a number that is not finite, or that would not be finite times ``factor``.

    Returns a scalar on ``device``, which computes it. Integers are always finite.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for _, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            alike[tensor.device, tensor.dtype].append(tensor.detach())
    broken = torch.zeros((), device=device)
    for group in alike.values():
        largest = torch.stack(torch._foreach_norm(group, math.inf))  # largest magnitude, or nan, of each
        broken += (~largest.mul_(factor).isfinite()).sum().to(device, non_blocking=True)
    return broken


def first_broken(tensors: Named, factor: int = 1) -> str | None:
    """The first tensor that ``count_broken`` counts, as ``NAME became inf``; None if there is none. Waits for the
    device."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            largest = tensor.detach().abs().max().mul(factor).item()
            if not math.isfinite(largest):
                return f"{name} became {largest}"
    return None
