"""The access log: one line for each exchange and each tunnel, written by a thread of its own.

The event loop only appends to a bounded queue. Where the thread cannot keep up (a pipe that nobody reads, a full disk)
lines are dropped and counted; the loop never waits for a log.
"""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from dataclasses import replace
from datetime import UTC, datetime
from time import monotonic
from typing import TYPE_CHECKING, Final

from stickyproxy.observe.sink import Sink, WriterThread

if TYPE_CHECKING:
    from collections.abc import Callable

    from stickyproxy import config
    from stickyproxy.observe.record import Record

logger = logging.getLogger(__name__)

FIELD_BYTES: Final = 1024  # what is logged of one field; a target may have 16 KiB
QUEUE_RECORDS: Final = 10_000  # half a second at 20,000 exchanges/s; at most 50 MB, as fields are cut before
_BATCH: Final = 1000  # records
_GATHER_S: Final = 0.1
_FLUSH_S: Final = 2.0  # how long `close` waits for what is queued
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
        self._sink = Sink("the access log", None if settings.path == "-" else settings.path)
        self._queue: deque[tuple[datetime, Record]] = deque()
        self._thread = WriterThread("access log", self._write_queued, _GATHER_S)
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
        if len(queue) >= QUEUE_RECORDS or self._thread.is_closing:
            self._overflowed += 1
            return
        if len(record.target) + len(record.user_agent) + len(record.referer) + len(record.host) > FIELD_BYTES:
            record = _cut(record)
        queue.append((datetime.now(UTC), record))
        self._thread.wake()

    def close(self) -> None:
        """Write what is queued, for at most 2 s, and end; what is left then is dropped."""
        if self._thread.is_closing:
            return
        self._sink.give_up_at = monotonic() + _FLUSH_S
        self._thread.close(_FLUSH_S)
        self._overflowed += len(self._queue)
        if not self._thread.is_alive:  # else it is the sink's only user
            self._sink.close()

    def _write_queued(self) -> None:
        queue = self._queue
        while queue:
            batch = [queue.popleft() for _ in range(min(len(queue), _BATCH))]
            try:
                lines = (f"{self._format(at, record)}\n" for at, record in batch)
                self._sink.write([line.encode("ascii", "backslashreplace") for line in lines])
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
