"""A folder that one process at a time may work in.

The kernel drops the lock of a process that ends. One that only its network has lost lives on and keeps it, and Slurm,
which cannot tell, queues its job again. So the lock file says who works in the folder. Who succeeds that one writes
itself there first, which the other sees as soon as it sees the disk, and ends; and then waits for the lock.
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

LOCK = "lock"  # the file in the folder; without a process that has it open it means nothing
BYTES = 512  # of its text, always as many, so that one write replaces it
TAKEOVER_S = 600.0  # that a successor waits: many times what a network disk takes to drop the locks of a lost node
LOOK_S = 2.0  # from one look at the owner to the next


@dataclass(frozen=True)
class Owner:
    """A process that works in a folder, or is about to."""

    job: str  # Slurm's number; empty outside of it
    restart: int  # how often Slurm had queued the job again
    host: str
    pid: int
    token: str  # no other process's

    def succeeds(self, other: Owner) -> bool:
        """Whether Slurm has ended the other's job, as far as it knows, to start this one's."""
        if not self.job or not other.job:
            return False
        if self.job == other.job:
            return self.restart > other.restart
        return other.job in re.findall(r"\d+", os.environ.get("SLURM_JOB_DEPENDENCY", ""))

    def __str__(self) -> str:
        job = f"job {self.job}, restart {self.restart}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"


class FolderLock:
    """A folder that is taken, until ``close`` or the end of the process, however it ends."""

    def __init__(self, file: BinaryIO, folder: Path, owner: Owner) -> None:
        self._file, self._folder, self._owner = file, folder, owner
        self._closed = threading.Event()
        _write(file, owner)
        if owner.job:  # elsewhere nobody succeeds it
            threading.Thread(target=self._watch, name="folder lock", daemon=True).start()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the folder."""
        self._closed.set()
        self._file.close()

    def end_if_lost(self) -> None:
        """End this process, at once and with exit code 2, if another has taken over the folder: a network disk may
        give the lock to another while this node is cut off."""
        now = _read(self._folder / LOCK)
        if now is not None and now.token != self._owner.token:
            message = f"error: {now} has taken over {self._folder}; {self._owner} ends"
            print(message, file=sys.stderr, flush=True)
            os._exit(2)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            self.end_if_lost()


def lock_folder(folder: Path, busy: str, *, key: str = "", takeover_s: float = TAKEOVER_S) -> FolderLock:
    """Make ``folder`` and take it.

    Raises InputError ``busy`` if another process has it, and one that names it, after ``key``, if nothing can be
    written there. Where this process's job succeeds that one's it has it end, and waits for that, for ``takeover_s``
    at most.
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
    """Whether the lock is this process's now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network file systems know no locks; there, two processes in one folder are the user's to avoid.
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return True


def _write(file: BinaryIO, owner: Owner) -> None:
    text = json.dumps(asdict(owner)).encode().ljust(BYTES - 1) + b"\n"
    try:
        os.pwrite(file.fileno(), text, 0)
    except OSError:  # a full disk: better no owner than one of before
        with suppress(OSError):
            os.ftruncate(file.fileno(), 0)


def _read(path: Path) -> Owner | None:
    """Who works in the folder, or has worked there; None where that cannot be read."""
    try:
        return Owner(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
