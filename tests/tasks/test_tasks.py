"""What every task must do, one suite for all files of ``mtunet_dist/tasks``, and datasets with several targets."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import sys
import typing
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from helpers.format_2 import write_format_2
from helpers.training import MakeConfig
from mtunet_dist import evaluate, plugins, predict, summary
from mtunet_dist.config import DataConfig
from mtunet_dist.core.comparison import delta_m, higher_is_better, task_of
from mtunet_dist.core.step import Batch, _mean
from mtunet_dist.data.augmentation import Augmentation, Draw
from mtunet_dist.data.batch import Pixels, as_batch, as_stored, blank_batch
from mtunet_dist.data.info import DatasetInfo
from mtunet_dist.data.loader import make_loader
from mtunet_dist.data.order import EvalOrder, TrainOrder
from mtunet_dist.data.prepared import PreparedDataset, verify
from mtunet_dist.data.splits import ShardSplit
from mtunet_dist.data.torch_augmentation import augmented
from mtunet_dist.errors import InputError
from mtunet_dist.prepare import prepare
from mtunet_dist.runs import checkpoint
from mtunet_dist.runs.evaluation import metric_names
from mtunet_dist.runs.loading import load_run, load_step
from mtunet_dist.sources import folder
from mtunet_dist.sources._images import decode
from mtunet_dist.sources._source import RawSample
from mtunet_dist.tasks._task import Task
from mtunet_dist.tasks.normals import Normals
from mtunet_dist.tasks.segmentation import ClassInfo, Segmentation
from mtunet_dist.train import train

CPU = torch.device("cpu")
KINDS = plugins.available("task")
HEIGHT, WIDTH = 32, 48
CLOSE = 0.01  # to the best value of a metric; a median comes from a histogram with steps of this size
OF_8_BITS = 1.0  # the same for images of 8 bits
COUNTS = {"train": 8, "val": 4}
TWO_LABELS = {"segmentation": Segmentation("segmentation", (ClassInfo("a", (1, 2, 3)), ClassInfo("b", (4, 5, 6))))}
TWO_LABELS["parts"] = Segmentation("parts", tuple(ClassInfo(name, (9, 9, 9)) for name in ("head", "b", "foot")))


# Tasks and targets for any file in the folder.


def example(kind: Any, number: Iterator[int]) -> Any:
    """A value of a type: the first of a Literal, three of an open tuple; texts and numbers differ."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return parts[0]
    if origin is tuple:
        return tuple(example(part, number) for part in ([parts[0]] * 3 if parts[-1] is ... else parts))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(*(example(hints[field.name], number) for field in dataclasses.fields(kind)))  # type: ignore[operator]
    return {str: lambda n: f"text {n}", int: lambda n: n, float: lambda n: n / 100}[kind](next(number))


def make_task(kind: str, name: str = "") -> Task:
    """A task of this kind. Its name is the kind, or ``name``."""
    found, number = plugins.find("task", kind), itertools.count(1)
    hints = typing.get_type_hints(found)
    meaning = [example(hints[field.name], number) for field in dataclasses.fields(found) if field.name != "name"]
    task: Task = found(name or kind, *meaning)
    assert task.problem() is None
    return task


