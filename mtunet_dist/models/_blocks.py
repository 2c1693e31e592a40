"""Layers of MT-UNet, and the checks that all models share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtunet_dist.errors import InputError


class ConvReLUBN(nn.Sequential):
    """3x3 convolution with bias -> ReLU -> BatchNorm, in the paper's order (the norm comes last, so do not fold it)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(out_channels)
        )


class AttentionMask(nn.Sequential):
    """3x3 conv, BatchNorm, ReLU -> 3x3 conv, BatchNorm, sigmoid: a mask in [0, 1] for each channel and pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.Sigmoid(),
        )


class UpConv(nn.ConvTranspose2d):
    """2x2 transposed convolution with stride 2: doubles height and width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)


class Bilinear(nn.Sequential):
    """Doubles height and width bilinearly, then a 1x1 convolution sets the channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(in_channels, out_channels, 1))


class DenseEncoder(nn.Module):
    """U-Net encoder with dense connections. ``MTUNet`` explains its options.

    ``forward(image (N, 3, H, W))`` returns ``(skips, deepest)``. ``skips`` has the conv-2 output of each block,
    shallowest first, (N, widths[i], H / 2**i, W / 2**i), before dropout unless ``skips_after_dropout``. ``deepest`` is
    the last of them after dropout and pooling.
    """

    def __init__(
        self,
        widths: Sequence[int],
        dense_scope: str,
        dropout: float,
        *,
        dense_image: bool = False,
        skips_after_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.dense_scope = dense_scope
        self.skips_after_dropout = skips_after_dropout
        self.image_in_history = dense_scope == "block" or (dense_scope == "encoder" and dense_image)
        self.dropout = nn.Dropout(dropout)
        self.pool = nn.MaxPool2d(2)
        self.conv1s, self.conv2s = nn.ModuleList(), nn.ModuleList()
        first_in, history = 3, 3 if self.image_in_history else 0
        for width in widths:
            self.conv1s.append(ConvReLUBN(first_in, width))
            self.conv2s.append(ConvReLUBN(history + width, width))
            if dense_scope == "encoder":
                history += 2 * width
            elif dense_scope == "block":
                history = width
            first_in = history or width

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        skips: list[Tensor] = []
        x = image  # input of conv 1 of the next block
        history = [image] if self.image_in_history else []  # further inputs of its conv 2, besides conv 1
        for conv1, conv2 in zip(self.conv1s, self.conv2s, strict=True):
            first = conv1(x)
            second = conv2(torch.cat([*history, first], dim=1))
            dropped = self.dropout(second)
            skips.append(dropped if self.skips_after_dropout else second)
            x = deepest = self.pool(dropped)
            if self.dense_scope == "encoder":
                # pool(cat) = cat(pool): one running tensor, pooled once per stage and joined at the smaller size.
                x = torch.cat([*map(self.pool, history), self.pool(self.dropout(first)), deepest], dim=1)
            history = [] if self.dense_scope == "none" else [x]
        return skips, deepest


class DecoderBlock(nn.Module):
    """Two convolutions. With ``attention``, a mask computed from conv 1's output multiplies conv 2's output.

    ``forward(x (N, in_channels, H, W))`` returns the output, conv 2's output and the mask, all (N, width, H, W). The
    mask is None without attention.
    """

    def __init__(self, in_channels: int, width: int, attention: bool) -> None:
        super().__init__()
        self.conv1 = ConvReLUBN(in_channels, width)
        self.conv2 = ConvReLUBN(width, width)
        self.mask = AttentionMask(width) if attention else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        first = self.conv1(x)
        second = self.conv2(first)
        if self.mask is None:
            return second, second, None
        mask = self.mask(first)
        return mask * second, second, mask


def check_outputs(outputs: dict[str, int]) -> None:
    """Raise InputError for a model without tasks or a task without channels."""
    if not outputs or min(outputs.values()) < 1:
        raise InputError(f"outputs must give at least one task with one channel or more, got {outputs}")


def check_size(image: Tensor, stride: int) -> None:
    """Raise InputError for an image (N, 3, H, W) whose height or width is not a multiple of ``stride``."""
    height, width = image.shape[-2:]
    if height % stride or width % stride:
        near = [max(stride, (size + stride // 2) // stride * stride) for size in (height, width)]
        raise InputError(
            f"image of {height}x{width}: height and width must be multiples of {stride}, nearest is {near[0]}x{near[1]}"
        )
