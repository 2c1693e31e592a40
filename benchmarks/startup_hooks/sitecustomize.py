"""Writes down when a Python process imports what, and how far a training is; ends it after its first step.

Python runs this file by itself where its folder is on PYTHONPATH: ``startup.py`` puts it there. Each process leaves a
list of (time, event, name) in the folder that STARTUP_TRACE names; events are "begin", "end" and "stage".
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

EVENTS: list[tuple[float, str, str]] = [(time.time(), "stage", "other imports")]
PACKAGES = (
    "torch",
    "torch._dynamo",  # which every torch.optim.Optimizer imports
    "torch.utils.tensorboard",
    "sympy",
    "nvidia.dali",
    "deepspeed",
    "matplotlib",
    "numpy",
    "PIL",
    "omegaconf",
    "rich",
)


def note(event: str, name: str) -> None:
    """Only the main thread's doings are a sequence."""
    if threading.current_thread() is threading.main_thread():
        EVENTS.append((time.time(), event, name))


def then(function: Callable[..., Any], before: str = "", after: str = "", last: bool = False) -> Callable[..., Any]:
    """``function``, with a new stage before or after a call; with ``last`` the process ends there."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            note("stage", before)
        result = function(*args, **kwargs)
        if after:
            note("stage", after)
        if last:
            note("stage", "done")
            name = f"rank{os.environ.get('RANK', '0')}.json"
            (Path(os.environ["STARTUP_TRACE"]) / name).write_text(json.dumps(EVENTS), encoding="utf-8")
            os._exit(0)
        return result

    return wrapped


def watch(module: ModuleType) -> None:
    """Note the stages of a training at the functions where they begin or end."""
    of: Any = module
    if module.__name__ == "mtunet_dist.config.loading":
        of.load_config = then(of.load_config, before="read the config", after="process group")
    if module.__name__ == "mtunet_dist.runs.resume":
        of.start = then(of.start, before="build", after="first batch")
    if module.__name__ == "mtunet_dist.core.step":
        of.share_valid_counts = then(of.share_valid_counts, before="first step")
    if module.__name__ == "mtunet_dist.strategies.ddp":
        of.PLUGIN.apply = then(of.PLUGIN.apply, last=True)


class Noting(importlib.abc.Loader):
    """Another loader's work, timed."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        timed = module.__name__ in PACKAGES
        if timed:
            note("begin", module.__name__)
        self.loader.exec_module(module)
        if timed:
            note("end", module.__name__)
        watch(module)


class Finder(importlib.abc.MetaPathFinder):
    """Has the import of some packages, and of ours, timed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in PACKAGES and not name.startswith("mtunet_dist."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Noting(spec.loader)
        return spec


if "STARTUP_TRACE" in os.environ:
    sys.meta_path.insert(0, Finder())
