"""Images/s, CPU seconds and memory of loading, ours and others', from the same images.

    pip install --constraint constraints.txt --editable '.[bench]'
    python -m mtunet_dist.prepare nyuv2_mat PATH/TO/nyu_depth_v2_labeled.mat data/nyuv2
    python benchmarks/loader.py data/nyuv2 --out benchmarks/results/loader_cpu

Every loader gives batches of uint8 images, uint8 labels and float32 depths, shuffled, without augmentation unless its
name says so. Others read the same images as single files (the JPEGs of the shards, targets as PNG as published, or as
npy like ours), the same shards (webdataset), or arrays as MTAN stores them. Each runs in a process of its own, one at a
time, for ``--seconds``; they take turns for ``--rounds`` rounds. CPU seconds are of all its processes; memory is the
largest sum of their proportional set sizes (PSS), shared pages split among those that share them. Writes OUT.md,
OUT.csv and OUT.png.
"""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import webdataset
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from mtunet_dist import distributed
from mtunet_dist.config import AugmentConfig, Config, load_config
from mtunet_dist.data.loader import make_augmentation, make_loader
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.splits import ShardSplit
from mtunet_dist.prepare import prepare
from mtunet_dist.runs.provenance import environment
from mtunet_dist.system.command import command
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.segmentation import VOID

Item = tuple[np.ndarray, np.ndarray, np.ndarray]
CLOCK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Setting:
    """What every variant is given."""

    config: Config
    files: Path  # rgb/i.jpg, {label,depth}/i.{png,npy}: the training split as single files
    npy: Path  # {image,label,depth}/i.npy, as MTAN's
    scale: float  # of stored depth
    lossless: Path | None  # the same dataset prepared with PNG images, if its source is still there


def ours(setting: Setting, *, root: Path | None = None, scales: tuple[float, ...] = (1.0,), **changes: Any) -> Any:
    """Our loader of the training split."""
    config = setting.config
    dataset = PreparedDataset(root or Path(config.data.root))
    split, info = dataset.split(config.data.train), dataset.info
    augmentation = make_augmentation(AugmentConfig(flip=scales != (1.0,), scales=scales), info, config.seed)
    device = distributed.pick_device(config.device)
    order = TrainOrder(len(split), batch_size=config.batch_size, seed=config.seed)
    return make_loader(replace(config.data, **changes), split, order, device, augmentation).batches()


def with_opencv(data: bytes) -> np.ndarray:
    """An image, colours as BGR."""
    image: np.ndarray | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    return image


def with_pil(data: bytes) -> np.ndarray:
    """An image, colours as RGB."""
    return np.array(Image.open(io.BytesIO(data)))


def as_item(rgb: np.ndarray, label: np.ndarray, depth: np.ndarray, scale: float) -> Item:
    """What every loader makes of a sample's pixels."""
    return rgb.transpose(2, 0, 1), label, depth.astype(np.float32)[None] * np.float32(scale)


class Files(Dataset[Item]):
    """Single files, images among them decoded with OpenCV or PIL."""

    def __init__(self, setting: Setting, *, opencv: bool, targets: str) -> None:
        self.folder, self.scale, self.opencv, self.targets = setting.files, setting.scale, opencv, targets
        self.count = sum(1 for _ in (self.folder / "rgb").iterdir())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Item:
        decode = with_opencv if self.opencv else with_pil
        rgb = decode((self.folder / "rgb" / f"{i}.jpg").read_bytes())
        paths = [self.folder / part / f"{i}.{self.targets}" for part in ("label", "depth")]
        label, depth = (np.load(p) if self.targets == "npy" else decode(p.read_bytes()) for p in paths)
        return as_item(cv2.cvtColor(rgb, cv2.COLOR_BGR2RGB) if self.opencv else rgb, label, depth, self.scale)


class Npy(Dataset[Item]):
    """Arrays as MTAN stores and reads them: float64 of images and depths, float64 labels with -1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = sum(1 for _ in (folder / "image").iterdir())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Item:
        image, label, depth = (np.load(self.folder / part / f"{i}.npy") for part in ("image", "label", "depth"))
        return np.moveaxis(image, -1, 0).astype(np.float32), label, np.moveaxis(depth, -1, 0).astype(np.float32)


def endless(loader: Any) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def dataloader(dataset: Dataset[Item], setting: Setting) -> Iterator[Any]:
    """torch's DataLoader with as many workers as ours has threads."""
    options: Any = {"shuffle": True, "drop_last": True, "persistent_workers": True}
    return endless(DataLoader(dataset, setting.config.batch_size, num_workers=setting.config.data.threads, **options))


