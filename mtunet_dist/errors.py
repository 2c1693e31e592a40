"""The errors that a user can meet. A command shows each of them as one line, without a traceback (see
``system/command.py``)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args


class MTUNetError(Exception):
    """Base of the errors that a command prints as one line."""


class InputError(MTUNetError, ValueError):
    """An input from the user is wrong: a config key, a path, a file, a sample. The message names it."""


class NonFiniteLossError(MTUNetError, FloatingPointError):
    """A loss or a part of the training state became NaN or infinite. The message names it and the step."""


class PreemptedError(MTUNetError):
    """A training stopped on request and wrote a checkpoint. The same command continues it."""


class MachineError(MTUNetError):
    """The machine or the cluster failed, such as by a full disk. It is not the user's error: a second try may
    succeed."""


class LostProcessError(MachineError):
    """A worker process of this process was killed."""


EXTRAS = {"deepspeed": "deepspeed", "ray": "tune", "optuna": "tune"}  # packages that only some users need


def needs(what: str, missing: ModuleNotFoundError) -> MTUNetError:
    """The error for ``what`` on a machine without a package that it needs. Raises ``missing`` if that is no extra."""
    package = (missing.name or "").partition(".")[0]
    if package not in EXTRAS:
        raise missing
    return InputError(f"{what} needs the package {package}: pip install 'mtunet_dist[{EXTRAS[package]}]'")


def nearest(name: str, names: Sequence[str]) -> str | None:
    """Return the one of ``names`` that a misspelt ``name`` probably means."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


def closest(name: str, names: Sequence[str]) -> str:
    """Return `` Did you mean 'x'?`` for a misspelt ``name``, or an empty text. It is a part of an error message."""
    near = nearest(name, names)
    return f" Did you mean '{near}'?" if near else ""


def check_choice(name: str, value: object, kind: Any) -> None:
    """Raise InputError, with the valid choices, if ``value`` of the option ``name`` is none of the Literal ``kind``."""
    if value not in get_args(kind):
        raise InputError(f"{name} must be one of {', '.join(get_args(kind))}, got '{value}'")
