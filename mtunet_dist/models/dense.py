"""The "dense" baseline of the MTAN paper: a shared SegNet, and for each task a whole one that is fed its maps."""

from __future__ import annotations

from torch import Tensor, nn

from mtunet_dist.models._blocks import check_outputs, check_size
from mtunet_dist.models._segnet import STRIDE, WIDTHS, Body, Head, check_widths, initialise


class Dense(nn.Module):
    """A shared SegNet and one SegNet per task; each level of these also sees the shared maps. Not a DenseNet.

    ``outputs`` maps each task's name to its number of channels. ``forward(image (N, 3, H, W) float)`` returns
    ``{task: (N, channels, H, W)}``; H and W must be multiples of 32. Raises InputError for sizes or options that do
    not fit. 90.76 M parameters for two tasks of 7 and 1 channels, 123.70 M for three of 13, 1 and 3.

    In the encoder the shared maps are the pooled ones, in the decoder the unpooled ones; the tasks unpool by indices
    of their own. Kept of the MTAN code: that; the width of the first decoder convolution at full resolution, twice
    that of its other one; the two convolutions of the head with nothing between them; the initial values. Left out:
    the shared net's last two convolutions, which are not used (0.04 M parameters that the MTAN code counts: 90.80 and
    123.74 M; without gradient they would stop DDP), the log-softmax of class scores and the division of normals by
    their length (outputs are raw; the losses do it).

    Options:
        widths: channels of the five levels, shallowest first.
    """

    def __init__(self, outputs: dict[str, int], *, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        check_outputs(outputs)
        check_widths(widths)
        self.shared = Body(widths, whole=False)
        self.bodies = nn.ModuleDict({task: Body(widths, fed=True) for task in outputs})
        self.heads = nn.ModuleDict({task: Head(widths[0], channels) for task, channels in outputs.items()})
        initialise(self)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        check_size(image, STRIDE)
        shared = self.shared(image)
        return {task: head(self.bodies[task](image, shared).decoder[-1]) for task, head in self.heads.items()}


PLUGIN = Dense
