"""The camera and the two convex shapes of the synthetic scenes, with their ray intersections.

World frame in metres: x right, y up (road at 0), z along the street; the camera stands at (0, mount, 0). A ray is
scaled to advance one metre of z-depth per unit, so its parameter at a hit *is* the metric depth of that pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEAR = 0.3
Axes = Sequence[np.ndarray | float]
_EDGES = np.array([(a, a | bit) for a in range(8) for bit in (1, 2, 4) if not a & bit])


@dataclass(frozen=True)
class Camera:
    """A pinhole camera; focal length and principal point in pixels (centre of the first pixel is 0), angles in rad."""

    height: int
    width: int
    focal: float
    u0: float
    v0: float
    baseline: float
    mount: float
    yaw: float
    pitch: float
    roll: float

    def rotation(self) -> np.ndarray:
        """World from camera (x right, y down, z forward), (3, 3) float64."""
        (cy, sy), (cp, sp), (cr, sr) = ((math.cos(a), math.sin(a)) for a in (self.yaw, self.pitch, self.roll))
        yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        pitch = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
        roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        return np.asarray(yaw @ pitch @ roll @ np.diag([1.0, -1.0, 1.0]))

    def basis(self) -> np.ndarray:
        """B (3, 3) with B (u, v, 1) the world direction, per metre of z-depth, of the ray through pixel (u, v)."""
        focal, u0, v0 = self.focal, self.u0, self.v0
        pixel = np.array([[1 / focal, 0, -u0 / focal], [0, 1 / focal, -v0 / focal], [0, 0, 1]])
        return np.asarray(self.rotation() @ pixel)

    def windows(self, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What N boxes with these world corners (N, 8, 3) can cover, and their least depth (N,) in metres.

        Corner i is the end of the box given by the bits of i, so that the edges can be cut at the near plane. A window
        is (top, bottom, left, right) in pixels, (N, 4) int, ends excluded; it is empty for a box out of view.
        """
        seen = (corners - (0.0, self.mount, 0.0)) @ self.rotation()
        start, end = seen[:, _EDGES[:, 0]], seen[:, _EDGES[:, 1]]
        step = end - start
        slope = np.where(step[..., 2] == 0, 1.0, step[..., 2])
        cut = start + np.clip((NEAR - start[..., 2]) / slope, 0, 1)[..., None] * step
        points = np.concatenate([np.where(p[..., 2:] < NEAR, cut, p) for p in (start, end)], axis=1)
        behind = points[..., 2] < NEAR * 0.999
        scale = self.focal / np.where(behind, 1.0, points[..., 2])
        bounds = []
        for axis, centre, size in ((1, self.v0, self.height), (0, self.u0, self.width)):
            at = points[..., axis] * scale + centre
            low = np.where(behind, np.inf, at).min(axis=1)
            high = np.where(behind, -np.inf, at).max(axis=1)
            bounds += [np.clip(np.floor(low), 0, size), np.clip(np.ceil(high) + 1, 0, size)]
        return np.stack(bounds, axis=1).astype(int), np.maximum(seen[..., 2].min(axis=1), NEAR)


