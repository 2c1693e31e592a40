"""The keys of a config, with types, defaults and bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mtunet_dist.config.checks import not_negative, positive, within
from mtunet_dist.config.typed_yaml import MISSING


@dataclass(frozen=True)
class AugmentConfig:
    """Random augmentation of training samples, drawn per sample from (seed, epoch, sample). The paper mentions none."""

    flip: bool = False  # horizontally, with probability 1/2
    scales: tuple[float, ...] = (1.0,)  # zoom in by one of these at random, crop back to size; depth follows
    # Colours of the image; ranges as in torchvision's ColorJitter, arithmetic in data/color.py; 0 = off.
    brightness: float = not_negative(0.0)  # factor from [max(0, 1 - x), 1 + x]
    contrast: float = not_negative(0.0)  # likewise, about mid-grey
    saturation: float = not_negative(0.0)  # likewise
    hue: float = within(0.0, 0, 0.5)  # turn of the colour circle from [-x, x]; at most 0.5


@dataclass(frozen=True)
class DaliConfig:
    """Settings of DALI on a GPU. Buffer sizes are not among them: they follow from the size of the images."""

    # Share of JPEGs for the GPU's JPEG engine, if it has one. The GPU's cores decode the rest.
    hw_decoder_load: float = within(0.65, 0, 1)
    affinity: bool = False  # bind decoding threads to the CPU cores nearest to the GPU


@dataclass(frozen=True)
class DataConfig:
    """The source of the samples."""

    root: str = MISSING  # a prepared dataset (python -m mtunet_dist.prepare)
    train: str = "train"  # a split, or several: train+val
    eval: str = "val"
    loader: Literal["dali", "torch"] = "dali"
    threads: int = positive(2)  # decoding threads (dali) or worker processes (torch) per rank
    prefetch: int = positive(2)  # batches in flight per rank
    # Decode once and keep the pixels (6 bytes each with label and depth): in memory that all ranks and trainings of a
    # node share, or on the device of each rank. PIL decodes, whatever the loader is. Augmentation is still done at
    # each step.
    cache: Literal["none", "host", "device"] = "none"
    on_error: Literal["stop", "skip"] = (
        "stop"  # for a sample that cannot be decoded; skip: warn, count it, and do not learn from it
    )
    dali: DaliConfig = field(default_factory=DaliConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its learning rate. The paper: Adam, "initial" rate 1e-4; a constant rate is our reading."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = positive(1e-4)
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9  # sgd only
    weight_decay: float = not_negative(0.0)
    schedule: Literal["constant", "step", "linear", "cosine", "poly"] = "constant"
    warmup_epochs: float = not_negative(0.0)  # linear rise from 0
    step_epochs: float = positive(100.0)  # step: multiply by step_gamma after each so many epochs
    step_gamma: float = positive(0.5)
    poly_power: float = positive(0.9)
    min_lr: float = not_negative(0.0)  # where linear, cosine and poly end
    clip_norm: float = not_negative(0.0)  # largest gradient norm; 0 = off
    accumulate: int = positive(1)  # micro-batches per optimiser step


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints, and which to keep."""

    every_epochs: int = positive(1)
    every_steps: int = not_negative(0)  # save also after each so many steps; 0 = off
    keep: int = positive(2)  # how many of the newest checkpoints to keep, besides best.pt
    # best.pt has the best value of this metric. delta_m is computed from the metrics in ``reference``. Empty means
    # miou, or without segmentation the first metric of the first task, such as depth_abs.
    best: str = ""
    # For delta_m: metric -> value of single-task networks on data.eval, such as {miou: 0.24, depth_abs: 0.61}.
    reference: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LogConfig:
    """What a training writes while it runs."""

    every_steps: int = positive(10)
    pictures: int = not_negative(4)  # samples of the evaluation split drawn for TensorBoard; 0 = none


@dataclass(frozen=True)
class Config:
    """A training run."""

    run_dir: str = MISSING  # the run folder; the same command resumes the run in it
    data: DataConfig = field(default_factory=DataConfig)
    tasks: tuple[str, ...] = ("segmentation", "depth")  # the trained tasks: names of targets of the dataset
    model: dict[str, Any] = field(default_factory=lambda: {"name": "mtunet"})
    weighting: dict[str, Any] = field(default_factory=lambda: {"name": "learned"})
    strategy: dict[str, Any] = field(default_factory=lambda: {"name": "ddp"})
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: int = positive(200)
    batch_size: int = positive(8)  # samples per optimiser step, over all ranks and micro-batches
    eval_batch_size: int = positive(8)  # samples per rank and step of evaluation, also for the legacy depth metrics
    eval_every_epochs: int = not_negative(1)  # 0 = only after the last epoch
    eval_last_epochs: int = not_negative(0)  # evaluate also after each of the last so many epochs, to average over them
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tf32: bool = False  # on a GPU: fp32 computations may round to 10 bits, which is faster
    channels_last: bool = True
    compile: bool = False  # compile the network with torch.compile; the first steps then take minutes
    # reduce-overhead uses CUDA graphs, for small batches that leave a GPU idle. max-autotune tries several kernels and
    # starts slowly.
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    sync_batchnorm: bool = False  # batch-norm statistics over all ranks' samples instead of each rank's own
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = within(0, 0, 2**32 - 1)
    timeout_s: float = positive(600.0)  # the training ends if no step ends in this time; see runs/watchdog.py
    on_write_error: Literal["stop", "continue"] = "stop"  # disk full or read-only; the end must be saved
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
