"""What request heads and response heads have in common: where one ends, its limits, and the fields of its framing.

What `request_head.py` and `response_head.py` read has lost everything that concerns one connection only: framing,
Connection and what it names, Upgrade. They write those anew, so no head is ever passed on as it came (RFC 9112).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from stickyproxy.wire.headers import FieldError, parse_content_length, parse_list

CHUNKED: Final = -1
"""Body length of a message that is sent in chunks."""
UNTIL_CLOSE: Final = -2
"""Body length of a response that ends with its connection."""

MAX_PIECES: Final = 512
"""Reads that the head of one message may take. A head of 128 KiB in packets of 1,400 bytes takes 94; byte by byte it
would cost a thousand times what a whole one does."""

_MAX_OPTIONS: Final = 4096  # of Connection; each costs half a microsecond, and a field may hold 30,000
# The options that are no names of fields, and the fields without which a message would mean something else.
NEVER_DROPPED: Final = frozenset(
    {b"close", b"keep-alive", b"upgrade", b"host", b"cookie", b"content-length", b"transfer-encoding"}
)


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """Bounds of a head, in bytes and fields; exceeding one is 431, or 414 for the request target."""

    head_bytes: int = 128 * 1024  # chunked auth cookies alone can pass 64 KiB
    line_bytes: int = 64 * 1024  # Bokeh sends 12 KB in Sec-WebSocket-Protocol; Apache's 8 KB break it
    fields: int = 200  # twice Apache's LimitRequestFields
    target_bytes: int = 16 * 1024  # nginx: 4 buffers of 8 KiB; gunicorn 4 KiB is too small for OAuth


class Framing:
    """The fields of one head that concern its connection only, in lower case; gathered and then dropped."""

    __slots__ = ("connection", "length", "transfer_encoding", "upgrade")

    def __init__(self) -> None:
        self.connection: list[bytes] | None = None
        self.length: int | None = None
        self.transfer_encoding: bytes | None = None
        self.upgrade: bytes | None = None

    def take_connection(self, value: bytes) -> None:
        """Add the options of a Connection field; raise FieldError where they are far more than anybody needs."""
        if value.count(b",") > _MAX_OPTIONS:
            raise FieldError("too many Connection options")
        self.connection = (self.connection or []) + parse_list(value)

    def take_length(self, value: bytes) -> None:
        """Note a Content-Length; raise FieldError where it is not the only one, or no number."""
        if self.length is not None:
            raise FieldError("several Content-Length fields")  # RFC 9112, section 6.3
        self.length = parse_content_length(value)

    def take_transfer_encoding(self, value: bytes) -> None:
        """Note a Transfer-Encoding; raise FieldError where it is not the only one."""
        if self.transfer_encoding is not None:
            raise FieldError("several Transfer-Encoding fields")
        self.transfer_encoding = value

    def take_upgrade(self, value: bytes) -> None:
        """Note the protocol of an Upgrade field; two of them name none."""
        self.upgrade = value if self.upgrade is None else b","

    @property
    def is_websocket(self) -> bool:
        """Say whether the head asks for, or agrees to, an upgrade to WebSocket (RFC 6455, section 4)."""
        return self.upgrade == b"websocket" and self.connection is not None and b"upgrade" in self.connection


def find_head_end(data: bytes | bytearray, start: int = 0) -> int:
    """Return the position after the empty line that ends a head, or -1 when it has not arrived."""
    end = data.find(b"\r\n\r\n", start)
    return end + 4 if end >= 0 else -1
