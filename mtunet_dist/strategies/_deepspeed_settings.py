"""DeepSpeed's settings: those that follow from a run's config, and a user's JSON file on top of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mtunet_dist.config import Config
from mtunet_dist.config.typed_yaml import leaves
from mtunet_dist.errors import InputError
from mtunet_dist.system.place import shown

Settings = dict[str, Any]
STAGES = (0, 1, 2, 3)
BUCKET = 25_000_000  # numbers, 100 MB in float32; MT-UNet at full width has 70 million


def settings(config: Config, world_size: int, *, stage: int, offload_optimizer: bool, config_file: str) -> Settings:
    """The config for ``deepspeed.initialize``.

    Raises InputError for options that do not fit together, and for a value in ``config_file`` that contradicts
    ``config``.
    """
    if stage not in STAGES:
        raise InputError(f"strategy.stage={stage} is no stage of ZeRO. Available: {', '.join(map(str, STAGES))}")
    if offload_optimizer and stage == 0:
        raise InputError("strategy.offload_optimizer=true needs strategy.stage=1, 2 or 3")
    if config.compile and stage == 3:
        # DeepSpeed's hooks around every layer break the compiled graph, which is then slower than no compilation.
        raise InputError("compile=true leaves nothing to compile under strategy.stage=3; choose stage 0, 1 or 2")
    ours = _of_config(config, world_size, stage, offload_optimizer)
    result: Settings = {}
    for key, value in _defaults(stage).items():
        _put(result, key, value)
    for key, (value, _) in ours.items():
        _put(result, key, value)
    if config_file:
        for key, value in leaves(_read(Path(config_file))):
            if value != "auto":  # files for other trainers use it for "take it from your own config"
                _check(config_file, key, value, ours)
                _put(result, key, value)
    return result


def _defaults(stage: int) -> Settings:
    """Defaults that a user's file may change. DeepSpeed's own default buckets are larger than the whole network, so its
    reduction would start only after the backward pass."""
    if stage not in (1, 2):
        return {}
    sizes = {f"zero_optimization.{name}_bucket_size": BUCKET for name in ("reduce", "allgather")}
    return {**sizes, "zero_optimization.overlap_comm": torch.cuda.is_available()}


def _of_config(config: Config, world_size: int, stage: int, offload_optimizer: bool) -> dict[str, tuple[Any, str]]:
    """Dotted key -> its value, and the key of our config that decides it."""
    accumulate = config.optim.accumulate
    following: dict[str, tuple[Any, str]] = {
        "train_batch_size": (config.batch_size, "batch_size"),
        "train_micro_batch_size_per_gpu": (
            config.batch_size // (world_size * accumulate),
            f"batch_size / ({world_size} processes x optim.accumulate)",
        ),
        "gradient_accumulation_steps": (accumulate, "optim.accumulate"),
        "gradient_clipping": (config.optim.clip_norm, "optim.clip_norm"),  # DeepSpeed's default is 1.0
        "zero_optimization.stage": (stage, "strategy.stage"),
        # All stages use torch's optimisers.
        "zero_allow_untested_optimizer": (True, "optim.name"),
        "zero_force_ds_cpu_optimizer": (False, "optim.name"),
    }
    # MultiTaskStep's own autocast over float32 weights sets the precision; DeepSpeed sees only float32.
    for section in ("fp16", "bf16", "torch_autocast"):
        following[f"{section}.enabled"] = (False, "precision")
    if offload_optimizer:
        following["zero_optimization.offload_optimizer.device"] = ("cpu", "strategy.offload_optimizer")
    return following


# Keys that a user's file may not set, and the key of our config for each.
_SAID_ELSEWHERE = {
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "zero_optimization.offload_optimizer": "strategy.offload_optimizer",
    "zero_optimization.offload_param": "strategy.offload_optimizer (weights are not offloaded)",
}


def _check(file: str, key: str, value: Any, ours: dict[str, tuple[Any, str]]) -> None:
    """Raise InputError if ``value`` contradicts our config."""
    where = f"strategy.config_file={file}: {key}={json.dumps(value)}"
    if key in ours:
        expected, origin = ours[key]
        if value != expected:
            raise InputError(f"{where} contradicts {json.dumps(expected)}, which follows from {origin}")
        return
    for section, origin in _SAID_ELSEWHERE.items():
        started = any(k.startswith(f"{section}.") for k in ours)
        if (key == section or key.startswith(f"{section}.")) and not started:
            raise InputError(f"{where} is for {origin} to say")
    if any(k.startswith(f"{key}.") for k in ours):
        raise InputError(f"{where}: {key} is a section")


def _read(path: Path) -> Settings:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"strategy.config_file={shown(path)} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"strategy.config_file={path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"strategy.config_file={path} must hold one object")
    return content


def _put(section: Settings, key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for name in outer:
        section = section.setdefault(name, {})
    section[last] = value
