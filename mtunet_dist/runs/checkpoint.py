"""Checkpoints: one file each, complete or absent. The newest few and the best are kept.

A file holds plain tensors, numbers, strings, lists and dicts, so that ``torch.load(weights_only=True)`` reads it. It
needs no run folder: it also holds the config and the meaning of the dataset's classes and depth. It is a zip archive
whose entries have CRC-32s. They are checked before loading, because ``torch.load`` does not check them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mtunet_dist.errors import InputError, MTUNetError

FORMAT = 2
State = dict[str, Any]
_NAME = re.compile(r"step_(\d+)\.pt")


def path_of(folder: Path, step: int) -> Path:
    """The path of the checkpoint after ``step`` optimiser steps."""
    return folder / f"step_{step:08d}.pt"


def save(folder: Path, state: State, *, keep: int, best: bool, check_owner: Callable[[], None] | None = None) -> Path:
    """Write ``state`` (with its ``step``). If it is the ``best``, also link it as ``best.pt``. Keep the newest
    ``keep``.

    Every file under its final name is whole, even if the process is killed while it writes. Files of later steps are
    removed too: a run can only be behind them if they could not be read. ``check_owner`` is called right before the
    file gets its name; it ends a process whose folder another process has taken over. Raises MTUNetError if the disk is
    full or read-only.
    """
    path = path_of(folder, state["step"])
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # a unique name, in case another process writes here
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if check_owner is not None:
            check_owner()
        if best:
            publish(temporary, folder / "best.pt")  # first: the name of the step means that best.pt is complete
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer hides the OSError behind a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # the next file may need its space
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else error
        raise MTUNetError(f"cannot save checkpoint {path}: {reason}") from error
    with suppress(OSError):  # the checkpoint is there; the next one tries the removal again
        for half_written in folder.glob("*.tmp"):  # left by a process that was killed
            half_written.unlink()
        newest_first = by_age(folder)
        this = newest_first.index(path)
        for other in newest_first[:this] + newest_first[this + keep :]:
            other.unlink()
    return path


def publish(path: Path, name: Path) -> None:
    """Give ``path`` the second name ``name``, atomically. A file system without hard links gets a copy."""
    temporary = name.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    temporary.replace(name)


def step_of(path: Path) -> int:
    """The step of a checkpoint ``path``, from its name; see ``path_of``."""
    found = _NAME.fullmatch(path.name)
    assert found, path
    return int(found[1])


def by_age(folder: Path) -> list[Path]:
    """The step checkpoints in ``folder``, newest first."""
    found = [(int(m[1]), p) for p in folder.glob("step_*.pt") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def check(path: Path) -> None:
    """Raise InputError if a checkpoint is missing or differs in any byte from what was written. The message names it.

    If it cannot be read for another reason (permissions, a network disk), raise MTUNetError: it may be whole.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged bytes can raise any error, such as EINVAL from a bad seek
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise MTUNetError(f"checkpoint {path} cannot be read: {error.strerror}") from error
        raise InputError(f"checkpoint {path} is damaged: {error}") from None
    if damaged is not None:
        raise InputError(f"checkpoint {path} is damaged: wrong checksum of {damaged}")


def load(path: Path) -> State:
    """Read a checkpoint that passes ``check`` onto the CPU. Raises InputError that names a damaged or foreign file."""
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise any error
        raise InputError(f"checkpoint {path} is damaged: {(str(error) or repr(error)).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of this program (format {FORMAT})")
    return state


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` that passes ``check``. None if the folder has no checkpoint. Warns of damaged
    ones.

    Raises InputError if all of them are damaged.
    """
    newest_first = by_age(folder)
    for path in newest_first:
        try:
            check(path)
            return path
        except InputError as error:
            warnings.warn(f"{error}; going back to an older one", stacklevel=2)
    if newest_first:
        raise InputError(f"none of the {len(newest_first)} checkpoints in {folder} can be read")
    return None


def resolve(path: Path) -> Path:
    """The checkpoint that the user's path means: the file itself, or in a run folder ``best.pt``, else the newest one.

    Raises InputError if there is none.
    """
    if path.is_file():
        return path
    folder = path / "checkpoints"
    candidates = [p for p in [folder / "best.pt", *by_age(folder)] if p.is_file()]
    if not candidates:
        raise InputError(f"{path} is neither a checkpoint nor a run folder with checkpoints")
    return candidates[0]


class Writer:
    """Saves checkpoints in ``folder`` from a thread. The caller waits only for a copy of the state, not for the
    disk."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.check_owner: Callable[[], None] | None = None  # see ``save``
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def submit(self, state: State, *, best: bool) -> None:
        """Copy ``state`` and start to ``save`` it. The caller must have waited for the previous one."""
        assert self._writing is None
        self._writing = self._thread.submit(
            save, self.folder, _copy(state), keep=self.keep, best=best, check_owner=self.check_owner
        )

    @property
    def failed(self) -> bool:
        """Whether ``wait`` would raise an error, as far as this is known now."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until the submitted checkpoint is on disk. An error of ``save`` is raised here, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, then end the thread."""
        self._thread.shutdown()


def _copy(value: Any) -> Any:
    """Copy the tensors in ``value`` to new memory on the CPU, so that training may change the originals."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
