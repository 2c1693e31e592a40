"""The errors a user is expected to meet, and how a command shows them: one line, no traceback."""

from __future__ import annotations

import atexit
import difflib
import errno
import faulthandler
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

from mtunet_dist import terminal

# Exit codes beside 2, an error of the user's. Both mean: the same command goes on.
PREEMPTED = 75  # stopped on request, with a checkpoint; EX_TEMPFAIL of sysexits.h, "try again later"
HUNG = 76  # nothing moved for config.timeout_s
PATIENCE_S = 5.0  # that other ranks give the first to print an error
END_S = 120  # that a process whose work is done has to end, and a process group to be left


class MTUNetError(Exception):
    """Base of the errors that a command prints as one line."""


class InputError(MTUNetError, ValueError):
    """Something the user gave is wrong: a config key, a path, a file, a sample. Names it."""


class NonFiniteLossError(MTUNetError, FloatingPointError):
    """A loss, or what a training is made of, became NaN or infinite. Names it, and the step."""


class PreemptedError(MTUNetError):
    """A training was asked to stop and did, with a checkpoint; the same command goes on."""


class LostProcessError(MTUNetError):
    """A worker process of this one was killed. Like that a crash, not the user's error: another try may do better."""


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The one of ``names`` that a misspelt ``name`` probably means."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


def closest(name: str, names: Sequence[str]) -> str:
    """`` Did you mean 'x'?`` for a misspelt ``name``, or nothing; goes into an error message."""
    near = nearest(name, names)
    return f" Did you mean '{near}'?" if near else ""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make ``main`` a command: expected errors become one line on stderr and exit code 2 (75 when preempted, 1
    when a worker process was lost).

    Under torchrun mostly all ranks find the same error in the same input, and one line is enough: the first process
    of each node prints it, and its end makes torchrun end the others while they wait. If it does not end, the error
    is another rank's own, which then speaks for itself. Anything unexpected keeps its traceback, but a collective
    that fails because another rank has ended waits to be ended as well, so that the cause alone is printed.

    Ctrl-C ends it with a line and exit code 130, see ``terminal``, which also has what becomes of an output that fails.

    A process that does not come to its end, as its libraries' threads wait for one another, is ended after ``END_S``
    with exit code 1 and the stacks of its threads on stderr, or where Python has ended already by SIGALRM.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        if not faulthandler.is_enabled():
            faulthandler.enable(2)  # else an end by SIGBUS, as of a failing disk under a map, would be without a word
        with terminal.interrupts(), terminal.Output():
            try:
                _run(main)
            except MTUNetError as error:
                if os.environ.get("LOCAL_RANK", "0") != "0":
                    time.sleep(PATIENCE_S)
                preempted = isinstance(error, PreemptedError)
                terminal.say(error if preempted else f"error: {error}")
                sys.exit(PREEMPTED if preempted else 1 if isinstance(error, LostProcessError) else 2)
            except RuntimeError:
                if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                    time.sleep(2 * PATIENCE_S)
                raise
            except KeyboardInterrupt as error:
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    terminal.say(str(error) or "interrupted")
                sys.exit(terminal.INTERRUPTED)
            finally:
                # Only as the interpreter ends, as a caller of ``main`` may live on; before it waits for threads, if it
                # can.
                getattr(threading, "_register_atexit", atexit.register)(_end_in_time)

    return wrapped


def _run(main: Callable[[], None]) -> None:
    """A file or folder that may not be read or written is the user's to mend, whoever came upon it."""
    try:
        main()
    except OSError as error:
        if error.filename is None or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise InputError(f"{os.fsdecode(error.filename)}: {error.strerror}") from None


def _end_in_time() -> None:
    """Neither needs the interpreter's lock, so they end any deadlock; the second those of the libraries' own exits.

    Ctrl-C meanwhile ends the process at once: nobody would hear of a KeyboardInterrupt.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.dump_traceback_later(END_S, exit=True, file=2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(END_S + 5)
