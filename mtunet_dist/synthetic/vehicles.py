"""Cars, trucks, buses and trams, built of convex bodies; +z is the front."""

from __future__ import annotations

import numpy as np

from mtunet_dist.synthetic.geometry import Ellipsoid, box, frustum
from mtunet_dist.synthetic.objects import Body, Place, part
from mtunet_dist.synthetic.textures import GLASS, RGB, Shade, Surface, Texture, channels, paint, plain, stripes, tint

CAR, TRUCK, BUS, TRAIN = 26, 27, 28, 31
RUBBER: RGB = (0.025, 0.025, 0.028)


def car(rng: np.random.Generator, place: Place) -> list[Body]:
    """A saloon, hatchback or van: a body, a tapered glass cabin and four wheels."""
    length, width, height = rng.uniform(3.7, 4.9), rng.uniform(1.7, 1.9), rng.uniform(1.4, 1.6)
    belt, x, z = rng.uniform(0.82, 0.95), width / 2, length / 2
    bonnet, boot, van = rng.uniform(0.9, 1.25), rng.uniform(0.05, 0.8), rng.random() < 0.2
    if van:
        bonnet, boot, height = 0.5, 0.05, rng.uniform(1.8, 2.2)
    colour = paint(rng)
    hull = frustum((-x, x, -z, z), (-x + 0.06, x - 0.06, -z + 0.08, z - 0.12), 0.25, belt - 0.25)
    foot = (-x + 0.06, x - 0.06, -z + boot, z - bonnet)
    roof = (-x + 0.22, x - 0.22, -z + boot + (0.15 if van else 0.45), z - bonnet - (0.5 if van else 0.75))
    cabin = frustum(foot, roof, belt, height - belt)
    bodies = [
        part(CAR, hull, _hull_texture(colour, width, length, belt), place),
        part(CAR, cabin, _cabin_texture(colour, belt, height), place),
    ]
    return bodies + _wheels(CAR, place, 0.32, x, (-z + 0.75, z - 0.8))


def truck(rng: np.random.Generator, place: Place) -> list[Body]:
    """A lorry: a cab in front of a tall cargo box."""
    length, width, height = rng.uniform(5.5, 9), rng.uniform(2.2, 2.5), rng.uniform(2.8, 3.7)
    colour, cab = paint(rng), rng.uniform(1.6, 2.1)
    cover: Texture = plain(colour, 0.04)
    if rng.random() < 0.4:
        cover = stripes(colour, paint(rng), rng.uniform(0.5, 1.8), upright=bool(rng.integers(2)))
    cargo = box(width, height - 0.8, length - cab - 0.2, 0.8)
    front = length / 2 - cab / 2
    windscreen = _panes(paint(rng), 1.5, 2.15, 1.4, cab, 0.0)
    bodies = [
        part(TRUCK, cargo, _rear_lights(cover, width, (length - cab - 0.2) / 2, 0.95), place, (0, 0, -cab / 2 - 0.1)),
        part(TRUCK, box(width - 0.1, rng.uniform(1.9, 2.3), cab, 0.5), windscreen, place, (0, 0, front)),
        part(TRUCK, box(width - 0.5, 0.35, length - 0.4, 0.5), plain((0.05, 0.05, 0.05)), place),
    ]
    return bodies + _wheels(TRUCK, place, 0.48, width / 2, (-length / 2 + 1.2, length / 2 - 1.0))


def bus(rng: np.random.Generator, place: Place) -> list[Body]:
    """A city bus with a band of windows."""
    length, width = rng.uniform(9, 12), 2.5
    texture = _rear_lights(_panes(paint(rng), 1.3, 2.5, 1.5, length, 0.12), width, length / 2, 0.8)
    bodies = [part(BUS, box(width, 2.7, length, 0.35), texture, place)]
    return bodies + _wheels(BUS, place, 0.48, width / 2, (-length / 2 + 2.2, length / 2 - 2.4))


def tram(rng: np.random.Generator, place: Place, length: float) -> list[Body]:
    """A tram of two or three sections with bellows between them, a sloping cab at both ends and a pantograph."""
    width, colour, band = 2.4, paint(rng), paint(rng)
    sides = _livery(_panes(colour, 1.25, 2.35, rng.uniform(1.2, 2.2), length, 0.1), band)
    sections = 2 if length < 19 else 3
    nose, gap, dark = 1.1, 0.5, plain((0.04, 0.04, 0.045), 0.2)
    each = (length - 2 * nose - (sections - 1) * gap) / sections
    bodies = [part(TRAIN, box(width - 0.3, 2.6, length - 2 * nose - 0.4, 0.45), dark, place)]
    for number in range(sections):
        z = (number - (sections - 1) / 2) * (each + gap)
        bodies.append(part(TRAIN, box(width, 2.8, each, 0.35), sides, place, (0, 0, z)))
        bodies.append(part(TRAIN, box(width - 0.2, 0.33, 2.6, 0.04), dark, place, (0, 0, z)))
        bodies.append(part(TRAIN, box(1.5, 0.3, each * 0.6, 3.15), plain((0.3, 0.3, 0.31)), place, (0, 0, z)))
    x, start = width / 2, length / 2 - nose
    cab = frustum((-x, x, start, start + nose), (-x + 0.15, x - 0.15, start, start + 0.4), 0.35, 2.8)
    for end, lamps in ((0.0, (0.8, 0.8, 0.75)), (np.pi, (0.55, 0.02, 0.02))):
        bodies.append(part(TRAIN, cab, _cab_texture(colour, band, lamps), Place(place.x, place.z, place.yaw + end)))
    arm = frustum((-0.5, 0.5, -0.9, -0.8), (-0.7, 0.7, 0.3, 0.4), 3.3, 1.3)
    bodies.append(part(TRAIN, arm, dark, place))
    return bodies


