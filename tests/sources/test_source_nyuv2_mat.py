"""``nyuv2_mat`` on files with the official datasets, shapes and axes, against what was put into them."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from mtunet_dist.errors import InputError
from mtunet_dist.prepare import prepare
from mtunet_dist.sources.nyuv2 import NYUv2
from mtunet_dist.sources.nyuv2_mat import ImageNumber, NYUv2Mat
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.segmentation import VOID

COUNT, WIDTH, HEIGHT = 1449, 640, 480
OFFICIAL = {
    "images": ((COUNT, 3, WIDTH, HEIGHT), "u1"),
    "labels": ((COUNT, WIDTH, HEIGHT), "<u2"),
    "depths": ((COUNT, WIDTH, HEIGHT), "<f4"),
    "rawDepths": ((COUNT, WIDTH, HEIGHT), "<f4"),
}
INDICES = (1, 3, 6)  # of test, train and val

# Official names of some raw labels, their class of 40 and of 13: from the published lists, not from the package.
KNOWN = {
    3: ("cabinet", "furniture"),
    4: ("ceiling", "ceiling"),
    5: ("chair", "chair"),
    11: ("floor", "floor"),
    19: ("table", "table"),
    21: ("wall", "wall"),
    24: ("sink", "objects"),
    28: ("door", "wall"),
    59: ("window", "window"),
    64: ("picture", "picture"),
    83: ("sofa", "sofa"),
    85: ("books", "books"),
    157: ("bed", "bed"),
    172: ("television", "tv"),
}


def content(index: int) -> dict[str, np.ndarray]:
    """An image as MATLAB shows it: (480, 640, 3) and (480, 640)."""
    random = np.random.default_rng(index)
    shape = HEIGHT, WIDTH
    depths = random.uniform(0.7, 10, shape).astype(np.float32)
    raw = np.where(random.random(shape) < 0.2, 0, depths + 0.25).astype(np.float32)
    labels = random.integers(0, 895, shape).astype(np.uint16)
    labels[0, :895] = np.arange(WIDTH)
    images = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
    images[:, :, 1] = np.arange(HEIGHT)[:, None] // 2
    return {"images": images, "labels": labels, "depths": depths, "rawDepths": raw}


def write(path: Path, contents: dict[int, dict[str, np.ndarray]], **changes: Any) -> Path:
    """A file of the official form; ``changes`` are other shapes and types, or None for a missing dataset."""
    with h5py.File(path, "w", userblock_size=512) as file:  # MATLAB puts its own header before HDF5's
        for name, what in {**OFFICIAL, **changes}.items():
            if what is None:
                continue
            shape, dtype = what
            dataset = file.create_dataset(name, shape, dtype, chunks=(1, *shape[1:]), compression="gzip")
            for index, image in contents.items():
                dataset[index - 1] = image[name].transpose()  # MATLAB's axes as HDF5 has them
        file.create_group("#refs#")
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Sun Mar 10 2013")
    return path


@pytest.fixture(scope="module")
def mat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nyu")
    return write(folder / "nyu_depth_v2_labeled.mat", {index: content(index) for index in INDICES})


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A file whose arrays are all zero, and small."""
    return write(tmp_path / "empty.mat", {})


def change(path: Path, name: str, index: int, value: float) -> Path:
    with h5py.File(path, "r+") as file:
        file[name][index - 1, 5, 7] = value
    return path


@pytest.mark.parametrize("index", INDICES)
def test_pixels_are_those_that_matlab_shows(mat: Path, index: int) -> None:
    expected = content(index)
    source = NYUv2Mat(mat)
    sample = source.read(ImageNumber(index))
    np.testing.assert_array_equal(sample.rgb, expected["images"])
    label, depth = sample.targets["segmentation"], sample.targets["depth"]
    assert (sample.rgb.dtype, label.dtype, depth.dtype) == (np.uint8, np.uint8, np.uint16)
    np.testing.assert_allclose(depth * source.targets["depth"].scale, expected["depths"], rtol=0, atol=0.000501)
    np.testing.assert_array_equal(label == VOID, expected["labels"] == 0)


