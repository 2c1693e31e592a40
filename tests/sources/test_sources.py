"""Each source's conventions pixel by pixel on tiny trees, and errors that name the folder, file or key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtunet_dist.config import plugin_options
from mtunet_dist.data.report import table
from mtunet_dist.errors import InputError
from mtunet_dist.prepare import prepare
from mtunet_dist.sources.cityscapes import Cityscapes
from mtunet_dist.sources.folder import Folder
from mtunet_dist.sources.nyuv2 import VALIDATION, NYUv2
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.segmentation import VOID, ClassInfo

CITY_IDS = np.arange(36, dtype=np.uint8).reshape(6, 6).clip(0, 33)  # every label id
CITY_DISPARITY = np.array([0, 1, 2, 257, 12345, 65535] * 6, dtype=np.uint16).reshape(6, 6)
BASELINE, FX = 0.2, 2000.0


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_cityscapes(root: Path, split: str = "train", name: str = "aachen_000000_000019", cameras: bool = True) -> None:
    city = name.split("_")[0]
    save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", noise(6, 6))
    save(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", CITY_IDS)
    save(root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", CITY_DISPARITY)
    save(root / "disparity" / split / city / f"{name}_disparity.png", CITY_DISPARITY)
    if cameras:
        camera = root / "camera" / split / city / f"{name}_camera.json"
        camera.parent.mkdir(parents=True, exist_ok=True)
        camera.write_text(json.dumps({"extrinsic": {"baseline": BASELINE}, "intrinsic": {"fx": FX}}))


def make_nyu(root: Path, split: str, key: str) -> None:
    save(root / split / "rgb" / f"{key}.jpg", noise(3, 5))
    save(root / split / "label13" / f"{key}.png", np.arange(15, dtype=np.uint8).reshape(3, 5).clip(0, 13))
    save(root / split / "depth" / f"{key}.png", np.full((3, 5), 2500, dtype=np.uint16))


def make_folder(root: Path, yaml: str = "classes: [a, b, c]\n") -> Path:
    root.mkdir(exist_ok=True)
    (root / "dataset.yaml").write_text(yaml)
    save(root / "train" / "rgb" / "x.png", noise(4, 4))
    save(root / "train" / "label" / "x.png", np.array([[0, 1, 2, 255]] * 4, dtype=np.uint8))
    save(root / "train" / "depth" / "x.png", np.full((4, 4), 1000, dtype=np.uint16))
    return root


def read_folder(root: Path) -> None:
    source = Folder(root)
    for sample in source.splits()["train"]:
        source.read(sample)


def test_cityscapes_7_classes_of_every_label_id(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    source = Cityscapes(tmp_path)
    label = source.read(source.splits()["train"][0]).targets["segmentation"].ravel()[:34].tolist()
    assert label == [VOID] * 7 + [0] * 4 + [1] * 6 + [2] * 4 + [3] * 2 + [4] + [5] * 2 + [6] * 8
    names = [c.name for c in source.targets["segmentation"].classes]
    assert names == ["flat", "construction", "object", "nature", "sky", "human", "vehicle"]


def test_cityscapes_19_classes_are_the_official_train_ids(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    source = Cityscapes(tmp_path, classes=19)
    label = source.read(source.splits()["train"][0]).targets["segmentation"].ravel()[:34]
    train_ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert [int(label[i]) for i in train_ids] == list(range(19))
    assert (np.delete(label, train_ids) == VOID).all()
    assert source.targets["segmentation"].classes[13] == ClassInfo("car", (0, 0, 142))


def test_cityscapes_2_classes_are_background_and_foreground(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    source = Cityscapes(tmp_path, classes=2)
    label = source.read(source.splits()["train"][0]).targets["segmentation"].ravel()[:34].tolist()
    assert label == [VOID] * 7 + [0] * 17 + [1] * 10
    assert [c.name for c in source.targets["segmentation"].classes] == ["background", "foreground"]


UNEVALUATED = [9, 10, 14, 15, 16, 18, 29, 30]  # ignoreInEval in cityscapesScripts, of the ids in a category


@pytest.mark.parametrize("classes", [2, 7, 19])
def test_cityscapes_ids_without_evaluation_can_be_void(tmp_path: Path, classes: Any) -> None:
    make_cityscapes(tmp_path)
    keep, void = Cityscapes(tmp_path, classes=classes), Cityscapes(tmp_path, classes=classes, unevaluated="void")
    sample = keep.splits()["train"][0]
    kept, without = (source.read(sample).targets["segmentation"].ravel()[:34] for source in (keep, void))
    assert (without[UNEVALUATED] == VOID).all()
    assert (kept[UNEVALUATED] == VOID).all() == (classes == 19)
    np.testing.assert_array_equal(np.delete(kept, UNEVALUATED), np.delete(without, UNEVALUATED))


@pytest.mark.parametrize("classes", [2, 7, 19])
@pytest.mark.parametrize("unevaluated", ["keep", "void"])
def test_cityscapes_minus_1_is_void(tmp_path: Path, classes: Any, unevaluated: Any) -> None:
    make_cityscapes(tmp_path)
    path = tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    save(path, np.full((6, 6), -1, dtype=np.int16).astype(np.uint8))
    source = Cityscapes(tmp_path, classes=classes, unevaluated=unevaluated)
    assert (source.read(source.splits()["train"][0]).targets["segmentation"] == VOID).all()


@pytest.mark.parametrize("depth", ["metric", "inverse"])
def test_prepared_cityscapes_equals_a_reading_of_its_own(tmp_path: Path, depth: str) -> None:
    """From official names and quirks to shards, against cityscapesScripts' table as text and PIL."""
    categories = "0" * 7 + "1" * 4 + "2" * 6 + "3" * 4 + "4" * 2 + "5" + "6" * 2 + "7" * 8  # catId of id 0..33
    root = tmp_path / "cityscapes"
    names = ("aachen_000000_000019", "bochum_000000_000313")
    for split in ("train", "val"):
        for name in names:
            make_cityscapes(root, split, name)
    options = {"classes": 7, "depth": depth}
    made = prepare("cityscapes", root, tmp_path / "out", height=6, width=6, rgb_format="png", options=options)
    assert made.info.settings.options == {
        "classes": 7,
        "unevaluated": "keep",
        "depth": depth,
        "test": False,
        "normals": False,
    }
    split = made.split("val")
    assert split.keys == list(names)
    for i, name in enumerate(names):
        stored, city = split.decode(i), name.split("_")[0]
        with Image.open(root / f"leftImg8bit/val/{city}/{name}_leftImg8bit.png") as image:
            np.testing.assert_array_equal(stored.rgb, np.asarray(image))
        with Image.open(root / f"gtFine/val/{city}/{name}_gtFine_labelIds.png") as image:
            expected = [int(categories[value]) - 1 for value in np.asarray(image).ravel()]
        assert stored.targets["segmentation"].ravel().tolist() == [VOID if c < 0 else c for c in expected]
        with Image.open(root / f"disparity/val/{city}/{name}_disparity.png") as image:
            p = np.asarray(image).ravel().tolist()
        if depth == "inverse":
            values = [(x - 1) / 65536 if x > 0 else 0.0 for x in p]
        else:
            metres = [BASELINE * FX / ((x - 1) / 256) if x > 1 else 0.0 for x in p]
            values = [m if m < 256 else 0.0 for m in metres]
        found = (stored.targets["depth"] * made.info.targets["depth"].scale).ravel().tolist()
        assert found == pytest.approx(values, abs=1 / 512 if depth == "metric" else 1e-12)


