"""A reader of HTTP/1.1 messages that takes only what the proxy may write: one form for each thing, nothing lenient.

It shares no code with the proxy. Whatever it refuses could be read in two ways by two programs, which is all that a
smuggled request needs (RFC 9112, section 11.2).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import h11

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") (/[!-~]*|\*) HTTP/1\.1")
_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-9][0-9]{2}) [\t -~\x80-\xff]*")
_FIELD = re.compile(rb"(" + _TOKEN + rb"): ((?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?)")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_CHUNK_SIZE = re.compile(rb"[1-9a-f][0-9a-f]{0,15}")

# What concerns one connection only and must not get through; Connection and Upgrade are looked at by themselves.
_HOP_BY_HOP = {"keep-alive", "te", "http2-settings", "proxy", "proxy-connection"}
# What an application with a CGI-like environment cannot tell from a field that the proxy vouches for.
_ALIASES = {"content_length", "transfer_encoding", "x_forwarded_for", "x_forwarded_proto", "x_forwarded_host",
            "x_forwarded_port", "x_real_ip", "x_request_id"}  # fmt: skip
_ADDED = ("via", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-request-id")
_NEVER_IN_TRAILERS = {"content-length", "transfer-encoding", "host", "connection", "cookie", "authorization", "expect",
                      "set-cookie", "cache-control", "te", "upgrade", "trailer"} | set(_ADDED)  # fmt: skip


class StrictError(AssertionError):
    """What was read is not what the proxy may write; the text says how."""


@dataclass
class Message:
    """One message as it was read. `raw` are all its bytes; `length` those of its body, None for chunks."""

    start: str
    fields: list[tuple[str, str]]
    body: bytes = b""
    length: int | None = 0
    trailers: list[tuple[str, str]] = field(default_factory=list)
    raw: bytes = b""
    ends_with_connection: bool = False

    @property
    def method(self) -> str:
        """Return the method of a request."""
        return self.start.split(" ")[0]

    @property
    def target(self) -> str:
        """Return the target of a request."""
        return self.start.split(" ")[1]

    @property
    def status(self) -> int:
        """Return the status of a response."""
        return int(self.start.split(" ")[1])

    def all(self, name: str) -> list[str]:
        """Return the values of all fields of a name."""
        return [value for key, value in self.fields if key.lower() == name.lower()]


def _refuse(what: str, data: bytes) -> StrictError:
    return StrictError(f"{what}: {data[:200]!r}")


def _read_fields(lines: list[bytes]) -> list[tuple[str, str]]:
    fields = []
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise _refuse("not a canonical field line", line)
        fields.append((match[1].decode("latin-1"), match[2].decode("latin-1")))
    return fields


def _read_head(data: bytes) -> tuple[Message, int] | None:
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    lines = data[:end].split(b"\r\n")
    return Message(lines[0].decode("latin-1"), _read_fields(lines[1:])), end + 4


def _read_length(message: Message) -> int | None:
    """Return the body's length by the framing fields, None for chunks; there is never more than one such field."""
    lengths, codings = message.all("content-length"), message.all("transfer-encoding")
    if len(lengths) + len(codings) > 1:
        raise StrictError(f"several framing fields: {message.fields}")
    if codings:
        if codings != ["chunked"]:
            raise StrictError(f"not exactly chunked: {codings}")
        return None
    if not lengths:
        return 0
    if _LENGTH.fullmatch(lengths[0].encode("latin-1")) is None:
        raise StrictError(f"not a plain length: {lengths}")
    return int(lengths[0])


def _read_body(message: Message, data: bytes, at: int) -> int | None:
    """Read the body at `at` into the message and return where it ends; None when it has not come whole."""
    if message.length is not None:
        if len(data) - at < message.length:
            message.body = data[at:]
            return None
        message.body = data[at : at + message.length]
        return at + message.length
    return _read_chunks(message, data, at)


def _read_chunks(message: Message, data: bytes, at: int) -> int | None:
    message.body = b""
    while True:
        stop = data.find(b"\r\n", at)
        if stop < 0:
            if len(data) - at > 16:  # the digits of the longest size
                raise _refuse("not a chunk size", data[at:])
            return None
        line = data[at:stop]
        if line == b"0":
            return _read_trailers(message, data, stop + 2)
        if _CHUNK_SIZE.fullmatch(line) is None:
            raise _refuse("not a plain chunk size", line)
        at, size = stop + 2, int(line, 16)
        message.body += data[at : at + size]
        at += size
        if data[at : at + 2] != b"\r\n"[: max(0, len(data) - at)]:
            raise _refuse("a chunk does not end with its size", data[at:])
        if len(data) - at < 2:  # CR LF
            return None
        at += 2


