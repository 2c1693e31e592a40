"""Decoded data in memory, one copy per node for all ranks of a training and all trainings of a user on the same data.

The copy is an anonymous file (``memfd_create``), named by a hash of what is in it. Each process that maps it shows
that name in /proc/PID/fd, and there a training that starts later finds it and maps it too. So it lives as long as
anyone maps it, whoever decoded it, and then it is gone: there is no file or list that could be left behind or be out
of date, however processes end, and no limit of a container's /dev/shm.

*Complete* is a copy that is sealed: from then on the kernel lets nobody change it. Decoders seal it last, so one that
is not sealed is at work or was killed; nobody else maps that.

*Trusted* is a copy whose inode belongs to this user; nobody can make one in another's name.

*One decodes*: the training that binds the abstract Unix socket of the same name, which the kernel takes back from a
process that ends. The others look again and again. Should no copy grow for ``PATIENCE_S`` (the process is suspended; or
the name was taken by someone else, since anyone may bind it), they decode their own. Over several nodes a training
takes all the locks that it needs or none, or two trainings could wait for each other.

Trainings that cannot see each other's /proc/PID/fd (containers with process namespaces of their own) have a copy each.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path

import numpy as np

from mtunet_dist import distributed
from mtunet_dist.data import node_memory

PATIENCE_S = 120.0  # so long another training's decoding may stand still
POLL_S = 0.3
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

# Decodes what belongs to one position into the memory, uint8 (size,), zero before; returns a note if it cannot.
Decode = Callable[[np.ndarray, int], str | None]


def node_copy(
    size: int, positions: range, decode: Decode, *, key: str | None, threads: int, what: str
) -> tuple[np.ndarray, dict[int, str]]:
    """Read-only memory, uint8 (size,), with all ``positions`` decoded, and the notes of all nodes by position.

    All ranks call it together, and each decodes its share with ``threads`` threads, where no complete copy for ``key``
    is found: equal keys must mean equal content. Without a key the copy is for this training alone. Raises InputError,
    on all ranks alike, that begins with ``what`` if a node has not so much memory left; a copy that is already there
    needs none.
    """
    members = node_memory.ranks_of_node()
    rank, leader = distributed.rank(), members[0]
    name = "mtunet_dist" if key is None else f"mtunet_dist-{digest(key, node_memory.node())}"
    with ExitStack() as stack:
        found, lock = _find_or_lock(name, size, search=rank == leader and key is not None)
        for taken in (found, lock):
            if taken is not None:
                stack.enter_context(taken)
        complete = distributed.everyone(found is not None)[leader]
        file = stack.enter_context(_leaders_file(found, name, size, what, leader))
        share = positions[:0] if complete else positions[members.index(rank) :: len(members)]
        notes = _decoded(file, size, share, decode, threads)
        of_ranks = distributed.everyone(_read_notes(file, size) if complete else notes)
        if rank == leader and not complete:
            _seal(file, size, {position: note for m in members for position, note in of_ranks[m].items()})
        data = np.frombuffer(_mapped(file, size), dtype=np.uint8)
    return data, dict(sorted(note for notes in of_ranks for note in notes.items()))


def digest(*content: object) -> str:
    """A hash of what JSON can say."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _find_or_lock(name: str, size: int, *, search: bool) -> tuple[FileIO | None, socket.socket | None]:
    """A complete copy, or the right to decode one; neither where there is nothing to ``search``, or waiting is no use.

    All ranks call it together, and meet again and again: none sits in a collective for longer than it allows.
    """
    before: dict[int, int] | None = None
    while True:
        found, lock, settled = None, None, True
        if search:
            found, unfinished = _look(name, size)
            if found is None and (lock := _lock(name)) is not None:
                found, _ = _look(name, size)  # it may have been completed in between
            if unfinished != before:
                before, deadline = unfinished, time.monotonic() + PATIENCE_S
            settled = found is not None or lock is not None or time.monotonic() > deadline
        if all(distributed.everyone(settled)):
            return found, lock
        for taken in (found, lock):
            if taken is not None:
                taken.close()
        # Not the generators that a training's checkpoint holds; by chance, so that two do not stay in step.
        time.sleep(random.SystemRandom().uniform(POLL_S / 2, POLL_S))


