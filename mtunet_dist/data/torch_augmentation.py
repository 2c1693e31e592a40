"""Applies the draws of ``augmentation.py`` to a whole batch at once in torch, on the device of the batch.

This file defines the arithmetic. Targets take the pixel under the centre (torch's ``nearest-exact``, DALI's
``INTERP_NN``). Images are interpolated linearly between pixel centres without antialiasing. The image is rounded once,
after zoom and colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mtunet_dist.data.augmentation import Draw
from mtunet_dist.data.batch import Pixels, as_numbers
from mtunet_dist.data.sending import send
from mtunet_dist.tasks._task import Task


def augmented(pixels: Pixels, tasks: Mapping[str, Task], draws: Sequence[Draw]) -> tuple[Tensor, dict[str, Tensor]]:
    """Image uint8 (N, H, W, 3), and the target of each task as ``as_numbers`` gives it.

    ``draws`` has one entry per sample, or is empty; if it is empty, only types change. Overwrites ``pixels``.
    """
    image = pixels.image
    targets = {name: as_numbers(pixels.targets[name], task) for name, task in tasks.items()}
    if not draws:
        return image, targets
    height, width = image.shape[1:3]
    colors = draws[0].color is not None
    if colors:
        image = image.float()
    zoomed = [n for n, draw in enumerate(draws) if (draw.height, draw.width) != (height, width)]
    if zoomed:
        where = send(np.array(zoomed), image.device)
        maps = _Maps([draws[n] for n in zoomed], height, width)
        zoomed_image = maps.linear(image.index_select(0, where))
        image.index_copy_(0, where, zoomed_image if colors else _rounded(zoomed_image))
        for x in targets.values():
            x.index_copy_(0, where, maps.nearest(x.index_select(0, where)))
    flipped = sorted({n for n, draw in enumerate(draws) if draw.flip}.difference(zoomed))  # zooming flips too
    if flipped:
        where = send(np.array(flipped), image.device)
        for x in (image, *targets.values()):
            x.index_copy_(0, where, x.index_select(0, where).flip(2))
    if colors:
        image = _rounded(_recolored(image, draws))
    return image, targets


class _Maps:
    """The source row and column of each pixel of zoomed samples; columns are mirrored for a flip."""

    def __init__(self, draws: Sequence[Draw], height: int, width: int) -> None:
        self.rows = _Axis(np.array([(d.top, d.height) for d in draws]), height)
        self.columns = _Axis(np.array([(d.left, d.width) for d in draws]), width)
        self.columns.mirror(np.array([d.flip for d in draws]))

    def nearest(self, x: Tensor) -> Tensor:
        """(n, H, W) or (n, H, W, planes), unchanged in shape."""
        shape, planes = x.shape, x.shape[3] if x.dim() == 4 else 1
        columns = _per_plane(self.columns.nearest, planes)
        return _columns(_rows(x.reshape(*shape[:2], -1), self.rows.nearest), columns).view(shape)

    def linear(self, x: Tensor) -> Tensor:
        """(n, H, W, 3) -> float32 (n, H, W, 3)."""
        shape, x = x.shape, x.flatten(2)  # several times faster than with a last axis of 3
        low, high = (_rows(x, index).float() for index in (self.rows.low, self.rows.high))
        x = torch.lerp(low, high, send(self.rows.weight, x.device)[:, :, None])
        low, high = (_columns(x, _per_plane(index, 3)) for index in (self.columns.low, self.columns.high))
        return torch.lerp(low, high, send(self.columns.weight.repeat(3, axis=1), x.device)[:, None]).view(shape)


class _Axis:
    """Index maps (n, size) of one axis for n windows (start, length). float32 as in torch, so that ties round the same
    way."""

    def __init__(self, windows: np.ndarray, size: int) -> None:
        start, length = windows[:, :1], windows[:, 1:]
        step = length.astype(np.float32) / np.float32(size)
        centre = step * (np.arange(size, dtype=np.float32) + np.float32(0.5))
        position = np.maximum(centre - np.float32(0.5), 0)
        low = position.astype(np.int64)
        self.weight = position - low.astype(np.float32)
        self.low, self.high = start + low, start + np.minimum(low + 1, length - 1)
        self.nearest = start + np.minimum(centre.astype(np.int64), length - 1)

    def mirror(self, flip: np.ndarray) -> None:
        """Reverse the maps of the samples where ``flip`` is true."""
        for x in (self.weight, self.low, self.high, self.nearest):
            x[flip] = x[flip, ::-1]


def _rows(x: Tensor, index: np.ndarray) -> Tensor:
    """Rows ``index`` (n, H) of x (n, H, W)."""
    first = np.arange(len(x))[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, send((first + index).ravel(), x.device)).view(x.shape)


def _columns(x: Tensor, index: np.ndarray) -> Tensor:
    """Columns ``index`` (n, W) of x (n, H, W)."""
    return x.gather(2, send(index, x.device)[:, None].expand(x.shape))


def _per_plane(columns: np.ndarray, planes: int) -> np.ndarray:
    """Columns (n, W) of pixels as columns (n, planes * W) of interleaved numbers."""
    return (columns[:, :, None] * planes + np.arange(planes)).reshape(len(columns), -1)


def _recolored(image: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The colour map of each draw applied to float32 (N, H, W, 3)."""
    maps = send(np.array([draw.color for draw in draws], dtype=np.float32), image.device).view(-1, 3, 4)
    matrix, offset = maps[:, :, :3], maps[:, None, :, 3]
    return torch.baddbmm(offset, image.flatten(1, 2), matrix.mT).view(image.shape)


def _rounded(image: Tensor) -> Tensor:
    return image.round_().clamp_(0, 255).to(torch.uint8)
