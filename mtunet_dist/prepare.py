"""``python -m mtunet_dist.prepare``: a source dataset becomes a prepared one, at training resolution, checked.

Resizing full-size PNGs in every epoch costs many times the CPU of reading them prepared. The same command continues
after a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from mtunet_dist import __version__, plugins
from mtunet_dist.config import plugin_options
from mtunet_dist.data.info import FORMAT, INFO_FILE, DatasetInfo, Settings, SplitInfo, Stored, index_name
from mtunet_dist.data.prepared import PreparedDataset, compare_source, verify_sums
from mtunet_dist.data.report import progress, table
from mtunet_dist.data.shard_builder import SIDECAR, ShardResult, ShardTask, add_counts, changed, finished, tasks_of
from mtunet_dist.data.shard_workers import run
from mtunet_dist.data.shards import Index, RgbFormat, TargetFormat
from mtunet_dist.data.targets import warnings
from mtunet_dist.errors import InputError, MTUNetError
from mtunet_dist.sources._source import Sample, Source
from mtunet_dist.sources.folder import check_outside
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command
from mtunet_dist.system.files import write_json
from mtunet_dist.system.folder_lock import LOCK, lock_folder
from mtunet_dist.system.machine import cpus
from mtunet_dist.tasks._task import Counts

MAX_BAD = 10  # this many bad samples end the work, and the message lists them


def prepare(
    source: str,
    root: str | Path,
    out: str | Path,
    *,
    height: int = 128,
    width: int = 256,
    rgb_format: RgbFormat = "jpeg",
    target_format: TargetFormat = "npy",
    shard_size: int = 128,
    stored: Stored = "shards",
    workers: int = 0,
    options: Mapping[str, Any] | Sequence[str] = (),
) -> PreparedDataset:
    """Write the samples of ``source`` (a plugin name with its ``options``) at ``root`` to the folder ``out``.

    With ``stored`` ``source`` the samples are checked, counted and listed, but stay in the source at full size.

    ``workers`` processes make one shard each at a time; with 0 this process does the work. The bytes do not depend on
    the number. If ``out`` already holds the dataset, only shards whose source files have changed are made again.

    Raises InputError that names each bad file (the first ten), or the differing settings if ``out`` holds another
    dataset. Also raises it if one of ``root`` and ``out`` lies in the other, or if another process is writing to
    ``out``.
    """
    console, out = Console(highlight=False), Path(out)
    _check_apart(Path(root), out)
    given = dict(options) if isinstance(options, Mapping) else options
    typed = plugin_options("source", source, given)
    if stored == "source":
        root = Path(root).resolve()
    settings = Settings(source, str(root), typed, height, width, rgb_format, target_format, shard_size, stored=stored)
    if _there(out, settings) and not Path(root).exists():
        _say(console, f"{out} is complete; {root}, which it was made from, is not there to compare it with")
    else:
        reader: Source[Any] = plugins.build("source", {"name": source, **typed}, Path(root))
        for task in reader.targets.values():
            if problem := task.problem():
                raise InputError(f"source '{source}' at {root}: {problem}")
        tasks = tasks_of(reader, settings, out)
        if _is_current(out, settings, tasks):
            _say(console, f"{out} is complete")
        else:
            _check(reader, [sample for task in tasks for sample in task.samples])
            _work(tasks, workers, console)
    _remove_leftovers(out)
    dataset = PreparedDataset(out)
    for line in warnings(dataset.info):
        _say(console, f"warning: {line}")
    return dataset


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _check_apart(root: Path, out: Path) -> None:
    """Raise InputError if a later run would read ``out`` as input, or if ``out`` and its source lie in one another."""
    source, target = root.resolve(), out.resolve()
    if source in (target, *target.parents):
        raise InputError(f"OUT {out} lies in ROOT {root}, where it would be taken for input; choose a folder outside")
    if target in source.parents:
        raise InputError(f"ROOT {root} lies in OUT {out}; choose another folder for OUT")
    check_outside(out, "OUT")


def _there(out: Path, settings: Settings) -> DatasetInfo | None:
    """The complete dataset in ``out``, or None. InputError if its settings differ."""
    if not (out / INFO_FILE).is_file():
        return None
    info = PreparedDataset(out).info
    there, wanted = info.settings.flat(), settings.flat()
    if info.settings.source == settings.source:
        # An option that is younger than the dataset has its default there.
        there = {**plugin_options("source", settings.source, {}), **there}
    keys = [key for key in {**wanted, **there} if there.get(key) != wanted.get(key)]
    different = [f"{key}={there.get(key)} instead of {wanted.get(key)}" for key in keys]
    if different:
        raise InputError(f"{out} already holds a dataset with {', '.join(different)}: choose another folder")
    return info


def _is_current(out: Path, settings: Settings, tasks: Sequence[ShardTask]) -> bool:
    """Whether ``out`` holds the whole dataset and, as far as is known, no source file has changed."""
    info = _there(out, settings)
    return info is not None and changed(info, tasks) is None


def _work(tasks: list[ShardTask], workers: int, console: Console) -> None:
    """Make the missing and the changed shards of a dataset, which may already be complete."""
    settings, out = tasks[0].settings, tasks[0].out
    try:
        with lock_folder(out, f"another process is preparing {out}"):
            if _is_current(out, settings, tasks):  # the other process may have finished it
                return
            before = _there(out, settings)
            if before is not None:
                _say(console, f"{out} was complete, but {changed(before, tasks)}: what has changed is made again")
                _forget(out, before)
            _complete(tasks, _make_shards(tasks, workers, console))
    except OSError as error:
        raise MTUNetError(f"cannot write {error.filename or out}: {error.strerror}") from error


def _forget(out: Path, info: DatasetInfo) -> None:
    """Remove what makes ``out`` complete. Shards stay if a sidecar tells their source files."""
    (out / INFO_FILE).unlink()
    for split, described in info.splits.items():
        (out / index_name(split)).unlink(missing_ok=True)
        for shard in described.shards:
            if not (out / f"{shard.file}{SIDECAR}").is_file():
                (out / shard.file).unlink(missing_ok=True)


def _check(source: Source[Any], samples: list[Sample]) -> None:
    """Find wrong formats and sizes before the long work starts. Threads hide the latency of network disks."""

    def problem(sample: Sample) -> str | None:
        try:
            source.check(sample)
        except InputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(16) as pool:
        _raise_bad([message for message in pool.map(problem, samples) if message])


def _raise_bad(messages: list[str]) -> None:
    """Raise InputError with one line for each of the first bad samples, if there are any."""
    if len(messages) == 1:
        raise InputError(messages[0])
    if messages:
        more = [f"and {len(messages) - MAX_BAD} more"] if len(messages) > MAX_BAD else []
        raise InputError("\n  ".join([f"{len(messages)} bad samples:", *messages[:MAX_BAD], *more]))


def _make_shards(tasks: list[ShardTask], workers: int, console: Console) -> dict[Path, ShardResult]:
    """Make the shards that an earlier run has not finished. Returns all results by shard path.

    After a bad sample it continues to find others, until ``MAX_BAD`` are known. Good shards stay for the next run.
    """
    results = {task.path: result for task in tasks if (result := finished(task))}
    if results:
        console.print(f"{len(results)} of {len(tasks)} shards are there from an earlier run")
    kept = {task.sidecar for task in tasks if task.path in results}
    for sidecar in set(tasks[0].out.glob(f"*{SIDECAR}")) - kept:  # from other settings, or of a damaged shard
        sidecar.with_suffix("").unlink(missing_ok=True)
        sidecar.unlink()
    todo = [task for task in tasks if task.path not in results]
    bad: list[str] = []
    total = sum(len(task.samples) for task in todo)
    with progress(total, console) as advance, contextlib.closing(run(todo, workers)) as outcomes:
        for task, outcome in outcomes:
            if isinstance(outcome, ShardResult):
                results[task.path] = outcome
            else:
                bad += outcome
            if len(bad) >= MAX_BAD:
                break
            advance(len(task.samples))
    _raise_bad(bad)
    return results


def _complete(tasks: list[ShardTask], results: Mapping[Path, ShardResult]) -> None:
    """Write the index of each split, then ``dataset.json``, which makes the dataset complete."""
    source, settings, out = tasks[0].source, tasks[0].settings, tasks[0].out
    splits = {}
    for name in dict.fromkeys(task.split for task in tasks):
        index, shards = Index(), []
        counts: dict[str, Counts] = {}
        for task in tasks:
            if task.split == name:
                result = results[task.path]
                shards.append(result.shard)
                index.extend(result.index)
                counts = add_counts(source.targets, counts, result.counts)
        splits[name] = SplitInfo(sum(shard.count for shard in shards), tuple(shards), counts)
        write_json(out / index_name(name), dataclasses.asdict(index))
    info = DatasetInfo(
        format=FORMAT,
        name=out.resolve().name,
        created_by=f"mtunet_dist {__version__}",
        height=settings.height,
        width=settings.width,
        targets=dict(source.targets),
        splits=splits,
        settings=settings,
    )
    write_json(out / INFO_FILE, info.to_json(), indent=1)


def _remove_leftovers(out: Path) -> None:
    """Remove the lock of a complete dataset, and half-written files of killed runs."""
    for pattern in ("*.tmp", LOCK):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)  # another process may be doing the same


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, such as 128x256")
    return int(match[1]), int(match[2])


def _integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of {least} or more")
        return int(text)

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("prepare", __doc__)
    parser.add_argument("source", nargs="?", metavar="SOURCE", help=", ".join(plugins.available("source")))
    parser.add_argument(
        "root", nargs="?", type=arguments.home, metavar="ROOT", help="folder or file of the source dataset"
    )
    parser.add_argument("out", nargs="?", type=arguments.folder, metavar="OUT", help="folder to write")
    parser.add_argument("options", nargs="*", metavar="KEY=VALUE", help="options of the source, see its class")
    parser.add_argument("--size", type=_size, default=(128, 256), metavar="HEIGHTxWIDTH", help="default 128x256")
    parser.add_argument("--rgb", choices=["jpeg", "png"], default="jpeg", help="jpeg: quality 95, 4:4:4; png: lossless")
    parser.add_argument(
        "--targets", choices=["npy", "png"], default="npy", help="labels and depths: npy loads faster; png is smaller"
    )
    parser.add_argument(
        "--shard-size", type=_integer(1), default=128, metavar="N", help="samples per shard, default 128"
    )
    parser.add_argument(
        "--workers", type=_integer(0), default=cpus(), metavar="N", help=f"processes, default {cpus()}; 0: none"
    )
    parser.add_argument(
        "--no-copy", action="store_true", help="only check and list; training then decodes the source's own files"
    )
    parser.add_argument(
        "--verify", type=arguments.path, metavar="OUT", help="only check the dataset in OUT: checksums, and its source"
    )
    return parser


@command
def main() -> None:
    """Command line of ``prepare`` and ``verify``."""
    parser = _parser()
    args = parser.parse_intermixed_args()
    if args.verify is not None:
        dataset = verify_sums(args.verify)
        print(f"{args.verify}: all checksums match; {compare_source(dataset)}")
    elif args.out is None:
        parser.error("SOURCE, ROOT and OUT are needed")
    else:
        height, width = args.size
        dataset = prepare(
            args.source,
            args.root,
            args.out,
            height=height,
            width=width,
            rgb_format=args.rgb,
            target_format=args.targets,
            shard_size=args.shard_size,
            stored="source" if args.no_copy else "shards",
            workers=args.workers,
            options=args.options,
        )
    Console().print(table(dataset))


if __name__ == "__main__":
    main()
