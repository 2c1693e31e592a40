"""Colours for pictures of targets and predictions."""

from __future__ import annotations

import numpy as np

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


def turbo(values: np.ndarray) -> np.ndarray:
    """Colours uint8 (..., 3) for values in [0, 1]."""
    powers = np.clip(values, 0, 1)[..., None] ** np.arange(6)
    colors: np.ndarray = np.round(np.clip(powers @ TURBO, 0, 1) * 255).astype(np.uint8)
    return colors
