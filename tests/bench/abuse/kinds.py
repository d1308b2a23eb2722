"""The kinds of abuse: for each what one unit of it sends, how it is cut into writes, and what it waits for.

A unit is one request, or one connection where that is what is abused. `message` takes the number of the unit, so that
no two are the same where that matters to the proxy, which reads a repeated header section only once.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final

from tests.bench.abuse.app import MARK
from tests.bench.load import BROWSER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HEAD_BYTES: Final = 128 * 1024  # the limits of the proxy, as they are by default
LINE_BYTES: Final = 64 * 1024
FIELDS: Final = 200
TARGET_BYTES: Final = 16 * 1024
EXTENSIONS_BYTES: Final = 4 * 1024
TRAILERS_BYTES: Final = 8 * 1024
FLOOD_BYTES: Final = 64 * 1024
MANY: Final = 500  # connections that are held at once


class Until(Enum):
    """What a client reads before its unit is over."""

    ANSWER = auto()  # as many marks of the application as the message has requests
    END = auto()  # the end of the connection
    STATUS = auto()  # a response with the status of the kind
    BYTE = auto()  # anything at all
    SIPS = auto()  # a part of a large response, a little at a time
    NOTHING = auto()


@dataclass(frozen=True)
class Kind:
    """One kind of abuse. `requests` are those in one message, each a unit; `status` that of the last response.

    `opening` is sent on each new connection and answered before the measurement begins. `is_held`: the connections
    stay as the message left them until memory was read. `config` is laid over the configuration of the proxy.
    """

    name: str
    title: str
    message: Callable[[int], bytes]
    cut: Callable[[bytes], list[bytes]] = lambda message: [message]
    until: Until = Until.ANSWER
    status: int = 200
    requests: int = 1
    opening: bytes = b""
    connections: int = 64
    is_new: bool = False  # a connection for each message
    is_held: bool = False
    is_tls: bool = False  # the listener speaks it
    shakes_hands: bool = False  # the client finishes the handshake before it sends its message
    config: Mapping[str, Any] = field(default_factory=dict)


def each_byte(message: bytes) -> list[bytes]:
    """Cut a message into single bytes."""
    return [bytes((byte,)) for byte in message]


def each_line(message: bytes) -> list[bytes]:
    """Cut a message after each line."""
    return message.splitlines(keepends=True)


def last_bytes(number: int) -> Callable[[bytes], list[bytes]]:
    """Return a cut that leaves all but the last `number` bytes in one piece."""
    return lambda message: [message[:-number], *each_byte(message[-number:])]


def body_by_byte(message: bytes) -> list[bytes]:
    """Cut a request into its head and the single bytes of its body."""
    end = message.index(b"\r\n\r\n") + 4
    return [message[:end], *each_byte(message[end:])]


def body_by_chunk(message: bytes) -> list[bytes]:
    """Cut a request into its head and the chunks of one byte that its body is made of."""
    end = message.index(b"\r\n\r\n") + 4
    last = message.index(b"0\r\n\r\n", end)
    return [message[:end], *(message[at : at + 6] for at in range(end, last, 6)), message[last:]]


def client_hello(_: int) -> bytes:
    """Return the first flight of a client that offers TLS 1.3."""
    out = ssl.MemoryBIO()
    link = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    try:
        link.do_handshake()
    except ssl.SSLWantReadError:
        return out.read()
    raise AssertionError("a handshake without an answer")


class Requests:
    """Writes the messages; `cookie` is an affinity cookie that the proxy takes."""

    def __init__(self, cookie: bytes) -> None:
        self._cookie = cookie
        self._browser = "".join(f"{name}: {value}\r\n" for name, value in BROWSER.items()).encode()

    def head(self, path: bytes = b"/plain", more: bytes = b"", *, method: bytes = b"GET", cookie: bytes = b"") -> bytes:
        """Return a request as a browser sends it, `more` being further lines of its head."""
        line = b"%b %b HTTP/1.1\r\nHost: localhost\r\n" % (method, path)
        return b"%b%bCookie: %b\r\n%b\r\n" % (line, self._browser, cookie or self._cookie, more)

    def bare(self, path: bytes, fields: bytes) -> bytes:
        """Return a request with nothing but its Host, its affinity cookie and these fields."""
        return b"GET %b HTTP/1.1\r\nHost: localhost\r\nCookie: %b\r\n%b\r\n" % (path, self._cookie, fields)

    def get(self, path: bytes) -> Callable[[int], bytes]:
        """Return a message that is always this GET."""
        head = self.head(path)
        return lambda _: head

    def large_head(self, number: int) -> bytes:
        """Return a request whose head is as large as the limits allow."""
        first = b"Number: %d\r\nA: %b\r\n" % (number, b"x" * (LINE_BYTES - 10))
        left = HEAD_BYTES - len(self.bare(b"/plain", first)) - len(b"B: \r\n")
        return self.bare(b"/plain", first + b"B: %b\r\n" % (b"x" * left))

    def many(self, line: bytes, count: int = FIELDS - 4) -> Callable[[int], bytes]:
        """Return a message with so many fields; `line` has a place for the number of the field."""
        fields = b"".join(line % at for at in range(count))
        return lambda number: self.bare(b"/plain", b"Number: %d\r\n" % number + fields)

    def named_by_connection(self, number: int) -> bytes:
        """Return a request with a Connection field that names thousands of fields, and some that it has."""
        names = b", ".join(b"f%d" % at for at in range(4_000))
        fields = b"".join(b"F%d: value\r\n" % at for at in range(FIELDS - 5))
        return self.bare(b"/plain", b"Number: %d\r\nConnection: %b\r\n" % (number, names[: LINE_BYTES - 50]) + fields)

    def forged(self, number: int) -> bytes:
        """Return a request whose token has the right form and a wrong MAC."""
        name, _, token = self._cookie.partition(b"=")
        return self.head(cookie=b"%b=%b%012d%b" % (name, token[:20], number, token[32:]))

    def chunked(self, body: bytes) -> bytes:
        """Return a request with a body that is framed already."""
        return self.head(more=b"Transfer-Encoding: chunked\r\n", method=b"POST") + body


_UPGRADE: Final = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
_MASK: Final = bytes(4)
_MARK_FRAME: Final = bytes((0x82, 0x80 | len(MARK))) + _MASK + MARK
_ONE_CHUNK: Final = b"1\r\nx\r\n"
_TRUSTED: Final = {"trusted_proxies": ["127.0.0.0/8"], "access_log": "json"}


def plain_kinds(requests: Requests) -> tuple[Kind, Kind]:
    """Return what everything is compared with: a plain request (CPU) and a connection idle after one (memory)."""
    return (
        Kind("plain", "GET of 1 KiB on a kept connection", requests.get(b"/plain")),
        Kind("idle", "a connection after one such GET", requests.get(b"/plain"), connections=MANY, is_held=True),
    )


def all_kinds(requests: Requests) -> list[Kind]:
    """Return every kind of abuse, in groups; the names are those of the command line."""
    return [
        *_head_kinds(requests),
        *_field_kinds(requests),
        *_body_kinds(requests),
        *_websocket_kinds(requests),
        *_connection_kinds(requests),
        *_response_kinds(requests),
        *_tls_kinds(),
    ]


def _head_kinds(requests: Requests) -> list[Kind]:
    large = requests.large_head
    line = b"GET /plain?" + b"x" * (TARGET_BYTES - 8)
    return [
        Kind("head-bytes", "a plain head, byte by byte", requests.get(b"/plain"), each_byte),
        Kind("head-lines", "a head of 196 lines, line by line", requests.many(b"Field-%d: value\r\n"), each_line),
        Kind("head-large", "a head of 128 KiB", large, connections=32),
        Kind("head-large-bytes", "the same, its last 500 bytes one by one", large, last_bytes(500), connections=32),
        Kind("head-large-kept", "a connection after a head of 128 KiB", large, connections=MANY, is_held=True),
        Kind(
            "head-unfinished",
            "a head of 128 KiB without its end",
            lambda number: large(number)[:-4],
            until=Until.NOTHING,
            connections=MANY,
            is_held=True,
        ),
        Kind(
            "head-too-large",
            "a head of 192 KiB",
            lambda number: requests.bare(b"/plain", (b"A%d: " % number + b"x" * 60_000 + b"\r\n") * 3),
            until=Until.END,
            status=431,
            is_new=True,
            connections=32,
        ),
        Kind("target-large", "a target of 16 KiB", lambda number: requests.head(_target(number)), connections=32),
        Kind(
            "target-bytes",
            "a request line without end, its last 500 bytes one by one",
            lambda _: line + b"x" * 56,
            last_bytes(500),
            until=Until.NOTHING,
            is_new=True,
        ),
        Kind("target-too-large", "a target of 32 KiB", lambda _: line * 2, until=Until.END, status=414, is_new=True),
        Kind("empty-lines", "64 KiB of empty lines before a head", _after(b"\r\n" * (FLOOD_BYTES // 2), requests)),
        Kind("empty-lines-writes", "500 empty lines, each alone", _after(b"\r\n" * 500, requests), _lines_then_head),
        Kind(
            "refused", "no request at all: 400", lambda _: b"rubbish\r\n\r\n", until=Until.END, status=400, is_new=True
        ),
        Kind("refused-field", "a bad field: 400", _bad_field(requests), until=Until.END, status=400, is_new=True),
        Kind("pipelined", "1000 requests in one write", lambda _: requests.head() * 1000, requests=1000, connections=8),
        Kind(
            "pipelined-small",
            "2000 short requests in one write",
            lambda _: b"GET /plain HTTP/1.1\r\nHost: a\r\n\r\n" * 2000,
            requests=2000,
            connections=8,
        ),
    ]


def _target(number: int) -> bytes:
    return (b"/plain?%d&" % number).ljust(TARGET_BYTES, b"x")


def _after(before: bytes, requests: Requests) -> Callable[[int], bytes]:
    return lambda _: before + requests.head()


def _lines_then_head(message: bytes) -> list[bytes]:
    start = message.index(b"GET")
    return [*([b"\r\n"] * (start // 2)), message[start:]]


def _bad_field(requests: Requests) -> Callable[[int], bytes]:
    return lambda number: requests.head(more=b"Number: %d\r\nField : value\r\n" % number)


def _field_kinds(requests: Requests) -> list[Kind]:
    crumbs = b"; ".join(b"c%d=v" % at for at in range(7_000))[: LINE_BYTES - 10]
    tokens = b"; ".join([b"stickyproxy=v1." + b"A" * 56] * 850)
    addresses = b", ".join([b"127.0.0.1"] * 5_900)
    other = b"; ".join([b"stickyproxy=x"] * 4_000)

    def with_cookie(value: bytes) -> Callable[[int], bytes]:
        return lambda number: requests.head(more=b"Number: %d\r\n" % number, cookie=value)

    return [
        Kind("fields", "196 small fields", requests.many(b"Field-%d: value\r\n")),
        Kind("fields-loose", "196 small fields with white space to spare", requests.many(b"Field-%d:  value \r\n")),
        Kind("fields-dropped", "196 fields that are not passed on", requests.many(b"Keep-Alive: %d\r\n")),
        Kind("fields-via", "196 Via fields", requests.many(b"Via: 1.1 name%d\r\n")),
        Kind("fields-named", "4000 names in Connection, 195 fields", requests.named_by_connection),
        Kind("cookie-fields", "196 Cookie fields", requests.many(b"Cookie: name%d=value\r\n")),
        Kind("cookie-crumbs", "64 KiB of cookies in one field", with_cookie(crumbs), connections=32),
        Kind("cookie-tokens", "850 affinity cookies in one field", with_cookie(tokens), connections=32),
        Kind("cookie-names", "4000 affinity cookies that are no token", with_cookie(other), connections=32),
        Kind(
            "cookie-none",
            "no cookie: a new client each time",
            lambda number: b"GET /plain?%d HTTP/1.1\r\nHost: a\r\n\r\n" % number,
        ),
        Kind("cookie-forged", "a token with a wrong MAC, each another", requests.forged),
        Kind(
            "forwarded-for",
            "another X-Forwarded-For each time",
            lambda number: requests.head(more=b"X-Forwarded-For: 10.%d.%d.1\r\n" % divmod(number % 65_536, 256)),
        ),
        Kind(
            "forwarded-list",
            "5900 trusted addresses in X-Forwarded-For, logged",
            lambda number: requests.head(more=b"Number: %d\r\nX-Forwarded-For: %b\r\n" % (number, addresses)),
            connections=32,
            config=_TRUSTED,
        ),
        Kind(
            "forwarded-many",
            "196 X-Forwarded-For fields from a trusted proxy, logged",
            requests.many(b"X-Forwarded-For: 10.0.0.%d\r\n"),
            config=_TRUSTED,
        ),
    ]


def _body_kinds(requests: Requests) -> list[Kind]:
    extension = b";" + b"e" * (EXTENSIONS_BYTES - 1)
    trailers = b"".join(b"T%03d: %b\r\n" % (at, b"x" * 20) for at in range(TRAILERS_BYTES // 28 - 2))
    last = b"0\r\n\r\n"

    def body(framed: bytes) -> Callable[[int], bytes]:
        request = requests.chunked(framed)
        return lambda _: request

    sized = requests.head(more=b"Content-Length: 1000\r\n", method=b"POST") + b"x" * 1000
    return [
        Kind("body-bytes", "a body of 1000 bytes, byte by byte", lambda _: sized, body_by_byte),
        Kind("chunks", "64 KiB of chunks of one byte in one write", body(_ONE_CHUNK * (FLOOD_BYTES // 6) + last)),
        Kind("chunks-writes", "500 chunks of one byte, each a write", body(_ONE_CHUNK * 500 + last), body_by_chunk),
        Kind("chunks-bytes", "100 chunks of one byte, byte by byte", body(_ONE_CHUNK * 100 + last), body_by_byte),
        Kind("extension", "4 KiB of chunk extension", body(b"1" + extension + b"\r\nx\r\n" + last)),
        Kind(
            "extension-bytes",
            "the same, its last 1000 bytes one by one",
            body(b"1" + extension + b"\r\nx\r\n" + last),
            last_bytes(1000),
            connections=16,
        ),
        Kind("extensions", "500 chunk extensions of two bytes", body(b"1;e\r\nx\r\n" * 500 + last)),
        Kind("trailers", "8 KiB of trailers", body(b"0\r\n" + trailers + b"\r\n")),
        Kind(
            "trailers-bytes",
            "the same, its last 1000 bytes one by one",
            body(b"0\r\n" + trailers + b"\r\n"),
            last_bytes(1000),
            connections=16,
        ),
        Kind(
            "trailers-lines",
            "8 KiB of short trailers",
            body(b"0\r\n" + b"a:\r\n" * (TRAILERS_BYTES // 4 - 8) + b"\r\n"),
        ),
        Kind(
            "body-unfinished",
            "a body of which nothing comes",
            lambda _: requests.head(more=b"Content-Length: 1000\r\n", method=b"POST"),
            until=Until.NOTHING,
            connections=MANY,
            is_held=True,
        ),
    ]


def _websocket_kinds(requests: Requests) -> list[Kind]:
    opening = requests.head(b"/ws", _UPGRADE)

    def tunnel(name: str, title: str, frames: bytes, cut: Callable[[bytes], list[bytes]] | None = None) -> Kind:
        message = frames + _MARK_FRAME
        return Kind(
            name, title, lambda _: message, cut or (lambda whole: [whole]), opening=opening, status=101, connections=32
        )

    return [
        tunnel("ws-empty", "64 KiB of empty frames in one write", bytes((0x82, 0)) * (FLOOD_BYTES // 2)),
        tunnel("ws-empty-masked", "64 KiB of empty masked frames", (bytes((0x82, 0x80)) + _MASK) * (FLOOD_BYTES // 6)),
        tunnel("ws-byte", "64 KiB of frames of one byte", (bytes((0x82, 0x81)) + _MASK + b"x") * (FLOOD_BYTES // 7)),
        tunnel("ws-pings", "64 KiB of pings", (bytes((0x89, 0x80)) + _MASK) * (FLOOD_BYTES // 6)),
        tunnel("ws-pings-writes", "500 pings, each a write", (bytes((0x89, 0x80)) + _MASK) * 500, _frames_of(6)),
        tunnel(
            "ws-byte-writes",
            "500 frames of one byte, each a write",
            (bytes((0x82, 0x81)) + _MASK + b"x") * 500,
            _frames_of(7),
        ),
        tunnel("ws-cut", "30 frames, cut at each byte of their heads", _LONG_FRAME * 30, each_byte),
        Kind(
            "ws-idle",
            "an idle WebSocket",
            lambda _: opening,
            until=Until.STATUS,
            status=101,
            connections=MANY,
            is_held=True,
        ),
        Kind(
            "ws-opened",
            "WebSockets opened and closed at once",
            lambda _: opening,
            until=Until.STATUS,
            status=101,
            is_new=True,
        ),
    ]


_LONG_FRAME: Final = bytes((0x82, 0x80 | 127)) + (1).to_bytes(8, "big") + _MASK + b"x"


def _frames_of(size_bytes: int) -> Callable[[bytes], list[bytes]]:
    def cut(message: bytes) -> list[bytes]:
        end = len(message) - len(_MARK_FRAME)
        return [*(message[at : at + size_bytes] for at in range(0, end, size_bytes)), message[end:]]

    return cut


def _connection_kinds(requests: Requests) -> list[Kind]:
    nothing: Callable[[int], bytes] = lambda _: b""  # noqa: E731 -- a message that is none
    large = requests.get(b"/large")
    return [
        Kind("closed", "a connection opened and closed at once", nothing, until=Until.NOTHING, is_new=True),
        Kind("opened", "a connection never used", nothing, until=Until.NOTHING, connections=MANY, is_held=True),
        Kind("one-request", "a new connection for each request", requests.get(b"/plain"), is_new=True),
        Kind(
            "gone", "a request whose client leaves at once", requests.get(b"/plain"), until=Until.NOTHING, is_new=True
        ),
        Kind("gone-large", "a response of 8 MiB, left unread", large, until=Until.BYTE, is_new=True, connections=8),
        Kind(
            "never-reads",
            "a response of 8 MiB that nobody reads",
            large,
            until=Until.NOTHING,
            connections=200,
            is_held=True,
        ),
        Kind("slow-reader", "256 KiB of it, 4 KiB at a time", large, until=Until.SIPS, connections=64, is_new=True),
    ]


def _response_kinds(requests: Requests) -> list[Kind]:
    def gets(name: str, title: str, path: bytes, **more: Any) -> Kind:
        return Kind(name, title, requests.get(path), **more)

    return [
        gets("response-chunks", "8 KiB in chunks of one byte", b"/tiny-chunks"),
        gets("response-chunks-writes", "256 chunks of one byte, each a write", b"/slow-chunks", connections=16),
        gets("response-bytes", "a body of 256 bytes, byte by byte", b"/slow-body", connections=16),
        gets("response-head-bytes", "a head of 320 bytes, byte by byte", b"/slow-head", connections=16),
        gets("response-head-large", "a head of 117 KiB", b"/large-head", connections=32),
        gets(
            "response-head-endless",
            "a head without end: 502",
            b"/endless-head",
            until=Until.STATUS,
            status=502,
            is_new=True,
        ),
        gets("response-cookies", "199 Set-Cookie fields", b"/set-cookies"),
        gets("response-hints", "31 early hints, then 200", b"/hints"),
        gets("response-hints-writes", "31 early hints, each a write", b"/slow-interim", connections=16),
        gets(
            "response-interim", "10000 interim responses: 502", b"/interim", until=Until.STATUS, status=502, is_new=True
        ),
        gets("response-until-close", "a body that ends with its connection", b"/until-close"),
    ]


def _tls_kinds() -> list[Kind]:
    nothing: Callable[[int], bytes] = lambda _: b""  # noqa: E731 -- a message that is none
    return [
        Kind("tls-begun", "a handshake begun and left", client_hello, until=Until.BYTE, is_new=True, is_tls=True),
        Kind(
            "tls-half",
            "a handshake begun and held",
            client_hello,
            until=Until.BYTE,
            connections=MANY,
            is_held=True,
            is_tls=True,
        ),
        Kind(
            "tls-part",
            "half a first flight, held",
            lambda number: client_hello(number)[:100],
            until=Until.NOTHING,
            connections=MANY,
            is_held=True,
            is_tls=True,
        ),
        Kind(
            "tls-closed",
            "a handshake finished, then closed",
            nothing,
            until=Until.NOTHING,
            is_new=True,
            is_tls=True,
            shakes_hands=True,
        ),
        Kind(
            "tls-idle",
            "a connection over TLS, never used",
            nothing,
            until=Until.NOTHING,
            connections=MANY,
            is_held=True,
            is_tls=True,
            shakes_hands=True,
        ),
    ]
