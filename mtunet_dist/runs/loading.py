"""A finished or stopped run, read from its folder or from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from mtunet_dist.config import Config, config_from_text
from mtunet_dist.core.step import MultiTaskStep, build_step, place
from mtunet_dist.data.info import DatasetInfo
from mtunet_dist.errors import InputError
from mtunet_dist.runs import checkpoint


def load_step(state: checkpoint.State, config: Config, device: torch.device) -> MultiTaskStep:
    """The trained MultiTaskStep of a checkpoint, in evaluation mode on ``device``."""
    info = DatasetInfo.from_json(json.loads(state["dataset"]))
    step = build_step(config, info.tasks(config.tasks))
    step.load_state_dict(state["strategy"]["model"])
    return place(step, device, config.channels_last).eval()


def load_run(path: Path, overrides: Sequence[str]) -> tuple[checkpoint.State, Config, Path]:
    """The checkpoint of ``path`` (a run folder or a checkpoint), its config with ``overrides``, and its file."""
    file = checkpoint.resolve(path)
    checkpoint.check(file)
    state = checkpoint.load(file)
    return state, config_from_text(state["config"], overrides), file


def check_same_meaning(dataset: DatasetInfo, state: checkpoint.State, tasks: Sequence[str]) -> None:
    """Raise InputError if the targets of ``tasks`` in a dataset mean something else than those of the training."""
    trained = DatasetInfo.from_json(json.loads(state["dataset"]))
    for here, there in zip(dataset.tasks(tasks), trained.tasks(tasks), strict=True):
        if here != there:
            raise InputError(
                f"the dataset's task '{here.name}' is {here.to_json()}, not what the checkpoint was trained on: "
                f"{there.to_json()}"
            )
