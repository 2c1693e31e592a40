"""SegNet as the MTAN code builds it (github.com/lorenmt/mtan, im2im_pred): the common part of all baselines but
ST-UNet.

VGG-16's convolutions mirrored, with five poolings that are undone by their indices. Unlike in the SegNet paper, a
decoder level changes its width in the first of its convolutions, not in the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtunet_dist.errors import InputError

WIDTHS = (64, 128, 256, 512, 512)
CONVS = (2, 2, 3, 3, 3)  # of each level, shallowest first
STRIDE = 32  # five poolings


class ConvBNReLU(nn.Sequential):
    """3x3 convolution with bias -> BatchNorm -> ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
        )


class Head(nn.Sequential):
    """3x3 convolution, then 1x1 to ``channels``, with nothing between them: (N, channels, H, W), any real number."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__(nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, channels, 1))


class Level(nn.Module):
    """The convolutions at one resolution: ``forward(x)`` returns the maps after the first and after the last."""

    def __init__(self, in_channels: int, first_width: int, width: int, convs: int) -> None:
        super().__init__()
        self.first = ConvBNReLU(in_channels, first_width)
        rest = [ConvBNReLU(first_width, width)] + [ConvBNReLU(width, width) for _ in range(convs - 2)]
        self.rest = nn.Sequential(*rest)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first(x)
        return first, self.rest(first)


class Maps(NamedTuple):
    """What a body computed. Level i of the encoder is at H / 2**i; the decoder's lists are deepest first."""

    encoder: list[tuple[Tensor, Tensor]]  # after the first and the last convolution
    pooled: list[Tensor]
    unpooled: list[Tensor]
    decoder: list[Tensor]  # after the last convolution


class Body(nn.Module):
    """Encoder and decoder of a SegNet: ``forward(image (N, 3, H, W)).decoder[-1]`` is (N, widths[0], H, W).

    ``fed``: each level but the first also takes the maps of another body at that level, ``forward``'s ``shared``.
    ``whole``: if false, the decoder ends with the last unpooling, for a body whose last convolutions are not used.
    """

    def __init__(self, widths: Sequence[int], *, fed: bool = False, whole: bool = True) -> None:
        super().__init__()
        sources = 2 if fed else 1
        seen = [3, *(sources * width for width in widths[:-1])]
        self.encoder = nn.ModuleList(Level(a, b, b, n) for a, b, n in zip(seen, widths, CONVS, strict=True))
        self.decoder = nn.ModuleList()
        for i in reversed(range(0 if whole else 1, len(widths))):
            width = decoder_width(widths, i)
            first_width = sources * width if i == 0 else width
            self.decoder.append(Level(sources * widths[i], first_width, width, CONVS[i]))

    def forward(self, image: Tensor, shared: Maps | None = None) -> Maps:
        x = image
        maps, indices = Maps([], [], [], []), []
        for i, level in enumerate(self.encoder):
            if shared is not None and i > 0:
                x = torch.cat([x, shared.pooled[i - 1]], dim=1)
            first, last = level(x)
            x, index = pool(last)
            maps.encoder.append((first, last))
            maps.pooled.append(x)
            indices.append(index)
        for k, index in enumerate(reversed(indices)):
            x = unpool(x, index)
            maps.unpooled.append(x)
            if k < len(self.decoder):
                if shared is not None:
                    x = torch.cat([x, shared.unpooled[k]], dim=1)
                x = self.decoder[k](x)[1]
                maps.decoder.append(x)
        return maps


def decoder_width(widths: Sequence[int], level: int) -> int:
    """Output channels of decoder level ``level``, counted from the shallowest."""
    return widths[max(level - 1, 0)]


def pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each 2x2 window, and its position."""
    pooled, index = F.max_pool2d(x, 2, return_indices=True)
    return pooled, index


def unpool(x: Tensor, index: Tensor) -> Tensor:
    """Put each value back to the position where ``pool`` found it, with zeros elsewhere: doubles height and width."""
    return F.max_unpool2d(x, index, (2, 2))


def check_widths(widths: Sequence[int]) -> None:
    """Raise InputError unless there is a positive width for each of the five levels."""
    if len(widths) != len(CONVS) or min(widths) < 1:
        raise InputError(f"widths must be {len(CONVS)} positive numbers, got {tuple(widths)}")


def initialise(model: nn.Module) -> None:
    """The initial values of the MTAN code: Xavier normal for convolutions, biases 0; BatchNorm 1 and 0.

    Its dense and cross-stitch nets draw from the uniform distribution of the same variance; here all are normal.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
