"""SegNet, one for each task and nothing shared: the single-task baseline of the MTAN paper (its "One Task")."""

from __future__ import annotations

from torch import Tensor, nn

from mtunet_dist.models._blocks import check_outputs, check_size
from mtunet_dist.models._segnet import STRIDE, WIDTHS, Body, Head, check_widths, initialise


class SegNet(nn.Module):
    """Badrinarayanan et al. 2017 in the form of the MTAN code; several tasks are trained side by side.

    ``outputs`` maps each task's name to its number of channels. ``forward(image (N, 3, H, W) float)`` returns
    ``{task: (N, channels, H, W)}``; H and W must be multiples of 32. Raises InputError for sizes or options that do
    not fit. 24.98 M parameters for each task.

    Kept of the MTAN code: the two convolutions of the head with nothing between them; the initial values. Left out:
    the log-softmax of class scores and the division of normals by their length; outputs are raw; the losses do it.

    Options:
        widths: channels of the five levels, shallowest first.
    """

    def __init__(self, outputs: dict[str, int], *, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        check_outputs(outputs)
        check_widths(widths)
        self.bodies = nn.ModuleDict({task: Body(widths) for task in outputs})
        self.heads = nn.ModuleDict({task: Head(widths[0], channels) for task, channels in outputs.items()})
        initialise(self)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        check_size(image, STRIDE)
        return {task: head(self.bodies[task](image).decoder[-1]) for task, head in self.heads.items()}


PLUGIN = SegNet
