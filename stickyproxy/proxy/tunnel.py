"""A tunnel: two connections after 101, bytes relayed as they came, with a frame scanner beside each direction.

What the scanner knows lets the proxy end a tunnel with a Close frame where one frame has ended and the next has not
begun, so that a client learns why, instead of seeing its connection cut (RFC 6455, section 7.1.5: 1006).
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Final, Literal

from typing_extensions import override

from stickyproxy.wire.frames import (
    ABNORMAL,
    BAD_GATEWAY,
    GOING_AWAY,
    SERVICE_RESTART,
    FrameScanner,
    write_close,
)

if TYPE_CHECKING:
    from stickyproxy.affinity.sessions import Session
    from stickyproxy.observe.record import Record
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.proxy.pool import Pool

Initiator = Literal["client", "upstream", "proxy"]
_RETRY_S: Final = 0.1  # between two looks for a frame boundary; only while a tunnel is being closed
_FLUSH_S: Final = 60.0  # for a side to take the last bytes once the tunnel is over (nginx: send_timeout 60 s)


class _Discard(asyncio.Transport):
    """Where the bytes of a side go once its other side is done with."""

    @override
    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass


_DISCARD: Final = _Discard()


class Side(asyncio.Protocol):
    """One of the two connections; `other` is the transport that its bytes go to, `scanner` reads what it sends."""

    __slots__ = ("is_eof", "other", "received_bytes", "scanner", "transport", "tunnel")

    def __init__(
        self, tunnel: Tunnel, transport: asyncio.Transport, other: asyncio.Transport, counts: list[int]
    ) -> None:
        self.tunnel = tunnel
        self.transport = transport
        self.other = other
        self.scanner = FrameScanner(counts)
        self.received_bytes = 0
        self.is_eof = False

    @override
    def data_received(self, data: bytes) -> None:
        self.other.write(data)
        self.received_bytes += len(data)
        self.scanner.feed(data)

    @override
    def eof_received(self) -> bool:
        self.is_eof = True
        self.tunnel.on_eof(self)
        return True

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.tunnel.on_lost(self, exc)

    @override
    def pause_writing(self) -> None:
        self.tunnel.opposite(self).transport.pause_reading()

    @override
    def resume_writing(self) -> None:
        self.tunnel.opposite(self).transport.resume_reading()


class Tunnel:
    """A WebSocket on its way through the proxy. `client` and `upstream` are its sides once it is open."""

    __slots__ = (
        "_cause",
        "_initiator",
        "_is_over",
        "_is_shut",
        "_plane",
        "_pool",
        "_record",
        "_said",
        "_seen_at",
        "_seen_bytes",
        "_session",
        "_started_at",
        "_timer",
        "client",
        "upstream",
    )

    client: Side
    upstream: Side

    def __init__(self, plane: Plane, pool: Pool, session: Session | None, record: Record | None) -> None:
        self._plane = plane
        self._pool = pool
        self._session = session
        # Only a log needs the facts of the handshake; an idle tunnel should cost little.
        self._record = record
        self._started_at = perf_counter()
        self._initiator: Initiator | None = None
        self._cause = ""
        self._said = 0  # the code of the Close frame that the proxy sent of its own
        self._is_over = False
        self._is_shut = False
        self._timer: asyncio.TimerHandle | None = None
        self._seen_bytes = 0
        self._seen_at = plane.now

    def open(self, client: asyncio.Transport, upstream: asyncio.Transport) -> None:
        """Take over both connections; the 101 has been passed on."""
        counters = self._pool.counters
        self.client = Side(self, client, upstream, counters.frames_received)
        self.upstream = Side(self, upstream, client, counters.frames_sent)
        self.client.scanner.peer = self.upstream.scanner
        self.upstream.scanner.peer = self.client.scanner
        client.set_protocol(self.client)
        upstream.set_protocol(self.upstream)
        counters.tunnels += 1
        counters.tunnels_open += 1
        self._plane.tunnels.add(self)
        client.resume_reading()
        upstream.resume_reading()

    def opposite(self, side: Side) -> Side:
        """Return the other side."""
        return self.upstream if side is self.client else self.client

    @property
    def upstream_id(self) -> str:
        """Return the id of the upstream that holds the tunnel."""
        return self._pool.upstream_id

    def on_eof(self, side: Side) -> None:
        """Pass a half-close on; an upstream that ends without a Close frame has vanished."""
        self._blame(side, "eof")
        if side is self.upstream and not self._has_close:
            self._say_close(SERVICE_RESTART, "the application ended")
        if self.client.is_eof and self.upstream.is_eof:
            self._end()
            return
        _write_eof(self.opposite(side).transport)
        if side is self.upstream:
            self._end_within(self._plane.settings.timeouts.linger_s)

    def on_lost(self, side: Side, error: Exception | None) -> None:
        """Close the side that is left; a client is told why."""
        if self._is_over:
            return
        self._blame(side, "reset" if error is not None else "eof")
        other = self.opposite(side)
        other.other = _DISCARD
        if side is self.upstream and not self._has_close:
            self._say_close(BAD_GATEWAY if error is not None else SERVICE_RESTART, "the application broke off")
            _write_eof(other.transport)
            side.is_eof = True
            self._end_within(self._plane.settings.timeouts.linger_s)
            return
        self._end()

    def shut(self, code: int = GOING_AWAY, reason: str = "the proxy is going away", cause: str = "stopping") -> None:
        """Close both sides with a Close frame, each at its next frame boundary, and cut them if they do not follow."""
        if not (self._is_over or self._is_shut):
            self._is_shut = True
            self._seen_bytes = -1
            self._shut_at_boundary(code, reason, cause)

    def _shut_at_boundary(self, code: int, reason: str, cause: str, until: float = 0.0) -> None:
        """Shut now, or look again soon; a tunnel stuck in the middle of a frame is cut."""
        loop, linger_s = self._plane.loop, self._plane.settings.timeouts.linger_s
        if self._initiator is not None or self._has_close:  # it is ending already, and not waited for any longer
            self._blame(self.client, cause)
            if not (self._has_close or self.upstream.is_eof):
                self._say_close(code, reason)
            self._end_within(linger_s)
            return
        if not (self.client.scanner.is_at_boundary and self.upstream.scanner.is_at_boundary):
            passed, before = self.client.received_bytes + self.upstream.received_bytes, self._seen_bytes
            self._seen_bytes = passed
            until = until if passed == before else loop.time() + linger_s
            if loop.time() < until:
                self._timer = loop.call_later(_RETRY_S, self._shut_at_boundary, code, reason, cause, until)
            else:
                self._initiator, self._cause = "proxy", cause
                self._end()
            return
        self._initiator, self._cause = "proxy", cause
        self.client.transport.write(write_close(code, reason))
        self.upstream.transport.write(write_close(code, reason, mask=os.urandom(4)))
        self.client.other = self.upstream.other = _DISCARD
        self._said = code
        self._end_within(linger_s)

    def check_idle(self, now: float) -> None:
        """Close the tunnel if nothing has passed for the idle timeout. `now` is coarse monotonic seconds."""
        if self._is_shut:
            return
        passed = self.client.received_bytes + self.upstream.received_bytes
        if passed != self._seen_bytes:
            self._seen_bytes, self._seen_at = passed, now
        elif now - self._seen_at >= self._plane.settings.timeouts.tunnel_idle_s:
            self.shut(reason="nothing was sent for too long", cause="idle")

    def abort(self) -> None:
        """Cut both sides at once."""
        self._initiator = self._initiator or "proxy"
        self._cause = self._cause or "aborted"
        self._end(at_once=True)

    @property
    def _has_close(self) -> bool:
        return bool(self._said or self.client.scanner.close_code or self.upstream.scanner.close_code)

    def _blame(self, side: Side, cause: str) -> None:
        """Note who ended the tunnel, unless that is known: the first Close frame counts, then the first end."""
        if self._initiator is not None:
            return
        if self.client.scanner.is_first:
            self._initiator, self._cause = "client", "close_frame"
        elif self.upstream.scanner.is_first:
            self._initiator, self._cause = "upstream", "close_frame"
        else:
            self._initiator, self._cause = ("client" if side is self.client else "upstream"), cause

    def _say_close(self, code: int, reason: str) -> None:
        """Tell the client why its tunnel ends, if its stream stands at a frame boundary; else the cut says it."""
        if self.upstream.scanner.is_at_boundary and not self.client.transport.is_closing():
            self.client.transport.write(write_close(code, reason))
            self._said = code
            self.client.other = _DISCARD

    def _end_within(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._plane.loop.call_later(delay_s, self._end)

    def _end(self, *, at_once: bool = False) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for side in (self.client, self.upstream):
            if at_once:
                side.transport.abort()
            else:
                side.transport.close()
                if side.transport.get_write_buffer_size():
                    self._plane.loop.call_later(_FLUSH_S, side.transport.abort)
        self._count()

    def _count(self) -> None:
        plane, counters, client, upstream = self._plane, self._pool.counters, self.client, self.upstream
        plane.tunnels.discard(self)
        plane.on_closed()
        client.scanner.peer = upstream.scanner.peer = None
        counters.tunnels_open -= 1
        if self._session is not None:
            self._session.open -= 1
            plane.sessions.touch(self._session, plane.now)
        else:
            self._pool.strangers -= 1
        duration_s = perf_counter() - self._started_at
        initiator = self._initiator or "proxy"
        if self._cause == "close_frame":
            code = (client if initiator == "client" else upstream).scanner.close_code
        else:
            said = 0 if initiator == "client" else self._said  # a client that went away did not hear it
            code = said or client.scanner.close_code or upstream.scanner.close_code or ABNORMAL
        counters.count_close(initiator, code, self._cause)
        counters.tunnel_duration.observe(duration_s)
        counters.tunnel_received_bytes += client.received_bytes
        counters.tunnel_sent_bytes += upstream.received_bytes
        if plane.log is not None and self._record is not None:
            plane.log(
                replace(
                    self._record,
                    kind="tunnel",
                    duration_s=duration_s,
                    received_bytes=client.received_bytes,
                    sent_bytes=upstream.received_bytes,
                    close_code=code,
                    initiator=initiator,
                    cause=self._cause,
                )
            )

    @override
    def __repr__(self) -> str:
        return f"<Tunnel {self._pool.upstream_id} {'over' if self._is_over else 'open'}>"


def _write_eof(transport: asyncio.Transport) -> None:
    if not transport.is_closing() and transport.can_write_eof():
        transport.write_eof()
