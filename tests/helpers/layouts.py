"""Memory layouts within a network."""

from __future__ import annotations

import torch
from torch import nn


def watch_layouts(model: nn.Module) -> list[bool]:
    """A list that grows when ``model`` runs: for each convolution, whether its input was channels-last."""
    layouts: list[bool] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(
                lambda _m, i, _o: layouts.append(i[0].is_contiguous(memory_format=torch.channels_last))
            )
    return layouts
