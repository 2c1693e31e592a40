"""Which tasks a dataset has targets for. A task without any target would be trained in vain and without a message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mtunet_dist.data.info import DatasetInfo
from mtunet_dist.errors import InputError


def target_pixels(info: DatasetInfo, splits: Iterable[str]) -> dict[str, int]:
    """The number of pixels in ``splits`` that have a target, by task."""
    found = [info.splits[name].targets for name in splits]
    return {task: sum(counts[task]["valid"] for counts in found) for task in info.targets}


def check_targets(info: DatasetInfo, train: str, tasks: Sequence[str]) -> None:
    """Raise InputError if the dataset does not know one of ``tasks``, or if one has no target in the split ``train``
    (or several: ``train+val``)."""
    info.tasks(tasks)
    pixels = target_pixels(info, train.split("+"))
    without = [task for task in tasks if not pixels[task]]
    if without:
        raise InputError(f"task '{without[0]}': {_nothing(info, train, without[0])}; {_remedy(pixels)}")


def unjudged(info: DatasetInfo, split: str, tasks: Sequence[str]) -> list[str]:
    """One line for each of ``tasks`` that an evaluation on ``split`` (or several: ``val+test``) cannot measure."""
    pixels = target_pixels(info, split.split("+"))
    return [
        f"{_nothing(info, split, task)}: the metrics of '{task}' are not known" for task in tasks if not pixels[task]
    ]


def warnings(info: DatasetInfo) -> list[str]:
    """One line for each split and task of a new prepared dataset that has no target for the task."""
    lines = []
    for name in info.splits:
        pixels = target_pixels(info, [name])
        lines += [f"{_nothing(info, name, task)}; {_remedy(pixels)}" for task in pixels if not pixels[task]]
    return lines


def _nothing(info: DatasetInfo, split: str, task: str) -> str:
    return f"the split '{split}' has no pixel with a {info.targets[task].part}"


def _remedy(pixels: dict[str, int]) -> str:
    left = [task for task, count in pixels.items() if count]
    if not left:
        return "nothing can be learned from it"
    return f"train without it: tasks=[{','.join(left)}]"
