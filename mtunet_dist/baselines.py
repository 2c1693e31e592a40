"""The baseline for a network: the best prediction without a look at the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtunet_dist.core.step import Depth, Segmentation, Task
from mtunet_dist.data.broken import OnError
from mtunet_dist.data.splits import Split
from mtunet_dist.errors import InputError
from mtunet_dist.schema import VOID

MAX_SAMPLES = 500


class ConstantPredictor:
    """Predicts one class and one depth everywhere: the most frequent and the median of the training split.

    Both come from at most ``MAX_SAMPLES`` evenly spaced samples, so that a large set takes only seconds. A sample that
    cannot be decoded raises InputError, or with ``on_error`` ``skip`` is left out.
    """

    def __init__(self, tasks: Sequence[Task], train: Split, on_error: OnError = "stop") -> None:
        self.tasks = list(tasks)
        class_pixels = np.zeros(256, dtype=np.int64)
        depth_pixels = np.zeros(1 << 16, dtype=np.int64)
        for i in train.spread(MAX_SAMPLES):
            try:
                raw = train.decode(i)
            except InputError:
                if on_error == "stop":
                    raise
                continue
            class_pixels += np.bincount(raw.label.reshape(-1), minlength=256)
            depth_pixels += np.bincount(raw.depth.reshape(-1), minlength=1 << 16)
        class_pixels[VOID] = depth_pixels[0] = 0
        self.most_frequent = int(class_pixels.argmax())
        middle = np.searchsorted(depth_pixels.cumsum(), depth_pixels.sum() / 2)
        self.median_depth = float(middle) * train.info.depth.scale

    def predict(self, image: Tensor) -> dict[str, Tensor]:
        """Outputs {task: float32 (N, channels, H, W)} for images (N, 3, H, W)."""
        outputs = {}
        for task in self.tasks:
            output = torch.zeros(len(image), task.channels, *image.shape[2:], device=image.device)
            if isinstance(task, Segmentation):
                output[:, self.most_frequent] = 1.0
            elif isinstance(task, Depth):
                output.fill_(self.median_depth)
            outputs[task.name] = output
        return outputs
