"""A folder that one process at a time may work in."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

from mtunet_dist.errors import InputError

LOCK = "lock"  # the file in the folder; without a process that has it open it means nothing


def lock_folder(folder: Path, busy: str, *, key: str = "") -> IO[bytes]:
    """Make ``folder`` and take it, until the returned file is closed or the process ends, however it ends.

    Raises InputError ``busy`` if another process has it, and one that names it, after ``key``, if nothing can be
    written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("wb")
    except OSError as error:
        raise InputError(f"{key}{folder} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise InputError(busy) from None
    except OSError as error:
        # Some network file systems know no locks; there, two processes in one folder are the user's to avoid.
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    return lock
