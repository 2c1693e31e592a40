"""DeepSpeed: every ZeRO stage makes the same updates as DDP and as one process, and they read each other's state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.training import (
    TASKS,
    MakeConfig,
    assert_same_state,
    copy_as_of,
    final_state,
    on_two_ranks,
    records,
    train_each,
)
from mtunet_dist import distributed, plugins
from mtunet_dist.config import load_config
from mtunet_dist.core.step import Batch, MultiTaskStep, build_step, share_valid_counts
from mtunet_dist.errors import InputError
from mtunet_dist.strategies._loss_scale import LossScale
from mtunet_dist.strategies._strategy import Strategy

State = dict[str, Any]

CPU = torch.device("cpu")
SAMPLES = 8  # per optimiser step, over all ranks and micro-batches
STRATEGIES = ("ddp", "zero0", "zero1", "zero2", "zero3")
OPTIMIZERS = {"sgd": ["optim.name=sgd", "optim.momentum=0.9"], "adam": ["optim.name=adam", "optim.weight_decay=0.01"]}


class TwoWeights(nn.Module):
    """A weighting that learns by gradient: a parameter group of two numbers with a rate of its own."""

    lr = 0.01

    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor([0.1, -0.1]))

    def forward(self, losses: dict[str, Tensor]) -> Tensor:
        return (torch.stack(list(losses.values())) * self.logs.exp() - self.logs).sum()

    def end_epoch(self) -> None: ...

    def weights(self) -> dict[str, Tensor]:
        return {}


def zero(stage: int, folder: Path) -> list[str]:
    """The settings for DeepSpeed; stage 3 by itself would leave parameters as small as these in one piece."""
    words = ["strategy.name=deepspeed", f"strategy.stage={stage}"]
    if stage == 3:
        file = folder / f"zero3_{distributed.rank()}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 500}}))
        words.append(f"strategy.config_file={file}")
    return words


def make_strategy(name: str, folder: Path, *overrides: str) -> Strategy:
    """``name`` around a narrow network without dropout, with a weighting that learns, and frozen batch norm."""
    words = ["run_dir=x", "data.root=x", "model.widths=[4,4,6,6]", "model.bottleneck=6", "model.dropout=0"]
    words += [f"batch_size={SAMPLES}", "channels_last=false", "weighting.name=equal"]
    if name.startswith("zero"):
        words += zero(int(name.removeprefix("zero")), folder)
    config = load_config(None, [*words, *overrides])
    torch.manual_seed(0)
    built = build_step(config, TASKS)
    step = MultiTaskStep(built.model, built.tasks, TwoWeights(), config.precision)
    strategy: Strategy = plugins.build("strategy", config.strategy, step, config, CPU)
    for module in strategy.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return strategy


def make_batches(step: int, accumulate: int) -> list[Batch]:
    """This rank's micro-batches of an optimiser step: the same samples, however many share them."""
    random = torch.Generator().manual_seed(step)
    batch: Batch = {
        "image": torch.randint(0, 256, (SAMPLES, 3, 16, 32), generator=random).byte(),
        "segmentation": torch.randint(0, 3, (SAMPLES, 16, 32), generator=random).byte(),
        "depth": torch.rand((SAMPLES, 1, 16, 32), generator=random) + 1,
    }
    batch["segmentation"][0] = 255
    batch["image"] = batch["image"].to(memory_format=torch.channels_last)
    parts, size = accumulate * distributed.world_size(), distributed.world_size()
    shares = {key: value.chunk(parts)[distributed.rank() :: size] for key, value in batch.items()}
    return [{key: share[i] for key, share in shares.items()} for i in range(accumulate)]


def train(strategy: Strategy, steps: range, accumulate: int = 1, lr: float = 0.01) -> list[float]:
    """The gradient norms of the steps."""
    norms = []
    for step in steps:
        batches = make_batches(step, accumulate)
        share_valid_counts(batches, strategy.module.tasks)
        for i, batch in enumerate(batches):
            with strategy.accumulate(last=i == accumulate - 1):
                strategy.backward(strategy(batch)[0] / accumulate)
        norms.append(strategy.apply(lr).item())
    return norms


def clone(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: clone(value) for key, value in state.items()}
    return state.clone() if isinstance(state, Tensor) else state


def difference(a: State, b: State) -> float:
    """The largest between two numbers of weights and optimiser state, which must be of the same names."""
    assert a.keys() == b.keys()
    return max(difference(x, b[k]) if isinstance(x, dict) else (x - b[k]).abs().max().item() for k, x in a.items())


def learned(state: State) -> State:
    return {"model": state["model"], "optimizer": state["optimizer"]}


