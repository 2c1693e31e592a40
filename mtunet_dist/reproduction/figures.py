"""The figures, as arrays uint8 (height, width, 3): predictions, loss weights over the epochs, attention masks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from mtunet_dist import checkpoint, pictures
from mtunet_dist.data.order import EvalOrder
from mtunet_dist.data.splits import Split
from mtunet_dist.data.torch_loader import TorchLoader
from mtunet_dist.evaluate import load_step
from mtunet_dist.multitask import Batch, Depth, MultiTaskStep, Segmentation, Task
from mtunet_dist.reproduction.experiments import SYSTEMS
from mtunet_dist.reproduction.trainings import Training

SHOWN = 4  # samples
MASKED = 2  # samples whose masks are shown
CPU = torch.device("cpu")  # a handful of images
SIZE_INCHES, DPI = (12.0, 8.5), 110
Draw = Callable[[Sequence[Training], Split], np.ndarray]
Points = dict[float, list[float]]  # epoch -> a value per seed


@torch.no_grad()
def qualitative(trainings: Sequence[Training], split: Split) -> np.ndarray:
    """Samples spread over ``split``, two rows for each: image, truth and what each system predicts."""
    batch = _samples(split, SHOWN)
    predicted: dict[str, dict[str, Tensor]] = {}  # system -> task -> output
    for training in trainings:
        step = _load(training)
        each = [step.predict(image[None]) for image in batch["image"]]  # one by one: full width needs memory
        predicted[training.system] = {name: torch.cat([outputs[name] for outputs in each]) for name in each[0]}
    rows = []
    for i in range(len(batch["image"])):
        for task in step.tasks:
            of_task = {SYSTEMS[system].title: outputs[task.name][i] for system, outputs in predicted.items()}
            image = {"image": batch["image"][i].permute(1, 2, 0).numpy()}
            rows.append(pictures.row(image | _tiles(task, batch[task.name][i], of_task)))
    legends = [pictures.class_legend(t, rows[0].shape[1]) for t in step.tasks if isinstance(t, Segmentation)]
    return np.concatenate([*rows, *legends])


def _tiles(task: Task, target: Tensor, outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The truth, and the ``outputs`` (channels, H, W) by caption; depths all in the colours of the truth's range."""
    if isinstance(task, Segmentation):
        palette = [c.color for c in task.classes]
        labels = {"truth": target} | {name: output.argmax(0) for name, output in outputs.items()}
        return {name: pictures.label_colors(label.numpy(), palette) for name, label in labels.items()}
    assert isinstance(task, Depth)
    truth = target[0].numpy()
    low, high = np.percentile(truth[truth > 0], (2, 98)) if (truth > 0).any() else (1.0, 1.0)
    depths = {f"truth {low:.3g}..{high:.3g} {task.info.unit}": truth}
    depths |= {name: np.maximum(output[0].numpy(), 1e-6) for name, output in outputs.items()}
    return {name: pictures.depth_colors(depth, low, high) for name, depth in depths.items()}


@torch.no_grad()
def attention(trainings: Sequence[Training], split: Split) -> np.ndarray:
    """For each of some samples and each task, the mask of each decoder block: the mean over channels, each stretched
    over the range that its caption gives."""
    step, batch = _load(trainings[0]), _samples(split, MASKED)
    rows = []
    for image in batch["image"]:
        masks = step.predict_with_masks(image[None])[1]
        for task, of_task in masks.items():
            tiles = {f"image ({task})": image.permute(1, 2, 0).numpy()}
            for block, mask in enumerate(of_task, start=1):
                tiles |= _mask_tile(f"block {block}", mask[0], image.shape[-2:])
            rows.append(pictures.row(tiles))
    return np.concatenate(rows)


def weights(trainings: Sequence[Training], split: Split) -> np.ndarray:
    """Loss weights, and the metrics on ``split``, over the epochs of each weighting; means over seeds, with the range
    from the least to the greatest."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    (loss_weights, share), (miou, depth) = figure.subplots(2, 2)
    for number, system in enumerate(dict.fromkeys(t.system for t in trainings)):
        runs = [t for t in trainings if t.system == system]
        color, title = f"C{number}", SYSTEMS[system].title
        by_task = {task: _weights(runs, task) for task in ("segmentation", "depth")}
        _plot(loss_weights, by_task["segmentation"], color, title)
        _plot(loss_weights, by_task["depth"], color, None, style="--")
        _plot(share, _share(by_task["segmentation"], by_task["depth"]), color, title)
        _plot(miou, _evaluations(runs, "miou"), color, title)
        _plot(depth, _evaluations(runs, "depth_abs"), color, title)
    part = "+".join(split.names)
    unit = "m" if split.info.depth.unit == "metre" else "no unit"
    loss_weights.set(ylabel="loss weight: segmentation —, depth - -")
    share.set(ylim=(0, 1), ylabel="segmentation's share of the weights")
    miou.set(ylabel=f"mIoU on {part}")
    depth.set(ylabel=f"depth error on {part} ({unit})")
    for axes in (loss_weights, share, miou, depth):
        axes.set_xlabel("epochs done")
        axes.grid(alpha=0.3)
    share.legend(fontsize=8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _load(training: Training) -> MultiTaskStep:
    checkpoint.check(training.checkpoint)
    return load_step(checkpoint.load(training.checkpoint), training.config, CPU)


def _samples(split: Split, most: int) -> Batch:
    """At most ``most`` samples, evenly spaced over ``split``."""
    loader = TorchLoader(split, EvalOrder(len(split), batch_size=1), CPU)
    kept = [next(loader.batches(start=i)) for i in split.spread(most)]
    return {key: torch.cat([batch[key] for batch in kept]) for key in kept[0]}


def _mask_tile(name: str, mask: Tensor, size: Sequence[int]) -> dict[str, np.ndarray]:
    mean = mask.float().mean(0)
    low, high = mean.min().item(), mean.max().item()
    stretched = (mean - low) / max(high - low, 1e-6)
    tile = F.interpolate(stretched[None, None], size=tuple(size), mode="nearest-exact")[0, 0]
    return {f"{name}: {low:.2f}..{high:.2f}": pictures.turbo(tile.numpy())}


def _weights(runs: Sequence[Training], task: str) -> Points:
    """The weight after each epoch, which is that of the next."""
    points: Points = {}
    for run in runs:
        whole = run.records("train", **{f"weight/{name}": float for name in run.config.tasks})  # of all tasks alike
        of_run = {r["epoch"]: r[f"weight/{task}"] for r in whole}
        for epoch, value in of_run.items():
            if float(epoch).is_integer():
                points.setdefault(epoch, []).append(value)
    return points


def _evaluations(runs: Sequence[Training], metric: str) -> Points:
    points: Points = {}
    for run in runs:
        for record in run.records("eval", **{metric: float}):
            points.setdefault(record["epoch"], []).append(record[metric])
    return points


def _share(mine: Points, other: Points) -> Points:
    return {e: [a / (a + b) for a, b in zip(mine[e], other[e], strict=True)] for e in mine}


def _plot(axes: Axes, points: Points, color: str, title: str | None, style: str = "-") -> None:
    epochs = sorted(points)
    means = [statistics.fmean(points[e]) for e in epochs]
    axes.plot(epochs, means, style, color=color, label=title, marker="o" if len(epochs) < 20 else None, markersize=4)
    axes.fill_between(
        epochs, [min(points[e]) for e in epochs], [max(points[e]) for e in epochs], color=color, alpha=0.15
    )


FIGURES: dict[str, Draw] = {"figure3": qualitative, "figure4": weights, "figure5": attention}
