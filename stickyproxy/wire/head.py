"""Heads: start line and header section, parsed strictly into facts (RFC 9112, sections 2 to 6).

What comes out has lost everything that concerns one connection only: framing, Connection and what it names, Upgrade.
The proxy writes those anew, so no head is ever passed on as it came.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.errors import RequestError, ResponseError
from stickyproxy.wire.headers import (
    CONNECTION,
    CONTENT_LENGTH,
    COOKIE,
    EXPECT,
    FORWARDED,
    HOST,
    REQUEST_SPECIALS,
    RESPONSE_CACHE_CONTROL,
    RESPONSE_CONNECTION,
    RESPONSE_CONTENT_LENGTH,
    RESPONSE_SPECIALS,
    RESPONSE_TRANSFER_ENCODING,
    TOKEN,
    TRANSFER_ENCODING,
    UPGRADE,
    VIA,
    FieldError,
    canonicalise,
    drop_fields,
    parse_content_length,
    parse_list,
)

if TYPE_CHECKING:
    from stickyproxy.wire.cookies import CookieReader
    from stickyproxy.wire.headers import Section

CHUNKED: Final = -1
"""Body length of a message that is sent in chunks."""
UNTIL_CLOSE: Final = -2
"""Body length of a response that ends with its connection."""

_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/1\.([01])\r\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (([1-9])[0-9]{2}(?: [\t -~\x80-\xff]*)?)\r\n")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#@:][^/?#@]*)([/?].*)?")
# uri-host [ ":" port ] of RFC 9110, section 7.2, with the underscore that container names use.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.%A-Za-z0-9_~\-]+\]|[A-Za-z0-9._~!$&'()*+;=%\-]*)(?::[0-9]{0,5})?")
# The options that are no names of fields, and the fields without which a message would mean something else.
_NEVER_DROPPED: Final = frozenset(
    {b"close", b"keep-alive", b"upgrade", b"host", b"cookie", b"content-length", b"transfer-encoding"}
)


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """Bounds of a head, in bytes and fields; exceeding one is 431, or 414 for the request target."""

    head_bytes: int = 128 * 1024  # chunked auth cookies alone can pass 64 KiB
    line_bytes: int = 64 * 1024  # Bokeh sends 12 KB in Sec-WebSocket-Protocol; Apache's 8 KB break it
    fields: int = 200  # twice Apache's LimitRequestFields
    target_bytes: int = 16 * 1024  # nginx: 4 buffers of 8 KiB; gunicorn 4 KiB is too small for OAuth


class RequestHead:
    """The facts of one request head.

    `section` are the end-to-end fields; `cookies` the positions of its parts that are Cookie fields; `length` the
    body's bytes, or CHUNKED; `forwarded` what the client says of those before it, by lower-case name. `token` is the
    value of the affinity cookie, which is no longer in the section once a `RequestHeadReader` has read it; `outgoing`
    is a place for what the upstream gets after the request line, where that is the same for each such head.
    """

    __slots__ = (
        "cookies",
        "expects_continue",
        "forwarded",
        "host",
        "is_http_10",
        "is_repeatable",
        "is_upgrade",
        "keep_alive",
        "length",
        "method",
        "outgoing",
        "section",
        "target",
        "token",
        "via",
    )

    def __init__(self, method: bytes, target: bytes, *, is_http_10: bool) -> None:
        self.method = method
        self.target = target
        self.is_http_10 = is_http_10
        self.keep_alive = not is_http_10
        self.host = b""
        self.section: Section = []
        self.cookies: list[int] | None = None
        self.length = 0
        self.is_upgrade = False
        self.is_repeatable = False
        self.expects_continue = False
        self.forwarded: dict[bytes, bytes] | None = None
        self.via: bytes | None = None
        self.token: bytes | None = None
        self.outgoing: bytes | None = None

    def repeat(self, method: bytes, target: bytes) -> RequestHead:
        """Return a head with this one's section and another request line."""
        head = RequestHead.__new__(RequestHead)
        head.method = method
        head.target = target
        head.is_http_10 = self.is_http_10
        head.keep_alive = self.keep_alive
        head.host = self.host
        head.section = self.section
        head.cookies = self.cookies
        head.length = self.length
        head.is_upgrade = self.is_upgrade
        head.is_repeatable = True
        head.expects_continue = self.expects_continue
        head.forwarded = self.forwarded
        head.via = self.via
        head.token = self.token
        head.outgoing = self.outgoing
        return head

    @override
    def __repr__(self) -> str:
        return f"<RequestHead {self.method!r} {self.target!r} length={self.length}>"


