"""The results of a sweep: a table, results.csv, report.md with its pictures, and the best trial's config."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtunet_dist.config import Config
from mtunet_dist.config.typed_yaml import to_yaml
from mtunet_dist.errors import InputError, MTUNetError
from mtunet_dist.sweeps.config import Sweep, trial_config
from mtunet_dist.sweeps.folder import MENDABLE, Trial
from mtunet_dist.sweeps.ranking import Ranking, rank, text, values_of
from mtunet_dist.sweeps.report.figures import draw
from mtunet_dist.sweeps.report.importance import MIN_TRIALS, Importance, Importances, importances
from mtunet_dist.sweeps.report.parallel import shortened
from mtunet_dist.system import files
from mtunet_dist.system.files import read_json, write_text
from mtunet_dist.system.place import BEST

SHOWN = 10  # trials in a table
STATUSES = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "unfinished": "unfinished"}


def report(trials: Sequence[Trial], sweep: Sweep, base: Path, console: Console) -> None:
    """Write results.csv, report.md, its pictures and best.yaml, and print the best. It works at any time of a sweep.

    If trials are unfinished and none has ended with a value, there is no best.yaml yet, and a message says so. Raises
    MTUNetError if all trials have ended without a value.
    """
    ranking = rank(trials, sweep)
    write_csv(sweep.dir / "results.csv", ranking.trials, sweep)
    best = ranking.best
    if best:
        config = trial_config(sweep, base, best.parameters, sweep.dir / Path(BEST).stem)
        write_text(sweep.dir / BEST, to_yaml(config))
    found = importances(trials, sweep)
    captions = draw(ranking, sweep, found, _any_config(ranking, sweep, base), sweep.dir / "report")
    write_text(sweep.dir / "report.md", markdown(ranking, sweep, found, captions))
    console.print(table(ranking, sweep))
    lines = [f"{t.id} failed: {t.error}" for t in trials if t.status == "failed"]
    lines += [f"trials: {counts(trials)}", f"best: {best_line(best, sweep)}"]
    lines += [f"again:   mtunet train {sweep.dir / 'best.yaml'}"] if best else []
    lines += [f"report:  {sweep.dir / 'report.md'}; {sweep.dir / 'results.csv'}; run folders: {sweep.dir / 'trials'}"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    if best is None and trials and not any(t.status == "unfinished" or t.failure == "lost" for t in trials):
        names = " and ".join(goal.name for goal in sweep.objective.goals)
        reason = next((f": {trial.error}" for trial in trials if trial.error), "")
        raise MTUNetError(f"none of the {len(trials)} trials has a {names}{reason}")


def counts(trials: Sequence[Trial]) -> str:
    """The number of trials for each status."""
    of = Counter[str](trial.status for trial in trials)
    return ", ".join(f"{of[status]} {words}" for status, words in STATUSES.items() if of[status]) or "none yet"


def best_line(best: Trial | None, sweep: Sweep) -> str:
    """One line about the best trial."""
    if best is None or best.last is None:
        return "none yet; no trial has ended with a value"
    goals = zip(sweep.objective.goals, values_of(best, sweep), strict=True)
    values = ", ".join(f"{goal.name} {value:.6g}" for goal, value in goals)
    return f"{best.id}, {values}, {STATUSES[best.status]} at epoch {best.last.epoch}"


def table(ranking: Ranking, sweep: Sweep) -> Table:
    """The best trials, for a terminal. Settings share one column, because a column for each would be too narrow."""
    goals = [goal.name for goal in sweep.objective.goals]
    drawn = Table(title=Text(sweep.name))
    for heading in ("trial", "status", "epoch", *goals, "settings"):
        drawn.add_column(heading, overflow="fold", justify="right" if heading in goals else "left")
    for trial in ranking.trials[:SHOWN]:
        settings = "  ".join(f"{key}={_shown(value)}" for key, value in trial.parameters.items())
        drawn.add_row(*_result(trial, sweep), Text(settings))
    if len(ranking.trials) > SHOWN:
        drawn.caption = f"the best {SHOWN} of {len(ranking.trials)}"
    return drawn


def write_csv(path: Path, trials: Sequence[Trial], sweep: Sweep) -> None:
    """One line per trial: id, status, epoch, every parameter (empty if not active), goal and metric, error. Nothing is
    cut.

    Goals and metrics are those of the last evaluation.
    """
    keys, goals = list(sweep.dimensions), [goal.name for goal in sweep.objective.goals]
    names = dict.fromkeys(name for trial in trials if trial.last for name in trial.last.metrics)
    metrics = [name for name in names if name not in goals]
    rows: list[Sequence[object]] = [["trial", "status", "epoch", *keys, *goals, *metrics, "error"]]
    for trial in trials:
        parameters = [text(trial.parameters[key]) if key in trial.parameters else "" for key in keys]
        last = trial.last.metrics if trial.last else {}
        figures = [*(values_of(trial, sweep) if trial.last else [""] * len(goals)), *(last.get(m, "") for m in metrics)]
        epoch = trial.last.epoch if trial.last else ""
        rows.append([trial.id, trial.status, epoch, *parameters, *figures, trial.error])
    files.write_csv(path, rows)


@dataclass(frozen=True)
class Stage:
    """From ``epoch`` on, the weights were trained with ``parameters`` in the trial ``source``."""

    epoch: int
    source: str
    parameters: dict[str, Any]


def schedule(trial: Trial, trials: Sequence[Trial], sweep: Sweep) -> list[Stage]:
    """The history of the weights of ``trial`` from the first epoch on, also in the trials from which they were
    copied."""
    by_id = {t.id: t for t in trials}
    stages: list[Stage] = []
    now, until = trial, math.inf
    while earlier := [exploit for exploit in now.history if exploit.epoch < until]:
        newest = earlier[-1]
        stages.append(Stage(newest.epoch, newest.source, newest.parameters))
        now, until = by_id[newest.source], newest.epoch
    # The newest parameters are in the trial; the first ones stay in the file that is written before it starts.
    first = read_json(sweep.dir / "trials" / now.id / "trial.json")["parameters"]
    return [Stage(0, now.id, first), *reversed(stages)]


def markdown(ranking: Ranking, sweep: Sweep, found: Importances | None, captions: dict[str, str]) -> str:
    """Write report.md, for a reader who knows nothing of this sweep."""
    parts = [f"# {sweep.name}", *_searched(ranking, sweep), "## Best", *_best(ranking, sweep)]
    parts += ["## Trials", *_trials(ranking, sweep), "## What matters", *_matters(found)]
    parts += ["## Pictures"] if captions else []
    parts += [f"{caption}\n\n![{name.removesuffix('.png')}](report/{name})" for name, caption in captions.items()]
    failed = sorted((t for t in ranking.trials if t.status == "failed"), key=lambda t: t.id)
    if failed:
        parts += ["## Failed", _table(["trial", "error"], [[trial.id, trial.error] for trial in failed])]
    if again := [trial.id for trial in failed if trial.failure in MENDABLE]:
        parts += [f"The same command tries again: {', '.join(again)}."]
    return "\n\n".join(parts) + "\n"


def _searched(ranking: Ranking, sweep: Sweep) -> Iterator[str]:
    goals = " and ".join(
        f"{goal.name} ({'higher' if goal.mode == 'max' else 'lower'} is better)" for goal in sweep.objective.goals
    )
    overrides = f" with `{' '.join(sweep.overrides)}`" if sweep.overrides else ""
    yield (
        f"{len(ranking.trials)} trials: {counts(ranking.trials)}. Each trains `{sweep.config}`{overrides} and the "
        f"settings below. Goal: {goals}, at the last evaluation. Searcher {sweep.searcher}, "
        f"scheduler {sweep.scheduler}, seed {sweep.seed}; the rest is in [sweep.yaml](sweep.yaml)."
    )
    if any(trial.status == "unfinished" for trial in ranking.trials):
        yield "**The sweep is not over**: it runs still, or was stopped and goes on with the same command."
    rows = []
    for key, dimension in sweep.dimensions.items():
        listed = ", ".join(map(text, dimension.values))
        values = f"one of {listed}" if dimension.kind == "choice" else "{} to {}".format(*dimension.values)
        only = " and ".join(f"{other} in {', '.join(map(text, of))}" for other, of in dimension.when.items())
        rows.append([f"`{key}`", dimension.kind, values, only])
    headings = ["setting", "kind", "values", "only if"]
    yield _table(headings, rows) if any(row[-1] for row in rows) else _table(headings[:-1], [row[:-1] for row in rows])


def _best(ranking: Ranking, sweep: Sweep) -> Iterator[str]:
    best = ranking.best
    if best is None:
        yield "None yet: no trial has ended with a value."
        return
    yield f"Trial {best_line(best, sweep)}. Its config is [best.yaml](best.yaml); to train it again:"
    yield f"    mtunet train {sweep.dir / 'best.yaml'}"
    if best.status == "stopped":
        yield "No trial finished: a whole training with these settings may do better or worse than others."
    if ranking.front:
        ids = ", ".join(trial.id for trial in ranking.front)
        yield (
            f"No trial beats these in every goal: {ids}. The best among them has the best mean over the goals of the "
            f"relative gain over the median of {len(ranking.candidates)} trials; choose another if one goal counts "
            "more."
        )
    if best.history:
        yield (
            "Its weights were not trained with these settings from the start: it took over other trials' weights. "
            "best.yaml holds the last settings only; a training with them need not come as far. What the weights "
            "went through:"
        )
        yield _schedule(schedule(best, ranking.trials, sweep))


def _schedule(stages: Sequence[Stage]) -> str:
    rows, before = [], dict[str, Any]()
    for stage in stages:
        changed = {key: value for key, value in stage.parameters.items() if before.get(key, before) != value}
        gone = [f"{key} no longer set" for key in before if key not in stage.parameters]
        words = [*(f"{key} = {_shown(value)}" for key, value in changed.items()), *gone]
        rows.append([str(stage.epoch), stage.source, ", ".join(words) or "nothing"])
        before = stage.parameters
    return _table(["from epoch", "weights of trial", "changed"], rows)


def _trials(ranking: Ranking, sweep: Sweep) -> Iterator[str]:
    shown, keys = ranking.trials[:SHOWN], list(sweep.dimensions)
    yield f"The best {len(shown)} of {len(ranking.trials)}; all of them, in full, are in [results.csv](results.csv)."
    headings = ["trial", "status", "epoch", *(goal.name for goal in sweep.objective.goals), *keys]
    settings = [[_shown(t.parameters[key]) if key in t.parameters else "" for key in keys] for t in shown]
    yield _table(headings, [[*_result(t, sweep), *of_trial] for t, of_trial in zip(shown, settings, strict=True)])


def _matters(found: Importances | None) -> Iterator[str]:
    if found is None:
        yield "Not told: trials took over each other's weights, so that a result belongs to no one setting."
        return
    when = "at the end" if found.epoch is None else f"after epoch {found.epoch}, the last that all of them reached"
    early = "" if found.epoch is None else " What is good later may differ."
    yield (
        f"Trials are compared {when}. Importance (PED-ANOVA) is how far a setting's values in the best quarter of the "
        f"trials are from those in all, as a multiple of what chance reaches in 1 of 20 cases: below 1 nothing is "
        f"known. A setting is judged among the trials in which it is active, and not with fewer than {MIN_TRIALS}."
        f"{early}"
    )
    for goal, of_goal in found.by_goal.items():
        rows = [[f"`{key}`", _strength(i), str(i.trials), _good(i.good)] for key, i in of_goal.items()]
        yield _table([f"for {goal}", "importance", "trials", "values in the best quarter"], rows)


def _strength(judged: Importance) -> str:
    if math.isnan(judged.strength):
        return "too few trials to tell"
    return f"**{judged.strength:.1f}**" if judged.strength > 1 else f"{judged.strength:.1f}"


def _good(values: Sequence[Any]) -> str:
    """The range of numbers, or how often each other value occurs."""
    if values and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return f"{min(values):.3g} to {max(values):.3g}"
    return ", ".join(f"{value} ({count})" for value, count in Counter(map(text, values)).most_common())


def _result(trial: Trial, sweep: Sweep) -> list[str]:
    """The trial, its status, last epoch and value of each goal."""
    if trial.last is None:
        return [trial.id, trial.status, *[""] * (1 + len(sweep.objective.goals))]
    return [trial.id, trial.status, str(trial.last.epoch), *(f"{value:.4g}" for value in values_of(trial, sweep))]


def _any_config(ranking: Ranking, sweep: Sweep, base: Path) -> Config | None:
    for trial in ranking.trials:
        try:
            return trial_config(sweep, base, trial.parameters, sweep.dir / "trials" / trial.id)
        except InputError:  # the trial failed for that reason
            continue
    return None


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [headings, ["---"] * len(headings), *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else shortened(text(value))
