"""The systems, datasets, tables and figures, as data: config overrides and names. ``docs/paper.md`` says why these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["unet", "segnet"]


@dataclass(frozen=True)
class System:
    """A network and the weighting of its losses: a row of a table."""

    title: str
    family: Family  # whose widths of the budget it takes
    overrides: tuple[str, ...]  # {epochs} stands for the epochs of the run
    single: str  # the single-task networks, of SYSTEMS, that delta-m compares it with


@dataclass(frozen=True)
class Splits:
    """What is trained on, and what the trained network is measured on."""

    train: str
    test: str


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset that the user has made."""

    title: str
    root: str  # where it is looked for unless the user says otherwise
    prepare: str  # the command that makes it there
    report: Splits
    validation: Splits | None  # for choosing settings, without a look at what is reported on
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A table or figure: the systems that must have been trained, on which dataset."""

    title: str
    dataset: str  # of DATASETS
    systems: tuple[str, ...]  # of SYSTEMS
    single_seed: bool = False  # one training of each system will do
    validation: bool = False  # the trainings for choosing settings: only they measure after every epoch


def _mtunet(title: str, *overrides: str, weighting: str = "learned") -> System:
    names = ("model.name=mtunet", f"weighting.name={weighting}")
    return System(title, "unet", (*names, *overrides), single="st_unet")


def _segnet(title: str, *overrides: str) -> System:
    return System(title, "segnet", ("weighting.name=equal", *overrides), single="segnet")


SYSTEMS: dict[str, System] = {
    "segnet": _segnet("SegNet, one per task", "model.name=segnet"),
    "stan": _segnet("STAN, one per task", "model.name=stan"),
    "dense": _segnet("Dense", "model.name=dense"),
    "cross_stitch_shared": _segnet("Cross-stitch, MTAN's form", "model.name=cross_stitch", "model.stitches=shared"),
    "cross_stitch": _segnet("Cross-stitch, task by task", "model.name=cross_stitch", "model.stitches=matrix"),
    "mtan": _segnet("MTAN", "model.name=mtan"),
    "st_unet": System(
        "ST-UNet, one per task", "unet", ("model.name=st_unet", "weighting.name=equal"), single="st_unet"
    ),
    "mtunet": _mtunet("MT-UNet (learned weights, eq. 5)"),
    "mtunet_equal": _mtunet("MT-UNet, equal weights", weighting="equal"),
    "mtunet_dwa": _mtunet("MT-UNet, DWA", weighting="dwa"),
    "mtunet_uncertainty": _mtunet("MT-UNet, uncertainty", weighting="uncertainty"),
    "mtunet_scheduled": _mtunet(
        "MT-UNet, scheduled (depth first)",
        "weighting.start=[0.5,1.5]",
        "weighting.end=[1.5,0.5]",
        "weighting.shape=cosine",
        "weighting.end_epoch={epochs}",
        weighting="scheduled",
    ),
    "mtunet_no_cross_talk": _mtunet("MT-UNet without cross-talk", "model.cross_talk=false"),
    "mtunet_no_attention": _mtunet("MT-UNet without attention", "model.attention=false"),
    "mtunet_plain_encoder": _mtunet("MT-UNet, encoder not dense", "model.dense_scope=none"),
}
COMPARED = ("segnet", "stan", "dense", "cross_stitch_shared", "cross_stitch", "mtan", "st_unet", "mtunet")
WEIGHTINGS = ("mtunet_equal", "mtunet", "mtunet_dwa", "mtunet_uncertainty", "mtunet_scheduled")
OF_MTUNET = ("st_unet", *WEIGHTINGS, "mtunet_no_cross_talk", "mtunet_no_attention", "mtunet_plain_encoder")

DATASETS: dict[str, Dataset] = {
    "nyuv2": Dataset(
        title="NYU Depth v2",
        root="data/nyuv2",
        prepare="mtunet prepare nyuv2_mat PATH/TO/nyu_depth_v2_labeled.mat data/nyuv2",
        report=Splits(train="train+val", test="test"),
        validation=Splits(train="train", test="val"),
        overrides=("eval_batch_size=2",),  # the batch of the legacy depth errors, as in the MTAN code
    ),
    "cityscapes": Dataset(
        title="Cityscapes",
        root="data/cityscapes2",
        prepare="mtunet prepare cityscapes PATH/TO/cityscapes data/cityscapes2 classes=2 depth=inverse",
        report=Splits(train="train", test="val"),  # the labels of its test split are withheld
        validation=None,
        overrides=("eval_batch_size=8",),
    ),
}

TARGETS: dict[str, Target] = {
    "table1": Target("Table 1: the systems on Cityscapes", "cityscapes", COMPARED),
    "table2": Target("Table 2: the systems on NYU Depth v2", "nyuv2", COMPARED),
    "table3": Target("Table 3: weightings and ablations of MT-UNet on NYU Depth v2", "nyuv2", OF_MTUNET),
    "figure3": Target("Figure 3: what the systems predict", "nyuv2", COMPARED, single_seed=True),
    "figure4": Target("Figure 4: loss weights over the epochs", "nyuv2", WEIGHTINGS, validation=True),
    "figure5": Target("Figure 5: attention masks", "nyuv2", ("mtunet",), single_seed=True),
}