@dataclass(frozen=True)
class Decode:
    """For webdataset's worker processes, which need something that pickles."""

    scale: float

    def __call__(self, sample: dict[str, bytes]) -> Item:
        rgb = cv2.cvtColor(with_opencv(sample["rgb.jpg"]), cv2.COLOR_BGR2RGB)
        label, depth = (np.load(io.BytesIO(sample[key])) for key in ("label.npy", "depth.npy"))
        return as_item(rgb, label, depth, self.scale)


def from_webdataset(setting: Setting) -> Iterator[Any]:
    """The webdataset library over our shards, decoding with OpenCV."""
    dataset = PreparedDataset(Path(setting.config.data.root))
    shards = [str(dataset.root / shard.file) for shard in dataset.split(setting.config.data.train).shards]
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(256)
    batches = samples.map(Decode(_depth(dataset).scale)).batched(setting.config.batch_size, partial=False).repeat()
    workers = min(setting.config.data.threads, len(shards))
    return iter(webdataset.WebLoader(batches, batch_size=None, num_workers=workers))


def _depth(dataset: PreparedDataset) -> Depth:
    """The task depth of the dataset."""
    task = dataset.info.targets["depth"]
    assert isinstance(task, Depth)
    return task


def variants(setting: Setting, device: torch.device) -> dict[str, Callable[[Setting], Iterator[Any]]]:
    """Name -> its batches."""
    augmented = (1.0, 1.2, 1.5)
    decoder = "DALI, mixed" if device.type == "cuda" else "DALI"
    found: dict[str, Callable[[Setting], Iterator[Any]]] = {
        f"ours: {decoder}": lambda s: ours(s, loader="dali"),
        f"ours: {decoder}, scale-crop and flip": lambda s: ours(s, loader="dali", scales=augmented),
        "ours: torch reference": lambda s: ours(s, loader="torch"),
        "ours: cache=host": lambda s: ours(s, cache="host"),
        "ours: cache=host, scale-crop and flip": lambda s: ours(s, cache="host", scales=augmented),
        "DataLoader + OpenCV, JPEG and PNG": lambda s: dataloader(Files(s, opencv=True, targets="png"), s),
        "DataLoader + PIL, JPEG and PNG": lambda s: dataloader(Files(s, opencv=False, targets="png"), s),
        "DataLoader + OpenCV, JPEG and npy": lambda s: dataloader(Files(s, opencv=True, targets="npy"), s),
        "DataLoader, npy as MTAN": lambda s: dataloader(Npy(s.npy), s),
        "webdataset + OpenCV, our shards": from_webdataset,
    }
    if setting.lossless:
        found[f"ours: {decoder}, shards of PNGs"] = lambda s: ours(s, loader="dali", root=s.lossless)
    if device.type == "cuda":
        found["ours: cache=device"] = lambda s: ours(s, cache="device")
        found["ours: cache=device, scale-crop and flip"] = lambda s: ours(s, cache="device", scales=augmented)
    return found


def write_files(config: Config, files: Path, npy: Path) -> None:
    """The training split as single files and as MTAN's arrays."""
    dataset = PreparedDataset(Path(config.data.root))
    split = dataset.split(config.data.train)
    assert isinstance(split, ShardSplit)
    depth = _depth(dataset)
    for folder in (
        *(files / part for part in ("rgb", "label", "depth")),
        *(npy / part for part in ("image", "label", "depth")),
    ):
        folder.mkdir(parents=True)
    for i in track(range(len(split)), description="writing the same images for the others", transient=True):
        (files / "rgb" / f"{i}.jpg").write_bytes(split.stored(i)["rgb"].tobytes())
        raw = split.decode(i)
        for part, pixels in (("label", raw.targets["segmentation"]), ("depth", raw.targets["depth"])):
            Image.fromarray(pixels).save(files / part / f"{i}.png")
            np.save(files / part / f"{i}.npy", pixels)
        np.save(npy / "image" / f"{i}.npy", raw.rgb / 255.0)
        label = raw.targets["segmentation"]
        np.save(npy / "label" / f"{i}.npy", np.where(label == VOID, -1.0, label))
        np.save(npy / "depth" / f"{i}.npy", raw.targets["depth"][..., None] * depth.scale)


def prepare_lossless(config: Config, out: Path) -> Path | None:
    """The same dataset with PNG images, or None if its source has gone."""
    there = PreparedDataset(Path(config.data.root)).info.settings
    if not Path(there.root).exists():
        return None
    prepare(
        there.source,
        there.root,
        out,
        height=there.height,
        width=there.width,
        rgb_format="png",
        target_format="png",
        workers=2,
        options=there.options,
    )
    return out


