"""The reports of a run: a progress bar, metrics.jsonl and TensorBoard, all from rank 0."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter

from mtunet_dist import distributed
from mtunet_dist.errors import MTUNetError
from mtunet_dist.system import records

PLAIN_LINE_SECONDS = 10.0
ABOUT = ("kind", "step", "epoch", "time")  # in each line of metrics.jsonl; all other keys are figures
BOARD_RETRY_SECONDS = 60.0  # between tries to open TensorBoard's file on a full disk; each try leaves an empty file


@dataclass(frozen=True)
class StepReport:
    """The figures of the steps since the last report."""

    losses: dict[str, float]  # per task, and "total": means over these steps and all ranks
    weights: dict[str, float]  # loss weight per task now
    lr: float  # of the newest step
    grad_norm: float  # of the newest step, before clipping
    skipped: int = 0  # how often undecodable samples took a place in a batch since this process started


class Tracker:
    """Reports of one process that trains to ``total_steps``; ``start_step`` steps were done before. Silent except on
    rank 0. ``shown`` are the metrics that an evaluation prints.

    A resumed run removes from metrics.jsonl and TensorBoard the steps beyond ``start_step``, and with
    ``evaluation_due`` also the evaluation after it, because they will come again. If the disk is full or read-only, it
    prints a warning and drops what it cannot write. With ``on_write_error="stop"`` it keeps the ``error`` instead, and
    ``check`` raises it: all ranks must get the error, not only the one that writes.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        start_step: int,
        total_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        shown: Sequence[str] = (),
        evaluation_due: bool = False,
        on_write_error: str = "stop",
    ) -> None:
        self.main = distributed.is_main()
        self.shown = shown
        self.on_write_error = on_write_error
        self.error: MTUNetError | None = None
        self.start_step, self.total_steps = start_step, total_steps
        self.steps_per_epoch, self.batch_size = steps_per_epoch, batch_size
        self.begin = self.last_time = time.perf_counter()
        self.last_step = start_step
        self.paused_s = 0.0
        self.printed = -math.inf
        if not self.main:
            return
        self.console = Console()
        self.run_dir = run_dir
        self.metrics_file = run_dir / records.METRICS
        self.board: SummaryWriter | None = None
        with self._writing(self.metrics_file):
            newest = {"eval": start_step - evaluation_due}
            records.keep(
                self.metrics_file, records.METRICS_KEYS, lambda r: r["step"] <= newest.get(r["kind"], start_step)
            )
        # TensorBoard removes whole steps. If the last step still needs its evaluation, write its other figures again.
        self.purge_step: int | None = start_step + (not evaluation_due)
        self.board_closed_until = -math.inf
        self._with_board(SummaryWriter.flush)
        for record in records.metrics(run_dir, "train") if evaluation_due else []:
            if record["step"] == start_step:
                self._show("train", start_step, {k: v for k, v in record.items() if k not in ABOUT and v is not None})
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[report]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar_task = self.bar.add_task(self._epoch(start_step), total=total_steps, completed=start_step, report="")
        self.bar.start()

    def log_steps(self, done: int, report: StepReport) -> None:
        """Record the steps since the last report. ``done`` is the number of the newest step (from 1)."""
        if not self.main:
            return
        now = time.perf_counter()
        seconds = max(now - self.last_time - self.paused_s, 1e-9)
        speed = (done - self.last_step) * self.batch_size / seconds
        self.last_time, self.last_step, self.paused_s = now, done, 0.0
        self._scalars(
            "train",
            done,
            {
                **{f"loss/{k}": v for k, v in report.losses.items()},
                **{f"weight/{k}": v for k, v in report.weights.items()},
                "lr": report.lr,
                "grad_norm": report.grad_norm,
                "samples_per_s": speed,
                **({"skipped": report.skipped} if report.skipped else {}),
            },
        )
        left = timedelta(seconds=round((now - self.begin) / (done - self.start_step) * (self.total_steps - done)))
        text = f"loss {report.losses['total']:.4f}  {speed:.1f} samples/s  {left} left"
        self.bar.update(self.bar_task, completed=done, description=self._epoch(done - 1), report=text)
        if self.bar.disable and (now - self.printed > PLAIN_LINE_SECONDS or done == self.total_steps):
            self.printed = now
            self.console.print(
                f"{self._epoch(done - 1)}  step {done}/{self.total_steps}  {text}", highlight=False, soft_wrap=True
            )

    def evaluation(self, done: int, metrics: Mapping[str, float], class_iou: Mapping[str, float]) -> None:
        """Record an evaluation after ``done`` steps and print its main figures."""
        if not self.main:
            return
        self._scalars("eval", done, {**metrics, **{f"iou/{name}": value for name, value in class_iou.items()}})
        shown = [f"{k} {metrics[k]:.4f}" for k in self.shown if k in metrics]
        self.say(f"{self._epoch(done - 1)}  evaluation: {'  '.join(shown)}")

    def picture(self, done: int, sheet: np.ndarray) -> None:
        """Show a uint8 (height, width, 3) picture in TensorBoard and as pictures/latest.png."""
        if not self.main:
            return
        self._with_board(lambda board: board.add_image("predictions", sheet, done, dataformats="HWC"))
        path = self.run_dir / "pictures" / "latest.png"
        with self._writing(path):
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(sheet).save(path)

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count for samples/s."""
        start = time.perf_counter()
        yield
        self.paused_s += time.perf_counter() - start

    def flush(self) -> None:
        """Flush everything to disk: a resumed run writes only what comes after its checkpoint."""
        if self.main:
            self._with_board(SummaryWriter.flush)

    def check(self) -> None:
        """Raise MTUNetError if something could not be written."""
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Write out everything and end the progress bar."""
        if not self.main:
            return
        self.bar.stop()
        if self.board is not None:
            with self._writing(self.run_dir / "tensorboard"):
                self.board.close()

    def _scalars(self, kind: str, done: int, values: Mapping[str, float]) -> None:
        about = {"kind": kind, "step": done, "epoch": done / self.steps_per_epoch, "time": time.time()}
        # JSON has neither NaN nor infinity, so an undefined figure is null.
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with self._writing(self.metrics_file):
            records.append(self.metrics_file, {**about, **finite})
        self._show(kind, done, values)

    def _show(self, kind: str, done: int, values: Mapping[str, float]) -> None:
        """Draw the values in TensorBoard."""

        def add(board: SummaryWriter) -> None:
            for key, value in values.items():
                board.add_scalar(f"{kind}/{key}", value, done)

        self._with_board(add)

    def _with_board(self, use: Callable[[SummaryWriter], object]) -> None:
        """Call ``use`` with TensorBoard's writer. A writer that failed once always fails, so a later call opens a new
        one."""
        folder = self.run_dir / "tensorboard"
        if time.monotonic() < self.board_closed_until:
            return
        with self._writing(folder):
            try:
                if self.board is None:
                    self.board = SummaryWriter(str(folder), purge_step=self.purge_step)
                    self.board.flush()
                    self.purge_step = None  # only now: if the writer fails before, no step was removed
                use(self.board)
            except OSError:
                self.board = None
                self.board_closed_until = time.monotonic() + BOARD_RETRY_SECONDS
                raise

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Context for code that writes to ``path``. The class describes what happens if the write fails."""
        try:
            yield
        except OSError as error:
            message = f"cannot write {path}: {error.strerror or error}"
            if self.on_write_error == "stop":
                self.error = self.error or MTUNetError(message)
            else:
                self.say(f"warning: {message}; training goes on, as on_write_error=continue")

    def _epoch(self, step: int) -> str:
        return f"epoch {step // self.steps_per_epoch + 1}/{self.total_steps // self.steps_per_epoch}"
