"""Parallel coordinates: an axis per parameter and goal, and each trial a line from its settings to its result."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from mtunet_dist.sweeps.config import Sweep
from mtunet_dist.sweeps.folder import Trial
from mtunet_dist.sweeps.objective import Goal
from mtunet_dist.sweeps.ranking import limits, text, values_of
from mtunet_dist.sweeps.space import Dimension

DPI = 110
INCHES_PER_AXIS, HEIGHT = 1.75, 5.5
LONGEST = 20  # characters of a label
BEST = "#D55E00"  # of the palette of figures.py


@dataclass(frozen=True)
class Scale:
    """Where values lie on an axis from 0 to 1."""

    low: float  # at 0
    high: float
    log: bool = False
    whole: bool = False  # numbers only
    choices: tuple[str, ...] = ()

    def place(self, value: Any) -> float:
        """The height of ``value``; beyond the ends of the axis it is at the end."""
        if self.choices:
            return (self.choices.index(text(value)) + 0.5) / len(self.choices)
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, float(value)))
        return min(max((at - low) / ((high - low) or 1.0), 0.0), 1.0)

    def ticks(self) -> dict[float, str]:
        """Heights and what to write there."""
        if self.choices:
            return {self.place(choice): shortened(choice) for choice in self.choices}
        low, high = sorted((self.low, self.high))
        values = MaxNLocator(5, integer=self.whole).tick_values(low, high)
        if self.log:
            values = LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 30 else (1.0,)).tick_values(low, high)
        slack = 1e-9 * (high - low)
        return {self.place(value): f"{value:.4g}" for value in values if low - slack <= value <= high + slack}


def parallel(trials: Sequence[Trial], best: Trial | None, sweep: Sweep, labels: dict[str, str]) -> Figure:
    """A line per trial (all with known values, the best first) in the colour of the first goal."""
    goals = sweep.objective.goals
    values = {trial.id: values_of(trial, sweep) for trial in trials}
    scales = {key: _scale(dimension) for key, dimension in sweep.dimensions.items()}
    results = [_goal_scale([v[number] for v in values.values()], goal) for number, goal in enumerate(goals)]
    titles = [*map(_broken, scales), *(labels[goal.name].replace(" (", "\n(") for goal in goals)]
    figure = Figure(figsize=(max(6.0, INCHES_PER_AXIS * len(titles) + 0.6), HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for x, (title, scale) in enumerate(zip(titles, [*scales.values(), *results], strict=True)):
        _axis(axes, x, title, scale)
    colors = _colors()
    for trial in reversed(trials):
        heights = [scales[key].place(trial.parameters[key]) if key in trial.parameters else math.nan for key in scales]
        heights = [h + _jitter(trial, scale) for h, scale in zip(heights, scales.values(), strict=True)]
        heights += [scale.place(value) for scale, value in zip(results, values[trial.id], strict=True)]
        color, width, order = (BEST, 3.0, 3) if trial is best else (colors(heights[len(scales)]), 1.0, 1)
        known = [(x, height) for x, height in enumerate(heights) if not math.isnan(height)]
        axes.plot(
            *zip(*known, strict=True), ":", color=color, lw=max(width / 2, 1.0), alpha=0.7, zorder=order
        )  # across gaps
        axes.plot(heights, "-", color=color, lw=width, marker=".", ms=4, alpha=0.85, zorder=order)
    if best:
        axes.plot([], [], color=BEST, lw=3, label=f"best: {best.id}")
        figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    axes.set(xlim=(-0.1, len(titles) - 0.4), ylim=(-0.04, 1.04))
    axes.set_axis_off()
    return figure


def shortened(label: str) -> str:
    """``label`` without its middle if it is long."""
    half = LONGEST // 2
    return label if len(label) <= LONGEST else f"{label[:half]}…{label[1 - half :]}"


def _axis(axes: Axes, x: int, title: str, scale: Scale) -> None:
    axes.plot([x, x], [0, 1], color="black", lw=1, zorder=2)
    axes.text(x, 1.05, title, ha="center", va="bottom", fontsize=9)
    for height, label in scale.ticks().items():
        axes.plot([x, x + 0.03], [height, height], color="black", lw=1, zorder=2)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
        axes.text(x + 0.05, height, label, va="center", fontsize=8, bbox=box, zorder=4)


def _scale(dimension: Dimension) -> Scale:
    if dimension.kind == "choice":
        return Scale(0.0, 1.0, choices=tuple(dict.fromkeys(map(text, dimension.values))))
    low, high = dimension.values
    return Scale(low, high, log=dimension.is_log, whole=dimension.kind == "integer")


def _goal_scale(values: Sequence[float], goal: Goal) -> Scale:
    """The better, the higher."""
    low, high = limits(values, goal)
    return Scale(low, high) if goal.mode == "max" else Scale(high, low)


def _broken(key: str) -> str:
    """A dotted key on several lines."""
    return "\n".join(shortened(part) for part in key.replace(".", ".\n").splitlines())


def _jitter(trial: Trial, scale: Scale) -> float:
    """Apart, so that one sees how many lines meet at a choice; the same in each picture."""
    return random.Random(trial.id).uniform(-0.1, 0.1) / len(scale.choices) if scale.choices else 0.0


def _colors() -> Colormap:
    """From worse (light) to better (dark), without the yellow that is lost on white."""
    whole = matplotlib.colormaps["viridis_r"]
    return LinearSegmentedColormap.from_list("merit", whole([0.15 + 0.85 * i / 255 for i in range(256)]))