class RequestHeadReader:
    """Reads the heads of one connection, one after the other.

    A client sends nearly the same header section with each request of a connection: where it is octet by octet that
    of the request before, it is not read again (measured: 8 of 26 microseconds of the whole path). Nothing is shared
    between connections. `cookies` takes the affinity cookie out.
    """

    __slots__ = ("_cookies", "_last", "_limits", "_section")

    def __init__(self, limits: HeadLimits, cookies: CookieReader | None = None) -> None:
        self._limits = limits
        self._cookies = cookies
        self._last: RequestHead | None = None
        self._section = b""

    def read(self, data: bytes, end: int) -> RequestHead:
        """Parse the request head that `data[:end]` holds whole; raise RequestError as `parse_request_head` does."""
        line = _REQUEST_LINE.match(data, 0, end)
        if line is None:
            return parse_request_head(data, end, self._limits)
        method, target, _ = line.groups()
        section = data[line.start(3) : end]
        if section == self._section and target[:1] == b"/" and len(target) <= self._limits.target_bytes:
            last = self._last
            if last is not None and method != b"CONNECT":
                return last.repeat(method, target)
        head = parse_request_head(data, end, self._limits)
        if self._cookies is not None and head.cookies is not None:
            head.token = self._cookies.take(head.section, head.cookies)
        if head.is_repeatable:
            self._last, self._section = head, section
        return head


class ResponseHead:
    """The facts of one response head; `status_text` is the status code with its reason phrase."""

    __slots__ = (
        "cache_control",
        "has_length",
        "is_upgrade",
        "keep_alive",
        "length",
        "section",
        "status",
        "status_text",
    )

    def __init__(self, status: int, status_text: bytes, *, keep_alive: bool) -> None:
        self.status = status
        self.status_text = status_text
        self.keep_alive = keep_alive
        self.section: Section = []
        self.length = UNTIL_CLOSE
        self.has_length = False
        self.is_upgrade = False
        self.cache_control: bytes | None = None

    @override
    def __repr__(self) -> str:
        return f"<ResponseHead {self.status} length={self.length}>"


class _Framing:
    """The fields of one head that concern its connection only, in lower case; gathered and then dropped."""

    __slots__ = ("connection", "length", "transfer_encoding", "upgrade")

    def __init__(self) -> None:
        self.connection: list[bytes] | None = None
        self.length: int | None = None
        self.transfer_encoding: bytes | None = None
        self.upgrade: bytes | None = None

    def take_connection(self, value: bytes) -> None:
        self.connection = (self.connection or []) + parse_list(value)

    def take_length(self, value: bytes) -> None:
        if self.length is not None:
            raise FieldError("several Content-Length fields")  # RFC 9112, section 6.3
        self.length = parse_content_length(value)

    def take_transfer_encoding(self, value: bytes) -> None:
        if self.transfer_encoding is not None:
            raise FieldError("several Transfer-Encoding fields")
        self.transfer_encoding = value

    def take_upgrade(self, value: bytes) -> None:
        self.upgrade = value if self.upgrade is None else b","  # two of them are none

    @property
    def is_websocket(self) -> bool:
        return self.upgrade == b"websocket" and self.connection is not None and b"upgrade" in self.connection


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
    start = line.end()
    if len(target) > limits.target_bytes:
        raise RequestError("the request target is too long", status=414)
    if end > limits.line_bytes or data.count(b"\n", start, end) > limits.fields:
        _check_size(data, start, end, limits)
    head = RequestHead(method, target, is_http_10=minor == b"0")
    try:
        canonical = canonicalise(data, start, end - 2)
        if canonical is not None:
            data = data[:start] + canonical + b"\r\n"
            end = len(data)
        framing = _read_request_section(head, data, start, end - 2)
    except FieldError as error:
        raise RequestError(str(error)) from error
    if framing is not None:
        _read_request_framing(head, framing)
    if target[:1] != b"/" or method == b"CONNECT":
        _read_target(head)
    else:
        head.is_repeatable = framing is None
    return head


