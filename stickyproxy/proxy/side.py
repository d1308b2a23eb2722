"""One side of a tunnel: what comes from one of its two connections, and what waits to be written to that connection.

A side passes bytes on as they came and lets a scanner read the frame headers beside them; what its end means is for
the tunnel to say. The watchers stand before a side whose end is near, in the middle of a frame or of a farewell.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.proxy.handover import SideState
from stickyproxy.proxy.socket_state import is_queued, is_reset
from stickyproxy.wire.frames import FrameScanner
from stickyproxy.wire.pings import PongFilter

if TYPE_CHECKING:
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.proxy.tunnel import Tunnel

_FLUSH_S: Final = 60.0  # at most, for a side to take the last bytes once the tunnel is over


class _Discard(asyncio.Transport):
    """Where the bytes of a side go once its other side is done with."""

    @override
    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass


DISCARD: Final = _Discard()


class Side(asyncio.Protocol):
    """One of the two connections; `other` is the transport that its bytes go to, `scanner` reads what it sends.

    `tail` is what was written to `other` since that began to wait, None while nothing waits: it ends with the bytes
    that the kernel has not taken, as many as the size of that transport's buffer. The loop does not give them back.
    """

    __slots__ = ("_crowd", "filter", "is_eof", "other", "received_bytes", "scanner", "tail", "transport", "tunnel")

    def __init__(
        self,
        tunnel: Tunnel,
        transport: asyncio.Transport,
        other: asyncio.Transport,
        counts: memoryview[int],
        *,
        is_client: bool,
    ) -> None:
        self.tunnel = tunnel
        self._crowd = tunnel.crowd
        self.transport = transport
        self.other = other
        self.scanner = FrameScanner(counts, is_masked=is_client)
        self.received_bytes = 0
        self.is_eof = False
        self.tail: bytes | None = None
        self.filter: PongFilter | None = None  # while a Ping of the proxy's own is unanswered

    @override
    def data_received(self, data: bytes) -> None:
        crowd = self._crowd
        crowd.left -= 1
        if crowd.left < 0:
            crowd.on_spent(self.transport)
        if self.filter is not None:
            data = self.filter.feed(data)
            if self.filter.pongs and self.filter.is_at_rest:
                self.filter = None
        self.other.write(data)
        if self.tail is not None:
            self.tail += data
        self.received_bytes += len(data)
        self.scanner.feed(data)

    def pass_on(self, data: bytes) -> None:
        """Write to the other side what is not to be counted as coming from this one now."""
        self.other.write(data)
        if self.tail is not None:
            self.tail += data

    @override
    def eof_received(self) -> bool:
        self.is_eof = True
        if self.filter is not None and self.filter.held:
            self.pass_on(self.filter.held)
        self.tunnel.on_eof(self)
        return not self.is_tls  # which uvloop ends with its first half

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.tunnel.on_lost(self, exc)

    @override
    def pause_writing(self) -> None:
        opposite = self.tunnel.opposite(self)
        self._crowd.pause(opposite.transport)
        if self.transport.can_write_eof():  # over TLS nobody knows what is unsent
            opposite.tail = b""

    @override
    def resume_writing(self) -> None:
        opposite = self.tunnel.opposite(self)
        opposite.tail = None
        if not opposite.is_eof:
            self._crowd.resume(opposite.transport)

    @property
    def may_leave(self) -> bool:
        """Say whether another process could go on with the side: all that is known of it can be told."""
        if self.transport.is_closing() or self.is_tls or self.other is DISCARD:
            return False
        return self.other.get_write_buffer_size() <= len(self.tail or b"")

    @property
    def is_tls(self) -> bool:
        """Say whether the proxy itself speaks TLS on the connection: then nobody knows what of it is unsent."""
        return not self.transport.can_write_eof()

    def limit_buffer(self) -> None:
        """Have the transport say so at once when the kernel does not take all: what is unsent must be known."""
        if not self.is_tls:
            self.transport.set_write_buffer_limits(0)

    def say(self, frame: bytes) -> None:
        """Write a frame of the proxy's own to the side, where the frames of the other one stand at a boundary."""
        self.transport.write(frame)
        opposite = self.tunnel.opposite(self)
        if opposite.tail is not None:
            opposite.tail += frame

    def write_eof(self) -> None:
        """Tell the side that nothing more will come; over TLS that cannot be said."""
        if not (self.transport.is_closing() or self.is_tls):
            self.transport.write_eof()

    def drop_reset(self) -> None:
        """Drop the side if it was reset while it was not read, since the other one takes nothing."""
        transport = self.transport
        if not (transport.is_reading() or self._crowd.holds(transport)) and is_reset(transport):
            transport.abort()

    def close(self, plane: Plane) -> None:
        """Close the connection once all is sent; one that does not take it, or does not close too, is cut in time."""
        self.transport.close()
        timeouts = plane.settings.timeouts
        is_tls = self.is_tls  # and waits for the other end to close too
        if self.transport.get_write_buffer_size() or (is_tls and is_queued(self.transport)):
            plane.loop.call_later(min(timeouts.send_s, _FLUSH_S), self.transport.abort)
        elif is_tls:
            plane.loop.call_later(timeouts.linger_s, self.transport.abort)

    def export(self, unsent_bytes: int) -> SideState:
        """Return where the side stands; the kernel has not taken so many bytes of what it sent."""
        tail = self.tail or b""
        return SideState(
            scanner=self.scanner.export(),
            filter=None if self.filter is None else self.filter.export(),
            received_bytes=self.received_bytes,
            is_eof=self.is_eof,
            unsent=tail[len(tail) - unsent_bytes :],
        )

    def go_on_from(self, state: SideState) -> None:
        """Go on where the side stood in another process; raise ValueError where that cannot be."""
        self.scanner.go_on_from(state.scanner)
        if state.filter is not None:
            self.filter = PongFilter.going_on_from(state.filter, self.scanner)
        self.received_bytes, self.is_eof = state.received_bytes, state.is_eof


class Watch(asyncio.Protocol):
    """Stands before a side whose end is near, and sees what comes from it."""

    def __init__(self, side: Side) -> None:
        self._side = side

    @override
    def eof_received(self) -> bool:
        return self._side.eof_received()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._side.connection_lost(exc)

    @override
    def pause_writing(self) -> None:
        self._side.pause_writing()

    @override
    def resume_writing(self) -> None:
        self._side.resume_writing()


class Ending(Watch):
    """For a side in the middle of a frame: passes on the rest of it, and then ends what the side sends."""

    @override
    def data_received(self, data: bytes) -> None:
        side, at = self._side, 0
        scanner = side.scanner
        while at < len(data) and not scanner.is_at_boundary:
            piece = data[at : at + (scanner.left_bytes or 1)]  # byte by byte while the size of the frame is unknown
            at += len(piece)
            side.data_received(piece)
        if scanner.is_at_boundary:
            side.transport.set_protocol(side)
            side.tunnel.close_direction(side)
            if at < len(data):
                side.data_received(data[at:])


class Farewell(Watch):
    """For a client over TLS that was sent a Close frame: with its own, all is said.

    It would wait for the connection to be closed (RFC 6455, section 7.1.1), which over TLS cannot be done by half.
    """

    @override
    def data_received(self, data: bytes) -> None:
        self._side.data_received(data)
        if self._side.scanner.close_code:
            self._side.tunnel.end()