def _look(name: str, size: int) -> tuple[FileIO | None, dict[int, int]]:
    """A complete copy that some process holds; else the inodes of unfinished ones, with how many blocks they have."""
    link, unfinished = f"/memfd:{name} (deleted)", {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or it has ended
            for path in list((process / "fd").iterdir()):
                with suppress(OSError):  # closed meanwhile
                    if str(path.readlink()) != link:
                        continue
                    file = FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # whatever it may be by now
                    status = os.fstat(file.fileno())
                    if status.st_uid == os.geteuid() and str(Path(f"/proc/self/fd/{file.fileno()}").readlink()) == link:
                        if fcntl.fcntl(file, fcntl.F_GET_SEALS) & SEALS == SEALS and status.st_size >= size:
                            return file, {}
                        unfinished[status.st_ino] = status.st_blocks
                    file.close()
    return None, unfinished


def _lock(name: str) -> socket.socket | None:
    """The right to decode, until it is closed or the process ends; None if another has it."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0{name}")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            lock.close()
            return None
        # A sandbox forbids it: two that start at once will then both decode.
    return lock


def _leaders_file(found: FileIO | None, name: str, size: int, what: str, leader: int) -> FileIO:
    """The file that the leader of this rank's node has found, or else makes; all ranks call it together."""
    rank, file, problem = distributed.rank(), found, None
    if rank == leader and file is None:
        problem = node_memory.shortage(what, size, node_memory.free_memory(), "memory")
        if problem is None:
            file = FileIO(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+")
            file.truncate(size)
    node_memory.raise_any(problem)
    owner, number = distributed.everyone((os.getpid(), file.fileno() if file else -1))[leader]
    if file is None:
        try:
            file = FileIO(f"/proc/{owner}/fd/{number}", "r+")
        except OSError as error:
            problem = f"{what}: rank {rank} cannot share memory with rank {leader} of its node: {error.strerror}"
    node_memory.raise_any(problem)  # and from here on all have opened it
    assert file is not None
    return file


def _decoded(file: FileIO, size: int, share: range, decode: Decode, threads: int) -> dict[int, str]:
    """Decode ``share`` into ``file``; returns on all ranks at once, when the last is done."""
    memory = mmap.mmap(file.fileno(), size) if share else _mapped(file, size)
    pool = ThreadPoolExecutor(max(threads, 1))
    try:
        results = {i: pool.submit(decode, np.frombuffer(memory, dtype=np.uint8), i) for i in share}
        # The ranks meet again and again: none sits in a collective for as long as another decodes.
        while not all(distributed.everyone(not wait(results.values(), POLL_S).not_done)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    notes = {i: note for i, result in results.items() if (note := result.result()) is not None}
    memory.close()  # a file that anyone can still write to cannot be sealed
    return notes


def _mapped(file: FileIO, size: int) -> mmap.mmap:
    """Read-only. Keeps a descriptor of its own, by which others find the file for as long as it is mapped."""
    # By a descriptor that can only read: otherwise it could be made writable, so kernels before 6.7 refuse to map a
    # sealed file, and any kernel to seal a mapped one.
    with FileIO(f"/proc/self/fd/{file.fileno()}") as readable:
        return mmap.mmap(readable.fileno(), size, access=mmap.ACCESS_READ)


def _seal(file: FileIO, size: int, notes: dict[int, str]) -> None:
    """Write the notes behind the pixels, and declare all that complete."""
    file.seek(size)
    file.write(json.dumps(sorted(notes.items())).encode())
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)


def _read_notes(file: FileIO, size: int) -> dict[int, str]:
    return dict(json.loads(os.pread(file.fileno(), os.fstat(file.fileno()).st_size - size, size)))