def test_cityscapes_options_can_be_given_as_words() -> None:
    options = plugin_options("source", "cityscapes", ["classes=19", "depth=inverse"])
    assert options == {"classes": 19, "unevaluated": "keep", "depth": "inverse", "test": False, "normals": False}
    with pytest.raises(InputError, match="classes"):
        plugin_options("source", "cityscapes", ["classes=20"])


def test_cityscapes_metric_depth_is_baseline_times_fx_over_disparity(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    source = Cityscapes(tmp_path)
    depth = source.read(source.splits()["train"][0]).targets["depth"]
    assert depth.dtype == np.uint16
    # p = 0 is invalid, 1 infinitely far, 2 and 257 beyond 256 m.
    expected = [0, 0, 0, 0, BASELINE * FX / (12344 / 256), BASELINE * FX / (65534 / 256)]
    assert depth[0] * source.targets["depth"].scale == pytest.approx(expected, abs=1 / 512)


def test_cityscapes_inverse_depth_equals_mtan_and_needs_no_camera(tmp_path: Path) -> None:
    make_cityscapes(tmp_path, cameras=False)
    source = Cityscapes(tmp_path, depth="inverse")
    depth = source.read(source.splits()["train"][0]).targets["depth"] * source.targets["depth"].scale
    expected = np.where(CITY_DISPARITY > 0, (CITY_DISPARITY - 1.0) / 65536, 0)
    np.testing.assert_array_equal(depth, expected)


def test_cityscapes_splits_are_sorted_and_test_comes_on_request(tmp_path: Path) -> None:
    for name in ("zurich_000000_000019", "aachen_000001_000019", "aachen_000000_000019"):
        make_cityscapes(tmp_path, "train", name)
    make_cityscapes(tmp_path, "test", "berlin_000000_000019")
    assert list(Cityscapes(tmp_path, test=True).splits()) == ["train", "test"]
    splits = Cityscapes(tmp_path).splits()
    assert list(splits) == ["train"]
    assert [s.key for s in splits["train"]] == ["aachen_000000_000019", "aachen_000001_000019", "zurich_000000_000019"]


def test_cityscapes_without_cameras_says_that_inverse_depth_exists(tmp_path: Path) -> None:
    make_cityscapes(tmp_path, cameras=False)
    with pytest.raises(InputError, match="depth=inverse"):
        Cityscapes(tmp_path).splits()


def test_cityscapes_names_the_sample_whose_camera_is_missing_or_broken(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    make_cityscapes(tmp_path, name="aachen_000001_000019")
    camera = tmp_path / "camera/train/aachen/aachen_000001_000019_camera.json"
    camera.write_text('{"extrinsic": {}}')
    source = Cityscapes(tmp_path)
    with pytest.raises(InputError, match=r"aachen_000001_000019_camera\.json.*baseline"):
        source.read(source.splits()["train"][1])
    camera.unlink()
    with pytest.raises(InputError, match=r"aachen_000001_000019_leftImg8bit\.png.*depth=inverse"):
        source.splits()


def test_cityscapes_names_the_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leftImg8bit"):
        Cityscapes(tmp_path).splits()
    save(tmp_path / "leftImg8bit/train/a/a_0_0_leftImg8bit.png", noise(2, 2))
    with pytest.raises(InputError, match="gtFine/train"):
        Cityscapes(tmp_path).splits()


def test_nyu_labels_shift_by_one_and_depth_is_millimetres(tmp_path: Path) -> None:
    make_nyu(tmp_path, "train", "0003")
    make_nyu(tmp_path, "test", "0001")
    source = NYUv2(tmp_path)
    sample = source.read(source.splits()["train"][0])
    assert sample.targets["segmentation"].ravel().tolist() == [VOID, *range(13), 12]
    assert sample.targets["depth"][0, 0] * source.targets["depth"].scale == pytest.approx(2.5)
    assert [c.name for c in source.targets["segmentation"].classes][::12] == ["bed", "window"]


def test_nyu_validation_part_is_taken_out_of_train(tmp_path: Path) -> None:
    assert len(VALIDATION) == 100
    for key in ("0005", "0006"):
        make_nyu(tmp_path, "train", key)
    make_nyu(tmp_path, "test", "0048")  # would be validation, were it in train

    def keys(source: NYUv2) -> dict[str, list[str]]:
        return {name: [s.key for s in samples] for name, samples in source.splits().items()}

    assert keys(NYUv2(tmp_path)) == {"train": ["0005"], "val": ["0006"], "test": ["0048"]}
    assert keys(NYUv2(tmp_path, val=False)) == {"train": ["0005", "0006"], "test": ["0048"]}


def test_folder_maps_offset_and_void_ids_and_takes_colours(tmp_path: Path) -> None:
    yaml = "classes: [{name: a, color: [1, 2, 3]}, b]\nlabel_offset: 1\nvoid_ids: [0, 255]\ndepth_kind: inverse\n"
    root = make_folder(tmp_path / "data", yaml)
    source = Folder(root)
    assert source.read(source.splits()["train"][0]).targets["segmentation"][0].tolist() == [VOID, 0, 1, VOID]
    classes = source.targets["segmentation"].classes
    assert classes[0].color == (1, 2, 3) and classes[1].name == "b"
    assert source.targets["depth"] == Depth("depth", "inverse", "1", 0.001)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("label_offset: 0", "'classes' is missing"),
        ("classes: [a]\nclases: [b]", "unknown key 'clases'"),
        ("classes: []", "classes is"),
        ("classes: [{name: a, colour: [0, 0, 0]}]", "class 0 is"),
        ("classes: [a]\ndepth_kind: disparity", "depth_kind is 'disparity'; expected metric or inverse"),
        ("classes: [a]\ndepth_scale: 0", "depth_scale is 0"),
        ("classes: [a]\nvoid_ids: 255", "void_ids is 255"),
        ("classes: [a, b]\nlabel_offset: 255", "label_offset 255"),
        ("classes: [a", "not YAML"),
    ],
)
def test_folder_description_errors_name_file_and_key(tmp_path: Path, yaml: str, message: str) -> None:
    (tmp_path / "dataset.yaml").write_text(yaml)
    with pytest.raises(InputError, match=r"dataset\.yaml") as error:
        Folder(tmp_path)
    assert message in str(error.value)


