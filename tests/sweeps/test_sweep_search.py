"""Searchers and schedulers of a sweep: what they know of the trials before, without a Ray."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtunet_dist.sweeps.config import Asha as AshaOptions
from mtunet_dist.sweeps.config import Pbt, Sweep
from mtunet_dist.sweeps.folder import Trial, read_trials, trial_folder, write_outcome, write_parameters
from mtunet_dist.sweeps.objective import Objective
from mtunet_dist.sweeps.ray_backend.schedule import Asha, Population
from mtunet_dist.sweeps.ray_backend.search import OBJECTIVE, OptunaSearch, open_trials
from mtunet_dist.sweeps.ray_backend.tuner import room, tune  # it sets what Ray reads when it is imported

TrialScheduler, Searcher = tune.schedulers.TrialScheduler, tune.search.Searcher

SPACE = {
    "weighting.name": {"choice": ["equal", "fixed"]},
    "weighting.weights": {"share": [0.2, 0.8], "when": {"weighting.name": "fixed"}},
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
    "data.augment.scales": {"choice": [[1.0], [1.0, 1.5]]},
}


def make(tmp_path: Path, **more: Any) -> Sweep:
    return Sweep(**{"name": "s", "run_dir": str(tmp_path), "config": "", "space": SPACE, "trials": 8, **more})


def evaluate(folder: Path, *values: float) -> None:
    """Evaluations after epochs 1, 2, ... in a trial's folder."""
    records = [
        {"kind": "eval", "step": e, "epoch": e, "miou": None if math.isnan(v) else v, "depth_abs": 1 - v}
        for e, v in enumerate(values, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def test_random_trials_that_have_ended_do_not_run_again_and_keep_their_parameters(tmp_path: Path) -> None:
    sweep = make(tmp_path, trials=4)
    first = open_trials(sweep)
    assert [trial.id for trial in first] == ["00000", "00001", "00002", "00003"]
    write_outcome(trial_folder(tmp_path, 1), "failed", "lost")
    write_parameters(trial_folder(tmp_path, 2), {"optim.lr": 0.005})  # as if sampled by another version
    again = open_trials(make(tmp_path, trials=6))
    assert [trial.id for trial in again] == ["00000", "00002", "00003", "00004", "00005"]
    assert again[0] == first[0] and again[1].parameters == {"optim.lr": 0.005}


@pytest.mark.parametrize("metrics", [("miou",), ("miou", "depth_abs")])
def test_optuna_goes_on_with_what_the_folder_knows(tmp_path: Path, metrics: tuple[str, ...]) -> None:
    sweep = make(tmp_path, searcher="optuna", objective=Objective(metrics, combine="pareto"))
    search = OptunaSearch(sweep)
    for n in range(4):
        assert search.suggest(f"tune_{n}") == {"trial": f"0000{n}"}
        evaluate(trial_folder(tmp_path, n), 0.1, 0.2 + n / 10)
    search.on_trial_result("tune_0", {"epoch": 1, OBJECTIVE: 0.1})
    for n, status in enumerate(("finished", "stopped", "failed")):
        write_outcome(trial_folder(tmp_path, n), status)  # type: ignore[arg-type]
        search.on_trial_complete(f"tune_{n}", error=status == "failed")
    states = [trial.state.name for trial in search.study.trials]
    assert states == ["COMPLETE", "PRUNED" if len(metrics) == 1 else "RUNNING", "FAIL", "RUNNING"]

    resumed = OptunaSearch(sweep)
    known = [trial.state.name for trial in resumed.study.trials]
    assert known == ["COMPLETE", "PRUNED", "FAIL"]
    assert resumed.study.trials[0].values == [0.2, 0.8][: len(metrics)]
    before = read_trials(tmp_path)[3].parameters
    assert resumed.suggest("tune_a") == {"trial": "00003"}  # it goes on, with its own parameters
    assert read_trials(tmp_path)[3].parameters == before
    asked = resumed.study.trials[-1].params
    assert {key: asked[key] for key in before if key != "data.augment.scales"} == {
        key: json.dumps(value) if isinstance(value, str) else value
        for key, value in before.items()
        if key != "data.augment.scales"
    }
    for n in range(4, 8):
        assert resumed.suggest(f"tune_{n}") == {"trial": f"0000{n}"}
    assert resumed.suggest("tune_8") == Searcher.FINISHED
    parameters = [trial.parameters for trial in read_trials(tmp_path)]
    assert len({json.dumps(p) for p in parameters}) == 8
    for trial in parameters:
        assert ("weighting.weights" in trial) == (trial["weighting.name"] == "fixed")
        assert trial["data.augment.scales"] in ([1.0], [1.0, 1.5])


def test_a_deleted_trial_is_tried_again_and_no_other_is_touched(tmp_path: Path) -> None:
    sweep = make(tmp_path, searcher="optuna", trials=4)
    search = OptunaSearch(sweep)
    for n in range(3):
        search.suggest(str(n))
        write_outcome(trial_folder(tmp_path, n), "finished")
    shutil.rmtree(trial_folder(tmp_path, 1))
    resumed = OptunaSearch(sweep)
    assert [resumed.suggest(str(n)) for n in range(2)] == [{"trial": "00001"}, {"trial": "00003"}]
    assert resumed.suggest("2") == Searcher.FINISHED
    assert [trial.status for trial in read_trials(tmp_path)] == ["finished", "unfinished", "finished", "unfinished"]


def test_optuna_learns(tmp_path: Path) -> None:
    """Of a response that wants a high learning rate: later proposals are higher than the first, random ones."""
    sweep = make(tmp_path, searcher="optuna", trials=60, space={"optim.lr": {"loguniform": [1e-4, 1e-2]}})
    search = OptunaSearch(sweep)
    rates = []
    for n in range(60):
        search.suggest(str(n))
        folder = trial_folder(tmp_path, n)
        rates.append(read_trials(tmp_path)[n].parameters["optim.lr"])
        evaluate(folder, math.log10(rates[-1]) + 5)
        write_outcome(folder, "finished")
        search.on_trial_complete(str(n))
    assert sum(rate > 5e-3 for rate in rates[30:]) > 15 > 8 > sum(rate > 5e-3 for rate in rates[:10])


def tune_trial(name: str) -> Any:
    return SimpleNamespace(trial_id=f"tune_{name}", config={"trial": name})


def test_asha_stops_and_knows_those_before(tmp_path: Path) -> None:
    sweep = make(tmp_path, scheduler="asha", asha=AshaOptions(grace_epochs=1, reduction=2), trials=6)
    trials = open_trials(sweep)
    for n, value in enumerate((0.5, 0.6, 0.7)):
        evaluate(trial_folder(tmp_path, n), value)
    write_outcome(trial_folder(tmp_path, 0), "stopped")
    write_outcome(trial_folder(tmp_path, 1), "finished")
    asha = Asha(sweep, epochs=4)
    good, new_bad, new_good = (tune_trial(trials[n].id) for n in (2, 3, 4))
    for trial in (good, new_bad, new_good):
        asha.on_trial_add(None, trial)
    assert asha.on_trial_result(None, good, {"epoch": 2, OBJECTIVE: 0.7}) == TrialScheduler.CONTINUE
    assert asha.on_trial_result(None, new_bad, {"epoch": 1, OBJECTIVE: 0.4}) == TrialScheduler.STOP
    assert asha.on_trial_result(None, new_good, {"epoch": 1, OBJECTIVE: 0.8}) == TrialScheduler.CONTINUE


def test_asha_does_not_judge_again_what_a_trial_did_before(tmp_path: Path) -> None:
    """Those that have come since are better; that is no reason to end it now."""
    sweep = make(tmp_path, scheduler="asha", asha=AshaOptions(grace_epochs=1, reduction=2), trials=3)
    trials = open_trials(sweep)
    evaluate(trial_folder(tmp_path, 0), 0.1, 0.2, 0.3)
    for n in (1, 2):
        evaluate(trial_folder(tmp_path, n), 0.8)
        write_outcome(trial_folder(tmp_path, n), "stopped")
    asha, goes_on = Asha(sweep, epochs=8), tune_trial(trials[0].id)
    asha.on_trial_add(None, goes_on)
    assert asha.on_trial_result(None, goes_on, {"epoch": 3, OBJECTIVE: 0.3}) == TrialScheduler.CONTINUE
    assert asha.on_trial_result(None, goes_on, {"epoch": 4, OBJECTIVE: 0.4}) == TrialScheduler.CONTINUE
    assert asha.on_trial_result(None, goes_on, {"epoch": 8, OBJECTIVE: 0.5}) == TrialScheduler.STOP  # the end
    asha.on_trial_complete(None, goes_on, {"epoch": 8, OBJECTIVE: 0.5})


def test_a_population_keeps_ids_and_ranges(tmp_path: Path) -> None:
    space = {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "weighting.weights": {"share": [0.2, 0.8]}}
    sweep = make(tmp_path, scheduler="pbt", pbt=Pbt(interval_epochs=2), space=space)
    population = Population(sweep, epochs=8)
    worse = SimpleNamespace(config={"trial": "00001", "optim.lr": 1e-4, "weighting.weights": 0.2})
    better = SimpleNamespace(config={"trial": "00002", "optim.lr": 1e-2, "weighting.weights": 0.8})
    seen = [population._get_new_config(worse, better)[0] for _ in range(200)]
    assert {config["trial"] for config in seen} == {"00001"}
    assert all(1e-4 <= c["optim.lr"] <= 1e-2 and 0.2 <= c["weighting.weights"] <= 0.8 for c in seen)
    assert {1e-2, 8e-3} <= {c["optim.lr"] for c in seen}  # times 1.2, kept in its range, and times 0.8
    assert sum(c["optim.lr"] not in (1e-2, 8e-3) for c in seen) > 20  # drawn anew
    assert better.config["trial"] == "00002"
    # Parameters that come with the last evaluation would act no more.
    assert population.on_trial_result(None, worse, {"epoch": 8, OBJECTIVE: 0.1}) == TrialScheduler.CONTINUE


def test_a_trial_is_what_its_folder_says(tmp_path: Path) -> None:
    folder = trial_folder(tmp_path, 0)
    write_parameters(folder, {"optim.lr": 1 / 3})
    assert read_trials(tmp_path) == [Trial("00000", {"optim.lr": 1 / 3}, "unfinished")]
    evaluate(folder, 0.5, math.nan)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "eval", "ste')  # cut short by a kill
    (trial,) = read_trials(tmp_path)
    assert trial.last and trial.last.epoch == 2 and math.isnan(trial.last.metrics["miou"])


def test_workers_are_counted_node_by_node(tmp_path: Path) -> None:
    sweep = make(tmp_path, workers_per_trial=5, cpus_per_worker=12, gpus_per_worker=1)
    assert [room(sweep, node) for node in ({"CPU": 32.0, "GPU": 4.0}, {"CPU": 64.0, "GPU": 1.0}, {"CPU": 64.0})] == [
        2,
        1,
        0,
    ]
    assert room(make(tmp_path, gpus_per_worker=0.1), {"CPU": 64.0, "GPU": 1.0}) == 10


def test_a_process_lost_before_its_trial_began_has_a_reason() -> None:
    from mtunet_dist.sweeps.ray_backend.live import reason  # imports ray, and must not do so before tuner.py

    assert reason(SimpleNamespace(pickled_error_file=None)) == "no error that Tune has kept"
