"""The pictures of a sweep, as PNG files: learning curves, parallel coordinates, importance and Pareto front."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mtunet_dist.config import Config
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError
from mtunet_dist.sweeps.config import Sweep
from mtunet_dist.sweeps.folder import Trial
from mtunet_dist.sweeps.objective import Goal
from mtunet_dist.sweeps.ranking import Ranking, is_known, limits, values_of
from mtunet_dist.sweeps.report.importance import Importance, Importances
from mtunet_dist.sweeps.report.parallel import BEST, DPI, parallel
from mtunet_dist.system.files import write_atomically

# Colours that the colour-blind can tell apart: Okabe and Ito, https://jfly.uni-koeln.de/color
FINISHED, STOPPED, UNFINISHED, FAILED, EXPLOIT = "#0072B2", "#A0A0A0", "#56B4E9", "#000000", "#009E73"
COLORS = {"finished": FINISHED, "stopped": STOPPED, "unfinished": UNFINISHED, "failed": FAILED}
NAMES = {
    "miou": "mIoU",
    "accuracy": "pixel accuracy",
    "depth_abs": "mean absolute depth error",
    "depth_rel": "mean relative depth error",
    "depth_rmse": "root mean square depth error",
    "delta_m": "Δm (%)",
}
IN_METRES = ("depth_abs", "depth_rmse")


def draw(
    ranking: Ranking, sweep: Sweep, found: Importances | None, config: Config | None, folder: Path
) -> dict[str, str]:
    """Draw the pictures into ``folder``. Returns file name -> content of the picture.

    ``config`` (of any trial) tells the unit of depths; with None the unit is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    goals = sweep.objective.goals
    labels = {goal.name: _label(goal, config) for goal in goals}
    figures: dict[str, tuple[Figure, str]] = {}
    if any(trial.evaluations for trial in ranking.trials):
        figures["curves.png"] = curves(ranking, sweep, labels), "Each trial's evaluations over its epochs."
    valued = [trial for trial in ranking.trials if trial.status != "failed" and is_known(values_of(trial, sweep))]
    if len(valued) > 1:
        figures["parallel.png"] = (
            parallel(valued, ranking.best, sweep, labels),
            "One line per trial through its settings to its result: higher and darker is better; thick is the best. "
            "Dotted past settings that are not active in the trial. Failed trials are left out.",
        )
        if len(goals) == 2:
            figures["pareto.png"] = (
                pareto(valued, ranking, sweep, labels),
                "Both goals near the best, and the trials that no other beats.",
            )
    if found and any(not math.isnan(i.strength) for of_goal in found.by_goal.values() for i in of_goal.values()):
        figures["importance.png"] = (
            importance(found, labels),
            "How much the goal depends on each setting, as a multiple of what chance reaches in 1 of 20 cases.",
        )
    for name, (figure, _) in figures.items():
        write_atomically(folder / name, functools.partial(figure.savefig, format="png"))
    return {name: caption for name, (_, caption) in figures.items()}


