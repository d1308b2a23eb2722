"""Heads: start line and header section, parsed strictly into facts (RFC 9112, sections 2 to 6).

What comes out has lost everything that concerns one connection only: framing, Connection and what it names, Upgrade.
The proxy writes those anew, so no head is ever passed on as it came.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from stickyproxy.errors import RequestError, ResponseError
from stickyproxy.wire.headers import (
    CACHE_CONTROL,
    CONNECTION,
    CONTENT_LENGTH,
    COOKIE,
    EXPECT,
    FORWARDED,
    HOP,
    HOST,
    ORDINARY,
    TOKEN,
    TRANSFER_ENCODING,
    UPGRADE,
    VIA,
    FieldError,
    classify,
    kind_by_spelling,
    parse_content_length,
    parse_list,
    split_fields,
)

CHUNKED: Final = -1
"""Body length of a message that is sent in chunks."""
UNTIL_CLOSE: Final = -2
"""Body length of a response that ends with its connection."""

_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/1\.([01])\r\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (([1-9])[0-9]{2}(?: [\t -~\x80-\xff]*)?)\r\n")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#@]+)([/?].*)?")
# uri-host [ ":" port ] of RFC 9110, section 7.2, with the underscore that container names use.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.%A-Za-z0-9_~\-]+\]|[A-Za-z0-9._~!$&'()*+;=%\-]*)(?::[0-9]{0,5})?")
_NEVER_DROPPED: Final = frozenset({b"host", b"cookie", b"content-length", b"transfer-encoding"})


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """Bounds of a head, in bytes and fields; exceeding one is 431, or 414 for the request target."""

    head_bytes: int = 128 * 1024  # chunked auth cookies alone can pass 64 KiB
    line_bytes: int = 64 * 1024  # Bokeh sends 12 KB in Sec-WebSocket-Protocol; Apache's 8 KB break it
    fields: int = 200  # twice Apache's LimitRequestFields
    target_bytes: int = 16 * 1024  # nginx: 4 buffers of 8 KiB; gunicorn 4 KiB is too small for OAuth


class RequestHead:
    """The facts of one request head.

    `lines` are the end-to-end fields, canonical, without CRLF; `cookies` the positions of Cookie fields in it;
    `length` the body's bytes, or CHUNKED; `forwarded` what the client says of those before it, by lower-case name.
    """

    __slots__ = (
        "cookies",
        "expects_continue",
        "forwarded",
        "host",
        "is_http_10",
        "is_upgrade",
        "keep_alive",
        "length",
        "lines",
        "method",
        "target",
        "via",
    )

    def __init__(self, method: bytes, target: bytes, *, is_http_10: bool) -> None:
        self.method = method
        self.target = target
        self.is_http_10 = is_http_10
        self.keep_alive = not is_http_10
        self.host = b""
        self.lines: list[bytes] = []
        self.cookies: list[int] | None = None
        self.length = 0
        self.is_upgrade = False
        self.expects_continue = False
        self.forwarded: dict[bytes, bytes] | None = None
        self.via: bytes | None = None

    @override
    def __repr__(self) -> str:
        return f"<RequestHead {self.method!r} {self.target!r} length={self.length}>"


class ResponseHead:
    """The facts of one response head; `status_text` is the status code with its reason phrase."""

    __slots__ = ("cache_control", "has_length", "is_upgrade", "keep_alive", "length", "lines", "status", "status_text")

    def __init__(self, status: int, status_text: bytes, *, keep_alive: bool) -> None:
        self.status = status
        self.status_text = status_text
        self.keep_alive = keep_alive
        self.lines: list[bytes] = []
        self.length = UNTIL_CLOSE
        self.has_length = False
        self.is_upgrade = False
        self.cache_control: bytes | None = None

    @override
    def __repr__(self) -> str:
        return f"<ResponseHead {self.status} length={self.length}>"


class _Special:
    """The fields of a head that are not passed on as they are, gathered while the others are."""

    __slots__ = ("connection", "length", "transfer_encoding", "upgrade")

    def __init__(self) -> None:
        self.connection: list[bytes] | None = None
        self.length: int | None = None
        self.transfer_encoding: bytes | None = None
        self.upgrade: bytes | None = None

    def take(self, kind: int, value: bytes) -> None:
        if kind == CONNECTION:
            self.connection = (self.connection or []) + parse_list(value)
        elif kind == CONTENT_LENGTH:
            if self.length is not None:
                raise FieldError("several Content-Length fields")  # RFC 9112, section 6.3
            self.length = parse_content_length(value)
        elif kind == TRANSFER_ENCODING:
            if self.transfer_encoding is not None:
                raise FieldError("several Transfer-Encoding fields")
            self.transfer_encoding = value.lower()
        elif kind == UPGRADE:
            self.upgrade = value.lower() if self.upgrade is None else b","

    @property
    def is_websocket(self) -> bool:
        return self.upgrade == b"websocket" and self.connection is not None and b"upgrade" in self.connection


_PLAIN = _Special()  # never written to


def find_head_end(data: bytes | bytearray, start: int = 0) -> int:
    """Return the position after the empty line that ends a head, or -1 when it has not arrived."""
    end = data.find(b"\r\n\r\n", start)
    return end + 4 if end >= 0 else -1


def parse_request_head(data: bytes, end: int, limits: HeadLimits) -> RequestHead:
    """Parse the request head that `data[:end]` holds whole; raise RequestError (400, 405, 414, 431, 501, 505)."""
    line = _REQUEST_LINE.match(data, 0, end)
    if line is None:
        raise _request_line_error(data, limits)
    method, target, minor = line.groups()
    if len(target) > limits.target_bytes:
        raise RequestError("the request target is too long", status=414)
    if end > limits.head_bytes:
        raise RequestError("the request head is too large", status=431)
    head = RequestHead(method, target, is_http_10=minor == b"0")
    try:
        fields = split_fields(data, line.end(), end - 2)
        if len(fields) > limits.fields:
            raise RequestError("too many header fields", status=431)
        if end > limits.line_bytes and max(len(line) for line, _ in fields) > limits.line_bytes:
            raise RequestError("a header line is too long", status=431)
        special = _read_request_fields(head, fields)
    except FieldError as error:
        raise RequestError(str(error)) from error
    if target[0] != 0x2F:  # "/"
        _read_target(head)
    if special is not _PLAIN:
        _read_request_connection(head, special)
    return head


def _read_request_fields(head: RequestHead, fields: list[tuple[bytes, bytes]]) -> _Special:
    lines = head.lines
    special = _PLAIN
    known = kind_by_spelling.get
    hosts = 0
    for line, name in fields:
        kind = known(name)
        if kind is None:
            kind = classify(name)
        if kind == ORDINARY:
            lines.append(line)
        elif kind == HOST:
            hosts += 1
            head.host = line[6:]
            lines.append(line)
        elif kind == CONNECTION and line[12:] == b"keep-alive" and not head.is_http_10:
            pass  # what every browser says, and the default
        elif kind == COOKIE:
            if head.cookies is None:
                head.cookies = []
            head.cookies.append(len(lines))
            lines.append(line)
        elif kind == FORWARDED:
            _gather(head, name.lower(), line[len(name) + 2 :])
        elif kind == VIA:
            value = line[len(name) + 2 :]
            head.via = value if head.via is None else head.via + b", " + value
        elif kind < HOST:
            if kind == EXPECT:
                head.expects_continue = line[len(name) + 2 :].lower() == b"100-continue"
            lines.append(line)
        elif kind != HOP:
            if special is _PLAIN:
                special = _Special()
            special.take(kind, line[len(name) + 2 :])
    if hosts != 1 and (hosts or not head.is_http_10):  # RFC 9112, section 3.2
        raise FieldError("several Host fields" if hosts else "no Host field")
    if _HOST.fullmatch(head.host) is None:
        raise FieldError("an invalid Host")
    return special


def _gather(head: RequestHead, name: bytes, value: bytes) -> None:
    if head.forwarded is None:
        head.forwarded = {}
    before = head.forwarded.get(name)
    head.forwarded[name] = value if before is None else before + b", " + value


def _read_target(head: RequestHead) -> None:
    """Turn an absolute-form target into origin-form (RFC 9112, section 3.2.2); refuse what names no resource."""
    if head.method == b"CONNECT":
        raise RequestError("CONNECT is not for a reverse proxy", status=405, proxy_status="http_request_denied")
    if head.target == b"*" and head.method == b"OPTIONS":
        return
    match = _ABSOLUTE.fullmatch(head.target)
    if match is None or _HOST.fullmatch(match[1]) is None:
        raise RequestError("a request target that is no path")
    path = match[2] or b"/"
    head.target = path if path[:1] == b"/" else b"/" + path
    head.host = match[1]
    # The authority of the target replaces Host, whatever that said.
    lines, head.lines, cookies = head.lines, [b"Host: " + head.host], head.cookies
    head.cookies = None
    for at, line in enumerate(lines):
        if line[:5].lower() == b"host:":
            continue
        if cookies is not None and at in cookies:
            head.cookies = [*(head.cookies or []), len(head.lines)]
        head.lines.append(line)


def _read_request_connection(head: RequestHead, special: _Special) -> None:
    if special.connection is not None:
        if b"close" in special.connection:
            head.keep_alive = False
        elif head.is_http_10 and b"keep-alive" in special.connection:
            head.keep_alive = True
        _drop_named(head, special.connection)
    if special.transfer_encoding is not None:
        if special.length is not None:
            raise RequestError("both Content-Length and Transfer-Encoding")  # RFC 9112, section 6.1
        if head.is_http_10:
            raise RequestError("Transfer-Encoding in an HTTP/1.0 request")
        if special.transfer_encoding != b"chunked":
            if parse_list(special.transfer_encoding)[-1:] != [b"chunked"]:
                raise RequestError("a Transfer-Encoding that does not end in chunked")
            raise RequestError("a transfer coding other than chunked", status=501)
        head.length = CHUNKED
    elif special.length is not None:
        head.length = special.length
    # Anything but a WebSocket handshake loses its Upgrade (RFC 6455, section 4.1; h2c is never passed on).
    head.is_upgrade = (
        special.is_websocket and head.method == b"GET" and special.length in {None, 0} and head.length == 0
    ) and not head.is_http_10


def _drop_named(head: RequestHead, named: list[bytes]) -> None:
    """Drop the fields that Connection names (RFC 9110, section 7.6.1), but none that the proxy relies on."""
    drop = {name for name in named if name not in _NEVER_DROPPED and name not in _CONNECTION_OPTIONS}
    if not drop:
        return
    cookies = {head.lines[at] for at in head.cookies or ()}
    head.lines = [line for line in head.lines if line.partition(b":")[0].lower() not in drop]
    if head.cookies is not None:
        head.cookies = [at for at, line in enumerate(head.lines) if line in cookies]
    for name in drop:
        if head.forwarded is not None:
            head.forwarded.pop(name, None)
    if b"expect" in drop:
        head.expects_continue = False


_CONNECTION_OPTIONS: Final = frozenset({b"close", b"keep-alive", b"upgrade"})


def _request_line_error(data: bytes, limits: HeadLimits) -> RequestError:
    first = data[: data.find(b"\r\n")]
    parts = first.split(b" ")
    if len(first) > limits.target_bytes + 64:
        return RequestError("the request line is too long", status=414)
    if len(parts) == 3 and re.fullmatch(rb"HTTP/[0-9]\.[0-9]", parts[2]):  # noqa: PLR2004 -- method, target, version
        if parts[2] not in {b"HTTP/1.0", b"HTTP/1.1"}:
            return RequestError("an HTTP version other than 1.0 and 1.1", status=505)
        return RequestError("an invalid method or request target")
    return RequestError("an invalid request line")


def parse_response_head(data: bytes, end: int, limits: HeadLimits, request_method: bytes) -> ResponseHead:
    """Parse the response head that `data[:end]` holds whole; raise ResponseError (502).

    `request_method` decides whether a body follows (RFC 9112, section 6.3).
    """
    line = _STATUS_LINE.match(data, 0, end)
    if line is None:
        raise ResponseError("the upstream sent an invalid status line")
    status_text = line[2]
    head = ResponseHead(int(status_text[:3]), status_text, keep_alive=line[1] == b"1")
    if end > limits.head_bytes:
        raise ResponseError("the response head is too large", proxy_status="http_response_header_section_size")
    try:
        fields = split_fields(data, line.end(), end - 2)
        if len(fields) > limits.fields:
            raise ResponseError("too many header fields", proxy_status="http_response_header_section_size")
        special = _read_response_fields(head, fields)
    except FieldError as error:
        raise ResponseError(f"the upstream sent {error}") from error
    if special is not _PLAIN:
        _read_response_connection(head, special)
    status = head.status
    if request_method == b"HEAD" or status == 304 or status == 204 or status < 200:  # noqa: PLR1714, PLR2004 -- hot
        head.length = 0
    return head


def _read_response_fields(head: ResponseHead, fields: list[tuple[bytes, bytes]]) -> _Special:
    lines = head.lines
    special = _PLAIN
    known = kind_by_spelling.get
    for line, name in fields:
        kind = known(name)
        if kind is None:
            kind = classify(name)
        if kind == ORDINARY:
            lines.append(line)
        elif kind < CONNECTION:
            if kind == CACHE_CONTROL:
                head.cache_control = (head.cache_control or b"") + line[len(name) + 1 :].lower() + b","
            lines.append(line)
        elif kind == CONTENT_LENGTH and not head.has_length:
            head.length = parse_content_length(line[len(name) + 2 :])
            head.has_length = True
            lines.append(line)
        elif kind == CONTENT_LENGTH:
            raise FieldError("several Content-Length fields")
        elif kind != HOP:
            if special is _PLAIN:
                special = _Special()
            special.take(kind, line[len(name) + 2 :])
    return special


def _read_response_connection(head: ResponseHead, special: _Special) -> None:
    if special.connection is not None:
        if b"close" in special.connection:
            head.keep_alive = False
        elif b"keep-alive" in special.connection:
            head.keep_alive = True
        drop = {name for name in special.connection if name not in _NEVER_DROPPED} - _CONNECTION_OPTIONS
        if drop:
            head.lines = [line for line in head.lines if line.partition(b":")[0].lower() not in drop]
    if special.transfer_encoding is not None:
        if head.has_length:
            raise ResponseError("the upstream sent both Content-Length and Transfer-Encoding")
        if special.transfer_encoding != b"chunked":
            raise ResponseError("the upstream sent a transfer coding other than chunked")
        head.length = CHUNKED
    head.is_upgrade = special.is_websocket
