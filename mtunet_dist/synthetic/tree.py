"""Where the files of a synthetic scene lie, and how one scene is written: the tree layout of Cityscapes."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from mtunet_dist.synthetic.geometry import Camera
from mtunet_dist.synthetic.render import render
from mtunet_dist.synthetic.scene import random_scene
from mtunet_dist.synthetic.stereo import stored_disparity
from mtunet_dist.system.files import write_atomically

# Increased whenever the same settings give a file another content. A kind of file that is new needs no increase: it is
# added to the scenes of an older tree.
GENERATOR = 2
CITIES = {"train": ("synth0", "synth1", "synth2"), "val": ("synth3",), "test": ("synth4",)}
FILES = {
    "leftImg8bit": "leftImg8bit.png",
    "gtFine": "gtFine_labelIds.png",
    "disparity": "disparity.png",
    "camera": "camera.json",
    "normal": "normal.png",
}


@dataclass(frozen=True)
class Settings:
    """The settings that decide the contents of a tree: scenes per split, their size in pixels, the seed."""

    train: int = 256
    val: int = 64
    test: int = 64
    height: int = 256
    width: int = 512
    seed: int = 0


def scene_files(out: Path, split: str, index: int) -> dict[str, Path]:
    """The path of each kind of file of a scene, by the name of its top folder."""
    city = CITIES[split][index % len(CITIES[split])]
    return {kind: out / kind / split / city / f"{city}_{index:06d}_000019_{end}" for kind, end in FILES.items()}


def write_scene(out: Path, settings: Settings, job: tuple[str, int]) -> None:
    """Make scene (split, index) and write those of its files that are missing. Each gets its name only when complete.

    A file that is there keeps its modification time, by which ``prepare`` sees whether it has changed.
    """
    split, index = job
    scene = random_scene(settings.seed, list(CITIES).index(split), index, settings.height, settings.width)
    rendering = render(scene)
    disparity = stored_disparity(rendering, scene.camera, scene.rng)
    calibration = json.dumps(calibrate(scene.camera), indent=2) + "\n"
    contents: dict[str, Callable[[BinaryIO], object]] = {
        "leftImg8bit": _png(rendering.image),
        "gtFine": _png(rendering.labels),
        "disparity": _png(disparity),
        "camera": lambda file: file.write(calibration.encode()),
        "normal": _png(coded_normals(rendering.normals)),
    }
    for kind, path in scene_files(out, split, index).items():
        if not path.is_file():
            _write(path, contents[kind])


def coded_normals(normals: np.ndarray) -> np.ndarray:
    """The usual coding of normals (H, W, 3) in 8 bits: -1..1 is 0..255, and no normal is black."""
    coded = np.rint((normals + 1) * 127.5).astype(np.uint8)
    coded[~normals.any(axis=2)] = 0
    return coded


def calibrate(camera: Camera) -> dict[str, dict[str, float]]:
    """The camera file of Cityscapes: metres, radians, and pixels of the written picture."""
    extrinsic = {"baseline": camera.baseline, "pitch": camera.pitch, "roll": camera.roll, "x": 0.0, "y": 0.0}
    extrinsic |= {"yaw": camera.yaw, "z": camera.mount}
    intrinsic = {"fx": camera.focal, "fy": camera.focal, "u0": camera.u0, "v0": camera.v0}
    assert all(math.isfinite(value) for value in (*extrinsic.values(), *intrinsic.values()))
    return {"extrinsic": extrinsic, "intrinsic": intrinsic}


def _png(pixels: np.ndarray) -> Callable[[BinaryIO], object]:
    """Run lengths only: for pictures with sensor noise this is twice as fast as matching strings, and files are no
    larger."""
    return lambda file: Image.fromarray(pixels).save(file, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write, sync=False)
