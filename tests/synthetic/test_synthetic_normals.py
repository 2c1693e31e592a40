"""Surface normals of the synthetic streets: exact, in the tree, through the source, and with the depth after a flip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtunet_dist.data.augmentation import Draw
from mtunet_dist.data.batch import Pixels, as_batch, as_stored, factors_of
from mtunet_dist.data.torch_augmentation import augmented
from mtunet_dist.errors import InputError
from mtunet_dist.prepare import prepare
from mtunet_dist.sources.cityscapes import METRES, Cityscapes
from mtunet_dist.synthesize import synthesize
from mtunet_dist.synthetic.geometry import Camera, Ellipsoid, box
from mtunet_dist.synthetic.objects import BUILDING, VEGETATION, Body
from mtunet_dist.synthetic.render import EGO_VEHICLE, OUT_OF_ROI, SKY, Rendering, render
from mtunet_dist.synthetic.scene import Scene, random_scene
from mtunet_dist.synthetic.street import ROAD, SIDEWALK, TERRAIN
from mtunet_dist.synthetic.textures import foliage, plain
from mtunet_dist.synthetic.tree import Settings, scene_files
from mtunet_dist.tasks._task import Task
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.normals import LARGEST, Normals

HEIGHT, WIDTH = 64, 128
SMALL = Settings(train=3, val=1, test=0, height=HEIGHT, width=WIDTH)
CODING = 0.5  # degrees that the 8 bits of a file may turn a normal


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tree written by this process."""
    out = tmp_path_factory.mktemp("tree") / "streets"
    synthesize(out, SMALL)
    return out


@pytest.fixture(scope="module")
def streets() -> list[tuple[Scene, Rendering]]:
    """Scenes of a larger size with their renderings."""
    scenes = [random_scene(3, 0, index, 128, 256) for index in range(12)]
    return [(scene, render(scene)) for scene in scenes]


def rays(camera: Camera, u0: float | None = None) -> np.ndarray:
    """The rays (H, W, 3) through the pixels in the frame of the camera, per metre of depth."""
    v, u = np.mgrid[: camera.height, : camera.width]
    across = (u - (camera.u0 if u0 is None else u0)) / camera.focal
    return np.stack([across, (v - camera.v0) / camera.focal, np.ones(u.shape)], axis=2)


