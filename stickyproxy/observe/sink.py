"""Where lines are written by a thread of its own, so that nobody who reads them slowly holds the event loop up."""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import stat
import threading
from time import monotonic, sleep
from typing import TYPE_CHECKING, Final

from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

STDOUT: Final = 1
_MARGIN_S: Final = 0.5
_LOOK_S: Final = 0.2  # between two looks, while nobody reads, at whether it is being closed
_PAUSE_S: Final = 0.01  # after a write that took nothing, though it was to
_STUCK_S: Final = 1.0  # a reader that takes nothing for so long is said to be none
_NO_READER: Final = "nobody reads it"
_REOPEN_S: Final = 1.0  # between two looks at whether the file was moved away


class WriterThread:
    """A thread that calls `write` some time after each `wake`, and a last time at the end.

    It gathers for `gather_s` seconds first: were it woken for each line, it would take turns with the event loop.
    """

    def __init__(self, name: str, write: Callable[[], None], gather_s: float) -> None:
        self._write = write
        self._gather_s = gather_s
        self._is_due = threading.Event()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_closing(self) -> bool:
        """Say whether `close` was called."""
        return self._is_closing.is_set()

    @property
    def has_started(self) -> bool:
        """Say whether `start` was called."""
        return self._thread.ident is not None

    @property
    def is_alive(self) -> bool:
        """Say whether it runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Note that there is something to write; never waits."""
        if not self._is_due.is_set():
            self._is_due.set()

    def close(self, flush_s: float) -> None:
        """Have it write what is there, and end; return then, or a little later than `flush_s` seconds from now."""
        self._is_closing.set()
        self._is_due.set()
        if self._thread.is_alive():
            # A little longer than the thread needs by itself; a write that hangs all the same is left behind.
            self._thread.join(flush_s + _MARGIN_S)

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the main thread, which may wait
        while not self._is_closing.is_set():
            self._is_due.wait()
            self._is_closing.wait(self._gather_s)
            self._is_due.clear()
            self._write()
        self._write()


class Sink:
    """Where the lines go: a file that may be rotated, or an open descriptor (`path` None). Used by one thread.

    `what` names it in the log. `lost` counts the lines that were not written whole. While nobody reads, `write` waits
    until `give_up_at` (monotonic seconds), which another thread may set. A failure is logged when it begins and when it
    ends.
    """

    def __init__(self, what: str, path: str | None = None, descriptor: int | None = None) -> None:
        self._what = what
        self._path = path
        self._descriptor = STDOUT if descriptor is None else descriptor
        self.chunk_bytes = select.PIPE_BUF
        """What is written at once: to a pipe, so much is not mixed with what others write to it."""
        self._is_open = path is None
        self._look_at = 0.0
        self._is_mid_line = False
        self.is_failing = False
        """Whether the last lines could not be written."""
        self.give_up_at = float("inf")
        self.lost = 0

    def open(self) -> None:
        """Open the file; raise UsageError where that cannot be. A FIFO may have no reader yet."""
        try:
            self._open()
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise UsageError(f"cannot open {self._what} {self._path}: {_explain(error)}") from error

    def write(self, lines: list[bytes]) -> None:
        """Write lines, each with its line end; those that cannot be written are counted as lost."""
        text = b"".join(lines)
        rest = memoryview(text)
        try:
            self._reopen_if_moved()
            if self._is_mid_line:  # a line was cut off by an error: do not go on in it
                text = b"\n" + text
                rest = memoryview(text)
            while rest and self._wait_until_writable():
                rest = rest[self._write_some(rest) :]
        except OSError as error:
            self._note_failure(_explain(error))
        else:
            self._note_failure(_NO_READER if rest else None)
        if len(rest) < len(text):
            self._is_mid_line = text[len(text) - len(rest) - 1] != ord("\n")
        self.lost += min(len(lines), bytes(rest).count(b"\n"))

    def close(self) -> None:
        """Close the file; a descriptor that was given stays open."""
        if self._is_open and self._path is not None:
            os.close(self._descriptor)
            self._is_open = False

    def _open(self) -> None:
        if self._path is not None:
            # O_NONBLOCK is for a FIFO: neither opening nor writing may hang on its reader.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o640)
            self._is_open = True
        if stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.chunk_bytes = 1 << 20

    def _reopen_if_moved(self) -> None:
        """Open the file anew where another stands at its path, or none: it was rotated. Looks once a second."""
        now = monotonic()
        if self._path is None or (self._is_open and now < self._look_at):
            return
        self._look_at = now + _REOPEN_S
        if self._is_open:
            try:
                if os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):  # noqa: PTH116 -- no objects
                    return
            except FileNotFoundError:
                pass
            self.close()
            self._is_mid_line = False
        self._open()

    def _wait_until_writable(self) -> bool:
        """Wait until a write of PIPE_BUF bytes would not block; False where the time is over."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        now = monotonic()
        stuck_at = now + _STUCK_S
        while not poll.poll(max(0.0, min(_LOOK_S, self.give_up_at - now)) * 1000):
            now = monotonic()
            if now >= stuck_at:
                self._note_failure(_NO_READER)
            if now >= self.give_up_at:
                return False
        return True

    def _write_some(self, rest: memoryview) -> int:
        try:
            return os.write(self._descriptor, rest[: self.chunk_bytes])
        except BlockingIOError:
            sleep(_PAUSE_S)
            return 0

    def _note_failure(self, reason: str | None) -> None:
        if reason is not None and not self.is_failing:
            logger.error("cannot write %s: %s", self._what, reason)
        elif reason is None and self.is_failing:
            logger.info("%s is written again", self._what)
        self.is_failing = reason is not None


def _explain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
