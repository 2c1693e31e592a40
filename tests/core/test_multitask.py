"""MultiTaskStep: normalisation, precision, shared counts, and the check of a model before work starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers.training import TASKS
from mtunet_dist.core.step import Batch, MultiTaskStep, check_model, share_valid_counts
from mtunet_dist.errors import InputError
from mtunet_dist.models.mtunet import MTUNet
from mtunet_dist.weightings.equal import EqualWeighting

NAMES = ["segmentation", "depth"]


class Constant(nn.Module):
    """Notes its input and answers with zeros."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        self.image = image
        shape = image[:, :1].shape
        return {"segmentation": image.new_zeros(shape).repeat(1, 3, 1, 1), "depth": image.new_zeros(shape)}


def make_step(model: nn.Module, precision: str = "fp32") -> MultiTaskStep:
    return MultiTaskStep(model, TASKS, EqualWeighting(NAMES), precision)


def make_batch(void_rows: int, invalid_rows: int) -> Batch:
    label = torch.randint(0, 3, (2, 16, 16), dtype=torch.uint8)
    depth = torch.rand(2, 1, 16, 16) + 1
    label[:, :void_rows], depth[:, :, :invalid_rows] = 255, 0
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    return {"image": image, "segmentation": label, "depth": depth, "sample": torch.arange(2)}


def test_images_are_normalised_by_the_imagenet_statistics() -> None:
    model = Constant()
    make_step(model).predict(torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1))
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert model.image.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_losses_are_means_over_valid_pixels() -> None:
    batch = make_batch(void_rows=3, invalid_rows=5)
    total, losses = make_step(Constant())(batch)
    assert losses["segmentation"].item() == pytest.approx(torch.tensor(3.0).log().item())
    assert losses["depth"].item() == pytest.approx(batch["depth"][:, :, 5:].mean().item())
    assert total.item() == pytest.approx(sum(x.item() for x in losses.values()))


def test_shared_counts_make_unequal_micro_batches_one_mean() -> None:
    batches = [make_batch(0, 14), make_batch(15, 2), make_batch(16, 16)]
    share_valid_counts(batches, TASKS)
    step = make_step(Constant())
    mean = sum(step(b)[1]["depth"].item() for b in batches) / 3
    depth = torch.cat([b["depth"].flatten() for b in batches])
    assert mean == pytest.approx(depth[depth > 0].mean().item())


def test_a_step_without_any_valid_pixel_has_zero_loss_and_finite_gradients() -> None:
    step = make_step(MTUNet({"segmentation": 3, "depth": 1}, widths=(4, 4, 4, 4), bottleneck=4))
    batch = make_batch(16, 16)
    share_valid_counts([batch], TASKS)
    total, losses = step(batch)
    total.backward()
    assert total.item() == 0 == sum(x.item() for x in losses.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in step.model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_reaches_the_model_and_losses_stay_in_fp32(precision: str) -> None:
    seen: list[torch.dtype] = []
    model = MTUNet({"segmentation": 3, "depth": 1}, widths=(4, 4, 4, 4), bottleneck=4)
    model.decoders["depth"].head.register_forward_hook(lambda m, i, out: seen.append(out.dtype))  # type: ignore[union-attr]
    total, losses = make_step(model, precision)(make_batch(1, 1))
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    assert {total.dtype, *(x.dtype for x in losses.values())} == {torch.float32}


def test_a_model_that_does_not_fit_the_data_is_refused_before_work() -> None:
    good = make_step(MTUNet({"segmentation": 3, "depth": 1}, widths=(4, 4, 4, 4), bottleneck=4))
    check_model(good, 32, 48)
    assert next(good.model.parameters()).device.type == "cpu"
    with pytest.raises(InputError, match="30x48"):
        check_model(good, 30, 48)
    wrong = make_step(MTUNet({"segmentation": 5, "depth": 1}, widths=(4, 4, 4, 4), bottleneck=4))
    lacking = make_step(MTUNet({"segmentation": 3}, widths=(4, 4, 4, 4), bottleneck=4))
    with pytest.raises(InputError, match=r"no output for task 'depth', only for: segmentation"):
        check_model(lacking, 32, 48)
    with pytest.raises(InputError, match=r"'segmentation' has shape \(2, 5, 32, 48\) instead of \(2, 3, 32, 48\)"):
        check_model(wrong, 32, 48)
