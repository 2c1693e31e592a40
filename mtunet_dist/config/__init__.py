"""All settings of a run: frozen dataclasses < YAML file < ``key=value`` on the command line.

The sections ``model``, ``weighting`` and ``strategy`` name a plugin and hold its options beside the name. The options
are checked against the plugin's own parameters, and missing options get their defaults. If an override names another
plugin than the file, the file's options of that section are dropped.

If a key holds text, its value is exactly the text in the file or after the ``=``; only a leading ``~/`` becomes the
home folder. All other values are YAML. In a file, ``${...}`` refers to another key, and ``\\${`` is a literal ``${``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mtunet_dist import plugins
from mtunet_dist.config.typed_yaml import (
    MISSING,
    all_keys,
    as_dict,
    content,
    leaves,
    load_as,
    merge,
    parse_yaml,
    put_text,
    read_yaml,
    to_yaml,
)
from mtunet_dist.errors import InputError
from mtunet_dist.system.files import write_text
from mtunet_dist.system.place import own_run_dir

PLUGIN_SECTIONS = ("model", "weighting", "strategy")


@dataclass(frozen=True)
class AugmentConfig:
    """Random augmentation of training samples, drawn per sample from (seed, epoch, sample). The paper mentions none."""

    flip: bool = False  # horizontally, with probability 1/2
    scales: tuple[float, ...] = (1.0,)  # zoom in by one of these at random, crop back to size; depth follows
    # Colours of the image; ranges as in torchvision's ColorJitter, arithmetic in data/color.py; 0 = off.
    brightness: float = 0.0  # factor from [max(0, 1 - x), 1 + x]
    contrast: float = 0.0  # likewise, about mid-grey
    saturation: float = 0.0  # likewise
    hue: float = 0.0  # turn of the colour circle from [-x, x]; at most 0.5


@dataclass(frozen=True)
class DaliConfig:
    """Settings of DALI on a GPU. Buffer sizes are not among them: they follow from the size of the images."""

    hw_decoder_load: float = 0.65  # share of JPEGs for the GPU's JPEG engine, if it has one; its cores decode the rest
    affinity: bool = False  # bind decoding threads to the CPU cores nearest to the GPU


@dataclass(frozen=True)
class DataConfig:
    """The source of the samples."""

    root: str = MISSING  # a prepared dataset (python -m mtunet_dist.prepare)
    train: str = "train"  # a split, or several: train+val
    eval: str = "val"
    loader: Literal["dali", "torch"] = "dali"
    threads: int = 2  # decoding threads (dali) or worker processes (torch) per rank
    prefetch: int = 2  # batches in flight per rank
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
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9  # sgd only
    weight_decay: float = 0.0
    schedule: Literal["constant", "step", "linear", "cosine", "poly"] = "constant"
    warmup_epochs: float = 0.0  # linear rise from 0
    step_epochs: float = 100.0  # step: multiply by step_gamma after each so many epochs
    step_gamma: float = 0.5
    poly_power: float = 0.9
    min_lr: float = 0.0  # where linear, cosine and poly end
    clip_norm: float = 0.0  # largest gradient norm; 0 = off
    accumulate: int = 1  # micro-batches per optimiser step


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints, and which to keep."""

    every_epochs: int = 1
    every_steps: int = 0  # save also after each so many steps; 0 = off
    keep: int = 2  # how many of the newest checkpoints to keep, besides best.pt
    # best.pt has the best value of this metric. delta_m is computed from the metrics in ``reference``. Empty means
    # miou, or without segmentation the first metric of the first task, such as depth_abs.
    best: str = ""
    # For delta_m: metric -> value of single-task networks on data.eval, such as {miou: 0.24, depth_abs: 0.61}.
    reference: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LogConfig:
    """What a training writes while it runs."""

    every_steps: int = 10
    pictures: int = 4  # samples of the evaluation split drawn for TensorBoard; 0 = none


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
    epochs: int = 200
    batch_size: int = 8  # samples per optimiser step, over all ranks and micro-batches
    eval_batch_size: int = 8  # samples per rank and step of evaluation; also the batch of the legacy depth metrics
    eval_every_epochs: int = 1  # 0 = only after the last epoch
    eval_last_epochs: int = 0  # evaluate also after each of the last so many epochs, to average over them
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tf32: bool = False  # on a GPU: fp32 computations may round to 10 bits, which is faster
    channels_last: bool = True
    compile: bool = False  # compile the network with torch.compile; the first steps then take minutes
    # reduce-overhead uses CUDA graphs, for small batches that leave a GPU idle. max-autotune tries several kernels and
    # starts slowly.
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    sync_batchnorm: bool = False  # batch-norm statistics over all ranks' samples instead of each rank's own
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    timeout_s: float = 600.0  # the training ends if no step or evaluation batch ends in this time; see watchdog.py
    on_write_error: Literal["stop", "continue"] = "stop"  # disk full or read-only; the end must be saved
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file at ``path``, then ``key=value`` overrides. Missing plugin options get their
    defaults.

    The config.yaml of a run folder means the folder where it now lies, even if the folder was moved. A sweep's
    best.yaml means the folder ``best`` beside it. A ``run_dir`` among the overrides has priority. Raises InputError
    that names the key, the value and, for a misspelt key, the likely one.
    """
    return _load(
        [_placed(read_yaml(Path(path), Config, _schema_of), Path(path))] if path is not None else [], overrides
    )


def _placed(layer: Any, path: Path) -> Any:
    """``layer``, read from ``path``. If the place of ``path`` means a run folder, this run folder is put in."""
    folder = own_run_dir(path)
    if folder is not None:
        written = content(layer).get("run_dir")
        if not isinstance(written, str) or Path(written).resolve() != folder.resolve():
            whole = folder == Path() or str(folder).startswith("~")  # a leading ~ would be read as the home folder
            put_text(layer, "run_dir", str(folder.resolve() if whole else folder))
    return layer


def config_from_text(text: str, overrides: Sequence[str] = ()) -> Config:
    """The config from the ``text`` of ``to_yaml``, with ``overrides``. Errors as in ``load_config``."""
    return _load([parse_yaml(text, Config, _schema_of)], overrides)


def _load(layers: list[Any], overrides: Sequence[str]) -> Config:
    words: dict[str, list[str]] = {section: [] for section in ("", *PLUGIN_SECTIONS)}
    for word in overrides:
        section, dot, rest = word.partition(".")
        belongs_to_plugin = dot and section in PLUGIN_SECTIONS
        words[section if belongs_to_plugin else ""].append(rest if belongs_to_plugin else word)
    config = merge(Config, layers, words[""], _keys_of_default_plugins)
    sections: dict[str, Any] = {s: _plugin_section(s, getattr(config, s), words[s]) for s in PLUGIN_SECTIONS}
    config = dataclasses.replace(config, **sections)
    _check(config)
    if not config.checkpoint.best:
        best = _best_metric(config.tasks)
        config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, best=best))
    return config


def _best_metric(tasks: Sequence[str]) -> str:
    """The metric for best.pt: the first one of segmentation if that is trained, else of the first task."""
    first = "segmentation" if "segmentation" in tasks else tasks[0]
    if first not in plugins.available("task"):
        raise InputError(f"checkpoint.best is missing: for tasks={list(tasks)} a metric such as {first}/miou")
    main: tuple[str, ...] = plugins.find("task", first).MAIN  # type: ignore[attr-defined]
    return main[0]


def _schema_of(section: str, name: str) -> type | None:
    """The fields of the section if it names the plugin ``name``. None if there is no such plugin."""
    known = section in PLUGIN_SECTIONS and name in plugins.available(section)
    return plugins.options_schema(section, name) if known else None


def _keys_of_default_plugins() -> list[str]:
    names = {section: getattr(Config(), section)["name"] for section in PLUGIN_SECTIONS}
    return [f"{s}.{key}" for s, name in names.items() for key in all_keys(plugins.options_schema(s, name))]


def save_config(config: Config, path: Path) -> None:
    """Write ``config`` as YAML, so that ``load_config`` reads back an equal config. A kill leaves the previous file."""
    write_text(path, to_yaml(config))


def flat(config: Config) -> dict[str, Any]:
    """Return ``config`` as a flat dictionary of dotted keys."""
    return dict(leaves(dataclasses.asdict(config)))


def plugin_options(
    kind: str, name: str, given: dict[str, Any] | Sequence[str], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The typed options of a plugin: its defaults, then ``given`` (a mapping or ``key=value`` words), then
    ``overrides``.

    Raises InputError that names plugin, key and value.
    """
    schema = plugins.options_schema(kind, name)
    try:
        options: object = load_as(schema, given, overrides) if isinstance(given, dict) else load_as(schema, {}, given)
    except InputError as error:
        raise InputError(f"{kind} '{name}': {error}") from None
    return as_dict(options)


