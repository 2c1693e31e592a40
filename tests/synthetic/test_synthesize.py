"""Synthetic street scenes: the same files from any number of processes, in the layout and formats of Cityscapes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtunet_dist.errors import InputError
from mtunet_dist.sources.cityscapes import CLASSES_7, CLASSES_19, EVALUATED
from mtunet_dist.synthesize import synthesize
from mtunet_dist.synthetic.geometry import Camera, Ellipsoid, box
from mtunet_dist.synthetic.objects import Body, corners
from mtunet_dist.synthetic.render import EGO_VEHICLE, OUT_OF_ROI, SKY, Rendering, render
from mtunet_dist.synthetic.scene import random_scene
from mtunet_dist.synthetic.stereo import MAX_DEPTH, metric_depth, stored_disparity
from mtunet_dist.synthetic.textures import plain
from mtunet_dist.synthetic.tree import CITIES, Settings, scene_files

SMALL = Settings(train=4, val=2, test=1, height=64, width=128)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tree written by this process."""
    out = tmp_path_factory.mktemp("tree") / "streets"
    synthesize(out, SMALL)
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_files_do_not_depend_on_the_number_of_processes(tree: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "again", SMALL, workers=3)
    assert contents(tmp_path / "again") == contents(tree)


def test_scenes_depend_on_seed_split_and_index_but_not_on_their_count(tree: Path, tmp_path: Path) -> None:
    pictures = [path.read_bytes() for path in tree.rglob("*_leftImg8bit.png")]
    assert len(set(pictures)) == len(pictures) == 7
    synthesize(tmp_path / "more", replace(SMALL, train=1, val=0, test=0))
    synthesize(tmp_path / "other", replace(SMALL, train=1, val=0, test=0, seed=1))
    files = [scene_files(out, "train", 0) for out in (tree, tmp_path / "more", tmp_path / "other")]
    first, fewer, reseeded = (paths["leftImg8bit"].read_bytes() for paths in files)
    assert first == fewer != reseeded


def test_layout_and_formats_are_those_of_cityscapes(tree: Path) -> None:
    for kind, end in (("leftImg8bit", "leftImg8bit.png"), ("gtFine", "gtFine_labelIds.png")):
        assert (tree / kind / "train" / "synth1" / f"synth1_000001_000019_{end}").is_file()
    assert (tree / "disparity/val/synth3/synth3_000001_000019_disparity.png").is_file()
    assert len(contents(tree)) == 7 * 5 + 1
    for split, index in (("train", 3), ("val", 0), ("test", 0)):
        files = scene_files(tree, split, index)
        modes = {kind: Image.open(files[kind]) for kind in ("leftImg8bit", "gtFine", "disparity")}
        assert {kind: image.mode for kind, image in modes.items()} == {
            "leftImg8bit": "RGB",
            "gtFine": "L",
            "disparity": "I;16",
        }
        assert all(image.size == (128, 64) for image in modes.values())
        camera = json.loads(files["camera"].read_text())
        assert camera["extrinsic"]["baseline"] == 0.209313
        assert set(camera["intrinsic"]) == {"fx", "fy", "u0", "v0"}


def test_disparity_and_camera_files_give_back_the_rendered_depth(tree: Path) -> None:
    for index in range(SMALL.train):
        files = scene_files(tree, "train", index)
        camera = json.loads(files["camera"].read_text())
        stored = np.asarray(Image.open(files["disparity"]))
        depth = metric_depth(stored, camera["extrinsic"]["baseline"], camera["intrinsic"]["fx"])
        inverse = render(random_scene(SMALL.seed, 0, index, SMALL.height, SMALL.width)).inverse
        valid = stored > 0
        assert 0.4 < valid.mean() < 0.95
        half_step = 1 / 512 / (camera["extrinsic"]["baseline"] * camera["intrinsic"]["fx"])
        np.testing.assert_allclose(1 / depth[valid], inverse[valid], rtol=1e-5, atol=half_step)
        assert depth[valid].max() <= MAX_DEPTH * 1.01 and stored.max() <= 32257


