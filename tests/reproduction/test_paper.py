"""What reproduce has of the paper: every row's dataset, classes and settings, every published number, every claim."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest

from mtunet_dist import reproduce
from mtunet_dist.config import Config
from mtunet_dist.errors import InputError
from mtunet_dist.reproduction import claims
from mtunet_dist.reproduction.budgets import BUDGETS
from mtunet_dist.reproduction.claims import CLAIMS, FAILS, HOLDS, UNKNOWN, Claim, follows, in_the_paper, verdict
from mtunet_dist.reproduction.experiments import DATASETS, SYSTEMS, TARGETS, Row, target_on
from mtunet_dist.reproduction.published import FIGURES, THE_PAPER
from mtunet_dist.reproduction.trainings import Setup, configs

# Paper 5178, copied from its tables: method, IoU %, mIoU %, absolute error, relative error.
TABLE_1 = """
st_unet cityscapes7 96.03 71.76 0.0154 3.609
stan cityscapes7 90.57 51.90 0.0145 27.46
dense cityscapes7 90.89 51.91 0.0138 27.21
cross_stitch cityscapes7 90.33 50.08 0.0154 34.49
mtan cityscapes7 91.11 53.04 0.0144 33.63
mtunet cityscapes7 96.86 73.19 0.0137 2.7502
mtunet cityscapes19 94.42 34.53 0.0141 2.8747
"""
TABLE_2 = """
st_unet nyuv2 59.34 23.81 0.1152 0.2147
stan nyuv2 47.23 16.81 0.1413 0.3502
dense nyuv2 45.41 15.42 0.1464 0.3790
cross_stitch nyuv2 43.35 13.71 0.1590 0.4044
mtan nyuv2 46.05 16.05 0.1425 0.3459
mtunet nyuv2 61.39 26.54 0.1304 0.1969
"""
TABLE_3 = """
mtunet cityscapes7 96.86 73.19 0.0137 2.7502
mtunet_no_cross_talk cityscapes7 96.71 72.30 0.0142 2.8921
"""
TABLES = {"table1": TABLE_1, "table2": TABLE_2, "table3": TABLE_3}


def setup_for(budget: str, tmp_path: Path) -> Setup:
    return Setup(tmp_path, budget, BUDGETS[budget], {name: f"data/{name}" for name in DATASETS})


def config_of(system: str, dataset: str, tmp_path: Path, target: str = "table1") -> Config:
    return configs(Row(system, dataset), TARGETS[target], setup_for("paper", tmp_path))[0]


@pytest.mark.parametrize("name", list(TABLES))
def test_tables_have_the_papers_rows_and_numbers(name: str) -> None:
    lines = [line.split() for line in TABLES[name].split("\n") if line]
    assert [Row(system, dataset) for system, dataset, *_ in lines] == list(TARGETS[name].rows)
    assert THE_PAPER.keys() == TABLES.keys() and len(THE_PAPER[name]) == len(lines)
    for system, dataset, iou, miou, absolute, relative in lines:
        numbers = [float(iou) / 100, float(miou) / 100, float(absolute), float(relative)]
        assert [THE_PAPER[name][system, dataset][key] for key in FIGURES] == pytest.approx(numbers, abs=1e-12)


def test_rows_are_trained_as_the_paper_says(tmp_path: Path) -> None:
    for name in TABLES:
        for row in TARGETS[name].rows:
            config = config_of(row.system, row.dataset, tmp_path, name)
            nyu = row.dataset == "nyuv2"
            assert (config.batch_size, config.epochs, config.optim.name, config.optim.lr) == (
                2 if nyu else 8,
                200,
                "adam",
                1e-4,
            )
            assert (config.data.train, config.data.eval) == (("train+val", "test") if nyu else ("train", "val"))
            assert config.eval_batch_size == config.batch_size  # the MTAN code evaluates with the batch of training
    mtunet = config_of("mtunet", "cityscapes7", tmp_path)
    assert (mtunet.model["widths"], mtunet.model["bottleneck"]) == ((64, 128, 256, 512), 1024)
    assert (mtunet.weighting["name"], mtunet.weighting["lr"]) == ("learned", 1e-3)
    talk = config_of("mtunet_no_cross_talk", "cityscapes7", tmp_path, "table3")
    differing = {k for k in mtunet.model if mtunet.model[k] != talk.model[k]}
    assert differing == {"cross_talk"} and talk.weighting == mtunet.weighting


def test_datasets_are_the_papers() -> None:
    assert {name: (d.classes, d.kind) for name, d in DATASETS.items()} == {
        "cityscapes7": (7, "cityscapes"),
        "cityscapes19": (19, "cityscapes"),
        "nyuv2": (13, "nyuv2"),
        "streets7": (7, "streets"),
        "streets19": (19, "streets"),
    }
    for name in ("cityscapes7", "cityscapes19"):
        assert DATASETS[name].prepare.endswith(f"data/{name} classes={DATASETS[name].classes} depth=inverse")


def test_weights_of_figure_4_are_depths_first(tmp_path: Path) -> None:
    depth_03, depth_07, learned = (config_of(r.system, r.dataset, tmp_path, "figure4") for r in TARGETS["figure4"].rows)
    for config, depth, segmentation in ((depth_03, 0.3, 0.7), (depth_07, 0.7, 0.3)):
        weights = dict(zip(config.tasks, config.weighting["weights"], strict=True))
        assert weights == {"depth": depth, "segmentation": segmentation}
    assert learned.weighting["name"] == "learned"
    assert {TARGETS[name].datasets[0] for name in ("figure3", "figure4", "figure5", "table3")} == {"cityscapes7"}


def test_ours_are_marked_and_the_papers_are_not() -> None:
    assert [r.system for r in TARGETS["table1"].further] == ["segnet", "cross_stitch_matrix", "unet"]
    assert "ours, not the paper's" in TARGETS["ablations"].title
    unet = dict(word.split("=") for word in SYSTEMS["unet"].overrides)
    assert (unet["model.dense_scope"], unet["model.attention"]) == ("none", "false")


def test_streets_stand_in_for_cityscapes_alone() -> None:
    moved = target_on("table1", "streets")
    assert [row.dataset for row in moved.rows] == [*["streets7"] * 6, "streets19"]
    assert "synthetic streets instead" in moved.title
    assert target_on("table2", "streets").rows == TARGETS["table2"].rows
    assert "streets" not in target_on("table2", "streets").title
    assert target_on("ablations", "cityscapes7").datasets == ["cityscapes7"]
    with pytest.raises(InputError, match="--on nyuv2: table3 is on cityscapes7"):
        target_on("table3", "nyuv2")


def test_the_list_names_every_training_without_any_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce", "all", "--list", "--budget", "paper"])
    reproduce.main()
    text = capsys.readouterr().out
    assert [line.split(":")[0] for line in text.splitlines() if not line.startswith(" ")] == list(TARGETS)
    rows = [row for target in TARGETS.values() for row in target.all_rows]
    assert sum(line.startswith("  ") and not line.startswith("      ") for line in text.splitlines()) == len(rows)
    for dataset in {row.dataset for row in rows}:
        assert DATASETS[dataset].title in text
    assert "weighting.weights=[0.7,0.3]" in text
    assert not list(tmp_path.iterdir())


def said(quote: str) -> list[Claim]:
    found = [claim for claim in CLAIMS if quote in claim.quote]
    assert found, quote
    return found


def test_the_papers_gains_follow_from_its_tables_or_not() -> None:
    given = {(c.quote, c.metric, c.worse.system): in_the_paper(c) for c in CLAIMS}
    assert [v for v in given.values() if v is None], "figure 4 and DWA have no rows"
    for quote, expected in (
        ("6.29% and 0.83%", [6.29, 0.83]),
        ("14.16% and 2.05%", [14.16, 2.05]),
        ("5.7%, 6.5%, and 5.9%", [5.75, 6.53, 5.97]),
        ("15.3%, 18% and 16%", [15.34, 18.04, 15.98]),
        ("increase in IoU and mIoU", [0.15, 0.89]),
        ("reduce by 0.05% and 14%", [0.05, 14.19]),
    ):
        assert [in_the_paper(c) for c in said(quote)] == pytest.approx(expected, abs=1e-9)
        assert {follows(c) for c in said(quote)} == {"yes"}
    assert [follows(c) for c in said("0.07% and 0.17%")] == ["no", "yes"]  # its tables give 0.08
    assert {follows(c) for c in said("relatively decrease by 4.5% and 65%")} == {"no"}
    outperformed = {(c.worse.system, c.worse.dataset, c.metric): follows(c) for c in said("outperformed all")}
    assert [k for k, v in outperformed.items() if v == "no"] == [("st_unet", "nyuv2", "depth_abs")]
    assert follows(said("5.4%")[0]) == "no such rows"


def test_gains_of_ours_are_of_one_seed_and_one_dataset() -> None:
    claim = said("increase in IoU")[0]
    results = {
        Row("mtunet", "streets7"): {
            0: {"legacy/accuracy": 0.52},
            1: {"legacy/accuracy": 0.54},
            2: {"legacy/accuracy": 0.9},
        },
        Row("mtunet_no_cross_talk", "streets7"): {0: {"legacy/accuracy": 0.51}, 1: {"legacy/accuracy": 0.50}},
    }
    assert claims.our_gains(claim, results, stand_in=True) == pytest.approx([1.0, 4.0])
    assert claims.our_gains(claim, results, stand_in=False) == []
    less = dataclasses.replace(claim, metric="depth_rel", unit="percent")
    assert less.gain({"depth_rel": 0.9}, {"depth_rel": 1.0}, "depth_rel") == pytest.approx(10.0)
    assert math.isnan(less.gain({}, {"depth_rel": 1.0}, "depth_rel"))


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([], UNKNOWN),
        ([5.0], UNKNOWN),
        ([1.0, 1.2, 0.9], HOLDS),
        ([-1.0, -1.2, -0.9], FAILS),
        ([1.0, -1.0, 0.5], UNKNOWN),
    ],
)
def test_a_claim_is_told_only_beyond_the_deviation(gains: list[float], expected: str) -> None:
    assert verdict(gains) == expected
