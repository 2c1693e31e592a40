"""``mtan`` on npy folders as that project publishes them, against NumPy alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtunet_dist.errors import InputError
from mtunet_dist.prepare import prepare
from mtunet_dist.sources.cityscapes import Cityscapes
from mtunet_dist.sources.mtan import MTAN
from mtunet_dist.sources.nyuv2 import NYUv2
from mtunet_dist.tasks.segmentation import VOID

HEIGHT, WIDTH = 6, 8
CLASSES = {"label": 13, "label_2": 2, "label_7": 7, "label_19": 19}


def arrays(labels: str, split: str, i: int) -> dict[str, np.ndarray]:
    """A sample as MTAN's own data loader gets it. Cityscapes: every disparity up to the largest there is, 32257."""
    random = np.random.default_rng([i, len(split)])
    shape = HEIGHT, WIDTH
    if labels == "label":
        depth = random.uniform(0.7, 10, shape).astype(np.float32)
        depth[random.random(shape) < 0.2] = 0
    else:
        p = random.integers(0, 32258, shape)
        p[0, :4] = 0, 1, 2, 32257
        depth = np.maximum((p - 1) / 65536, 0).astype(np.float32)
    return {
        "image": (random.integers(0, 256, (*shape, 3)) / 255).astype(np.float32),
        labels: random.integers(-1, CLASSES[labels], shape).astype(np.float32),
        "depth": depth[:, :, None],
    }


def save(root: Path, split: str, folder: str, i: int, array: np.ndarray) -> Path:
    path = root / split / folder / f"{i}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def tree(root: Path, labels: str = "label", count: int = 3) -> Path:
    for split in ("train", "val"):
        for i in range(count):
            for folder, array in arrays(labels, split, i).items():
                save(root, split, folder, i, array)
    return root


def first(root: Path, labels: Any = "label") -> Any:
    """The first training sample, checked as ``prepare`` does, then read."""
    source = MTAN(root, labels=labels)
    sample = source.splits()["train"][0]
    source.check(sample)
    return source.read(sample)


@pytest.mark.parametrize("labels", CLASSES)
def test_prepared_arrays_are_those_of_the_files(tmp_path: Path, labels: str) -> None:
    root = tree(tmp_path / "mtan", labels)
    out = tmp_path / "out"
    made = prepare("mtan", root, out, height=HEIGHT, width=WIDTH, rgb_format="png", options={"labels": labels})
    assert made.info.settings.options == {"labels": labels, "normals": False}
    assert len(made.info.targets["segmentation"].classes) == CLASSES[labels]
    for name in ("train", "val"):
        split = made.split(name)
        assert split.keys == ["0000", "0001", "0002"]
        for i in range(3):
            stored, files = split.decode(i), arrays(labels, name, i)
            np.testing.assert_array_equal(stored.rgb, np.round(files["image"] * 255))
            label = stored.targets["segmentation"].astype(int)
            np.testing.assert_array_equal(np.where(label == VOID, -1, label), files[labels])
            depth = (stored.targets["depth"] * made.info.targets["depth"].scale).astype(np.float32)
            if labels == "label":
                np.testing.assert_array_equal(depth == 0, files["depth"][:, :, 0] == 0)
                np.testing.assert_allclose(depth, files["depth"][:, :, 0], rtol=0, atol=0.000501)
            else:
                np.testing.assert_array_equal(depth, files["depth"][:, :, 0])


def test_classes_and_depth_are_those_of_the_datasets_own_sources(tmp_path: Path) -> None:
    nyu = MTAN(tmp_path)
    assert nyu.targets == NYUv2(tmp_path).targets
    for n in (2, 7, 19):
        mtan: Any = MTAN(tmp_path, labels=f"label_{n}")
        theirs = Cityscapes(tmp_path, classes=n, depth="inverse")
        assert mtan.targets == theirs.targets


def test_same_cityscapes_pixels_by_either_way(tmp_path: Path) -> None:
    """What MTAN did to a disparity map and what ``cityscapes`` does to it agree for every value."""
    p = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    mtan = np.where(p > 0, (p.astype(np.float64) - 1) / 65536, 0).astype(np.float32)
    for folder, array in (
        ("image", np.zeros((256, 256, 3))),
        ("label_7", np.zeros((256, 256))),
        ("depth", mtan[:, :, None]),
    ):
        save(tmp_path, "train", folder, 0, array)
        save(tmp_path, "val", folder, 0, array)
    np.testing.assert_array_equal(first(tmp_path, "label_7").targets["depth"], np.maximum(p.astype(int) - 1, 0))


def test_samples_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    tree(tmp_path, count=12)
    names = [sample.rgb.name for sample in MTAN(tmp_path).splits()["train"]]
    assert names == [f"{i}.npy" for i in range(12)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64])
