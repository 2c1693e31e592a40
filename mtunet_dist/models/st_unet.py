"""ST-UNet, the paper's single-task network: one U-Net for each task and nothing shared."""

from __future__ import annotations

from torch import Tensor, nn

from mtunet_dist.models._blocks import check_outputs
from mtunet_dist.models.mtunet import DenseScope, MTUNet


class STUNet(nn.Module):
    """Independent MT-UNets of one task each, trained together: the baseline for multi-task training.

    The paper says only "two single task U-Net models". Our reading: each is MT-UNet with one decoder, so the encoder is
    dense and the decoder has attention. ``dense_scope="none"`` with ``attention=False`` is a plain U-Net.

    ``outputs`` maps each task's name to its number of channels. ``forward(image (N, 3, H, W) float)`` returns ``{task:
    (N, channels, H, W)}``; H and W must be multiples of 16. Raises InputError for sizes or options that do not fit.

    Options: as those of ``MTUNet``, without the cross connections, which need a second task.
        widths: channels of the four encoder blocks, shallowest first.
        bottleneck: channels of the bottleneck.
        dense_scope: "encoder", "block" or "none".
        attention: the masks of the decoder blocks.
        dropout: probability in [0, 1) after each encoder block.
    """

    def __init__(
        self,
        outputs: dict[str, int],
        *,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        bottleneck: int = 1024,
        dense_scope: DenseScope = "encoder",
        attention: bool = True,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_outputs(outputs)
        self.nets = nn.ModuleDict(
            {
                task: MTUNet(
                    {task: channels},
                    widths=widths,
                    bottleneck=bottleneck,
                    dense_scope=dense_scope,
                    attention=attention,
                    dropout=dropout,
                )
                for task, channels in outputs.items()
            }
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {task: net(image)[task] for task, net in self.nets.items()}


PLUGIN = STUNet
