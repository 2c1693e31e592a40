"""Bicycles, motorcycles and those who ride them, built of convex bodies; +z is the front."""

from __future__ import annotations

import math

import numpy as np

from mtunet_dist.synthetic.geometry import Ellipsoid, box, frustum
from mtunet_dist.synthetic.objects import METAL, Body, Clothes, Limb, Place, clothes, figure, part
from mtunet_dist.synthetic.textures import GLASS, RGB, Shade, Surface, Texture, paint, plain, tint
from mtunet_dist.synthetic.vehicles import RUBBER

RIDER, MOTORCYCLE, BICYCLE = 25, 32, 33
_BLACK = plain((0.03, 0.03, 0.032), 0.1, 0.02)
# The tubes of a bicycle as lines (z, y) to (z, y): seat tube, top tube, down tube, stays, fork, pedals.
_TUBES = (
    ((-0.06, 0.28), (-0.23, 0.9)),
    ((-0.2, 0.78), (0.39, 0.8)),
    ((-0.06, 0.28), (0.42, 0.66)),
    ((-0.06, 0.28), (-0.53, 0.34)),
    ((-0.2, 0.78), (-0.53, 0.34)),
    ((0.37, 1.0), (0.53, 0.34)),
    ((-0.14, 0.14), (0.02, 0.42)),
)


def bicycle(rng: np.random.Generator, place: Place) -> list[Body]:
    """A bicycle, some with a basket or a rack."""
    tyre = Ellipsoid((0.03, 0.35, 0.35))
    bodies = [part(BICYCLE, tyre, _spoked(0.35), place, (0, 0.35, z)) for z in (-0.53, 0.53)]
    bodies += [
        part(BICYCLE, box(0.05, 0.95, 1.1, 0.1), _frame(paint(rng)), place),
        part(BICYCLE, Ellipsoid((0.085, 0.05, 0.15)), _BLACK, place, (0, 0.94, -0.24)),
        part(BICYCLE, box(rng.uniform(0.5, 0.66), 0.04, 0.05, 1.0), _BLACK, place, (0, 0, 0.36)),
    ]
    if rng.random() < 0.35:
        bodies.append(part(BICYCLE, box(0.34, 0.26, 0.28, 0.76), plain((0.16, 0.11, 0.06), 0.3), place, (0, 0, 0.58)))
    if rng.random() < 0.5:
        bodies.append(part(BICYCLE, box(0.14, 0.04, 0.42, 0.74), plain(METAL), place, (0, 0, -0.5)))
    return bodies


def motorcycle(rng: np.random.Generator, place: Place) -> list[Body]:
    """A motorcycle or a scooter, some with a windscreen or a top case."""
    colour, metal = plain(paint(rng), 0.03), plain((0.16, 0.16, 0.17), 0.3)
    scooter = rng.random() < 0.4
    radius, axle = (0.23, 0.58) if scooter else (0.32, 0.7)
    tyre = Ellipsoid((0.08, radius, radius))
    bodies = [part(MOTORCYCLE, tyre, _tyre(radius), place, (0, radius, z)) for z in (-axle, axle)]
    if scooter:
        shield = frustum((-0.22, 0.22, 0.3, 0.44), (-0.16, 0.16, 0.18, 0.3), 0.25, 0.75)
        rear = frustum((-0.16, 0.16, -0.85, -0.1), (-0.14, 0.14, -0.8, -0.15), 0.3, 0.4)
        bodies += [part(MOTORCYCLE, shape, colour, place) for shape in (shield, rear)]
        bodies.append(part(MOTORCYCLE, box(0.36, 0.1, 0.7, 0.2), metal, place, (0, 0, 0.1)))
    else:
        fork = frustum((-0.1, 0.1, 0.62, 0.74), (-0.1, 0.1, 0.34, 0.46), 0.3, 0.7)
        bodies += [
            part(MOTORCYCLE, box(0.34, 0.4, 0.62, 0.24), metal, place),
            part(MOTORCYCLE, fork, metal, place),
            part(MOTORCYCLE, Ellipsoid((0.18, 0.16, 0.33)), colour, place, (0, 0.8, 0.14)),
            part(MOTORCYCLE, frustum((-0.13, 0.13, -0.8, -0.1), (-0.1, 0.1, -0.95, -0.1), 0.6, 0.16), colour, place),
        ]
    bodies += [
        part(MOTORCYCLE, box(0.28, 0.1, 0.7, 0.72), _BLACK, place, (0, 0, -0.42)),
        part(MOTORCYCLE, box(rng.uniform(0.62, 0.78), 0.05, 0.06, 1.0), _BLACK, place, (0, 0, 0.28)),
        part(MOTORCYCLE, Ellipsoid((0.1, 0.1, 0.1)), plain((0.7, 0.7, 0.66)), place, (0, 0.88, 0.44)),
        part(MOTORCYCLE, box(0.2, 0.09, 0.05, 0.68), plain((0.5, 0.02, 0.02)), place, (0, 0, -0.93)),
    ]
    if rng.random() < 0.3:
        screen = frustum((-0.2, 0.2, 0.36, 0.4), (-0.15, 0.15, 0.2, 0.24), 1.0, 0.35)
        bodies.append(part(MOTORCYCLE, screen, plain(GLASS), place))
    if rng.random() < 0.3:
        bodies.append(part(MOTORCYCLE, box(0.42, 0.3, 0.36, 0.84), colour, place, (0, 0, -0.85)))
    return bodies


