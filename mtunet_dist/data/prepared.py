"""Reading a prepared dataset: ``dataset.json`` describes it, shards hold the encoded samples, indexes locate them.

``python -m mtunet_dist.prepare`` writes a dataset. It writes ``dataset.json`` last, so a folder with this file is
complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtunet_dist import plugins
from mtunet_dist.data.info import INFO_FILE, READABLE, DatasetInfo, SplitInfo
from mtunet_dist.data.shard_builder import changed, tasks_of
from mtunet_dist.data.shards import sha256
from mtunet_dist.data.splits import Split, make_split, pixels_sha256
from mtunet_dist.errors import InputError
from mtunet_dist.sources._source import Source
from mtunet_dist.system.files import read_json
from mtunet_dist.system.place import shown


class PreparedDataset:
    """A complete prepared dataset in the folder ``root``. ``info`` is its ``dataset.json``.

    Opening checks that every shard exists and has the right size, without reading it. Raises InputError that names what
    is missing, in another format or of the wrong size.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.info = _read_info(self.root)
        for split in self.info.splits.values():
            for shard in split.shards:
                path = self.root / shard.file
                if not path.is_file():
                    raise InputError(f"{path}: the shard is missing; delete {self.root} and prepare it again")
                if path.stat().st_size != shard.bytes:
                    raise InputError(f"{path}: {path.stat().st_size} bytes instead of {shard.bytes}")

    def split(self, spec: str) -> Split:
        """The split ``spec``, or several in the given order: ``train+val``. InputError lists the splits of the
        dataset."""
        names = spec.split("+")
        unknown = [name for name in names if name not in self.info.splits]
        if unknown or len(set(names)) < len(names):
            wrong = f"no split '{unknown[0]}'" if unknown else f"'{spec}' names a split twice"
            raise InputError(f"{self.root}: {wrong}. Available: {', '.join(self.info.splits)}")
        return make_split(self.root, self.info, names)


def verify(root: Path) -> PreparedDataset:
    """``verify_sums``, then ``compare_source``."""
    dataset = verify_sums(root)
    compare_source(dataset)
    return dataset


def verify_sums(root: Path) -> PreparedDataset:
    """Read everything again and compare checksums. Raises InputError that names the shard or sample that differs."""
    dataset = PreparedDataset(root)
    for name, info in dataset.info.splits.items():
        split = dataset.split(name)
        for shard in info.shards:
            if sha256(dataset.root / shard.file) != shard.sha256:
                raise InputError(f"{dataset.root / shard.file}: the checksum differs: the file is damaged")
        if dataset.info.settings.stored == "source":
            _verify_source(dataset.root, split, info)
    return dataset


def compare_source(dataset: PreparedDataset) -> str:
    """Raise InputError if the source files of the dataset have changed since. Returns a description of what was
    compared."""
    settings = dataset.info.settings
    root = Path(settings.root)
    if not root.exists():
        return f"{root}, which it was made from, is not there to compare it with"
    if not all(shard.source for split in dataset.info.splits.values() for shard in split.shards):
        return f"it does not say how {root}, which it was made from, was then"
    source: Source[Any] = plugins.build("source", {"name": settings.source, **settings.options}, root)
    what = changed(dataset.info, tasks_of(source, settings, dataset.root))
    if what:
        raise InputError(f"{dataset.root} is out of date: {what}; prepare it again")
    return f"{root}, which it was made from, has not changed"


def _verify_source(root: Path, split: Split, info: SplitInfo) -> None:
    """Compare the samples in the source with the state that they had when the dataset was prepared."""
    listed = dict(entry for shard in info.shards for entry in read_json(root / shard.file))
    for i, key in enumerate(split.keys):
        if pixels_sha256(split.decode(i)) != listed[key]:
            raise InputError(f"{split.describe(i)}: it has changed since it was prepared as {root}; prepare it again")


def _read_info(root: Path) -> DatasetInfo:
    path = root / INFO_FILE
    if not path.is_file():
        state = "is not a complete prepared dataset" if root.is_dir() else "does not exist"
        raise InputError(f"{shown(root)} {state} (no {INFO_FILE}); make it with mtunet prepare")
    value = read_json(path)
    version = value.get("format") if isinstance(value, dict) else None
    if version not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise InputError(f"{path}: format {version}, but this version reads formats {known}; prepare it again")
    try:
        info = DatasetInfo.from_json(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged: {error}") from None
    for task in info.targets.values():
        if problem := task.problem(old=True):  # earlier versions accepted some
            raise InputError(f"{path}: {problem}; prepare it again in another folder")
    return info
