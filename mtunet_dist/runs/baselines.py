"""The baseline for a network: the best prediction without a look at the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtunet_dist.data.broken import OnError
from mtunet_dist.data.splits import Split
from mtunet_dist.errors import InputError
from mtunet_dist.tasks._task import Task

MAX_SAMPLES = 500


class ConstantPredictor:
    """Predicts for each task the best constant, such as the most frequent class and the median depth.

    They come from at most ``MAX_SAMPLES`` evenly spaced samples of the training split, so that a large set takes only
    seconds. A sample that cannot be decoded raises InputError, or with ``on_error`` ``skip`` is left out.
    """

    def __init__(self, tasks: Sequence[Task], train: Split, on_error: OnError = "stop") -> None:
        self.tasks = list(tasks)
        tallies = tally(tasks, train, MAX_SAMPLES, on_error)
        self.constants = {task.name: task.constant(tallies[task.name]) for task in self.tasks}

    def predict(self, image: Tensor) -> dict[str, Tensor]:
        """Outputs {task: float32 (N, channels, H, W)} for images (N, 3, H, W)."""
        n, _, height, width = image.shape
        return {
            name: torch.tensor(constant, device=image.device).view(1, -1, 1, 1).expand(n, -1, height, width)
            for name, constant in self.constants.items()
        }


def tally(tasks: Sequence[Task], split: Split, most: int, on_error: OnError = "stop") -> dict[str, np.ndarray]:
    """The tally of each task over at most ``most`` evenly spaced samples. Errors as in ``ConstantPredictor``."""
    blank = {task.name: task.blank(split.info.height, split.info.width) for task in tasks}
    tallies = {task.name: np.zeros_like(task.tally(blank[task.name])) for task in tasks}
    for i in split.spread(most):
        try:
            targets = split.decode(i).targets
        except InputError:
            if on_error == "stop":
                raise
            continue
        for task in tasks:
            tallies[task.name] += task.tally(targets[task.name])
    return tallies
