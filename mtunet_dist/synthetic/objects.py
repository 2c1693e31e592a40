"""Things that stand in a street, each a list of convex bodies with Cityscapes label ids."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mtunet_dist.synthetic.geometry import Ellipsoid, Polyhedron, box, column, frustum, plate
from mtunet_dist.synthetic.textures import (
    RGB,
    Shade,
    Surface,
    Texture,
    bricks,
    facade,
    foliage,
    noise,
    paint,
    plain,
    scatter,
    stripes,
    tint,
)

BUILDING, WALL, FENCE, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION, PERSON = 11, 12, 13, 17, 19, 20, 21, 24
METAL: RGB = (0.22, 0.23, 0.24)


@dataclass(frozen=True)
class Place:
    """A spot on the ground (metres) and a heading (rad from +z towards +x)."""

    x: float
    z: float
    yaw: float = 0.0


@dataclass(frozen=True)
class Body:
    """One convex shape at a world position, turned about the vertical."""

    label: int
    shape: Polyhedron | Ellipsoid
    texture: Texture
    position: tuple[float, float, float]
    yaw: float

    def from_world(self) -> np.ndarray:
        """The rotation (3, 3) from the world to the frame of the body."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return np.array([[cos, 0.0, -sin], [0.0, 1.0, 0.0], [sin, 0.0, cos]])


@dataclass(frozen=True)
class Clothes:
    """The textures of a person."""

    coat: Texture
    trousers: Texture
    skin: Texture
    hair: Texture


Limb = tuple[tuple[float, float, float], tuple[float, float, float], Texture]  # radii and middle of an ellipsoid


def corners(bodies: list[Body]) -> np.ndarray:
    """World corners of the bounding boxes, (N, 8, 3), numbered as `Camera.windows` expects."""
    ends = np.array([(body.shape.low, body.shape.high) for body in bodies])
    x, y, z = (ends[:, np.arange(8) >> axis & 1, axis] for axis in range(3))
    yaw = np.array([[body.yaw] for body in bodies])
    cos, sin = np.cos(yaw), np.sin(yaw)
    position = np.array([[body.position] for body in bodies])
    return np.asarray(np.stack([cos * x + sin * z, y, cos * z - sin * x], axis=2) + position)


