"""Surface normals from depth: exact on planes, none across edges, and what NYUv2's sources make of them."""

from __future__ import annotations

import numpy as np
import pytest

from mtunet_dist.errors import InputError
from mtunet_dist.sources._plane_fits import Camera, normals_of
from mtunet_dist.sources.nyuv2 import CAMERA, computed_normals
from mtunet_dist.tasks.normals import LARGEST

HEIGHT, WIDTH = 72, 96
SMALL = CAMERA.resized(WIDTH / 640, HEIGHT / 480)


def plane(normal: tuple[float, float, float], distance: float, camera: Camera = SMALL) -> np.ndarray:
    """The depth (H, W) of a plane that faces the camera, 0 where its pixel lies behind the camera or beyond 50 m."""
    x = (np.arange(WIDTH) - camera.cx) / camera.fx
    y = (np.arange(HEIGHT)[:, None] - camera.cy) / camera.fy
    facing = -(normal[0] * x + normal[1] * y + normal[2])
    depth = np.divide(distance, facing, out=np.zeros((HEIGHT, WIDTH)), where=facing > 0)
    return np.where(depth < 50, depth, 0)


def angles(normals: np.ndarray, truth: tuple[float, float, float]) -> np.ndarray:
    """The angles in degrees between the normals that there are and the true one."""
    found = normals[normals.any(2)]
    return np.degrees(np.arccos(np.clip(found @ np.array(truth), -1, 1)))


@pytest.mark.parametrize("normal", [(0.0, 0.0, -1.0), (0.6, 0.0, -0.8), (0.0, -0.8, -0.6), (0.36, 0.48, -0.8)])
def test_a_plane_has_its_normal_everywhere(normal: tuple[float, float, float]) -> None:
    depth = plane(normal, 2.0)
    found = normals_of(depth, SMALL)
    assert found.any(2)[depth > 0].mean() > 0.9
    assert angles(found, normal).max() < 0.05
    assert np.allclose(np.linalg.norm(found[found.any(2)], axis=1), 1, atol=1e-5)


def test_an_edge_between_two_depths_bends_no_normal() -> None:
    depth = plane((0.0, 0.0, -1.0), 2.0)
    depth[:, WIDTH // 2 :] = 4.0
    assert angles(normals_of(depth, SMALL), (0.0, 0.0, -1.0)).max() < 0.05


def test_pixels_without_depth_or_with_too_few_neighbours_have_no_normal() -> None:
    depth = plane((0.0, 0.0, -1.0), 2.0)
    depth[:30] = 0
    depth[5, 5] = 2.0
    found = normals_of(depth, SMALL)
    assert not found[:30].any() and found[40].any()
    assert not normals_of(np.zeros((HEIGHT, WIDTH)), SMALL).any()


def test_a_crop_sees_the_same_normals() -> None:
    depth, (top, left) = plane((0.36, 0.48, -0.8), 2.0), (10, 20)
    whole, cropped = normals_of(depth, SMALL), normals_of(depth[top:, left:], SMALL.cropped(left, top))
    both = whole[top:, left:].any(2) & cropped.any(2)
    assert both.mean() > 0.8
    assert np.abs(whole[top:, left:][both] - cropped[both]).max() < 1e-3


def test_stored_normals_are_of_unit_length() -> None:
    stored = computed_normals(np.round(plane((0.36, 0.48, -0.8), 2.0), 3), SMALL)
    lengths = np.linalg.norm(stored[stored.any(2)] / LARGEST, axis=1)
    assert stored.dtype == np.int16 and np.abs(lengths - 1).max() < 1e-4


def test_depth_in_millimetres_is_enough() -> None:
    normal = (0.36, 0.48, -0.8)
    assert angles(normals_of(np.round(plane(normal, 2.0), 3), SMALL), normal).mean() < 1


def test_vectors_that_are_no_normals_are_refused() -> None:
    from mtunet_dist.tasks.normals import Normals

    with pytest.raises(InputError, match=r"x\.npy: a vector of length 3; expected unit vectors"):
        Normals("normals").from_numbers(np.full((2, 2, 3), np.sqrt(3.0)), "x.npy")
