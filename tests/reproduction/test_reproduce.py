"""Reproducing tables and figures: what is trained, what is not again, what is written, what is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtunet_dist import reproduce
from mtunet_dist.config import load_config
from mtunet_dist.core.comparison import delta_m
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError, PreemptedError
from mtunet_dist.reproduction import experiments, figures, streets, table
from mtunet_dist.reproduction.budgets import BUDGETS
from mtunet_dist.reproduction.experiments import DATASETS, SYSTEMS, TARGETS, Row, Target
from mtunet_dist.reproduction.launching import Launcher, run_all
from mtunet_dist.reproduction.trainings import LAST_EPOCHS, Setup, Training, plan
from mtunet_dist.runs import checkpoint
from mtunet_dist.synthetic.tree import Settings as SyntheticSettings
from mtunet_dist.system.preemption import StopRequest
from mtunet_dist.tasks.depth import Depth
from mtunet_dist.tasks.segmentation import Segmentation

SHORTER = ["epochs=1", "device=cpu", "eval_batch_size=4"]
NEVER = f"{sys.executable} -c 1/0 {{config}}"  # a launcher that fails whenever it is used
ALONE = f"{sys.executable} -m mtunet_dist.train {{config}}"  # one process, not torchrun's three
MakeSetup = Callable[..., Setup]


@pytest.fixture(autouse=True)
def tiny_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every dataset has the three classes of the tiny data."""
    for name, dataset in DATASETS.items():
        monkeypatch.setitem(experiments.DATASETS, name, dataclasses.replace(dataset, classes=3))


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """SIGINT as in the foreground. Tests that a script starts in the background ignore it, and so would the code."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def make_setup(three_splits: Path, tmp_path: Path) -> MakeSetup:
    """``make_setup("epochs=1", ..., seeds=2)``: the smoke budget on the tiny data with overrides."""

    def make(*overrides: str, budget: str = "smoke", **others: Any) -> Setup:
        roots = dict.fromkeys(DATASETS, str(three_splits))
        return Setup(tmp_path, budget, BUDGETS[budget], roots, tuple(overrides), **others)

    return make


def of(*systems: str, dataset: str = "nyuv2", **options: Any) -> Target:
    """A target of these systems."""
    return Target("A table", tuple(Row(system, dataset) for system in systems), **options)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of ``reproduce`` with these words."""
    monkeypatch.setattr(sys, "argv", ["reproduce", *words])
    try:
        reproduce.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def pretend(training: Training, miou: float, depth: float, weights: Sequence[float] = (0.5, 0.5)) -> None:
    """Leave in the run folder what a training that measured these figures leaves, without training."""
    training.checkpoint.parent.mkdir(parents=True)
    training.checkpoint.touch()
    steps = training.total_steps
    measured = {"miou": miou, "accuracy": miou, "depth_abs": depth, "depth_rel": depth, "legacy/miou": None}
    task_weights = {"weight/segmentation": weights[0], "weight/depth": weights[1]}
    records = [
        {"kind": "train", "step": steps, "epoch": 1.0, "samples_per_s": training.config.batch_size / 3, **task_weights},
        {"kind": "eval", "step": steps, "epoch": 1.0, **measured},
    ]
    (training.dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"kind": "tr')


def by_system(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {line["system"]: line for line in csv.DictReader(file)}


def test_a_moved_out_folder_is_known_by_its_new_place(make_setup: MakeSetup, tmp_path: Path) -> None:
    setup = make_setup(seeds=1)
    before = plan(TARGETS["table2"], setup)
    for training in before:
        pretend(training, miou=0.5, depth=1.0)
        training.write_config()
    (tmp_path / "b").mkdir()
    (tmp_path / "smoke").rename(tmp_path / "b" / "smoke")
    after = plan(TARGETS["table2"], dataclasses.replace(setup, out=tmp_path / "b"))
    assert len(after) == len(before) and all(t.metrics and t.metrics["miou"] == 0.5 for t in after)
    assert [load_config(t.dir / "config.yaml").run_dir for t in after] == [t.config.run_dir for t in after]


@pytest.mark.slow
def test_trainings_become_a_table_and_figures_and_are_not_run_again(
    three_splits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = of("st_unet", "mtunet")
    monkeypatch.setitem(experiments.TARGETS, "table2", small)
    monkeypatch.setitem(experiments.TARGETS, "figure3", small)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["table2", "figure3", "figure5", "--nyuv2", str(three_splits), "--out", str(tmp_path), *SHORTER]
    monkeypatch.setitem(experiments.TARGETS, "figure5", of("mtunet"))
    assert run(monkeypatch, *words) == 0, capsys.readouterr()

    out = tmp_path / "smoke"
    runs = out / "nyuv2"
    config = load_config(runs / "mtunet" / "seed0" / "config.yaml")
    assert (config.data.train, config.data.eval, config.model["widths"]) == ("train+val", "test", (4, 8, 16, 32))
    # The last checkpoint's only evaluation, on the whole test split, is what the table says.
    measured = [json.loads(line) for line in (runs / "mtunet" / "seed0" / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = [record for record in measured if record["kind"] == "eval"]
    rows = by_system(out / "table2.csv")
    mtunet = rows[SYSTEMS["mtunet"].title]
    for name in ("miou", "depth_rel", "legacy/accuracy", "legacy/depth_abs"):
        assert float(mtunet[f"{name}_mean"]) == evaluation[name]
    assert math.isfinite(float(mtunet["delta_m_mean"]))
    assert float(rows["best constant"]["accuracy_mean"]) > 0
    text = (out / "table2.md").read_text(encoding="utf-8")
    assert "trained on train+val (17 images), measured on test (5) once" in text
    for name in ("figure3", "figure5"):
        assert np.asarray(Image.open(out / f"{name}.png")).std() > 20

    before = (runs / "mtunet" / "seed0" / "metrics.jsonl").read_bytes()
    assert run(monkeypatch, *words, "--launcher", NEVER) == 0
    assert (runs / "mtunet" / "seed0" / "metrics.jsonl").read_bytes() == before
    assert (out / "table2.md").read_text(encoding="utf-8") == text


@pytest.mark.slow
def test_a_failed_training_is_passed_over_and_said(
    three_splits: Path,
    make_setup: MakeSetup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = of("mtan", "dense", "stan")
    monkeypatch.setitem(experiments.TARGETS, "table2", target)
    pretend(plan(target, make_setup(*SHORTER))[1], 0.5, 1.0)
    said = f"{sys.executable} -c \"import sys; print('working'); sys.exit('error: no memory')\" {{config}}"
    words = ["table2", "--nyuv2", str(three_splits), "--out", str(tmp_path), *SHORTER]
    assert run(monkeypatch, *words, "--launcher", said) == reproduce.FAILED
    assert "2 trainings failed" in capsys.readouterr().out
    text = (tmp_path / "smoke" / "table2.md").read_text(encoding="utf-8")
    assert text.count("(1 without result)") == 2
    assert text.count("exit code 1: error: no memory") == 2
    rows = by_system(tmp_path / "smoke" / "table2.csv")
    assert (rows["MTAN"]["failed_seeds"], rows["MTAN"]["miou_mean"]) == ("0", "")
    assert (rows["Dense"]["failed_seeds"], rows["Dense"]["miou_mean"]) == ("", "0.5")

    # A command that returns at once has not trained.
    assert run(monkeypatch, *words, "--launcher", f"{sys.executable} -c 0 {{config}}") == reproduce.FAILED
    assert "the training is not finished" in (tmp_path / "smoke" / "table2.md").read_text(encoding="utf-8")


def test_a_signal_stops_what_runs_and_starts_no_more(
    make_setup: MakeSetup, tmp_path: Path, heard_interrupts: None
) -> None:
    """As torchrun does, the stand-in of a training waits for SIGTERM and then takes its time."""
    code = (
        "import pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[1]).parent\n"
        "def end(*_): time.sleep(0.5); (folder / 'saved').touch(); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, end); (folder / 'begun').touch(); time.sleep(90)"
    )
    script = tmp_path / "stand_in.py"
    script.write_text(code)
    trainings = plan(TARGETS["table2"], make_setup(*SHORTER))
    begun = [t.dir / "begun" for t in trainings[:2]]

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if all(file.is_file() for file in begun):
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.05)

    threading.Thread(target=interrupt).start()
    wrapper = tmp_path / "wrapper.sh"
    wrapper.write_text(f'{sys.executable} {script} "$1"; exit 1\n')  # passes no signals on
    launcher = Launcher(f"sh {wrapper} {{config}}", jobs=2)
    with StopRequest(reproduce.STOPPED_BY) as stop, pytest.raises(PreemptedError, match="SIGINT received: 2 running"):
        run_all(trainings, launcher, stop, lambda *_: pytest.fail("none of them ends by itself"))
    assert all((t.dir / "saved").is_file() for t in trainings[:2])
    assert not any(t.dir.exists() for t in trainings[2:])


def test_a_training_stopped_before_its_last_evaluation_is_not_finished(make_setup: MakeSetup) -> None:
    (training,) = plan(of("mtunet"), make_setup(*SHORTER))
    folder, state = training.checkpoint.parent, {"step": training.total_steps, "metrics": {"miou": 0.5}}
    checkpoint.save(folder, {**state, "evaluated": 0}, keep=1, best=False)
    assert training.metrics is None
    checkpoint.save(folder, {**state, "evaluated": training.total_steps}, keep=1, best=False)
    assert training.metrics == {"miou": 0.5}


@pytest.mark.slow
def test_all_systems_have_trainings_that_the_data_fits(make_setup: MakeSetup) -> None:
    assert {row.system for target in TARGETS.values() for row in target.all_rows} == SYSTEMS.keys()
    setup = make_setup()
    plans = {name: plan(target, setup) for name, target in TARGETS.items()}
    # The same training has the same folder, another one another.
    folders: dict[Path, Training] = {}
    for training in (t for trainings in plans.values() for t in trainings):
        assert folders.setdefault(training.dir, training) == training
    (scheduled,) = [t for t in plans["ablations"] if t.row.system == "mtunet_scheduled"]
    assert scheduled.config.weighting["end_epoch"] == scheduled.config.epochs
    assert all(t.config.eval_every_epochs == 0 for t in folders.values())


def test_the_papers_budget_is_full_width_with_several_seeds(make_setup: MakeSetup) -> None:
    trainings = plan(of("mtunet"), make_setup(budget="paper"))
    assert [t.seed for t in trainings] == [0, 1, 2]
    config = trainings[0].config
    assert (config.epochs, config.batch_size, config.optim.lr, config.optim.name) == (200, 2, 1e-4, "adam")
    assert 69e6 < trainings[0].parameters < 71e6


def test_torchrun_starts_processes_that_share_batch_and_cores(
    make_setup: MakeSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = of("mtunet")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for batch, jobs, processes, threads in ((4, 1, 2, "4"), (3, 1, 1, "8"), (4, 2, 1, "4")):
        (training,) = plan(target, make_setup(f"batch_size={batch}", "device=cpu"))
        launcher = Launcher(jobs=jobs)
        assert f"--nproc-per-node={processes}" in launcher.command(training, Path("config.yaml"))
        assert launcher.environment(training)["OMP_NUM_THREADS"] == threads
    gpus = Launcher()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [gpus.processes(plan(target, make_setup(f"batch_size={n}"))[0].config) for n in (8, 6, 2)] == [4, 3, 2]


def test_delta_m_in_closed_form() -> None:
    single, names = {"miou": 0.4, "accuracy": 0.5, "depth_abs": 2.0, "depth_rel": 0.5}, table.COMPARED
    assert delta_m(single, single, names) == 0
    multi = {"miou": 0.5, "accuracy": 0.6, "depth_abs": 1.8, "depth_rel": 0.6}
    # segmentation (+25 % + 20 %) / 2, depth (+10 % - 20 %) / 2
    assert delta_m(multi, single, names) == pytest.approx((22.5 - 5) / 2)
    assert math.isnan(delta_m({**multi, "miou": math.nan}, single, names))
    assert math.isnan(delta_m(multi, {**single, "depth_abs": 0.0}, names))


def test_what_delta_m_compares_is_what_evaluation_gives() -> None:
    known = {*Segmentation.METRICS, *Depth.METRICS}
    assert set(table.COMPARED) <= known
    assert set(table.IN_CSV) - {table.DELTA} == known


def test_delta_m_is_never_taken_between_datasets(make_setup: MakeSetup) -> None:
    rows = (Row("st_unet", "cityscapes7"), Row("mtunet", "cityscapes7"), Row("mtunet", "cityscapes19"))
    trainings = plan(Target("A table", rows), make_setup(*SHORTER))
    for number, training in enumerate(trainings):
        pretend(training, 0.2 + 0.1 * number, 1.0)
    deltas = [line.figures["delta_m"][0] for line in table.lines_of(trainings, rows)]
    assert deltas[:2] == pytest.approx([0.0, 25.0])
    assert math.isnan(deltas[2])


def test_the_table_has_mean_and_deviation_over_seeds(make_setup: MakeSetup, tmp_path: Path) -> None:
    trainings = plan(of("st_unet", "mtunet"), make_setup(*SHORTER, seeds=3))
    figures_of = {("st_unet", 0): (0.4, 1.0), ("st_unet", 1): (0.4, 2.0), ("mtunet", 0): (0.5, 1.0)}
    figures_of |= {("mtunet", 1): (0.6, 1.0), ("mtunet", 2): (0.7, 1.0)}
    for training in trainings:
        if (training.row.system, training.seed) in figures_of:
            pretend(training, *figures_of[training.row.system, training.seed])
    rows = table.lines_of(trainings, ())
    text = table.markdown("Title", ["About."], [], rows, ["a note"])
    single, multi = [line for line in text.splitlines() if " M | " in line]
    assert "| 2 (1 without result) | 40.00 ± 0.00 |" in single
    # Of seeds 0 and 1, for 2 there is nothing to compare with: (25 + 0) / 2 and (50 + 50) / 2 percent.
    assert "| 3 | 60.00 ± 10.00 | 60.00 ± 10.00 | 1.0000 ± 0.0000 | 1.0000 ± 0.0000 | +31.25 ± 26.52 | - |" in multi
    assert multi.endswith(f"| {3 * trainings[0].total_steps / 60:.1f} |")
    assert text.endswith("\n\n- a note\n")
    table.write_csv(tmp_path / "table.csv", "table2", rows)
    line = by_system(tmp_path / "table.csv")[SYSTEMS["mtunet"].title]
    assert float(line["miou_std"]) == pytest.approx(0.1)
    assert line["legacy/miou_mean"] == ""
    assert (line["seeds"], line["kind"]) == ("0 1 2", "ours")


def test_others_figures_stand_only_beside_the_same_size(dataset: PreparedDataset) -> None:
    same = dataclasses.replace(dataset.info, height=128, width=256)
    assert [line.title for line in table.published_lines("nyuv2", same)] == ["AdaMT-Net", "XTask"]
    assert not table.published_lines("nyuv2", dataset.info)
    assert not table.published_lines("streets7", same)


def test_the_papers_rows_stand_beside_ours_also_where_streets_stand_in(make_setup: MakeSetup, tmp_path: Path) -> None:
    target = experiments.target_on("table3", "streets")
    trainings = plan(target, make_setup(*SHORTER))
    pretend(trainings[0], 0.5, 1.0)
    lines = table.lines_of(trainings, target.rows)
    with_talk, without = table.beside_the_paper("table3", lines)[2:4]
    assert "synthetic streets" in with_talk and "| 96.86 | 73.19 | 0.0137 | 2.7502 |" in with_talk
    assert "| 96.71 | 72.30 | 0.0142 | 2.8921 | - | - | - | - |" in without
    table.write_csv(tmp_path / "table.csv", "table3", lines)
    assert by_system(tmp_path / "table.csv")["MT-UNet without cross-talk"]["paper_miou"] == "0.723"


def test_the_chart_of_schemes_shows_what_was_measured(make_setup: MakeSetup, three_splits: Path) -> None:
    trainings = plan(TARGETS["figure4"], make_setup(*SHORTER))
    split = PreparedDataset(three_splits).split("test")
    empty = figures.weights(trainings, split)
    for i, training in enumerate(trainings):
        pretend(training, 0.1 * (i + 1), 1.0 + i, weights=(0.1 + 0.15 * i, 0.5))
    drawn = figures.weights(trainings, split)
    assert drawn.shape == empty.shape
    halves = np.array_split((drawn != empty).any(2), 2)
    for part in (p for half in halves for p in np.array_split(half, 3, axis=1)):
        assert part.sum() > 200  # each of the four charts of metrics, and both halves of the weights


def test_mean10_averages_the_last_evaluations(make_setup: MakeSetup) -> None:
    (training,) = plan(of("mtunet"), make_setup("epochs=12", "device=cpu", protocol="mean10"))
    assert training.config.eval_last_epochs == LAST_EPOCHS and training.config.eval_every_epochs == 0
    pretend(training, 0.5, 1.0)
    assert training.metrics is None  # one evaluation is not ten
    per_epoch = training.total_steps // 12
    records = [{"kind": "eval", "step": e * per_epoch, "epoch": float(e), "miou": e / 100} for e in range(1, 13)]
    (training.dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert training.metrics is not None
    assert training.metrics["miou"] == pytest.approx(sum(range(3, 13)) / 1000)


@pytest.mark.slow
def test_protocols_best_and_mean10_train_and_measure(
    three_splits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(experiments.TARGETS, "table2", of("st_unet"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["table2", "--nyuv2", str(three_splits), "--out", str(tmp_path), *SHORTER, "epochs=3"]
    alone = ["--launcher", ALONE]
    best = [*words, "--protocol", "best", "checkpoint.best=delta_m", "checkpoint.reference={miou: 0.2, depth_abs: 1}"]
    assert run(monkeypatch, *best, *alone) == 0, capsys.readouterr()
    folder = tmp_path / "smoke" / "nyuv2-best" / "st_unet" / "seed0"
    config = load_config(folder / "config.yaml")
    assert (config.data.train, config.data.eval) == ("train", "val")  # chosen without a look at test
    measured = json.loads((folder / "best-test.json").read_text())
    evaluations = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    deltas = {e["step"]: e["delta_m"] for e in evaluations if e["kind"] == "eval"}
    assert len(deltas) == 3 and measured["step"] == max(deltas, key=lambda step: deltas[step])
    line = by_system(tmp_path / "smoke" / "table2-best.csv")[SYSTEMS["st_unet"].title]
    assert float(line["miou_mean"]) == measured["metrics"]["miou"]
    assert run(monkeypatch, *best, "--launcher", NEVER) == 0

    assert run(monkeypatch, *words, *alone, "--protocol", "mean10") == 0, capsys.readouterr()
    lines = (tmp_path / "smoke" / "nyuv2-mean10" / "st_unet" / "seed0" / "metrics.jsonl").read_text().splitlines()
    evaluations = [json.loads(line) for line in lines if '"eval"' in line]
    assert len(evaluations) == 3
    line = by_system(tmp_path / "smoke" / "table2-mean10.csv")[SYSTEMS["st_unet"].title]
    assert float(line["depth_abs_mean"]) == pytest.approx(sum(e["depth_abs"] for e in evaluations) / 3)


@pytest.mark.slow
def test_streets_are_made_by_the_command_and_every_text_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()  # streets have their own classes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(streets, "Settings", lambda: SyntheticSettings(8, 4, 4, 64, 128))
    rows = (Row("mtunet", "cityscapes7"), Row("mtunet", "cityscapes19"))
    monkeypatch.setitem(experiments.TARGETS, "table1", Target("Table 1: the systems on Cityscapes", rows))
    words = ["table1", "--on", "streets", "--streets", str(tmp_path / "data"), "--out", str(tmp_path), *SHORTER]
    assert run(monkeypatch, *words, "--launcher", ALONE) == 0, capsys.readouterr()
    text = (tmp_path / "smoke" / "table1-streets.md").read_text(encoding="utf-8")
    assert text.startswith("# Table 1: the systems on Cityscapes; synthetic streets instead")
    assert text.count("These are not Cityscapes") == 2
    line = next(line for line in text.splitlines() if line.startswith("| MT-UNet | synthetic streets, 19 classes"))
    assert "94.42 | 34.53 | 0.0141 | 2.8747" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tabel2"], "unknown table or figure 'tabel2'. Did you mean 'table2'?"),
        (["epochs=1"], "name a table or figure"),
        (["table1", "--cityscapes7", "nowhere"], "mtunet prepare cityscapes PATH/TO/cityscapes"),
        (["table1", "--validate"], "--validate: no validation part of Cityscapes"),
        (["table1", "--protocol", "best"], "--protocol best: no validation part of Cityscapes"),
        (["table1", "--on", "nyuv2"], "table1 is on cityscapes7 and cityscapes19 in the paper"),
        (["ablations", "checkpoint.best=delta_m", "model.dropout=2"], "dropout must be in"),
        (["table2", "--launcher", "sbatch --wait train.sbatch"], "must contain {config}"),
        (["table2", "--launcher", "no-such-command {config}"], "there is no command no-such-command"),
        (["table2", "--jobs", "0"], "--jobs=0 must be at least 1"),
        (["table2", "--seeds", "0"], "--seeds=0 must be at least 1"),
        (["table2", "seed=3"], "seed is set by reproduce itself"),
        (["table2", "optim.lrr=1"], "Did you mean 'optim.lr'?"),
        (["table2", "batch_size=100"], "batch_size"),
    ],
)
def test_bad_input_ends_before_anything_is_written(
    words: list[str],
    message: str,
    three_splits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    folders = [f"--{name}={three_splits}" for name in experiments.THE_USERS] + [f"--out={out}"]
    assert run(monkeypatch, *folders, *words) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_run_with_other_settings_is_not_taken_for_this_one(make_setup: MakeSetup) -> None:
    target = of("mtunet")
    plan(target, make_setup(*SHORTER))[0].write_config()
    plan(target, make_setup(*SHORTER, "data.threads=2"))  # changes nothing that is learned
    for word in ("optim.lr=1e-5", "epochs=7"):
        with pytest.raises(InputError, match=word.partition("=")[0].replace(".", r"\.") + ".*choose another --out"):
            plan(target, make_setup(*SHORTER, word))
