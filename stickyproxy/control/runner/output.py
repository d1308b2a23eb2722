"""What app processes print, line by line with the name of each, written by a thread of its own.

The event loop only appends to a bounded queue. Where nobody reads (a full pipe, a stopped terminal) lines are dropped
and counted; the loop never waits for them.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Final

from stickyproxy.observe.sink import Sink, WriterThread

if TYPE_CHECKING:
    from typing import TextIO

logger = logging.getLogger(__name__)

QUEUE_LINES: Final = 20_000
QUEUE_CHARACTERS: Final = 4 << 20  # a line may have 8 KiB: so many would be 160 MB
_GATHER_S: Final = 0.05
_FLUSH_S: Final = 1.0  # how long `close` waits for what is queued
_TOLD_S: Final = 10.0  # between two log lines that tell of dropped ones

_NONE: Final = -1  # no descriptor: nothing is queued then

_COLOURS: Final = (36, 33, 32, 35, 34, 31)  # cyan, yellow, green, magenta, blue, red (ECMA-48 section 8.3.117)
_ESCAPE: Final = "\x1b"
_RESET: Final = "\x1b[0m"
_NUMBER: Final = re.compile(r"-([0-9]{1,9})$")


class Output:
    """Writes lines of app processes to a stream as `g1-1 | text`, from the first `write` to `close`.

    The names are padded to `names_width` characters, or to the longest so far; on a terminal they are coloured, unless
    NO_COLOR is set (no-color.org). What the app prints is not looked into. Without a stream (standard output was
    closed) each line counts as dropped. A line of the log tells when lines were dropped, or cannot be written.
    """

    def __init__(self, stream: TextIO | None, names_width: int = 4) -> None:
        self._descriptor = _descriptor_of(stream)
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._has_colours = self._descriptor != _NONE and _takes_colours(self._descriptor)
        self._width = names_width
        self._queue: deque[tuple[str, str]] = deque()
        self._queued_characters = 0  # written by the event loop, as the next
        self._overflowed = 0
        self._taken_characters = 0  # written by the thread, as all that follow
        self._told = 0
        self._tell_at = 0.0
        self._sink = Sink("the output of app processes", descriptor=self._descriptor)
        self._thread = WriterThread("output of app processes", self._write_queued, _GATHER_S)

    @property
    def dropped(self) -> int:
        """Return how many lines were not written whole."""
        return self._overflowed + self._sink.lost

    def write(self, upstream_id: str, line: str) -> None:
        """Queue a line, which has no line end; never waits. Dropped, and counted, where the queue is full."""
        waiting = self._queued_characters - self._taken_characters
        is_full = len(self._queue) >= QUEUE_LINES or waiting >= QUEUE_CHARACTERS
        if is_full or self._thread.is_closing or self._descriptor == _NONE:
            self._overflowed += 1
            return
        self._queued_characters += len(line)
        self._queue.append((upstream_id, line))
        if not self._thread.has_started:
            self._thread.start()
        self._thread.wake()

    def close(self) -> None:
        """Write what is queued, for at most 1 s, and end; what is left then is dropped. The stream stays open."""
        if self._thread.is_closing:
            return
        self._sink.give_up_at = monotonic() + _FLUSH_S
        self._thread.close(_FLUSH_S)
        self._overflowed += len(self._queue)

    # All that follows is done by the thread

    def _write_queued(self) -> None:
        while self._queue and monotonic() < self._sink.give_up_at:
            self._sink.write(self._take_chunk())
        self._tell_dropped()

    def _take_chunk(self) -> list[bytes]:
        """Return some lines that are written at once, or a longer one."""
        lines: list[bytes] = []
        size_bytes = 0
        while self._queue and size_bytes < self._sink.chunk_bytes:
            upstream_id, line = self._queue[0]
            text = self._format(upstream_id, line).encode(self._encoding, "backslashreplace")
            if lines and size_bytes + len(text) > self._sink.chunk_bytes:
                break
            self._queue.popleft()
            self._taken_characters += len(line)
            lines.append(text)
            size_bytes += len(text)
        return lines

    def _format(self, upstream_id: str, line: str) -> str:
        self._width = max(self._width, len(upstream_id))
        name = f"{upstream_id:<{self._width}} |"
        if not self._has_colours:
            return f"{name} {line}\n"
        # A colour that the app has left on would go on in the next line, of another.
        end = _RESET if _ESCAPE in line else ""
        return f"{_ESCAPE}[{_colour_of(upstream_id)}m{name}{_RESET} {line}{end}\n"

    def _tell_dropped(self) -> None:
        """Log how many lines were dropped, once those that were not are written."""
        now = monotonic()
        if self.dropped > self._told and not self._sink.is_failing and now >= self._tell_at:
            logger.warning(
                "%d lines of app processes were dropped: nobody read them in time", self.dropped - self._told
            )
            self._told, self._tell_at = self.dropped, now + _TOLD_S


def _descriptor_of(stream: TextIO | None) -> int:
    try:
        return _NONE if stream is None else stream.fileno()
    except (OSError, ValueError):  # closed, or of no file
        return _NONE


def _takes_colours(descriptor: int) -> bool:
    return os.isatty(descriptor) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _colour_of(upstream_id: str) -> int:
    match = _NUMBER.search(upstream_id)
    return _COLOURS[(int(match[1]) - 1 if match else 0) % len(_COLOURS)]
