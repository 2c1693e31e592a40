"""The comparisons that the paper makes in words: the claim, the figures in its own tables, and our figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mtunet_dist.core.comparison import higher_is_better
from mtunet_dist.reproduction.experiments import DATASETS, STAND_INS, SYSTEMS, Row
from mtunet_dist.reproduction.published import THE_PAPER
from mtunet_dist.reproduction.trainings import Training

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told"
NEAR_HALF = 0.05  # a weight this close to 0.5 counts as "about 0.5"
Unit = Literal["points", "percent"]
Results = Mapping[Row, Mapping[int, Mapping[str, float]]]  # row -> seed -> metrics


@dataclass(frozen=True)
class Claim:
    """The claim that ``better`` leads ``worse`` in ``metric`` by ``said``: differences times 100 ("points") or
    percent."""

    quote: str
    metric: str  # of FIGURES
    better: Row
    worse: Row
    said: float | None
    unit: Unit = "points"

    def gain(self, better: Mapping[str, float], worse: Mapping[str, float], metric: str) -> float:
        """The lead of ``better`` in the claim's unit. It is negative if ``better`` is behind."""
        difference = better.get(metric, math.nan) - worse.get(metric, math.nan)
        gain = difference if higher_is_better(metric) else -difference
        return 100 * (gain if self.unit == "points" else gain / worse.get(metric, math.nan))


def _against(
    quote: str, dataset: str, metric: str, said: Mapping[str, float], better: str = "mtunet"
) -> tuple[Claim, ...]:
    return tuple(Claim(quote, metric, Row(better, dataset), Row(worse, dataset), by) for worse, by in said.items())


_TALK, _SILENT = Row("mtunet", "cityscapes7"), Row("mtunet_no_cross_talk", "cityscapes7")
_DEPTH_03, _DEPTH_07 = Row("mtunet_depth_03", "cityscapes7"), Row("mtunet_depth_07", "cityscapes7")
_OUTPERFORMED = "we have outperformed all the baselines"
_INCREASE = "There is an increase in IoU and mIoU by 0.15% and 0.9% respectively"
_REDUCE = "absolute depth error and relative depth error reduce by 0.05% and 14% respectively"
_DECREASE = "The absolute error and relative error relatively decrease by 4.5% and 65% respectively on NYUv2"
_BASELINES = ("st_unet", "stan", "dense", "cross_stitch", "mtan")

CLAIMS: tuple[Claim, ...] = (
    *_against(
        "6.29% and 0.83% improvement in pixel accuracy (IoU)",
        "cityscapes7",
        "accuracy",
        {"stan": 6.29, "st_unet": 0.83},
    ),
    *_against(
        "0.07% and 0.17% improvement in absolute error", "cityscapes7", "depth_abs", {"stan": 0.07, "st_unet": 0.17}
    ),
    *_against(
        "on NYUv2 MT-UNet achieved 14.16% and 2.05% improvement in accuracy",
        "nyuv2",
        "accuracy",
        {"stan": 14.16, "st_unet": 2.05},
    ),
    *_against(
        "5.7%, 6.5%, and 5.9% higher pixel-level accuracy than MTAN, cross-stitch and dense",
        "cityscapes7",
        "accuracy",
        {"mtan": 5.7, "cross_stitch": 6.5, "dense": 5.9},
    ),
    *_against(
        "15.3%, 18% and 16% more pixel accuracy on NYUv2",
        "nyuv2",
        "accuracy",
        {"mtan": 15.3, "cross_stitch": 18.0, "dense": 16.0},
    ),
    *(
        Claim(_DECREASE, metric, Row("mtunet", "nyuv2"), Row(worse, "nyuv2"), said, "percent")
        for metric, said in (("depth_abs", 4.5), ("depth_rel", 65.0))
        for worse in _BASELINES
    ),
    *(
        Claim(_OUTPERFORMED, metric, Row("mtunet", dataset), Row(worse, dataset), None)
        for dataset in ("cityscapes7", "nyuv2")
        for worse in _BASELINES
        for metric in ("miou", "depth_abs", "depth_rel")
    ),
    Claim(
        "as the class complexity increases mIoU decreases",
        "miou",
        Row("mtunet", "cityscapes7"),
        Row("mtunet", "cityscapes19"),
        None,
    ),
    Claim(_INCREASE, "accuracy", _TALK, _SILENT, 0.15),
    Claim(_INCREASE, "miou", _TALK, _SILENT, 0.9),
    Claim(_REDUCE, "depth_abs", _TALK, _SILENT, 0.05),
    Claim(_REDUCE, "depth_rel", _TALK, _SILENT, 14.0),
    Claim("the depth error for the second case is less than the first", "depth_abs", _DEPTH_07, _DEPTH_03, None),
    Claim("semantic segmentation performance is better in the first case", "accuracy", _DEPTH_03, _DEPTH_07, None),
    Claim(
        "our weighting scheme's outputs lie between the two cases (depth: better than the first)",
        "depth_abs",
        _TALK,
        _DEPTH_03,
        None,
    ),
    Claim(
        "our weighting scheme's outputs lie between the two cases (segmentation: better than the second)",
        "accuracy",
        _TALK,
        _DEPTH_07,
        None,
    ),
    Claim(
        "a performance gain of 5.4% with respect to the MTAN's segnet architecture (both with DWA; metric not said)",
        "accuracy",
        Row("mtunet_dwa", "cityscapes7"),
        Row("mtan_dwa", "cityscapes7"),
        5.4,
    ),
)


