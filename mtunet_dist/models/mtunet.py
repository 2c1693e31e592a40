"""MT-UNet: one densely connected encoder, one attention decoder per task, and connections between the decoders."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtunet_dist.errors import InputError, check_choice
from mtunet_dist.models._blocks import (
    Bilinear,
    ConvReLUBN,
    DecoderBlock,
    DenseEncoder,
    UpConv,
    check_outputs,
    check_size,
)

DenseScope = Literal["encoder", "block", "none"]
Upsampling = Literal["transposed", "bilinear"]
CrossTalkFrom = Literal["attended", "raw"]
STRIDE = 16  # four poolings
LISTENING_BLOCK = 2  # decoder block 3 of the paper (2 from 0) also takes the maps of block 2 of the other tasks


class TaskDecoder(nn.Module):
    """The four decoder blocks, the three upsamplings between them and the 1x1 head of one task."""

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        bottleneck: int,
        heard: int,
        attention: bool,
        upsampling: Upsampling,
    ) -> None:
        super().__init__()
        deepest_first = list(reversed(widths))
        up = {"transposed": UpConv, "bilinear": Bilinear}[upsampling]
        self.ups = nn.ModuleList(up(a, b) for a, b in itertools.pairwise(deepest_first))
        self.blocks = nn.ModuleList()
        for level, width in enumerate(deepest_first):
            previous = bottleneck if level == 0 else width
            others = heard if level == LISTENING_BLOCK else 0
            self.blocks.append(DecoderBlock(width + previous + others, width, attention))
        self.head = nn.Conv2d(widths[0], channels, 1)

    def run_block(
        self, level: int, skip: Tensor, previous: Tensor, heard: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The output of block ``level`` for the encoder's skip, the previous block and the other tasks' maps."""
        if level > 0:
            previous = self.ups[level - 1](previous)
        result: tuple[Tensor, Tensor, Tensor | None] = self.blocks[level](torch.cat([skip, previous, *heard], dim=1))
        return result


