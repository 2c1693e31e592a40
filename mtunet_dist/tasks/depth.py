"""Depth: a distance, or an inverse distance, for each pixel. L1 (equation 2 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from PIL import Image

from mtunet_dist.errors import InputError
from mtunet_dist.tasks._colors import turbo
from mtunet_dist.tasks._task import Counts, Direction, Draw, ImageFormat, Task

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from torch import Tensor

LARGEST = 65535  # stored value
BINS = 60  # of the histogram


@dataclass(frozen=True)
class Depth(Task):
    """Depth; stored uint16 times ``scale`` is in ``unit``; target float32 (N, 1, H, W) in that unit, 0 = invalid."""

    depth: Literal["metric", "inverse"]
    unit: Literal["metre", "1"]
    scale: float

    KIND: ClassVar[str] = "depth"
    PART: ClassVar[str] = "depth"
    METRICS: ClassVar[dict[str, Direction]] = {
        "depth_abs": "min",
        "depth_rel": "min",
        "depth_rmse": "min",
        "depth_delta1": "max",
        "legacy/depth_abs": "min",
        "legacy/depth_rel": "min",
    }
    MAIN: ClassVar[tuple[str, ...]] = ("depth_abs", "depth_rel")
    DTYPE = np.uint16
    IMAGE = ImageFormat("depth", ("16-bit gray PNG",), np.uint16)

    @classmethod
    def metric_depth(cls, scale: float, name: str = "depth") -> Depth:
        """Metres."""
        return cls(name, "metric", "metre", scale)

    @classmethod
    def inverse_depth(cls, scale: float, name: str = "depth") -> Depth:
        """A disparity without a unit."""
        return cls(name, "inverse", "1", scale)

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Depth:
        """See ``Task``."""
        return cls(name, value["depth"], value["unit"], value["scale"])

    def identity(self) -> object:
        """See ``Task``. That of the first dataset formats, so that runs of before resume."""
        return [self.depth, self.unit, self.scale] if self.name == self.KIND else super().identity()

    @property
    def unit_text(self) -> str:
        """The unit in a text."""
        return "metres" if self.unit == "metre" else "the unit of inverse depth"

    def blank(self, height: int, width: int) -> np.ndarray:
        """See ``Task``."""
        return np.zeros((height, width), dtype=np.uint16)

    def from_numbers(self, array: np.ndarray, name: str) -> np.ndarray:
        """Depth in its unit, 0 where invalid -> steps of ``scale``, rounded. NaN and what is outside of 0 to 65535
        steps is not valid."""
        steps = np.rint(array.astype(np.float64) / self.scale)
        wrong = ~((steps >= 0) & (steps <= LARGEST))
        if wrong.any():
            raise InputError(f"{name}: depth {array[wrong][0]:g} is not one of 0..{LARGEST * self.scale:g}")
        return steps.astype(np.uint16)

    def count(self, target: np.ndarray) -> Counts:
        """``sum``, ``min`` and ``max`` of the valid stored values."""
        valid = target[target > 0]
        return {
            "pixels": target.size,
            "valid": valid.size,
            "samples_without": int(valid.size == 0),
            "sum": int(valid.sum(dtype=np.int64)),
            "min": int(valid.min(initial=LARGEST)),
            "max": int(valid.max(initial=0)),
        }

    def rows(self, counts: Counts) -> dict[str, str]:
        """The share of valid pixels, the mean and the range."""
        unit = "m" if self.unit == "metre" else "no unit"
        mean, least, most = self.statistics(counts)
        return {
            f"valid {self.part}": f"{counts['valid'] / max(counts['pixels'], 1):.1%}",
            f"{self.part} mean ({unit})": f"{mean:.4g}",
            f"{self.part} range ({unit})": f"{least:.4g} to {most:.4g}",
        }

    def statistics(self, counts: Counts) -> tuple[float, float, float]:
        """Mean, least and largest depth in its unit, 0 without a valid pixel."""
        if not counts["valid"]:
            return 0.0, 0.0, 0.0
        mean = counts["sum"] / counts["valid"] * self.scale
        return mean, counts["min"] * self.scale, counts["max"] * self.scale

    def tally(self, target: np.ndarray) -> np.ndarray:
        """int64 (65536,): pixels of each stored value; invalid ones are not counted."""
        pixels = np.bincount(target.reshape(-1), minlength=LARGEST + 1)
        pixels[0] = 0
        return pixels

    def chart(self, axes: Axes, splits: Mapping[str, tuple[Counts, np.ndarray]]) -> None:
        """How depth is distributed."""
        top = max(counts["max"] for counts, _ in splits.values()) * self.scale
        for name, (_, pixels) in splits.items():
            stored = np.flatnonzero(pixels)
            if len(stored):
                values, weights = stored * self.scale, pixels[stored]
                axes.hist(values, bins=BINS, range=(0, top), weights=weights, density=True, histtype="step", label=name)
        axes.set_xlabel(f"{self.part} (m)" if self.unit == "metre" else f"{self.depth} {self.part} (no unit)")
        axes.set_ylabel("density of the valid pixels")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)

    def constant(self, tally: np.ndarray) -> list[float]:
        """The median, which is the best constant for L1."""
        return [float(np.searchsorted(tally.cumsum(), tally.sum() / 2)) * self.scale]

    def factors(self, draws: Sequence[Draw], count: int) -> np.ndarray:
        """The unit, and what a zoom by s does: a scene comes s times closer, as in MTAN's RandomScaleCrop. So metric
        depth is divided by s and inverse depth is multiplied."""
        scales = [draw.scale for draw in draws] or [1.0] * count
        zooms = [1.0 / scale if self.depth == "metric" else scale for scale in scales]
        return np.array([[self.scale * zoom] for zoom in zooms], dtype=np.float32)

    @property
    def channels(self) -> int:
        """See ``Task``."""
        return 1

    def loss(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """L1 distance (eq. 2) in the unit of depth; a target is valid where it is positive and finite."""
        import torch

        assert prediction.shape == target.shape, (prediction.shape, target.shape)
        valid = (target > 0) & target.isfinite()
        difference = torch.where(valid, prediction.float(), 0.0) - torch.where(valid, target.float(), 0.0)
        return difference.abs().sum(), valid.sum()

    def valid(self, target: Tensor) -> Tensor:
        """The number of pixels that have a depth."""
        return ((target > 0) & target.isfinite()).sum()

    def metric(self, device: torch.device | str) -> DepthMetric:
        """See ``Task``."""
        return DepthMetric(device)

    def compare(self, prediction: Tensor, target: Tensor) -> dict[str, np.ndarray]:
        """See ``Task``; the error is relative, from 0 to one half."""
        predicted, depth = prediction[0].numpy(), target[0].numpy()
        low, high = _range(depth)
        error = turbo(np.abs(predicted - depth) / np.maximum(depth, 1e-6) * 2)
        error[depth <= 0] = 0
        return {
            f"{self.part} {low:.3g}..{high:.3g} {self.unit}": depth_colors(depth, low, high),
            f"predicted {self.part}": depth_colors(np.maximum(predicted, 1e-6), low, high),
            self.full("relative error 0..0.5"): error,
        }

    def tiles(self, target: Tensor | None, outputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """See ``Task``; the range of colours is in the caption of the first tile."""
        least = self.scale if target is None else 1e-6  # 0 would be drawn as invalid
        depths = {name: np.maximum(output[0].numpy(), least) for name, output in outputs.items()}
        if target is not None:
            depths = {"truth": target[0].numpy()} | depths
        first, *others = depths
        low, high = _range(depths[first])
        captions = {first: f"{first} {low:.3g}..{high:.3g} {self.unit}"} | {name: name for name in others}
        return {captions[name]: depth_colors(depth, low, high) for name, depth in depths.items()}

    def stored_tile(self, target: np.ndarray, statistics: Sequence[Counts]) -> np.ndarray:
        """See ``Task``."""
        top = max(counts["max"] for counts in statistics) * self.scale
        low = min((counts["min"] * self.scale for counts in statistics if counts["valid"]), default=top)
        low = max(low, self.scale)
        return depth_colors(target * self.scale, low, max(top, low))

    def result(self, output: Tensor, size: tuple[int, int]) -> np.ndarray:
        """float32 (height, width) in the unit of depth."""
        return np.asarray(Image.fromarray(output[0].numpy()).resize(size, Image.Resampling.BILINEAR))

    def write(self, stem: Path, result: np.ndarray) -> None:
        """``STEM.depth.png``, 16-bit, in the stored units of the training set."""
        depth = np.maximum(result, self.scale)
        stored = np.minimum(np.round(depth / self.scale), LARGEST).astype(np.uint16)
        Image.fromarray(stored).save(f"{stem}.{self.part}.png")

    def about_files(self) -> str:
        """See ``Task``."""
        return f"{self.part} in {self.unit} = stored value * {self.scale:g}"


class DepthMetric:
    """Errors of depth over the pixels whose true depth is positive and finite.

    - ``depth_abs``, ``depth_rmse``: mean absolute and root mean squared error in the unit of depth.
    - ``depth_rel``: mean of absolute error / true depth, as a fraction.
    - ``depth_delta1``: share with max(p / g, g / p) < 1.25; a prediction that is not positive counts as wrong.
    - ``legacy/depth_abs``, ``legacy/depth_rel``: the mean of each batch, averaged over the batches with a valid
      pixel; they depend on how the set was cut into batches. The code of MTAN averages so.

    All are nan if no pixel was valid.
    """

    def __init__(self, device: torch.device | str) -> None:
        import torch

        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # absolute, relative, squared error
        self.legacy_sums = torch.zeros(2, dtype=torch.float64, device=device)  # batch means of absolute, relative
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # pixels, pixels within delta, batches

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: prediction and depth (N, 1, H, W)."""
        import torch

        assert prediction.shape == target.shape, (prediction.shape, target.shape)
        with torch.no_grad():
            valid = (target > 0) & target.isfinite()
            p = torch.where(valid, prediction.double(), 1.0)
            g = torch.where(valid, target.double(), 1.0)
            error = (p - g).abs()
            close = valid & (p > 0) & (torch.maximum(p / g, g / p) < 1.25)
            sums = torch.stack([error.sum(), (error / g).sum(), error.square().sum()])
            pixels = valid.sum()
            self.sums += sums
            self.legacy_sums += sums[:2] / pixels.clamp(min=1)
            self.counts += torch.stack([pixels, close.sum(), (pixels > 0).long()])

    def tensors(self) -> list[Tensor]:
        """See ``Metric``."""
        return [self.sums, self.legacy_sums, self.counts]

    def per_class(self) -> dict[str, float]:
        """See ``Metric``."""
        return {}

    def compute(self) -> dict[str, float]:
        """See ``Metric``."""
        pixels, close, batches = self.counts.double()
        absolute, relative, squared = (self.sums / pixels).tolist()
        legacy_absolute, legacy_relative = (self.legacy_sums / batches).tolist()
        return {
            "depth_abs": absolute,
            "depth_rel": relative,
            "depth_rmse": math.sqrt(squared),
            "depth_delta1": (close / pixels).item(),
            "legacy/depth_abs": legacy_absolute,
            "legacy/depth_rel": legacy_relative,
        }


def depth_colors(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """Near is red, far is blue, on a logarithmic scale from ``low`` to ``high``; invalid (<= 0) is black."""
    valid = depth > 0
    position = np.log(np.where(valid, depth, low) / low) / max(np.log(high / low), 1e-6)
    colors = turbo(1 - position)
    colors[~valid] = 0
    return colors


def _range(depth: np.ndarray) -> tuple[float, float]:
    """The range of colours: from the 2nd to the 98th percentile of the valid depths."""
    valid = depth > 0
    low, high = np.percentile(depth[valid], (2, 98)) if valid.any() else (1.0, 1.0)
    return float(low), float(high)


PLUGIN = Depth
