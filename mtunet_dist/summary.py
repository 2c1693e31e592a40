"""What is in a prepared dataset: ``python -m mtunet_dist.summary DATASET`` prints it and draws it.

The picture has the share of each class, how depth is distributed, and samples, one row per split.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import track

from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.report import table
from mtunet_dist.data.splits import Split
from mtunet_dist.errors import InputError
from mtunet_dist.runs import pictures
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command

DEPTH_SAMPLES = 500  # samples of each split for the histogram
SHOWN = 4  # samples of each split in the picture
BINS = 60
WIDTH_INCHES, DPI = 12.0, 110


def depth_histogram(split: Split) -> np.ndarray:
    """Counts int64 (65536,) of the stored depths over at most ``DEPTH_SAMPLES`` samples. Entry 0 counts invalid
    pixels."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for i in track(split.spread(DEPTH_SAMPLES), description=f"depth of {'+'.join(split.names)}", transient=True):
        counts += np.bincount(split.decode(i).depth.reshape(-1), minlength=1 << 16)
    return counts


def sample_sheet(dataset: PreparedDataset) -> np.ndarray:
    """Image, label and depth of ``SHOWN`` samples spread over each split, uint8 (height, width, 3)."""
    info = dataset.info
    palette = [c.color for c in info.classes]
    top = max(split.depth_max for split in info.splits.values())
    low = min((s.depth_min for s in info.splits.values() if s.valid_depth_pixels), default=top)
    rows = []
    for name, described in info.splits.items():
        split = dataset.split(name)
        samples = [(i, split.decode(i)) for i in split.spread(min(SHOWN, described.count))]
        blank = np.full((info.height, info.width, 3), 255, dtype=np.uint8)
        for part in ("rgb", "label", "depth"):
            tiles = {}
            for i, raw in samples:
                if part == "rgb":
                    tiles[f"{name}: {split.keys[i]}"] = raw.rgb
                elif part == "label":
                    tiles[f"label {i}"] = pictures.label_colors(raw.label, palette)
                else:
                    depth = raw.depth * info.depth.scale
                    tiles[f"depth {i}"] = pictures.depth_colors(depth, max(low, info.depth.scale), top)
            tiles |= {" " * n: blank for n in range(1, SHOWN - len(tiles) + 1)}
            rows.append(pictures.row(tiles))
    return np.concatenate(rows)


def draw(dataset: PreparedDataset) -> np.ndarray:
    """The picture, uint8 (height, width, 3)."""
    sheet = sample_sheet(dataset)
    figure = Figure(figsize=(WIDTH_INCHES, 4.2), dpi=DPI, layout="constrained")
    classes, depth = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_classes(classes, dataset)
    _draw_depth(depth, dataset)
    figure.suptitle(f"{dataset.root}: {dataset.info.width} wide, {dataset.info.height} high", parse_math=False)
    charts = _pixels(figure)
    height = round(sheet.shape[0] * charts.shape[1] / sheet.shape[1])
    resized = Image.fromarray(sheet).resize((charts.shape[1], height), Image.Resampling.LANCZOS)
    return np.concatenate([charts, np.asarray(resized)])


def _draw_classes(axes: Axes, dataset: PreparedDataset) -> None:
    info = dataset.info
    names = [*(c.name for c in info.classes), "void"]
    bar = 0.8 / len(info.splits)
    for n, (name, split) in enumerate(info.splits.items()):
        pixels = np.array([*split.class_pixels, split.void_pixels])
        share = 100 * pixels / (split.count * info.height * info.width)
        axes.bar(np.arange(len(names)) + n * bar, share, bar, align="edge", label=f"{name} ({split.count} samples)")
    axes.set_xticks(np.arange(len(names)) + 0.4, names, rotation=60, ha="right", fontsize=8, parse_math=False)
    axes.set_ylabel("share of all pixels (%)")
    axes.legend(fontsize=8)


def _draw_depth(axes: Axes, dataset: PreparedDataset) -> None:
    info = dataset.info
    top = max(split.depth_max for split in info.splits.values())
    for name in info.splits:
        counts = depth_histogram(dataset.split(name))
        stored = np.flatnonzero(counts[1:]) + 1
        if len(stored):
            values = stored * info.depth.scale
            axes.hist(
                values, bins=BINS, range=(0, top), weights=counts[stored], density=True, histtype="step", label=name
            )
    axes.set_xlabel("depth (m)" if info.depth.unit == "metre" else f"{info.depth.kind} depth (no unit)")
    axes.set_ylabel("density of the valid pixels")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _pixels(figure: Figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@command
def main() -> None:
    """The command line."""
    parser = arguments.parser("summary", __doc__)
    parser.add_argument("dataset", type=arguments.path, metavar="DATASET", help="a folder that prepare has written")
    parser.add_argument(
        "--out", type=arguments.file(".png"), metavar="FILE.png", help="the picture (default: DATASET/summary.png)"
    )
    args = parser.parse_args()
    out: Path = args.out or args.dataset / "summary.png"
    dataset = PreparedDataset(args.dataset)
    if not out.parent.is_dir():
        raise InputError(f"--out={out} must lie in a folder that exists")
    Console().print(table(dataset))
    Image.fromarray(draw(dataset)).save(out)
    print(f"picture: {out}")


if __name__ == "__main__":
    main()
