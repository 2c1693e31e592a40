"""Every setting of a run: frozen dataclasses < YAML file < ``key=value`` on the command line.

The sections ``model``, ``weighting`` and ``strategy`` name a plugin and hold its options beside the name; they are
checked against, and completed from, the plugin's own parameters. OmegaConf does the merging and stays in this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtunet_dist import plugins
from mtunet_dist.errors import InputError, closest

T = TypeVar("T")

TASKS = ("segmentation", "depth")
PLUGIN_SECTIONS = ("model", "weighting", "strategy")


@dataclass(frozen=True)
class AugmentConfig:
    """Random augmentation of training samples, drawn per sample from (seed, epoch, sample). Off as in the paper."""

    flip: bool = False  # horizontally, with probability 1/2
    scales: tuple[float, ...] = (1.0,)  # zoom in by one of these at random, crop back to size; depth follows
    # Colours of the image; ranges as in torchvision's ColorJitter, arithmetic in data/color.py; 0 = off.
    brightness: float = 0.0  # factor from [max(0, 1 - x), 1 + x]
    contrast: float = 0.0  # likewise, about mid-grey
    saturation: float = 0.0  # likewise
    hue: float = 0.0  # turn of the colour circle from [-x, x]; at most 0.5


@dataclass(frozen=True)
class DaliConfig:
    """Where DALI decodes on a GPU. Buffer sizes are not asked for: they follow from the size of the images."""

    hw_decoder_load: float = 0.65  # share of JPEGs for the GPU's JPEG engine, where it has one; the rest on its cores
    affinity: bool = False  # bind decoding threads to the CPU cores nearest to the GPU


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from."""

    root: str = MISSING  # a prepared dataset (python -m mtunet_dist.prepare)
    train: str = "train"  # a split, or several: train+val
    eval: str = "val"
    loader: Literal["dali", "torch"] = "dali"
    threads: int = 2  # decoding threads (dali) or worker processes (torch) per rank
    prefetch: int = 2  # batches in flight per rank
    # Decode once and keep the pixels, 6 bytes each, in memory that a node's ranks share, or on each rank's device.
    # Decodes with PIL whatever the loader is; augmentation stays per step.
    cache: Literal["none", "host", "device"] = "none"
    on_error: Literal["stop", "skip"] = (
        "stop"  # when a sample cannot be decoded; skip: warn, count, learn nothing of it
    )
    dali: DaliConfig = field(default_factory=DaliConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its learning rate; the paper: Adam, 1e-4, constant."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9  # sgd only
    weight_decay: float = 0.0
    schedule: Literal["constant", "step", "linear", "cosine", "poly"] = "constant"
    warmup_epochs: float = 0.0  # linear rise from 0
    step_epochs: float = 100.0  # step: multiply by step_gamma every so many epochs
    step_gamma: float = 0.5
    poly_power: float = 0.9
    min_lr: float = 0.0  # where linear, cosine and poly end
    clip_norm: float = 0.0  # largest gradient norm; 0 = off
    accumulate: int = 1  # micro-batches per optimiser step


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_epochs: int = 1
    every_steps: int = 0  # also every so many steps; 0 = off
    keep: int = 2  # newest checkpoints kept, besides best.pt
    best: str = "miou"  # the metric that best.pt has the best of


@dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    every_steps: int = 10
    pictures: int = 4  # samples of the evaluation split drawn for TensorBoard; 0 = none


@dataclass(frozen=True)
class Config:
    """A training run."""

    run_dir: str = MISSING  # the run folder; the same command resumes what it holds
    data: DataConfig = field(default_factory=DataConfig)
    tasks: tuple[str, ...] = TASKS
    model: dict[str, Any] = field(default_factory=lambda: {"name": "mtunet"})
    weighting: dict[str, Any] = field(default_factory=lambda: {"name": "learned"})
    strategy: dict[str, Any] = field(default_factory=lambda: {"name": "ddp"})
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: int = 200
    batch_size: int = 8  # samples per optimiser step, over all ranks and micro-batches
    eval_batch_size: int = 8  # samples per rank and step of evaluation; also the batch of the legacy depth metrics
    eval_every_epochs: int = 1  # 0 = only after the last epoch
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    timeout_s: float = 600.0  # a collective that takes longer is an error
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file at ``path``, then ``key=value`` overrides; plugin options filled in.

    Raises InputError that names the key, the value and, for a misspelt key, the likely one.
    """
    return _load([_read_yaml(Path(path))] if path is not None else [], overrides)


def config_from_text(text: str, overrides: Sequence[str] = ()) -> Config:
    """The config that ``to_yaml`` turned into ``text``, with ``overrides``; errors as ``load_config``."""
    return _load([OmegaConf.create(text)], overrides)


def _load(layers: list[Any], overrides: Sequence[str]) -> Config:
    config = _merge(Config, [*layers, _parse_overrides(overrides)])
    sections: dict[str, Any] = {s: _plugin_section(s, getattr(config, s)) for s in PLUGIN_SECTIONS}
    config = dataclasses.replace(config, **sections)
    _check(config)
    return config


def load_as(schema: type[T], source: Path | dict[str, Any], overrides: Sequence[str] = ()) -> T:
    """The dataclass ``schema`` filled from a YAML file or a mapping, then ``key=value`` overrides, typed and checked.

    For files beside the config, such as a sweep's; errors as ``load_config``.
    """
    layer = _read_yaml(source) if isinstance(source, Path) else OmegaConf.create(source)
    return _merge(schema, [layer, _parse_overrides(overrides)])


def _merge(schema: type[T], layers: list[Any]) -> T:
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *layers))
    except OmegaConfBaseException as error:
        raise InputError(_one_line(error)) from None
    assert isinstance(merged, schema)
    return merged


def save_config(config: Config, path: Path) -> None:
    """Write ``config`` as YAML that ``load_config`` reads back to an equal one."""
    path.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Config) -> str:
    """``config`` as YAML text, in the order of the dataclasses."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def flat(config: Config) -> dict[str, Any]:
    """``config`` as one level of dotted keys."""
    values: dict[str, Any] = {}

    def walk(prefix: str, section: dict[str, Any]) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                values[prefix + key] = value

    walk("", dataclasses.asdict(config))
    return values


def plugin_options(kind: str, name: str, given: dict[str, Any] | Sequence[str]) -> dict[str, Any]:
    """The options of a plugin: its defaults with ``given`` (a mapping or ``key=value`` words) merged in and typed."""
    schema = plugins.options_schema(kind, name)
    try:
        layer = OmegaConf.create(given) if isinstance(given, dict) else _parse_overrides(given)
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), layer))
    except OmegaConfBaseException as error:
        raise InputError(f"{kind} '{name}': {_one_line(error)}") from None
    assert dataclasses.is_dataclass(options) and not isinstance(options, type)
    return dataclasses.asdict(options)