# The equality table. Fused optimisers round the last elements of a tensor differently from the rest, and where a
# tensor ends depends on how the stage cuts it up: bits can only be expected where the cuts are the same. With foreach
# optimisers, which treat all elements alike, every strategy gives the same bits.

CASES = [("sgd", 1, 0.0), ("sgd", 2, 0.5), ("adam", 1, 0.0), ("adam", 2, 0.0)]  # optimiser, accumulate, clip_norm
FOREACH = [("sgd foreach", 1, 0.0), ("adam foreach", 1, 0.0)]
STEPS = 8


def run_case(name: str, folder: Path, optimizer: str, accumulate: int, clip_norm: float) -> dict[str, Any]:
    """State after the first and, without accumulation, the last step; gradient norms."""
    words = [*OPTIMIZERS[optimizer.split()[0]], f"optim.accumulate={accumulate}", f"optim.clip_norm={clip_norm}"]
    strategy: Any = make_strategy(name, folder, *words)
    if "foreach" in optimizer:
        for group in strategy.optimizer.param_groups:
            group["fused"], group["foreach"] = False, True
    norms = train(strategy, range(1), accumulate)
    states = {"first": clone(strategy.save())}
    if accumulate == 1:
        norms += train(strategy, range(1, STEPS))
        states["last"] = clone(strategy.save())
    strategy.close()
    return {**states, "norms": norms}


