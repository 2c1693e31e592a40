"""Ray casting of a scene: bodies front to back into a depth buffer, then light, shadows, haze and the sensor.

Image, labels, depth and normals come from the same rays through the pixel centres, so they agree at every pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtunet_dist.synthetic import objects
from mtunet_dist.synthetic.geometry import Camera, Ellipsoid
from mtunet_dist.synthetic.objects import BUILDING, VEGETATION, Body
from mtunet_dist.synthetic.scene import Optics, Scene
from mtunet_dist.synthetic.sky import Daylight
from mtunet_dist.synthetic.street import ROAD, SIDEWALK, TERRAIN, Street
from mtunet_dist.synthetic.textures import Surface, channels, noise

EGO_VEHICLE, OUT_OF_ROI, SKY = 1, 3, 23
HORIZON = 2000.0


@dataclass(frozen=True)
class Rendering:
    """``image`` (H, W, 3) uint8 sRGB, ``labels`` (H, W) uint8 Cityscapes ids, ``inverse`` (H, W) float32 inverse depth
    along the optical axis in 1/m (0 in the sky, on the bonnet and the border), ``glossy`` (H, W) bool: mirrors.

    ``normals`` (H, W, 3) float32: the unit normal of the shape that was hit, whatever its texture shows, in the frame
    of the camera (x right, y down, z into the scene) and towards the camera; 0 exactly where ``inverse`` is 0.
    """

    image: np.ndarray
    labels: np.ndarray
    inverse: np.ndarray
    glossy: np.ndarray
    normals: np.ndarray


class _Frame:
    """What the rays hit so far, one column per pixel: inverse depth (0 for nothing), label, what lighting needs."""

    def __init__(self, camera: Camera) -> None:
        self.height, self.width, self.focal = camera.height, camera.width, camera.focal
        self.eye, self.basis = np.array([0.0, camera.mount, 0.0]), camera.basis()
        size = camera.height * camera.width
        self.inverse = np.zeros(size, dtype=np.float32)
        self.labels = np.full(size, SKY, dtype=np.uint8)
        self.albedo = np.zeros((3, size), dtype=np.float32)
        self.normal = np.zeros((3, size), dtype=np.float32)
        self.sunlit = np.ones(size, dtype=np.float32)
        self.glossy = np.zeros(size, dtype=bool)
        self.glowing = np.zeros(size, dtype=bool)

    def rays(self, pixels: np.ndarray, basis: np.ndarray | None = None) -> np.ndarray:
        """Directions (3, P) per metre of depth through pixels numbered row by row, (P,); in the world by default."""
        v, u = np.divmod(pixels, self.width)
        u, v = u.astype(np.float32), v.astype(np.float32)
        rows = (self.basis if basis is None else basis).astype(np.float32)
        return np.stack([along * u + down * v + constant for along, down, constant in rows])

    def draw(self, body: Body, window: tuple[slice, slice], sunlit: float) -> None:
        """Put one body into the buffers where it is the nearest so far."""
        turn = body.from_world()
        eye, basis = turn @ (self.eye - body.position), turn @ self.basis
        u, v = (np.arange(part.start, part.stop, dtype=np.float32) for part in window[::-1])
        inverse, face = body.shape.see(eye, basis, u, v)
        row, column = np.nonzero(inverse > self.inverse.reshape(self.height, self.width)[window])
        if row.size == 0:
            return
        pixels, inverse = (row + window[0].start) * self.width + column + window[1].start, inverse[row, column]
        depth, rays = 1 / inverse, self.rays(pixels, basis)
        points = eye.astype(np.float32)[:, None] + depth * rays
        normal = body.shape.normal(points, face[row, column])
        facing = np.abs((normal * rays).sum(axis=0)) / np.sqrt((rays * rays).sum(axis=0))
        footprint = depth / self.focal / np.maximum(facing, 0.2)
        shade = body.texture(Surface(points[0], points[1], points[2], normal, facing, footprint))
        if shade.solid is not None:
            kept = shade.solid
            pixels, inverse, normal, shade.rgb = pixels[kept], inverse[kept], normal[:, kept], shade.rgb[:, kept]
        self.inverse[pixels], self.labels[pixels], self.sunlit[pixels] = inverse, body.label, sunlit
        self.glossy[pixels], self.glowing[pixels] = shade.glossy, shade.glowing
        world = turn.T.astype(np.float32)
        for axis in range(3):
            self.albedo[axis, pixels] = shade.rgb[axis]
            self.normal[axis, pixels] = (
                world[axis, 0] * normal[0] + world[axis, 1] * normal[1] + world[axis, 2] * normal[2]
            )

    def pave(self, street: Street) -> None:
        """Put the ground plane where no body was hit."""
        pixels = np.flatnonzero(self.inverse == 0)
        rays = self.rays(pixels)
        below = rays[1] < -self.eye[1] / HORIZON
        pixels, rays = pixels[below], rays[:, below]
        depth = np.float32(-self.eye[1]) / rays[1]
        up = np.zeros_like(rays)
        up[1] = 1
        facing = -rays[1] / np.sqrt((rays * rays).sum(axis=0))
        footprint = depth / self.focal / np.sqrt(np.maximum(facing, 0.01))
        surface = Surface(depth * rays[0], np.zeros_like(depth), depth * rays[2], up, facing, footprint)
        self.labels[pixels], shade = street.surface(surface)
        self.inverse[pixels] = 1 / depth
        self.albedo[:, pixels], self.normal[:, pixels] = shade.rgb, up


def render(scene: Scene) -> Rendering:
    """The picture of a scene with its labels, depth and normals."""
    camera, frame = scene.camera, _Frame(scene.camera)
    corners = objects.corners(scene.bodies)
    bounds, nearest = camera.windows(corners)
    windows = bounds.tolist()
    lit = _sunlit(scene, corners.mean(axis=1).T)
    inverse = frame.inverse.reshape(camera.height, camera.width)
    for number in np.argsort(nearest, kind="stable"):
        window = _slices(windows[number])
        if window is not None and inverse[window].min() < 1 / nearest[number]:
            frame.draw(scene.bodies[number], window, lit[number])
    frame.pave(scene.street)
    _cast_shadows(frame, scene, corners, lit)
    linear = _light(frame, scene.daylight).reshape(3, *inverse.shape)
    labels = frame.labels.reshape(inverse.shape)
    _add_bonnet(linear, labels, inverse, scene)
    image = _expose(linear, scene.optics, scene.rng)
    if scene.optics.border:
        width = max(1, round(camera.width / 256))
        outside = np.pad(
            np.zeros((camera.height - 2 * width, camera.width - 2 * width), dtype=bool), width, constant_values=True
        )
        labels[outside], image[outside], inverse[outside] = OUT_OF_ROI, 0, 0
    return Rendering(image, labels, inverse, frame.glossy.reshape(inverse.shape), _seen_normals(frame, camera))


def _slices(window: list[int]) -> tuple[slice, slice] | None:
    """A window of `Camera.windows` as an index, None if empty."""
    top, bottom, left, right = window
    return (slice(top, bottom), slice(left, right)) if top < bottom and left < right else None


def _blocked(body: Body, points: Sequence[np.ndarray], sun: tuple[float, float, float]) -> np.ndarray:
    """Whether the body stands between world points (x, y, z) and the sun."""
    turn = body.from_world()
    x, y, z = (axis - at for axis, at in zip(points, body.position, strict=True))
    cos, sin = float(turn[0, 0]), float(turn[2, 0])
    return body.shape.blocks((cos * x - sin * z, y, sin * x + cos * z), [float(value) for value in turn @ sun])


def _sunlit(scene: Scene, middles: np.ndarray) -> list[float]:
    """For each body with its middle (3, N): 0 if a building stands between it and the sun, else 1."""
    lit = np.ones(len(scene.bodies))
    houses = np.array([body.label == BUILDING for body in scene.bodies])
    for body, house in zip(scene.bodies, houses, strict=True):
        if house:
            lit[_blocked(body, list(middles), scene.daylight.sun)] = 0.0
    lit[houses] = 1.0
    return [float(value) for value in lit]


def _cast_shadows(frame: _Frame, scene: Scene, corners: np.ndarray, lit: list[float]) -> None:
    """Darken the ground wherever a body, unless itself in the shade, stands between it and the sun."""
    sun, size = scene.daylight.sun, frame.labels.size
    if scene.daylight.cover > 0.9:
        return
    ground = np.flatnonzero(np.isin(frame.labels, (ROAD, SIDEWALK, TERRAIN)) & (frame.inverse > 1 / 150))
    points = np.zeros((3, size), dtype=np.float32)
    points[:, ground] = frame.rays(ground) / frame.inverse[ground]
    points[1] = 0.01
    bright = np.zeros(size, dtype=bool)
    bright[ground] = True
    view, numbers = bright.reshape(frame.height, frame.width), np.arange(size).reshape(frame.height, frame.width)
    windows, _ = scene.camera.windows(corners - corners[..., 1:2] * (np.array(sun) / sun[1]))
    for body, bounds, own in zip(scene.bodies, windows.tolist(), lit, strict=True):
        window = _slices(bounds)
        if window is None or own == 0:
            continue
        pixels = numbers[window][view[window]]
        if pixels.size == 0:
            continue
        x, y, z = (axis[pixels] for axis in points)
        shadow = _blocked(body, (x, y, z), sun)
        if body.label == VEGETATION and isinstance(body.shape, Ellipsoid):
            shadow &= noise(x * 9, z * 9) < 1.0
        bright[pixels[shadow]] = False
        frame.sunlit[pixels[shadow]] = 0.0


def _light(frame: _Frame, daylight: Daylight) -> np.ndarray:
    """Linear radiance (3, P)."""
    sky = np.flatnonzero(frame.labels == SKY)
    glow = np.flatnonzero(frame.glowing)
    linear = daylight.shade(frame.albedo, frame.normal, frame.sunlit)
    linear[:, glow] = frame.albedo[:, glow]
    linear = daylight.veil(linear, 1 / np.maximum(frame.inverse, 1 / HORIZON))
    linear[:, sky] = daylight.colour(frame.rays(sky))
    return linear


def _seen_normals(frame: _Frame, camera: Camera) -> np.ndarray:
    """Normals (H, W, 3) in the frame of the camera, 0 where the final depth is invalid."""
    seen = np.zeros((frame.height, frame.width, 3), dtype=np.float32)
    world = frame.normal * (frame.inverse > 0)
    # Written out, not through BLAS, whose rounding varies with the number of threads.
    for axis, (x, y, z) in enumerate(camera.rotation().T.astype(np.float32)):
        seen[..., axis] = (x * world[0] + y * world[1] + z * world[2]).reshape(frame.height, frame.width)
    return seen


def _add_bonnet(linear: np.ndarray, labels: np.ndarray, inverse: np.ndarray, scene: Scene) -> None:
    """The bonnet of the camera's own car: an arc at the bottom that mirrors the sky. Nothing to do in most scenes."""
    height, width = labels.shape
    if scene.optics.bonnet == 0:
        return
    across = np.abs((np.arange(width) - scene.camera.u0) / width)
    top = height * (1 - scene.optics.bonnet * (1 - (across * 1.7) ** 4))
    row = np.arange(height)[:, None]
    own = row >= top
    gleam = (0.08 + 0.3 * np.exp(-np.abs(row - top - 2) / (0.02 * height)))[own]
    linear[:, own] = scene.daylight.horizon() * gleam
    labels[own], inverse[own] = EGO_VEHICLE, 0


def _expose(linear: np.ndarray, optics: Optics, rng: np.random.Generator) -> np.ndarray:
    """Lens blur, white balance, exposure, shot and read noise, a display curve, 8 bits: (3, H, W) to (H, W, 3)."""
    side, middle = optics.blur / 2, 1 - optics.blur
    padded = np.pad(linear, ((0, 0), (1, 1), (0, 0)), mode="edge")
    linear = middle * linear + side * (padded[:, :-2] + padded[:, 2:])
    padded = np.pad(linear, ((0, 0), (0, 0), (1, 1)), mode="edge")
    linear = middle * linear + side * (padded[:, :, :-2] + padded[:, :, 2:])
    gain = channels([balance * optics.exposure for balance in optics.balance])
    signal = np.clip(gain[..., None] * linear, 0, 1.6)
    display = np.sqrt(signal / (1 + 0.25 * signal))
    display *= 0.62 + display * (1.14 - 0.76 * display)
    display += np.float32(optics.noise) * rng.standard_normal(display.shape, dtype=np.float32)
    return np.ascontiguousarray(np.clip(display * 255 + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0))