def test_quantisation_at_50_m_is_under_one_percent_at_the_default_size() -> None:
    camera = random_scene(0, 0, 0, 256, 512).camera
    exact = camera.baseline * camera.focal / np.linspace(45, 55, 200)
    depth = metric_depth(np.rint(exact * 256) + 1, camera.baseline, camera.focal)
    np.testing.assert_allclose(depth, np.linspace(45, 55, 200), rtol=0.01)


def test_sky_bonnet_and_border_have_no_depth(tree: Path) -> None:
    seen = set()
    for path in tree.rglob("*_labelIds.png"):
        labels = np.asarray(Image.open(path))
        name = path.name.replace("gtFine_labelIds", "disparity")
        stored = np.asarray(Image.open(tree / "disparity" / path.relative_to(tree / "gtFine").parent / name))
        for label in (SKY, EGO_VEHICLE, OUT_OF_ROI):
            assert not stored[labels == label].any()
        seen |= set(np.unique(labels))
    assert {SKY, EGO_VEHICLE, OUT_OF_ROI} <= seen


def test_all_seven_classes_are_common_and_none_dominates(tree: Path) -> None:
    labels = np.stack([np.asarray(Image.open(path)) for path in tree.rglob("*_labelIds.png")])
    assert set(np.unique(labels)) <= {EGO_VEHICLE, OUT_OF_ROI, *EVALUATED}
    for name, (_, ids) in CLASSES_7.items():
        share = np.isin(labels, ids).mean()
        assert 0.004 < share < 0.45, (name, share)


@pytest.mark.parametrize("split", ["train", "val"])
def test_all_nineteen_classes_are_frequent_enough_to_be_learnt(split: str) -> None:
    """In 48 scenes of the default seed: one pixel of a thousand, 130 in each picture of the default size."""
    scenes = (random_scene(0, list(CITIES).index(split), index, 64, 128) for index in range(48))
    labels = np.stack([render(scene).labels for scene in scenes])
    shares = {name: float((labels == label).mean()) for name, (_, label) in CLASSES_19.items()}
    assert min(shares.values()) > 0.001, shares


def test_depth_puts_labels_where_such_things_are() -> None:
    """Unprojecting a pixel with its depth lands on the ground for roads, and near it for people and cars."""
    seen = set()
    for index in range(12):
        scene = random_scene(5, 0, index, 64, 128)
        picture, camera = render(scene), scene.camera
        v, u = np.mgrid[: camera.height, : camera.width]
        rays = camera.rotation() @ np.stack(
            [((u - camera.u0) / camera.focal).ravel(), ((v - camera.v0) / camera.focal).ravel(), np.ones(u.size)]
        )
        labels, inverse = picture.labels.ravel(), picture.inverse.ravel()
        near = inverse > 1 / 100
        height = camera.mount + rays[1] / np.maximum(inverse, 1e-6)
        assert np.abs(height[near & np.isin(labels, (7, 8, 22))]).max() < 0.01
        for ids, top in (
            ((24,), 2.3),
            ((25, 26), 2.3),
            ((27, 28), 4.0),
            ((31,), 4.7),
            ((13, 32, 33), 1.9),
            ((11,), 40.0),
        ):
            found = height[near & np.isin(labels, ids)]
            assert found.size == 0 or (found.min() > -0.05 and found.max() < top), (ids, found.min(), found.max())
        seen |= set(np.unique(labels))
    assert seen >= {13, 25, 31, 32, 33}