def curves(ranking: Ranking, sweep: Sweep, labels: dict[str, str]) -> Figure:
    """Each goal over the epochs, a line per trial."""
    goals = sweep.objective.goals
    figure = Figure(figsize=(max(8.0, 6.0 * len(goals)), 5.0), dpi=DPI, layout="constrained")
    for number, (goal, axes) in enumerate(zip(goals, figure.subplots(1, len(goals), squeeze=False)[0], strict=True)):
        everything = []
        for trial in reversed(ranking.trials):  # the best on top
            values = [sweep.objective.values(evaluation.metrics)[number] for evaluation in trial.evaluations]
            everything += values
            _curve(axes, trial, values, trial is ranking.best)
        axes.set(xlabel="epochs done", ylabel=labels[goal.name], ylim=limits(everything, goal))
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles = _legend(ranking)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def pareto(trials: Sequence[Trial], ranking: Ranking, sweep: Sweep, labels: dict[str, str]) -> Figure:
    """Two goals against each other, and the front."""
    figure = Figure(figsize=(7.0, 5.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    values = {trial.id: values_of(trial, sweep) for trial in trials}
    ended = [values[trial.id] for trial in ranking.candidates] or list(values.values())
    ends = [limits(column, goal) for column, goal in zip(_columns(ended), sweep.objective.goals, strict=True)]
    seen = [t for t in trials if all(a <= v <= b for v, (a, b) in zip(values[t.id], ends, strict=True))]
    for status in ("stopped", "unfinished", "finished"):
        if not (points := [values[trial.id] for trial in seen if trial.status == status]):
            continue
        filled = COLORS[status] if status == "finished" else "none"
        axes.scatter(*_columns(points), s=28, facecolors=filled, edgecolors=COLORS[status], label=status)
    front = sorted(values[trial.id] for trial in ranking.front)
    (x_goal, y_goal), (xs, ys) = sweep.objective.goals, _columns(front)
    axes.plot(xs, ys, color=BEST, drawstyle="steps-pre" if x_goal.mode == "max" else "steps-post", label="front")
    for trial in ranking.front:
        x, y = values[trial.id]
        side, shift = ("right", -5) if x > sum(ends[0]) / 2 else ("left", 5)
        axes.annotate(trial.id, (x, y), xytext=(shift, 5), textcoords="offset points", fontsize=7, ha=side)
    if ranking.best:
        axes.scatter(
            *_columns([values[ranking.best.id]]),
            marker="*",
            s=220,
            color=BEST,
            zorder=3,
            label=f"best {ranking.best.id}",
        )
    for goal, end, which in zip((x_goal, y_goal), ends, "xy", strict=True):
        arrow = {"max": "higher is better →", "min": "← lower is better"}[goal.mode]
        axes.set(**{f"{which}label": f"{labels[goal.name]}   {arrow}", f"{which}lim": end})
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def importance(found: Importances, labels: dict[str, str]) -> Figure:
    """A bar per parameter, for each goal in its order."""
    rows = max(len(of_goal) for of_goal in found.by_goal.values())
    size = (max(7.0, 6.0 * len(found.by_goal)), 1.4 + 0.32 * rows)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(found.by_goal), squeeze=False)[0]
    for axes, (goal, of_goal) in zip(panels, found.by_goal.items(), strict=True):
        _bars(axes, of_goal)
        axes.set(title=labels[goal], xlabel="importance (1 = chance)")
    return figure


def _curve(axes: Axes, trial: Trial, values: Sequence[float], best: bool) -> None:
    epochs = [evaluation.epoch for evaluation in trial.evaluations]
    color = BEST if best else COLORS[trial.status]
    width, alpha = (2.5, 1.0) if best else (1.0, 0.5 if trial.status == "stopped" else 0.8)
    marker = "." if len(epochs) < 20 else None
    axes.plot(epochs, values, _style(trial.status), color=color, lw=width, alpha=alpha, marker=marker, markersize=4)
    if trial.status == "failed" and epochs:
        axes.plot(epochs[-1], values[-1], "x", color=FAILED, markersize=7)
    for exploit in trial.history:
        after = [(e, v) for e, v in zip(epochs, values, strict=True) if e >= exploit.epoch]
        if after:
            axes.plot(*after[0], "^", color=EXPLOIT, markersize=6)


def _style(status: str) -> str:
    return ":" if status == "unfinished" else "-"


def _legend(ranking: Ranking) -> list[Line2D]:
    """The meaning of the lines, and their number."""
    handles = [Line2D([], [], color=BEST, lw=2.5, label=f"best: {ranking.best.id}")] if ranking.best else []
    names = {"stopped": "stopped early"}
    for status, color in COLORS.items():
        of_status = [trial for trial in ranking.trials if trial.status == status and trial is not ranking.best]
        silent = sum(not trial.evaluations for trial in of_status)
        if of_status:
            label = f"{names.get(status, status)}: {len(of_status)}"
            label += f" ({silent} before an evaluation)" if silent else ""
            marker = "x" if status == "failed" else None
            handles.append(Line2D([], [], color=color, ls=_style(status), marker=marker, label=label))
    if any(trial.history for trial in ranking.trials):
        handles.append(Line2D([], [], color=EXPLOIT, ls="", marker="^", label="took over another's weights"))
    return handles


def _bars(axes: Axes, of_goal: dict[str, Importance]) -> None:
    names = list(of_goal)
    for row, judged in enumerate(of_goal.values()):
        if math.isnan(judged.strength):
            axes.text(0.03, row, "too few trials to tell", va="center", fontsize=8, color="#606060")
        else:
            axes.barh(row, judged.strength, height=0.6, color=FINISHED if judged.strength > 1 else STOPPED)
    axes.axvline(1, color="black", lw=1, ls="--")
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, None))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _columns(points: Sequence[tuple[float, ...]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def _label(goal: Goal, config: Config | None) -> str:
    """The goal's name, with its unit if that is known."""
    name = NAMES.get(goal.name, goal.name)
    if config is None or goal.name not in IN_METRES:
        return name
    try:
        unit = PreparedDataset(Path(config.data.root)).info.targets["depth"].unit_text
    except InputError:  # the data may have been moved since
        return name
    return f"{name} ({'m' if unit == 'metres' else f'in {unit}'})"
