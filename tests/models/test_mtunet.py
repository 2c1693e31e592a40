"""MT-UNet: the architecture's arithmetic, its wiring, and that it behaves in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.layouts import watch_layouts
from mtunet_dist.errors import InputError
from mtunet_dist.models.mtunet import PLUGIN, MTUNet

OUTPUTS = {"segmentation": 5, "depth": 1}
WIDTHS = (4, 6, 8, 10)


def small(outputs: dict[str, int] | None = None, **options: Any) -> MTUNet:
    torch.manual_seed(0)
    return MTUNet(outputs or OUTPUTS, widths=WIDTHS, bottleneck=12, **options)


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 32, 48), generator=torch.Generator().manual_seed(1))


def encoder_convs(model: MTUNet) -> list[nn.Module]:
    pairs = zip(model.encoder.conv1s, model.encoder.conv2s, strict=True)
    return [conv for pair in pairs for conv in pair]


def in_channels(model: MTUNet) -> list[int]:
    return [conv[0].in_channels for conv in encoder_convs(model)]


@pytest.fixture(scope="module")
def default_model() -> MTUNet:
    with torch.device("meta"):
        return MTUNet({"segmentation": 7, "depth": 1})


def test_default_has_69_86_million_parameters(default_model: MTUNet) -> None:
    count = sum(p.numel() for p in default_model.parameters())
    assert count == 69_863_624
    assert count / 1e6 == pytest.approx(69.9, abs=0.05)


def test_default_encoder_convs_see_all_earlier_maps(default_model: MTUNet) -> None:
    assert in_channels(default_model) == [3, 64, 128, 256, 384, 640, 896, 1408]
    assert default_model.bottleneck[0][0].in_channels == 512


def test_default_decoder_blocks_see_skip_previous_block_and_other_task(default_model: MTUNet) -> None:
    for decoder in default_model.decoders.values():
        assert [b.conv1[0].in_channels for b in decoder.blocks] == [512 + 1024, 256 + 256, 128 + 128 + 256, 64 + 64]


def test_conv_is_followed_by_relu_then_batch_norm(default_model: MTUNet) -> None:
    for conv in encoder_convs(default_model):
        assert [type(layer) for layer in conv] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d]


def test_plugin_is_the_model() -> None:
    assert PLUGIN is MTUNet


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (64, 16)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dense_scope": "block"},
        {"dense_scope": "none"},
        {"attention": False},
        {"dense_image": True, "upsampling": "bilinear"},
        {"cross_talk_from": "raw", "skips_after_dropout": True},
    ],
)
def test_output_shapes(size: tuple[int, int], options: dict[str, Any]) -> None:
    outputs = small(**options)(images(2, 3, *size))
    assert {task: tuple(o.shape) for task, o in outputs.items()} == {
        "segmentation": (2, 5, *size),
        "depth": (2, 1, *size),
    }


def test_size_that_is_no_multiple_of_16_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"100x90.*nearest is 96x96"):
        small()(images(1, 3, 100, 90))
    with pytest.raises(InputError, match=r"4x40.*nearest is 16x48"):
        small()(images(1, 3, 4, 40))


@pytest.mark.parametrize(
    ("outputs", "options", "message"),
    [
        ({}, {}, "at least one task"),
        ({"depth": 0}, {}, "one channel"),
        (OUTPUTS, {"widths": (4, 6, 8)}, "4 positive numbers"),
        (OUTPUTS, {"bottleneck": 0}, "positive"),
        (OUTPUTS, {"dense_scope": "all"}, "encoder, block, none"),
        (OUTPUTS, {"upsampling": "nearest"}, "transposed, bilinear"),
        (OUTPUTS, {"cross_talk_from": "mask"}, "attended, raw"),
        (OUTPUTS, {"dropout": 1.0}, r"\[0, 1\)"),
        (OUTPUTS, {"dropout": -0.1}, r"\[0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused(outputs: dict[str, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MTUNet(outputs, **options)


@pytest.mark.parametrize("options", [{}, {"dense_scope": "block"}, {"attention": False, "cross_talk": False}])
def test_gradients_reach_every_parameter(options: dict[str, Any]) -> None:
    model = small(**options)
    sum(o.square().sum() for o in model(images()).values()).backward()
    # A bias right before a batch norm is subtracted again: its gradient is rounding noise by construction.
    cancelled = ("mask.0.bias", "mask.3.bias")
    missing = [n for n, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert [n for n in missing if not n.endswith(cancelled)] == []
    assert all(p.grad is not None for p in model.parameters())


def connections(dense_scope: str) -> set[tuple[int, int]]:
    """Pairs (i, j) of encoder convs, counted from 1, where conv j itself reads what conv i wrote.

    Every conv is made to return a recorded output, so that a change of one does not travel through the others.
    """
    model = small(dense_scope=dense_scope).eval()
    convs = encoder_convs(model)
    fixed: list[Tensor] = []
    seen: list[Tensor] = [torch.empty(0)] * len(convs)
    changed = -1

    def recorder(i: int) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            seen[i] = inputs[0]
            if len(fixed) <= i:
                fixed.append(output)
            return fixed[i] + 1 if i == changed else fixed[i]

        return hook

    for i, conv in enumerate(convs):
        conv.register_forward_hook(recorder(i))
    found = set()
    with torch.no_grad():
        model.encoder(images())
        before = list(seen)
        for changed in range(len(convs)):
            model.encoder(images())
            found |= {(changed + 1, j + 1) for j in range(len(convs)) if not torch.equal(seen[j], before[j])}
    return found


def test_dense_scope_encoder_connects_all_pairs() -> None:
    assert connections("encoder") == {(i, j) for j in range(1, 9) for i in range(1, j)}


def test_dense_scope_block_connects_block_input_to_both_convs() -> None:
    assert connections("block") == {(i, i + 1) for i in range(1, 8)} | {(2, 4), (4, 6), (6, 8)}
    assert in_channels(small(dense_scope="block")) == [3, 3 + 4, 4, 4 + 6, 6, 6 + 8, 8, 8 + 10]


def test_dense_scope_none_is_a_chain() -> None:
    assert connections("none") == {(i, i + 1) for i in range(1, 8)}
    assert in_channels(small(dense_scope="none")) == [3, 4, 4, 6, 6, 8, 8, 10]


def test_dropout_hits_added_maps_once_and_spares_skips() -> None:
    model = small(dropout=0.5)
    seen: list[Tensor] = []
    model.encoder.dropout.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    skips, deepest = model.encoder(images())
    assert [s.shape[1] for s in seen] == [w for width in WIDTHS for w in (width, width)]
    assert all(any(s is dropped for dropped in seen) for s in skips)  # a skip is what goes into dropout
    assert deepest.shape == (2, 10, 2, 3)


def test_the_image_joins_what_every_conv_sees_if_asked() -> None:
    plain, joined = in_channels(small()), in_channels(small(dense_image=True))
    assert joined == [plain[0], *(n + 3 for n in plain[1:])]


def test_skips_come_after_dropout_if_asked() -> None:
    dropped: list[Tensor] = []
    model = small(dropout=0.5, skips_after_dropout=True)
    model.encoder.dropout.register_forward_hook(lambda _m, _i, output: dropped.append(output))
    skips, _ = model.encoder(images())
    assert all(any(s is d for d in dropped) for s in skips)


@pytest.mark.parametrize("said", ["attended", "raw"])
def test_cross_talk_says_the_output_with_or_without_the_mask(said: Any) -> None:
    model = small(cross_talk_from=said).eval()
    speaker, listener = model.decoders["segmentation"].blocks[1], model.decoders["depth"].blocks[2]
    spoken: list[Tensor] = []
    heard: list[Tensor] = []
    speaker.register_forward_hook(lambda _m, _i, output: spoken.append(output[0 if said == "attended" else 1]))
    listener.register_forward_hook(lambda _m, inputs, _o: heard.append(inputs[0][:, -8:]))
    model(images())
    assert torch.equal(heard[0], nn.functional.interpolate(spoken[0], scale_factor=2, mode="bilinear"))


def test_masks_are_in_unit_range_with_one_per_block() -> None:
    outputs, masks = small().forward_with_masks(images())
    assert outputs.keys() == masks.keys() == OUTPUTS.keys()
    for of_task in masks.values():
        assert [tuple(m.shape) for m in of_task] == [(2, 10, 4, 6), (2, 8, 8, 12), (2, 6, 16, 24), (2, 4, 32, 48)]
        assert all(((m >= 0) & (m <= 1)).all() and m.std() > 0 for m in of_task)


def test_mask_multiplies_the_block_output() -> None:
    model = small().eval()
    block = model.decoders["depth"].blocks[0]
    x = torch.randn(2, 10 + 12, 4, 6)
    output, raw, mask = block(x)
    assert torch.equal(raw, block.conv2(block.conv1(x)))
    assert torch.equal(output, mask * raw)
    assert torch.equal(mask, block.mask(block.conv1(x)))  # the paper: from conv 1's output, not from conv 2's


def test_without_attention_there_are_no_masks() -> None:
    model = small(attention=False)
    assert model.forward_with_masks(images())[1] == {"segmentation": [], "depth": []}
    assert not [n for n, _ in model.named_parameters() if "mask" in n]


def touched(model: MTUNet, loss_of: str, decoder: str) -> set[str]:
    """Parts of ``decoder`` that the loss of task ``loss_of`` reaches."""
    model(images())[loss_of].square().sum().backward()
    parameters = model.decoders[decoder].named_parameters()
    return {".".join(n.split(".")[:2]) for n, p in parameters if p.grad is not None and (p.grad != 0).any()}


def test_without_cross_talk_no_gradient_enters_the_other_decoder() -> None:
    assert touched(small(cross_talk=False), "depth", "segmentation") == set()


def test_cross_talk_reaches_the_first_two_blocks_of_the_other_decoder() -> None:
    assert touched(small(), "depth", "segmentation") == {"blocks.0", "ups.0", "blocks.1"}
    assert touched(small(), "segmentation", "depth") == {"blocks.0", "ups.0", "blocks.1"}


@pytest.mark.parametrize(("tasks", "heard"), [(1, 0), (2, 8), (3, 16)])
def test_block_three_hears_every_other_task(tasks: int, heard: int) -> None:
    model = small({f"task{i}": 1 for i in range(tasks)})
    assert model.decoders["task0"].blocks[2].conv1[0].in_channels == 6 + 6 + heard
    assert len(model(images())) == tasks


def test_one_task_is_the_same_with_and_without_cross_talk() -> None:
    kept = [small({"depth": 1}, cross_talk=c).eval()(images())["depth"] for c in (True, False)]
    assert torch.equal(*kept)


def test_channels_last_stays_and_changes_nothing() -> None:
    model = small().eval()
    expected = model(images())
    model.to(memory_format=torch.channels_last)
    layouts = watch_layouts(model)
    outputs = model(images().contiguous(memory_format=torch.channels_last))
    assert layouts and all(layouts)
    for task, output in outputs.items():
        assert output.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output, expected[task])


def test_eval_is_deterministic_and_dropout_acts_in_training_only() -> None:
    model, undropped = small(dropout=0.5), small(dropout=0.0)
    assert not torch.equal(model(images())["depth"], model(images())["depth"])
    assert torch.equal(undropped(images())["depth"], undropped(images())["depth"])
    model.load_state_dict(undropped.state_dict())
    first, second, other = (m.eval()(images())["depth"] for m in (model, model, undropped))
    assert torch.equal(first, second)
    assert torch.equal(first, other)


def test_bfloat16_autocast_trains() -> None:
    model = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images())
    assert {o.dtype for o in outputs.values()} == {torch.bfloat16}
    sum(o.float().square().mean() for o in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_compiles_without_graph_breaks() -> None:
    model = small().eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images())["depth"], model(images())["depth"])
