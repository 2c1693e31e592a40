"""How a command handles its terminal: Ctrl-C, and errors of standard output."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any, TextIO

INTERRUPTED = 130  # the exit code that a shell uses for it
AGAIN_S = 0.1  # delay before a Ctrl-C that came at a bad moment is tried again


def end_on_interrupt() -> None:
    """Until ``interrupts`` is entered, Ctrl-C ends the process at once, with one line: there is nothing to clean up."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise the signal is ignored on purpose
        signal.signal(signal.SIGINT, _end)


@contextmanager
def interrupts() -> Iterator[None]:
    """While entered, the first Ctrl-C raises KeyboardInterrupt. The second ends the process at once, at any point."""
    ours = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _end)
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = signal.signal(signal.SIGINT, _raise), sys.unraisablehook

    def unraisable(found: sys.UnraisableHookArgs) -> None:
        if issubclass(found.exc_type, KeyboardInterrupt):  # raised in a destructor: Python would drop it
            signal.signal(signal.SIGINT, _raise)
            # If it were raised at once, it would be raised in this hook and dropped again.
            threading.Timer(AGAIN_S, os.kill, [os.getpid(), signal.SIGINT]).start()
        else:
            hook(found)

    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


@contextmanager
def deaf_children(*numbers: signal.Signals) -> Iterator[None]:
    """While entered, new processes block these signals: a terminal sends SIGINT to every process of a command."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # children inherit it
    resource_tracker.ensure_running()  # its process starts with the first child, and unblocks SIGINT and SIGTERM here
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Output:
    """While entered, standard output prints characters that it cannot encode as escapes, and an output error stops
    nothing.

    The output after an error is lost. If the command otherwise succeeds, the lost output is an error at its end, except
    when the reader has closed the pipe, as ``head`` does.
    """

    def __init__(self) -> None:
        self._inner: TextIO | None = None
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """As ``write`` of a file."""
        assert self._inner is not None
        try:
            return self._inner.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """As ``flush`` of a file."""
        assert self._inner is not None
        try:
            self._inner.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _lose(self, error: OSError) -> None:
        """Send the text that is still in buffers, here and in libraries, to /dev/null."""
        assert self._inner is not None
        self.error = self.error or error
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._inner.fileno())
            os.close(null)

    def __enter__(self) -> Output:
        self._inner = sys.stdout  # None if standard output is closed
        if self._inner is not None:
            if hasattr(self._inner, "reconfigure"):
                self._inner.reconfigure(errors="backslashreplace")
            sys.stdout = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._inner is None:
            return
        self.flush()
        sys.stdout = self._inner
        went_well = error is None or (isinstance(error, SystemExit) and not error.code)
        if self.error is not None and self.error.errno != errno.EPIPE and went_well:
            say(f"error: standard output: {self.error.strerror}; what was to be printed is lost")
            sys.exit(1)


def say(text: object) -> None:
    """Print a line on stderr. If stderr fails, nothing happens: the exit code must not depend on it."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
