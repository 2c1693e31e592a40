"""Disparity as a stereo matcher would deliver it: quantised, in range, with holes where matching fails."""

from __future__ import annotations

import numpy as np

from mtunet_dist.synthetic.geometry import Camera
from mtunet_dist.synthetic.render import Rendering
from mtunet_dist.synthetic.textures import noise

MAX_DEPTH = 80.0
MAX_DISPARITY = 126.0


def stored_disparity(rendering: Rendering, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """The disparity image of Cityscapes, (H, W) uint16: round(256 d) + 1 for a disparity of d pixels, 0 for invalid.

    Invalid are the sky and what lies beyond 80 m, what the right camera does not see (the left border and a band
    left of near things), and speckle, mostly on mirrors and where the picture is too dark or too bright to match.
    """
    disparity = camera.baseline * camera.focal * rendering.inverse
    valid = (rendering.inverse > 1 / MAX_DEPTH) & (disparity < MAX_DISPARITY)
    valid &= ~_hidden_from_right(disparity) & ~_speckle(rendering, rng)
    return np.where(valid, np.rint(disparity * 256) + 1, 0).astype(np.uint16)


def metric_depth(stored: np.ndarray, baseline: float, focal: float) -> np.ndarray:
    """Depth in metres, 0 where invalid, from a stored disparity image: baseline * fx / d with d = (p - 1) / 256."""
    disparity = np.maximum(stored.astype(np.float32) - 1, 0) / 256
    return np.divide(baseline * focal, disparity, out=np.zeros_like(disparity), where=disparity > 0)


def _hidden_from_right(disparity: np.ndarray) -> np.ndarray:
    """Pixels of the left picture that leave the right one or are covered there by something nearer."""
    height, width = disparity.shape
    target = np.rint(np.arange(width) - disparity).astype(np.int32)
    outside = target < 0
    target = np.maximum(target, 0) + np.arange(height, dtype=np.int32)[:, None] * width
    nearest = np.zeros(height * width, dtype=np.float32)
    np.maximum.at(nearest, target[~outside], disparity[~outside])
    return np.asarray(outside | (nearest[target] > disparity + 1))


def _speckle(rendering: Rendering, rng: np.random.Generator) -> np.ndarray:
    """Holes in lumps: rare anywhere, common where there is nothing to match."""
    height, width = rendering.inverse.shape
    shift_u, shift_v = rng.integers(0, 512, size=2)
    lumps = noise(np.arange(height)[:, None] * 1.7 + shift_u, np.arange(width)[None] * 1.7 + shift_v)
    green = rendering.image[..., 1]
    blank = (green < 25) | (green > 245)
    return np.asarray(lumps > 2.1 - 1.3 * rendering.glossy - 0.7 * blank)
