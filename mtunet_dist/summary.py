"""What is in a prepared dataset: ``python -m mtunet_dist.summary DATASET`` prints it and draws it.

The picture has how each target is distributed, such as the share of each class, and samples of each split.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from mtunet_dist.data.info import DatasetInfo
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.report import table
from mtunet_dist.errors import InputError
from mtunet_dist.runs import pictures
from mtunet_dist.runs.baselines import tally
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command

SAMPLES = 500  # of each split, for the distributions of targets
SHOWN = 4  # samples of each split in the picture
WIDTH_INCHES, DPI = 12.0, 110


def sample_sheet(dataset: PreparedDataset) -> np.ndarray:
    """Images and targets of ``SHOWN`` samples spread over each split, uint8 (height, width, 3)."""
    info = dataset.info
    rows = []
    for name, described in info.splits.items():
        split = dataset.split(name)
        samples = [(i, split.decode(i)) for i in split.spread(min(SHOWN, described.count))]
        rows.append(_row(info, {f"{name}: {split.keys[i]}": raw.rgb for i, raw in samples}))
        for task in info.targets.values():
            counts = [other.targets[task.name] for other in info.splits.values()]
            tiles = {f"{task.part} {i}": task.stored_tile(raw.targets[task.name], counts) for i, raw in samples}
            rows.append(_row(info, tiles))
    return np.concatenate(rows)


def _row(info: DatasetInfo, tiles: dict[str, np.ndarray]) -> np.ndarray:
    """A row of ``SHOWN`` tiles, some of them white if there are fewer."""
    white = np.full((info.height, info.width, 3), 255, dtype=np.uint8)
    return pictures.row(tiles | {" " * n: white for n in range(1, SHOWN - len(tiles) + 1)})


def draw(dataset: PreparedDataset) -> np.ndarray:
    """The picture, uint8 (height, width, 3)."""
    info, sheet = dataset.info, sample_sheet(dataset)
    tasks = list(info.targets.values())
    tallies = {}
    for name in info.splits:
        with Console().status(f"counting {name}"):
            tallies[name] = tally(tasks, dataset.split(name), SAMPLES)
    figure = Figure(figsize=(WIDTH_INCHES, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for task, place in zip(tasks, axes, strict=True):
        splits = {
            f"{name} ({split.count} samples)": (split.targets[task.name], tallies[name][task.name])
            for name, split in info.splits.items()
        }
        task.chart(place, splits)
    figure.suptitle(f"{dataset.root}: {info.width} wide, {info.height} high", parse_math=False)
    charts = _pixels(figure)
    height = round(sheet.shape[0] * charts.shape[1] / sheet.shape[1])
    resized = Image.fromarray(sheet).resize((charts.shape[1], height), Image.Resampling.LANCZOS)
    return np.concatenate([charts, np.asarray(resized)])


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
