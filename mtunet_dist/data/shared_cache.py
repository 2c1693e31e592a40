"""Decoded data in memory: one copy per node for all ranks of a training and for all trainings of a user on the same
data.

The copy is an anonymous file (``memfd_create``), named by a hash of its content. Each process that maps it shows that
name in /proc/PID/fd. A training that starts later finds it there and maps it too. The copy lives as long as any process
maps it. No file or list can be left behind or become outdated, however processes end, and the limit of a container's
/dev/shm does not apply.

A copy is complete when it is sealed: the kernel then allows no more changes. Decoders seal it last. An unsealed copy is
in work, or its decoder was killed; no other process maps it.

A copy is trusted if its inode belongs to this user, because no other user can make such an inode.

Only one training decodes: the one that binds the abstract Unix socket of the same name. The kernel frees this name when
the process ends. The other trainings look again and again. If no copy grows for ``PATIENCE_S`` (the decoding process is
suspended, or another user has bound the name), they decode their own copy. Over several nodes a training takes all the
locks that it needs or none; otherwise two trainings could wait for each other.

Trainings that cannot see each other's /proc/PID/fd (containers with their own process namespaces) have a copy each.
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

PATIENCE_S = 120.0  # the longest time without progress of another training's decoding
POLL_S = 0.3
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

# Decodes one position into zeroed memory, uint8 (size,). Returns a note if it cannot.
Decode = Callable[[np.ndarray, int], str | None]


def node_copy(
    size: int, positions: range, decode: Decode, *, key: str | None, threads: int, what: str
) -> tuple[np.ndarray, dict[int, str]]:
    """Read-only memory, uint8 (size,), with all ``positions`` decoded, and the notes of all nodes by position.

    All ranks call it together. If no complete copy for ``key`` is found, each rank decodes its share with ``threads``
    threads. Equal keys must mean equal content. Without a key the copy is for this training only. Raises InputError on
    all ranks, which begins with ``what``, if a node has too little free memory. An existing copy needs no more memory.
    """
    members = node_memory.ranks_of_node()
    rank, leader = distributed.rank(), members[0]
    name = "mtunet_dist" if key is None else f"mtunet_dist-{digest(key, node_memory.node())}"
    with ExitStack() as stack:
        found, lock = _find_or_lock(name, size, search=rank == leader and key is not None)
        for taken in (found, lock):
            if taken is not None:
                stack.enter_context(taken)
        complete = distributed.all_gather_object(found is not None)[leader]
        file = stack.enter_context(_leaders_file(found, name, size, what, leader))
        share = positions[:0] if complete else positions[members.index(rank) :: len(members)]
        notes = _decoded(file, size, share, decode, threads)
        of_ranks = distributed.all_gather_object(_read_notes(file, size) if complete else notes)
        if rank == leader and not complete:
            _seal(file, size, {position: note for m in members for position, note in of_ranks[m].items()})
        data = np.frombuffer(_mapped(file, size), dtype=np.uint8)
    return data, dict(sorted(note for notes in of_ranks for note in notes.items()))


def digest(*content: object) -> str:
    """A hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _find_or_lock(name: str, size: int, *, search: bool) -> tuple[FileIO | None, socket.socket | None]:
    """A complete copy, or the right to decode one. Neither if there is nothing to ``search`` or if waiting is useless.

    All ranks call it together. They synchronise again and again, so that no rank waits in one collective for too long.
    """
    before: dict[int, int] | None = None
    while True:
        found, lock, settled = None, None, True
        if search:
            found, unfinished = _look(name, size)
            if found is None and (lock := _lock(name)) is not None:
                found, _ = _look(name, size)  # it may have been completed since the last look
            if unfinished != before:
                before, deadline = unfinished, time.monotonic() + PATIENCE_S
            settled = found is not None or lock is not None or time.monotonic() > deadline
        if all(distributed.all_gather_object(settled)):
            return found, lock
        for taken in (found, lock):
            if taken is not None:
                taken.close()
        # A random delay, so that two trainings do not stay in step. It does not use the generators that checkpoints
        # hold.
        time.sleep(random.SystemRandom().uniform(POLL_S / 2, POLL_S))


