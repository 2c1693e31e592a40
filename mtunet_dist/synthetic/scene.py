"""A random street scene: camera, street, daylight and bodies, a pure function of (seed, split, index)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mtunet_dist.synthetic import objects, two_wheelers, vehicles
from mtunet_dist.synthetic.geometry import Camera
from mtunet_dist.synthetic.objects import Body, Place
from mtunet_dist.synthetic.sky import Daylight, random_daylight
from mtunet_dist.synthetic.street import Street

_Build = Callable[[np.random.Generator, Place], list[Body]]
BASELINE = 0.209313
END = 135.0
_VEHICLES = {"car": (vehicles.car, 2.6), "truck": (vehicles.truck, 4.8), "bus": (vehicles.bus, 6.3)}


@dataclass(frozen=True)
class Optics:
    """What the sensor does to the picture, and the car it rides on (``bonnet``: height as a fraction, 0 for none)."""

    exposure: float
    balance: tuple[float, float, float]
    noise: float
    blur: float
    bonnet: float
    border: bool


@dataclass(frozen=True)
class Scene:
    """All inputs of the renderer. ``rng`` draws everything that depends on pixels (sensor noise, stereo speckle)."""

    camera: Camera
    street: Street
    daylight: Daylight
    optics: Optics
    bodies: list[Body]
    rng: np.random.Generator


@dataclass
class _Layout:
    """Bodies placed so far along a street, and the spots (across, z, half width, half length) that are taken."""

    rng: np.random.Generator
    street: Street
    bodies: list[Body] = field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def place(self, across: float, z: float, turn: float = 0.0) -> Place:
        return Place(self.street.middle(z) + across, z, self.street.heading(z) + turn)

    def claim(self, across: float, z: float, reach: float, half_width: float = 1.1) -> bool:
        """Take a spot if it is free. Returns whether it was."""
        if any(abs(a - across) < w + half_width and abs(b - z) < r + reach for a, b, w, r in self.taken):
            return False
        self.taken.append((across, z, half_width, reach))
        return True


def random_scene(seed: int, split: int, index: int, height: int, width: int) -> Scene:
    """The scene of this number, for an image of this size in pixels."""
    rng = np.random.default_rng([seed, split, index])
    parked = (bool(rng.random() < 0.55), bool(rng.random() < 0.55))
    street = _street(rng, parked)
    layout = _Layout(rng, street)
    for side in (-1, 1):
        _frontage(layout, side)
        _pavement(layout, side)
    _backdrop(layout)
    _trams(layout)
    _traffic(layout, parked)
    _two_wheelers(layout, parked)
    _walkers(layout)
    return Scene(_camera(rng, height, width), street, random_daylight(rng), _optics(rng), layout.bodies, rng)


def _camera(rng: np.random.Generator, height: int, width: int) -> Camera:
    yaw, pitch, roll = (math.radians(rng.normal(0, deviation)) for deviation in (3.0, 1.3, 0.7))
    focal = width * rng.uniform(0.88, 1.12)
    u0, v0 = (width - 1) / 2 + rng.normal(0, 0.01) * width, (height - 1) / 2 + rng.normal(0, 0.01) * height
    return Camera(height, width, focal, u0, v0, BASELINE, rng.uniform(1.15, 1.9), yaw, pitch - 0.01, roll)


def _optics(rng: np.random.Generator) -> Optics:
    red, blue = rng.normal(1, 0.04), rng.normal(1, 0.05)
    bonnet = rng.uniform(0.05, 0.11) if rng.random() < 0.35 else 0.0
    border = bool(rng.random() < 0.3)
    return Optics(
        rng.uniform(0.85, 1.45), (red, 1.0, blue), rng.uniform(0.004, 0.02), rng.uniform(0.1, 0.3), bonnet, border
    )


def _street(rng: np.random.Generator, parked: tuple[bool, bool]) -> Street:
    half_width = rng.uniform(3.4, 5.2) + 1.1 * parked[0] + 1.1 * parked[1]
    bend = rng.normal(0, 0.0012) if rng.random() < 0.7 else 0.0
    own_lane = rng.uniform(0.9, max(1.0, half_width - 1.6 - 2.2 * parked[1]))
    start = rng.uniform(14, 60)
    crossroad = (start, start + rng.uniform(6, 11)) if rng.random() < 0.5 else (-99.0, -98.0)
    zebra = crossroad[0] - 4 if crossroad[0] > 0 else rng.uniform(9, 45) if rng.random() < 0.35 else -50.0
    tram: Literal["none", "along", "across"] = "none"
    if rng.random() < 0.35:
        tram = "across" if crossroad[0] > 0 and rng.random() < 0.5 else "along"
    grey, stone = rng.uniform(0.07, 0.24), rng.uniform(0.15, 0.42)
    warm = rng.uniform(0, 0.35) if rng.random() < 0.4 else 0.03
    return Street(
        offset=-own_lane,
        bend=bend,
        half_width=half_width,
        pavement=(rng.uniform(1.8, 4.5), rng.uniform(1.8, 4.5)),
        lawn=(bool(rng.random() < 0.65), bool(rng.random() < 0.65)),
        crossroad=crossroad,
        zebra=zebra,
        asphalt=(grey, grey * rng.uniform(0.96, 1.0), grey * rng.uniform(0.94, 1.04)),
        paving=(stone, stone * (1 - 0.5 * warm), stone * (1 - warm)),
        grass=(rng.uniform(0.1, 0.24), rng.uniform(0.16, 0.25), rng.uniform(0.03, 0.08)),
        marking=rng.uniform(0.3, 1.0) if rng.random() < 0.85 else 0.0,
        dash=rng.uniform(1.5, 3.5),
        tile=rng.uniform(0.4, 1.2),
        seed=rng.uniform(0, 300),
        tram=tram,
    )


def _frontage(layout: _Layout, side: int) -> None:
    """Houses, gardens and parks along one side, left open where the crossroad runs."""
    rng, street, bodies = layout.rng, layout.street, layout.bodies
    z, base, garden = -12.0, rng.uniform(4, 17), rng.uniform(0, 4) if rng.random() < 0.5 else 0.0
    while z < END:
        length = rng.uniform(8, 22)
        near, far = street.crossroad
        if z < far and z + length > near - 3:
            length = near - 3 - z
            if length < 5:
                z = far + 3
                continue
        centre, park = z + length / 2, rng.random() < 0.2
        edge = street.edge(side) + 0.3
        if park:
            for step in np.arange(2.5, length, 4.5):
                across = side * (edge + rng.uniform(3, 9))
                bodies += objects.tree(rng, layout.place(across, z + float(step)), rng.uniform(5, 13))
        else:
            depth, tall = rng.uniform(8, 13), max(3.4, base + rng.normal(0, 3))
            place = layout.place(side * (edge + garden + depth / 2 + rng.uniform(0, 0.6)), centre)
            bodies += objects.building(rng, place, depth, tall, length)
        if (park or garden > 1.5) and rng.random() < 0.85:
            border = (objects.hedge, objects.low_wall, objects.fence)[int(rng.choice(3, p=(0.4, 0.25, 0.35)))]
            bodies += border(rng, layout.place(side * (edge + 0.5), centre), length - 1)
        z += length + (rng.uniform(2, 7) if rng.random() < 0.3 else 0.0)


def _pavement(layout: _Layout, side: int) -> None:
    """Street trees, lamps, signs and signals along one kerb, their arms and faces towards the traffic."""
    rng, street = layout.rng, layout.street
    kerb, turn = side * (street.half_width + 0.55), 0.0 if side < 0 else math.pi
    avenue, lamps = rng.random() < 0.45, rng.uniform(16, 32)
    for z in np.arange(rng.uniform(5, 20), 90, lamps):
        if not street.crosses(z) and layout.claim(kerb, z, 0.5):
            layout.bodies += objects.lamp_post(rng, layout.place(kerb, z, turn))
    for z in np.arange(rng.uniform(6, 14), 100, rng.uniform(7, 13)):
        if avenue and not street.crosses(z) and layout.claim(kerb, z, 1.5):
            layout.bodies += objects.tree(rng, layout.place(side * (street.half_width + 1.0), z), rng.uniform(4, 9))
    for _ in range(int(rng.integers(2, 5))):
        z = math.exp(rng.uniform(math.log(7), math.log(45)))
        if not street.crosses(z) and layout.claim(kerb, z, 0.6):
            layout.bodies += objects.traffic_sign(rng, layout.place(kerb, z, rng.normal(0, 0.15)))
    z = street.zebra - 2.5
    if z > 5 and rng.random() < 0.95:
        layout.bodies += objects.traffic_light(rng, layout.place(kerb, z, rng.normal(0, 0.1)))


def _backdrop(layout: _Layout) -> None:
    """The end of the view: houses or trees across the end of the street."""
    rng = layout.rng
    for across in np.arange(-70, 71, 14.0):
        place = layout.place(float(across), END + rng.uniform(5, 25))
        if rng.random() < 0.5:
            layout.bodies += objects.building(rng, place, 14, rng.uniform(6, 20), 10)
        else:
            layout.bodies += objects.tree(rng, place, rng.uniform(8, 16))


def _trams(layout: _Layout) -> None:
    """Trams along the street, ahead and coming the other way, or one over the crossroad."""
    rng, street = layout.rng, layout.street
    length = rng.uniform(14, 25)
    if street.tram == "across":
        across, z = rng.uniform(-12, 12), sum(street.crossroad) / 2
        layout.claim(0.0, z, 1.6, 25.0)
        layout.bodies += vehicles.tram(rng, layout.place(across, z, math.pi / 2), length)
    if street.tram == "along":
        for lane, turn in zip(street.lanes, (0.0, math.pi), strict=True):
            z = length / 2 + rng.uniform(8, 35)
            if rng.random() < 0.6 and layout.claim(lane, z, length / 2 + 1, 1.3):
                layout.bodies += vehicles.tram(rng, layout.place(lane, z, turn), length)


def _traffic(layout: _Layout, parked: tuple[bool, bool]) -> None:
    """Parked cars at the kerbs, traffic ahead in the own lane and coming the other way, some cars crossing."""
    rng, street = layout.rng, layout.street
    for side in (-1, 1):
        z = rng.uniform(4, 9)
        while parked[side > 0] and z < 75:
            if rng.random() < 0.65 and not street.crosses(z):
                turn = 0.0 if side > 0 or rng.random() < 0.3 else math.pi
                _drive(layout, side * (street.half_width - 1.1), z, turn, 0.06)
            z += rng.uniform(5.6, 7.5)
    for side, lane, turn in ((1, street.lanes[0], 0.0), (-1, street.lanes[1], math.pi)):
        z = rng.uniform(9, 30)
        while z < 95:
            _drive(layout, lane + rng.normal(0, 0.15), z, turn + rng.normal(0, 0.03), 0.2)
            z += rng.uniform(9, 40) if side > 0 else rng.uniform(8, 30)
    if street.crossroad[0] > 0 and rng.random() < 0.5:
        z = sum(street.crossroad) / 2
        _drive(layout, rng.uniform(-9, 9), z, math.pi / 2 * rng.choice([-1, 1]), 0.2)


def _drive(layout: _Layout, across: float, z: float, turn: float, large: float) -> None:
    """Put a vehicle on the road where there is room; ``large`` is the chance of a truck, half that of a bus."""
    chance = layout.rng.random()
    build, reach = _VEHICLES["truck" if chance < large else "bus" if chance < 1.5 * large else "car"]
    if z - reach > 5 and layout.claim(across, z, reach):
        layout.bodies += build(layout.rng, layout.place(across, z, turn))


def _two_wheelers(layout: _Layout, parked: tuple[bool, bool]) -> None:
    """Bicycles and motorcycles in rows along the pavements, and those that are ridden, near the kerbs or in a lane."""
    rng, street = layout.rng, layout.street
    for side in (-1, 1):
        for build, chance, most in ((two_wheelers.bicycle, 0.75, 6), (two_wheelers.motorcycle, 0.4, 4)):
            if rng.random() < chance:
                turn = math.pi / 2 * rng.choice([-1, 1]) if rng.random() < 0.6 else 0.0
                z, step = math.exp(rng.uniform(math.log(6), math.log(35))), 0.75 if turn else 2.1
                for _ in range(int(rng.integers(1, most + 1))):
                    _park(layout, build, side * (street.half_width + 1.2), z, turn + rng.normal(0, 0.12))
                    z += step
        for build, chance in ((two_wheelers.cyclist, 0.5), (two_wheelers.motorcyclist, 0.35)):
            while rng.random() < chance:
                across = side * (street.half_width - 0.8 - 1.9 * parked[side > 0])
                if build is two_wheelers.motorcyclist:
                    across = street.lanes[side < 0] + rng.normal(0, 0.3)
                z, turn = math.exp(rng.uniform(math.log(7), math.log(40))), 0.0 if side > 0 else math.pi
                if layout.claim(across, z, 1.1, 0.5):
                    layout.bodies += build(rng, layout.place(across, z, turn + rng.normal(0, 0.06)))


def _park(layout: _Layout, build: _Build, across: float, z: float, turn: float) -> None:
    """Put a bicycle or motorcycle on the pavement where there is room."""
    if not layout.street.crosses(z) and layout.claim(across, z, 0.3, 0.3):
        layout.bodies += build(layout.rng, layout.place(across, z, turn))


def _walkers(layout: _Layout) -> None:
    """People on the pavements, alone and in groups, and some who cross the road."""
    rng, street = layout.rng, layout.street
    for _ in range(int(rng.integers(7, 16))):
        side = 1 if rng.random() < 0.5 else -1
        z = math.exp(rng.uniform(math.log(6), math.log(45)))
        across, turn = side * (street.half_width + rng.uniform(0.3, street.pavement[side > 0])), 0.0
        if rng.random() < 0.18 or (abs(z - street.zebra) < 2 and rng.random() < 0.7):
            across, turn, z = rng.uniform(-1, 1) * street.half_width, math.pi / 2, max(z, 9.0)
        for member in range(1 if rng.random() < 0.7 else 2):
            if layout.claim(across, z + 0.15 * member, 0.35, 0.25):
                heading = turn + math.pi * rng.integers(2) + rng.normal(0, 0.3)
                layout.bodies += objects.person(rng, layout.place(across, z + 0.15 * member, heading))
            across += 0.6