def usage() -> tuple[float, float]:
    """CPU seconds spent and MiB held (PSS) by the processes of this session, which the caller leads."""
    cpu, kib = 0.0, 0
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or os.getsid(int(entry.name)) != os.getpid():
                continue
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            rollup = (entry / "smaps_rollup").read_text()
        except OSError:
            continue  # it has just ended
        cpu += sum(map(int, fields[11:15])) / CLOCK  # its own, and of children it has waited for
        kib += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return cpu, kib / 1024


def measure(name: str, setting: Setting, seconds: float, results: Any) -> None:
    """In a process of its own: batches, seconds, CPU seconds and peak MiB, over ``seconds`` after a warm-up."""
    os.setsid()
    torch.set_num_threads(1)  # as torchrun has it
    device = distributed.pick_device(setting.config.device)
    iterator = variants(setting, device)[name](setting)
    split = PreparedDataset(Path(setting.config.data.root)).split(setting.config.data.train)
    for _ in range(len(split) // setting.config.batch_size):  # an epoch: every file has been read once
        next(iterator)
    if device.type == "cuda":
        torch.cuda.synchronize()
    cpu, memory = usage()
    start = time.perf_counter()
    batches = 0
    while time.perf_counter() - start < seconds:
        next(iterator)
        batches += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    after, held = usage()
    results.put((batches, elapsed, after - cpu, max(memory, held)))
    results.close()
    results.join_thread()
    os._exit(0)  # endless loaders have no end to wait for


def run(setting: Setting, names: list[str], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Name -> medians over rounds of images/s, CPU seconds per 1000 images, MiB."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    turns = [(n, name) for n in range(rounds) for name in names]
    for _, name in track(turns, description="measuring", transient=True):
        results = context.Queue()
        process = context.Process(target=measure, args=(name, setting, seconds, results))
        process.start()
        while process.is_alive() and results.empty():
            process.join(0.2)
        if results.empty():
            sys.exit(f"error: '{name}' ended without a result, exit code {process.exitcode}")
        batches, elapsed, cpu, memory = results.get()
        images = batches * setting.config.batch_size
        found[name].append((images / elapsed, cpu / images * 1000, memory))
        process.join()
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}


def write(out: Path, table: dict[str, list[float]], title: str) -> str:
    """OUT.csv, OUT.png and OUT.md; returns the Markdown."""
    others = [row for name, row in table.items() if name.startswith("DataLoader + ")]
    reference = min(row[1] for row in others)
    rows = [
        (name, f"{rate:.0f}", f"{cpu:.3f}", f"{reference / cpu:.2f}", f"{memory:.0f}")
        for name, (rate, cpu, memory) in table.items()
    ]
    header = (
        "loader",
        "images/s",
        "CPU s per 1000 images",
        "images per CPU s, against the best DataLoader + decoder",
        "memory (MiB)",
    )
    lines = [f"| {' | '.join(row)} |" for row in (header, ("---", *["---:"] * 4), *rows)]
    markdown = f"{title}\n\n" + "\n".join(lines) + "\n"
    out.with_suffix(".md").write_text(markdown, encoding="utf-8")
    with out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    figure = Figure(figsize=(10, 0.4 * len(table) + 1), layout="constrained")
    axes = figure.subplots()
    names = list(table)[::-1]
    colors = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
    axes.barh(names, [1000 / table[name][1] for name in names], color=colors)
    axes.set_xlabel("images per CPU second")
    figure.savefig(out.with_suffix(".png"), dpi=110)
    return markdown


@command
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="DATASET", help="a dataset prepared with --rgb jpeg")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="timed per turn")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="results, without suffix")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = load_config(None, [f"run_dir={folder}", f"data.root={args.root}", *args.overrides])
        files, npy = folder / "files", folder / "npy"
        write_files(config, files, npy)
        scale = _depth(PreparedDataset(Path(args.root))).scale
        setting = Setting(config, files, npy, scale, prepare_lossless(config, folder / "lossless"))
        device = distributed.pick_device(config.device)
        table = run(setting, list(variants(setting, device)), args.seconds, args.rounds)
    info = PreparedDataset(Path(args.root)).info
    machine = {k: v for k, v in environment().items() if k in ("mtunet_dist", "git", "python", "torch", "cpus", "gpus")}
    title = (
        f"`python benchmarks/loader.py {' '.join(sys.argv[1:])}`: {info.height}x{info.width}, batch "
        f"{config.batch_size}, {config.data.threads} threads or workers, medians of {args.rounds} turns of "
        f"{args.seconds:g} s. {machine}"
    )
    Console().print(write(args.out, table, title), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
