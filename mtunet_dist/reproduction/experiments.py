"""The systems, datasets, tables and figures, as data: config overrides and names. ``docs/paper.md`` gives the
reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mtunet_dist.errors import InputError

Family = Literal["unet", "segnet"]
Kind = Literal["nyuv2", "cityscapes", "streets"]
STREETS = "streets"


@dataclass(frozen=True)
class System:
    """A network and the weighting of its losses."""

    title: str
    family: Family  # which widths of the budget it uses
    overrides: tuple[str, ...]  # {epochs} stands for the epochs of the run
    single: str  # one of SYSTEMS: the single-task networks of its delta-m


@dataclass(frozen=True)
class Splits:
    """The splits for training and for measuring."""

    train: str
    test: str


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset: the user's, or streets that the command makes."""

    title: str
    kind: Kind
    classes: int
    prepare: str  # the command that makes it
    report: Splits
    validation: Splits | None  # for choosing settings without the reported split
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A line of a table: a system trained on a dataset."""

    system: str  # of SYSTEMS
    dataset: str  # of DATASETS


@dataclass(frozen=True)
class Target:
    """A table or figure, with the trainings that it needs."""

    title: str
    rows: tuple[Row, ...]
    further: tuple[Row, ...] = ()  # of a table: our own rows, below the paper's
    single_seed: bool = False  # one training of each is enough

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """The paper's rows, then our own."""
        return self.rows + self.further

    @property
    def datasets(self) -> list[str]:
        """The datasets of its rows, each once."""
        return list(dict.fromkeys(row.dataset for row in self.all_rows))


def _mtunet(title: str, *overrides: str, weighting: str = "learned") -> System:
    names = ("model.name=mtunet", f"weighting.name={weighting}")
    return System(title, "unet", (*names, *overrides), single="st_unet")


def _segnet(title: str, *overrides: str, weighting: str = "equal") -> System:
    return System(title, "segnet", (*overrides, f"weighting.name={weighting}"), single="segnet")


def _unet(title: str, *overrides: str) -> System:
    return System(title, "unet", ("model.name=st_unet", "weighting.name=equal", *overrides), single="st_unet")


# Weights are in the order of the tasks: segmentation, depth. In the paper W1 is depth's and W2 is segmentation's.
SYSTEMS: dict[str, System] = {
    "st_unet": _unet("ST-UNet, one per task"),
    "stan": _segnet("STAN, one per task", "model.name=stan"),
    "dense": _segnet("Dense", "model.name=dense"),
    "cross_stitch": _segnet("Cross-Stitch", "model.name=cross_stitch", "model.stitches=shared"),
    "mtan": _segnet("MTAN", "model.name=mtan"),
    "mtunet": _mtunet("MT-UNet"),
    "mtunet_no_cross_talk": _mtunet("MT-UNet without cross-talk", "model.cross_talk=false"),
    "mtunet_depth_03": _mtunet("MT-UNet, W1 = 0.3, W2 = 0.7", "weighting.weights=[0.7,0.3]", weighting="fixed"),
    "mtunet_depth_07": _mtunet("MT-UNet, W1 = 0.7, W2 = 0.3", "weighting.weights=[0.3,0.7]", weighting="fixed"),
    "mtunet_dwa": _mtunet("MT-UNet, DWA", weighting="dwa"),
    "mtan_dwa": _segnet("MTAN, DWA", "model.name=mtan", weighting="dwa"),
    # Not in the paper.
    "segnet": _segnet("SegNet, one per task", "model.name=segnet"),
    "cross_stitch_matrix": _segnet("Cross-Stitch, task by task", "model.name=cross_stitch", "model.stitches=matrix"),
    "unet": _unet("Plain U-Net, one per task", "model.dense_scope=none", "model.attention=false"),
    "mtunet_equal": _mtunet("MT-UNet, equal weights (eq. 4)", weighting="equal"),
    "mtunet_uncertainty": _mtunet("MT-UNet, uncertainty", weighting="uncertainty"),
    "mtunet_scheduled": _mtunet(
        "MT-UNet, scheduled (depth first)",
        "weighting.start=[0.5,1.5]",
        "weighting.end=[1.5,0.5]",
        "weighting.shape=cosine",
        "weighting.end_epoch={epochs}",
        weighting="scheduled",
    ),
    "mtunet_no_attention": _mtunet("MT-UNet without attention", "model.attention=false"),
    "mtunet_plain_encoder": _mtunet("MT-UNet, encoder not dense", "model.dense_scope=none"),
}
COMPARED = ("st_unet", "stan", "dense", "cross_stitch", "mtan", "mtunet")  # in the order of tables 1 and 2
FURTHER = ("segnet", "cross_stitch_matrix", "unet")
SCHEMES = ("mtunet_depth_03", "mtunet_depth_07", "mtunet")
ABLATIONS = (
    "st_unet",
    "mtunet",
    "mtunet_equal",
    "mtunet_dwa",
    "mtunet_uncertainty",
    "mtunet_scheduled",
    "mtunet_no_cross_talk",
    "mtunet_no_attention",
    "mtunet_plain_encoder",
)

