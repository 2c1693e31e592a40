"""Losses: closed-form values, masking, and gradients that stay finite whatever lies under the mask.

What every task's loss must do is in ``test_tasks.py``.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mtunet_dist.core.step import _mean as masked_mean
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.normals import Normals
from mtunet_dist.tasks.segmentation import VOID, Segmentation

NAN, INF = math.nan, math.inf
segmentation_loss = Segmentation("segmentation", ()).loss
depth_loss = Depth.metric_depth(0.001).loss
normal_loss = Normals("normals").loss


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_cross_entropy_closed_form() -> None:
    logits = torch.tensor([0.0, math.log(3.0)]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
    label = torch.tensor([[[0, 1, VOID]]], dtype=torch.uint8)
    total, count = segmentation_loss(logits, label)
    assert total.item() == pytest.approx(math.log(4) + math.log(4 / 3))
    assert count.item() == 2


def test_l1_closed_form() -> None:
    prediction = torch.tensor([1.0, -2.0, 5.0, 7.0, 9.0]).view(1, 1, 1, 5)
    depth = torch.tensor([3.0, 1.0, 0.0, -1.0, INF]).view(1, 1, 1, 5)
    total, count = depth_loss(prediction, depth)
    assert (total.item(), count.item()) == (5.0, 2)


def test_one_minus_cosine_closed_form() -> None:
    target = torch.tensor([[0.0, 0.0, -1.0], [0.6, 0.0, -0.8], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    prediction = torch.tensor([[0.0, 0.0, -5.0], [0.0, 0.0, -0.5], [0.0, -3.0, 0.0], [1.0, 2.0, 3.0]])
    total, count = normal_loss(prediction.T.reshape(1, 3, 1, 4), target.T.reshape(1, 3, 1, 4))
    assert total.item() == pytest.approx(0 + (1 - 0.8) + 2)  # the same direction, an angle, the opposite direction
    assert count.item() == 3


def test_equal_torch_when_all_is_valid() -> None:
    g = generator()
    logits, label = torch.randn(2, 5, 4, 6, generator=g), torch.randint(5, (2, 4, 6), generator=g, dtype=torch.uint8)
    torch.testing.assert_close(masked_mean(*segmentation_loss(logits, label)), F.cross_entropy(logits, label.long()))
    prediction, depth = torch.randn(2, 1, 4, 6, generator=g), torch.rand(2, 1, 4, 6, generator=g) + 0.1
    torch.testing.assert_close(masked_mean(*depth_loss(prediction, depth)), F.l1_loss(prediction, depth))
    vectors = torch.randn(2, 3, 4, 6, generator=g)
    normals = F.normalize(torch.randn(2, 3, 4, 6, generator=g), dim=1)
    expected = 1 - F.cosine_similarity(vectors, normals, dim=1).mean()
    torch.testing.assert_close(masked_mean(*normal_loss(vectors, normals)), expected)


def test_masked_pixels_do_not_count() -> None:
    g = generator()
    logits, label = torch.randn(2, 5, 4, 6, generator=g), torch.randint(5, (2, 4, 6), generator=g, dtype=torch.uint8)
    void = torch.rand(2, 4, 6, generator=g) < 0.4
    total, count = segmentation_loss(logits, label.masked_fill(void, VOID))
    picked = logits.movedim(1, -1)[~void]
    torch.testing.assert_close(total, F.cross_entropy(picked, label[~void].long(), reduction="sum"))
    assert count == (~void).sum()


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1.0])
def test_nothing_valid_gives_zero_with_zero_gradient(bad: float) -> None:
    logits = torch.full((1, 3, 2, 2), bad, requires_grad=True)
    loss = masked_mean(*segmentation_loss(logits, torch.full((1, 2, 2), VOID, dtype=torch.uint8)))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    for invalid in (0.0, NAN, INF, -INF):
        prediction = torch.full((1, 1, 2, 2), bad, requires_grad=True)
        loss = masked_mean(*depth_loss(prediction, torch.full((1, 1, 2, 2), invalid)))
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_bad_values_at_invalid_pixels_leave_the_valid_gradient_alone() -> None:
    logits = torch.tensor([[1.0, NAN], [2.0, INF]]).view(1, 2, 1, 2).requires_grad_()
    segmentation_loss(logits, torch.tensor([[[1, VOID]]], dtype=torch.uint8))[0].backward()
    share = 1 / (1 + math.e)  # softmax of class 0 at the labelled pixel
    torch.testing.assert_close(logits.grad, torch.tensor([[share, 0.0], [-share, 0.0]]).view(1, 2, 1, 2))
    prediction = torch.tensor([3.0, NAN, INF]).view(1, 1, 1, 3).requires_grad_()
    depth_loss(prediction, torch.tensor([1.0, 0.0, NAN]).view(1, 1, 1, 3))[0].backward()
    assert prediction.grad.flatten().tolist() == [1.0, 0.0, 0.0]


def test_bad_prediction_at_a_valid_pixel_is_not_hidden() -> None:
    assert segmentation_loss(torch.full((1, 2, 1, 1), NAN), torch.zeros(1, 1, 1, dtype=torch.uint8))[0].isnan()
    assert depth_loss(torch.full((1, 1, 1, 1), INF), torch.ones(1, 1, 1, 1))[0].isinf()
    assert normal_loss(torch.full((1, 3, 1, 1), NAN), torch.ones(1, 3, 1, 1))[0].isnan()


def test_bfloat16_is_computed_in_float32() -> None:
    g = generator()
    logits = torch.randn(1, 4, 16, 16, generator=g).bfloat16()
    label = torch.randint(4, (1, 16, 16), generator=g, dtype=torch.uint8)
    depth = torch.rand(1, 1, 16, 16, generator=g) + 0.5
    total, _ = segmentation_loss(logits, label)
    assert total.dtype == torch.float32
    assert torch.equal(total, segmentation_loss(logits.float(), label)[0])
    total, _ = depth_loss(logits[:, :1], depth)
    assert total.dtype == torch.float32
    assert torch.equal(total, depth_loss(logits[:, :1].float(), depth)[0])
    normals = F.normalize(torch.randn(1, 3, 16, 16, generator=g), dim=1)
    total, _ = normal_loss(logits[:, :3], normals)
    assert total.dtype == torch.float32
    assert torch.equal(total, normal_loss(logits[:, :3].float(), normals)[0])


def test_shapes_that_would_broadcast_are_caught() -> None:
    for loss, channels in ((depth_loss, 1), (normal_loss, 3)):
        with pytest.raises(AssertionError):
            loss(torch.ones(2, channels, 4, 4), torch.ones(2, 4, 4))


def test_losses_never_wait_for_the_device() -> None:
    # Meta tensors have no values, so .item() or a boolean index would raise.
    image = torch.empty(2, 1, 4, 4, device="meta")
    assert masked_mean(*segmentation_loss(image.expand(2, 3, 4, 4), image[:, 0].byte())).is_meta
    assert masked_mean(*depth_loss(image, image)).is_meta
    assert masked_mean(*normal_loss(image.expand(2, 3, 4, 4), image.expand(2, 3, 4, 4))).is_meta
