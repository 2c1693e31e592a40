"""MTAN (Liu, Johns, Davison 2019): one shared SegNet, and attention for each task that selects from its maps."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtunet_dist.models._blocks import check_outputs, check_size
from mtunet_dist.models._segnet import (
    STRIDE,
    WIDTHS,
    Body,
    ConvBNReLU,
    Head,
    Maps,
    check_widths,
    decoder_width,
    initialise,
)


class PixelMask(nn.Sequential):
    """1x1 conv, BatchNorm, ReLU -> 1x1 conv, BatchNorm, sigmoid: a mask in [0, 1] for each channel and pixel."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width),
            nn.Sigmoid(),
        )


class MTAN(nn.Module):
    """Multi-Task Attention Network on SegNet, for any number of tasks; with one it is STAN.

    ``outputs`` maps each task's name to its number of channels. ``forward(image (N, 3, H, W) float)`` returns
    ``{task: (N, channels, H, W)}``; H and W must be multiples of 32. Raises InputError for sizes or options that do
    not fit. 41.21 M parameters for two tasks of 7 and 1 channels, 44.23 M for three of 13, 1 and 3.

    At each level of the shared net a mask of the task multiplies the maps after the last convolution. In the encoder
    the mask is made from the maps after the first convolution and what the task carries down from the level above; in
    the decoder from the unpooled maps and what it carries up from the level below.

    Kept of the MTAN code: the convolutions that carry a task's maps on are shared by all tasks, running statistics
    included; bilinear upsampling with aligned corners; the two convolutions of the head with nothing between them; the
    initial values. Left out: the log-softmax of class scores and the division of normals by their length (outputs are
    raw; the losses do it), and the loss weights kept in the model (they are ``weighting.name=uncertainty``).

    Options:
        widths: channels of the five levels, shallowest first.
    """

    def __init__(self, outputs: dict[str, int], *, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        check_outputs(outputs)
        check_widths(widths)
        self.body = Body(widths)
        up_widths = [decoder_width(widths, i) for i in range(len(widths))]
        down = zip(widths, [*widths[1:], widths[-1]], strict=True)
        self.carry_down = nn.ModuleList(ConvBNReLU(a, b) for a, b in down)
        self.carry_up = nn.ModuleList(ConvBNReLU(a, b) for a, b in zip(widths, up_widths, strict=True))
        self.masks_down, self.masks_up, self.heads = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for task, channels in outputs.items():
            self.masks_down[task] = nn.ModuleList(
                PixelMask(width if i == 0 else 2 * width, width) for i, width in enumerate(widths)
            )
            self.masks_up[task] = nn.ModuleList(PixelMask(a + b, b) for a, b in zip(widths, up_widths, strict=True))
            self.heads[task] = Head(widths[0], channels)
        initialise(self)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.forward_with_masks(image)[0]

    def forward_with_masks(self, image: Tensor) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """The outputs, and for each task its ten attention masks with values in [0, 1].

        Five of the encoder, shallowest first, (N, widths[i], H / 2**i, W / 2**i); then five of the decoder, deepest
        first, (N, widths[max(i - 1, 0)], H / 2**i, W / 2**i) for i = 4 to 0.
        """
        check_size(image, STRIDE)
        maps = self.body(image)
        outputs: dict[str, Tensor] = {}
        masks: dict[str, list[Tensor]] = {}
        for task, head in self.heads.items():
            attended, masks[task] = self._attend(task, maps)
            outputs[task] = head(attended)
        return outputs, masks

    def _attend(self, task: str, maps: Maps) -> tuple[Tensor, list[Tensor]]:
        masks_down = cast("nn.ModuleList", self.masks_down[task])
        masks_up = cast("nn.ModuleList", self.masks_up[task])
        masks: list[Tensor] = []
        carried: list[Tensor] = []  # the maps from the level before, empty at first
        for (first, last), to_mask, carry in zip(maps.encoder, masks_down, self.carry_down, strict=True):
            mask = to_mask(torch.cat([first, *carried], dim=1))
            masks.append(mask)
            carried = [F.max_pool2d(carry(mask * last), 2)]
        (x,) = carried
        levels = zip(maps.unpooled, maps.decoder, reversed(masks_up), reversed(self.carry_up), strict=True)
        for unpooled, last, to_mask, carry in levels:
            up = carry(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
            mask = to_mask(torch.cat([unpooled, up], dim=1))
            masks.append(mask)
            x = mask * last
        return x, masks


PLUGIN = MTAN
