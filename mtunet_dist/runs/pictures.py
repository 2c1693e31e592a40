"""Pictures: the image, the prediction and the truth, as one sheet of tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from mtunet_dist.core.step import Batch, Depth, MultiTaskStep, Segmentation
from mtunet_dist.schema import VOID

# Google's Turbo colour map (A. Mikhailov, 2019, Apache-2.0) as its published polynomial in t, t^2, ... t^5.
TURBO = np.array(
    [
        [0.13572138, 0.09140261, 0.10667330],
        [4.61539260, 2.19418839, 12.64194608],
        [-42.66032258, 4.84296658, -60.58204836],
        [132.13108234, -14.18503333, 110.36276771],
        [-152.94239396, 4.27729857, -89.90310912],
        [59.28637943, 2.82956604, 27.34824973],
    ]
)
CAPTION_HEIGHT = 14


def turbo(values: np.ndarray) -> np.ndarray:
    """Colours uint8 (..., 3) for values in [0, 1]."""
    powers = np.clip(values, 0, 1)[..., None] ** np.arange(6)
    colors: np.ndarray = np.round(np.clip(powers @ TURBO, 0, 1) * 255).astype(np.uint8)
    return colors


def label_colors(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Class colours uint8 (H, W, 3) for class indices (H, W); void is black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    table[VOID] = 0
    colors: np.ndarray = table[label]
    return colors


def depth_colors(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """Near is red, far is blue, on a logarithmic scale from ``low`` to ``high``; invalid (<= 0) is black."""
    valid = depth > 0
    position = np.log(np.where(valid, depth, low) / low) / max(np.log(high / low), 1e-6)
    colors = turbo(1 - position)
    colors[~valid] = 0
    return colors


def segmentation_tiles(task: Segmentation, prediction: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
    """Tiles for class indices (H, W): label, prediction, and where they differ."""
    palette = [c.color for c in task.classes]
    wrong = np.where(label == VOID, 0, np.where(prediction == label, 60, 255)).astype(np.uint8)
    return {
        "label": label_colors(label, palette),
        "predicted label": label_colors(prediction, palette),
        "wrong (white)": np.repeat(wrong[..., None], 3, axis=2),
    }


def depth_tiles(task: Depth, prediction: np.ndarray, depth: np.ndarray) -> dict[str, np.ndarray]:
    """Tiles for depths (H, W): target, prediction, and the relative error from 0 to one half."""
    valid = depth > 0
    low, high = np.percentile(depth[valid], (2, 98)) if valid.any() else (1.0, 1.0)
    error = turbo(np.abs(prediction - depth) / np.maximum(depth, 1e-6) * 2)
    error[~valid] = 0
    return {
        f"depth {low:.3g}..{high:.3g} {task.info.unit}": depth_colors(depth, low, high),
        "predicted depth": depth_colors(np.maximum(prediction, 1e-6), low, high),
        "relative error 0..0.5": error,
    }


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
            target = batch[task.name][i].cpu().numpy()
            if isinstance(task, Segmentation):
                tiles |= segmentation_tiles(task, output.argmax(0).numpy(), target)
            elif isinstance(task, Depth):
                tiles |= depth_tiles(task, output[0].numpy(), target[0])
            if masks.get(task.name):
                tiles[f"attention, {task.name}"] = _mask_tile(masks[task.name][-1][i], output.shape[-2:])
        rows.append(row(tiles))
    legends = [class_legend(task, rows[0].shape[1]) for task in step.tasks if isinstance(task, Segmentation)]
    return np.concatenate([*rows, *legends])


def class_legend(task: Segmentation, width: int) -> np.ndarray:
    """A strip uint8 (h, width, 3) that names the colours of the classes."""
    entry = 110
    per_line = max(1, width // entry)
    lines = -(-len(task.classes) // per_line)
    strip = Image.new("RGB", (width, lines * 18), "white")
    draw = ImageDraw.Draw(strip)
    for i, info in enumerate(task.classes):
        x, y = i % per_line * entry, i // per_line * 18
        draw.rectangle((x + 3, y + 3, x + 15, y + 15), fill=info.color, outline="black")
        draw.text((x + 20, y + 3), info.name, fill="black")
    return np.asarray(strip)


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
