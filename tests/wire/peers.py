"""How two other implementations, h11 and httptools, read a message: to compare with what the proxy reads."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import h11
import httptools

NEXT_REQUEST = b"GET /next HTTP/1.1\r\nHost: next\r\n\r\n"
NEXT_RESPONSE = b"HTTP/1.1 299 Next\r\nContent-Length: 0\r\n\r\n"
_SIZE = 1 << 20


class Reading(NamedTuple):
    """What was read of a message: its start, its fields by lower-case name, its payload, and whether it was whole.

    `has_next` says that the next message was read right behind it.
    """

    start: tuple[bytes, ...]
    fields: list[tuple[bytes, bytes]]
    payload: bytes
    is_whole: bool
    has_next: bool


def read_request_by_h11(data: bytes) -> Reading | None:
    """Return how h11 reads a request, None where it refuses it."""
    return _read_by_h11(h11.Connection(h11.SERVER, max_incomplete_event_size=_SIZE), data, NEXT_REQUEST)


def read_response_by_h11(data: bytes, method: bytes, *, ends: bool = False) -> Reading | None:
    """Return how h11 reads the response to a request by `method`; `ends` closes the connection behind it."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_SIZE)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    return _read_by_h11(connection, data, NEXT_RESPONSE, ends=ends)


def _read_by_h11(connection: h11.Connection, data: bytes, following: bytes, *, ends: bool = False) -> Reading | None:
    start: tuple[bytes, ...] = ()
    fields: list[tuple[bytes, bytes]] = []
    payload = b""
    is_whole = False
    try:
        connection.receive_data(data)
        if ends:
            connection.receive_data(b"")
        while not is_whole:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                start = (event.method, event.target)
                fields = list(event.headers)
            elif isinstance(event, h11.InformationalResponse | h11.Response):
                start = (b"%d" % event.status_code,)
                fields = list(event.headers)
                is_whole = isinstance(event, h11.InformationalResponse)
            elif isinstance(event, h11.Data):
                payload += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                is_whole = True
            else:
                break
    except h11.RemoteProtocolError:
        return None
    return Reading(start, fields, payload, is_whole, connection.trailing_data[0] == following)


class _Listener:
    """What httptools calls while it parses."""

    def __init__(self) -> None:
        self.parser: Any = None
        self.readings: list[dict[str, Any]] = []

    def on_message_begin(self) -> None:
        self.readings.append({"start": b"", "fields": [], "payload": b"", "is_whole": False})

    def on_url(self, url: bytes) -> None:
        self.readings[-1]["start"] += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.readings[-1]["fields"].append((name.lower(), value))

    def on_headers_complete(self) -> None:
        is_request = isinstance(self.parser, httptools.HttpRequestParser)
        self.readings[-1]["about"] = self.parser.get_method() if is_request else self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.readings[-1]["payload"] += body

    def on_message_complete(self) -> None:
        self.readings[-1]["is_whole"] = True


def read_request_by_httptools(data: bytes) -> Reading | None:
    """Return how httptools reads a request, None where it refuses it or takes what follows for another protocol."""
    listener = _Listener()
    listener.parser = httptools.HttpRequestParser(listener)
    return _read_by_httptools(listener, data)


def read_response_by_httptools(data: bytes) -> Reading | None:
    """Return how httptools reads a response to anything but HEAD, None where it refuses it."""
    listener = _Listener()
    listener.parser = httptools.HttpResponseParser(listener)
    return _read_by_httptools(listener, data)


def _read_by_httptools(listener: _Listener, data: bytes) -> Reading | None:
    upgraded_at = None
    try:
        listener.parser.feed_data(data)
    except httptools.HttpParserUpgrade as upgrade:
        upgraded_at = cast("int", upgrade.args[0])
    except httptools.HttpParserError:
        return None
    readings = listener.readings
    if not readings or "about" not in readings[0]:
        return None
    first = readings[0]
    about = first["about"]
    start = (about, first["start"]) if isinstance(about, bytes) else (b"%d" % about,)
    if upgraded_at is None:
        has_next = len(readings) == 2 and readings[1]["is_whole"]  # this message and the next
    elif data[upgraded_at:] in {NEXT_REQUEST, NEXT_RESPONSE}:
        has_next = True
    else:
        return None  # what follows, be it a body, is not read as HTTP any more
    # Trailers are reported like fields; they come after the head, and the tests send none.
    return Reading(start, first["fields"], first["payload"], first["is_whole"], has_next)
