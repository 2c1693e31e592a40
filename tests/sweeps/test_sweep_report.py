"""What a sweep leaves to read: order and choice of trials, results.csv, report.md, pictures, TensorBoard HParams."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from torch.utils.tensorboard import SummaryWriter

from mtunet_dist.config import load_config
from mtunet_dist.errors import MTUNetError
from mtunet_dist.sweeps.config import Sweep
from mtunet_dist.sweeps.folder import Evaluation, Exploit, Trial
from mtunet_dist.sweeps.objective import Objective
from mtunet_dist.sweeps.ranking import limits, rank
from mtunet_dist.sweeps.report.hparams import write_hparams
from mtunet_dist.sweeps.report.importance import MIN_TRIALS, importances
from mtunet_dist.sweeps.report.report import Stage, report, schedule, write_csv

SPACE = {
    "optim.lr": {"loguniform": [1e-4, 1e-1]},
    "optim.name": {"choice": ["adam", "sgd"]},
    "data.augment.scales": {"choice": [[1.0], [1.0, 1.2, 1.5]]},
    "optim.momentum": {"uniform": [0.5, 0.9], "when": {"optim.name": ["sgd"]}},
}
BOTH = Objective(("miou", "depth_abs"), "pareto")


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "base.yaml").write_text("data: {root: data}\nepochs: 4\n", encoding="utf-8")
    return Sweep("a | title", str(tmp_path), "base.yaml", SPACE, Objective(("depth_abs",)))


def trial(id: str, status: Any, *values: float, **more: Any) -> Trial:
    """A trial with the evaluations ``values`` of depth_abs; miou is half of them."""
    parameters = {"optim.lr": 1 / 3000, "optim.name": "adam", "data.augment.scales": [1.0, 1.2, 1.5]}
    evaluations = tuple(Evaluation(e, {"depth_abs": v, "miou": v / 2}) for e, v in enumerate(values, start=1))
    return Trial(id, parameters, status, evaluations, **more)


def run_report(trials: list[Trial], sweep: Sweep) -> tuple[str, str]:
    """What it prints and writes."""
    console = Console(file=io.StringIO(), width=120)
    report(trials, sweep, sweep.dir / "base.yaml", console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), (sweep.dir / "report.md").read_text(encoding="utf-8")


def test_the_best_is_the_best_finished_trial(sweep: Sweep) -> None:
    trials = [
        trial("0", "finished", 9.0, 3.0),
        trial("1", "failed", error="InputError: bad"),
        trial("2", "stopped", 1.0),
        trial("3", "finished", math.nan),
        trial("4", "finished", 2.0),
        trial("5", "unfinished", 0.5),
        trial("6", "failed", 0.1),
    ]
    ranking = rank(trials, sweep)
    assert [t.id for t in ranking.trials] == ["4", "0", "3", "5", "2", "6", "1"]
    assert ranking.best is trials[4]
    assert rank(trials, dataclasses.replace(sweep, objective=Objective(("miou",)))).best is trials[0]
    assert rank([t for t in trials if t.id not in "04"], sweep).best is trials[2]
    assert rank([trials[1], trials[5]], sweep).best is None


def test_of_several_goals_the_front_member_with_the_best_mean_gain(sweep: Sweep) -> None:
    figures = {"a": (0.50, 1.00), "b": (0.60, 0.40), "c": (0.62, 0.90), "d": (0.40, 0.39), "e": (0.60, 0.41)}
    trials = [
        Trial(id, {}, "finished", (Evaluation(1, {"miou": miou, "depth_abs": depth}),))
        for id, (miou, depth) in figures.items()
    ]
    ranking = rank([*trials, trial("f", "stopped", 0.1)], dataclasses.replace(sweep, objective=BOTH))
    assert [t.id for t in ranking.front] == ["b", "d", "c"]  # of 0.60 and 0.41: gains 0 + 2 %, -33 + 5 %, 3 - 120 %
    assert ranking.best is trials[1]
    assert [t.id for t in ranking.trials] == ["b", "d", "c", "e", "a", "f"]


def test_results_csv_reads_back_exactly(sweep: Sweep, tmp_path: Path) -> None:
    trials = [trial("0", "finished", 0.5, 1 / 3), trial("1", "failed", error='a, "b"')]
    write_csv(tmp_path / "results.csv", trials, dataclasses.replace(sweep, objective=BOTH))
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert [*first] == ["trial", "status", "epoch", *SPACE, "miou", "depth_abs", "error"]
    assert (float(first["depth_abs"]), float(first["miou"])) == (1 / 3, 1 / 6)
    assert (float(first["optim.lr"]), first["epoch"], first["optim.momentum"]) == (1 / 3000, "2", "")
    assert json.loads(first["data.augment.scales"]) == [1.0, 1.2, 1.5]
    assert (second["depth_abs"], second["epoch"], second["error"]) == ("", "", 'a, "b"')


def test_a_report_says_what_was_searched_and_found(sweep: Sweep) -> None:
    several = dataclasses.replace(sweep, objective=BOTH)
    trials = [trial(f"{n:05d}", "finished", 2.0, 1.0 + n / 10) for n in range(11)]
    trials += [trial("00011", "stopped", 5.0), trial("00012", "failed", error="InputError: x | y")]
    printed, written = run_report(trials, several)
    assert "11 finished, 1 stopped early, 1 failed" in written and "not over" not in written
    assert "miou (higher is better) and depth_abs (lower is better)" in written
    assert "| `optim.momentum` | uniform | 0.5 to 0.9 | optim.name in sgd |" in written
    assert "| 00012 | InputError: x \\| y |" in written
    assert "The best 10 of 13" in written and "00012 failed: InputError: x | y" in printed
    best = rank(trials, several).best
    assert best and f"Trial {best.id}" in written and f"best: {best.id}" in printed
    pictures = [line.split("(")[1].rstrip(")") for line in written.splitlines() if line.startswith("![")]
    assert pictures == [f"report/{name}.png" for name in ("curves", "parallel", "pareto", "importance")]
    for picture in pictures:
        assert Image.open(sweep.dir / picture).width > 500
    config = load_config(sweep.dir / "best.yaml")
    assert (config.optim.lr, config.data.augment.scales, config.epochs) == (1 / 3000, (1.0, 1.2, 1.5), 4)
    assert config.run_dir == str(sweep.dir / "best")


def test_the_name_of_a_sweep_is_shown_as_it_is(sweep: Sweep) -> None:
    """Also where rich would take it for markup."""
    printed, _ = run_report([trial("0", "finished", 2.0, 1.0)], dataclasses.replace(sweep, name="[/x] :car: [red]"))
    assert "[/x] :car: [red]" in printed


def test_a_report_of_a_sweep_that_is_not_over_or_has_nothing(sweep: Sweep) -> None:
    printed, written = run_report([], sweep)
    assert "none yet" in printed and "0 trials: none yet" in written
    printed, written = run_report([trial("0", "unfinished", 1.0), trial("1", "failed", error="E: no")], sweep)
    assert "no trial has ended with a value" in printed and "**The sweep is not over**" in written
    assert "1 failed, 1 unfinished" in written and not (sweep.dir / "best.yaml").exists()
    with pytest.raises(MTUNetError, match="none of the 2 trials has a depth_abs: E: no"):
        run_report([trial("0", "finished", math.nan), trial("1", "failed", error="E: no")], sweep)
    assert "1 finished, 1 failed" in (sweep.dir / "report.md").read_text(encoding="utf-8")


def test_the_schedule_of_a_population_follows_the_weights_back(sweep: Sweep) -> None:
    for id, lr in (("0", 0.1), ("1", 0.01), ("2", 0.001)):
        (sweep.dir / "trials" / id).mkdir(parents=True)
        first = {"optim.lr": lr, "optim.name": "adam"}
        (sweep.dir / "trials" / id / "trial.json").write_text(json.dumps({"parameters": first}), encoding="utf-8")

    def exploit(epoch: int, source: str, lr: float) -> Exploit:
        return Exploit(epoch, source, {"optim.lr": lr, "optim.name": "adam"})

    trials = [
        trial("0", "finished", 4.0, 3.0, 2.0, 1.0, history=(exploit(1, "2", 0.5), exploit(3, "1", 0.02))),
        trial("1", "finished", 4.0, 3.0, 2.0, 2.0, history=(exploit(2, "2", 0.002), exploit(3, "0", 0.7))),
        trial("2", "finished", 4.0, 3.0, 2.0, 2.0, history=()),
    ]
    assert schedule(trials[0], trials, sweep) == [
        Stage(0, "2", {"optim.lr": 0.001, "optim.name": "adam"}),
        Stage(2, "2", {"optim.lr": 0.002, "optim.name": "adam"}),
        Stage(3, "1", {"optim.lr": 0.02, "optim.name": "adam"}),
    ]
    _, written = run_report(trials, sweep)
    assert "| 0 | 2 | optim.lr = 0.001, optim.name = adam |" in written
    assert "| 3 | 1 | optim.lr = 0.02 |" in written
    assert "belongs to no one setting" in written


def response(count: int, stopped_after: int = 0) -> list[Trial]:
    """Trials whose depth error depends on the learning rate alone, and for sgd on momentum.

    Half of them may be stopped early, with errors that say nothing: those of their epoch are much greater.
    """
    rng, trials = random.Random(0), []
    for number in range(count):
        lr, name, momentum = 10 ** rng.uniform(-4, -1), rng.choice(["adam", "sgd"]), rng.uniform(0.5, 0.9)
        parameters = {"optim.lr": lr, "optim.name": name, "data.augment.scales": rng.choice([[1.0], [1.0, 1.2, 1.5]])}
        error = 1 + (math.log10(lr) + 2.5) ** 2
        if name == "sgd":
            parameters["optim.momentum"] = momentum
            error += 20 * (0.9 - momentum)
        values = [error * 100, error * 50, error]
        stopped = stopped_after and number % 2
        evaluations = [Evaluation(e, {"depth_abs": v}) for e, v in enumerate(values, start=1)]
        status: Any = "stopped" if stopped else "finished"
        trials.append(Trial(str(number), parameters, status, tuple(evaluations[: stopped_after if stopped else 3])))
    return trials


@pytest.mark.parametrize("stopped_after", [0, 2])
def test_the_parameter_that_matters_is_told_from_those_that_do_not(sweep: Sweep, stopped_after: int) -> None:
    trials = [*response(60, stopped_after), trial("x", "failed", 0.0), trial("y", "unfinished", 0.0)]
    found = importances(trials, sweep)
    assert found and found.epoch == (stopped_after or None)
    judged = found.by_goal["depth_abs"]
    assert judged["optim.lr"].strength > 1 and judged["optim.momentum"].strength > 1
    assert judged["data.augment.scales"].strength < 1
    assert judged["optim.lr"].trials == 60
    assert judged["optim.momentum"].trials == sum("optim.momentum" in t.parameters for t in trials) < 40
    assert min(judged["optim.momentum"].good) > 0.75


def test_of_few_trials_nothing_is_told(sweep: Sweep) -> None:
    few = importances(response(MIN_TRIALS - 1), sweep)
    assert few and all(math.isnan(judged.strength) for judged in few.by_goal["depth_abs"].values())
    assert "too few trials to tell" in run_report(response(MIN_TRIALS - 1), sweep)[1]


def test_an_axis_shows_the_good_values(sweep: Sweep) -> None:
    (goal,) = sweep.objective.goals
    low, high = limits([1.0, 1.1, 1.2, 1.3, 1e6, math.nan, math.inf], goal)
    assert low < 1.0 and 1.3 < high < 3.0
    assert limits([], goal) == (0.0, 1.0)


def sessions(folder: Path) -> tuple[Any, dict[str, Any]]:
    """What TensorBoard's HParams tab would show of ``folder``: the experiment, and the session of each run."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(folder))))
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE]
    request = api_pb2.ListSessionGroupsRequest(allowed_statuses=statuses, slice_size=100)
    groups = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    hparams = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, hparams, [])
    return experiment, {group.name: group for group in groups}


