"""The software and hardware of a process. It is recorded in the run folder. The part that can change bits is also
recorded in each checkpoint."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mtunet_dist import __version__, distributed
from mtunet_dist.system.machine import cpus

PACKAGES = ("nvidia-dali-cuda130", "deepspeed", "numpy", "pillow")


def fingerprint() -> dict[str, str]:
    """Versions and devices that can change the last bits of a result."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "mtunet_dist": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # torch's version is a subclass of str, which a checkpoint cannot hold
        "cuda": torch.version.cuda or "none",
        **{name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "gpus": ", ".join(gpus) or "none",
        "cudnn": str(torch.backends.cudnn.version() or "none"),
        "nccl": _nccl(),
        "driver": _driver(),
    }


def environment() -> dict[str, Any]:
    """``fingerprint``, code state, machine and command."""
    return {
        **fingerprint(),
        "git": _git_state(),
        "host": platform.node(),
        "cpus": cpus(),
        "world_size": distributed.world_size(),
        "fp32_convolution": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "fp32_matmul": torch.backends.cuda.matmul.fp32_precision,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The differences between two fingerprints, such as ``torch 2.12 (now 2.13)``. Only keys in both are compared."""
    keys = sorted(before.keys() & now.keys())
    return [f"{k} {before.get(k)} (now {now.get(k)})" for k in keys if before.get(k) != now.get(k)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _nccl() -> str:
    if not torch.distributed.is_nccl_available():
        return "none"
    found = torch.cuda.nccl.version()
    return ".".join(map(str, found))


def _driver() -> str:
    """The version of NVIDIA's kernel module."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "none"
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "none"


def _cpu() -> str:
    """The name of the CPU. Libraries choose their kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git_state() -> str | None:
    """The commit of the code, with ``-dirty`` if the code has changed since. None outside a repository."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
