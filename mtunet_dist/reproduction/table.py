"""A table of systems as Markdown and CSV: means and standard deviations over seeds, published rows beside them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtunet_dist.core.comparison import DELTA, delta_m, higher_is_better
from mtunet_dist.data.info import DatasetInfo
from mtunet_dist.reproduction.experiments import DATASETS, STAND_INS, SYSTEMS, Row
from mtunet_dist.reproduction.published import FIGURES, OTHERS, SIZE, THE_PAPER
from mtunet_dist.reproduction.trainings import Training
from mtunet_dist.system import files

COMPARED = ("miou", "accuracy", "depth_abs", "depth_rel")  # the metrics in delta-m
COLUMNS = {  # of the full table
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
AS_THE_PAPER = {"accuracy": "IoU %", "miou": "mIoU %", "depth_abs": "absolute", "depth_rel": "relative"}


@dataclass(frozen=True)
class Line:
    """A row of the table. ``figures`` holds each metric's value for each seed, shares as fractions."""

    kind: str  # paper (a row that the paper has too), ours, constant or published
    title: str
    dataset: str  # of DATASETS
    figures: Mapping[str, Sequence[float]]
    system: str = ""  # of SYSTEMS
    parameters: int | None = None
    minutes: float | None = None  # of training, mean over seeds
    seeds: Sequence[int] = ()
    failed: Sequence[int] = ()  # seeds without a result


def lines_of(trainings: Sequence[Training], paper: Sequence[Row]) -> list[Line]:
    """A table row for each row among ``trainings``. The rows in ``paper`` are of that kind.

    Delta-m compares with the single-task run of the same seed on the same dataset, if it is among them.
    """
    results_of = {(t.row, t.seed): t.metrics for t in trainings}
    lines = []
    for row in dict.fromkeys(t.row for t in trainings):
        runs = [t for t in trainings if t.row == row]
        done = {t.seed: metrics for t in runs if (metrics := results_of[row, t.seed]) is not None}
        results = []
        for seed, metrics in done.items():
            base = results_of.get((Row(SYSTEMS[row.system].single, row.dataset), seed))
            results.append({**metrics, DELTA: delta_m(metrics, base, COMPARED) if base else math.nan})
        lines.append(
            Line(
                kind="paper" if row in paper else "ours",
                title=SYSTEMS[row.system].title,
                dataset=row.dataset,
                figures={name: [r.get(name, math.nan) for r in results] for name in IN_CSV},
                system=row.system,
                parameters=runs[0].parameters,
                minutes=statistics.fmean(t.minutes for t in runs if t.seed in done) if done else None,
                seeds=tuple(done),
                failed=tuple(t.seed for t in runs if t.seed not in done),
            )
        )
    return lines


def published_lines(dataset: str, info: DatasetInfo) -> list[Line]:
    """Published rows on ``dataset`` (of DATASETS), if ``info`` has their image size."""
    if (info.height, info.width) != SIZE:
        return []
    return [
        Line("published", p.title, dataset, {name: [value] for name, value in p.figures.items()})
        for p in OTHERS
        if p.dataset == dataset
    ]


def beside_the_paper(table: str, lines: Sequence[Line]) -> list[str]:
    """Markdown of the paper's ``table``: its rows, order and columns, with the paper's figures and ours.

    Empty if the paper has no such table. Our figures are of the ``legacy`` family, the averages per image or
    batch, as in the paper's protocol.
    """
    if table not in THE_PAPER:
        return []
    columns = list(AS_THE_PAPER.values())
    headings = ["", "data", *(f"{c}, paper" for c in columns), *(f"{c}, ours" for c in columns)]
    text = [_line(headings), _line(["---", "---", *["---:"] * (len(headings) - 2)])]
    for line in (line for line in lines if line.kind == "paper"):
        theirs = _papers_figures(table, line)
        paper = [_cell(name, [theirs[name]]) for name in FIGURES]
        ours = [_cell(name, line.figures[f"legacy/{name}"]) for name in FIGURES]
        text.append(_line([line.title, DATASETS[line.dataset].title, *paper, *ours]))
    return [*text, ""]


def markdown(
    title: str, about: Sequence[str], paper: Sequence[str], lines: Sequence[Line], notes: Sequence[str]
) -> str:
    """The table as a document: title, paragraphs, the result of ``beside_the_paper``, all rows, and notes as a list."""
    headings = ["", "data", "parameters", "seeds", *COLUMNS.values(), "minutes"]
    text = [f"# {title}", "", *(f"{paragraph}\n" for paragraph in about)]
    text += ["## Beside the paper", "", *paper, "## All figures", ""] if paper else []
    text += [_line(headings), _line(["---", "---", *["---:"] * (len(headings) - 2)])]
    below = {"ours": "*not in the paper:*", "constant": "*for comparison:*"} if paper else {}
    for line in sorted(lines, key=lambda line: ("paper", "ours", "constant", "published").index(line.kind)):
        if line.kind in below:
            text.append(_line([below.pop(line.kind), *[""] * (len(headings) - 1)]))
        text.append(
            _line(
                [
                    f"published: {line.title}" if line.kind == "published" else line.title,
                    DATASETS[line.dataset].title,
                    f"{line.parameters / 1e6:.2f} M" if line.parameters else "",
                    _seeds(line),
                    *(_cell(name, line.figures.get(name, ())) for name in COLUMNS),
                    f"{line.minutes:.1f}" if line.minutes is not None else "",
                ]
            )
        )
    return "\n".join([*text, *([""] if notes else []), *(f"- {note}" for note in notes)]) + "\n"


def write_csv(path: Path, table: str, lines: Sequence[Line]) -> None:
    """One line per row: mean and standard deviation of each metric, unrounded, and the paper's figures. Unknown ones
    are empty."""
    figures = [f"{name}_{what}" for name in IN_CSV for what in ("mean", "std")]
    papers = [f"paper_{name}" for name in FIGURES]
    head = ["kind", "system", "dataset", "parameters", "seeds", "failed_seeds", *figures, "minutes", *papers]
    rows: list[Sequence[object]] = [head]
    for line in lines:
        theirs = _papers_figures(table, line)
        values = [value for name in IN_CSV for value in mean_and_std(line.figures.get(name, ()))]
        known = ["" if value is None else value for value in (line.parameters, *values, line.minutes)]
        seeds = [" ".join(map(str, s)) for s in (line.seeds, line.failed)]
        of_paper = [theirs.get(name, "") for name in FIGURES]
        rows.append([line.kind, line.title, line.dataset, known[0], *seeds, *known[1:], *of_paper])
    files.write_csv(path, rows)


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and standard deviation of a sample (n - 1) if there are two or more values. None for an unknown one."""
    known = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None


def _papers_figures(table: str, line: Line) -> dict[str, float]:
    """The paper's figures for a row of its ``table``, also where a stand-in replaces its dataset; else empty."""
    of_stand_in = {stand_in: dataset for dataset, stand_in in STAND_INS.items()}
    return THE_PAPER.get(table, {}).get((line.system, of_stand_in.get(line.dataset, line.dataset)), {})


def _cell(name: str, values: Sequence[float]) -> str:
    mean, std = mean_and_std(values)
    if mean is None:
        return "-"
    if name == DELTA:
        return f"{mean:+.2f}" + (f" ± {std:.2f}" if std is not None else "")
    scale, digits = (100, 2) if higher_is_better(name) else (1, 4)
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if std is not None else "")


def _seeds(line: Line) -> str:
    if line.kind not in ("paper", "ours"):
        return ""
    return f"{len(line.seeds)}" + (f" ({len(line.failed)} without result)" if line.failed else "")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