def _look(name: str, size: int) -> tuple[FileIO | None, dict[int, int]]:
    """A complete copy that some process holds; otherwise the inodes of unfinished copies with their numbers of
    blocks."""
    link, unfinished = f"/memfd:{name} (deleted)", {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it belongs to another user, or has ended
            for path in list((process / "fd").iterdir()):
                with suppress(OSError):  # it has been closed
                    if str(path.readlink()) != link:
                        continue
                    file = FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # the path may by now be any kind of file
                    status = os.fstat(file.fileno())
                    if status.st_uid == os.geteuid() and str(Path(f"/proc/self/fd/{file.fileno()}").readlink()) == link:
                        if fcntl.fcntl(file, fcntl.F_GET_SEALS) & SEALS == SEALS and status.st_size >= size:
                            return file, {}
                        unfinished[status.st_ino] = status.st_blocks
                    file.close()
    return None, unfinished


def _lock(name: str) -> socket.socket | None:
    """The right to decode, until it is closed or the process ends. None if another process has it."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0{name}")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            lock.close()
            return None
        # A sandbox does not allow it: two trainings that start at the same time then both decode.
    return lock


def _leaders_file(found: FileIO | None, name: str, size: int, what: str, leader: int) -> FileIO:
    """The file that the leader of this rank's node has found, or makes now. All ranks call it together."""
    rank, file, problem = distributed.rank(), found, None
    if rank == leader and file is None:
        problem = node_memory.shortage(what, size, node_memory.free_memory(), "memory")
        if problem is None:
            file = FileIO(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+")
            file.truncate(size)
    node_memory.raise_any(problem)
    owner, number = distributed.all_gather_object((os.getpid(), file.fileno() if file else -1))[leader]
    if file is None:
        try:
            file = FileIO(f"/proc/{owner}/fd/{number}", "r+")
        except OSError as error:
            problem = f"{what}: rank {rank} cannot share memory with rank {leader} of its node: {error.strerror}"
    node_memory.raise_any(problem)  # from here on all ranks have opened it
    assert file is not None
    return file


def _decoded(file: FileIO, size: int, share: range, decode: Decode, threads: int) -> dict[int, str]:
    """Decode ``share`` into ``file``. Returns on all ranks at the same time, when the last one is done."""
    memory = mmap.mmap(file.fileno(), size) if share else _mapped(file, size)
    pool = ThreadPoolExecutor(max(threads, 1))
    try:
        results = {i: pool.submit(decode, np.frombuffer(memory, dtype=np.uint8), i) for i in share}
        # The ranks synchronise again and again, so that no rank waits in one collective while another one decodes.
        while not all(distributed.all_gather_object(not wait(results.values(), POLL_S).not_done)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    notes = {i: note for i, result in results.items() if (note := result.result()) is not None}
    memory.close()  # a file that is mapped writable cannot be sealed
    return notes


def _mapped(file: FileIO, size: int) -> mmap.mmap:
    """Map the file read-only. The map keeps its own descriptor, by which other processes find the file."""
    # The descriptor is read-only. From another one the map could be made writable; then kernels before 6.7 refuse to
    # map a sealed file, and all kernels refuse to seal a mapped one.
    with FileIO(f"/proc/self/fd/{file.fileno()}") as readable:
        return mmap.mmap(readable.fileno(), size, access=mmap.ACCESS_READ)


def _seal(file: FileIO, size: int, notes: dict[int, str]) -> None:
    """Write the notes behind the pixels, then seal the file: it is complete."""
    file.seek(size)
    file.write(json.dumps(sorted(notes.items())).encode())
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)


def _read_notes(file: FileIO, size: int) -> dict[int, str]:
    return dict(json.loads(os.pread(file.fileno(), os.fstat(file.fileno()).st_size - size, size)))