@dataclass(frozen=True)
class Polyhedron:
    """The points p with n . p <= offset for every (nx, ny, nz, offset); ``low`` and ``high`` bound it."""

    planes: tuple[tuple[float, float, float, float], ...]
    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def see(self, eye: np.ndarray, basis: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inverse depth (rows, columns) where rays from the eye enter, 0 where they miss or start inside; the plane.

        ``eye`` and ``basis`` (`Camera.basis`) are in the frame of the body, ``u`` and ``v`` columns and rows of pixels.
        A plane's inverse depth is linear in u and v, so this costs one addition per plane and pixel.
        """
        planes = np.asarray(self.planes)
        gap = planes[:, 3] - planes[:, :3] @ eye
        slope = ((planes[:, :3] @ basis) / np.where(gap == 0, 1e-9, gap)[:, None]).astype(np.float32)
        enter, leave = np.full((v.size, u.size), np.inf, np.float32), np.zeros((v.size, u.size), np.float32)
        face = np.zeros(enter.shape, np.int8)
        for number, (along, down, constant) in enumerate(slope):
            inverse = along * u + (down * v + constant)[:, None]
            if gap[number] < 0:
                face[inverse < enter] = number
                np.minimum(enter, inverse, out=enter)
            else:
                np.maximum(leave, inverse, out=leave)
        enter[(enter <= leave) | np.isinf(enter)] = 0
        return enter, face

    def blocks(self, origin: Axes, direction: Axes) -> np.ndarray:
        """Whether the rays from points (x, y, z) in one direction meet the solid ahead of them."""
        enter, leave = np.array(0, np.float32), np.array(np.inf, np.float32)
        for *normal, offset in self.planes:
            gap, speed = offset - _dot(normal, origin), float(_dot(normal, direction)) or 1e-9
            if speed < 0:
                enter = np.maximum(enter, gap / speed)
            else:
                leave = np.minimum(leave, gap / speed)
        return np.asarray(enter < leave)

    def normal(self, points: Sequence[np.ndarray], face: np.ndarray) -> np.ndarray:
        """Outward unit normals (3, P) of the planes numbered ``face``."""
        return np.asarray(self.planes, dtype=np.float32)[:, :3].T[:, face]


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid about the origin of its body."""

    radii: tuple[float, float, float]

    @property
    def low(self) -> tuple[float, ...]:
        return tuple(-r for r in self.radii)

    @property
    def high(self) -> tuple[float, ...]:
        return self.radii

    def see(self, eye: np.ndarray, basis: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Polyhedron.see`; there is one face. The inverse depth is the larger root of a quadratic."""
        radii = np.array(self.radii)
        start, steps = eye / radii, (basis / radii[:, None]).astype(np.float32)
        step = [along * u + (down * v + constant)[:, None] for along, down, constant in steps]
        a = step[0] * step[0] + step[1] * step[1] + step[2] * step[2]
        x, y, z = (float(value) for value in start)
        b = x * step[0] + y * step[1] + z * step[2]
        c = x * x + y * y + z * z - 1
        root = b * b - c * a
        if c <= 0:
            return np.zeros_like(root), np.zeros(root.shape, np.int8)
        enter = np.where((root > 0) & (b < 0), (np.sqrt(np.maximum(root, 0)) - b) / c, np.float32(0))
        return enter, np.zeros(enter.shape, np.int8)

    def blocks(self, origin: Axes, direction: Axes) -> np.ndarray:
        """As `Polyhedron.blocks`."""
        start = [o / r for o, r in zip(origin, self.radii, strict=True)]
        step = [d / r for d, r in zip(direction, self.radii, strict=True)]
        a, b, c = _dot(step, step), _dot(start, step), _dot(start, start) - 1
        return np.asarray((b * b > a * c) & ((b < 0) | (c < 0)))

    def normal(self, points: Sequence[np.ndarray], face: np.ndarray) -> np.ndarray:
        """Outward unit normals (3, P) at points of the surface."""
        gradient = np.stack([p / (r * r) for p, r in zip(points, self.radii, strict=True)])
        return np.asarray(gradient / np.sqrt((gradient * gradient).sum(axis=0)))


def box(width: float, height: float, length: float, base: float = 0.0) -> Polyhedron:
    """A box centred in x and z that stands at y = base."""
    x, z, top = width / 2, length / 2, base + height
    planes = ((1, 0, 0, x), (-1, 0, 0, x), (0, 1, 0, top), (0, -1, 0, -base), (0, 0, 1, z), (0, 0, -1, z))
    return Polyhedron(planes, (-x, base, -z), (x, top, z))


def frustum(bottom: tuple[float, ...], top: tuple[float, ...], base: float, height: float) -> Polyhedron:
    """A solid between two rectangles (x low, x high, z low, z high): cabins, bonnets, roofs (a ridge is thin)."""
    planes: list[tuple[float, float, float, float]] = [(0, 1, 0, base + height), (0, -1, 0, -base)]
    for side, (lower, upper) in enumerate(zip(bottom, top, strict=True)):
        sign = 1 if side % 2 else -1
        lean = sign * (lower - upper) / height
        size = math.hypot(1, lean)
        flat = (sign / size, 0.0) if side < 2 else (0.0, sign / size)
        planes.append((flat[0], lean / size, flat[1], (sign * lower + lean * base) / size))
    low = (min(bottom[0], top[0]), base, min(bottom[2], top[2]))
    return Polyhedron(tuple(planes), low, (max(bottom[1], top[1]), base + height, max(bottom[3], top[3])))


def column(radius: float, height: float, base: float = 0.0, sides: int = 8) -> Polyhedron:
    """An upright prism over a regular polygon."""
    ring = [(math.cos(a), 0.0, math.sin(a), radius) for a in np.arange(sides) * (2 * math.pi / sides)]
    planes = ((0, 1, 0, base + height), (0, -1, 0, -base), *ring)
    reach = radius / math.cos(math.pi / sides)
    return Polyhedron(planes, (-reach, base, -reach), (reach, base + height, reach))


def plate(radius: float, thickness: float, sides: int) -> Polyhedron:
    """A regular polygon that faces along z, centred on the origin: 3 warns, 8 stops, 12 passes for round."""
    angles = np.arange(sides) * (2 * math.pi / sides) - math.pi / 2 + (math.pi / sides if sides % 2 == 0 else 0)
    ring = [(math.cos(a), math.sin(a), 0.0, radius) for a in angles]
    planes = ((0, 0, 1, thickness / 2), (0, 0, -1, thickness / 2), *ring)
    reach = radius / math.cos(math.pi / sides)
    return Polyhedron(planes, (-reach, -reach, -thickness / 2), (reach, reach, thickness / 2))


def _dot(a: Axes, b: Axes) -> np.ndarray:
    """Sum of the products along the axes, leaving out factors that are exactly 0."""
    terms = [p * q for p, q in zip(a, b, strict=True) if not (isinstance(p, (int, float)) and p == 0)]
    return np.asarray(sum(terms[1:], terms[0]))
