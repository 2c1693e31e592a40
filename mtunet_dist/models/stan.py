"""STAN: MTAN with one stream, one for each task and nothing shared; the MTAN paper's single-task attention network."""

from __future__ import annotations

from torch import Tensor, nn

from mtunet_dist.models._blocks import check_outputs
from mtunet_dist.models._segnet import WIDTHS
from mtunet_dist.models.mtan import MTAN


class STAN(nn.Module):
    """Independent single-task attention networks, trained side by side.

    ``outputs`` maps each task's name to its number of channels. ``forward(image (N, 3, H, W) float)`` returns
    ``{task: (N, channels, H, W)}``; H and W must be multiples of 32. Raises InputError for sizes or options that do
    not fit. 38.19 M parameters for each task. ``MTAN`` lists what is kept of the MTAN code.

    Options:
        widths: channels of the five levels, shallowest first.
    """

    def __init__(self, outputs: dict[str, int], *, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        check_outputs(outputs)
        self.nets = nn.ModuleDict({task: MTAN({task: channels}, widths=widths) for task, channels in outputs.items()})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {task: net(image)[task] for task, net in self.nets.items()}


PLUGIN = STAN
