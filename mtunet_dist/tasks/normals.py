"""Surface normals: the direction that the surface at each pixel faces. Loss 1 - cosine, as in the code of MTAN.

A normal is a unit vector in the frame of the camera (x right, y down, z into the scene) that points towards the camera.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from mtunet_dist.errors import InputError
from mtunet_dist.tasks._colors import turbo
from mtunet_dist.tasks._task import Counts, Direction, Draw, ImageFormat, Task

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from torch import Tensor

LARGEST = 32767  # stored component of length 1
BINS_PER_DEGREE = 100  # of the histogram that the median comes from
SHARES = {"normal_11": 11.25, "normal_22": 22.5, "normal_30": 30.0}  # metric -> degrees
LENGTHS = (0.5, 1.5)  # of a vector in a file; what is shorter or longer is no normal


@dataclass(frozen=True)
class Normals(Task):
    """Surface normals; target float32 (N, 3, H, W), unit vectors, 0 = invalid; output of any length."""

    KIND: ClassVar[str] = "normals"
    PART: ClassVar[str] = "normal"
    METRICS: ClassVar[dict[str, Direction]] = {
        "normal_mean": "min",
        "normal_median": "min",
        "normal_11": "max",
        "normal_22": "max",
        "normal_30": "max",
    }
    MAIN: ClassVar[tuple[str, ...]] = ("normal_mean", "normal_median")
    DTYPE = np.int16
    PLANES = 3
    IMAGE = ImageFormat("normal", ("8-bit RGB PNG",), np.uint8)
    LOSSLESS = False

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Normals:
        """See ``Task``."""
        return cls(name)

    @property
    def unit_text(self) -> str:
        """See ``Task``."""
        return "degrees"

    def blank(self, height: int, width: int) -> np.ndarray:
        """See ``Task``."""
        return np.zeros((height, width, 3), dtype=np.int16)

    def from_image(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """The usual coding of 8 bits: 0..255 is -1..1, and black is invalid."""
        vectors = pixels.astype(np.float32) / 127.5 - 1
        vectors[(pixels == 0).all(2)] = 0
        return self.from_numbers(vectors, name)

    def from_numbers(self, array: np.ndarray, name: str) -> np.ndarray:
        """Vectors (H, W, 3) of about unit length, 0 where invalid -> int16 of unit length."""
        if array.ndim != 3 or array.shape[2] != 3:
            raise InputError(f"{name}: shape {array.shape}; expected (H, W, 3) for {self.part}")
        vectors = array.astype(np.float64)
        length = np.sqrt((vectors**2).sum(2))
        wrong = ~((length == 0) | ((length > LENGTHS[0]) & (length < LENGTHS[1])))
        if wrong.any():
            raise InputError(f"{name}: a vector of length {length[wrong][0]:g}; expected unit vectors, or 0 for none")
        unit = vectors / np.where(length == 0, 1, length)[..., None]
        return np.rint(unit * LARGEST).astype(np.int16)

    def count(self, target: np.ndarray) -> Counts:
        """``sum``: of the stored vectors."""
        valid = target.any(2)
        return {
            "pixels": valid.size,
            "valid": int(valid.sum()),
            "samples_without": int(not valid.any()),
            "sum": target.sum((0, 1), dtype=np.int64).tolist(),
        }

    def rows(self, counts: Counts) -> dict[str, str]:
        """The share of valid pixels, and the mean vector."""
        mean = [component / LARGEST / max(counts["valid"], 1) for component in counts["sum"]]
        return {
            f"valid {self.part}": f"{counts['valid'] / max(counts['pixels'], 1):.1%}",
            f"{self.part} mean (x, y, z)": ", ".join(f"{component:.2f}" for component in mean),
        }

    def tally(self, target: np.ndarray) -> np.ndarray:
        """int64 (4, 181): the sum of the vectors in the first three entries of the first row, and below, for x, y and
        z, how often the angle to that axis has each whole number of degrees."""
        valid = target[target.any(2)]
        angles = np.degrees(np.arccos(np.clip(valid / LARGEST, -1, 1))).astype(np.int64)
        tally = np.zeros((4, 181), dtype=np.int64)
        tally[0, :3] = valid.sum(0, dtype=np.int64)
        for axis in range(3):
            tally[axis + 1] = np.bincount(angles[:, axis], minlength=181)
        return tally

    def constant(self, tally: np.ndarray) -> list[float]:
        """The mean direction, which is the best constant for 1 - cosine."""
        mean = tally[0, :3].astype(np.float64)
        length = float(np.sqrt((mean**2).sum()))
        return [float(component) / length for component in mean] if length else [0.0, 0.0, -1.0]

    def chart(self, axes: Axes, splits: Mapping[str, tuple[Counts, np.ndarray]]) -> None:
        """How the angles to the three axes of the camera are distributed."""
        for n, (name, (_, tally)) in enumerate(splits.items()):
            for axis, style in zip("xyz", ("-", "--", ":"), strict=True):
                angles = tally["xyz".index(axis) + 1]
                label = f"{axis}, {name}"
                axes.plot(angles / max(int(angles.sum()), 1), style, color=f"C{n}", linewidth=1, label=label)
        axes.set_xlabel(f"angle of the {self.part} to an axis of the camera (degrees)")
        axes.set_ylabel("share of the valid pixels")
        axes.legend(fontsize=7)

    def factors(self, draws: Sequence[Draw], count: int) -> np.ndarray:
        """Unit length. A flip exchanges left and right, so x changes its sign. A zoom changes nothing, as in MTAN's
        RandomScaleCrop."""
        flips = [draw.flip for draw in draws] or [False] * count
        rows = [[-1 / LARGEST if flip else 1 / LARGEST, 1 / LARGEST, 1 / LARGEST] for flip in flips]
        return np.array(rows, dtype=np.float32).reshape(-1, 3)

    @property
    def channels(self) -> int:
        """See ``Task``."""
        return 3

    def loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """1 - cosine of the angle between output and normal."""
        import torch

        assert prediction.shape == target.shape, (prediction.shape, target.shape)
        valid = _valid(target)
        cosine = _cosine(prediction.float(), target.float(), valid)
        return torch.where(valid, 1 - cosine, 0.0).sum(), valid.sum()

    def valid(self, target: Tensor) -> Tensor:
        """The number of pixels that have a normal."""
        return _valid(target).sum()

    def metric(self, device: torch.device | str) -> NormalsMetric:
        """See ``Task``."""
        return NormalsMetric(device)

    def compare(self, prediction: Tensor, target: Tensor) -> dict[str, np.ndarray]:
        """See ``Task``; the error is an angle, from 0 to 60 degrees."""
        valid = _valid(target[None])[0]
        cosine = _cosine(prediction[None].float(), target[None].float(), valid[None])[0]
        error = turbo(np.degrees(np.arccos(np.clip(cosine.numpy(), -1, 1))) / 60)
        error[~valid.numpy()] = 0
        return {
            self.part: _vector_colors(target.numpy()),
            f"predicted {self.part}": _vector_colors(prediction.numpy()),
            self.full("error 0..60 degrees"): error,
        }

    def tiles(self, target: Tensor | None, outputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """See ``Task``."""
        truth = {} if target is None else {"truth": target}
        return {name: _vector_colors(vectors.numpy()) for name, vectors in {**truth, **outputs}.items()}

    def stored_tile(self, target: np.ndarray, statistics: Sequence[Counts]) -> np.ndarray:
        """See ``Task``."""
        return _vector_colors(target.transpose(2, 0, 1) / LARGEST)

    def result(self, output: Tensor, size: tuple[int, int]) -> np.ndarray:
        """float32 (height, width, 3): unit vectors."""
        planes = [np.asarray(Image.fromarray(x.numpy()).resize(size, Image.Resampling.BILINEAR)) for x in output]
        vectors = np.stack(planes, axis=2)
        unit: np.ndarray = vectors / np.maximum(np.sqrt((vectors**2).sum(2, keepdims=True)), 1e-6)
        return unit

    def write(self, stem: Path, result: np.ndarray) -> None:
        """``STEM.normal.png``, 8-bit RGB."""
        Image.fromarray(_vector_colors(result.transpose(2, 0, 1))).save(f"{stem}.{self.part}.png")

    def about_files(self) -> str:
        """See ``Task``."""
        return f"{self.part} x, y, z = stored R, G, B / 127.5 - 1; x right, y down, z into the scene"


class NormalsMetric:
    """The angle between output and normal over the pixels that have a normal, in degrees.

    - ``normal_mean``: its mean.
    - ``normal_median``: its median, from a histogram with bins of 0.01 degrees.
    - ``normal_11``, ``normal_22``, ``normal_30``: the share of pixels within 11.25, 22.5 and 30 degrees.

    All are nan if no pixel was valid.
    """

    def __init__(self, device: torch.device | str) -> None:
        import torch

        self.total = torch.zeros((), dtype=torch.float64, device=device)  # sum of angles
        self.histogram = torch.zeros(180 * BINS_PER_DEGREE + 1, dtype=torch.int64, device=device)
        self.within = torch.zeros(len(SHARES) + 1, dtype=torch.int64, device=device)  # pixels per share, all pixels

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: output and normal (N, 3, H, W)."""
        import torch

        with torch.no_grad():
            valid = _valid(target)
            cosine = _cosine(prediction.double(), target.double(), valid)
            angle = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
            self.total += torch.where(valid, angle, 0.0).sum()
            bins = (angle * BINS_PER_DEGREE).long()
            self.histogram.scatter_add_(0, bins.flatten(), valid.long().flatten())
            shares = [(valid & (angle < degrees)).sum() for degrees in SHARES.values()]
            self.within += torch.stack([*shares, valid.sum()])

    def tensors(self) -> list[Tensor]:
        """See ``Metric``."""
        return [self.total, self.histogram, self.within]

    def per_class(self) -> dict[str, float]:
        """See ``Metric``."""
        return {}

    def compute(self) -> dict[str, float]:
        """See ``Metric``."""
        *within, pixels = self.within.double()
        below = self.histogram.cumsum(0).double() >= pixels / 2
        median = (below.int().argmax() + 0.5) / BINS_PER_DEGREE + 0 * (pixels / pixels)
        shares = {name: (count / pixels).item() for name, count in zip(SHARES, within, strict=True)}
        return {"normal_mean": (self.total / pixels).item(), "normal_median": median.item(), **shares}


def _valid(target: Tensor) -> Tensor:
    """bool (N, H, W): where there is a normal."""
    return (target != 0).any(1)


def _cosine(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """The cosine of the angle (N, H, W), and 1 where there is no normal."""
    import torch
    from torch.nn import functional as F

    straight = torch.zeros_like(target)
    straight[:, 2] = 1
    prediction = torch.where(valid[:, None], prediction, straight)
    target = torch.where(valid[:, None], target, straight)
    return (F.normalize(prediction, dim=1) * F.normalize(target, dim=1)).sum(1)


def _vector_colors(vectors: np.ndarray) -> np.ndarray:
    """The usual colours uint8 (H, W, 3) of vectors (3, H, W) of any length: -1..1 is 0..255; no vector is black."""
    length = np.sqrt((vectors**2).sum(0))
    colors = np.rint((vectors / np.maximum(length, 1e-6) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    colors[:, length == 0] = 0
    return np.ascontiguousarray(colors.transpose(1, 2, 0))


PLUGIN = Normals
