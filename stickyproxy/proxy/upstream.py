"""A connection to an upstream: reads response heads, and gives what comes to the exchange that holds it."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final, cast

from typing_extensions import override

from stickyproxy.errors import ResponseError
from stickyproxy.wire.head import MAX_PIECES, find_head_end
from stickyproxy.wire.response_head import parse_response_head

if TYPE_CHECKING:
    from stickyproxy.proxy.exchange import Exchange
    from stickyproxy.proxy.pool import Pool

_BARE_LINE_END: Final = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")


class UpstreamConnection(asyncio.Protocol):
    """One connection to an upstream; idle in its pool, or held by one exchange."""

    __slots__ = (
        "_held",
        "_pieces",
        "exchange",
        "has_eof",
        "idle_since",
        "is_reused",
        "pool",
        "reads_head",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.exchange: Exchange | None = None
        self.reads_head = True
        self.idle_since = 0.0
        self.is_reused = False
        self.has_eof = False
        self._held: bytearray | None = None
        self._pieces = 0

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(self.pool.buffer_bytes)

    @override
    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            # Nobody asked: a second response, or bytes after the last one. The connection cannot be trusted.
            self.pool.forget(self)
            self.transport.abort()
            return
        crowd = exchange.plane.crowd
        crowd.left -= 1
        if crowd.left < 0:
            crowd.on_spent(self.transport)
        if not self.reads_head:
            exchange.on_response_body(data)
        else:
            self._read_head(exchange, data)

    def _read_head(self, exchange: Exchange, data: bytes) -> None:
        start = 0
        if self._held is None:
            end = find_head_end(data)
        else:
            start = max(0, len(self._held) - 3)
            self._held += data
            end = find_head_end(self._held, start)
        limits = exchange.plane.settings.head
        if end < 0:
            if self._held is None:
                self._held = bytearray(data)
                self._pieces = 0
            self._pieces += 1
            if len(self._held) > limits.head_bytes:
                exchange.fail(
                    ResponseError("the response head is too large", proxy_status="http_response_header_section_size")
                )
            elif not self._held.startswith(b"HTTP/1."[: len(self._held)]):
                exchange.fail(ResponseError("the upstream sent an invalid status line"))
            elif _BARE_LINE_END.search(self._held, start):  # no head can come of it; do not wait for the timeout
                exchange.fail(ResponseError("the upstream sent a bare CR or LF in the response head"))
            elif self._pieces > MAX_PIECES:
                exchange.fail(ResponseError("the upstream sent the response head in too many pieces"))
            return
        if self._held is not None:
            data, self._held = bytes(self._held), None
        try:
            head = parse_response_head(data, end, limits, exchange.head.method)
        except ResponseError as error:
            exchange.fail(error)
            return
        exchange.on_response_head(head, data[end:])

    @override
    def eof_received(self) -> bool:
        self.has_eof = True
        # What it has not taken yet, it would not answer any more; a close would wait until it takes it.
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        return False

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self.exchange is not None:
            self.exchange.on_upstream_lost(self, exc)
        else:
            self.pool.forget(self)

    @override
    def pause_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.pause_request()

    @override
    def resume_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.resume_request()

    @property
    def has_begun(self) -> bool:
        """Say whether a part of a response head has come."""
        return self._held is not None

    @property
    def is_closing(self) -> bool:
        """Say whether the connection is closed or about to be."""
        return self.transport.is_closing()

    def release(self, *, reusable: bool) -> None:
        """Part from the exchange: back to the pool, or closed."""
        self.exchange = None
        self.reads_head = True
        if reusable and not self.transport.is_closing():
            self.pool.give_back(self)
        else:
            self.transport.abort()

    def close(self) -> None:
        """Close an idle connection."""
        self.transport.close()

    @override
    def __repr__(self) -> str:
        state = "idle" if self.exchange is None else "reads head" if self.reads_head else "reads body"
        return f"<UpstreamConnection {self.pool.upstream_id} {state}{' reused' if self.is_reused else ''}>"
