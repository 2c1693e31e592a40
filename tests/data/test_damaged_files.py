"""Hundreds of damaged files, of every part, in a source and in shards: each is named, or proven to do no harm."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from helpers import damage
from helpers.damage import CPU, HARMLESS, LOADER_ONLY, MODES, NAMED, UNDETECTABLE, WRONG, Damage
from helpers.training import TASKS
from mtunet_dist.config import DataConfig
from mtunet_dist.data.dali import DaliLoader
from mtunet_dist.data.info import Settings
from mtunet_dist.data.loader import make_loader
from mtunet_dist.data.order import EvalOrder
from mtunet_dist.data.prepared import PreparedDataset, verify
from mtunet_dist.data.shard_builder import encode_sample
from mtunet_dist.data.shards import RgbFormat
from mtunet_dist.errors import InputError
from mtunet_dist.prepare import prepare
from mtunet_dist.sources._source import RawSample
from mtunet_dist.sources.folder import Folder
from mtunet_dist.tasks.segmentation import VOID

HEIGHT, WIDTH = 32, 48
PATIENCE_S = 100  # of the tests with a process; a single file may take 5
HARMLESS_KINDS = {"interlaced", "progressive", "trailing garbage"}
ALTERED_KINDS = {"bit flipped", "block zeroed", "block overwritten"}
Outcomes = dict[str, str]
Damages = dict[str, tuple[str, Damage]]  # by key: the part that is damaged, and how


def scene() -> dict[str, np.ndarray]:
    """Pixels of each part; coarse, so that blocks of a JPEG have few coefficients."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3)).astype(np.uint8)
    rgb = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT)))
    label = random.integers(0, 3, (HEIGHT, WIDTH)).astype(np.uint8)
    depth = random.integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
    return {"rgb png": rgb, "rgb jpeg": rgb, "label": label, "depth": depth}


def file_of(part: str, pixels: np.ndarray) -> bytes:
    return damage.encoded(pixels, "JPEG" if part == "rgb jpeg" else "PNG")


def write_sample(folder: Path, key: str, files: dict[str, bytes]) -> None:
    for part in ("rgb", "label", "depth"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / f"{key}.png").write_bytes(files["rgb png" if part == "rgb" else part])


def put(path: Path, content: bytes | Path | None) -> None:
    path.unlink()
    if content is None:
        path.mkdir()
    elif isinstance(content, Path):
        path.symlink_to(content)
    else:
        path.write_bytes(content)


def make_source(root: Path, damages: Damages) -> Folder:
    """A folder source whose sample ``key`` has the given damage of the given part."""
    files = {part: file_of(part, pixels) for part, pixels in scene().items()}
    for key, (part, damaged) in damages.items():
        write_sample(root / "train", key, files)
        put(root / "train" / part.split()[0] / f"{key}.png", damaged.content)
    (root / "dataset.yaml").write_text("classes: [a, b, c]\n")
    return Folder(root)


def keyed(damages: Iterator[tuple[str, Damage]]) -> Damages:
    """By a key that says what it is: ``007-bit_flipped-rgb_jpeg``."""
    listed = list(damages)
    return {f"{n:03d}-{d.kind}-{part}".replace(" ", "_"): (part, d) for n, (part, d) in enumerate(listed)}