def _plugin_section(kind: str, section: dict[str, Any]) -> dict[str, Any]:
    options = dict(section)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"{kind}.name is missing. Available: {', '.join(plugins.available(kind))}")
    return {"name": name, **plugin_options(kind, name, options)}


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"config file {path} does not exist")
    try:
        layer = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(layer):
        raise InputError(f"{path}: a config must be a mapping of keys to values")
    return layer


def _parse_overrides(words: Sequence[str]) -> Any:
    for word in words:
        if "=" not in word:
            raise InputError(f"'{word}' is not of the form key=value")
    try:
        return OmegaConf.from_dotlist(list(words))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"cannot read {' '.join(words)!r}: {' '.join(str(error).split())}") from None


def _one_line(error: OmegaConfBaseException) -> str:
    """OmegaConf's message without its extra lines, led by the full key when the message lacks it."""
    message = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    return message if not key or f"'{key}'" in message else f"{key}: {message}"


def _check(config: Config) -> None:
    """What types cannot say."""
    positive = {
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "eval_batch_size": config.eval_batch_size,
        "timeout_s": config.timeout_s,
        "optim.accumulate": config.optim.accumulate,
        "optim.lr": config.optim.lr,
        "optim.step_epochs": config.optim.step_epochs,
        "data.threads": config.data.threads,
        "data.prefetch": config.data.prefetch,
        "checkpoint.every_epochs": config.checkpoint.every_epochs,
        "checkpoint.keep": config.checkpoint.keep,
        "log.every_steps": config.log.every_steps,
    }
    not_negative = {
        "eval_every_epochs": config.eval_every_epochs,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "log.pictures": config.log.pictures,
        "seed": config.seed,
        "data.augment.brightness": config.data.augment.brightness,
        "data.augment.contrast": config.data.augment.contrast,
        "data.augment.saturation": config.data.augment.saturation,
        "data.augment.hue": config.data.augment.hue,
        "data.dali.hw_decoder_load": config.data.dali.hw_decoder_load,
        "optim.clip_norm": config.optim.clip_norm,
        "optim.warmup_epochs": config.optim.warmup_epochs,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.min_lr": config.optim.min_lr,
    }
    for key, value in positive.items():
        if not value > 0:
            raise InputError(f"{key}={value} must be positive")
    for key, value in not_negative.items():
        if not value >= 0:
            raise InputError(f"{key}={value} must not be negative")
    for name in config.tasks:
        if name not in TASKS:
            raise InputError(f"unknown task '{name}'.{closest(name, TASKS)} Available: {', '.join(TASKS)}")
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise InputError(f"tasks={list(config.tasks)} must be one or more different names of: {', '.join(TASKS)}")
    if not config.data.augment.scales or min(config.data.augment.scales) < 1:
        raise InputError(f"data.augment.scales={list(config.data.augment.scales)} must be one or more numbers >= 1")
    for key, value, most in (
        ("data.augment.hue", config.data.augment.hue, 0.5),
        ("data.dali.hw_decoder_load", config.data.dali.hw_decoder_load, 1.0),
    ):
        if not value <= most:
            raise InputError(f"{key}={value} must be at most {most}")
