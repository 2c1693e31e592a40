"""The models that MT-UNet is compared with: sizes as published, wiring as in the MTAN code, gradients, layouts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import write_folder_source
from helpers.layouts import watch_layouts
from helpers.training import final_state, on_two_ranks, records, train_each
from mtunet_dist import plugins
from mtunet_dist.config import load_config
from mtunet_dist.errors import InputError
from mtunet_dist.models._segnet import Body, Maps, pool, unpool
from mtunet_dist.models.cross_stitch import CrossStitch
from mtunet_dist.models.dense import Dense
from mtunet_dist.models.mtan import MTAN
from mtunet_dist.models.mtunet import MTUNet
from mtunet_dist.models.segnet import SegNet
from mtunet_dist.models.st_unet import STUNet
from mtunet_dist.prepare import prepare

OUTPUTS = {"segmentation": 5, "depth": 1}
NYU, CITYSCAPES = {"segmentation": 13, "depth": 1, "normals": 3}, {"segmentation": 7, "depth": 1}
WIDTHS = (4, 6, 8, 10, 12)
SEGNETS = ["cross_stitch", "dense", "mtan", "segnet", "stan"]
ALL = [*SEGNETS, "st_unet"]
APART = ["segnet", "st_unet", "stan"]  # nothing shared between tasks
DEAD_IN_DENSE = {7: 41_109, 13: 44_583}  # by number of classes; what the MTAN code has besides, and never reads


def small(name: str, outputs: dict[str, int] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    widths: dict[str, Any] = {"widths": WIDTHS}
    if name == "st_unet":
        widths = {"widths": WIDTHS[:4], "bottleneck": 12, "dropout": 0.0}
    return plugins.find("model", name)(outputs or OUTPUTS, **{**widths, **options})


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 64, 96), generator=torch.Generator().manual_seed(1))


def reached(model: nn.Module, task: str) -> set[str]:
    """Names of the parameters that a loss of ``task`` moves."""
    model.zero_grad()
    model(images())[task].square().sum().backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}


def parts(names: set[str], depth: int) -> set[str]:
    return {".".join(name.split(".")[:depth]) for name in names}


@pytest.mark.parametrize(
    ("name", "outputs", "published"),
    [
        ("segnet", {"segmentation": 13}, 24.98),
        ("stan", {"segmentation": 13}, 38.19),
        ("dense", NYU, 123.74),
        ("dense", CITYSCAPES, 90.80),
        ("cross_stitch", NYU, 74.94),
        ("cross_stitch", CITYSCAPES, 49.96),
        ("mtan", NYU, 44.23),
        ("mtan", CITYSCAPES, 41.21),
    ],
)
def test_sizes_are_the_published_ones(name: str, outputs: dict[str, int], published: float) -> None:
    with torch.device("meta"):
        model = plugins.find("model", name)(outputs)
    count = sum(p.numel() for p in model.parameters())
    if name == "dense":
        count += DEAD_IN_DENSE[outputs["segmentation"]]
    assert round(count / 1e6, 2) == published


def test_one_segnet_has_the_size_that_the_mtan_code_divides_by() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in SegNet({"segmentation": 13}).parameters()) == 24_981_069


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 96)])
@pytest.mark.parametrize("name", ALL)
def test_output_shapes_on_any_device(name: str, size: tuple[int, int]) -> None:
    model = small(name)
    expected = {"segmentation": (2, 5, *size), "depth": (2, 1, *size)}
    assert {task: tuple(o.shape) for task, o in model(images(2, 3, *size)).items()} == expected
    on_meta = model.to("meta")(torch.empty(2, 3, *size, device="meta"))
    assert {task: tuple(o.shape) for task, o in on_meta.items()} == expected


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tasks", [1, 3])
def test_any_number_of_tasks(name: str, tasks: int) -> None:
    outputs = small(name, {f"task{i}": i + 1 for i in range(tasks)})(images())
    assert {task: o.shape[1] for task, o in outputs.items()} == {f"task{i}": i + 1 for i in range(tasks)}


@pytest.mark.parametrize("name", ALL)
def test_sizes_that_do_not_fit_name_the_nearest(name: str) -> None:
    nearest, stride = ("96x80", 16) if name == "st_unet" else ("96x64", 32)
    with pytest.raises(InputError, match=rf"100x76.*multiples of {stride}, nearest is {nearest}"):
        small(name)(images(1, 3, 100, 76))


@pytest.mark.parametrize("name", ALL)
def test_options_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="at least one task"):
        plugins.find("model", name)({})
    for widths in ((4, 4, 4), (4, 4, 4, 4, 4, 4), (0, 4, 4, 4) if name == "st_unet" else (4, 4, 4, 0, 4)):
        with pytest.raises(InputError, match="positive numbers"):
            small(name, widths=widths)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stitches": "all"}, "matrix, shared"), ({"own": -0.1}, r"\[0, 1\]"), ({"own": 1.1}, r"\[0, 1\]")],
)
def test_stitches_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small("cross_stitch", **options)


@pytest.mark.parametrize("outputs", [OUTPUTS, NYU])
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in ALL), ("cross_stitch", {"stitches": "shared"})])
def test_gradients_reach_every_parameter(name: str, options: dict[str, Any], outputs: dict[str, int]) -> None:
    model = small(name, outputs, **options)
    sum(o.square().sum() for o in model(images()).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    cancelled = {id(bias) for bias in biases_before_batch_norm(model)}
    assert [n for n, p in model.named_parameters() if id(p) not in cancelled and not (p.grad != 0).any()] == []


def biases_before_batch_norm(model: nn.Module) -> list[nn.Parameter]:
    """Their gradient is rounding noise: the norm subtracts them again."""
    found = []
    for layers in model.modules():
        if isinstance(layers, nn.Sequential):
            for layer, following in itertools.pairwise(layers):
                if isinstance(layer, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
                    assert layer.bias is not None
                    found.append(layer.bias)
    return found


@pytest.mark.parametrize("name", APART)
def test_single_task_nets_know_nothing_of_each_other(name: str) -> None:
    model = small(name)
    for task in OUTPUTS:
        assert {n.split(".")[1] for n in reached(model, task)} == {task}


@pytest.mark.parametrize("name", APART)
def test_a_task_is_the_same_with_and_without_others_beside_it(name: str) -> None:
    both, alone = small(name).eval(), small(name, {"depth": 1}).eval()
    mine = {n: t for n, t in both.state_dict().items() if ".depth." in n}
    alone.load_state_dict(mine)
    assert torch.equal(alone(images())["depth"], both(images())["depth"])


def test_st_unet_is_mt_unet_with_one_decoder() -> None:
    model = small("st_unet")
    assert isinstance(model, STUNet)
    for task, net in model.nets.items():
        assert isinstance(net, MTUNet)
        assert set(net.decoders) == {task}
    with torch.device("meta"):
        one, other = STUNet({"depth": 1}), MTUNet({"depth": 1})
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in other.parameters())
    assert "AttentionMask" in str(model) and "AttentionMask" not in str(small("st_unet", attention=False))


def test_unpooling_puts_values_back_where_they_were() -> None:
    x = torch.tensor([[1.0, 2, 8, 7], [4, 3, 5, 6], [9, 0, 1, 1.5], [0, 0, 3, 2]]).view(1, 1, 4, 4)
    expected = torch.tensor([[0.0, 0, 8, 0], [4, 0, 0, 0], [9, 0, 0, 0], [0, 0, 3, 0]]).view(1, 1, 4, 4)
    assert torch.equal(unpool(*pool(x)), expected)


def windows(x: Tensor) -> Tensor:
    """(..., H, W) -> (..., H / 2, W / 2, 4)."""
    return x.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2)).movedim(-3, -2).flatten(-2)


def test_each_decoder_level_unpools_by_the_indices_of_its_encoder_level() -> None:
    torch.manual_seed(0)
    maps = Body(WIDTHS)(images())
    for unpooled, (_, last) in zip(maps.unpooled, reversed(maps.encoder), strict=True):
        filled = windows(unpooled) != 0
        assert filled.any()
        assert filled.sum(-1).max() == 1
        # Where all four are 0 any of them may be the place.
        at_the_maximum = windows(last) == windows(last).amax(-1, keepdim=True)
        assert at_the_maximum[filled].all()


def test_a_level_has_vgg_16s_convolutions_and_its_first_changes_the_width() -> None:
    body = Body(WIDTHS)
    encoder = [[c.in_channels for c in level.modules() if isinstance(c, nn.Conv2d)] for level in body.encoder]
    decoder = [[c.in_channels for c in level.modules() if isinstance(c, nn.Conv2d)] for level in body.decoder]
    assert encoder == [[3, 4], [4, 6], [6, 8, 8], [8, 10, 10], [10, 12, 12]]
    assert decoder == [[12, 10, 10], [10, 8, 8], [8, 6, 6], [6, 4], [4, 4]]


def test_dense_feeds_each_task_the_shared_maps() -> None:
    model = small("dense")
    assert isinstance(model, Dense)
    shared: list[Maps] = []
    seen: list[Tensor] = []
    model.shared.register_forward_hook(lambda _m, _i, maps: shared.append(maps))
    body = model.bodies["depth"]
    assert isinstance(body, Body)
    for level in [*body.encoder, *body.decoder]:
        level.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    model(images())
    assert torch.equal(seen[0], images())
    theirs = [*shared[0].pooled[:4], *shared[0].unpooled]
    for mine, other in zip(seen[1:], theirs, strict=True):
        assert mine.shape[1] == 2 * other.shape[1]
        assert torch.equal(mine[:, other.shape[1] :], other)
    assert parts(reached(model, "depth"), 2) == {"shared.encoder", "shared.decoder", "bodies.depth", "heads.depth"}


def test_stitches_are_weighted_sums() -> None:
    model = small("cross_stitch", NYU)
    assert isinstance(model, CrossStitch)
    with torch.no_grad():
        model.mixing.copy_(torch.randn(9, 3, 3))
    maps = [images(2, 4, 8, 8) * factor for factor in (1, -2, 3)]
    for place in range(9):
        expected = torch.einsum("ts,snchw->tnchw", model.mixing[place], torch.stack(maps))
        torch.testing.assert_close(torch.stack(model.mix(place, maps)), expected)
    by_hand = small("cross_stitch", own=0.8)
    torch.testing.assert_close(by_hand.mixing[8].detach(), torch.tensor([[0.8, 0.2], [0.2, 0.8]]))
    x, y = by_hand.mix(3, [torch.tensor([10.0]), torch.tensor([20.0])])
    assert (x.item(), y.item()) == pytest.approx((12, 18))


def test_shared_stitches_give_all_tasks_one_sum() -> None:
    model = small("cross_stitch", NYU, stitches="shared")
    assert model.mixing.shape == (9, 3)
    x = torch.tensor([1.0])
    assert [m.item() for m in model.mix(0, [x, 10 * x, 100 * x])] == [111, 111, 111]


@pytest.mark.parametrize("stitches", ["matrix", "shared"])
def test_stitches_are_before_encoder_levels_and_unpoolings(stitches: str) -> None:
    model = small("cross_stitch", stitches=stitches).eval()
    with torch.no_grad():
        model.mixing.copy_(torch.rand(model.mixing.shape) + 0.1)
    weights = model.mixing if stitches == "matrix" else model.mixing[:, None].expand(9, 2, 2)
    nets = [model.bodies["segmentation"], model.bodies["depth"]]
    x, indices = [images(), images()], []
    for i in range(5):
        if i > 0:
            x = [weights[i - 1, t, 0] * x[0] + weights[i - 1, t, 1] * x[1] for t in range(2)]
        pooled = [F.max_pool2d(net.encoder[i](m)[1], 2, return_indices=True) for net, m in zip(nets, x, strict=True)]
        x, of_level = zip(*pooled, strict=True)
        indices.append(of_level)
    for k in range(5):
        x = [weights[4 + k, t, 0] * x[0] + weights[4 + k, t, 1] * x[1] for t in range(2)]
        x = [F.max_unpool2d(x[t], indices[4 - k][t], (2, 2)) for t in range(2)]
        x = [net.decoder[k](m)[1] for net, m in zip(nets, x, strict=True)]
    outputs = model(images())
    for t, task in enumerate(OUTPUTS):
        torch.testing.assert_close(outputs[task], model.heads[task](x[t]))


def test_gradients_cross_through_the_stitches_and_nowhere_else() -> None:
    model = small("cross_stitch")
    crossed = parts(reached(model, "depth"), 4)
    levels = {f"bodies.segmentation.encoder.{i}" for i in range(5)}
    levels |= {f"bodies.segmentation.decoder.{i}" for i in range(4)}  # the last has no stitch after it
    assert {part for part in crossed if "segmentation" in part} == levels
    assert not {n for n in reached(small("cross_stitch", own=1.0), "depth") if "segmentation" in n}


def test_stitched_to_themselves_alone_they_are_segnets() -> None:
    stitched, apart = small("cross_stitch", own=1.0).eval(), small("segnet").eval()
    apart.load_state_dict({n: t for n, t in stitched.state_dict().items() if n != "mixing"})
    for task, output in stitched(images()).items():
        assert torch.equal(output, apart(images())[task])


def test_attention_masks_are_in_unit_range_with_ten_per_task() -> None:
    outputs, masks = small("mtan").forward_with_masks(images())
    assert outputs.keys() == masks.keys() == OUTPUTS.keys()
    sizes = [(64, 96), (32, 48), (16, 24), (8, 12), (4, 6)]
    down = [(2, width, *size) for width, size in zip(WIDTHS, sizes, strict=True)]
    up = [(2, width, *size) for width, size in zip((10, 8, 6, 4, 4), reversed(sizes), strict=True)]
    for of_task in masks.values():
        assert [tuple(m.shape) for m in of_task] == [*down, *up]
        assert all(((m >= 0) & (m <= 1)).all() and m.std() > 0 for m in of_task)


def test_masks_multiply_the_shared_maps() -> None:
    model = small("mtan").eval()
    assert isinstance(model, MTAN)
    carried: list[Tensor] = []
    for carry in (*model.carry_down, model.heads["depth"][0]):
        carry.register_forward_hook(lambda _m, inputs, _o: carried.append(inputs[0]))
    _, masks = small("mtan").eval().forward_with_masks(images())
    maps = model.body(images())
    model(images())
    of_depth = carried[5:10]  # the first five are the other task's, which uses the same convolutions
    for x, mask, (_, last) in zip(of_depth, masks["depth"][:5], maps.encoder, strict=True):
        torch.testing.assert_close(x, mask * last)
    torch.testing.assert_close(carried[-1], masks["depth"][-1] * maps.decoder[-1])


def test_attention_of_one_task_does_not_learn_from_another() -> None:
    parts_of = {"body.encoder", "body.decoder", "masks_down.depth", "masks_up.depth", "heads.depth"}
    parts_of |= {f"carry_{way}.{i}" for way in ("down", "up") for i in range(5)}
    assert parts(reached(small("mtan"), "depth"), 2) == parts_of


@pytest.mark.parametrize("name", SEGNETS)
def test_initial_values(name: str) -> None:
    for module in small(name, widths=(16, 16, 16, 16, 16)).modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None and not module.bias.any()
            fan = (module.in_channels + module.out_channels) * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.5 if fan < 60 else 0.2)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()


@pytest.mark.parametrize("name", ALL)
def test_same_input_same_output(name: str) -> None:
    model, again = small(name), small(name)
    outputs, repeated = model(images()), again(images())
    assert all(torch.equal(outputs[task], repeated[task]) for task in OUTPUTS)
    model.eval()
    assert all(torch.equal(o, model(images())[task]) for task, o in model(images()).items())


@pytest.mark.parametrize("name", ALL)
def test_channels_last_stays_and_changes_nothing(name: str) -> None:
    model = small(name).eval()
    expected = model(images())
    model.to(memory_format=torch.channels_last)
    layouts = watch_layouts(model)
    outputs = model(images().contiguous(memory_format=torch.channels_last))
    assert layouts and all(layouts)
    for task, output in outputs.items():
        torch.testing.assert_close(output, expected[task])


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_autocast_trains(name: str) -> None:
    model = small(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images())
    assert {o.dtype for o in outputs.values()} == {torch.bfloat16}
    sum(o.float().square().mean() for o in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_compiles_without_graph_breaks(name: str) -> None:
    model = small(name, {"depth": 1} if name in APART else None).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images())["depth"], model(images())["depth"])


def test_each_trains_from_the_demo_config_on_two_ranks(tmp_path: Path) -> None:
    write_folder_source(tmp_path / "source")
    prepare("folder", tmp_path / "source", tmp_path / "prepared", height=32, width=64)
    common = [f"data.root={tmp_path / 'prepared'}", "device=cpu", "batch_size=4", "epochs=1", "log.every_steps=1"]
    demo = Path(__file__).parents[2] / "configs" / "demo.yaml"
    configs = []
    for name in ALL:
        options = ["widths=[4,4,8,8]", "bottleneck=8"] if name == "st_unet" else ["widths=[4,4,8,8,8]"]
        words = [f"model.{word}" for word in (f"name={name}", *options)]
        configs.append(load_config(demo, [f"run_dir={tmp_path / name}", *common, *words]))
    on_two_ranks(train_each, configs)
    for config in configs:
        steps = records(config.run_dir, "train")
        assert [r["step"] for r in steps] == [1, 2, 3]
        assert all(math.isfinite(r["loss/total"]) and r["grad_norm"] > 0 for r in steps)
        assert final_state(config.run_dir)["step"] == 3
