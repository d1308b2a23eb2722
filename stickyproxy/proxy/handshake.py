"""What comes before the first request of a connection: a PROXY protocol header, the TLS handshake, or both.

A `Downstream` takes over once both are done. Until then the connection counts towards the limits, and is cut after
`tls_handshake_s`. Only connections of such listeners come this way; the task that TLS needs is one for each
connection, not for each exchange.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import TYPE_CHECKING, Final, cast

from typing_extensions import override

from stickyproxy.observe.counters import HANDSHAKES
from stickyproxy.proxy.downstream import Downstream
from stickyproxy.tasks import spawn
from stickyproxy.wire.proxy_protocol import V2_MAX_BYTES, ProxyHeaderError, parse_proxy_header

if TYPE_CHECKING:
    from stickyproxy.proxy.listener import Listener
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.wire.forwarded import ConnectionOrigin
    from stickyproxy.wire.proxy_protocol import ProxyHeader

logger = logging.getLogger(__name__)

_FLOOD: Final = 2  # times the connections that an address may have
# The proxy ends a TLS connection itself, by its own deadlines; uvloop's would cut a slow client in the middle.
_SHUTDOWN_S: Final = 3600.0


class Handshake(asyncio.Protocol):
    """A connection before its first request; it stays the protocol, of the TLS layer too, until all is done."""

    def __init__(self, plane: Plane, listener: Listener) -> None:
        self._plane = plane
        self._listener = listener
        self._held = bytearray()  # what came before somebody could take it
        self._header: ProxyHeader | None = None
        self._is_securing = False
        self._is_layered = False  # what comes now comes out of the TLS layer
        self.origin: ConnectionOrigin | None = None  # counted until somebody else does
        self.deadline = plane.now + plane.settings.timeouts.tls_handshake_s
        self.transport: asyncio.Transport

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        plane, listener = self._plane, self._listener
        plane.handshakes.add(self)
        plane.on_accepted()
        if plane.is_stopping:
            self.transport.close()
        elif not listener.role.proxy_protocol:
            self._go_on()
        elif not listener.is_trusted(address := listener.peer_address(transport)):
            self._refuse(f"{address} is none of the trusted proxies")

    @override
    def data_received(self, data: bytes) -> None:
        self._held += data
        if self._is_layered:
            return  # a request that came right behind the handshake, before the task could go on
        if self._is_securing:
            self.transport.pause_reading()  # only until the task of the TLS handshake has begun
            return
        try:
            header = parse_proxy_header(bytes(self._held[:V2_MAX_BYTES]))
        except ProxyHeaderError as error:
            self._refuse(str(error))
            return
        if header is not None:
            del self._held[: header.size_bytes]
            self._header = header
            self._go_on()

    def _refuse(self, reason: str) -> None:
        address = self._listener.peer_address(self.transport)
        logger.warning("PROXY protocol: connection from %s to %s refused: %s", address, self._listener.address, reason)
        self._plane.counters.cells[HANDSHAKES["proxy_protocol_refused"]] += 1
        self.transport.abort()

    def _go_on(self) -> None:
        """Go on with TLS, or with the first request where there is none."""
        plane, tls = self._plane, self._listener.role.tls
        if tls is not None:
            # A client with too many connections is answered with 503; one that goes on is spared the handshake.
            self.origin = self._listener.forwarded_writer(self.transport, self._header).origin
            if not plane.addresses.admit(self.origin, times=_FLOOD):
                self.transport.abort()
                return
            self._is_securing = True
            spawn(self._secure(tls), "TLS handshake")
            # The task's first step stops reading and queues two callbacks, which make the TLS layer and read again;
            # what came before goes to the layer right behind them.
            plane.loop.call_soon(plane.loop.call_soon, self._feed)
            return
        self._hand_over(self.transport)

    async def _secure(self, tls: ssl.SSLContext) -> None:
        plane = self._plane
        if self.transport.is_closing():
            return
        try:
            transport = await plane.loop.start_tls(
                self.transport,
                self,
                tls,
                server_side=True,
                ssl_handshake_timeout=plane.settings.timeouts.tls_handshake_s,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
        except OSError as error:  # ssl.SSLError is one
            self._fail(_explain(error))
            return
        if transport is None or transport.get_extra_info("cipher") is None:
            self._fail("closed")  # by the proxy itself: uvloop does not call that a failure
            return
        plane.counters.cells[HANDSHAKES["tls_completed"]] += 1
        if not (transport.is_closing() or self.transport.is_closing()):
            # While nothing is read of it, the layer must not read on: at an end of file it drops what it holds.
            transport.set_read_buffer_limits(1)  # type: ignore[attr-defined]  # of uvloop
            self._hand_over(transport)

    def _feed(self) -> None:
        """Give the TLS layer what came before it was there."""
        layer = self.transport.get_protocol()
        if layer is self or self.transport.is_closing():
            return
        self._is_layered = True
        held, self._held = self._held, bytearray()
        while held:
            room = layer.get_buffer(len(held))  # type: ignore[attr-defined]  # an asyncio.BufferedProtocol
            size = min(len(room), len(held))
            room[:size] = held[:size]
            del held[:size]
            layer.buffer_updated(size)  # type: ignore[attr-defined]

    def _fail(self, reason: str) -> None:
        self._plane.counters.cells[HANDSHAKES["tls_failed"]] += 1
        logger.debug("TLS handshake with %s failed: %s", self._listener.peer_address(self.transport), reason)
        self._end()

    def _hand_over(self, transport: asyncio.Transport) -> None:
        """Let a `Downstream` go on, with what it has of the first request."""
        downstream = Downstream(self._plane, self._listener, self._header)
        transport.set_protocol(downstream)
        self._plane.handshakes.discard(self)
        if self.origin is not None:
            self._plane.addresses.release(self.origin)
        downstream.connection_made(transport)
        if self._held:
            downstream.data_received(bytes(self._held))

    def _end(self) -> None:
        if self in self._plane.handshakes:  # a failed handshake ends twice: for the task, and for the connection
            self._plane.handshakes.discard(self)
            self._plane.on_closed(self.origin)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def abort(self) -> None:
        """Cut the connection: it has not said in time who it is, or the proxy is stopping."""
        self.transport.abort()

    @override
    def __repr__(self) -> str:
        return f"<Handshake {'TLS' if self._is_securing else 'PROXY header'}>"


def _explain(error: OSError) -> str:
    return (error.reason if isinstance(error, ssl.SSLError) else str(error)) or type(error).__name__
