"""Which tasks a dataset has targets for. A task without any target would be trained in vain and without a message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mtunet_dist.data.info import DatasetInfo, SplitInfo
from mtunet_dist.errors import InputError

WHAT = {"segmentation": "labelled pixel", "depth": "valid depth"}  # the kind of pixel that a task learns from


def target_pixels(splits: Iterable[SplitInfo]) -> dict[str, int]:
    """The number of pixels in ``splits`` that have a target, by task."""
    splits = list(splits)
    return {
        "segmentation": sum(sum(split.class_pixels) for split in splits),
        "depth": sum(split.valid_depth_pixels for split in splits),
    }


def check_targets(info: DatasetInfo, train: str, tasks: Sequence[str]) -> None:
    """Raise InputError if one of ``tasks`` has no target in the split ``train`` (or several: ``train+val``)."""
    pixels = target_pixels(info.splits[name] for name in train.split("+"))
    without = [task for task in tasks if not pixels[task]]
    if without:
        raise InputError(f"task '{without[0]}': {_nothing(train, without[0])}; {_remedy(pixels)}")


def unjudged(info: DatasetInfo, split: str, tasks: Sequence[str]) -> list[str]:
    """One line for each of ``tasks`` that an evaluation on ``split`` (or several: ``val+test``) cannot measure."""
    pixels = target_pixels(info.splits[name] for name in split.split("+"))
    return [f"{_nothing(split, task)}: the metrics of '{task}' are not known" for task in tasks if not pixels[task]]


def warnings(info: DatasetInfo) -> list[str]:
    """One line for each split and task of a new prepared dataset that has no target for the task."""
    lines = []
    for name, split in info.splits.items():
        pixels = target_pixels([split])
        lines += [f"{_nothing(name, task)}; {_remedy(pixels)}" for task in pixels if not pixels[task]]
    return lines


def _nothing(split: str, task: str) -> str:
    return f"the split '{split}' has no {WHAT[task]}"


def _remedy(pixels: dict[str, int]) -> str:
    left = [task for task, count in pixels.items() if count]
    if not left:
        return "nothing can be learned from it"
    return f"train the other task alone with tasks=[{left[0]}]"
