"""How much is spent on each training: widths, epochs, seeds and how it is optimised, as data."""

from __future__ import annotations

from dataclasses import dataclass

from mtunet_dist.reproduction.experiments import Family


@dataclass(frozen=True)
class Budget:
    """Overrides for all trainings, then for those of a family of networks, then for those on a dataset."""

    seeds: int
    common: tuple[str, ...]
    families: dict[Family, tuple[str, ...]]
    datasets: dict[str, tuple[str, ...]]


_SHARED = ("data.cache=host", "checkpoint.keep=1")
_NARROW = (
    *_SHARED,
    "optim.schedule=cosine",
    "optim.weight_decay=1e-5",  # against channels that die and wake up, see configs/nyuv2_narrow.yaml
)

BUDGETS: dict[str, Budget] = {
    # Minutes on two CPU cores: shows that all of it works and learns, not which system is the best.
    "smoke": Budget(
        seeds=1,
        common=(
            *_NARROW,
            "epochs=2",
            "batch_size=2",
            "optim.lr=7e-3",
            "optim.warmup_epochs=0.2",
            "data.threads=1",
            "log.pictures=0",
        ),
        families={
            # Dropout changes the variance that batch norm sees in training; with four channels and so few steps that
            # makes the depth of ST-UNet worse than a constant.
            "unet": ("model.widths=[4,8,16,32]", "model.bottleneck=64", "model.dropout=0.0"),
            "segnet": ("model.widths=[4,8,16,32,32]",),
        },
        datasets={},
    ),
    # The settings of configs/nyuv2_narrow.yaml for all systems: half an hour of two CPU cores for each training.
    "short": Budget(
        seeds=2,
        common=(
            *_NARROW,
            "epochs=30",
            "batch_size=8",
            "optim.lr=3e-3",
            "optim.warmup_epochs=1",
            "data.augment.flip=true",
            "data.augment.scales=[1.0,1.2,1.5]",
        ),
        families={
            "unet": ("model.widths=[8,16,32,64]", "model.bottleneck=128", "model.dropout=0.1"),
            "segnet": ("model.widths=[8,16,32,64,64]",),
        },
        datasets={},
    ),
    # The paper's settings: full width, Adam 1e-4, 200 epochs, no augmentation. Needs GPUs, hence bf16.
    "paper": Budget(
        seeds=3,
        common=(*_SHARED, "epochs=200", "optim.lr=1e-4", "precision=bf16", "checkpoint.every_epochs=10"),
        families={"unet": (), "segnet": ()},
        datasets={"nyuv2": ("batch_size=2",), "cityscapes": ("batch_size=8",)},
    ),
}