def _livery(cover: Texture, band: RGB) -> Texture:
    """A band of another colour along the sills."""

    def texture(s: Surface) -> Shade:
        shade = cover(s)
        shade.cover(s.upright & (s.y < 0.95), band)
        return shade

    return texture


def _cab_texture(colour: RGB, band: RGB, lamps: RGB) -> Texture:
    """A large windscreen between pillars over two lamps, a lit sign above."""

    def texture(s: Surface) -> Shade:
        shade = _livery(plain(colour, 0.03), band)(s)
        front = s.normal[2] > 0.5
        pane = (s.y > 1.2) & (s.y < 2.6) & s.upright & (~front | (np.abs(s.x) < 1.0))
        shade.cover(pane, (0.1, 0.12, 0.15))
        shade.cover(front & (np.abs(s.x) > 0.6) & (np.abs(s.x) < 0.95) & (np.abs(s.y - 0.8) < 0.1), lamps)
        shade.cover(front & (np.abs(s.x) < 0.7) & (np.abs(s.y - 2.85) < 0.14), (0.6, 0.35, 0.05))
        return Shade(shade.rgb, glossy=pane)

    return texture


def _wheels(label: int, place: Place, radius: float, x: float, axles: tuple[float, float]) -> list[Body]:
    def texture(s: Surface) -> Shade:
        shade = Shade(tint(RUBBER, np.ones_like(s.x)))
        shade.cover(np.hypot(s.y, s.z) < 0.55 * radius, (0.3, 0.31, 0.32))
        return shade

    shape = Ellipsoid((0.14, radius, radius))
    return [part(label, shape, texture, place, (side * (x - 0.08), radius, z)) for side in (-1, 1) for z in axles]


def _hull_texture(colour: RGB, width: float, length: float, belt: float) -> Texture:
    """Paint, lamps at both ends, a plate, dark sills."""

    def texture(s: Surface) -> Shade:
        shade = plain(colour, 0.03)(s)
        shade.cover(s.y < 0.36, (0.04, 0.04, 0.04))
        ends = (np.abs(s.z) > length / 2 - 0.2) & (np.abs(s.normal[2]) > 0.5)
        lamps = ends & (np.abs(s.x) > width / 2 - 0.42) & (s.y > belt - 0.32) & (s.y < belt - 0.12)
        shade.cover(lamps & (s.z > 0), (0.8, 0.8, 0.75))
        shade.cover(lamps & (s.z < 0), (0.55, 0.02, 0.02))
        shade.cover(ends & (np.abs(s.x) < 0.26) & (np.abs(s.y - 0.5) < 0.06), (0.7, 0.7, 0.65))
        shade.cover(ends & (s.z > 0) & (np.abs(s.x) < 0.5) & (np.abs(s.y - belt + 0.2) < 0.07), (0.03, 0.03, 0.03))
        return Shade(shade.rgb, glossy=s.normal[1] > 0.9)

    return texture


def _cabin_texture(colour: RGB, belt: float, height: float) -> Texture:
    """Glass between pillars under a painted roof; the upper half of a pane mirrors the sky."""

    def texture(s: Surface) -> Shade:
        shade = plain(colour, 0.03)(s)
        pane = (s.normal[1] < 0.93) & (s.y > belt + 0.04) & (s.y < height - 0.07)
        flank = np.abs(s.normal[0]) > 0.6
        pane &= ~(flank & (np.abs(s.z + 0.05) < 0.05))
        mirror = tint((0.16, 0.19, 0.23), (s.y[pane] - belt) / (height - belt))
        shade.rgb[:, pane] = channels(GLASS) + mirror
        return Shade(shade.rgb, glossy=pane)

    return texture


def _panes(colour: RGB, low: float, high: float, spacing: float, length: float, pillar: float) -> Texture:
    """Paint with windows between two heights on the sides, one pane at each end."""

    def texture(s: Surface) -> Shade:
        shade = plain(colour, 0.04)(s)
        ends = np.abs(s.normal[2]) > 0.5
        pane = s.upright & (s.y > low) & (s.y < high) & (ends | ((s.z + length / 2) / spacing % 1 > pillar))
        pane &= ends | (np.abs(s.z) < length / 2 - 0.15)
        shade.cover(pane, (0.1, 0.12, 0.15))
        return Shade(shade.rgb, glossy=pane)

    return texture


def _rear_lights(cover: Texture, width: float, end: float, height: float) -> Texture:
    def texture(s: Surface) -> Shade:
        shade = cover(s)
        back = (s.normal[2] < -0.5) & (s.z < -end + 0.05)
        shade.cover(back & (np.abs(s.x) > width / 2 - 0.3) & (np.abs(s.y - height - 0.1) < 0.1), (0.5, 0.02, 0.02))
        return shade

    return texture