def _check_size(data: bytes, start: int, end: int, limits: HeadLimits) -> None:
    if end > limits.head_bytes:
        raise RequestError("the request head is too large", status=431)
    lines = data[start : end - 4].split(b"\r\n")
    if len(lines) > limits.fields:
        raise RequestError("too many header fields", status=431)
    if max(len(line) for line in lines) > limits.line_bytes:
        raise RequestError("a header line is too long", status=431)


def _read_request_section(head: RequestHead, data: bytes, start: int, end: int) -> _Framing | None:  # noqa: C901, PLR0912 -- one branch for each field, in one pass
    """Read `data[start:end]`; return the framing fields, None where there are none as in most requests."""
    framing: _Framing | None = None
    section = head.section
    hosts = 0
    at = start
    lower = data[:end].lower()  # bytes.lower() changes ASCII letters only
    for match in REQUEST_SPECIALS.finditer(lower, start - 1, end):
        kind = match.lastindex
        value_at = match.end()
        stop = data.find(b"\r\n", value_at)
        if kind == HOST:
            head.host = data[value_at:stop]
            hosts += 1
            continue
        if kind == EXPECT:
            head.expects_continue = lower[value_at:stop] == b"100-continue"
            continue
        line_at = match.start() + 1
        if line_at > at:
            section.append(data[at:line_at])
        at = stop + 2
        if kind == COOKIE:
            if head.cookies is None:
                head.cookies = []
            head.cookies.append(len(section))
            section.append(data[line_at:at])
        elif kind == CONNECTION and lower[value_at:stop] == b"keep-alive" and not head.is_http_10:
            pass  # what every browser says, and the default
        elif kind == FORWARDED:
            _gather(head, lower[line_at : value_at - 2], data[value_at:stop])
        elif kind == VIA:
            head.via = data[value_at:stop] if head.via is None else head.via + b", " + data[value_at:stop]
        elif kind is not None:
            if framing is None:
                framing = _Framing()
            if kind == CONNECTION:
                framing.take_connection(lower[value_at:stop])
            elif kind == CONTENT_LENGTH:
                framing.take_length(lower[value_at:stop])
            elif kind == TRANSFER_ENCODING:
                framing.take_transfer_encoding(lower[value_at:stop])
            elif kind == UPGRADE:
                framing.take_upgrade(lower[value_at:stop])
    if at < end:
        section.append(data[at:end])
    if hosts != 1 and (hosts or not head.is_http_10):  # RFC 9112, section 3.2
        raise FieldError("several Host fields" if hosts else "no Host field")
    if _HOST.fullmatch(head.host) is None:
        raise FieldError("an invalid Host")
    if head.is_http_10 and not head.host:  # it names none, and the proxy will name one: never two
        head.section = drop_fields(head.section, {b"host"})
    return framing


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
    section = drop_fields(head.section, {b"host"})
    head.section = [b"Host: " + head.host + b"\r\n", *section]
    if head.cookies is not None:
        head.cookies = [at + 1 for at in head.cookies]


def _read_request_framing(head: RequestHead, framing: _Framing) -> None:
    if framing.connection is not None:
        if b"close" in framing.connection:
            head.keep_alive = False
        elif head.is_http_10 and b"keep-alive" in framing.connection:
            head.keep_alive = True
        _drop_named(head, framing.connection)
    if framing.transfer_encoding is not None:
        if framing.length is not None:
            raise RequestError("both Content-Length and Transfer-Encoding")  # RFC 9112, section 6.1
        if head.is_http_10:
            raise RequestError("Transfer-Encoding in an HTTP/1.0 request")
        if framing.transfer_encoding != b"chunked":
            if parse_list(framing.transfer_encoding)[-1:] != [b"chunked"]:
                raise RequestError("a Transfer-Encoding that does not end in chunked")
            raise RequestError("a transfer coding other than chunked", status=501)
        head.length = CHUNKED
    elif framing.length is not None:
        head.length = framing.length
    # Anything but a WebSocket handshake loses its Upgrade (RFC 6455, section 4.1; h2c is never passed on).
    head.is_upgrade = framing.is_websocket and head.method == b"GET" and head.length == 0 and not head.is_http_10