def error_of(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns, or the InputError that it raises."""
    try:
        return function(*args)
    except InputError as error:
        return error


def report(title: str, damages: Damages, outcomes: Outcomes) -> str:
    """A table: kind of damage and part -> how many came to what. Shown by ``-s`` and by a failing test."""
    kinds = {key: re.sub(".* inside", "other image inside", d.kind) for key, (_, d) in damages.items()}
    counts = Counter((kinds[key], part, outcomes[key]) for key, (part, _) in damages.items())
    names = [NAMED, HARMLESS, UNDETECTABLE, LOADER_ONLY, WRONG]
    lines = [f"{title}: {len(damages)} damaged files", " " * 34 + "".join(f"{name:>14}" for name in names)]
    for kind, part in dict.fromkeys((kinds[key], part) for key, (part, _) in damages.items()):
        row = "".join(f"{counts[kind, part, name] or '':>14}" for name in names)
        lines.append(f"{kind:24}{part:10}{row}")
    totals = Counter(outcomes.values())
    lines.append(f"{'all':34}" + "".join(f"{totals[name]:>14}" for name in names))
    text = "\n".join(lines)
    print("\n" + text)
    return text


@pytest.fixture(scope="module")
def in_source() -> Damages:
    """Damages of files of a source."""
    random, pixels = np.random.default_rng(1), scene()
    return keyed(
        (part, d)
        for part in MODES
        for d in damage.file_damages(part, file_of(part, pixels[part]), pixels[part], random)
    )


def test_damaged_files_of_a_source_are_named_or_harmless(tmp_path: Path, in_source: Damages) -> None:
    """As ``prepare`` reads them, sample by sample: ``check``, then ``read``, which training calls without a check."""
    source, outcomes = make_source(tmp_path, in_source), {}
    good = {part: np.asarray(Image.open(io.BytesIO(file_of(part, x)))) for part, x in scene().items()}
    for sample in source.splits()["train"]:
        part, damaged = in_source[sample.key]
        start = time.monotonic()
        checked, raw = error_of(source.check, sample), error_of(source.read, sample)
        assert time.monotonic() - start < 5, sample.key
        if isinstance(raw, InputError):
            # A size is not one file's fault.
            names = (f"{sample.key}.png", f"sample {sample.key}: images differ in size")
            outcomes[sample.key] = NAMED if any(name in str(raw) for name in names) else WRONG
        else:
            name = part.split()[0]
            pixels = {"rgb": raw.rgb, "label": raw.targets["segmentation"], "depth": raw.targets["depth"]}[name]
            assert checked is None and pixels.shape == good[part].shape and pixels.dtype == good[part].dtype
            same = np.array_equal(pixels, good[part])
            outcomes[sample.key] = HARMLESS if same else UNDETECTABLE if part == "rgb jpeg" else WRONG
    text = report("source", in_source, outcomes)
    assert len(outcomes) == len(in_source) >= 300
    assert WRONG not in outcomes.values(), text
    for key, (_, damaged) in in_source.items():
        if damaged.kind in HARMLESS_KINDS:
            assert outcomes[key] == HARMLESS, key
        elif damaged.kind not in ALTERED_KINDS and (damaged.kind, outcomes[key]) != ("cut short", HARMLESS):
            assert outcomes[key] == NAMED, key


@pytest.mark.parametrize("workers", [0, 2])
def test_prepare_names_every_damaged_file_at_once(tmp_path: Path, in_source: Damages, workers: int) -> None:
    """Of kinds that the look at headers finds, and of kinds that only decoding does; the harmless are taken."""
    kinds = {"harmless": HARMLESS_KINDS, "header": {"text", "directory", "dangling link", "wrong mode"}}
    kinds["pixels"] = {"rows missing", "wrong checksum", "foreign class"}
    chosen = {
        name: dict({d.kind: (key, (part, d)) for key, (part, d) in in_source.items() if d.kind in some}.values())
        for name, some in kinds.items()
    }
    for name, damages in chosen.items():
        assert len(damages) == len(kinds[name])
        make_source(tmp_path / name, damages)
        call = functools.partial(prepare, "folder", tmp_path / name, tmp_path / f"{name} out", workers=workers)
        error = error_of(lambda call=call: call(height=HEIGHT, width=WIDTH, shard_size=2))
        if name == "harmless":
            assert verify(tmp_path / "harmless out").info.splits["train"].count == len(damages)
        else:
            assert isinstance(error, InputError) and f"{len(damages)} bad samples" in str(error)
            assert all(f"{key}.png" in str(error) for key in damages), error


class Shards:
    """A prepared dataset in which each sample is damaged."""

    def __init__(self, folder: Path, rgb_format: RgbFormat) -> None:
        pixels = scene()
        raw = RawSample(pixels["rgb png"], {"segmentation": pixels["label"], "depth": pixels["depth"]})
        settings = Settings("folder", "", {}, HEIGHT, WIDTH, rgb_format, "png", 8)
        parts = encode_sample("x", raw, {task.name: task for task in TASKS}, settings).parts
        members = {f"rgb {rgb_format}": parts["rgb"][1]}
        if rgb_format == "jpeg":
            members |= {"label": parts["segmentation"][1], "depth": parts["depth"][1]}
        random = np.random.default_rng(2)
        self.damages = keyed(
            (part, d) for part, data in members.items() for d in damage.member_damages(part, data, pixels[part], random)
        )
        for key in self.damages:
            write_sample(folder / "source" / "train", key, {part: file_of(part, pixels[part]) for part in MODES})
        (folder / "source" / "dataset.yaml").write_text("classes: [a, b, c]\n")
        self.intact, self.damaged = (folder / name for name in ("intact", "damaged"))
        formats = {"rgb_format": rgb_format, "target_format": "png"}
        prepare("folder", folder / "source", self.intact, height=HEIGHT, width=WIDTH, shard_size=8, **formats)
        shutil.copytree(self.intact, self.damaged)
        self.index = json.loads((self.intact / "train.index.json").read_text())
        for key in self.damages:
            path, data = self.shard_with(key)
            there = bytearray((self.damaged / path.name).read_bytes())
            there[self.span(key)] = data[self.span(key)]
            (self.damaged / path.name).write_bytes(there)

    def span(self, key: str) -> slice:
        """Where in its shard the damaged part is."""
        part = self.damages[key][0].split()[0].replace("label", "segmentation")
        offset, size = self.index["spans"][part][self.index["keys"].index(key)]
        return slice(offset, offset + size)

    def shard_with(self, key: str) -> tuple[Path, bytes]:
        """The shard of the sample, and what is in it once that one sample is damaged."""
        path = self.intact / f"train-{self.index['shard'][self.index['keys'].index(key)]:05d}.tar"
        data, content = bytearray(path.read_bytes()), self.damages[key][1].content
        assert isinstance(content, bytes) and len(content) == len(data[self.span(key)])
        data[self.span(key)] = content
        return path, bytes(data)


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shards]:
    """By format of RGB."""
    return {name: Shards(tmp_path_factory.mktemp(name), name) for name in get_args(RgbFormat)}


def test_verify_names_the_shard_of_every_damage(in_shards: dict[str, Shards]) -> None:
    for shards in in_shards.values():
        verify(shards.intact)
        for key in shards.damages:
            path, data = shards.shard_with(key)
            good = path.read_bytes()
            path.write_bytes(data)
            with pytest.raises(InputError, match=rf"{path.name}: the checksum differs"):
                verify(shards.intact)
            path.write_bytes(good)


def through_dali(jobs: list[tuple[Path, Path, str]]) -> list[Outcomes]:
    """The outcomes of each job, from a process of its own: what crashes it has a name."""
    words = [":".join(map(str, job)) for job in jobs]
    command = [sys.executable, damage.__file__, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"hangs after: {error.stdout!r:.2000}")
    *before, last = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"exit code {done.returncode} after: {before[-4:]} {last}: {done.stderr[-2000:]}"
    return json.loads(last)


def test_damaged_samples_of_shards_are_named(in_shards: dict[str, Shards]) -> None:
    """By every loader, whatever the damage: the index has checksums."""
    cases = [(shards.damaged, shards.intact, zoom) for shards in in_shards.values() for zoom in ("", "zoom")]
    found = through_dali(cases)
    for loader in ({"loader": "torch", "threads": 0}, {"cache": "host", "threads": 1}):
        found += [damage.outcomes(damaged, intact, loader, zoom=zoom != "") for damaged, intact, zoom in cases]
    for n, outcomes in enumerate(found):
        shards = list(in_shards.values())[n // 2 % 2]
        assert outcomes.keys() == shards.damages.keys()
        assert set(outcomes.values()) == {NAMED}, report("shards", shards.damages, outcomes)
    print(f"\nshards with checksums: all of {sum(len(s.damages) for s in in_shards.values())} named by every loader")


@pytest.mark.parametrize("loader", [{"loader": "dali"}, {"loader": "torch", "threads": 0}, {"cache": "host"}])
def test_training_stops_at_a_damaged_sample(in_shards: dict[str, Shards], loader: dict[str, Any]) -> None:
    """A few, of different kinds."""
    shards = in_shards["jpeg"]
    split = PreparedDataset(shards.damaged).split("train")
    kinds = ("GIF inside", "other size in header", "L JPEG inside", "16-bit RGB PNG inside")
    chosen = {d.kind + part: key for key, (part, d) in shards.damages.items() if d.kind in kinds}
    assert len(chosen) >= 6
    for key in list(chosen.values())[:1] if "cache" in loader else chosen.values():
        i = split.keys.index(key)
        with pytest.raises(InputError, match=r"of \S+ in .*train-\d+\.tar is damaged") as error:
            next(make_loader(DataConfig(root="", **loader), split, damage.One(i), CPU).batches())
        assert "cache" in loader or split.describe(i) in str(error.value)


def test_what_only_dali_refuses_is_named(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that PIL does not look at: of a PNG's last chunk and a JPEG's first. Our checksums are made to fit."""
    good, copy = tmp_path / "good", tmp_path / "copy"
    size = {"height": 32, "width": 48}
    prepare("folder", prepared.parent / "source", good, **size, shard_size=4, target_format="png")
    shutil.copytree(good, copy)
    index = json.loads((copy / "train.index.json").read_text())
    for i, part, at, bit in ((2, "segmentation", -9, 1), (5, "depth", -9, 1), (6, "rgb", 5, 16)):
        offset, size = index["spans"][part][i]
        shard = copy / f"train-{i // 4:05d}.tar"
        data = bytearray(shard.read_bytes())
        data[offset + at % size] ^= bit
        shard.write_bytes(data)
        index["crc32"][part][i] = zlib.crc32(data[offset : offset + size])
    (copy / "train.index.json").write_text(json.dumps(index))
    split, order = PreparedDataset(copy).split("train"), EvalOrder(12, batch_size=4)
    for i in (2, 5, 6):
        assert np.array_equal(split.decode(i).rgb, PreparedDataset(good).split("train").decode(i).rgb)
    loader = make_loader(DataConfig(root="", threads=1, on_error="skip"), split, order, CPU)
    with pytest.warns(UserWarning, match="skipped") as warned:
        batches = list(loader.batches())
    assert [re.findall(r"00\d(?= in \S+: DALI cannot)", str(w.message)) for w in warned] == [["002"], ["005"], ["006"]]
    masked = [i for b in batches for n, i in enumerate(b["sample"].tolist()) if (b["segmentation"][n] == VOID).all()]
    assert (masked, loader.skipped) == ([2, 5, 6], 3)
    with pytest.raises(InputError, match=r"002 in .*train-00000\.tar: DALI cannot decode it although PIL can"):
        next(make_loader(DataConfig(root="", threads=1), split, order, CPU).batches())

    # Where it refuses all, it is not the samples, but DALI that lacks something.
    monkeypatch.setattr(DaliLoader, "_passes", lambda self, i, *, black=False: black)
    with pytest.raises(RuntimeError, match="decod"):
        next(make_loader(DataConfig(root="", threads=1, on_error="skip"), split, order, CPU).batches())