def test_images_of_0_to_255(tmp_path: Path, dtype: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(dtype)
    save(tree(tmp_path), "train", "image", 0, image)
    np.testing.assert_array_equal(first(tmp_path).rgb, image)


def test_image_that_overshoots_1_by_rounding(tmp_path: Path) -> None:
    image = np.full((HEIGHT, WIDTH, 3), np.nextafter(np.float32(1), np.float32(2)))
    save(tree(tmp_path), "train", "image", 0, image)
    assert (first(tmp_path).rgb == 255).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1], "values from 0 to 1 may mean 0..1 as well as 0..255"),
        ([0, 1.5], "values from 0 to 1.5 may mean"),
        ([-1, 1], "values from -1 to 1; expected 0..1 or 0..255"),
        ([0, 256], "values from 0 to 256; expected"),
        ([0, np.nan], "expected 0..1 or 0..255"),
    ],
)
def test_images_of_unclear_range(tmp_path: Path, values: list[float], message: str) -> None:
    image = np.resize(np.array(values, dtype=np.float32), (HEIGHT, WIDTH, 3))
    path = save(tree(tmp_path), "train", "image", 0, image)
    fails(tmp_path, path, message)


def fails(root: Path, path: Path, message: str, labels: Any = "label") -> None:
    """One line that names ``path`` and holds ``message``."""
    with pytest.raises(InputError, match=re.escape(message)) as error:
        first(root, labels)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.001, 70])
def test_impossible_depth(tmp_path: Path, value: float) -> None:
    depth = arrays("label", "train", 0)["depth"]
    depth[2, 3] = value
    fails(tmp_path, save(tree(tmp_path), "train", "depth", 0, depth), f"depth {value:g} is not one of 0..65.535")


@pytest.mark.parametrize(("labels", "value"), [("label", 13), ("label_7", 7), ("label", -2), ("label", 0.5)])
def test_label_out_of_range(tmp_path: Path, labels: str, value: float) -> None:
    label = arrays(labels, "train", 0)[labels]
    label[2, 3] = value
    message = f"label value {value:g} is not one of -1..{CLASSES[labels] - 1}"
    fails(tmp_path, save(tree(tmp_path, labels), "train", labels, 0, label), message, labels)


def test_nan_label(tmp_path: Path) -> None:
    label = np.full((HEIGHT, WIDTH), np.nan, dtype=np.float32)
    fails(tmp_path, save(tree(tmp_path), "train", "label", 0, label), "label value nan")


@pytest.mark.parametrize(
    ("folder", "shape"),
    [
        ("image", (3, HEIGHT, WIDTH)),
        ("image", (HEIGHT, WIDTH)),
        ("image", (HEIGHT, WIDTH, 4)),
        ("label", (HEIGHT, WIDTH, 1)),
        ("label", (HEIGHT, WIDTH + 1)),
        ("depth", (HEIGHT, WIDTH)),
        ("depth", (1, HEIGHT, WIDTH)),
    ],
)
def test_wrong_shape(tmp_path: Path, folder: str, shape: tuple[int, ...]) -> None:
    path = save(tree(tmp_path), "train", folder, 0, np.zeros(shape, dtype=np.float32))
    fails(tmp_path, path, f"shape {shape}; expected (")


@pytest.mark.parametrize("array", [np.array([[None]]), np.array([["a"]]), np.zeros((HEIGHT, WIDTH), dtype=complex)])
def test_not_numbers(tmp_path: Path, array: np.ndarray) -> None:
    path = save(tree(tmp_path), "train", "label", 0, array)
    fails(tmp_path, path, "numbers")


@pytest.mark.parametrize("keep", [0, 10, 100, -4])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = tree(tmp_path) / "train/depth/0.npy"
    path.write_bytes(path.read_bytes()[:keep])
    fails(tmp_path, path, "not a complete npy file")


def test_archive_that_is_named_npy(tmp_path: Path) -> None:
    path = tree(tmp_path) / "train/depth/0.npy"
    with path.open("wb") as file:
        np.savez(file, np.zeros((HEIGHT, WIDTH, 1)))
    fails(tmp_path, path, "not a complete npy file")


def test_missing_partner_and_folder(tmp_path: Path) -> None:
    (tree(tmp_path) / "val/depth/1.npy").unlink()
    fails(tmp_path, tmp_path / "val/image/1.npy", "has no depth file beside it")
    fails(tmp_path, tmp_path / "train/label_7", "does not exist", "label_7")
    (tmp_path / "val/depth/1.npy").touch()
    (tmp_path / "train/image/a.npy").touch()
    fails(tmp_path, tmp_path / "train/image/a.npy", "not a number")


def test_no_arrays_at_all(tmp_path: Path) -> None:
    for path in tree(tmp_path).glob("train/label/*.npy"):
        path.unlink()
    fails(tmp_path, tmp_path / "train/label", "holds no .npy file")
