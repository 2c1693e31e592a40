"""Samples/s of loading alone, and of loading and training together, side by side in one process.

    python benchmarks/throughput.py data/streets device=cuda batch_size=64 precision=bf16

Variants take turns for ``--rounds`` rounds, so that a machine that drifts slows them all; the table gives the median
and its ratio to the first variant of each part. ``key=value`` words change the config (default: full-width MT-UNet).
Steps alone are for ``step.py``. On a GPU, ``dali`` decodes JPEGs on the device, and the table also says how far its
pixels are from the CPU's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mtunet_dist import distributed
from mtunet_dist.config import Config, load_config
from mtunet_dist.core.step import Batch
from mtunet_dist.data.loader import make_loader
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.system.command import command
from steps import training
from turns import Work, about, take_turns


def loading(config: Config, loader: str, device: torch.device) -> Iterator[Batch]:
    """Endless batches of the training split through ``loader``."""
    dataset = PreparedDataset(Path(config.data.root))
    split = dataset.split(config.data.train)
    order = TrainOrder(len(split), batch_size=config.batch_size, seed=config.seed)
    data: Any = {"loader": loader}
    return make_loader(replace(config.data, **data), split, order, device).batches()


def variants(config: Config, device: torch.device) -> dict[tuple[str, str], Work]:
    """The work to time: part of the table and variant -> one batch of it."""
    info = PreparedDataset(Path(config.data.root)).info
    train_on = training(config, device, info.tasks(config.tasks))
    loaders = {name: loading(config, name, device) for name in ("dali", "torch")}
    alone: dict[tuple[str, str], Work] = {("loading", name): partial(next, it) for name, it in loaders.items()}
    return alone | {
        ("loading and step", name): partial(_load_and_train, train_on, batches) for name, batches in loaders.items()
    }


def _load_and_train(train_on: Callable[[Batch], None], batches: Iterator[Batch]) -> None:
    train_on(next(batches))


def seconds(work: Work, batches: int, device: torch.device) -> float:
    """Wall time of ``batches`` batches, finished on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(batches):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def decode_difference(config: Config, device: torch.device) -> tuple[int, float]:
    """Largest and mean difference in RGB levels between DALI's pixels on ``device`` and PIL's."""
    batch = next(loading(config, "dali", device))
    split = PreparedDataset(Path(config.data.root)).split(config.data.train)
    expected = torch.stack([torch.from_numpy(split.decode(i).rgb.copy()) for i in batch["sample"].tolist()])
    difference = (batch["image"].cpu().permute(0, 2, 3, 1).int() - expected.int()).abs()
    return int(difference.max()), difference.float().mean().item()


@command
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="DATASET", help="a prepared dataset")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--batches", type=int, default=10, metavar="N", help="timed batches per variant and round")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, [f"run_dir={folder}", f"data.root={args.root}", *args.overrides])
    device = distributed.pick_device(config.device)
    works = {key: partial(seconds, work, args.batches, device) for key, work in variants(config, device).items()}
    times = {key: statistics.median(found) for key, found in take_turns(works, args.rounds).items()}
    table = Table(title=f"batch {config.batch_size}, {args.rounds} rounds of {args.batches} batches")
    for column in ("part", "variant", "samples/s", "ratio"):
        table.add_column(column, justify="right" if column in ("samples/s", "ratio") else "left")
    for (part, name), median in times.items():
        first = next(found for (of, _), found in times.items() if of == part)
        table.add_row(part, name, f"{args.batches * config.batch_size / median:.1f}", f"{first / median:.2f}")
    console = Console()
    console.print(about("throughput.py"), markup=False, soft_wrap=True)
    console.print(table)
    largest, mean = decode_difference(config, device)
    console.print(f"RGB of DALI on {device.type} against PIL: largest difference {largest} levels, mean {mean:.4f}")


if __name__ == "__main__":
    main()