def cyclist(rng: np.random.Generator, place: Place) -> list[Body]:
    """A bicycle with a rider, bareheaded or in a helmet."""
    wear, turn = clothes(rng), rng.uniform(-0.1, 0.1)
    helmet = plain(paint(rng), 0.05) if rng.random() < 0.5 else wear.hair
    legs = [((0.085, 0.11, 0.24), (side * 0.1, 0.9 + side * turn, 0.0), wear.trousers) for side in (-1, 1)] + [
        ((0.07, 0.28, 0.085), (side * 0.1, 0.52 + side * 1.3 * turn, 0.1), wear.trousers) for side in (-1, 1)
    ]
    return [*bicycle(rng, place), *figure(RIDER, [*_upper(wear, helmet, 0.12, 0.0), *legs], 1.0, place)]


def motorcyclist(rng: np.random.Generator, place: Place) -> list[Body]:
    """A motorcycle with a rider in a full helmet."""
    wear, helmet = clothes(rng), plain(paint(rng), 0.03)
    legs = [((0.1, 0.12, 0.27), (side * 0.2, 0.82, -0.05), wear.trousers) for side in (-1, 1)]
    legs += [((0.085, 0.27, 0.1), (side * 0.21, 0.52, 0.08), wear.trousers) for side in (-1, 1)]
    return [*motorcycle(rng, place), *figure(RIDER, [*_upper(wear, helmet, 0.15, -0.1), *legs], 1.0, place)]


def _upper(wear: Clothes, helmet: Texture, head: float, lift: float) -> list[Limb]:
    """Head, helmet of this radius, trunk leaning forward, arms to a handlebar 1 m high; ``lift`` moves the seat."""
    limbs: list[Limb] = [
        ((0.1, 0.125, 0.11), (0, 1.62 + lift, 0.06), wear.skin),
        ((head, head * 0.95, head * 1.1), (0, 1.68 + lift, 0.04), helmet),
        ((0.22, 0.3, 0.16), (0, 1.29 + lift, -0.04), wear.coat),
        ((0.18, 0.22, 0.17), (0, 1.03 + lift, -0.18), wear.coat),
    ]
    for side in (-1, 1):
        limbs.append(((0.065, 0.2, 0.08), (side * 0.25, 1.32 + lift, 0.04), wear.coat))
        limbs.append(((0.055, 0.075, 0.2), (side * 0.26, 1.12 + lift / 2, 0.2), wear.coat))
    return limbs


def _spoked(radius: float) -> Texture:
    """A thin tyre. The space between the spokes is open. Rim and spokes are at least about a pixel wide."""

    def texture(s: Surface) -> Shade:
        away = np.hypot(s.y, s.z)
        tyre = away > radius - np.clip(s.footprint, 0.045, 0.1)
        spoke = (np.arctan2(s.y, s.z) * (16 / (2 * math.pi)) + 0.5) % 1 - 0.5
        spokes = np.abs(spoke) * (2 * math.pi / 16) * away < np.clip(0.4 * s.footprint, 0.003, 0.03)
        shade = Shade(tint(RUBBER, np.ones_like(s.x)), solid=tyre | spokes | (away < 0.05))
        shade.cover(~tyre, METAL)
        return shade

    return texture


def _tyre(radius: float) -> Texture:
    def texture(s: Surface) -> Shade:
        shade = Shade(tint(RUBBER, np.ones_like(s.x)))
        shade.cover(np.hypot(s.y, s.z) < 0.6 * radius, (0.25, 0.25, 0.26))
        return shade

    return texture


def _frame(colour: RGB) -> Texture:
    """The tubes of a bicycle in the plane of its wheels; nothing between them."""

    def texture(s: Surface) -> Shade:
        nearest = np.full_like(s.y, np.inf)
        for (z, y), (end, top) in _TUBES:
            dz, dy = end - z, top - y
            along = np.clip(((s.z - z) * dz + (s.y - y) * dy) / (dz * dz + dy * dy), 0, 1)
            np.minimum(nearest, np.hypot(s.z - z - along * dz, s.y - y - along * dy), out=nearest)
        shade = plain(colour, 0.05)(s)
        shade.solid = nearest < np.clip(0.6 * s.footprint, 0.025, 0.06)
        return shade

    return texture
