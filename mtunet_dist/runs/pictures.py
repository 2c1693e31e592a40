"""Pictures: the image, the prediction and the truth, as one sheet of tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from mtunet_dist.core.step import Batch, MultiTaskStep
from mtunet_dist.tasks._colors import turbo
from mtunet_dist.tasks._task import Task

CAPTION_HEIGHT = 14


@torch.no_grad()
def sheet(step: MultiTaskStep, batch: Batch) -> np.ndarray:
    """A sheet uint8 (height, width, 3): a row per sample with image, targets, predictions, errors and the attention
    mask of the last decoder block per task (mean over channels); below, the colours of the classes."""
    training = step.training
    step.eval()
    outputs, masks = step.predict_with_masks(batch["image"])
    step.train(training)
    rows = []
    for i in range(len(batch["image"])):
        tiles = {"image": batch["image"][i].permute(1, 2, 0).cpu().numpy()}
        for task in step.tasks:
            output = outputs[task.name][i].cpu()
            tiles |= task.compare(output, batch[task.name][i].cpu())
            if masks.get(task.name):
                tiles[f"attention, {task.name}"] = _mask_tile(masks[task.name][-1][i], output.shape[-2:])
        rows.append(row(tiles))
    return np.concatenate([*rows, *legends(step.tasks, rows[0].shape[1])])


def legends(tasks: Sequence[Task], width: int) -> list[np.ndarray]:
    """The legends of those tasks that have one."""
    return [legend for task in tasks if (legend := task.legend(width)) is not None]


def _mask_tile(mask: Tensor, size: Sequence[int]) -> np.ndarray:
    mean = mask.float().mean(0, keepdim=True)[None]
    return turbo(F.interpolate(mean, size=tuple(size), mode="nearest-exact")[0, 0].cpu().numpy())


def row(tiles: dict[str, np.ndarray]) -> np.ndarray:
    """Tiles uint8 (H, W, 3) side by side, each with its caption."""
    return np.concatenate([_captioned(text, tile) for text, tile in tiles.items()], axis=1)


def _captioned(text: str, tile: np.ndarray) -> np.ndarray:
    """``tile`` with a caption above and a white line around."""
    caption = Image.new("RGB", (tile.shape[1], CAPTION_HEIGHT), "white")
    ImageDraw.Draw(caption).text((2, 1), text, fill="black")
    framed = np.concatenate([np.asarray(caption), tile])
    return np.pad(framed, ((1, 3), (1, 1), (0, 0)), constant_values=255)
