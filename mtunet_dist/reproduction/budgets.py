"""The effort for each training: widths, epochs, seeds and the optimiser's settings, as data."""

from __future__ import annotations

from dataclasses import dataclass

from mtunet_dist.reproduction.experiments import Family, Kind


@dataclass(frozen=True)
class Budget:
    """Overrides for all trainings, then for those of a family of networks, then for those on a kind of dataset."""

    seeds: dict[Kind, int]
    common: tuple[str, ...]
    families: dict[Family, tuple[str, ...]]
    datasets: dict[Kind, tuple[str, ...]]
    streets_size: tuple[int, int]  # height, width of the prepared synthetic streets


_SHARED = ("data.cache=host", "checkpoint.keep=1")
_NARROW = (
    *_SHARED,
    "optim.schedule=cosine",
    "optim.weight_decay=1e-5",  # against channels that die and wake up, see configs/nyuv2_narrow.yaml
    "data.threads=1",
    "log.pictures=0",
)
# Dropout changes the variance that batch norm sees in training. With few channels that makes the depth of ST-UNet
# worse than a constant.
_NO_DROPOUT = "model.dropout=0.0"

BUDGETS: dict[str, Budget] = {
    # Minutes on two CPU cores: it shows that all parts work and learn, not which system is the best.
    "smoke": Budget(
        seeds={"nyuv2": 1, "cityscapes": 1, "streets": 1},
        common=(*_NARROW, "epochs=2", "batch_size=2", "optim.lr=7e-3", "optim.warmup_epochs=0.2"),
        families={
            "unet": ("model.widths=[4,8,16,32]", "model.bottleneck=64", _NO_DROPOUT),
            "segnet": ("model.widths=[4,8,16,32,32]",),
        },
        datasets={},
        streets_size=(64, 128),
    ),
    # Hours on two CPU cores: narrow networks. Small batches, because the SegNets learn inverse depth only after several
    # hundred steps: of the same epochs with batch 8, depth stayed at the best constant.
    "short": Budget(
        seeds={"nyuv2": 1, "cityscapes": 3, "streets": 3},
        common=(*_NARROW, "optim.lr=3e-3", "optim.warmup_epochs=1", "data.augment.flip=true"),
        # With four channels at full resolution some depth networks die: their output becomes a constant.
        families={
            "unet": ("model.widths=[8,16,24,32]", "model.bottleneck=64", _NO_DROPOUT),
            "segnet": ("model.widths=[8,16,24,32,32]",),
        },
        datasets={
            "nyuv2": ("epochs=16", "batch_size=4", "data.augment.scales=[1.0,1.2,1.5]"),
            "cityscapes": ("epochs=30", "batch_size=4"),
            "streets": ("epochs=24", "batch_size=4"),
        },
        streets_size=(64, 128),
    ),
    # The paper's settings: full width, Adam 1e-4, 200 epochs. Needs GPUs, hence bf16.
    "paper": Budget(
        seeds={"nyuv2": 3, "cityscapes": 3, "streets": 3},
        common=(*_SHARED, "epochs=200", "optim.lr=1e-4", "precision=bf16", "checkpoint.every_epochs=10"),
        families={"unet": (), "segnet": ()},
        datasets={"nyuv2": ("batch_size=2",), "cityscapes": ("batch_size=8",), "streets": ("batch_size=8",)},
        streets_size=(128, 256),
    ),
}