def _plugin_section(kind: str, section: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``section`` with ``overrides`` (words whose keys start inside the section). Missing options come from the
    plugin."""
    options = dict(section)
    name = options.pop("name", None)
    for word in overrides:
        if word.startswith("name=") and word.removeprefix("name=") != name:
            name, options = word.removeprefix("name="), {}
    if not isinstance(name, str):
        raise InputError(f"{kind}.name is missing. Available: {', '.join(plugins.available(kind))}")
    words = [word for word in overrides if not word.startswith("name=")]
    return {"name": name, **plugin_options(kind, name, options, words)}


def _check(config: Config) -> None:
    """Check what types cannot express."""
    positive = {
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "eval_batch_size": config.eval_batch_size,
        "timeout_s": config.timeout_s,
        "optim.accumulate": config.optim.accumulate,
        "optim.lr": config.optim.lr,
        "optim.step_epochs": config.optim.step_epochs,
        "optim.step_gamma": config.optim.step_gamma,
        "optim.poly_power": config.optim.poly_power,
        "data.threads": config.data.threads,
        "data.prefetch": config.data.prefetch,
        "checkpoint.every_epochs": config.checkpoint.every_epochs,
        "checkpoint.keep": config.checkpoint.keep,
        "log.every_steps": config.log.every_steps,
    }
    not_negative = {
        "eval_every_epochs": config.eval_every_epochs,
        "eval_last_epochs": config.eval_last_epochs,
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
    for key, text in {"run_dir": config.run_dir, "data.root": config.data.root}.items():
        if not text:
            raise InputError(f"{key} is empty; give a folder")
    for key, value in positive.items():
        if not value > 0:
            raise InputError(f"{key}={value} must be positive")
    for key, value in not_negative.items():
        if not value >= 0:
            raise InputError(f"{key}={value} must not be negative")
    if config.seed >= 1 << 32:
        raise InputError(f"seed={config.seed} must be less than 2**32")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise InputError(f"optim.betas={list(config.optim.betas)} must be two numbers in [0, 1)")
    if not 0 <= config.optim.momentum < 1:
        raise InputError(f"optim.momentum={config.optim.momentum} must be in [0, 1)")
    if config.compile and config.compile_mode != "default" and config.optim.accumulate > 1:
        # Otherwise gradients lie in memory of the CUDA graph, and the next micro-batch overwrites them.
        raise InputError(
            f"compile_mode={config.compile_mode} uses CUDA graphs, which optim.accumulate={config.optim.accumulate} "
            "does not work with; compile_mode=default does"
        )
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        known = ", ".join(plugins.available("task"))
        raise InputError(
            f"tasks={list(config.tasks)} must be one or more different targets of the dataset: {known}, ..."
        )
    if not config.data.augment.scales or min(config.data.augment.scales) < 1:
        raise InputError(f"data.augment.scales={list(config.data.augment.scales)} must be one or more numbers >= 1")
    for key, value, most in (
        ("data.augment.hue", config.data.augment.hue, 0.5),
        ("data.dali.hw_decoder_load", config.data.dali.hw_decoder_load, 1.0),
    ):
        if not value <= most:
            raise InputError(f"{key}={value} must be at most {most}")