def _drop_named(head: RequestHead, named: list[bytes]) -> None:
    """Drop the fields that Connection names (RFC 9110, section 7.6.1), but none that the proxy relies on."""
    names = set(named) - _NEVER_DROPPED
    if not names:
        return
    head.section = drop_fields(head.section, names)
    if head.forwarded is not None:
        head.forwarded = {name: value for name, value in head.forwarded.items() if name not in names}
    if b"via" in names:
        head.via = None
    if b"expect" in names:
        head.expects_continue = False


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
    if len(status_text) == 3:  # noqa: PLR2004 -- RFC 9112, section 4: the space is sent even where no reason follows
        status_text += b" "
    start = line.end()
    head = ResponseHead(int(status_text[:3]), status_text, keep_alive=line[1] == b"1")
    if end > limits.head_bytes or data.count(b"\n", start, end) > limits.fields + 1:
        raise ResponseError("the response head is too large", proxy_status="http_response_header_section_size")
    try:
        canonical = canonicalise(data, start, end - 2)
        if canonical is not None:
            data = data[:start] + canonical + b"\r\n"
            end = len(data)
        framing = _read_response_section(head, data, start, end - 2)
    except FieldError as error:
        raise ResponseError(f"the upstream sent {error}") from error
    if framing is not None:
        _read_response_framing(head, framing)
        if head.length == CHUNKED and line[1] == b"0":
            head.keep_alive = False  # RFC 9112, section 6.1: such framing is not to be relied on
    status = head.status
    if status < 200 or status == 204 or status == 304 or request_method == b"HEAD":  # noqa: PLR1714, PLR2004 -- hot
        if head.length != UNTIL_CLOSE and status in _LENGTHLESS:
            # A body announced where none may be: if it comes, it must not be taken for the next response.
            head.keep_alive = head.keep_alive and head.length == 0
            head.section = drop_fields(head.section, {b"content-length"})
        head.length = 0
    return head


def _read_response_section(  # noqa: C901 -- one branch for each field, in one pass
    head: ResponseHead, data: bytes, start: int, end: int
) -> _Framing | None:
    """Read `data[start:end]`; return the framing fields but Content-Length, None where there are none."""
    framing: _Framing | None = None
    section = head.section
    at = start
    lower = data[:end].lower()
    for match in RESPONSE_SPECIALS.finditer(lower, start - 1, end):
        kind = match.lastindex
        value_at = match.end()
        stop = data.find(b"\r\n", value_at)
        if kind == RESPONSE_CONTENT_LENGTH:
            if head.has_length:
                raise FieldError("several Content-Length fields")  # RFC 9112, section 6.3
            head.length = parse_content_length(data[value_at:stop])
            head.has_length = True
            continue
        if kind == RESPONSE_CACHE_CONTROL:
            head.cache_control = (head.cache_control or b"") + b"," + lower[value_at:stop]
            continue
        line_at = match.start() + 1
        if line_at > at:
            section.append(data[at:line_at])
        at = stop + 2
        if kind == RESPONSE_CONNECTION and lower[value_at:stop] == b"keep-alive":
            head.keep_alive = True
        elif kind is not None:
            if framing is None:
                framing = _Framing()
            if kind == RESPONSE_CONNECTION:
                framing.take_connection(lower[value_at:stop])
            elif kind == RESPONSE_TRANSFER_ENCODING:
                framing.take_transfer_encoding(lower[value_at:stop])
            else:
                framing.take_upgrade(lower[value_at:stop])
    if at < end:
        section.append(data[at:end])
    return framing


# RFC 9110, section 8.6: no Content-Length in 1xx and 204 (304 may have one, and keeps it).
_LENGTHLESS: Final = frozenset({*range(100, 200), 204})


def _read_response_framing(head: ResponseHead, framing: _Framing) -> None:
    if framing.connection is not None:
        if b"close" in framing.connection:
            head.keep_alive = False
        elif b"keep-alive" in framing.connection:
            head.keep_alive = True
        names = set(framing.connection) - _NEVER_DROPPED
        if names:
            head.section = drop_fields(head.section, names)
    if framing.transfer_encoding is not None:
        if head.has_length:
            raise ResponseError("the upstream sent both Content-Length and Transfer-Encoding")
        if framing.transfer_encoding != b"chunked":
            raise ResponseError("the upstream sent a transfer coding other than chunked")
        head.length = CHUNKED
    head.is_upgrade = framing.is_websocket
