"""What makes a function a command: its exit codes, and one line instead of a traceback for an error of the user."""

from __future__ import annotations

import atexit
import errno
import faulthandler
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from mtunet_dist.errors import InputError, MachineError, MTUNetError, PreemptedError
from mtunet_dist.system import terminal

# Exit codes beside 2, the user's error. After both of these the same command continues the run.
PREEMPTED = 75  # stopped on request, with a checkpoint; EX_TEMPFAIL of sysexits.h, "try again later"
HUNG = 76  # no progress for config.timeout_s
PATIENCE_S = 5.0  # time that the first rank has to print an error before the others do
END_S = 120  # time that a finished process has to exit, and that leaving a process group may take


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make ``main`` a command: an expected error becomes one line on stderr and exit code 2 (75 when preempted, 1 when
    the machine failed).

    Under torchrun, usually all ranks find the same error in the same input, and one line is enough. The first process
    of each node prints it and exits, and torchrun then ends the other processes while they wait. Another process that
    is still there after ``PATIENCE_S`` has an error of its own and prints it. An unexpected error keeps its traceback.
    A collective that fails because another rank has ended waits until torchrun ends it, so that only the cause is
    printed.

    Ctrl-C ends the command with one line and exit code 130. See ``terminal``, also for a standard output that fails.

    A process can hang at its exit, when threads of its libraries wait for one another. It is ended after ``END_S`` with
    exit code 1 and the stacks of its threads on stderr. If Python has already ended, SIGALRM ends it.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        if not faulthandler.is_enabled():
            faulthandler.enable(2)  # otherwise a SIGBUS, such as from a failing disk under a map, prints nothing
        with terminal.interrupts(), terminal.Output():
            try:
                _run(main)
            except MTUNetError as error:
                if os.environ.get("LOCAL_RANK", "0") != "0":
                    time.sleep(PATIENCE_S)
                preempted = isinstance(error, PreemptedError)
                terminal.say(error if preempted else f"error: {error}")
                sys.exit(PREEMPTED if preempted else 1 if isinstance(error, MachineError) else 2)
            except RuntimeError:
                if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                    time.sleep(2 * PATIENCE_S)
                raise
            except KeyboardInterrupt as error:
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    terminal.say(str(error) or "interrupted")
                sys.exit(terminal.INTERRUPTED)
            finally:
                # The timer starts only when the interpreter ends, because a caller of ``main`` may continue. If
                # possible it starts before Python waits for threads.
                getattr(threading, "_register_atexit", atexit.register)(_end_in_time)

    return wrapped


def _run(main: Callable[[], None]) -> None:
    """Run ``main``. A file or folder without read or write permission is the user's error, in any part of the code."""
    try:
        main()
    except OSError as error:
        if error.filename is None or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise InputError(f"{os.fsdecode(error.filename)}: {error.strerror}") from None


def _end_in_time() -> None:
    """End the process after ``END_S``. Neither timer needs the interpreter's lock, so both end any deadlock. The second
    also ends deadlocks in the exit handlers of libraries.

    Ctrl-C now ends the process at once, because no code would handle a KeyboardInterrupt any more.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.dump_traceback_later(END_S, exit=True, file=2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(END_S + 5)
