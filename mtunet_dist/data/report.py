"""The output of ``prepare``: progress while it works, then a table of the result."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mtunet_dist.data.prepared import PreparedDataset

REPORT_SECONDS = 5.0  # between lines of progress without a terminal


@contextlib.contextmanager
def progress(total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of samples just done. It moves a bar, or without a terminal prints
    lines."""
    start = last = time.monotonic()
    done = 0
    columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        bar_task = bar.add_task("samples", total=total, rate="")

        def advance(samples: int) -> None:
            nonlocal done, last
            done, now = done + samples, time.monotonic()
            rate = f"{done / (now - start):.0f} samples/s"
            bar.update(bar_task, advance=samples, rate=rate)
            if not console.is_terminal and (now - last > REPORT_SECONDS or done == total):
                console.print(f"{done} of {total} samples, {rate}")
                last = now

        yield advance


def table(dataset: PreparedDataset) -> Table:
    """A table of the splits, and of how the pixels of each target are distributed."""
    info = dataset.info
    # Text, because rich reads strings with [] or colons as markup.
    rows = Table(title=Text(f"{dataset.root}: {info.width} wide, {info.height} high"))
    rows.add_column()
    for name in info.splits:
        rows.add_column(name, justify="right")
    splits = list(info.splits.values())
    rows.add_row("samples", *(str(split.count) for split in splits))
    for name, task in info.targets.items():
        without = [split.targets[name]["samples_without"] for split in splits]
        if any(without):
            rows.add_row(f"without {task.part}", *map(str, without))
    for name, task in info.targets.items():
        rows.add_section()
        columns = [task.rows(split.targets[name]) for split in splits]
        for label in columns[0]:
            rows.add_row(Text(label), *(column[label] for column in columns))
    return rows
