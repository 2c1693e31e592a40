"""Metrics against hand-computed examples and slow loops, and exact over any split of the data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mtunet_dist.core.comparison import higher_is_better
from mtunet_dist.tasks.depth import DepthMetric
from mtunet_dist.tasks.normals import NormalsMetric
from mtunet_dist.tasks.segmentation import VOID, SegmentationMetric

CLASSES = 4
NAMES = ["a", "b", "c", "d"]
Batches = list[tuple[Tensor, Tensor]]


def one_hot_scores(prediction: list[list[list[int]]], classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(prediction), classes).movedim(-1, 1).float()


def segmentation_batches(seed: int = 0) -> Batches:
    """Batches of unequal sizes; class 3 never occurs, one image and one batch are all void."""
    g = torch.Generator().manual_seed(seed)
    batches = []
    for n in (3, 1, 2):
        scores = torch.randn(n, CLASSES, 5, 7, generator=g)
        scores[:, 3] = -10
        label = torch.randint(3, (n, 5, 7), generator=g, dtype=torch.uint8)
        label[torch.rand(n, 5, 7, generator=g) < 0.3] = VOID
        batches.append((scores, label))
    batches[0][1][1] = VOID
    batches[1][1].fill_(VOID)
    return batches


def depth_batches(seed: int = 0) -> Batches:
    g = torch.Generator().manual_seed(seed)
    batches = []
    for n in (3, 1, 2):
        depth = torch.rand(n, 1, 5, 7, generator=g) * 9 + 0.5
        prediction = depth * (torch.rand(n, 1, 5, 7, generator=g) + 0.5)
        prediction[torch.rand(n, 1, 5, 7, generator=g) < 0.1] *= -1
        depth[torch.rand(n, 1, 5, 7, generator=g) < 0.3] = 0
        depth[0, 0, 0, :4] = torch.tensor([math.nan, math.inf, -1.0, 0.0])
        prediction[0, 0, 0, :2] = torch.tensor([math.inf, math.nan])
        batches.append((prediction, depth))
    batches[1][1].fill_(0)
    return batches


def slow_iou(prediction: np.ndarray, label: np.ndarray) -> tuple[list[float], float]:
    """IoU of the classes with a union, and pixel accuracy, over the labelled pixels."""
    keep = label != VOID
    prediction, label = prediction[keep], label[keep]
    ious = []
    for c in range(CLASSES):
        union = sum(p == c or t == c for p, t in zip(prediction, label, strict=True))
        if union:
            ious.append(sum(p == c and t == c for p, t in zip(prediction, label, strict=True)) / union)
    return ious, float((prediction == label).mean())


def test_segmentation_by_hand() -> None:
    metric = SegmentationMetric(NAMES, "cpu")
    # Image 1: IoU 1/2, 2/3 and accuracy 3/4 (one pixel void). Image 2: IoU of class 2 is 1, accuracy 1.
    prediction = [[[0, 1, 1, 1, 2]], [[2, 2, 3, 3, 3]]]
    label = [[[0, 0, 1, 1, VOID]], [[2, 2, VOID, VOID, VOID]]]
    metric.update(one_hot_scores(prediction, 4), torch.tensor(label, dtype=torch.uint8))
    assert metric.compute() == pytest.approx(
        {
            "miou": (1 / 2 + 2 / 3 + 1) / 3,
            "accuracy": 5 / 6,
            "legacy/miou": ((1 / 2 + 2 / 3) / 2 + 1) / 2,
            "legacy/accuracy": (3 / 4 + 1) / 2,
        }
    )
    assert metric.per_class() == pytest.approx({"a": 1 / 2, "b": 2 / 3, "c": 1.0, "d": math.nan}, nan_ok=True)


def test_depth_by_hand() -> None:
    metric = DepthMetric("cpu")
    metric.update(torch.tensor([3.0, 4.0, 9.0]).view(1, 1, 1, 3), torch.tensor([2.0, 5.0, 0.0]).view(1, 1, 1, 3))
    metric.update(torch.tensor([-1.0]).view(1, 1, 1, 1), torch.tensor([4.0]).view(1, 1, 1, 1))
    metric.update(torch.tensor([4.5]).view(1, 1, 1, 1), torch.tensor([4.0]).view(1, 1, 1, 1))
    assert metric.compute() == pytest.approx(
        {
            "depth_abs": (1 + 1 + 5 + 0.5) / 4,
            "depth_rel": (1 / 2 + 1 / 5 + 5 / 4 + 1 / 8) / 4,
            "depth_rmse": math.sqrt((1 + 1 + 25 + 0.25) / 4),
            "depth_delta1": 1 / 4,  # 3/2 and 5/4 are not below 1.25, -1 is no depth, 9/8 is close
            "legacy/depth_abs": (1 + 5 + 0.5) / 3,
            "legacy/depth_rel": ((1 / 2 + 1 / 5) / 2 + 5 / 4 + 1 / 8) / 3,
        }
    )


def test_normals_by_hand() -> None:
    metric = NormalsMetric("cpu")
    angles = [0.0, 10.0, 20.0, 25.0, 90.0, 180.0]
    turned = [[math.sin(math.radians(a)), 0.0, -math.cos(math.radians(a))] for a in angles]
    prediction = 3 * torch.tensor([*turned, [1.0, 2.0, 3.0]]).T.reshape(1, 3, 1, 7)  # of any length
    target = torch.tensor([*[[0.0, 0.0, -1.0]] * 6, [0.0, 0.0, 0.0]]).T.reshape(1, 3, 1, 7)  # the last is invalid
    metric.update(prediction[..., :2], target[..., :2])
    metric.update(prediction[..., 2:], target[..., 2:])
    assert metric.compute() == pytest.approx(
        {
            "normal_mean": sum(angles) / 6,
            "normal_median": 20.0,  # the lower of the two in the middle
            "normal_11": 2 / 6,
            "normal_22": 3 / 6,
            "normal_30": 4 / 6,
        },
        abs=0.01,
    )


def test_normals_equal_numpy() -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.nn.functional.normalize(torch.randn(2, 3, 9, 11, generator=g), dim=1)
    prediction = target + 0.4 * torch.randn(2, 3, 9, 11, generator=g)
    target[:, :, :2] = 0
    metric = NormalsMetric("cpu")
    metric.update(prediction, target)
    p, t = (x[:, :, 2:].double().movedim(1, -1).reshape(-1, 3).numpy() for x in (prediction, target))
    cosine = (p * t).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(t, axis=1)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    found = metric.compute()
    assert found["normal_mean"] == pytest.approx(angle.mean(), rel=1e-6)
    assert found["normal_median"] == pytest.approx(np.sort(angle)[(len(angle) - 1) // 2], abs=0.01)
    for name, degrees in (("normal_11", 11.25), ("normal_22", 22.5), ("normal_30", 30)):
        assert found[name] == (angle < degrees).mean()


def test_segmentation_equals_slow_loops() -> None:
    metric = SegmentationMetric(NAMES, "cpu")
    predictions, labels = [], []
    for scores, label in segmentation_batches():
        metric.update(scores, label)
        predictions += list(scores.argmax(1).numpy())
        labels += list(label.numpy())
    ious, accuracy = slow_iou(np.stack(predictions), np.stack(labels))
    per_image = [slow_iou(p, t) for p, t in zip(predictions, labels, strict=True) if (t != VOID).any()]
    assert len(per_image) == 4  # of 6
    assert metric.compute() == pytest.approx(
        {
            "miou": np.mean(ious),
            "accuracy": accuracy,
            "legacy/miou": np.mean([np.mean(image) for image, _ in per_image]),
            "legacy/accuracy": np.mean([a for _, a in per_image]),
        },
        rel=1e-12,
    )
    assert list(metric.per_class().values()) == pytest.approx([*ious, math.nan], nan_ok=True)


def test_depth_equals_slow_loops() -> None:
    metric = DepthMetric("cpu")
    of_batches: list[list[tuple[float, ...]]] = []
    for prediction, depth in depth_batches():
        metric.update(prediction, depth)
        pixels: list[tuple[float, ...]] = []
        for p, g in zip(prediction.double().flatten().tolist(), depth.double().flatten().tolist(), strict=True):
            if math.isfinite(g) and g > 0:
                right = p > 0 and max(p / g, g / p) < 1.25
                pixels.append((abs(p - g), abs(p - g) / g, (p - g) ** 2, float(right)))
        of_batches.append(pixels)
    absolute, relative, squared, right = np.mean([pixel for pixels in of_batches for pixel in pixels], axis=0)
    legacy = np.mean([np.mean(pixels, axis=0) for pixels in of_batches if pixels], axis=0)
    assert metric.compute() == pytest.approx(
        {
            "depth_abs": absolute,
            "depth_rel": relative,
            "depth_rmse": math.sqrt(squared),
            "depth_delta1": right,
            "legacy/depth_abs": legacy[0],
            "legacy/depth_rel": legacy[1],
        },
        rel=1e-12,
    )


@pytest.mark.parametrize("kind", ["segmentation", "depth"])
def test_sum_of_two_parts_equals_the_whole(kind: str) -> None:
    batches = segmentation_batches() if kind == "segmentation" else depth_batches()
    whole, part, rest = (
        SegmentationMetric(NAMES, "cpu") if kind == "segmentation" else DepthMetric("cpu") for _ in range(3)
    )
    for i, batch in enumerate(batches):
        whole.update(*batch)
        (part if i < 2 else rest).update(*batch)
    for mine, other, expected in zip(part.tensors(), rest.tensors(), whole.tensors(), strict=True):
        mine += other  # in place, as an all-reduce does
        assert mine.dtype in (torch.int64, torch.float64)
        if mine.dtype == torch.int64:
            assert torch.equal(mine, expected)
        else:
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    assert part.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_nothing_valid_gives_nan() -> None:
    segmentation, depth = SegmentationMetric(NAMES, "cpu"), DepthMetric("cpu")
    for _ in range(2):  # before any update, and after one without a valid pixel
        assert all(math.isnan(v) for v in [*segmentation.compute().values(), *depth.compute().values()])
        assert all(math.isnan(v) for v in segmentation.per_class().values())
        segmentation.update(torch.randn(1, CLASSES, 2, 2), torch.full((1, 2, 2), VOID, dtype=torch.uint8))
        depth.update(torch.randn(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))


def test_low_precision_inputs_and_channels_last_count_the_same() -> None:
    scores, label = segmentation_batches()[0]
    scores = scores.bfloat16()
    a, b = SegmentationMetric(NAMES, "cpu"), SegmentationMetric(NAMES, "cpu")
    a.update(scores, label)
    b.update(scores.float().contiguous(memory_format=torch.channels_last), label)
    assert a.compute() == b.compute()


def test_shares_are_to_be_high_and_errors_low() -> None:
    metrics = SegmentationMetric(NAMES, "cpu"), DepthMetric("cpu"), NormalsMetric("cpu")
    names = {"loss/depth", *(name for metric in metrics for name in metric.compute())}
    high = {"miou", "accuracy", "legacy/miou", "legacy/accuracy", "depth_delta1"}
    high |= {"normal_11", "normal_22", "normal_30"}
    assert {name for name in names if higher_is_better(name)} == high


def test_update_never_waits_for_the_device() -> None:
    # Meta tensors have no values, so .item(), a boolean index or bincount would raise.
    segmentation, depth = SegmentationMetric(NAMES, "meta"), DepthMetric("meta")
    segmentation.update(torch.empty(2, CLASSES, 4, 4, device="meta"), torch.empty(2, 4, 4, device="meta").byte())
    depth.update(torch.empty(2, 1, 4, 4, device="meta"), torch.empty(2, 1, 4, 4, device="meta"))