def _run_cases(folder: Path) -> None:
    for case in (*CASES, *FOREACH):
        for name in STRATEGIES:
            result = run_case(name, folder, *case)
            if distributed.is_main():
                torch.save(result, folder / f"{name}-{'-'.join(map(str, case))}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks wrote what every strategy makes of every case."""
    folder = tmp_path_factory.mktemp("table")
    on_two_ranks(_run_cases, folder)
    return folder


def table(folder: Path, case: tuple[str, int, float]) -> dict[str, dict[str, Any]]:
    return {name: torch.load(folder / f"{name}-{'-'.join(map(str, case))}.pt") for name in STRATEGIES}


@pytest.mark.parametrize("case", CASES)
def test_one_step_of_two_ranks_is_that_of_one_process(
    two_ranks: Path, tmp_path: Path, case: tuple[str, int, float]
) -> None:
    one = run_case("ddp", tmp_path, *case)
    for name, two in table(two_ranks, case).items():
        differences = [difference(two["first"][part], one["first"][part]) for part in ("model", "optimizer")]
        print(f"{case} {name}: weights {differences[0]:.1e}, moments {differences[1]:.1e}, norm {two['norms'][0]:.7f}")
        torch.testing.assert_close(learned(two["first"]), learned(one["first"]), rtol=1e-5, atol=1e-6)
        assert two["norms"][0] == pytest.approx(one["norms"][0], rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_end_alike_and_to_the_bit_where_tensors_are_cut_alike(two_ranks: Path, optimizer: str) -> None:
    results = table(two_ranks, (optimizer, 1, 0.0))
    for name, result in results.items():
        print(f"{optimizer} {name}: weights {difference(result['last']['model'], results['ddp']['last']['model']):.1e}")
        torch.testing.assert_close(learned(result["last"]), learned(results["ddp"]["last"]), rtol=1e-4, atol=1e-5)
        assert result["norms"] == pytest.approx(results["ddp"]["norms"], rel=1e-4)
    for a, b in (("ddp", "zero0"), ("zero1", "zero2")):
        assert_same_state(results[a]["last"], results[b]["last"])
        assert results[a]["norms"] == results[b]["norms"]


@pytest.mark.parametrize("case", FOREACH)
def test_steps_end_with_the_same_bits_under_every_strategy(two_ranks: Path, case: tuple[str, int, float]) -> None:
    results = table(two_ranks, case)
    for name in STRATEGIES[1:]:
        assert_same_state(learned(results[name]["last"]), learned(results["ddp"]["last"]))
    assert difference(results["ddp"]["last"]["model"], results["ddp"]["first"]["model"]) > 1e-3


def test_the_norm_is_clipped_and_reported_unclipped(two_ranks: Path) -> None:
    clipped, unclipped = table(two_ranks, ("sgd", 2, 0.5)), table(two_ranks, ("sgd", 1, 0.0))
    for name in STRATEGIES:
        norm = unclipped[name]["norms"][0]
        assert norm > 1
        assert clipped[name]["norms"][0] == pytest.approx(norm, rel=1e-5)
        for result, expected in ((clipped[name], 0.5), (unclipped[name], norm)):
            gradients = [slots["momentum_buffer"] for slots in result["first"]["optimizer"].values()]
            assert nn.utils.get_total_norm(gradients).item() == pytest.approx(expected, rel=1e-5)


def test_one_process_and_a_cpu_offload(tmp_path: Path) -> None:
    words = [*OPTIMIZERS["adam"], "optim.clip_norm=0.5"]
    ends = {}
    offloads = [(name, offload) for name in STRATEGIES[1:] for offload in ("false", "true")][1:]
    for name, offload in [("ddp", ""), *offloads]:
        if offload == "true" and name == "zero0":
            continue
        more = [f"strategy.offload_optimizer={offload}"] if offload else []
        strategy = make_strategy(name, tmp_path, *words, *more)
        norms = train(strategy, range(2))
        ends[name, offload] = clone(strategy.save()), norms
        strategy.close()
        assert not distributed.is_on()
    for end, norms in ends.values():
        torch.testing.assert_close(learned(end), learned(ends["ddp", ""][0]), rtol=1e-5, atol=1e-6)
        assert norms == pytest.approx(ends["ddp", ""][1], rel=1e-5)


# Resuming, under the same strategy and under others.

PAIRS = [
    *((name, name) for name in STRATEGIES),
    *(("ddp", "zero0"), ("ddp", "zero1"), ("ddp", "zero3"), ("zero0", "zero2"), ("zero1", "ddp")),
    *(("zero1", "zero2"), ("zero2", "zero0"), ("zero3", "zero1"), ("zero3", "ddp")),
]
SAME_CUTS = ({"ddp", "zero0"}, {"zero1", "zero2"})


def _continue_under_others(folder: Path) -> None:
    words = OPTIMIZERS["adam"]
    ends = {}
    for name in STRATEGIES:
        strategy = make_strategy(name, folder, *words)
        train(strategy, range(2))
        write(strategy.save(), folder / f"{name}.pt")
        train(strategy, range(2, 4))
        ends[name] = clone(strategy.save())
        write(ends[name], folder / f"{name}-end.pt")
    for before, after in PAIRS:
        saved = torch.load(folder / f"{before}.pt")
        strategy = make_strategy(after, folder, *words)
        strategy.load(saved)
        loaded = strategy.save()
        if distributed.is_main():
            assert_same_state(loaded, saved)
        train(strategy, range(2, 4))
        end = strategy.save()
        if not distributed.is_main():
            continue
        print(f"{before} -> {after}: {difference(learned(end), learned(ends[before])):.1e}", flush=True)
        if before == after or {before, after} in SAME_CUTS:
            assert_same_state(end, ends[before])
        torch.testing.assert_close(learned(end), learned(ends[before]), rtol=1e-6, atol=1e-6)


def write(state: State, path: Path) -> None:
    """As a checkpoint is written; afterwards every rank can read it."""
    if distributed.is_main():
        torch.save(state, path)
    torch.distributed.barrier()


def test_every_strategy_continues_what_another_saved(tmp_path: Path) -> None:
    on_two_ranks(_continue_under_others, tmp_path)
    for before, after in (("zero3", "ddp"), ("zero1", "zero3"), ("zero2", "zero2"), ("ddp", "zero1")):
        saved, end = (torch.load(tmp_path / f"{before}{what}.pt") for what in ("", "-end"))
        strategy = make_strategy(after, tmp_path, *OPTIMIZERS["adam"])
        strategy.load(saved)
        assert_same_state(strategy.save(), saved)
        train(strategy, range(2, 4))
        torch.testing.assert_close(learned(strategy.save()), learned(end), rtol=1e-5, atol=1e-6)
        strategy.close()


def test_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    for name in ("ddp", "zero1"):
        strategy = make_strategy(name, tmp_path)
        state = strategy.save()
        state["optimizer"]["other"] = state["optimizer"].pop("weighting.logs")
        with pytest.raises(InputError, match=r"of other parameters; first difference: other"):
            strategy.load(state)
        strategy.close()


# Precision.


def _reduced_precision(folder: Path) -> None:
    fp32 = train(make_strategy("ddp", folder), range(1))[0]
    for name in STRATEGIES:
        for precision in ("bf16", "fp16"):
            strategy = make_strategy(name, folder, f"precision={precision}", "optim.clip_norm=0.5")
            norm = train(strategy, range(1))[0]
            assert norm == pytest.approx(fp32, rel=0.05)
            assert norm != fp32
            state = strategy.save()

        # A gradient that overflows is not applied, and the scale shrinks; all strategies write that the same way.
        if distributed.is_main():
            assert state["scaler"]["scale"] == 65536
            assert state["scaler"]["_growth_tracker"] == 1
            state["scaler"]["scale"] = 2.0**60
        write(state, folder / f"{name}.pt")
        state = torch.load(folder / f"{name}.pt")
        strategy.load(state)
        assert not torch.tensor(train(strategy, range(1))).isfinite().any()
        after = strategy.save()
        if distributed.is_main():
            assert_same_state(learned(after), learned(state))
            assert after["scaler"] == {**state["scaler"], "scale": 2.0**59, "_growth_tracker": 0}


def test_bf16_and_fp16(tmp_path: Path) -> None:
    on_two_ranks(_reduced_precision, tmp_path)


def test_the_loss_scale_grows_as_torchs() -> None:
    ours, torchs = LossScale(enabled=True), torch.amp.GradScaler("cpu")
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for step in range(2100):
        overflow = step in (5, 50)
        torchs.scale(weight.sum() * (float("inf") if overflow else 1e-3)).backward()
        torchs.step(optimizer)
        torchs.update()
        optimizer.zero_grad()
        ours.update(overflow=overflow)
        assert ours.state_dict() == torchs.state_dict()
    assert ours.value == 65536 / 2


# Whole trainings.


def test_a_training_under_stage_3_resumes_to_the_bit_and_evaluates_as_under_ddp(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    common = ["epochs=1", "checkpoint.every_steps=1", "checkpoint.keep=99", "model.dropout=0"]
    names = ("ddp", "whole", "again")
    settings = {name: [*common, f"run_dir={tmp_path / name}"] for name in names}
    stage_3 = [*settings["whole"], *zero(3, tmp_path)]
    ddp, whole = make_config(*settings["ddp"]), make_config(*stage_3)
    on_two_ranks(train_each, [ddp, whole])
    again = make_config(*settings["again"], *zero(3, tmp_path))
    copy_as_of(2, tmp_path / "whole", tmp_path / "again")
    on_two_ranks(train_each, [again])
    assert_same_state(final_state(again.run_dir), final_state(whole.run_dir))
    for a, b in zip(records(whole.run_dir, "eval"), records(ddp.run_dir, "eval"), strict=True):
        assert a["loss/depth"] == pytest.approx(b["loss/depth"], rel=1e-3)
        assert a["miou"] == pytest.approx(b["miou"], abs=0.01)


# Settings.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["strategy.stage=4"], r"strategy\.stage=4 is no stage of ZeRO\. Available: 0, 1, 2, 3"),
        (["strategy.stage=0", "strategy.offload_optimizer=true"], r"needs strategy\.stage=1, 2 or 3"),
        (["strategy.stage=3", "compile=true"], r"compile=true leaves nothing to compile under strategy\.stage=3"),
        (
            ["strategy.config_file=nowhere.json"],
            r"config_file=nowhere\.json \(in the working folder /.*\) cannot be read: No such file",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_strategy("zero1", tmp_path, *words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train_batch_size": 4}', r"train_batch_size=4 contradicts 8, which follows from batch_size"),
        ('{"gradient_clipping": 1.0}', r"gradient_clipping=1\.0 contradicts 0\.0, which follows from optim\.clip_norm"),
        ('{"zero_optimization": {"stage": 2}}', r"zero_optimization\.stage=2 contradicts 1, .* strategy\.stage"),
        ('{"bf16": {"enabled": true}}', r"bf16\.enabled=true contradicts false, which follows from precision"),
        ('{"optimizer": {"type": "Adam"}}', r'optimizer\.type="Adam" is for optim\.name to say'),
        (
            '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}',
            r'offload_optimizer\.device="cpu" is for strategy\.offload_optimizer to say',
        ),
        ('{"zero_optimization": 2}', r"zero_optimization=2: zero_optimization is a section"),
        ('{"zero_optimization": {"buckets": 2}}', r"buckets"),  # DeepSpeed's own word
        ('{"amp": {"enabled": true}}', r"AMP"),
        ("[]", r"must hold one object"),
        ("{", r"is not JSON"),
    ],
)
def test_a_file_of_deepspeed_settings_that_contradicts_the_config_is_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "zero.json"
    file.write_text(content)
    with pytest.raises(InputError, match=rf"^strategy\.config_file={file}.*{message}"):
        make_strategy("zero1", tmp_path, f"strategy.config_file={file}")
    assert not distributed.is_on()


def test_a_file_of_deepspeed_settings_is_laid_over_ours(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    content = {"train_batch_size": "auto", "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}
    file.write_text(json.dumps(content))
    strategy: Any = make_strategy("zero1", tmp_path, f"strategy.config_file={file}")
    assert strategy.engine.zero_reduce_bucket_size() == 1000
    assert strategy.engine.train_batch_size() == SAMPLES
    assert strategy.engine.gradient_clipping() == 0
    strategy.close()
