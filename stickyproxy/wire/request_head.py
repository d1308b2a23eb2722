"""Request heads: request line and header section, parsed strictly into facts, and written anew (RFC 9112)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.errors import RequestError
from stickyproxy.wire.cookies import CookieReader
from stickyproxy.wire.head import CHUNKED, NEVER_DROPPED, Framing
from stickyproxy.wire.headers import (
    CONNECTION,
    CONTENT_LENGTH,
    COOKIE,
    FORWARDED,
    HOST,
    REQUEST_SPECIALS,
    TOKEN,
    TRANSFER_ENCODING,
    UPGRADE,
    VIA,
    FieldError,
    canonicalise,
    drop_fields,
    find_field,
    parse_list,
)

if TYPE_CHECKING:
    from stickyproxy.wire.cookies import CookiesReader
    from stickyproxy.wire.forwarded import ForwardedWriter
    from stickyproxy.wire.head import HeadLimits
    from stickyproxy.wire.headers import Section

# No "#" in a target: a fragment is never sent, and who reads the path differently with it could be led astray.
_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!\"$-~]+) HTTP/1\.([01])\r\n")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#@:][^/?#@]*)([/?].*)?")
# uri-host [ ":" port ] of RFC 9110, section 7.2, or nothing; with the underscore that container names use, and in
# brackets only what can be an address, or a name there would be another one for who drops the brackets.
_HOST = re.compile(
    rb"(?:(?:\[(?=[^\]]*:)[0-9A-Fa-f:.]+(?:%[0-9A-Za-z._~\-]+)?\]"
    rb"|(?:[A-Za-z0-9._~!$&'()*+;=\-]++|%[0-9A-Fa-f]{2})+)(?::[0-9]{0,5})?)?"
)
# An idle connection holds what is remembered, three times over: for a large section that would be 400 KB.
_MAX_REMEMBERED_BYTES: Final = 8 * 1024
_WRONG_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\n[ \t]|\x00")
_LINE_ROOM: Final = 64  # bytes of a request line beside its target: method, version, spaces
_WITH_CONTENT: Final = frozenset({b"POST", b"PUT", b"PATCH"})
_COUNTED: Final = frozenset({b"TRACE", b"OPTIONS"})  # their Max-Forwards counts the proxies (RFC 9110, section 7.6.2)
_NEVER_REPEATED: Final = _COUNTED | {b"CONNECT"}
_HOPS = re.compile(rb"[0-9]{1,18}")


class RequestHead:
    """The facts of one request head.

    `section` are the end-to-end fields; `cookies` the positions of its parts that are Cookie fields; `length` the
    body's bytes, or CHUNKED; `forwarded` what the client says of those before it, by lower-case name. `token` is the
    value of the affinity cookie, which is no longer in the section once a `RequestHeadReader` has read it; `outgoing`
    is a place for what the upstream gets after the request line, where that is the same for each such head, and
    `key_fields` one for what was read from the section by whom. Where there are several affinity cookies, `tokens`
    holds them by name, and whoever knows which is meant sets `token`.
    """

    __slots__ = (
        "cookies",
        "forwarded",
        "host",
        "is_http_10",
        "is_repeatable",
        "is_upgrade",
        "keep_alive",
        "key_fields",
        "length",
        "method",
        "outgoing",
        "section",
        "target",
        "token",
        "tokens",
        "via",
    )

    prefix = b""
    """The path that was taken off the target; only a `StrippedHead` has one."""

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
        self.forwarded: dict[bytes, bytes] | None = None
        self.via: bytes | None = None
        self.token: bytes | None = None
        self.tokens: dict[bytes, bytes] | None = None
        self.outgoing: bytes | None = None
        self.key_fields: tuple[object, tuple[bytes | None, ...] | None] | None = None

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
        head.forwarded = self.forwarded
        head.via = self.via
        head.token = self.token
        head.tokens = self.tokens
        head.outgoing = self.outgoing
        head.key_fields = self.key_fields
        return head

    @override
    def __repr__(self) -> str:
        return f"<RequestHead {self.method!r} {self.target!r} length={self.length}>"


class StrippedHead(RequestHead):
    """A head as an upstream gets it that knows nothing of the prefix that its paths have for clients."""

    __slots__ = ("prefix",)

    def __init__(self, head: RequestHead, prefix: bytes, target: bytes) -> None:
        for name in RequestHead.__slots__:
            setattr(self, name, getattr(head, name))
        self.target = target
        self.prefix = prefix
        self.is_repeatable = False
        self.outgoing = None


class RequestHeadReader:
    """Reads the heads of one connection, one after the other.

    A client sends nearly the same header section with each request of a connection: where it is octet by octet that
    of the request before, it is not read again (measured: 0.75 instead of 4.2 microseconds). Nothing is shared
    between connections. `cookies` takes the affinity cookie out.
    """

    __slots__ = ("_cookies", "_last", "_limits", "_section")

    def __init__(self, limits: HeadLimits, cookies: CookieReader | CookiesReader | None = None) -> None:
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
            if last is not None and method not in _NEVER_REPEATED:
                return last.repeat(method, target)
        head = parse_request_head(data, end, self._limits)
        if self._cookies is not None and head.cookies is not None:
            if isinstance(self._cookies, CookieReader):
                head.token = self._cookies.take(head.section, head.cookies)
            else:
                head.tokens = self._cookies.take(head.section, head.cookies)
        if head.is_repeatable and len(section) <= _MAX_REMEMBERED_BYTES:
            self._last, self._section = head, section
        else:
            self._last, self._section = None, b""
            head.is_repeatable = False
        return head


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
        head.is_repeatable = framing is None and method not in _COUNTED
    if method in _COUNTED:
        _count_down(head)
    return head


def _check_size(data: bytes, start: int, end: int, limits: HeadLimits) -> None:
    if end > limits.head_bytes:
        raise RequestError("the request head is too large", status=431)
    lines = data[start : end - 4].split(b"\r\n")
    if len(lines) > limits.fields:
        raise RequestError("too many header fields", status=431)
    if max(len(line) for line in lines) > limits.line_bytes:
        raise RequestError("a header line is too long", status=431)


def _read_request_section(head: RequestHead, data: bytes, start: int, end: int) -> Framing | None:  # noqa: C901, PLR0912 -- one branch for each field, in one pass
    """Read `data[start:end]`; return the framing fields, None where there are none as in most requests."""
    framing: Framing | None = None
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
                framing = Framing()
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
    if head.is_http_10:
        # An expectation is ignored there (RFC 9110, section 10.1.1), and who names no host gets one from the proxy.
        head.section = drop_fields(head.section, {b"expect"} if head.host else {b"expect", b"host"})
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
    path = match[2]
    if path is None:
        head.target = b"*" if head.method == b"OPTIONS" else b"/"  # RFC 9112, section 3.2.4
    else:
        head.target = path if path[:1] == b"/" else b"/" + path
    head.host = match[1]
    # The authority of the target replaces Host, whatever that said.
    section = drop_fields(head.section, {b"host"})
    head.section = [b"Host: " + head.host + b"\r\n", *section]
    if head.cookies is not None:
        head.cookies = [at + 1 for at in head.cookies]


def _count_down(head: RequestHead) -> None:
    """Take one from Max-Forwards; refuse what is meant for the proxy itself, which has nothing to tell."""
    hops = find_field(head.section, b"max-forwards")
    if not hops:
        return
    if _HOPS.fullmatch(hops) is None:
        raise RequestError("an invalid Max-Forwards")
    if int(hops) == 0:
        raise RequestError("a request that Max-Forwards ends here", status=501)
    head.section = [*drop_fields(head.section, {b"max-forwards"}), b"Max-Forwards: %d\r\n" % (int(hops) - 1)]


def _read_request_framing(head: RequestHead, framing: Framing) -> None:
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
            raise _transfer_encoding_error(framing.transfer_encoding)
        head.length = CHUNKED
    elif framing.length is not None:
        head.length = framing.length
    # Anything but a WebSocket handshake loses its Upgrade (RFC 6455, section 4.1; h2c is never passed on).
    head.is_upgrade = framing.is_websocket and head.method == b"GET" and head.length == 0 and not head.is_http_10


def _transfer_encoding_error(value: bytes) -> RequestError:
    codings = parse_list(value)
    if codings[-1:] != [b"chunked"]:
        return RequestError("a Transfer-Encoding that does not end in chunked")
    if b"chunked" in codings[:-1] or len(codings) == 1:  # twice (RFC 9112, section 6.1), or beside empty elements
        return RequestError("a Transfer-Encoding that is not just one chunked")
    return RequestError("a transfer coding other than chunked", status=501)


def _drop_named(head: RequestHead, named: list[bytes]) -> None:
    """Drop the fields that Connection names (RFC 9110, section 7.6.1), but none that the proxy relies on."""
    names = set(named) - NEVER_DROPPED
    if not names:
        return
    head.section = drop_fields(head.section, names)
    if head.forwarded is not None:
        head.forwarded = {name: value for name, value in head.forwarded.items() if name not in names}
    if b"via" in names:
        head.via = None


def find_head_error(data: bytearray, checked: int, limits: HeadLimits) -> RequestError | None:
    """Return what is wrong with a head that has not come whole; None as long as one can come of it.

    The first `checked` bytes were looked at before. What cannot become a head is refused at once, and not when its time
    is over.
    """
    if len(data) > limits.head_bytes:
        return RequestError("the request head is too large", status=431)
    start = 0
    while data.startswith(b"\r\n", start):  # empty lines before a request (RFC 9112, section 2.2)
        start += 2
    line_end = data.find(b"\r\n", start)
    if line_end < 0:
        if len(data) - start > limits.target_bytes + _LINE_ROOM:
            return RequestError("the request line is too long", status=414)
    elif line_end + 2 > checked and _REQUEST_LINE.match(data, start) is None:
        return _request_line_error(bytes(data[start:]), limits)
    if _WRONG_END.search(data, max(start, checked - 1)) is not None:
        return RequestError("a bare CR or LF, a NUL or a folded line in the request head")
    return None


def _request_line_error(data: bytes, limits: HeadLimits) -> RequestError:
    first = data[: data.find(b"\r\n")]
    parts = first.split(b" ")
    if len(first) > limits.target_bytes + _LINE_ROOM:
        return RequestError("the request line is too long", status=414)
    if len(parts) == 3 and re.fullmatch(rb"HTTP/[0-9]\.[0-9]", parts[2]):  # noqa: PLR2004 -- method, target, version
        if parts[2] not in {b"HTTP/1.0", b"HTTP/1.1"}:
            return RequestError("an HTTP version other than 1.0 and 1.1", status=505)
        return RequestError("an invalid method or request target")
    return RequestError("an invalid request line")


def write_request_head(head: RequestHead, forwarded: ForwardedWriter, request_id: bytes, authority: bytes) -> bytes:
    """Return the head as an upstream gets it, with what `forwarded` says of the client.

    `authority` stands for Host where an HTTP/1.0 client named none. What is the same for each head with this section
    is put together once.
    """
    outgoing = head.outgoing
    if outgoing is None:
        outgoing = _write_outgoing(head, forwarded)
        if head.is_repeatable:
            head.outgoing = outgoing
    if not head.host and head.is_http_10:
        outgoing += b"Host: " + authority + b"\r\n"
    if head.length == 0 and head.method in _WITH_CONTENT:  # RFC 9110, section 8.6: say that there is none
        outgoing += b"Content-Length: 0\r\n"
    return b"%b %b HTTP/1.1\r\n%bX-Request-ID: %b\r\n\r\n" % (head.method, head.target, outgoing, request_id)


def _write_outgoing(head: RequestHead, forwarded: ForwardedWriter) -> bytes:
    parts = [*head.section, forwarded.write(head)]
    if head.length == CHUNKED:
        parts.append(b"Transfer-Encoding: chunked\r\n")
    elif head.length:
        parts.append(b"Content-Length: %d\r\n" % head.length)
    if head.is_upgrade:
        parts.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
    return b"".join(parts)
