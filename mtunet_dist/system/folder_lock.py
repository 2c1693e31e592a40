"""A folder in which only one process at a time may work.

The kernel drops the lock of a process that ends. A process that has only lost its network still runs and still holds
the lock. Slurm cannot see the difference and queues its job again. Therefore the lock file names the owner, the process
that works in the folder. The process of the new job first writes its own name into the file and then waits for the
lock. The old process sees the new name as soon as it reaches the disk again, and ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from mtunet_dist.errors import InputError

LOCK = "lock"  # the file in the folder; it means nothing if no process has it open
BYTES = 512  # length of its text; it is constant, so that one write replaces it
TAKEOVER_S = 600.0  # time that a successor waits: a network disk needs far less to drop the locks of a lost node
LOOK_S = 2.0  # time between two checks of the owner


@dataclass(frozen=True)
class Owner:
    """A process that works in a folder, or will work there."""

    job: str  # Slurm's job number; empty outside of Slurm
    restart: int  # how often Slurm had queued the job again
    host: str
    pid: int
    token: str  # unique for each process

    def succeeds(self, other: Owner) -> bool:
        """Whether Slurm, as far as it knows, has ended the job of ``other`` to start the job of this process."""
        if not self.job or not other.job:
            return False
        if self.job == other.job:
            return self.restart > other.restart
        return other.job in re.findall(r"\d+", os.environ.get("SLURM_JOB_DEPENDENCY", ""))

    def __str__(self) -> str:
        job = f"job {self.job}, restart {self.restart}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"


class FolderLock:
    """A locked folder. The lock lasts until ``close`` or until the process ends, in any way."""

    def __init__(self, file: BinaryIO, folder: Path, owner: Owner) -> None:
        self._file, self._folder, self._owner = file, folder, owner
        self._closed = threading.Event()
        _write(file, owner)
        if owner.job:  # without Slurm there is no successor
            threading.Thread(target=self._watch, name="folder lock", daemon=True).start()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder for other processes."""
        self._closed.set()
        self._file.close()

    def end_if_lost(self) -> None:
        """End this process at once, with exit code 2, if another process has taken over the folder. A network disk may
        give the lock to another process while this node is cut off."""
        now = _read(self._folder / LOCK)
        if now is not None and now.token != self._owner.token:
            message = f"error: {now} has taken over {self._folder}; {self._owner} ends"
            print(message, file=sys.stderr, flush=True)
            os._exit(2)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            self.end_if_lost()


def lock_folder(folder: Path, busy: str, *, key: str = "", takeover_s: float = TAKEOVER_S) -> FolderLock:
    """Create ``folder`` and lock it.

    Raises InputError ``busy`` if another process has the lock, and an InputError that starts with ``key`` and names the
    folder if it cannot be written. If the job of this process succeeds the job of the owner, it makes the owner end and
    waits for that, for at most ``takeover_s``.
    """
    me = Owner(
        job=os.environ.get("SLURM_JOB_ID", ""),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        host=socket.gethostname(),
        pid=os.getpid(),
        token=uuid.uuid4().hex,
    )
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
        file = path.open("r+b", buffering=0)
    except OSError as error:
        raise InputError(f"{key}{folder} cannot be written: {error.strerror}") from None
    try:
        if not _take(file):
            before = _read(path)
            if before is None or not me.succeeds(before):
                raise InputError(busy)
            print(f"waiting until {before} has left {folder}; is its node cut off?", flush=True)
            _write(file, me)
            deadline = time.monotonic() + takeover_s
            while not _take(file):
                if time.monotonic() > deadline:
                    raise InputError(f"{busy}: {before}, which has not ended in {takeover_s:.0f} s")
                time.sleep(0.2)
    except BaseException:
        file.close()
        raise
    return FolderLock(file, folder, me)


def _take(file: BinaryIO) -> bool:
    """Try to take the lock; return whether this process has it now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network file systems have no locks. There the user must avoid two processes in one folder.
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True


def _write(file: BinaryIO, owner: Owner) -> None:
    text = json.dumps(asdict(owner)).encode().ljust(BYTES - 1) + b"\n"
    try:
        os.pwrite(file.fileno(), text, 0)
    except OSError:  # a full disk: no owner is better than a previous one
        with suppress(OSError):
            os.ftruncate(file.fileno(), 0)


def _read(path: Path) -> Owner | None:
    """The process that works, or has worked, in the folder; None if the file cannot be read."""
    try:
        return Owner(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
