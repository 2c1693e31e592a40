"""How far a run has come. All of it is in each checkpoint, or follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """The progress of a run. Equal on all ranks."""

    step: int = 0  # optimiser steps done
    evaluated: int = 0  # the step of the newest evaluation
    metrics: dict[str, float] = field(default_factory=dict)  # of the newest evaluation
    best: float | None = None  # value of the metric checkpoint.best on the split data.eval
    best_written: float | None = None  # the same, of the newest checkpoint that is known to be on disk
    best_submitted: float | None = None  # the same, in the checkpoint that is being written

    def submitted(self) -> None:
        """A checkpoint of now is being written."""
        self.best_submitted = self.best

    def written(self, ok: bool) -> None:
        """The submitted checkpoint is on disk, or could not be written: the next good model then becomes best.pt."""
        if ok:
            self.best_written = self.best_submitted
        elif self.best == self.best_submitted:
            self.best = self.best_submitted = self.best_written
