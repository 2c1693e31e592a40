"""The figures, as arrays uint8 (height, width, 3): predictions, metrics of weighting schemes, attention masks."""

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

from mtunet_dist.core.step import Batch, MultiTaskStep
from mtunet_dist.data.order import EvalOrder
from mtunet_dist.data.splits import Split
from mtunet_dist.data.torch_loader import TorchLoader
from mtunet_dist.reproduction.experiments import SYSTEMS
from mtunet_dist.reproduction.trainings import Training
from mtunet_dist.runs import checkpoint, pictures
from mtunet_dist.runs.loading import load_step
from mtunet_dist.tasks._colors import turbo

SHOWN = 4  # samples
MASKED = 2  # samples of which the masks of all blocks are shown
LEAST_WIDTH = 200  # pixels of a tile
CPU = torch.device("cpu")  # a handful of images
SIZE_INCHES, DPI = (12.0, 8.0), 110
METRICS = {
    "accuracy": "IoU (pixel accuracy)",
    "miou": "mIoU",
    "depth_abs": "depth, absolute",
    "depth_rel": "depth, relative",
}
Draw = Callable[[Sequence[Training], Split], np.ndarray]
Points = dict[float, list[float]]  # epoch -> a value per seed


@torch.no_grad()
def qualitative(trainings: Sequence[Training], split: Split) -> np.ndarray:
    """Samples spread over ``split``, with two rows each: image, truth and the prediction of each system."""
    batch = _samples(split, SHOWN)
    predicted: dict[str, dict[str, Tensor]] = {}  # system -> task -> output
    for training in trainings:
        step = _load(training)
        each = [step.predict(image[None]) for image in batch["image"]]  # one by one, to save memory
        predicted[training.row.system] = {name: torch.cat([outputs[name] for outputs in each]) for name in each[0]}
    rows = []
    for i in range(len(batch["image"])):
        for task in step.tasks:
            of_task = {SYSTEMS[system].title: outputs[task.name][i] for system, outputs in predicted.items()}
            image = {"image": batch["image"][i].permute(1, 2, 0).numpy()}
            rows.append(pictures.row(_enlarged(image | task.tiles(batch[task.name][i], of_task))))
    return np.concatenate([*rows, *pictures.legends(step.tasks, rows[0].shape[1])])


@torch.no_grad()
def attention(trainings: Sequence[Training], split: Split) -> np.ndarray:
    """Samples spread over ``split``: the image and the mask of the first decoder block of each task, then, for some
    samples, the masks of all blocks. A mask is shown as its mean over channels, stretched over the range in its
    caption."""
    step, batch = _load(trainings[0]), _samples(split, SHOWN)
    first, all_blocks = [], []
    for number, image in enumerate(batch["image"]):
        masks = step.predict_with_masks(image[None])[1]
        picture, size = image.permute(1, 2, 0).numpy(), image.shape[-2:]
        tiles = {"image": picture}
        for task, of_task in masks.items():
            tiles |= _mask_tile(f"{task}, block 1", of_task[0][0], size)
        first.append(pictures.row(_enlarged(tiles)))
        for task, of_task in masks.items() if number < MASKED else ():
            tiles = {f"image ({task})": picture}
            for block, mask in enumerate(of_task, start=1):
                tiles |= _mask_tile(f"block {block}", mask[0], size)
            all_blocks.append(pictures.row(_enlarged(tiles)))
    return _stacked([*first, *all_blocks])


def weights(trainings: Sequence[Training], split: Split) -> np.ndarray:
    """The metrics on ``split`` of each weighting scheme after training, with a dot per seed and a bar at their mean.
    Also the share of depth in the loss weights over the epochs: means over seeds, with the range from least to
    greatest."""
    systems = list(dict.fromkeys(t.row.system for t in trainings))
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1.3))
    for number, (metric, title) in enumerate(METRICS.items()):
        axes = figure.add_subplot(grid[divmod(number, 2)])
        for place, system in enumerate(systems):
            measured = [t.metrics or {} for t in trainings if t.row.system == system]
            of_runs = [metrics[metric] for metrics in measured if metric in metrics]
            axes.plot([place] * len(of_runs), of_runs, "o", color=f"C{place}", markersize=5)
            if of_runs:
                axes.plot([place], [statistics.fmean(of_runs)], "_", color=f"C{place}", markersize=28)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(systems)), [_scheme(system) for system in systems])
        axes.tick_params(axis="x", labelsize=7)
        axes.set_xlim(-0.5, len(systems) - 0.5)
        axes.grid(alpha=0.3)
    share = figure.add_subplot(grid[:, 2])
    for place, system in enumerate(systems):
        runs = [t for t in trainings if t.row.system == system]
        points = _share(_weights(runs, "depth"), _weights(runs, "segmentation"))
        _plot(share, points, f"C{place}", SYSTEMS[system].title)
    share.set(ylim=(0, 1), xlabel="epochs done", title="depth's share of the loss weights")
    share.grid(alpha=0.3)
    share.legend(fontsize=8)
    unit = split.targets["depth"].unit_text
    figure.suptitle(f"{'+'.join(split.names)}; depth errors in {unit}", fontsize=10)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _load(training: Training) -> MultiTaskStep:
    file = training.dir / "checkpoints" / "best.pt" if training.protocol == "best" else training.checkpoint
    checkpoint.check(file)
    return load_step(checkpoint.load(file), training.config, CPU)


def _samples(split: Split, most: int) -> Batch:
    """At most ``most`` samples, evenly spaced over ``split``."""
    loader = TorchLoader(split, EvalOrder(len(split), batch_size=1), CPU)
    kept = [next(loader.batches(start=i)) for i in split.spread(most)]
    return {key: torch.cat([batch[key] for batch in kept]) for key in kept[0]}


def _enlarged(tiles: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Enlarge small tiles by repeated pixels, so that their captions fit."""
    return {name: t.repeat(n := -(-LEAST_WIDTH // t.shape[1]), axis=0).repeat(n, axis=1) for name, t in tiles.items()}


def _scheme(system: str) -> str:
    title = SYSTEMS[system].title.removeprefix("MT-UNet").strip(", ") or "eq. 5"
    return title.replace(", ", "\n").replace(" (", "\n(")


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of pictures of several widths, one below the other, on white."""
    width = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in rows])


def _mask_tile(name: str, mask: Tensor, size: Sequence[int]) -> dict[str, np.ndarray]:
    mean = mask.float().mean(0)
    low, high = mean.min().item(), mean.max().item()
    stretched = (mean - low) / max(high - low, 1e-6)
    tile = F.interpolate(stretched[None, None], size=tuple(size), mode="nearest-exact")[0, 0]
    return {f"{name}: {low:.2f}..{high:.2f}": turbo(tile.numpy())}


def _weights(runs: Sequence[Training], task: str) -> Points:
    """The weight after each epoch, which is the weight of the next epoch."""
    points: Points = {}
    for run in runs:
        whole = run.records("train", **{f"weight/{name}": float for name in run.config.tasks})  # with all weights
        of_run = {r["epoch"]: r[f"weight/{task}"] for r in whole}
        for epoch, value in of_run.items():
            if float(epoch).is_integer():
                points.setdefault(epoch, []).append(value)
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
