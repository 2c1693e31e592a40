"""Surface normals computed from depth: a plane is fitted around each pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

REACH = 4  # samples on each side of a pixel: a window of 9x9
STEPS_PER_WIDTH = 144  # distance between samples: the width of the image divided by this. Kinect depth has steps
JUMP = 0.05  # a sample whose depth differs by more than this share lies on another surface
LEAST = 20  # samples of the same surface that a fit needs


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: focal lengths and principal point in pixels, (0, 0) the centre of the first pixel."""

    fx: float
    fy: float
    cx: float
    cy: float

    def resized(self, x: float, y: float) -> Camera:
        """The camera of images whose width is multiplied by ``x`` and whose height by ``y``."""
        return Camera(self.fx * x, self.fy * y, (self.cx + 0.5) * x - 0.5, (self.cy + 0.5) * y - 0.5)

    def cropped(self, left: int, top: int) -> Camera:
        """The camera of images that lack the first columns and rows."""
        return Camera(self.fx, self.fy, self.cx - left, self.cy - top)


def normals_of(depth: np.ndarray, camera: Camera) -> np.ndarray:
    """Unit normals float32 (H, W, 3) of metric ``depth`` (H, W), 0 where invalid. They point towards the camera. A
    pixel has none (0) if too few samples around it lie on its surface.

    On a plane, 1 / depth is linear in the pixel coordinates: a x + b y + c with x, y on the image plane at distance 1,
    and (a, b, c) is a normal. The fit is by least squares over the samples around the pixel.
    """
    height, width = depth.shape
    valid = depth > 0
    inverse = np.divide(1.0, depth, out=np.zeros(depth.shape), where=valid).astype(np.float32)
    apart = max(1, round(width / STEPS_PER_WIDTH))
    margin = REACH * apart
    padded = np.pad(inverse, margin)
    # Sums over the samples, with x and y from the pixel: 1, x, y, xx, xy, yy, z, xz, yz.
    sums = np.zeros((9, height, width))
    for down in range(-REACH, REACH + 1):
        row = np.zeros((5, height, width), dtype=np.float32)  # 1, x, xx, z, xz over the samples of one row
        for right in range(-REACH, REACH + 1):
            top, left = margin + down * apart, margin + right * apart
            there = padded[top : top + height, left : left + width]
            same = np.abs(there - inverse) < JUMP * inverse
            across = right * apart / camera.fx
            z = np.where(same, there, 0.0)
            for total, term in zip(row, (same, across * same, across**2 * same, z, across * z), strict=True):
                total += term
        below, (one, x1, x2, z0, z1) = down * apart / camera.fy, row
        terms = (one, x1, below * one, x2, below * x1, below**2 * one, z0, z1, below * z0)
        for whole, term in zip(sums, terms, strict=True):
            whole += term
    n, x, y, xx, xy, yy, z, xz, yz = sums
    # Cramer's rule for the symmetric system [[xx, xy, x], [xy, yy, y], [x, y, n]] (a, b, d) = (xz, yz, z).
    aa, ab, ad = yy * n - y * y, x * y - xy * n, xy * y - x * yy
    bb, bd, dd = xx * n - x * x, x * xy - xx * y, xx * yy - xy * xy
    determinant = xx * aa + xy * ab + x * ad
    a, b, d = (p * xz + q * yz + r * z for p, q, r in ((aa, ab, ad), (ab, bb, bd), (ad, bd, dd)))
    # d is 1 / depth at the pixel, times the determinant: c follows from the pixel's place.
    columns = (np.arange(width) - camera.cx) / camera.fx
    rows = (np.arange(height)[:, None] - camera.cy) / camera.fy
    vectors = -np.stack([a, b, d - a * columns - b * rows], axis=2)
    length = np.sqrt((vectors**2).sum(2))
    good = valid & (n >= LEAST) & (determinant > 1e-12 * np.maximum(xx, yy) ** 2 * n) & (length > 0)
    unit = vectors / np.where(good, length, 1)[..., None]
    return np.where(good[..., None], unit, 0).astype(np.float32)
