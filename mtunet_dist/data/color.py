"""Colour jitter as one affine map of RGB per sample, so that every loader gives the same image.

The order is fixed: brightness, contrast, saturation, hue; rounding and clamping to 0..255 come once, after all four.
Two of torchvision's ``ColorJitter`` are not affine and are replaced by what DALI's ``color_twist`` does: contrast is
stretched about mid-grey instead of the image's mean, and hue turns in the YIQ plane instead of in HSV.
"""

from __future__ import annotations

import math

import numpy as np

MID_GREY = 127.5
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # Rec. 601
_RGB = np.linalg.inv(_YIQ)

ColorMap = tuple[float, ...]
"""12 numbers, the rows of [M | t]: RGB levels x become M x + t."""


def color_map(brightness: float, contrast: float, saturation: float, hue: float) -> ColorMap:
    """The map of three factors (1 = unchanged) and ``hue`` in turns of the colour circle (0 = unchanged).

    Brightness multiplies, contrast is the distance from mid-grey, saturation the distance from the pixel's own grey;
    a hue of 1/3 takes red towards green.
    """
    cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    turn = np.array([[1, 0, 0], [0, saturation * cos, saturation * sin], [0, saturation * -sin, saturation * cos]])
    matrix = brightness * contrast * (_RGB @ turn @ _YIQ)
    offset = np.full((3, 1), (1 - contrast) * MID_GREY)  # grey stays grey under saturation and hue
    return tuple(np.concatenate([matrix, offset], axis=1).ravel().tolist())