_FROM_CITYSCAPES = "mtunet prepare cityscapes PATH/TO/cityscapes data/cityscapes{n} classes={n} depth=inverse"


def _cityscapes(classes: int) -> Dataset:
    return Dataset(
        title=f"Cityscapes, {classes} classes",
        kind="cityscapes",
        classes=classes,
        prepare=_FROM_CITYSCAPES.format(n=classes),
        report=Splits(train="train", test="val"),  # the labels of its test split are withheld
        validation=None,
        overrides=("eval_batch_size=8",),  # the batch of the legacy depth errors, as in the MTAN code
    )


def _streets(classes: int) -> Dataset:
    return Dataset(
        title=f"synthetic streets, {classes} classes",
        kind="streets",
        classes=classes,
        prepare="--on streets",
        report=Splits(train="train", test="test"),
        validation=Splits(train="train", test="val"),
        overrides=("eval_batch_size=8",),
    )


DATASETS: dict[str, Dataset] = {
    "cityscapes7": _cityscapes(7),
    "cityscapes19": _cityscapes(19),
    "nyuv2": Dataset(
        title="NYU Depth v2, 13 classes",
        kind="nyuv2",
        classes=13,
        prepare="mtunet prepare nyuv2_mat PATH/TO/nyu_depth_v2_labeled.mat data/nyuv2",
        report=Splits(train="train+val", test="test"),
        validation=Splits(train="train", test="val"),
        overrides=("eval_batch_size=2",),
    ),
    "streets7": _streets(7),
    "streets19": _streets(19),
}
STAND_INS = {"cityscapes7": "streets7", "cityscapes19": "streets19"}
THE_USERS = tuple(name for name, dataset in DATASETS.items() if dataset.kind != STREETS)


def _rows(systems: Iterable[str], dataset: str) -> tuple[Row, ...]:
    return tuple(Row(system, dataset) for system in systems)


TARGETS: dict[str, Target] = {
    "table1": Target(
        "Table 1: the systems on Cityscapes",
        (*_rows(COMPARED, "cityscapes7"), Row("mtunet", "cityscapes19")),
        _rows(FURTHER, "cityscapes7"),
    ),
    "table2": Target("Table 2: the systems on NYU Depth v2", _rows(COMPARED, "nyuv2"), further=_rows(FURTHER, "nyuv2")),
    "table3": Target(
        "Table 3: MT-UNet with and without cross-talk, Cityscapes",
        _rows(("mtunet", "mtunet_no_cross_talk"), "cityscapes7"),
    ),
    "figure3": Target("Figure 3: what the systems predict", _rows(COMPARED, "cityscapes7"), single_seed=True),
    "figure4": Target(
        "Figure 4: fixed and learned loss weights",
        _rows(SCHEMES, "cityscapes7"),
        further=_rows(("mtunet_dwa", "mtunet_equal"), "cityscapes7"),
    ),
    "figure5": Target(
        "Figure 5: attention masks of the first decoder block", _rows(("mtunet",), "cityscapes7"), single_seed=True
    ),
    "claims": Target(
        "What the paper says in words",
        (
            *_rows((*COMPARED, "mtunet_no_cross_talk", *SCHEMES[:2], "mtunet_dwa", "mtan_dwa"), "cityscapes7"),
            Row("mtunet", "cityscapes19"),
            *_rows(COMPARED, "nyuv2"),
        ),
    ),
    "ablations": Target("Weightings and ablations of MT-UNet (ours, not the paper's)", _rows(ABLATIONS, "nyuv2")),
}
ANY_DATASET = ("ablations",)  # targets for which the paper has no dataset


def target_on(name: str, on: str | None) -> Target:
    """The target ``name`` on the dataset of ``--on``. None means the paper's datasets.

    ``streets`` replaces Cityscapes. Other datasets are only for ``ANY_DATASET``; otherwise raises InputError.
    """
    target = TARGETS[name]
    if on is None:
        return target
    if on == STREETS:
        instead = STAND_INS if name not in ANY_DATASET else dict.fromkeys(target.datasets, "streets7")
    elif name in ANY_DATASET:
        instead = dict.fromkeys(target.datasets, on)
    elif target.datasets == [on]:
        return target
    else:
        raise InputError(
            f"--on {on}: {name} is on {' and '.join(target.datasets)} in the paper; {on} is for "
            f"{', '.join(ANY_DATASET)}, and --on {STREETS} for what the paper has on Cityscapes"
        )

    def moved(rows: tuple[Row, ...]) -> tuple[Row, ...]:
        return tuple(Row(row.system, instead.get(row.dataset, row.dataset)) for row in rows)

    stands_in = on == STREETS and any(dataset in instead for dataset in target.datasets)
    title = f"{target.title}; synthetic streets instead" if stands_in and name not in ANY_DATASET else target.title
    return dataclasses.replace(target, title=title, rows=moved(target.rows), further=moved(target.further))
