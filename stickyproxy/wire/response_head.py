"""Response heads: status line and header section, parsed strictly into facts, and written anew (RFC 9112)."""

from __future__ import annotations

import re
from email.utils import formatdate
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.errors import ResponseError
from stickyproxy.wire.head import CHUNKED, NEVER_DROPPED, UNTIL_CLOSE, Framing
from stickyproxy.wire.headers import (
    RESPONSE_CACHE_CONTROL,
    RESPONSE_CONNECTION,
    RESPONSE_CONTENT_LENGTH,
    RESPONSE_PIN,
    RESPONSE_SPECIALS,
    RESPONSE_TRANSFER_ENCODING,
    FieldError,
    canonicalise,
    drop_fields,
    parse_content_length,
)

if TYPE_CHECKING:
    from stickyproxy.wire.head import HeadLimits
    from stickyproxy.wire.headers import Section

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (([1-9])[0-9]{2}(?: [\t -~\x80-\xff]*)?)\r\n")


class ResponseHead:
    """The facts of one response head; `status_text` is the status code with its reason phrase.

    `has_cookies` says that the application sets some, `has_date` that it says when it made the response; `pin` is what
    it says of the client's pin (Stickyproxy-Pin), None as nearly always.
    """

    __slots__ = (
        "cache_control",
        "has_cookies",
        "has_date",
        "has_length",
        "is_upgrade",
        "keep_alive",
        "length",
        "pin",
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
        self.has_date = False
        self.has_cookies = False
        self.is_upgrade = False
        self.cache_control: bytes | None = None
        self.pin: bytes | None = None

    @override
    def __repr__(self) -> str:
        return f"<ResponseHead {self.status} length={self.length}>"


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


def _read_response_section(  # noqa: C901, PLR0912 -- one branch for each field, in one pass
    head: ResponseHead, data: bytes, start: int, end: int
) -> Framing | None:
    """Read `data[start:end]`; return the framing fields but Content-Length, None where there are none."""
    framing: Framing | None = None
    section = head.section
    at = start
    lower = data[:end].lower()
    head.has_date = lower.find(b"\ndate: ", start - 1) >= 0
    head.has_cookies = lower.find(b"\nset-cookie: ", start - 1) >= 0
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
        elif kind == RESPONSE_PIN:
            head.pin = data[value_at:stop]
        elif kind is not None:
            if framing is None:
                framing = Framing()
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


def _read_response_framing(head: ResponseHead, framing: Framing) -> None:
    if framing.connection is not None:
        if b"close" in framing.connection:
            head.keep_alive = False
        elif b"keep-alive" in framing.connection:
            head.keep_alive = True
        names = set(framing.connection) - NEVER_DROPPED
        if names:
            head.section = drop_fields(head.section, names)
    if framing.transfer_encoding is not None:
        if head.has_length:
            raise ResponseError("the upstream sent both Content-Length and Transfer-Encoding")
        if framing.transfer_encoding != b"chunked":
            raise ResponseError("the upstream sent a transfer coding other than chunked")
        head.length = CHUNKED
    head.is_upgrade = framing.is_websocket


def write_response_head(head: ResponseHead, *more: bytes) -> bytes:
    """Return the head as a client gets it; `more` are lines of the proxy's own, each with its CRLF, or nothing."""
    return b"".join((b"HTTP/1.1 ", head.status_text, b"\r\n", *head.section, *more, b"\r\n"))


def write_date(wall: float) -> bytes:
    """Return the Date field, with its CRLF, for a time in seconds since 1970 (RFC 9110, section 6.6.1)."""
    return b"Date: " + formatdate(wall, usegmt=True).encode("ascii") + b"\r\n"
