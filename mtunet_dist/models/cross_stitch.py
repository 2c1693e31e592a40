"""Cross-stitch networks (Misra et al. 2016) on SegNet: one net per task, their maps mixed by learned weights."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from mtunet_dist.errors import InputError, check_choice
from mtunet_dist.models._blocks import check_outputs, check_size
from mtunet_dist.models._segnet import STRIDE, WIDTHS, Body, Head, check_widths, initialise, pool, unpool

Stitches = Literal["matrix", "shared"]


class CrossStitch(nn.Module):
    """One SegNet per task; the input of a level is a weighted sum of the maps of all tasks' nets there.

    ``outputs`` maps each task's name to its number of channels. ``forward(image (N, 3, H, W) float)`` returns
    ``{task: (N, channels, H, W)}``; H and W must be multiples of 32. Raises InputError for sizes or options that do
    not fit. 49.96 M parameters for two tasks of 7 and 1 channels, 74.94 M for three of 13, 1 and 3.

    The nine stitches are where the MTAN code has them: before encoder levels 2 to 5, and before each unpooling, which
    uses the indices of the task's own net. Also kept of that code: one weight per task for all channels; the two
    convolutions of the head with nothing between them. Left out: the log-softmax of class scores and the division of
    normals by their length (outputs are raw; the losses do it).

    Options:
        widths: channels of the five levels, shallowest first.
        stitches: "matrix": each task has its own sum, as in the paper and in LibMTL, ``mixing`` (9, to, from);
            "shared": one sum for all tasks, as in the MTAN code, all weights 1 at the start, ``mixing`` (9, from).
        own: matrix only, in [0, 1]: weight of a task's own maps at the start; the other tasks share the rest equally.
            The paper found 0.9 best; LibMTL starts with all weights 1, which after a BatchNorm is like 1 / tasks.
    """

    def __init__(
        self,
        outputs: dict[str, int],
        *,
        widths: tuple[int, ...] = WIDTHS,
        stitches: Stitches = "matrix",
        own: float = 0.9,
    ) -> None:
        super().__init__()
        check_outputs(outputs)
        check_widths(widths)
        check_choice("stitches", stitches, Stitches)
        if not 0 <= own <= 1:
            raise InputError(f"own must be in [0, 1], got {own}")
        self.bodies = nn.ModuleDict({task: Body(widths) for task in outputs})
        self.heads = nn.ModuleDict({task: Head(widths[0], channels) for task, channels in outputs.items()})
        initialise(self)
        tasks, places = len(outputs), 2 * len(widths) - 1
        if stitches == "shared":
            start = torch.ones(tasks)
        elif tasks == 1:
            start = torch.ones(1, 1)
        else:
            start = torch.full((tasks, tasks), (1 - own) / (tasks - 1)).fill_diagonal_(own)
        self.mixing = nn.Parameter(start.expand(places, *start.shape).clone())

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        check_size(image, STRIDE)
        bodies = cast("list[Body]", list(self.bodies.values()))
        maps = [image for _ in bodies]
        indices: list[list[Tensor]] = []
        for i in range(len(bodies[0].encoder)):
            if i > 0:
                maps = self.mix(i - 1, maps)
            pooled = [pool(body.encoder[i](x)[1]) for body, x in zip(bodies, maps, strict=True)]
            maps = [x for x, _ in pooled]
            indices.append([index for _, index in pooled])
        for k, of_level in enumerate(reversed(indices)):
            maps = [unpool(x, index) for x, index in zip(self.mix(len(indices) - 1 + k, maps), of_level, strict=True)]
            maps = [body.decoder[k](x)[1] for body, x in zip(bodies, maps, strict=True)]
        return {task: head(x) for (task, head), x in zip(self.heads.items(), maps, strict=True)}

    def mix(self, place: int, maps: list[Tensor]) -> list[Tensor]:
        """The input of each task at stitch ``place``, counted from 0, where its net has ``maps[task]``; equal
        shapes."""
        weights = self.mixing[place]
        if weights.ndim == 1:
            return [_weighted_sum(weights, maps)] * len(maps)
        return [_weighted_sum(row, maps) for row in weights]


def _weighted_sum(weights: Tensor, maps: list[Tensor]) -> Tensor:
    total = weights[0] * maps[0]
    for weight, x in zip(weights[1:], maps[1:], strict=True):
        total = total + weight * x
    return total


PLUGIN = CrossStitch