def _read_trailers(message: Message, data: bytes, at: int) -> int | None:
    if data.startswith(b"\r\n", at):
        return at + 2
    end = data.find(b"\r\n\r\n", at)
    if end < 0:
        return None
    message.trailers = _read_fields(data[at:end].split(b"\r\n"))
    for name, _ in message.trailers:
        if name.lower() in _NEVER_IN_TRAILERS:
            raise StrictError(f"a field that no trailer may be: {name}")
    return end + 4


def read_request(data: bytes) -> tuple[Message, bool] | None:
    """Read the request that `data` begins with; return it and whether it is whole, or None without a whole head."""
    read = _read_head(data)
    if read is None:
        return None
    message, at = read
    if _REQUEST_LINE.fullmatch(message.start.encode("latin-1")) is None:
        raise StrictError(f"not a request line: {message.start!r}")
    _check_request_fields(message)
    message.length = _read_length(message)
    end = _read_body(message, data, at)
    if end is None:
        return message, False
    message.raw = data[:end]
    _compare_with_h11(message)
    return message, True


def _check_request_fields(message: Message) -> None:
    names = [name.lower() for name, _ in message.fields]
    for name in ("host", *_ADDED):
        if names.count(name) != 1:
            raise StrictError(f"{names.count(name)} fields {name} in {message.fields}")
    for name in names:
        if name in _HOP_BY_HOP or name in _ALIASES:
            raise StrictError(f"{name} got through")
    if (message.all("connection"), message.all("upgrade")) not in (([], []), (["Upgrade"], ["websocket"])):
        raise StrictError(f"Connection or Upgrade got through: {message.fields}")


def _compare_with_h11(message: Message) -> None:
    """Have another implementation read the same bytes: it must see the same request, and no second one."""
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    reader.receive_data(message.raw)
    body = b""
    while True:
        event = reader.next_event()
        if isinstance(event, h11.Request):
            assert event.method == message.method.encode()
            assert event.target == message.target.encode()
            assert [(name, value) for name, value in event.headers] == [
                (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in message.fields
            ]
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert len(list(event.headers)) == len(message.trailers)
            break
        else:
            raise StrictError(f"h11 sees {event!r} in {message.raw[:200]!r}")
    assert body == message.body
    assert reader.trailing_data[0] == b"", "h11 sees something after the request"


def read_responses(
    data: bytes, *, is_over: bool, to_head: tuple[int, ...] = ()
) -> tuple[list[Message], list[Message], bytes]:
    """Read the responses in `data`: interim ones, final ones, and what is left of one that is not whole.

    `is_over` says that nothing more comes; `to_head` which of the final ones answer a HEAD. Nothing follows a 101: it
    counts as final here, and the bytes after it are left.
    """
    interim: list[Message] = []
    final: list[Message] = []
    while data:
        read = _read_head(data)
        if read is None:
            break
        message, at = read
        if _STATUS_LINE.fullmatch(message.start.encode("latin-1")) is None:
            raise StrictError(f"not a status line: {message.start!r}")
        end = _read_response_body(message, data, at, is_over=is_over, to_head=len(final) in to_head)
        if end is None:
            break
        message.raw = data[:end]
        data = data[end:]
        if 100 <= message.status < 200 and message.status != 101:  # RFC 9110, section 15.2
            interim.append(message)
            continue
        final.append(message)
        if message.status == 101:
            break
        if message.all("connection") == ["close"] and data:
            raise _refuse("something follows a response that closes", data)
    return interim, final, data


def read_partial_response(data: bytes) -> Message:
    """Read what came of a response that broke off in its body."""
    read = _read_head(data)
    if read is None:
        raise _refuse("no whole head", data)
    message, at = read
    end = _read_response_body(message, data, at, is_over=False, to_head=False)
    if end is not None:
        raise _refuse("a whole response", data)
    return message


def _read_response_body(message: Message, data: bytes, at: int, *, is_over: bool, to_head: bool) -> int | None:
    for name, value in message.fields:
        if name.lower() in {"keep-alive", "proxy-connection", "te"}:
            raise StrictError(f"{name} got through")
        if name.lower() == "connection" and value not in {"close", "keep-alive", "Upgrade"}:
            raise StrictError(f"Connection: {value} got through")
    length = _read_length(message)
    if message.status < 200 or message.status == 204:  # RFC 9112, section 6.3
        if length != 0 or message.all("content-length"):
            raise StrictError(f"framing where no body may be: {message.fields}")
        return at
    if to_head or message.status == 304:
        return at
    if length == 0 and not message.all("content-length"):
        if message.all("connection") != ["close"]:
            raise StrictError(f"a body without end: {message.fields}")
        message.body = data[at:]
        message.ends_with_connection = True
        return len(data) if is_over else None
    message.length = length
    return _read_body(message, data, at)