def test_folder_names_the_file_without_partner(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    save(root / "train/rgb/lonely.png", noise(4, 4))
    with pytest.raises(InputError, match=r"rgb/lonely\.png has no label and no depth .* allow_unlabelled=true"):
        Folder(root).splits()
    raw = Folder(root, allow_unlabelled=True)
    lonely = raw.read(raw.splits()["train"][0])
    assert (lonely.targets["segmentation"] == VOID).all() and (lonely.targets["depth"] == 0).all() and lonely.rgb.any()


@pytest.mark.parametrize("part", ["label", "depth"])
def test_folder_names_a_target_without_image(tmp_path: Path, part: str) -> None:
    root = make_folder(tmp_path / "data")
    (root / "train" / part / "x.png").rename(root / "train" / part / "y.png")
    for options in ({}, {"allow_unlabelled": True}):
        with pytest.raises(InputError, match=rf"{part}/y\.png has no rgb file beside it"):
            Folder(root, **options).splits()


@pytest.mark.parametrize("part", ["label", "depth"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_folder_sample_without_a_target_is_masked(tmp_path: Path, part: str, whole_folder: bool) -> None:
    root = make_folder(tmp_path / "data")
    for name in () if whole_folder else ("y",):
        for other in ("rgb", "label", "depth"):
            shutil.copy(root / "train" / other / "x.png", root / "train" / other / f"{name}.png")
    (root / "train" / part / "x.png").unlink()
    if whole_folder:
        (root / "train" / part).rmdir()
    source = Folder(root)
    sample = source.splits()["train"][0]
    source.check(sample)
    raw = source.read(sample)
    assert (raw.targets["segmentation"] == VOID).all() == (part == "label")
    assert (raw.targets["depth"] == 0).all() == (part == "depth")
    made = prepare("folder", root, tmp_path / "out", height=4, width=4)
    split = made.info.splits["train"]
    without = {name: counts["samples_without"] for name, counts in split.targets.items()}
    assert without == {"segmentation": part == "label", "depth": part == "depth"}
    rows = list(table(made).columns[0].cells)
    assert f"without {part}" in rows and len([row for row in rows if "without" in str(row)]) == 1
    stored = made.split("train").decode(0)
    for name, target in raw.targets.items():
        np.testing.assert_array_equal(stored.targets[name], target)


def test_folder_suspects_a_misspelt_part(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    (root / "train/label").rename(root / "train/labels")
    with pytest.raises(InputError, match=r"train/label does not exist\. Did you mean 'labels'"):
        Folder(root).splits()


def test_folder_of_a_part_must_not_be_empty(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    (root / "train/label/x.png").unlink()
    with pytest.raises(InputError, match=r"train/label holds no"):
        Folder(root).splits()
    shutil.rmtree(root / "train/label")
    shutil.rmtree(root / "train/rgb")
    with pytest.raises(InputError, match=r"train/rgb does not exist"):
        Folder(root).splits()


def test_folder_rejects_names_that_a_tar_member_cannot_have(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    for part in ("rgb", "label", "depth"):
        (root / "train" / part / "x.png").rename(root / "train" / part / "x.1.png")
    with pytest.raises(InputError, match=r"x\.1\.png"):
        Folder(root).splits()


def test_folder_rejects_two_files_of_one_name(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    save(root / "train/rgb/x.jpg", noise(4, 4))
    with pytest.raises(InputError, match=r"x\.png and x\.jpg"):
        Folder(root).splits()


def test_label_value_outside_the_classes_names_file_value_and_valid_ids(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    save(root / "train/label/x.png", np.full((4, 4), 3, dtype=np.uint8))
    with pytest.raises(InputError, match=r"label/x\.png: label value 3 is not one of 0\.\.2, 255"):
        read_folder(root)


def test_cityscapes_rejects_label_ids_it_does_not_define(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    path = tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    save(path, np.full((6, 6), 34, dtype=np.uint8))
    source = Cityscapes(tmp_path)
    with pytest.raises(InputError, match=r"labelIds\.png: label value 34 is not one of 0\.\.33"):
        source.read(source.splits()["train"][0])