def in_the_paper(claim: Claim) -> float | None:
    """The gain in the paper's own tables, in the claim's unit. None if they have no such rows."""
    for table in THE_PAPER.values():
        better, worse = ((row.system, row.dataset) for row in (claim.better, claim.worse))
        if better in table and worse in table:
            return claim.gain(table[better], table[worse], claim.metric)
    return None


def follows(claim: Claim) -> str:
    """Whether the claim follows from the paper's own tables, to the number of digits in the claim."""
    given = in_the_paper(claim)
    if given is None:
        return "no such rows"
    if claim.said is None:
        return "yes" if given > 0 else "no"
    scale = 10 ** len(f"{claim.said:g}".partition(".")[2])
    said, exact = round(claim.said * scale), round(given * scale, 6)
    return "yes" if said in (round(exact), math.trunc(exact)) else "no"  # rounded or cut off


def our_gains(claim: Claim, results: Results, stand_in: bool) -> list[float]:
    """The gain of each seed that both rows have, in the ``legacy`` family of metrics, which the paper uses."""
    instead = STAND_INS if stand_in else {}
    better, worse = (
        results.get(Row(row.system, instead.get(row.dataset, row.dataset)), {}) for row in (claim.better, claim.worse)
    )
    gains = [claim.gain(better[seed], worse[seed], f"legacy/{claim.metric}") for seed in better if seed in worse]
    return [gain for gain in gains if not math.isnan(gain)]


def verdict(gains: Sequence[float]) -> str:
    """Whether the direction of a claim holds: its mean over seeds is more than two standard errors from 0."""
    if len(gains) < 2:
        return UNKNOWN
    mean, error = statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    if abs(mean) <= 2 * error:
        return UNKNOWN
    return HOLDS if mean > 0 else FAILS


def weights_near_half(trainings: Sequence[Training], stand_in: bool) -> list[float]:
    """The last loss weight of depth of each finished training of MT-UNet on Cityscapes, 7 classes."""
    row = Row("mtunet", STAND_INS["cityscapes7"] if stand_in else "cityscapes7")
    done = [t for t in trainings if t.row == row and t.metrics is not None]
    records = [t.records("train", **{"weight/depth": float}) for t in done]
    return [of_run[-1]["weight/depth"] for of_run in records if of_run]


def markdown(trainings: Sequence[Training], stand_in: bool, about: Sequence[str]) -> str:
    """All claims as a document."""
    results: dict[Row, dict[int, dict[str, float]]] = {}
    for training in trainings:
        if (metrics := training.metrics) is not None:
            results.setdefault(training.row, {})[training.seed] = metrics
    lines = ["# What the paper says in words", "", *(f"{paragraph}\n" for paragraph in about)]
    lines += [
        "| the paper | compares | said | its tables give | follows | ours | direction |",
        "| --- | --- | ---: | ---: | --- | ---: | --- |",
    ]
    for claim in CLAIMS:
        gains = our_gains(claim, results, stand_in)
        given = in_the_paper(claim)
        cells = [
            f'"{claim.quote}"',
            f"{_name(claim.better)} with {_name(claim.worse)}: {claim.metric}",
            "" if claim.said is None else f"{claim.said:g}{_unit(claim)}",
            "-" if given is None else f"{given:+.2f}{_unit(claim)}",
            follows(claim),
            _ours(gains, claim),
            verdict(gains),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_of_weights(weights_near_half(trainings, stand_in))]
    return "\n".join(lines) + "\n"


def _of_weights(weights: Sequence[float]) -> list[str]:
    found = ", ".join(f"{weight:.3f}" for weight in weights) or "no training is finished"
    holds = UNKNOWN if not weights else HOLDS if all(abs(w - 0.5) < NEAR_HALF for w in weights) else FAILS
    return [
        f'- "the weights associated with the losses converge to nearly similar values (≈ 0.5 each)": depth\'s weight '
        f"after the last epoch of each of our trainings: {found}. {holds.capitalize()}.",
        '- "one task overshadows the other initially": cannot be told. Our weights start at 0.5 each '
        "(`weighting.initial` changes that), as the paper does not say where its own start.",
        '- "the semantic segmentation task contributes more information than depth estimation task, whatever be the '
        'weight configuration": cannot be told. The paper gives no measure of it.',
    ]


def _name(row: Row) -> str:
    classes = f", {DATASETS[row.dataset].classes} classes" if row.dataset != "nyuv2" else ", NYUv2"
    return f"{SYSTEMS[row.system].title}{classes}"


def _unit(claim: Claim) -> str:
    return "" if claim.unit == "points" else " %"


def _ours(gains: Sequence[float], claim: Claim) -> str:
    if not gains:
        return "-"
    spread = f" ± {statistics.stdev(gains):.2f}" if len(gains) > 1 else ""
    return f"{statistics.fmean(gains):+.2f}{spread}{_unit(claim)}"