def test_raw_depth_keeps_invalid_pixels(mat: Path) -> None:
    source = NYUv2Mat(mat, depth="raw")
    sample, expected = source.read(ImageNumber(3)), content(3)["rawDepths"]
    np.testing.assert_array_equal(sample.targets["depth"] == 0, expected == 0)
    np.testing.assert_array_equal(sample.targets["depth"], np.round(expected.astype(np.float64) * 1000))


def test_crop_leaves_the_usual_rectangle(mat: Path) -> None:
    cropped, whole = NYUv2Mat(mat, crop=True).read(ImageNumber(3)), content(3)
    np.testing.assert_array_equal(cropped.rgb, whole["images"][45:471, 41:601])
    assert cropped.rgb.shape == (426, 560, 3)
    assert cropped.targets["segmentation"].shape == cropped.targets["depth"].shape == (426, 560)
    last_row = whole["depths"][470, 41:601].astype(np.float64)
    np.testing.assert_array_equal(cropped.targets["depth"][-1], np.round(last_row * 1000))


@pytest.mark.parametrize("classes", [13, 40])
def test_known_labels_get_their_published_class(mat: Path, classes: Any) -> None:
    source = NYUv2Mat(mat, classes=classes)
    label, raw = source.read(ImageNumber(1)).targets["segmentation"], content(1)["labels"]
    names = [c.name for c in source.targets["segmentation"].classes]
    assert len(names) == len(set(names)) == len({c.color for c in source.targets["segmentation"].classes}) == classes
    for number, (of_40, of_13) in KNOWN.items():
        found = set(label[raw == number].tolist())
        assert found == {names.index(of_40 if classes == 40 else of_13)}, number
    assert set(np.unique(label).tolist()) == {*range(classes), VOID}


def test_13_classes_are_those_of_the_image_folders_and_of_one_40_class_each(mat: Path) -> None:
    assert NYUv2Mat(mat).targets["segmentation"] == NYUv2(mat.parent).targets["segmentation"]
    fine = NYUv2Mat(mat, classes=40).read(ImageNumber(1)).targets["segmentation"]
    coarse = NYUv2Mat(mat).read(ImageNumber(1)).targets["segmentation"]
    for c in range(40):
        assert len(np.unique(coarse[fine == c])) == 1


def test_split_is_the_official_one_and_val_comes_out_of_train(mat: Path) -> None:
    official = NYUv2Mat(mat, val=False).splits()
    assert {name: len(samples) for name, samples in official.items()} == {"train": 795, "test": 654}
    assert [s.index for s in official["train"]][:6] == [3, 4, 5, 6, 7, 8]
    assert [s.index for s in official["test"]][:6] == [1, 2, 9, 14, 15, 16]
    assert sorted(s.index for samples in official.values() for s in samples) == list(range(1, 1450))
    ours = NYUv2Mat(mat).splits()
    assert {name: len(samples) for name, samples in ours.items()} == {"train": 695, "val": 100, "test": 654}
    assert ours["val"][0].key == "0006" and ours["test"] == official["test"]
    assert sorted(ours["train"] + ours["val"], key=lambda s: s.key) == official["train"]


def test_folder_of_the_file_may_be_given(mat: Path) -> None:
    np.testing.assert_array_equal(NYUv2Mat(mat.parent).read(ImageNumber(1)).rgb, NYUv2Mat(mat).read(ImageNumber(1)).rgb)


def test_open_source_can_be_pickled(mat: Path) -> None:
    source = NYUv2Mat(mat)
    source.splits()
    data = pickle.dumps(source)
    assert len(data) < 20_000
    np.testing.assert_array_equal(pickle.loads(data).read(ImageNumber(6)).rgb, content(6)["images"])


