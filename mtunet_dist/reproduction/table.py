"""A table of systems as Markdown and CSV: means and standard deviations over seeds, published rows beside them."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mtunet_dist.data.info import DatasetInfo
from mtunet_dist.metrics import delta_m, higher_is_better
from mtunet_dist.reproduction.experiments import SYSTEMS
from mtunet_dist.reproduction.published import PUBLISHED, SIZE
from mtunet_dist.reproduction.trainings import Training

DELTA = "delta_m"
COMPARED = ("miou", "accuracy", "depth_abs", "depth_rel")  # by delta-m
COLUMNS = {  # of the Markdown table
    "miou": "mIoU %",
    "accuracy": "accuracy %",
    "depth_abs": "depth abs",
    "depth_rel": "depth rel",
    DELTA: "Δm %",
    "legacy/miou": "mIoU %, legacy",
    "legacy/accuracy": "accuracy %, legacy",
    "legacy/depth_abs": "depth abs, legacy",
    "legacy/depth_rel": "depth rel, legacy",
}
IN_CSV = (*COLUMNS, "depth_rmse", "depth_delta1")


@dataclass(frozen=True)
class Row:
    """A line of the table; ``figures`` holds each metric's value for each seed, shares as fractions."""

    kind: str  # ours, constant or published
    title: str
    figures: Mapping[str, Sequence[float]]
    parameters: int | None = None
    minutes: float | None = None  # of training, mean over seeds
    seeds: Sequence[int] = ()
    failed: Sequence[int] = field(default=())  # seeds without a result


def rows_of(trainings: Sequence[Training]) -> list[Row]:
    """A row for each system among ``trainings``; delta-m is against the single-task run of the same seed among them."""
    results_of = {(t.system, t.seed): t.metrics for t in trainings}
    rows = []
    for system in dict.fromkeys(t.system for t in trainings):
        runs = [t for t in trainings if t.system == system]
        done = {t.seed: metrics for t in runs if (metrics := results_of[system, t.seed]) is not None}
        results = []
        for seed, metrics in done.items():
            base = results_of.get((SYSTEMS[system].single, seed))
            results.append({**metrics, DELTA: delta_m(metrics, base, COMPARED) if base else math.nan})
        rows.append(
            Row(
                kind="ours",
                title=SYSTEMS[system].title,
                figures={name: [r.get(name, math.nan) for r in results] for name in IN_CSV},
                parameters=runs[0].parameters,
                minutes=statistics.fmean(t.minutes for t in runs if t.seed in done) if done else None,
                seeds=tuple(done),
                failed=tuple(t.seed for t in runs if t.seed not in done),
            )
        )
    return rows


def published_rows(dataset: str, info: DatasetInfo) -> list[Row]:
    """The published rows on ``dataset`` (of DATASETS) if ``info`` has their number of classes and their size."""
    fitting = [
        p for p in PUBLISHED if (p.dataset, p.classes, SIZE) == (dataset, len(info.classes), (info.height, info.width))
    ]
    return [Row("published", p.title, {name: [value] for name, value in p.figures.items()}) for p in fitting]


def markdown(title: str, about: Sequence[str], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table as a document: title, paragraphs, rows, and notes (what failed) as a list."""
    headings = ["", "parameters", "seeds", *COLUMNS.values(), "minutes"]
    lines = [f"# {title}", "", *(f"{text}\n" for text in about)]
    lines += [_line(headings), _line(["---", *["---:"] * (len(headings) - 1)])]
    for row in rows:
        lines.append(
            _line(
                [
                    f"published: {row.title}" if row.kind == "published" else row.title,
                    f"{row.parameters / 1e6:.2f} M" if row.parameters else "",
                    _seeds(row),
                    *(_cell(name, row.figures.get(name, ())) for name in COLUMNS),
                    f"{row.minutes:.1f}" if row.minutes is not None else "",
                ]
            )
        )
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)]) + "\n"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line per row; of each metric the mean and the standard deviation, in full, empty where unknown."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        figures = [f"{name}_{what}" for name in IN_CSV for what in ("mean", "std")]
        writer.writerow(["kind", "system", "parameters", "seeds", "failed_seeds", *figures, "minutes"])
        for row in rows:
            values = [value for name in IN_CSV for value in mean_and_std(row.figures.get(name, ()))]
            known = ["" if value is None else value for value in (row.parameters, *values, row.minutes)]
            seeds = [" ".join(map(str, s)) for s in (row.seeds, row.failed)]
            writer.writerow([row.kind, row.title, known[0], *seeds, *known[1:]])
    temporary.replace(path)


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and standard deviation of a sample (n - 1) where there are two or more; None for what is unknown."""
    known = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None


def _cell(name: str, values: Sequence[float]) -> str:
    mean, std = mean_and_std(values)
    if mean is None:
        return "-"
    if name == DELTA:
        return f"{mean:+.2f}" + (f" ± {std:.2f}" if std is not None else "")
    scale, digits = (100, 2) if higher_is_better(name) else (1, 4)
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if std is not None else "")


def _seeds(row: Row) -> str:
    if row.kind != "ours":
        return ""
    return f"{len(row.seeds)}" + (f" ({len(row.failed)} without result)" if row.failed else "")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
