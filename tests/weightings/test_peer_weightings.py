"""The weightings that eq. 5 is compared with: closed forms, exact resume, agreement of ranks, a training each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.training import MakeConfig, assert_same_state, copy_as_of, final_state, on_two_ranks, records
from mtunet_dist import plugins
from mtunet_dist.config import Config, OptimConfig, load_config
from mtunet_dist.core.optim import build_optimizer, set_lr
from mtunet_dist.core.step import MultiTaskStep
from mtunet_dist.errors import InputError
from mtunet_dist.models.mtunet import MTUNet
from mtunet_dist.runs import resume
from mtunet_dist.train import train
from mtunet_dist.weightings.dwa import DWAWeighting
from mtunet_dist.weightings.scheduled import ScheduledWeighting
from mtunet_dist.weightings.uncertainty import UncertaintyWeighting

TASKS = ["segmentation", "depth"]
FALLING = {"start": (1.0, 1.0), "end": (1.0, 0.1)}
PEERS: dict[str, list[str]] = {
    "dwa": [],
    "uncertainty": ["weighting.lr=0.1"],
    "scheduled": ["weighting.end=[1,0.1]", "weighting.end_epoch=3", "weighting.shape=cosine"],
}


def losses(*values: float) -> dict[str, Tensor]:
    return {task: torch.tensor(value) for task, value in zip(TASKS, values, strict=True)}


def weights(weighting: Any) -> list[float]:
    return [w.item() for w in weighting.weights().values()]


def run_epoch(weighting: Any, steps: Sequence[tuple[float, float]]) -> None:
    for step in steps:
        weighting(losses(*step))
    weighting.end_epoch()


def dwa_by_hand(before: Sequence[float], last: Sequence[float], temperature: float) -> list[float]:
    exps = [math.exp(b / a / temperature) for a, b in zip(before, last, strict=True)]
    return [len(exps) * e / sum(exps) for e in exps]


def test_dwa_by_hand() -> None:
    weighting = DWAWeighting(TASKS)
    run_epoch(weighting, [(2.0, 1.0), (4.0, 3.0)])  # means 3, 2
    assert weights(weighting) == [1, 1]
    run_epoch(weighting, [(1.0, 1.5), (2.0, 2.5)])  # means 1.5, 2: the first has fallen to a half, the second not
    expected = dwa_by_hand((3, 2), (1.5, 2), 2)
    assert weights(weighting) == pytest.approx(expected)
    assert expected[0] < 1 < expected[1]
    assert weighting(losses(10.0, 1.0)).item() == pytest.approx(10 * expected[0] + expected[1])
    run_epoch(weighting, [(2.0, 1.0)])  # with the one before, means 6 and 1
    assert weights(weighting) == pytest.approx(dwa_by_hand((1.5, 2), (6, 1), 2))
    assert sum(weights(weighting)) == pytest.approx(2)


def test_dwa_weights_sum_to_the_number_of_tasks_and_cool_with_temperature() -> None:
    names = ["a", "b", "c"]
    spread = []
    for temperature in (0.5, 2.0, 50.0):
        weighting = DWAWeighting(names, temperature=temperature)
        for values in ((1.0, 1.0, 1.0), (0.5, 1.0, 1.5)):
            weighting(dict(zip(names, map(torch.tensor, values), strict=True)))
            weighting.end_epoch()
        assert weights(weighting) == pytest.approx(dwa_by_hand((1, 1, 1), (0.5, 1, 1.5), temperature))
        assert sum(weights(weighting)) == pytest.approx(3)
        spread.append(max(weights(weighting)) - min(weights(weighting)))
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 0.05


def test_dwa_gradient_is_scaled_by_the_weight_and_evaluation_is_not_noted() -> None:
    weighting = DWAWeighting(TASKS)
    for step in ((1.0, 1.0), (0.2, 1.0)):
        run_epoch(weighting, [step])
    share = weights(weighting)
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    weighting({"segmentation": x[0] ** 2, "depth": x[1] ** 3}).backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([share[0] * 4, share[1] * 27])
    with torch.no_grad():
        weighting(losses(1.0, 2.0))
    weighting.eval()(losses(1.0, 2.0))
    assert weighting.local_count.tolist() == [1, 1]


def test_dwa_leaves_out_what_is_no_number_and_survives_zeros() -> None:
    weighting = DWAWeighting(TASKS)
    run_epoch(weighting, [(2.0, 1.0), (math.nan, 3.0), (4.0, math.inf)])
    weighting.end_epoch()  # an epoch without losses
    run_epoch(weighting, [(math.nan, 1.0)])  # one without any of a task
    assert weights(weighting) == [1, 1]
    run_epoch(weighting, [(1.5, 2.0)])
    assert weights(weighting) == pytest.approx(dwa_by_hand((3, 2), (1.5, 2), 2))
    for step in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e30, 1e-30)):
        run_epoch(weighting, [step])
        assert sum(weights(weighting)) == pytest.approx(2)


def test_uncertainty_by_hand() -> None:
    weighting = UncertaintyWeighting(TASKS)
    factor = 1 / (2 * math.exp(-0.5))
    assert weights(weighting) == pytest.approx([factor, factor])
    assert weighting(losses(3.0, 0.2)).item() == pytest.approx(factor * 3.2 - 0.5)
    with torch.no_grad():
        weighting.log_variances.copy_(torch.tensor([0.0, math.log(2)]))
    x = torch.tensor([3.0, 0.2], requires_grad=True)
    total = weighting(dict(zip(TASKS, x, strict=True)))
    assert total.item() == pytest.approx(3 / 2 + 0.2 / 4 + math.log(2) / 2)
    total.backward()
    assert x.grad is not None and weighting.log_variances.grad is not None
    assert x.grad.tolist() == weights(weighting) == pytest.approx([0.5, 0.25])
    # d/ds of L / (2 exp(s)) + s / 2
    assert weighting.log_variances.grad.tolist() == pytest.approx([0.5 - 3 / 2, 0.5 - 0.2 / 4])
    weighting.end_epoch()
    assert weights(weighting) == pytest.approx([0.5, 0.25])
    assert not any(w.requires_grad for w in weighting.weights().values())


def test_uncertainty_settles_where_the_variance_is_the_loss() -> None:
    weighting = UncertaintyWeighting(TASKS)
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        weighting(losses(2.0, 0.1)).backward()
        optimizer.step()
    assert weighting.log_variances.exp().tolist() == pytest.approx([2, 0.1], rel=1e-2)
    assert weights(weighting) == pytest.approx([1 / 4, 1 / 0.2], rel=1e-2)


def test_uncertainty_is_optimised_with_its_own_lr_which_no_schedule_or_decay_touches() -> None:
    model = MTUNet({"segmentation": 3, "depth": 1}, widths=(4, 4, 4, 4), bottleneck=4)
    weighting = UncertaintyWeighting(TASKS, lr=0.25)
    optimizer = build_optimizer(MultiTaskStep(model, [], weighting), OptimConfig(weight_decay=0.1))
    set_lr(optimizer, 0.5)
    *_, group = optimizer.param_groups
    assert group["params"] == [weighting.log_variances]
    assert (group["lr"], group["weight_decay"]) == (0.25, 0)
    assert UncertaintyWeighting(TASKS).lr == 1e-3


@pytest.mark.parametrize(
    ("options", "second"),
    [
        ({"shape": "constant", "end_epoch": 4}, [1, 1, 1, 1, 1, 1]),
        ({"shape": "linear", "end_epoch": 4}, [1, 0.75, 0.5, 0.25, 0, 0]),
        ({"shape": "linear", "begin_epoch": 2, "end_epoch": 4}, [1, 1, 1, 0.5, 0, 0]),
        ({"shape": "cosine", "end_epoch": 4}, [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0, 0]),
        ({"shape": "step", "end_epoch": 4}, [1, 1, 1, 1, 0, 0]),
        ({"shape": "step", "end_epoch": 4, "steps": 2}, [1, 1, 0.5, 0.5, 0, 0]),
        ({"shape": "step", "begin_epoch": 1, "end_epoch": 4, "steps": 3}, [1, 1, 2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_schedules_by_hand(options: dict[str, Any], second: list[float]) -> None:
    weighting = ScheduledWeighting(TASKS, start=(0.5, 3.0), end=(0.5, 1.0), **options)
    for way in second:
        expected = [0.5, 1 + 2 * way]
        assert weights(weighting) == pytest.approx(expected)
        assert weighting(losses(2.0, 0.25)).item() == pytest.approx(0.5 * 2 + expected[1] * 0.25)
        weighting.end_epoch()


def test_no_jump_is_late_by_rounding() -> None:
    for span in (49, 98, 103):  # 1 / 49 * 49 < 1
        weighting = ScheduledWeighting(
            TASKS, start=(0.0, 1.0), end=(1.0, 0.0), shape="step", end_epoch=span, steps=span
        )
        for epoch in range(span + 1):
            assert weights(weighting) == pytest.approx([epoch / span, 1 - epoch / span])
            weighting.end_epoch()


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("dwa", {"temperature": 0.0}, "temperature"),
        ("uncertainty", {"lr": 0.0}, "lr"),
        ("scheduled", {"start": (1.0,)}, "start"),
        ("scheduled", {"end": (1.0, 1.0, 1.0)}, "end"),
        ("scheduled", {"end": (1.0, -1.0)}, "end"),
        ("scheduled", {"start": (1.0, math.inf)}, "start"),
        ("scheduled", {"shape": "sine"}, "constant, linear, cosine, step"),
        ("scheduled", {"begin_epoch": -1}, "begin_epoch"),
        ("scheduled", {"begin_epoch": 5, "end_epoch": 5}, "end_epoch"),
        ("scheduled", {"steps": 0}, "steps"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        plugins.find("weighting", name)(TASKS, **options)


def test_a_schedule_is_typed_from_the_command_line() -> None:
    words = ["start=[1,1]", "end=[1,0.1]", "shape=cosine", "begin_epoch=0", "end_epoch=50", "name=scheduled"]
    config = load_config(None, ["run_dir=r", "data.root=d", *(f"weighting.{word}" for word in words)])
    assert config.weighting == {
        "name": "scheduled",
        "start": (1.0, 1.0),
        "end": (1.0, 0.1),
        "shape": "cosine",
        "begin_epoch": 0,
        "end_epoch": 50,
        "steps": 1,
    }
    with pytest.raises(InputError, match=r"weighting 'scheduled'.*end_epoch"):
        load_config(None, ["run_dir=r", "data.root=d", "weighting.name=scheduled", "weighting.end_epoch=soon"])


def test_forward_never_waits_for_the_device() -> None:
    # Meta tensors have no values.
    for name in PEERS:
        weighting = plugins.find("weighting", name)(TASKS).to("meta")
        assert weighting({task: torch.empty((), device="meta") for task in TASKS}).is_meta


def make(name: str) -> Any:
    return ScheduledWeighting(TASKS, **FALLING, end_epoch=7) if name == "scheduled" else DWAWeighting(TASKS)


def random_epochs(epochs: int, steps: int) -> list[list[tuple[float, float]]]:
    values = torch.rand(epochs, steps, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, 0.1])
    return [[(a, b) for a, b in epoch] for epoch in values.tolist()]


@pytest.mark.parametrize("name", ["dwa", "scheduled"])
def test_history_survives_a_resume_in_mid_epoch(name: str) -> None:
    epochs = random_epochs(6, 5)
    straight, first, second = (make(name) for _ in range(3))
    for epoch in epochs:
        run_epoch(straight, epoch)
    for epoch in epochs[:3]:
        run_epoch(first, epoch)
    for step in epochs[3][:2]:
        first(losses(*step))
    second.load_state_dict({n: t.clone() for n, t in first.state_dict().items()})
    for epoch in (epochs[3][2:], *epochs[4:]):
        run_epoch(second, epoch)
    assert weights(second) == weights(straight) != weights(make(name))
    for n, tensor in straight.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[n]), n


def test_dwa_on_two_ranks_is_dwa_of_one_that_sees_all(tmp_path: Path) -> None:
    on_two_ranks(_uneven_epochs, tmp_path)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = DWAWeighting(TASKS)
    for epoch in random_epochs(4, 8):
        run_epoch(alone, epoch)
    assert weights(alone) != [1, 1]
    for name in ("factors", "previous", "epochs"):
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], alone.state_dict()[name], rtol=1e-12, atol=0)


def _uneven_epochs(folder: Path) -> None:
    """The first rank sees 2 to 4 of the 8 steps of an epoch, the second the others."""
    weighting = DWAWeighting(TASKS)
    for number, epoch in enumerate(random_epochs(4, 8)):
        uneven = 2 + number % 3
        run_epoch(weighting, epoch[:uneven] if dist.get_rank() == 0 else epoch[uneven:])
    torch.save(weighting.state_dict(), folder / f"{dist.get_rank()}.pt")


@pytest.mark.parametrize("name", PEERS)
def test_trainings_report_weights_that_change_and_agree_on_both_ranks(
    make_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    config = make_config(*plain(name), "epochs=3", "log.every_steps=1", "eval_every_epochs=0")
    on_two_ranks(_train_and_note, config, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one == two
    reported = [[r["weight/segmentation"], r["weight/depth"]] for r in records(config.run_dir, "train")]
    assert len(reported) == 9
    start, end = reported[0], reported[-1]
    assert end == pytest.approx(one)
    assert end != pytest.approx(start, abs=1e-3)
    assert start == pytest.approx([0.5 * math.exp(0.5)] * 2 if name == "uncertainty" else [1, 1], rel=0.2)
    if name == "dwa":
        assert [sum(pair) for pair in reported] == pytest.approx([2] * 9)
        assert reported[4] == [1, 1]  # in epoch 1
        assert reported[6] == reported[7] != [1, 1]
    if name == "scheduled":
        assert [depth for _, depth in reported[1::3]] == pytest.approx([1, 0.775, 0.325])
        assert end == pytest.approx([1, 0.1])


def _train_and_note(config: Config, folder: Path) -> None:
    """Train, and write down the weights that this rank has at the end."""
    save = resume.save

    def noting(run: resume.Run, *, best: bool, wait: bool) -> None:
        torch.save(weights(run.module.weighting), folder / f"{dist.get_rank()}.pt")
        save(run, best=best, wait=wait)

    resume.save = noting
    train(config)


@pytest.mark.parametrize("name", PEERS)
def test_trainings_resume_in_mid_epoch_with_the_same_bits(make_config: MakeConfig, tmp_path: Path, name: str) -> None:
    settings = [*plain(name), "epochs=4", "checkpoint.every_steps=2", "checkpoint.keep=99", "log.pictures=0"]
    whole, again = (make_config(*settings, f"run_dir={tmp_path / run}") for run in ("whole", "again"))
    train(whole)
    copy_as_of(8, Path(whole.run_dir), Path(again.run_dir))  # the third epoch's second step
    train(again)
    assert_same_state(final_state(again.run_dir), final_state(whole.run_dir))
    assert records(again.run_dir, "train")[-1]["weight/depth"] == records(whole.run_dir, "train")[-1]["weight/depth"]


def plain(name: str) -> list[str]:
    return [f"weighting.name={name}", *PEERS[name], "eval_every_epochs=0"]