def part(
    label: int,
    shape: Polyhedron | Ellipsoid,
    texture: Texture,
    place: Place,
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Body:
    """A body at an offset in the frame of the place."""
    cos, sin = math.cos(place.yaw), math.sin(place.yaw)
    x, y, z = offset
    return Body(label, shape, texture, (place.x + cos * x + sin * z, y, place.z + cos * z - sin * x), place.yaw)


def wall_texture(rng: np.random.Generator) -> Texture:
    """Plaster, bricks, blocks, boards or panels."""
    colour = paint(rng)
    sort = rng.integers(4)
    if sort == 0:
        return plain(colour, grain=rng.uniform(0.03, 0.12))
    if sort == 1:
        mortar = (0.4, 0.38, 0.35) if rng.random() < 0.5 else (0.12, 0.11, 0.1)
        return bricks(colour, mortar, rng.uniform(0.3, 0.9), rng.uniform(0.14, 0.4))
    if sort == 2:
        darker = (colour[0] * 0.6, colour[1] * 0.6, colour[2] * 0.62)
        return stripes(colour, darker, rng.uniform(0.3, 1.2), upright=bool(rng.integers(2)))
    return bricks(colour, (colour[0] * 0.5, colour[1] * 0.5, colour[2] * 0.5), rng.uniform(1.5, 3), rng.uniform(1, 3))


def building(rng: np.random.Generator, place: Place, depth: float, height: float, length: float) -> list[Body]:
    """A house along the street, flat-roofed, set back on top or with a ridged roof; its length is along z."""
    texture = facade(rng, wall_texture(rng), height)
    bodies = [part(BUILDING, box(depth, height, length), texture, place)]
    roof, x, z = rng.random(), depth / 2 + 0.3, length / 2 + 0.2
    if roof < 0.45:
        tiles = bricks(paint(rng), (0.05, 0.04, 0.04), 0.4, 0.35)
        shape = frustum((-x, x, -z, z), (-0.1, 0.1, -z, z), height, rng.uniform(2, 4.5))
        bodies.append(part(BUILDING, shape, tiles, place))
    elif roof < 0.65:
        shape = box(depth * 0.6, rng.uniform(1.5, 3.5), length * rng.uniform(0.3, 0.8), height)
        bodies.append(part(BUILDING, shape, wall_texture(rng), place))
    elif roof < 0.8:
        bodies.append(part(BUILDING, box(depth + 0.5, 0.5, length, height - 0.3), plain(paint(rng)), place))
    return bodies


def low_wall(rng: np.random.Generator, place: Place, length: float) -> list[Body]:
    """A garden wall."""
    return [part(WALL, box(0.3, rng.uniform(0.8, 2.0), length), wall_texture(rng), place)]


def fence(rng: np.random.Generator, place: Place, length: float) -> list[Body]:
    """Boards, pickets, iron bars or a wire mesh between posts."""
    height, sort = rng.uniform(0.9, 1.8), rng.integers(4)
    period, bar, colour = ((0.16, 0.15, paint(rng)), (0.14, 0.08, paint(rng)), (0.13, 0.03, METAL), (0.1, 0.02, METAL))[
        sort
    ]
    texture = _fence_texture(colour, height, period, bar, mesh=sort == 3)
    return [part(FENCE, box(0.06, height, length), texture, place)]


def _fence_texture(colour: RGB, height: float, period: float, bar: float, mesh: bool) -> Texture:
    """Upright bars of a width (metres) in a period, two rails and posts, with open space between them.

    Each part is at least a pixel wide, so that a fence looks closed at a distance and at a grazing view.
    """

    def texture(s: Surface) -> Shade:
        half = np.maximum(bar, s.footprint) / 2
        along, post = np.abs(s.across % period - period / 2), np.abs(s.across % 2.2 - 1.1) < 0.06
        rail = np.abs(np.abs(s.y - height / 2) - height * 0.36) < np.maximum(half, 0.03)
        solid = (along < half) | rail | post | ~s.upright
        if mesh:
            solid |= np.abs(s.y % period - period / 2) < half
        tone = (scatter(s.across / period, np.zeros_like(s.y)) - 0.5) * 0.4 * s.detail(period)
        shade = Shade(tint(colour, 1 + tone - 0.35 * post + 0.08 * noise(s.across * 25, s.y * 8)), solid=solid)
        return shade

    return texture


def leaf_colour(rng: np.random.Generator) -> RGB:
    """Mostly greens; some autumn colours, shared with bricks."""
    if rng.random() < 0.2:
        return rng.uniform(0.2, 0.4), rng.uniform(0.12, 0.22), rng.uniform(0.03, 0.06)
    return rng.uniform(0.05, 0.15), rng.uniform(0.11, 0.24), rng.uniform(0.02, 0.07)


def hedge(rng: np.random.Generator, place: Place, length: float) -> list[Body]:
    """A trimmed hedge along the street."""
    texture = foliage(leaf_colour(rng), 0.08, rng.uniform(0, 300), ragged=0.0)
    return [part(VEGETATION, box(rng.uniform(0.7, 1.2), rng.uniform(0.8, 2.2), length), texture, place)]


def tree(rng: np.random.Generator, place: Place, height: float) -> list[Body]:
    """A trunk and a crown of ragged, overlapping ellipsoids; conifers are one tall crown."""
    colour, bark = leaf_colour(rng), plain((0.12, 0.09, 0.06), 0.3, 0.03)
    clear = height * rng.uniform(0.25, 0.4)
    bodies = [part(VEGETATION, column(0.06 + 0.014 * height, clear + 0.15 * height), bark, place)]
    middle, spread = (clear + height) / 2, (height - clear) * rng.uniform(0.38, 0.55)
    lumps = 1 if rng.random() < 0.2 else int(rng.integers(4, 7))
    for lump in range(lumps):
        size = 1.0 if lump == 0 else rng.uniform(0.4, 0.65)
        away = 0.0 if lump == 0 else spread * rng.uniform(0.5, 0.8)
        angle = rng.uniform(0, 2 * math.pi)
        lift = 0.0 if lump == 0 else rng.uniform(-0.35, 0.4) * (height - clear)
        radii = (spread * size, (height - clear) / 2 * size, spread * size)
        texture = foliage(colour, 0.09, rng.uniform(0, 300))
        offset = (away * math.cos(angle), middle + lift, away * math.sin(angle))
        bodies.append(part(VEGETATION, Ellipsoid(radii), texture, place, offset))
    return bodies


def clothes(rng: np.random.Generator) -> Clothes:
    """What one person wears."""
    coat = stripes(paint(rng), paint(rng), 0.14) if rng.random() < 0.25 else plain(paint(rng), 0.12, 0.02)
    trousers, tone = plain(paint(rng), 0.1, 0.02), rng.uniform(0.12, 0.75)
    skin = plain((tone, tone * 0.68, tone * 0.5), 0.05)
    return Clothes(coat, trousers, skin, plain((0.06, 0.04, 0.03) if rng.random() < 0.7 else (0.35, 0.25, 0.12), 0.1))


def figure(label: int, limbs: list[Limb], scale: float, place: Place) -> list[Body]:
    """Ellipsoids, scaled about the spot where the figure stands."""
    return [
        part(
            label,
            Ellipsoid((radii[0] * scale, radii[1] * scale, radii[2] * scale)),
            texture,
            place,
            (offset[0] * scale, offset[1] * scale, offset[2] * scale),
        )
        for radii, offset, texture in limbs
    ]


def person(rng: np.random.Generator, place: Place) -> list[Body]:
    """A walker of 1.1 to 1.95 m: head, torso, arms, legs in mid-stride."""
    size = rng.normal(1.73, 0.09) if rng.random() < 0.88 else rng.uniform(1.1, 1.4)
    stride, broad, wear = rng.uniform(0.02, 0.2), rng.uniform(0.9, 1.2), clothes(rng)
    limbs: list[Limb] = [
        ((0.1, 0.125, 0.11), (0, 1.6, 0), wear.skin),
        ((0.112, 0.095, 0.115), (0, 1.66, -0.025), wear.hair),
        ((0.22 * broad, 0.33, 0.14 * broad), (0, 1.2, 0), wear.coat),
        ((0.18 * broad, 0.2, 0.13 * broad), (0, 0.9, 0), wear.coat if rng.random() < 0.5 else wear.trousers),
        ((0.065, 0.31, 0.075), (-0.24 * broad, 1.14, stride * 0.6), wear.coat),
        ((0.065, 0.31, 0.075), (0.24 * broad, 1.14, -stride * 0.6), wear.coat),
        ((0.095, 0.46, 0.105), (-0.09, 0.46, -stride), wear.trousers),
        ((0.095, 0.46, 0.105), (0.09, 0.46, stride), wear.trousers),
    ]
    return figure(PERSON, limbs, size / 1.75, place)


def lamp_post(rng: np.random.Generator, place: Place) -> list[Body]:
    """A street lamp whose arm (local +x) reaches over the road, or a plain post."""
    height, metal = rng.uniform(4.5, 8), plain(METAL if rng.random() < 0.6 else paint(rng), 0.05)
    bodies = [part(POLE, column(rng.uniform(0.06, 0.13), height), metal, place)]
    if rng.random() < 0.7:
        arm = rng.uniform(0.8, 2.2)
        bodies.append(part(POLE, box(arm, 0.09, 0.09, height - 0.1), metal, place, (arm / 2, 0, 0)))
        bodies.append(part(POLE, box(0.6, 0.14, 0.25, height - 0.16), plain((0.6, 0.6, 0.55)), place, (arm, 0, 0)))
    return bodies


def traffic_sign(rng: np.random.Generator, place: Place) -> list[Body]:
    """One or two plates on a thin post; they face the camera's traffic."""
    height, metal = rng.uniform(2.1, 3.0), plain((0.3, 0.31, 0.32), 0.05)
    bodies = [part(POLE, column(0.045, height + 0.3), metal, place)]
    for level in range(int(rng.integers(1, 3))):
        radius, sides = rng.uniform(0.26, 0.42), int(rng.choice([3, 4, 8, 12]))
        face = _sign_face(radius * 0.75, (0.55, 0.02, 0.02), (0.75, 0.75, 0.72))
        if rng.random() < 0.5:
            face = _sign_face(radius * 0.3, paint(rng), (0.8, 0.8, 0.8))
        offset = (0.0, height - level * 0.8, -0.07)
        bodies.append(part(TRAFFIC_SIGN, plate(radius, 0.05, sides), face, place, offset))
    return bodies


def _sign_face(inner: float, rim: RGB, field: RGB) -> Texture:
    def texture(s: Surface) -> Shade:
        shade = Shade(tint(rim, np.ones_like(s.x)))
        front = s.normal[2] < -0.5
        shade.cover(front & (np.hypot(s.x, s.y) < inner), field)
        shade.cover(~front, METAL)
        return shade

    return texture


def traffic_light(rng: np.random.Generator, place: Place) -> list[Body]:
    """A signal head on a pole; one of the three lamps shines."""
    height, on = rng.uniform(2.6, 4.0), int(rng.integers(3))
    lamps: list[RGB] = [(0.05, 0.8, 0.3), (0.9, 0.55, 0.05), (0.9, 0.05, 0.03)]

    def texture(s: Surface) -> Shade:
        shade, glowing = Shade(tint((0.03, 0.035, 0.035), np.ones_like(s.x))), np.zeros(s.x.shape, dtype=bool)
        for number, colour in enumerate(lamps):
            lamp = (s.normal[2] < -0.5) & (np.hypot(s.x, s.y + 0.33 - 0.33 * number) < 0.13)
            shade.cover(lamp, colour if number == on else (0.06, 0.06, 0.06))
            glowing |= lamp & (number == on)
        return Shade(shade.rgb, glowing=glowing)

    bodies = [part(POLE, column(0.07, height), plain(METAL, 0.05), place)]
    shape = Polyhedron(box(0.4, 1.1, 0.3, -0.55).planes, (-0.2, -0.55, -0.15), (0.2, 0.55, 0.15))
    return [*bodies, part(TRAFFIC_LIGHT, shape, texture, place, (0, height, -0.2))]