def make_stored(task: Task, seed: int, height: int = HEIGHT, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """A stored target, the random numbers of which ``from_numbers`` accepts, and where it is valid, bool (H, W)."""
    random = np.random.default_rng(seed)
    numbers = random.uniform(1, 9, task.shape(height, width)) ** 2 / 9
    vectors = random.normal(0.5, size=task.shape(height, width))
    units = vectors / np.sqrt((vectors**2).sum(-1, keepdims=True))
    for candidate in (numbers, units, random.integers(0, task.channels, task.shape(height, width))):
        with suppress(InputError):
            stored = task.from_numbers(candidate, "x")
            break
    else:
        pytest.fail(f"no numbers fit the task {task}")
    valid = random.random((height, width)) > 0.3
    stored[~valid] = task.blank(height, width)[~valid]
    return stored, valid


def as_target(task: Task, stored: list[np.ndarray], draws: list[Draw] | None = None) -> Tensor:
    """The target of a batch, as the loaders make it."""
    count, (height, width) = len(stored), stored[0].shape[:2]
    pixels = Pixels(torch.zeros(count, height, width, 3).byte(), {task.name: as_stored(np.stack(stored))})
    image, targets = augmented(pixels, {task.name: task}, draws or [])
    factors = task.factors(draws or [], count)
    multiplied = {} if factors is None else {task.name: torch.from_numpy(factors)}
    return as_batch(image, targets, multiplied, torch.arange(count))[task.name]


def perfect(task: Task, target: Tensor) -> Tensor:
    """The output (N, channels, H, W) without an error: the target, or a score of 9 for its class."""
    if target.shape == (len(target), task.channels, *target.shape[-2:]):
        return target.clone()
    known = torch.where(target < task.channels, target, 0).long()
    return 9 * torch.nn.functional.one_hot(known, task.channels).movedim(-1, 1).float()


def random_output(task: Task, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, task.channels, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def assert_best(task: Task, figures: dict[str, float], tolerance: float = CLOSE) -> None:
    """Errors are 0, shares are 1."""
    expected = {name: float(direction == "max") for name, direction in task.METRICS.items()}
    assert figures == pytest.approx(expected, abs=tolerance)


@pytest.fixture(params=[*((kind, "") for kind in KINDS), *((kind, "other") for kind in KINDS)], ids="-".join)
def task(request: pytest.FixtureRequest) -> Task:
    return make_task(*request.param)


# The contract: meaning, and the stored target.


def test_the_registry_is_the_folder_and_metrics_tell_the_kind() -> None:
    assert {"depth", "normals", "segmentation"} <= set(KINDS)
    found = [plugins.find("task", kind) for kind in KINDS]
    assert [kind.KIND for kind in found] == KINDS  # type: ignore[attr-defined]
    names = [name for kind in found for name in kind.METRICS]  # type: ignore[attr-defined]
    assert len(set(names)) == len(names)
    assert len({kind.PART for kind in found}) == len(found)  # type: ignore[attr-defined]


def test_the_meaning_survives_json(task: Task) -> None:
    value = json.loads(json.dumps(task.to_json()))
    assert value["kind"] == task.KIND and "name" not in value
    again = type(task).from_json(task.name, value)
    assert again == task and hash(again) == hash(task)
    assert type(task).from_json("another", value) != task
    for key in value.keys() - {"kind"}:
        with pytest.raises((KeyError, TypeError)):
            type(task).from_json(task.name, {k: v for k, v in value.items() if k != key})


def test_the_identity_tells_names_and_meanings_apart(task: Task) -> None:
    other = dataclasses.replace(task, name="another")
    assert json.dumps(task.identity()) == json.dumps(dataclasses.replace(task).identity())
    assert json.dumps(task.identity()) != json.dumps(other.identity())


def test_names_of_metrics_and_files_follow_the_name(task: Task) -> None:
    assert set(task.MAIN) <= task.METRICS.keys() and task.MAIN
    own = task.name == task.KIND
    assert task.part == (task.PART if own else task.name)
    for metric, direction in task.METRICS.items():
        full = task.full(metric)
        assert full == (metric if own else f"{task.name}/{metric}")
        assert task_of(full) == task.name
        assert higher_is_better(full) == (direction == "max")


def test_a_blank_target_has_no_valid_pixel(task: Task) -> None:
    blank = task.blank(HEIGHT, WIDTH)
    assert (blank.shape, blank.dtype) == (task.shape(HEIGHT, WIDTH), task.DTYPE)
    counts = task.count(blank)
    assert (counts["pixels"], counts["valid"], counts["samples_without"]) == (HEIGHT * WIDTH, 0, 1)
    assert task.rows(counts) and task.tally(blank).sum() == 0
    batch, warm = as_target(task, [blank, blank]), blank_batch([task], HEIGHT, CPU)[task.name]
    assert warm.dtype == batch.dtype and warm.shape == (1, *batch.shape[1:-2], HEIGHT, HEIGHT)
    for target in (batch, warm):
        output = torch.randn(len(target), task.channels, *target.shape[-2:], requires_grad=True)
        loss = _mean(*task.loss(output, target))
        loss.backward()
        assert task.valid(target) == 0 == loss.item()
        assert output.grad is not None and (output.grad == 0).all()
    assert len(task.constant(task.tally(blank))) == task.channels


def test_counts_of_parts_add_up(task: Task) -> None:
    one, valid = make_stored(task, 1)
    other, also = make_stored(task, 2)
    both, whole = task.add(task.count(one), task.count(other)), task.count(np.concatenate([one, other]))
    assert both == json.loads(json.dumps(whole))
    assert both["valid"] == valid.sum() + also.sum() == task.valid(as_target(task, [one, other]))
    joined = task.add(both, task.count(task.blank(HEIGHT, WIDTH)))
    assert joined == both | {"pixels": 3 * one.shape[0] * one.shape[1], "samples_without": 1}
    rows = task.rows(both)
    assert rows and all(isinstance(text, str) and text for row in rows.items() for text in row)
    np.testing.assert_array_equal(task.tally(np.concatenate([one, other])), task.tally(one) + task.tally(other))


def test_numbers_that_are_none_are_refused_by_name(task: Task) -> None:
    stored = task.blank(4, 6).astype(np.float64)
    with pytest.raises(InputError, match=r"^file\.npy: "):
        task.from_numbers(np.full_like(stored, np.nan), "file.npy")


# The contract: the loss and the metric.


def test_the_loss_does_not_see_what_lies_under_the_mask(task: Task) -> None:
    stored, valid = make_stored(task, 3)
    target, output = as_target(task, [stored]), random_output(task, 1)
    total, count = task.loss(output, target)
    assert count == valid.sum() and total.dtype == torch.float32 and total > 0
    for bad in (math.nan, math.inf, -math.inf, 7.0):
        changed = torch.where(torch.from_numpy(valid), output, bad).requires_grad_()
        assert changed.isfinite().all() == math.isfinite(bad)
        loss, _ = task.loss(changed, target)
        loss.backward()
        assert torch.equal(loss, total)
        assert changed.grad is not None and changed.grad.isfinite().all()
        assert (changed.grad[..., ~torch.from_numpy(valid)] == 0).all() and changed.grad.any()


def test_neither_loss_nor_metric_waits_for_the_device(task: Task) -> None:
    # Meta tensors have no values, so .item() or a boolean index would raise.
    target = as_target(task, [make_stored(task, 4)[0]]).to("meta")
    output = random_output(task, 1).to("meta")
    assert all(x.is_meta for x in task.loss(output, target)) and task.valid(target).is_meta
    task.metric("meta").update(output, target)


def test_metrics_are_those_of_the_kind_and_unknown_without_a_valid_pixel(task: Task) -> None:
    metric = task.metric(CPU)
    for _ in range(2):  # before any update, and after one without a valid pixel
        figures = metric.compute()
        assert list(figures) == list(task.METRICS)
        assert all(math.isnan(value) for value in [*figures.values(), *metric.per_class().values()])
        metric.update(random_output(task, 1), as_target(task, [task.blank(HEIGHT, WIDTH)]))


def test_a_perfect_prediction_has_the_best_metrics_and_another_has_not(task: Task) -> None:
    target = as_target(task, [make_stored(task, seed)[0] for seed in (5, 6)])
    right, wrong = task.metric(CPU), task.metric(CPU)
    right.update(perfect(task, target), target)
    assert_best(task, right.compute())
    wrong.update(random_output(task, 2), target)
    for name, value in wrong.compute().items():
        assert value < 0.9 if task.METRICS[name] == "max" else value > 0.1, name
    assert task.loss(perfect(task, target), target)[0] < 0.1 * task.loss(random_output(task, 2), target)[0]


def test_metrics_of_parts_add_up_to_those_of_the_whole(task: Task) -> None:
    whole, part, rest = (task.metric(CPU) for _ in range(3))
    targets = [as_target(task, [make_stored(task, seed)[0]]) for seed in (7, 8, 9)]
    for i, target in enumerate([*targets, as_target(task, [task.blank(HEIGHT, WIDTH)])]):
        output = perfect(task, target) + random_output(task, 1, seed=i)
        whole.update(output, target)
        (part if i < 2 else rest).update(output, target)
    for mine, other in zip(part.tensors(), rest.tensors(), strict=True):
        mine += other  # in place, as an all-reduce does
        assert mine.dtype in (torch.int64, torch.float64)
    assert part.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert part.per_class() == pytest.approx(whole.per_class(), rel=1e-12)


def test_the_constant_is_at_least_as_good_as_that_of_any_pixel(task: Task) -> None:
    """Under the task's loss. The best output for a single pixel is a constant too."""
    stored, valid = make_stored(task, 10)
    target = as_target(task, [stored])

    def loss(tally: np.ndarray) -> float:
        constant = task.constant(tally)
        assert len(constant) == task.channels
        output = torch.tensor(constant).view(1, -1, 1, 1).expand(1, -1, HEIGHT, WIDTH)
        return task.loss(output, target)[0].item()

    best = loss(task.tally(stored))
    rows, columns = np.nonzero(valid)
    others = []
    for pick in np.random.default_rng(0).permutation(len(rows))[:10]:
        pixel = np.s_[rows[pick] : rows[pick] + 1, columns[pick] : columns[pick] + 1]
        others.append(loss(task.tally(stored[pixel])))
    assert best <= min(others) * (1 + 1e-6)
    assert best < max(others)


# The contract: augmentation and loaders.


def test_a_flip_of_a_flip_is_the_target(task: Task) -> None:
    stored, _ = make_stored(task, 11)
    plain, flip = (Draw(0, 0, HEIGHT, WIDTH, 1.0, flip) for flip in (False, True))
    target = as_target(task, [stored])
    assert torch.equal(as_target(task, [stored], [plain]), target)
    flipped = as_target(task, [stored], [flip])
    factors = [task.factors([draw], 1) for draw in (plain, flip)]
    if factors[0] is None or factors[1] is None:
        assert torch.equal(flipped, target.flip(-1))
    else:
        sign = torch.from_numpy(factors[1] / factors[0])
        assert torch.equal(sign * sign, torch.ones(1, task.PLANES))
        assert torch.equal(flipped.flip(-1) * sign.view(1, -1, 1, 1), target)
    counts = task.valid(flipped), task.valid(as_target(task, [stored], [Draw(2, 3, 16, 24, 2.0, True)]))
    assert counts[0] == task.valid(target) and counts[1] != 0


def test_a_flip_turns_normals_around() -> None:
    """Left and right are exchanged in the picture, and so in the vectors."""
    task, flip = Normals("normals"), Draw(0, 0, 1, 2, 1.0, True)
    stored = task.from_numbers(np.array([[[0.6, 0.0, -0.8], [0.0, 0.6, -0.8]]]), "x")
    flipped = as_target(task, [stored], [flip])[0, :, 0].T
    torch.testing.assert_close(flipped, torch.tensor([[0.0, 0.6, -0.8], [-0.6, 0.0, -0.8]]), rtol=0, atol=1e-4)


def test_normals_of_an_image_are_those_of_the_usual_coding() -> None:
    pixels = np.array([[[255, 128, 128], [128, 255, 127], [127, 128, 0], [0, 0, 0]]], dtype=np.uint8)
    found = Normals("normals").from_image(pixels, "x") / 32767
    np.testing.assert_allclose(found, [[[1, 0, 0], [0, 1, 0], [0, 0, -1], [0, 0, 0]]], atol=0.01)
    for numbers in ([[[0.0, 0.3, 0.0]]], [[[0.0, 0.0, 2.0]]], [[0.0, 1.0]]):
        with pytest.raises(InputError, match=r"^x: "):
            Normals("normals").from_numbers(np.array(numbers), "x")


class Several:
    """A source of random samples, with these targets. It stands in for ``folder``."""

    stamp = None
    targets: typing.ClassVar[dict[str, Task]] = {}

    def __init__(self, root: Path) -> None:
        self.root = root

    def splits(self) -> dict[str, list[Any]]:
        return {split: [Key(f"{split}{i}") for i in range(count)] for split, count in COUNTS.items()}

    def check(self, sample: Any) -> None:
        pass

    def read(self, sample: Any) -> RawSample:
        """A gradient, so that JPEG changes little. Of each target, one sample lacks it."""
        number = int(sample.key[-1]) + 100 * sample.key.startswith("val")
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        rgb = np.stack([5 * x, 7 * y, 2 * (x + y) + number], axis=2).astype(np.uint8)
        found = {name: make_stored(task, number)[0] for name, task in self.targets.items()}
        lacking = list(self.targets)[number] if number < len(self.targets) else None
        return RawSample(
            rgb, {n: self.targets[n].blank(HEIGHT, WIDTH) if n == lacking else t for n, t in found.items()}
        )


@dataclasses.dataclass(frozen=True)
class Key:
    key: str


def prepare_several(out: Path, targets: dict[str, Task], **changes: Any) -> PreparedDataset:
    """A prepared dataset of random samples with ``targets``."""
    settings: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "shard_size": 4, "workers": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "PLUGIN", type("Other", (Several,), {"targets": targets}))
        return prepare("folder", out.parent / "nowhere", out, **{**settings, **changes})


def every_kind() -> dict[str, Task]:
    """A target of every kind, and a second one under another name."""
    tasks = [make_task(kind, name) for kind in KINDS for name in ("", f"second_{kind}")]
    return {task.name: task for task in tasks}


@pytest.fixture(scope="module", params=["npy", "png"])
def all_kinds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """A dataset with the targets of ``every_kind``."""
    out = tmp_path_factory.mktemp(f"all_{request.param}") / "out"
    return prepare_several(out, every_kind(), target_format=request.param)


def read_again(dataset: PreparedDataset, i: int) -> RawSample:
    """Training sample ``i`` as the source gave it."""
    source = Several(dataset.root)
    source.targets = dataset.info.targets  # type: ignore[misc]
    return source.read(Key(f"train{i}"))


def test_what_is_stored_is_what_the_source_gave(all_kinds: PreparedDataset) -> None:
    split = all_kinds.split("train")
    assert isinstance(split, ShardSplit)
    png = all_kinds.info.settings.target_format == "png"
    assert split.encoded == {name: png and task.LOSSLESS for name, task in all_kinds.info.targets.items()}
    assert any(split.encoded.values()) == png
    for i in range(len(split)):
        stored, expected = split.decode(i), read_again(all_kinds, i)
        assert list(stored.targets) == list(expected.targets) == list(all_kinds.info.targets)
        for name, task in all_kinds.info.targets.items():
            assert stored.targets[name].dtype == task.DTYPE
            np.testing.assert_array_equal(stored.targets[name], expected.targets[name])


def test_the_counts_in_the_dataset_are_those_of_its_samples(all_kinds: PreparedDataset) -> None:
    again = PreparedDataset(all_kinds.root)
    assert again.info == all_kinds.info
    for name, info in again.info.splits.items():
        samples = [again.split(name).decode(i).targets for i in range(info.count)]
        for task in again.info.targets.values():
            counts = [task.count(sample[task.name]) for sample in samples]
            for other in counts[1:]:
                counts[0] = task.add(counts[0], other)
            assert info.targets[task.name] == counts[0]
            assert counts[0]["samples_without"] == (name == "train")


AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "flip": {"flip": True},
    "flip and zoom": {"flip": True, "scales": (1.0, 1.5)},
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_loaders_agree_to_the_bit_on_every_target(all_kinds: PreparedDataset, name: str) -> None:
    split, order = all_kinds.split("train"), TrainOrder(8, batch_size=4, seed=1)
    augmentation = Augmentation(HEIGHT, WIDTH, seed=3, **AUGMENTATIONS[name])
    used = augmentation if augmentation.changes else None

    def batches(**options: Any) -> list[Batch]:
        config = DataConfig(**{"root": "", "threads": 1, **options})
        return list(itertools.islice(make_loader(config, split, order, CPU, used).batches(), 4))

    dali, torch_, cached = batches(), batches(loader="torch", threads=0), batches(cache="host")
    flips = []
    for number, (a, b, c) in enumerate(zip(dali, torch_, cached, strict=True)):
        assert a.keys() == b.keys() == c.keys() == {"image", "sample", *all_kinds.info.targets}
        for key in a.keys() - {"image"}:
            assert a[key].dtype == b[key].dtype == c[key].dtype, key
            assert torch.equal(a[key], b[key]) and torch.equal(b[key], c[key]), key
        assert torch.equal(b["image"], c["image"])
        for n, i in enumerate(a["sample"].tolist()):
            draws = [augmentation.draw(number // 2, i)] if used else []  # an epoch has two batches
            flips += [draw.flip for draw in draws]
            stored = split.decode(i).targets
            for task in all_kinds.info.targets.values():
                assert torch.equal(a[task.name][n : n + 1], as_target(task, [stored[task.name].copy()], draws)), task
    assert set(flips) == ({False, True} if augmentation.flip else set())


# The contract: what people see.


def test_results_are_written_in_the_form_that_is_documented(task: Task, tmp_path: Path) -> None:
    stored, _ = make_stored(task, 12)
    target = as_target(task, [stored])
    output = perfect(task, target)[0]
    larger = task.result(output, (90, 70))
    assert larger.shape[:2] == (70, 90)
    task.write(tmp_path / "x", task.result(output, (WIDTH, HEIGHT)))
    (file,) = tmp_path.iterdir()
    assert file.name == f"x.{task.part}.png"
    about = task.about_files()
    assert about and "\n" not in about and task.part in about
    # Read as a target, it is the right prediction.
    again = task.from_image(decode(file.read_bytes(), task.IMAGE, "x"), "x")
    metric = task.metric(CPU)
    metric.update(perfect(task, as_target(task, [again])), target)
    assert_best(task, metric.compute(), CLOSE if task.LOSSLESS else OF_8_BITS)


def test_an_image_of_a_target_is_read(task: Task) -> None:
    """Zeros, as image files of the format hold them, are read; a wrong value names the file."""
    planes = (3,) if "RGB" in task.IMAGE.names[0] else ()
    pixels = np.zeros((4, 6, *planes), dtype=task.IMAGE.dtype)
    stored = task.from_image(pixels, "x")
    assert (stored.shape, stored.dtype) == (task.shape(4, 6), task.DTYPE)


def is_tile(tile: np.ndarray) -> bool:
    return tile.shape == (HEIGHT, WIDTH, 3) and tile.dtype == np.uint8


def test_tiles_show_truth_prediction_and_error(task: Task) -> None:
    stored, valid = make_stored(task, 13)
    target = as_target(task, [stored])[0]
    right, wrong = perfect(task, target[None])[0], random_output(task, 1)[0]
    good, bad = task.compare(right, target), task.compare(wrong, target)
    assert len(good) == len(bad) == 3 and all(map(is_tile, [*good.values(), *bad.values()]))
    (truth, predicted, error), (same, other, errors) = good.values(), bad.values()
    np.testing.assert_array_equal(truth, same)
    np.testing.assert_array_equal(truth[valid], predicted[valid])
    assert (truth[~valid] == 0).all() and (error[~valid] == 0).all()
    assert np.ptp(error[valid], axis=0).max() <= 2 < np.ptp(errors[valid], axis=0).max()  # rounding
    assert (other[valid] != truth[valid]).any()


def test_tiles_of_several_outputs_have_the_same_colours(task: Task) -> None:
    stored, valid = make_stored(task, 14)
    target = as_target(task, [stored])[0]
    right, wrong = perfect(task, target[None])[0], random_output(task, 1)[0]
    tiles = task.tiles(target, {"right": right, "wrong": wrong})
    assert len(tiles) == 3 and all(map(is_tile, tiles.values()))
    truth, found, other = tiles.values()
    np.testing.assert_array_equal(truth[valid], found[valid])
    assert (other[valid] != truth[valid]).any()
    alone = task.tiles(None, {task.part: right})
    assert len(alone) == 1 and all(map(is_tile, alone.values()))
    for captions in (tiles, alone):
        assert all("\n" not in caption for caption in captions)
    blank = as_target(task, [task.blank(HEIGHT, WIDTH)])[0]
    assert all(map(is_tile, [*task.tiles(blank, {"x": wrong}).values(), *task.compare(wrong, blank).values()]))


def test_stored_targets_have_tiles_and_charts(task: Task) -> None:
    stored, valid = make_stored(task, 15)
    blank = task.blank(HEIGHT, WIDTH)
    counts = [task.count(stored), task.count(blank)]
    tile = task.stored_tile(stored, counts)
    assert is_tile(tile) and (tile[~valid] == 0).all() and tile[valid].any()
    assert (task.stored_tile(blank, [counts[1]]) == 0).all()
    legend = task.legend(300)
    assert legend is None or (legend.ndim == 3 and legend.shape[1:] == (300, 3) and legend.dtype == np.uint8)
    axes = Figure().subplots()
    task.chart(axes, {"train": (counts[0], task.tally(stored)), "val": (counts[1], task.tally(blank))})
    assert axes.has_data() and axes.get_ylabel()
    task.chart(Figure().subplots(), {"val": (counts[1], task.tally(blank))})


# Several targets through the verbs.


def test_a_training_on_every_kind_is_evaluated_predicts_and_is_drawn(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = prepare_several(tmp_path / "data", every_kind())
    tasks = list(dataset.info.targets.values())
    names = ",".join(dataset.info.targets)
    config = make_config(f"data.root={dataset.root}", f"tasks=[{names}]", "epochs=1")
    metrics = train(config)
    assert metrics.keys() == set(metric_names(tasks)) and all(map(math.isfinite, metrics.values()))
    assert Image.open(Path(config.run_dir) / "pictures" / "latest.png").width > 3 * len(tasks) * WIDTH
    Image.fromarray(np.full((70, 90, 3), 127, dtype=np.uint8)).save(tmp_path / "a.png")
    for verb, words in (
        (evaluate, [config.run_dir]),
        (predict, [config.run_dir, str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--device=cpu"]),
        (summary, [str(dataset.root), "--out", str(tmp_path / "summary.png")]),
    ):
        monkeypatch.setattr(sys, "argv", [verb.__name__, *words])
        verb.main()
    written = json.loads((Path(config.run_dir) / "evaluation-val.json").read_text())
    assert written["trained"]["metrics"] == pytest.approx(metrics)
    assert written["constant"]["metrics"].keys() == metrics.keys()
    parts = [task.part for task in tasks]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"a.{part}.png" for part in [*parts, "preview"]}
    assert all(Image.open(tmp_path / "out" / f"a.{part}.png").size == (90, 70) for part in parts)
    assert Image.open(tmp_path / "summary.png").width > 1000
    printed = capsys.readouterr().out
    assert all(task.about_files() in printed for task in tasks)


def test_two_sets_of_labels_train_under_two_names(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = prepare_several(tmp_path / "out", dict(TWO_LABELS))
    words = [f"data.root={dataset.root}", "tasks=[segmentation,parts]", "epochs=1"]
    config = make_config(*words)
    assert config.checkpoint.best == "miou"
    metrics = train(config)
    names = {name: f"parts/{name}" for name in Segmentation.METRICS}
    assert metrics.keys() == {*names, *names.values(), "loss/segmentation", "loss/parts"}
    assert metrics["miou"] != metrics["parts/miou"] and all(map(math.isfinite, metrics.values()))
    monkeypatch.setattr(sys, "argv", ["evaluate", config.run_dir])
    evaluate.main()
    printed = capsys.readouterr().out
    written = json.loads((Path(config.run_dir) / "evaluation-val.json").read_text())
    assert written["trained"]["metrics"] == pytest.approx(metrics)
    assert list(written["trained"]["class_iou"]) == ["a", "b", "parts/head", "parts/b", "parts/foot"]
    assert "parts/miou" in printed and "parts/foot" in printed


def test_one_task_under_another_name_needs_its_best_metric_to_be_said(make_config: MakeConfig, tmp_path: Path) -> None:
    dataset = prepare_several(tmp_path / "out", dict(TWO_LABELS))
    words = [f"data.root={dataset.root}", "tasks=[parts]", "epochs=1", "log.pictures=0"]
    with pytest.raises(InputError, match=r"checkpoint\.best is missing: .*'parts'.* such as parts/miou"):
        make_config(*words)
    with pytest.raises(InputError, match=r"checkpoint\.best=miou .*parts/miou"):
        train(make_config(*words, "checkpoint.best=miou"))
    config = make_config(*words, "checkpoint.best=parts/miou")
    metrics = train(config)
    best = checkpoint.load(Path(config.run_dir) / "checkpoints" / "best.pt")["best"]
    assert best == {"metric": "parts/miou", "value": metrics["parts/miou"], **best}


def test_unknown_names_are_refused_with_the_valid_ones(make_config: MakeConfig, tmp_path: Path) -> None:
    dataset = prepare_several(tmp_path / "out", dict(TWO_LABELS))
    assert dataset.info.tasks(["parts", "segmentation"]) == [TWO_LABELS["parts"], TWO_LABELS["segmentation"]]
    with pytest.raises(InputError, match=r"unknown task 'part'\. Did you mean 'parts'\?.* has: segmentation, parts"):
        dataset.info.tasks(["segmentation", "part"])
    config = make_config(f"data.root={dataset.root}", "tasks=[segmentation,depth]")
    with pytest.raises(InputError, match=r"unknown task 'depth'.* has: segmentation, parts"):
        train(config)
    for name in ("iou", "parts/iou", "parts/", "/miou/x", ""):
        for look in (higher_is_better, task_of):
            with pytest.raises(InputError, match=f"unknown metric '{name}'.*TASK/METRIC") as error:
                look(name)
            assert all(f" {known}" in str(error.value) for known in ("miou", "depth_abs", "normal_mean"))


def test_delta_m_counts_each_task_once() -> None:
    single = {"miou": 0.4, "accuracy": 0.5, "depth_abs": 2.0, "normal_mean": 20.0, "parts/miou": 0.5}
    multi = {"miou": 0.5, "accuracy": 0.5, "depth_abs": 1.5, "normal_mean": 25.0, "parts/miou": 0.25}
    assert delta_m(multi, single, ["miou", "depth_abs", "normal_mean"]) == pytest.approx((25 + 25 - 25) / 3)
    # Segmentation has (25 % + 0 %) / 2; the parts are a task of their own.
    expected = (12.5 + 25 - 25 - 50) / 4
    assert delta_m(multi, single, list(single)) == pytest.approx(expected)
    assert delta_m(single, single, list(single)) == 0


# Datasets of format 2.


@pytest.fixture
def old(prepared: Path, tmp_path: Path) -> Path:
    """The tiny dataset in format 2."""
    copy = Path(shutil.copytree(prepared, tmp_path / "old"))
    write_format_2(copy)
    assert json.loads((copy / "dataset.json").read_text())["format"] == 2
    return copy


def test_a_dataset_of_format_2_is_what_it_was(old: Path, dataset: PreparedDataset) -> None:
    found = verify(old)
    assert found.info.targets == dataset.info.targets
    for name, split in dataset.info.splits.items():
        assert found.info.splits[name].targets == split.targets
        assert found.split(name).fingerprint == dataset.split(name).fingerprint
        for i in range(split.count):
            here, there = found.split(name).decode(i), dataset.split(name).decode(i)
            assert all(np.array_equal(here.targets[task], there.targets[task]) for task in there.targets)
    assert DatasetInfo.from_json(json.loads(json.dumps(found.info.to_json()))) == found.info


def test_a_training_on_format_2_is_the_same_and_its_checkpoint_evaluates(
    old: Path, prepared: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    new_metrics = train(make_config("epochs=1", "log.pictures=0"))
    config = make_config("epochs=1", "log.pictures=0", f"data.root={old}", f"run_dir={tmp_path / 'old_run'}")
    assert train(config) == new_metrics
    state, loaded, _ = load_run(Path(config.run_dir), [])
    step = load_step(state, loaded, CPU)
    batch = next(make_loader(loaded.data, PreparedDataset(old).split("val"), EvalOrder(5, batch_size=2), CPU).batches())
    assert step.predict(batch["image"]).keys() == {"segmentation", "depth"}


def test_preparing_again_leaves_a_dataset_of_format_2_alone(
    old: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (old / "dataset.json").read_bytes()
    prepare("folder", prepared.parent / "source", old, height=HEIGHT, width=WIDTH, shard_size=4, workers=0)
    assert "is complete" in " ".join(capsys.readouterr().out.split())
    assert (old / "dataset.json").read_bytes() == before