class MTUNet(nn.Module):
    """MT-UNet for any number of dense prediction tasks.

    ``outputs`` maps each task's name to its number of channels. ``forward(image (N, 3, H, W) float)`` returns
    ``{task: (N, channels, H, W)}``; H and W must be multiples of 16. Raises InputError for sizes or options that
    do not fit. Weights start with torch's default initialisation. What the paper says, and how we read it:

    - Paper: encoder of 4 blocks of two 3x3 convs (ReLU, then BN); every conv sees the concatenated outputs of all
      previous conv layers; dropout and 2x2 max-pool after each block.
      Our reading: dense across the whole encoder, earlier maps pooled to the resolution at hand, the raw image not
      among them, so the convs see 3, 64, 128, 256, 384, 640, 896, 1408 channels. Dropout (on single values) hits
      only the maps that the block added; its rate is not said. A conv is 3x3 conv with bias -> ReLU -> BN.
    - Paper: a bottleneck of two 3x3 convs (ReLU, BN) and a transposed conv, giving 1024 maps.
      Our reading: it is fed by conv 2 of block 4 alone; its 2x2 stride-2 transposed conv is shared by all tasks.
    - Paper: a decoder per task of 4 blocks of two 3x3 convs (ReLU, BN), fed by the encoder block's maps and the
      previous decoder block.
      Our reading: the encoder's maps are the conv-2 output before dropout; widths mirror the encoder; a 2x2
      stride-2 transposed conv of each task between its blocks takes the channels to the next width; 1x1 conv heads.
    - Paper: an attention mask per decoder block: conv 1's output -> 3x3 conv with ReLU -> 3x3 conv with sigmoid,
      each with a batch norm; it multiplies conv 2's output.
      Our reading: the batch norms come before ReLU and sigmoid; the mask has as many channels as that output.
    - Paper: skip connections from decoder block 2 of each task to block 3 of the other.
      Our reading: the attended output, upsampled bilinearly by 2 and concatenated; with three or more tasks a
      decoder takes the maps of all the others.

    Options:
        widths: channels of the four encoder blocks, shallowest first.
        bottleneck: channels of the bottleneck.
        dense_scope: "encoder" as above; "block": only conv 2 is dense, it sees the block's input and conv 1's
            output; "none": the chain of a plain U-Net.
        attention: the masks of the decoder blocks.
        cross_talk: the connections from block 2 to block 3 of the other tasks.
        dropout: probability in [0, 1) after each encoder block.
        dense_image: with dense_scope "encoder", the raw image is among what every conv sees.
        skips_after_dropout: the decoders see the encoder's maps after dropout instead of before.
        upsampling: between decoder blocks: "transposed" as above; "bilinear": bilinear by 2, then a 1x1 conv.
        cross_talk_from: "attended": the output of the other task's block 2; "raw": its conv 2, without the mask.
    """

    def __init__(
        self,
        outputs: dict[str, int],
        *,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        bottleneck: int = 1024,
        dense_scope: DenseScope = "encoder",
        attention: bool = True,
        cross_talk: bool = True,
        dropout: float = 0.2,
        dense_image: bool = False,
        skips_after_dropout: bool = False,
        upsampling: Upsampling = "transposed",
        cross_talk_from: CrossTalkFrom = "attended",
    ) -> None:
        super().__init__()
        _check_options(outputs, widths, bottleneck, dropout)
        for name, value, kind in (
            ("dense_scope", dense_scope, DenseScope),
            ("upsampling", upsampling, Upsampling),
            ("cross_talk_from", cross_talk_from, CrossTalkFrom),
        ):
            check_choice(name, value, kind)
        self.cross_talk = cross_talk and len(outputs) > 1
        self.says_raw = cross_talk_from == "raw"
        self.encoder = DenseEncoder(
            widths, dense_scope, dropout, dense_image=dense_image, skips_after_dropout=skips_after_dropout
        )
        self.bottleneck = nn.Sequential(
            ConvReLUBN(widths[-1], bottleneck), ConvReLUBN(bottleneck, bottleneck), UpConv(bottleneck, bottleneck)
        )
        heard = (len(outputs) - 1) * widths[-LISTENING_BLOCK] if self.cross_talk else 0
        self.decoders = nn.ModuleDict(
            {
                task: TaskDecoder(channels, widths, bottleneck, heard, attention, upsampling)
                for task, channels in outputs.items()
            }
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.forward_with_masks(image)[0]

    def forward_with_masks(self, image: Tensor) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """Return the outputs, and for each task the attention masks of its decoder blocks, deepest first.

        Mask i is (N, widths[3 - i], H / 2**(3 - i), W / 2**(3 - i)) with values in [0, 1]. The lists are empty without
        attention.
        """
        check_size(image, STRIDE)
        decoders = cast("dict[str, TaskDecoder]", dict(self.decoders.items()))
        skips, deepest = self.encoder(image)
        maps = dict.fromkeys(decoders, self.bottleneck(deepest))
        raw: dict[str, Tensor] = {}
        masks: dict[str, list[Tensor]] = {task: [] for task in decoders}
        for level, skip in enumerate(reversed(skips)):
            said: dict[str, Tensor] = {}
            if self.cross_talk and level == LISTENING_BLOCK:
                source = raw if self.says_raw else maps
                said = {task: F.interpolate(m, scale_factor=2, mode="bilinear") for task, m in source.items()}
            for task, decoder in decoders.items():
                heard = [m for other, m in said.items() if other != task]
                maps[task], raw[task], mask = decoder.run_block(level, skip, maps[task], heard)
                if mask is not None:
                    masks[task].append(mask)
        return {task: decoder.head(maps[task]) for task, decoder in decoders.items()}, masks


def _check_options(outputs: dict[str, int], widths: Sequence[int], bottleneck: int, dropout: float) -> None:
    check_outputs(outputs)
    if len(widths) != 4 or min(*widths, bottleneck) < 1:
        raise InputError(f"widths must be 4 positive numbers and bottleneck one, got {tuple(widths)} and {bottleneck}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must be in [0, 1), got {dropout}")


PLUGIN = MTUNet
