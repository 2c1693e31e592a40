"""The single module that a strategy wraps: network, losses and loss weights together.

All trained parameters are in one module with one scalar output. Therefore any strategy reduces, optimises and saves
loss weights that learn by gradient like every other parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mtunet_dist import distributed, plugins
from mtunet_dist.config import Config
from mtunet_dist.errors import InputError
from mtunet_dist.tasks._task import Task

Batch = dict[str, Tensor]
"""``image`` uint8 (N, 3, H, W) in channels-last memory, the target of each task of the dataset under the task's name
(see its file in ``tasks/``), ``sample`` int64 (N,) positions in the split."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# The usual ImageNet statistics. Any fixed scaling works, because a batch norm follows every first layer.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class Weighting(Protocol):
    """A module that combines the losses into one total; see ``weightings/``."""

    def __call__(self, losses: dict[str, Tensor]) -> Tensor:
        """The total of the tasks' losses."""

    def end_epoch(self) -> None:
        """Called on every rank after each epoch."""

    def weights(self) -> dict[str, Tensor]:
        """The current weight of each task."""


class MultiTaskStep(nn.Module):
    """Takes a batch and returns the weighted total loss. It does normalisation and autocast, so training and
    use agree."""

    image_mean: Tensor
    image_std: Tensor
    model: nn.Module
    weighting: Weighting

    def __init__(self, model: nn.Module, tasks: Sequence[Task], weighting: Weighting, precision: str = "fp32") -> None:
        super().__init__()
        self.model = model
        self.weighting = weighting
        self.tasks = list(tasks)
        self.dtype = DTYPES[precision]
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(3, 1, 1) * 255, persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss with gradient, and the loss of each task without gradient.

        A loss is the sum over valid pixels divided by their number: the number in this batch, or the one that
        ``share_valid_counts`` put into the batch.
        """
        outputs = self.predict(batch["image"])
        losses = {}
        for task in self.tasks:
            loss_sum, count = task.loss(outputs[task.name], batch[task.name])
            shared = batch.get(f"valid/{task.name}")
            losses[task.name] = _mean(loss_sum, count) if shared is None else loss_sum / shared
        return self.weighting(losses), {name: loss.detach() for name, loss in losses.items()}

    def predict(self, image: Tensor) -> dict[str, Tensor]:
        """Outputs {task: float32 (N, channels, H, W)} for uint8 images (N, 3, H, W)."""
        with self._autocast(image):
            outputs: dict[str, Tensor] = self.model(self._normalised(image))
        return {name: output.float() for name, output in outputs.items()}

    def predict_with_masks(self, image: Tensor) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """The result of ``predict``, and for models with attention their masks by task, deepest decoder block first."""
        forward_with_masks: Any = getattr(self.model, "forward_with_masks", None)
        if forward_with_masks is None:
            return self.predict(image), {}
        with self._autocast(image):
            outputs, masks = forward_with_masks(self._normalised(image))
        return {name: output.float() for name, output in outputs.items()}, masks

    def _normalised(self, image: Tensor) -> Tensor:
        return (image.float() - self.image_mean) / self.image_std

    def _autocast(self, image: Tensor) -> torch.autocast:
        return torch.autocast(image.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def build_step(config: Config, tasks: Sequence[Task]) -> MultiTaskStep:
    """The untrained MultiTaskStep that ``config`` describes, for ``tasks`` on a dataset.

    Also sets how this process computes in fp32, see ``set_fp32_precision``.
    """
    set_fp32_precision(config.tf32)
    model = plugins.build("model", config.model, {task.name: task.channels for task in tasks})
    weighting = plugins.build("weighting", config.weighting, [task.name for task in tasks])
    return MultiTaskStep(model, tasks, weighting, config.precision)


def set_fp32_precision(tf32: bool) -> None:
    """Set whether a GPU may use TF32 for convolutions and matrix products in fp32. torch's defaults are yes and no."""
    kind = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.conv.fp32_precision = kind  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = kind


def place(step: MultiTaskStep, device: torch.device, channels_last: bool) -> MultiTaskStep:
    """Move ``step`` to ``device``, and give its convolution weights the memory layout that is fastest there."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    placed: MultiTaskStep = step.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    return placed


def check_model(step: MultiTaskStep, height: int, width: int, samples: int = 2) -> None:
    """Try the model on the shape of the data, without arithmetic, before the training starts.

    ``samples`` is the number of samples over which a batch norm normalises in training. Raises InputError if the model
    does not take images of that size, if it does not return what each task needs, or if a batch norm would see only one
    value. An InputError of the model itself is raised unchanged.
    """
    model: nn.Module = copy.deepcopy(step.model).to("meta").eval()
    outputs = model(torch.empty(2, 3, height, width, device="meta"))
    for task in step.tasks:
        if task.name not in outputs:
            raise InputError(f"the model has no output for task '{task.name}', only for: {', '.join(outputs)}")
        shape, expected = tuple(outputs[task.name].shape), (2, task.channels, height, width)
        if shape != expected:
            raise InputError(f"the model's output for task '{task.name}' has shape {shape} instead of {expected}")

    if samples == 1:
        _check_batch_norm(model, height, width)


def _check_batch_norm(model: nn.Module, height: int, width: int) -> None:
    """Raise InputError if a batch norm would normalise a single value. ``model`` has no memory (meta device)."""
    try:
        model.train()(torch.empty(1, 3, height, width, device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"images of {height}x{width} are 1x1 within the network, and there is 1 sample in a batch (batch_size / "
            "optim.accumulate, per process): batch norm cannot normalise a single value; use a larger batch_size, or "
            "prepare larger images"
        ) from None


def share_valid_counts(batches: Sequence[Batch], tasks: Sequence[Task]) -> None:
    """Put the mean number of valid pixels, over all ranks and micro-batches of an optimiser step, into each
    micro-batch.

    Each loss is divided by this mean instead of its own count. The averaged gradient is then the gradient of one mean
    over all valid pixels of the step, for any split over ranks and micro-batches. It costs one all-reduce of a few
    numbers.
    """
    counts = torch.stack([torch.stack([t.valid(b[t.name]) for b in batches]).sum() for t in tasks]).double()
    parts = len(batches) * distributed.world_size()
    means = (distributed.all_reduce_sum(counts).clamp(min=1) / parts).float()
    for batch in batches:
        for i, task in enumerate(tasks):
            batch[f"valid/{task.name}"] = means[i]


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``, and 0 with a zero gradient where nothing was valid."""
    return total / count.clamp(min=1)