@pytest.mark.parametrize("workers", [0, 2])
def test_prepare_resizes_and_says_what_it_made(
    mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    few = {"train": [ImageNumber(3), ImageNumber(6)], "test": [ImageNumber(1)]}
    monkeypatch.setattr(NYUv2Mat, "splits", lambda self: few)
    options = {"classes": 40, "depth": "raw"}
    dataset = prepare(
        "nyuv2_mat", mat, tmp_path / "out", height=96, width=128, shard_size=1, workers=workers, options=options
    )
    info = dataset.info
    assert info.settings.options == {"classes": 40, "depth": "raw", "val": True, "crop": False, "normals": False}
    assert info.targets["depth"] == Depth.metric_depth(0.001)
    for name, samples in few.items():
        split = dataset.split(name)
        for i, sample in enumerate(samples):
            assert split.keys[i] == f"{sample.index:04d}"
            depth = Image.fromarray(content(sample.index)["rawDepths"]).resize((128, 96), Image.Resampling.NEAREST)
            stored = split.decode(i).targets["depth"]
            np.testing.assert_allclose(stored / 1000, np.asarray(depth), rtol=0, atol=0.000501)


def fails(path: Path, message: str, index: int | None = None, **options: Any) -> None:
    """Opening, or reading the image ``index``, ends with one line that names the file and fits ``message``."""
    source = NYUv2Mat(path, **options)
    with pytest.raises(InputError, match=message) as error:
        if index is None:
            source.splits()
        else:
            source.read(ImageNumber(index))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file_says_what_to_give(tmp_path: Path) -> None:
    fails(tmp_path / "none.mat", r"no such file; ROOT is nyu_depth_v2_labeled\.mat or its folder")
    fails(tmp_path, r"nyu_depth_v2_labeled\.mat: no such file")


def test_truncated_file(mat: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.mat"
    cut.write_bytes(mat.read_bytes()[:-1000])
    fails(cut, "not a complete HDF5 file .*truncated")


def test_other_kinds_of_file(tmp_path: Path) -> None:
    (tmp_path / "old.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(1000))
    fails(tmp_path / "old.mat", r"not a complete HDF5 file \(MATLAB v7\.3\)")


@pytest.mark.parametrize("name", ["images", "labels", "depths"])
def test_missing_dataset(tmp_path: Path, name: str) -> None:
    fails(write(tmp_path / "x.mat", {}, **{name: None}), f"no dataset '{name}'")


def test_raw_depths_are_needed_only_for_raw_depth(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mat", {}, rawDepths=None)
    assert NYUv2Mat(path).splits()["val"]
    fails(path, "no dataset 'rawDepths'", depth="raw")


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("images", (COUNT, HEIGHT, WIDTH, 3), "u1"),
        ("images", (COUNT, 3, WIDTH, HEIGHT), "<f4"),
        ("labels", (COUNT, WIDTH, HEIGHT), "u1"),
        ("labels", (654, WIDTH, HEIGHT), "<u2"),
        ("depths", (COUNT, WIDTH, HEIGHT), "<f8"),
    ],
)
def test_other_shapes_and_types(tmp_path: Path, name: str, shape: tuple[int, ...], dtype: str) -> None:
    path = write(tmp_path / "x.mat", {}, **{name: (shape, dtype)})
    found = re.escape(f"dataset '{name}' is {np.dtype(dtype).name} {shape}; expected")
    fails(path, found)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 66.0])
def test_impossible_depth_names_image_and_value(empty: Path, value: float) -> None:
    change(empty, "depths", 3, value)
    fails(empty, rf"'depths' of image 3: depth {value:g} is not one of 0\.\.65\.535", index=3)
    assert NYUv2Mat(empty).read(ImageNumber(4)).targets["depth"].max() == 0


@pytest.mark.parametrize("value", [895, 896, 65535])
def test_undefined_label_names_image_and_value(empty: Path, value: int) -> None:
    change(change(empty, "labels", 3, value), "labels", 4, 894)
    fails(empty, rf"'labels' of image 3: label value {value} is not one of 0\.\.894", index=3)
    assert NYUv2Mat(empty).read(ImageNumber(4)).targets["segmentation"][7, 5] != VOID


def test_damaged_chunk_names_image(mat: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(mat, tmp_path))
    with h5py.File(path) as file:
        chunk = file["labels"].id.get_chunk_info_by_coord((2, 0, 0))
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(bytes(200))
    fails(path, "'labels' of image 3: cannot be read", index=3)
    NYUv2Mat(path).read(ImageNumber(1))