def degrees(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angles between unit vectors (..., 3); exact for small ones too."""
    angles: np.ndarray = np.degrees(2 * np.arcsin(np.clip(np.linalg.norm(a - b, axis=-1) / 2, 0, 1)))
    return angles


def alone(body: Body) -> tuple[Camera, Rendering]:
    """A body in an empty street."""
    scene = replace(random_scene(3, 0, 0, HEIGHT, WIDTH), bodies=[body])
    return scene.camera, render(scene)


def test_normals_have_unit_length_and_face_the_camera_wherever_there_is_depth(
    streets: list[tuple[Scene, Rendering]],
) -> None:
    invalid = set()
    for scene, picture in streets:
        assert picture.normals.shape == (128, 256, 3) and picture.normals.dtype == np.float32
        there = picture.inverse > 0
        np.testing.assert_array_equal(picture.normals.any(axis=2), there)
        np.testing.assert_allclose(np.linalg.norm(picture.normals[there], axis=1), 1, atol=1e-6)
        assert (picture.normals * rays(scene.camera)).sum(axis=2)[there].max() < 0
        invalid |= set(np.unique(picture.labels[~there]))
    assert invalid == {SKY, EGO_VEHICLE, OUT_OF_ROI}


def test_the_ground_is_level_in_the_world(streets: list[tuple[Scene, Rendering]]) -> None:
    for scene, picture in streets:
        pitch, roll = scene.camera.pitch, scene.camera.roll
        up = (np.sin(roll) * np.cos(pitch), -np.cos(roll) * np.cos(pitch), np.sin(pitch))
        ground = np.isin(picture.labels, (ROAD, SIDEWALK, TERRAIN)) & (picture.inverse > 0)
        assert ground.mean() > 0.1
        np.testing.assert_allclose(picture.normals[ground], np.tile(up, (int(ground.sum()), 1)), atol=1e-6)


def test_on_planes_normals_are_those_of_the_depth(streets: list[tuple[Scene, Rendering]]) -> None:
    """On a plane the inverse depth is linear in the pixel. Its slopes give the normal."""
    for scene, picture in streets:
        camera, inverse = scene.camera, picture.inverse.astype(np.float64)
        middle, left, right = inverse[1:-1, 1:-1], inverse[1:-1, :-2], inverse[1:-1, 2:]
        above, below = inverse[:-2, 1:-1], inverse[2:, 1:-1]
        bend = np.maximum(np.abs(left + right - 2 * middle), np.abs(above + below - 2 * middle))
        plane = (middle > 1 / 30) & (bend < 1e-6 * middle) & (np.minimum(np.minimum(left, right), above) > 0)
        across, down = camera.focal * (right - left) / 2, camera.focal * (below - above) / 2
        x, y, _ = np.moveaxis(rays(camera)[1:-1, 1:-1], 2, 0)
        towards = -np.stack([across, down, middle - across * x - down * y], axis=2)
        towards /= np.maximum(np.linalg.norm(towards, axis=2, keepdims=True), 1e-9)
        assert plane.mean() > 0.2
        assert degrees(towards, picture.normals[1:-1, 1:-1])[plane].max() < 0.2


def test_a_ragged_crown_has_the_normals_of_its_ellipsoid() -> None:
    radii, position, yaw = np.array([1.0, 1.5, 2.0]), np.array([0.4, 2.0, 9.0]), 0.5
    crown = Ellipsoid((1.0, 1.5, 2.0))
    camera, picture = alone(Body(VEGETATION, crown, foliage((0.1, 0.2, 0.05), 0.09, 7.0), (0.4, 2.0, 9.0), yaw))
    seen = (picture.labels == VEGETATION) & (picture.inverse > 0)
    assert seen.sum() > 300
    world_from_body = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    depth = 1 / picture.inverse[seen].astype(np.float64)[:, None]
    points = (depth * rays(camera)[seen]) @ camera.rotation().T + (0, camera.mount, 0)
    gradient = ((points - position) @ world_from_body / radii**2) @ world_from_body.T @ camera.rotation()
    gradient /= np.linalg.norm(gradient, axis=1, keepdims=True)
    assert degrees(gradient, picture.normals[seen]).max() < 0.1


def test_files_hold_the_normals_of_the_rendering_in_the_usual_coding(tree: Path) -> None:
    for index in range(SMALL.train):
        file = scene_files(tree, "train", index)["normal"]
        city = f"synth{index}"
        assert file == tree / "normal" / "train" / city / f"{city}_{index:06d}_000019_normal.png"
        image = Image.open(file)
        assert image.mode == "RGB" and image.size == (WIDTH, HEIGHT)
        rendered = render(random_scene(SMALL.seed, 0, index, HEIGHT, WIDTH)).normals
        there, pixels = rendered.any(axis=2), np.asarray(image)
        np.testing.assert_array_equal(pixels[there], np.rint((rendered[there] + 1) * 127.5))
        assert not pixels[~there].any()
        stored = Normals("normals").from_image(pixels, file.name) / LARGEST
        np.testing.assert_array_equal(stored.any(axis=2), there)
        assert degrees(stored, rendered)[there].max() < CODING


def test_a_tree_of_a_version_without_normals_gets_them_and_keeps_its_files(tmp_path: Path) -> None:
    out, settings = tmp_path / "streets", replace(SMALL, train=2)
    synthesize(out, settings)
    files = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    normals = sorted((out / "normal").rglob("*.png"))
    assert len(normals) == 3
    for path in normals:
        path.unlink()
    stamps = {path: path.stat().st_mtime_ns for path in files if path not in normals}
    synthesize(out, settings)
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == files
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_the_source_takes_normals_only_on_request(tree: Path) -> None:
    without, source = Cityscapes(tree), Cityscapes(tree, normals=True)
    assert list(without.targets) == ["segmentation", "depth"]
    assert all("normals" not in sample.targets for sample in without.splits()["train"])
    assert source.targets["normals"] == Normals("normals")
    samples = source.splits()["train"]
    assert len(samples) == SMALL.train
    for before, sample in zip(without.splits()["train"], samples, strict=True):
        kind, split, city = sample.targets["normals"].relative_to(tree).parts[:3]
        assert (kind, split, city) == ("normal", "train", sample.key.split("_")[0])
        source.check(sample)
        old, raw = without.read(before), source.read(sample)
        np.testing.assert_array_equal(old.rgb, raw.rgb)
        for name, target in old.targets.items():
            np.testing.assert_array_equal(target, raw.targets[name])
        index = int(sample.key.split("_")[1])
        rendered = render(random_scene(SMALL.seed, 0, index, HEIGHT, WIDTH)).normals
        assert raw.targets["normals"].dtype == np.int16
        assert degrees(raw.targets["normals"] / LARGEST, rendered).max() < CODING


def test_a_root_without_normals_is_an_error_that_says_who_has_them(tree: Path, tmp_path: Path) -> None:
    for kind in ("leftImg8bit", "gtFine", "disparity", "camera"):
        (tmp_path / kind).symlink_to(tree / kind)
    assert Cityscapes(tmp_path).splits()
    with pytest.raises(InputError, match=r"normal.train is missing or holds no .*only the synthetic tree has normals"):
        Cityscapes(tmp_path, normals=True).splits()


def test_a_scene_without_its_normals_is_named(tree: Path, tmp_path: Path) -> None:
    for kind in ("leftImg8bit", "gtFine", "disparity", "camera"):
        (tmp_path / kind).symlink_to(tree / kind)
    for path in sorted((tree / "normal").rglob("*.png"))[1:]:
        there = tmp_path / path.relative_to(tree)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(path)
    with pytest.raises(InputError, match=r"synth0_000000_000019_leftImg8bit\.png has no normal file beside it"):
        Cityscapes(tmp_path, normals=True).splits()


def test_a_dataset_that_is_older_than_an_option_has_its_default(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prepared"
    prepare("cityscapes", tree, out, height=16, width=32, workers=0)
    content = json.loads((out / "dataset.json").read_text())
    assert content["settings"]["options"].pop("normals") is False
    (out / "dataset.json").write_text(json.dumps(content))
    capsys.readouterr()
    prepare("cityscapes", tree, out, height=16, width=32, workers=0)
    assert f"{out.name} is complete" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(InputError, match="already holds a dataset with normals=False instead of True"):
        prepare("cityscapes", tree, out, height=16, width=32, workers=0, options={"normals": True})


@pytest.mark.parametrize("flip", [False, True])
def test_a_flip_keeps_normals_and_depth_consistent(flip: bool) -> None:
    """A plane through the points of a slanting wall has the normal that the batch gives, mirrored or not."""
    body = Body(BUILDING, box(3.0, 3.0, 5.0), plain((0.5, 0.4, 0.3)), (1.0, 0.0, 9.0), 0.5)
    camera, picture = alone(body)
    tasks: dict[str, Task] = {"normals": Normals("normals"), "depth": Depth.metric_depth(METRES)}
    depth = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
    there = picture.inverse > 1 / 250
    depth[there] = np.rint(1 / picture.inverse[there] / METRES)
    stored = {"normals": Normals("normals").from_numbers(picture.normals, "scene"), "depth": depth}
    pixels = Pixels(torch.from_numpy(picture.image)[None], {name: as_stored(x)[None] for name, x in stored.items()})
    draws = [Draw(0, 0, HEIGHT, WIDTH, 1.0, flip)]
    image, targets = augmented(pixels, tasks, draws)
    factors = {name: torch.from_numpy(x) for name, x in factors_of(tasks, draws, 1).items()}
    batch = as_batch(image, targets, factors, torch.tensor([0]))

    wall = (picture.labels == BUILDING) & (picture.inverse > 0)
    faces, counts = np.unique(picture.normals[wall], axis=0, return_counts=True)
    wall &= (picture.normals == faces[counts.argmax()]).all(axis=2)
    wall = wall[:, ::-1] if flip else wall
    assert wall.sum() > 200
    seen = rays(camera, WIDTH - 1 - camera.u0 if flip else camera.u0)
    points = seen[wall] * batch["depth"][0].numpy().reshape(HEIGHT, WIDTH, 1)[wall]
    across = np.linalg.svd(points - points.mean(axis=0))[2][2]
    towards = across * -np.sign(across @ points.mean(axis=0))
    normals = batch["normals"][0].permute(1, 2, 0).numpy()[wall]
    assert abs(towards[0]) > 0.3
    assert degrees(normals, towards).max() < 0.2
