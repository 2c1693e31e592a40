"""Conversions for sources that hold numbers rather than images."""

from __future__ import annotations

import numpy as np

from mtunet_dist.errors import InputError

_LARGEST = 65535


def stored_depth(depth: np.ndarray, scale: float, name: str) -> np.ndarray:
    """Depth in its unit, 0 where invalid -> uint16 in steps of ``scale``, rounded.

    Raises InputError that starts with ``name`` for NaN and for what is outside of 0 to 65535 steps.
    """
    steps = np.rint(depth.astype(np.float64) / scale)
    wrong = ~((steps >= 0) & (steps <= _LARGEST))
    if wrong.any():
        raise InputError(f"{name}: depth {depth[wrong][0]:g} is not one of 0..{_LARGEST * scale:g}")
    return steps.astype(np.uint16)