def test_tensorboard_reads_settings_results_and_ends(sweep: Sweep) -> None:
    combined = Objective(("miou", "depth_abs"), "delta_m", {"miou": 0.5, "depth_abs": 1.0})
    sweep = dataclasses.replace(sweep, objective=combined)
    sgd = dataclasses.replace(
        trial("1", "failed", 2.0),
        parameters={"optim.lr": 0.01, "optim.name": "sgd", "optim.momentum": 0.75, "data.augment.scales": [1.0]},
    )
    for ended in (trial("0", "finished", 3.0, 2.0), sgd):
        write_hparams(dataclasses.replace(ended, status="unfinished", evaluations=()), sweep)
        folder = sweep.dir / "trials" / ended.id / "tensorboard"
        for first in (1, 2):  # and resumed
            write_hparams(dataclasses.replace(ended, status="unfinished"), sweep)
            with SummaryWriter(str(folder), purge_step=first if first > 1 else None) as board:
                for evaluation in ended.evaluations[first - 1 : first]:
                    board.add_scalar("eval/miou", evaluation.metrics["miou"], evaluation.epoch)
                    board.add_scalar("train/loss", 1.0, evaluation.epoch)
        write_hparams(ended, sweep)
        write_hparams(ended, sweep)
        assert len(list(folder.glob("*hparams*"))) == 2
    experiment, groups = sessions(sweep.dir / "trials")
    assert {info.name for info in experiment.hparam_infos} == set(SPACE)
    assert [info.name.tag for info in experiment.metric_infos][:2] == ["eval/delta_m", "eval/miou"]
    assert sorted(groups) == ["0/tensorboard", "1/tensorboard"]
    first, second = (groups[name] for name in sorted(groups))
    assert {key: value.string_value or value.number_value for key, value in first.hparams.items()} == {
        "optim.lr": 1 / 3000,
        "optim.name": "adam",
        "data.augment.scales": "[1.0, 1.2, 1.5]",
    }
    assert second.hparams["optim.momentum"].number_value == 0.75
    values = {value.name.tag: value.value for value in first.metric_values}
    assert values == {
        "eval/delta_m": pytest.approx(combined.values({"miou": 1.0, "depth_abs": 2.0})[0]),
        "eval/miou": 1.0,
    }
    assert [group.sessions[0].status for group in (first, second)] == [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE]
    assert [len(group.sessions) for group in (first, second)] == [1, 1]

    write_hparams(dataclasses.replace(sgd, status="unfinished"), sweep)  # tried again
    assert sessions(sweep.dir / "trials")[1]["1/tensorboard"].sessions[0].status == api_pb2.STATUS_UNKNOWN