@pytest.mark.parametrize("shape", [box(2, 3, 4, -1.5), Ellipsoid((1.0, 1.5, 2.0))], ids=["box", "ellipsoid"])
def test_shapes_are_hit_at_their_surface_inside_their_window(shape: object) -> None:
    camera = Camera(48, 96, 90.0, 47.5, 23.5, 0.2, 1.5, 0.05, 0.02, 0.01)
    body = Body(11, shape, plain((0.5, 0.5, 0.5)), (0.4, 1.2, 9.0), 0.0)  # type: ignore[arg-type]
    u, v = np.arange(96, dtype=np.float32), np.arange(48, dtype=np.float32)
    eye = np.array([0.0, camera.mount, 0.0]) - body.position
    inverse, _ = body.shape.see(eye, camera.basis(), u, v)
    windows, nearest = camera.windows(corners([body]))
    top, bottom, left, right = windows[0]
    rows, columns = np.nonzero(inverse)
    assert rows.size > 300
    assert top <= rows.min() and rows.max() < bottom and left <= columns.min() and columns.max() < right
    depth = 1 / inverse[rows, columns]
    assert nearest[0] <= depth.min()
    points = eye[:, None] + depth * (camera.basis() @ np.stack([columns, rows, np.ones(rows.size)]))
    if isinstance(body.shape, Ellipsoid):
        on_surface = sum((p / r) ** 2 for p, r in zip(points, body.shape.radii, strict=True))
    else:
        on_surface = np.max(np.abs(points) / np.array([[1.0], [1.5], [2.0]]), axis=0)
    np.testing.assert_allclose(on_surface, 1, atol=1e-3)
    assert body.shape.blocks((0.0, -5.0, 0.0), (0.0, 1.0, 0.0)) and not body.shape.blocks((0.0, 5.0, 0.0), (0, 1, 0))


def test_stereo_leaves_holes_left_of_near_things_and_at_the_left_border() -> None:
    """A wall 40 px in disparity away before one of 10 px: 30 px of the far one are covered in the right picture."""
    camera = Camera(40, 200, 200.0, 99.5, 19.5, 0.2, 1.5, 0, 0, 0)
    disparity = np.full((40, 200), 10.0, dtype=np.float32)
    disparity[:, 100:140] = 40
    image = np.full((40, 200, 3), 128, dtype=np.uint8)
    picture = Rendering(image, image[..., 0], disparity / 40, np.zeros((40, 200), dtype=bool), np.zeros((40, 200, 3)))
    valid = stored_disparity(picture, camera, np.random.default_rng(0)) > 0
    share = valid.mean(axis=0)
    assert share[:9].max() == share[71:99].max() == 0
    assert share[12:69].mean() > 0.9 and share[100:140].mean() > 0.9 and share[141:].mean() > 0.9
    mirrors = replace(picture, glossy=np.ones((40, 200), dtype=bool))
    assert (stored_disparity(mirrors, camera, np.random.default_rng(0)) > 0).mean() < valid.mean() - 0.1


def test_a_second_run_writes_only_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, settings = tmp_path / "streets", replace(SMALL, train=2, val=1, test=0)
    synthesize(out, settings)
    before = contents(out)
    files = scene_files(out, "train", 1)
    files["disparity"].unlink()
    untouched = scene_files(out, "train", 0)["leftImg8bit"]
    stamp = untouched.stat().st_mtime_ns
    capsys.readouterr()
    synthesize(out, settings)
    assert "1 scenes written" in capsys.readouterr().out
    assert contents(out) == before and untouched.stat().st_mtime_ns == stamp


def test_a_folder_with_other_settings_is_refused(tree: Path) -> None:
    with pytest.raises(InputError, match=r"made with height=64, seed=0, not height=32, seed=7"):
        synthesize(tree, replace(SMALL, height=32, seed=7))


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "leftImg8bit").mkdir()
    with pytest.raises(InputError, match=r"not empty and has no synthetic\.json"):
        synthesize(tmp_path, SMALL)


@pytest.mark.parametrize(("name", "value"), [("height", 8), ("train", -1), ("seed", -3)])
def test_settings_out_of_range_are_refused(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(InputError, match=rf"{name} must be at least \d+, got {value}"):
        synthesize(tmp_path / "streets", replace(SMALL, **{name: value}))


def test_command_line_writes_a_tree_and_reports_errors_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mtunet_dist.synthesize", str(tmp_path / "streets"), "--train", "1", "--val", "0"]
    command += ["--test", "0", "--height", "32", "--width", "64", "--workers"]
    done = subprocess.run([*command, "1"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 scenes written in ") and done.stdout.count("\n") == 1
    failed = subprocess.run([*command, "0"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr) == (2, "error: workers must be at least 1, got 0\n")
