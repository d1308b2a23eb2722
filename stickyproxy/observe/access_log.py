"""The access log: one line for each exchange and each tunnel, written by a thread of its own.

The event loop only appends to a bounded queue. Where the thread cannot keep up (a pipe that nobody reads, a full disk)
lines are dropped and counted; the loop never waits for a log.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import select
import stat
import threading
from collections import deque
from dataclasses import replace
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING, Final

from stickyproxy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stickyproxy import config
    from stickyproxy.observe.record import Record

logger = logging.getLogger(__name__)

FIELD_BYTES: Final = 1024  # what is logged of one field; a target may have 16 KiB
QUEUE_RECORDS: Final = 10_000  # half a second at 20,000 exchanges/s; at most 50 MB, as fields are cut before
_BATCH: Final = 1000  # records
# The thread gathers this long after the first record: were it woken for each, it would take turns with the loop.
_GATHER_S: Final = 0.1
_FLUSH_S: Final = 2.0  # how long `close` waits for what is queued
_MARGIN_S: Final = 0.5
_LOOK_S: Final = 0.2  # between two looks, while nobody reads, at whether the log is being closed
_STUCK_S: Final = 1.0  # a reader that takes nothing for so long is said to be none
_NO_READER: Final = "nobody reads it"
_REOPEN_S: Final = 1.0  # between two looks at whether the file was moved away
_STDOUT: Final = 1
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_quote: Final = json.JSONEncoder(ensure_ascii=True).encode
_UNSAFE: Final = re.compile(r"[^\x20\x21\x23-\x5b\x5d-\x7e]")


def format_json(at: datetime, record: Record) -> str:
    r"""Return the record as one JSON object on one line; `at` is in UTC.

    Each byte of the wire is one character of the text, so that any bytes can be told apart; all but printable ASCII
    is escaped (\u00e9).
    """
    # Put together by hand, which takes a third of the time: the thread competes with the event loop.
    tunnel = (
        f',"close_code":{record.close_code},"initiator":{_quote(record.initiator)},"cause":{_quote(record.cause)}'
        if record.kind == "tunnel"
        else ""
    )
    return (
        f'{{"time":"{at.isoformat(timespec="milliseconds")[:-6]}Z","kind":{_quote(record.kind)},'
        f'"request_id":{_quote(record.request_id)},"client":{_quote(record.client[:FIELD_BYTES])},'
        f'"method":{_quote(_text(record.method))},"target":{_quote(_text(record.target))},'
        f'"host":{_quote(_text(record.host))},"status":{record.status},"upstream":{_quote(record.upstream)},'
        f'"affinity":{_quote(record.affinity)},"attempts":{record.attempts},"duration_s":{record.duration_s:.6f},'
        f'"received_bytes":{record.received_bytes},"sent_bytes":{record.sent_bytes},'
        f'"referer":{_quote(_text(record.referer))},"user_agent":{_quote(_text(record.user_agent))},'
        f'"error":{_quote(record.error[:FIELD_BYTES])}{tunnel}}}'
    )


def format_combined(at: datetime, record: Record) -> str:
    r"""Return the record in the combined format of Apache and nginx, escaped as nginx does (\x22); `at` is in UTC."""
    # The record does not hold the version of a request; nearly all are HTTP/1.1.
    request = f"{_escape(record.method)} {_escape(record.target)} HTTP/1.1" if record.method else "-"
    time = f"{at.day:02d}/{_MONTHS[at.month - 1]}/{at.year}:{at.isoformat()[11:19]} +0000"
    return (
        f"{_escape(record.client.encode()) or '-'} - - [{time}] "
        f'"{request}" {record.status} {record.sent_bytes} '
        f'"{_escape(record.referer) or "-"}" "{_escape(record.user_agent) or "-"}"'
    )


def _text(value: bytes) -> str:
    return value[:FIELD_BYTES].decode("latin-1")


def _escape(value: bytes) -> str:
    return _UNSAFE.sub(lambda match: f"\\x{ord(match[0]):02X}", _text(value))


class AccessLog:
    """Writes records from `start` to `close`; `write` may be called by the event loop at any time."""

    def __init__(self, settings: config.AccessLog) -> None:
        self._format: Callable[[datetime, Record], str] = format_json if settings.format == "json" else format_combined
        self._sink = Sink(None if settings.path == "-" else settings.path)
        self._queue: deque[tuple[datetime, Record]] = deque()
        self._has_records = threading.Event()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
        self._overflowed = 0  # written by the event loop
        self._failed = 0  # written by the thread

    @property
    def dropped(self) -> int:
        """Return how many records were not written whole."""
        return self._overflowed + self._failed + self._sink.lost

    def start(self) -> None:
        """Open the file and begin to write; raise UsageError where it cannot be opened."""
        self._sink.open()
        self._thread.start()

    def write(self, record: Record) -> None:
        """Queue a record with the present time; never waits. Dropped, and counted, where the queue is full."""
        queue = self._queue
        if len(queue) >= QUEUE_RECORDS or self._is_closing.is_set():
            self._overflowed += 1
            return
        if len(record.target) + len(record.user_agent) + len(record.referer) + len(record.host) > FIELD_BYTES:
            record = _cut(record)
        queue.append((datetime.now(UTC), record))
        if not self._has_records.is_set():
            self._has_records.set()

    def close(self) -> None:
        """Write what is queued, for at most 2 s, and end; what is left then is dropped."""
        if self._is_closing.is_set():
            return
        self._sink.give_up_at = monotonic() + _FLUSH_S
        self._is_closing.set()
        self._has_records.set()
        if self._thread.is_alive():
            # A little longer than the thread needs by itself; a write that hangs all the same is left behind.
            self._thread.join(_FLUSH_S + _MARGIN_S)
        self._overflowed += len(self._queue)

    def _run(self) -> None:
        while not self._is_closing.is_set():
            self._has_records.wait()
            self._is_closing.wait(_GATHER_S)
            self._has_records.clear()
            self._write_queued()
        self._write_queued()
        self._sink.close()

    def _write_queued(self) -> None:
        queue = self._queue
        while queue:
            batch = [queue.popleft() for _ in range(min(len(queue), _BATCH))]
            try:
                self._sink.write([self._format(at, record) for at, record in batch])
            except Exception:  # the thread must live on
                self._failed += len(batch)
                logger.exception("a line of the access log cannot be made; %d are dropped", len(batch))


def _cut(record: Record) -> Record:
    """Return the record with its fields cut, so that the queue does not hold what is not logged."""
    return replace(
        record,
        method=record.method[:FIELD_BYTES],
        target=record.target[:FIELD_BYTES],
        host=record.host[:FIELD_BYTES],
        referer=record.referer[:FIELD_BYTES],
        user_agent=record.user_agent[:FIELD_BYTES],
    )


class Sink:
    """Where the lines go: a file that may be rotated, or standard output (`path` None). Used by one thread.

    `lost` counts the lines that were not written whole. While nobody reads, `write` waits until `give_up_at`
    (monotonic seconds), which another thread may set. A failure is logged when it begins and when it ends.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._descriptor = _STDOUT
        self._chunk_bytes = select.PIPE_BUF
        self._is_open = path is None
        self._look_at = 0.0
        self._is_mid_line = False
        self._is_failing = False
        self.give_up_at = float("inf")
        self.lost = 0

    def open(self) -> None:
        """Open the file; raise UsageError where that cannot be. A FIFO may have no reader yet."""
        try:
            self._open()
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise UsageError(f"cannot open the access log {self._path}: {_explain(error)}") from error

    def write(self, lines: list[str]) -> None:
        """Write lines; those that cannot be written are counted as lost."""
        text = "\n".join((*lines, "")).encode("ascii", "backslashreplace")
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
        """Close the file; standard output stays open."""
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
            self._chunk_bytes = 1 << 20

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
            return os.write(self._descriptor, rest[: self._chunk_bytes])
        except BlockingIOError:
            return 0

    def _note_failure(self, reason: str | None) -> None:
        if reason is not None and not self._is_failing:
            logger.error("cannot write the access log: %s", reason)
        elif reason is None and self._is_failing:
            logger.info("the access log is written again")
        self._is_failing = reason is not None


def _explain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
