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

from stickyproxy.observe.counters import NS, TUNNEL_RECEIVED_BYTES, TUNNEL_SENT_BYTES, TUNNELS, TUNNELS_OPEN
from stickyproxy.proxy.handover import SideState, TunnelState
from stickyproxy.proxy.pinger import Pinger
from stickyproxy.proxy.settings import OFF
from stickyproxy.proxy.socket_state import is_queued, is_reset
from stickyproxy.wire.frames import (
    ABNORMAL,
    BAD_GATEWAY,
    GOING_AWAY,
    SERVICE_RESTART,
    FrameScanner,
    write_close,
)
from stickyproxy.wire.pings import PongFilter

if TYPE_CHECKING:
    from stickyproxy.affinity.sessions import Session
    from stickyproxy.observe.record import Record
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.proxy.pool import Pool
    from stickyproxy.wire.forwarded import ConnectionOrigin

Initiator = Literal["client", "upstream", "proxy"]
_INITIATORS: Final[dict[str, Initiator]] = {"client": "client", "upstream": "upstream", "proxy": "proxy"}
_MAX_LINGERS: Final = 15  # times `linger_s`: 30 s by default, as nginx's lingering_time
_FLUSH_S: Final = 60.0  # at most, for a side to take the last bytes once the tunnel is over


class _Discard(asyncio.Transport):
    """Where the bytes of a side go once its other side is done with."""

    @override
    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass


_DISCARD: Final = _Discard()


class Side(asyncio.Protocol):
    """One of the two connections; `other` is the transport that its bytes go to, `scanner` reads what it sends.

    `tail` is what was written to `other` since that began to wait, None while nothing waits: it ends with the bytes
    that the kernel has not taken, as many as the size of that transport's buffer. The loop does not give them back.
    """

    __slots__ = ("filter", "is_eof", "other", "received_bytes", "scanner", "tail", "transport", "tunnel")

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
        self.transport = transport
        self.other = other
        self.scanner = FrameScanner(counts, is_masked=is_client)
        self.received_bytes = 0
        self.is_eof = False
        self.tail: bytes | None = None
        self.filter: PongFilter | None = None  # while a Ping of the proxy's own is unanswered

    @override
    def data_received(self, data: bytes) -> None:
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
        return self.transport.can_write_eof()  # not over TLS, which uvloop ends with its first half

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.tunnel.on_lost(self, exc)

    @override
    def pause_writing(self) -> None:
        opposite = self.tunnel.opposite(self)
        opposite.transport.pause_reading()
        if self.transport.can_write_eof():  # over TLS nobody knows what is unsent
            opposite.tail = b""

    @override
    def resume_writing(self) -> None:
        opposite = self.tunnel.opposite(self)
        opposite.tail = None
        if not opposite.is_eof:
            opposite.transport.resume_reading()

    @property
    def may_leave(self) -> bool:
        """Say whether another process could go on with the connection: all that is known of it can be told."""
        if self.transport.is_closing() or not self.transport.can_write_eof() or self.other is _DISCARD:
            return False
        return self.other.get_write_buffer_size() <= len(self.tail or b"")

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


class _Watch(asyncio.Protocol):
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


class _Ending(_Watch):
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


class _Farewell(_Watch):
    """For a client over TLS that was sent a Close frame: with its own, all is said.

    It would wait for the connection to be closed (RFC 6455, section 7.1.1), which over TLS cannot be done by half.
    """

    @override
    def data_received(self, data: bytes) -> None:
        self._side.data_received(data)
        if self._side.scanner.close_code:
            self._side.tunnel.end()


class Tunnel:
    """A WebSocket on its way through the proxy. `client` and `upstream` are its sides once it is open."""

    __slots__ = (
        "_cause",
        "_counted_received",
        "_counted_sent",
        "_ends_at",
        "_initiator",
        "_is_over",
        "_pinger",
        "_plane",
        "_pool",
        "_record",
        "_said",
        "_seen_at",
        "_seen_bytes",
        "_session",
        "_shut_as",
        "_started_at",
        "_timer",
        "client",
        "origin",
        "upstream",
    )

    client: Side
    upstream: Side

    def __init__(
        self, plane: Plane, pool: Pool, session: Session | None, record: Record | None, origin: ConnectionOrigin
    ) -> None:
        self._plane = plane
        self._pool = pool
        self._session = session
        # Only a log needs the facts of the handshake; an idle tunnel should cost little.
        self._record = record
        self.origin = origin
        self._started_at = perf_counter()
        self._initiator: Initiator | None = None
        self._cause = ""
        self._said = 0  # the code of the Close frame that the proxy sent of its own
        self._is_over = False
        self._counted_received = self._counted_sent = 0  # bytes that the counters of the upstream hold already
        self._shut_as: tuple[int, str, str] | None = None  # code, reason and cause
        self._timer: asyncio.TimerHandle | None = None
        self._seen_bytes = 0
        self._seen_at = plane.now
        timeouts, pings = plane.settings.timeouts, plane.settings.pings
        jitter = 1 + timeouts.tunnel_max_age_jitter_percent / 100 * (2 * plane.random() - 1)
        self._ends_at = plane.now + timeouts.tunnel_max_age_s * jitter
        self._pinger = None if pings is None else Pinger(pings, plane.now)

    def open(self, client: asyncio.Transport, upstream: asyncio.Transport) -> None:
        """Take over both connections; the 101 has been passed on."""
        self._join(client, upstream)
        self._pool.counters.cells[TUNNELS] += 1
        client.resume_reading()
        upstream.resume_reading()
        self._limit_buffers()

    def _join(self, client: asyncio.Transport, upstream: asyncio.Transport) -> None:
        """Make the sides, and count the tunnel as open."""
        counters = self._pool.counters
        self.client = Side(self, client, upstream, counters.frames_received, is_client=True)
        self.upstream = Side(self, upstream, client, counters.frames_sent, is_client=False)
        self.client.scanner.peer = self.upstream.scanner
        self.upstream.scanner.peer = self.client.scanner
        client.set_protocol(self.client)
        upstream.set_protocol(self.upstream)
        counters.cells[TUNNELS_OPEN] += 1
        self._plane.tunnels.add(self)

    def _limit_buffers(self) -> None:
        """Have a plain side say so at once when its kernel does not take all: what is unsent must be known."""
        for side in (self.client, self.upstream):
            if side.transport.can_write_eof():
                side.transport.set_write_buffer_limits(0)

    @property
    def transports(self) -> tuple[asyncio.Transport, ...]:
        """Return the transports of the client and of the upstream."""
        return self.client.transport, self.upstream.transport

    @property
    def pool(self) -> Pool:
        """Return the pool of the upstream that holds the tunnel."""
        return self._pool

    @property
    def is_ending(self) -> bool:
        """Say whether the end of the tunnel has begun, and is waited for here."""
        return self._is_over or self._shut_as is not None or self._timer is not None

    @property
    def is_tls(self) -> bool:
        """Say whether the proxy itself speaks TLS on one of the sides."""
        return not all(transport.can_write_eof() for transport in self.transports)

    @property
    def may_leave(self) -> bool:
        """Say whether another process could go on with the tunnel; one that is ending ends here."""
        return not self.is_ending and self.client.may_leave and self.upstream.may_leave

    def leave(self) -> None:
        """Do nothing more: another process goes on. What is counted stays so until `release`."""
        self._is_over = True
        self._plane.tunnels.discard(self)

    def export(self, unsent_to_client: int, unsent_to_upstream: int) -> TunnelState:
        """Return where the tunnel stands; the kernel has not taken so many bytes of what was written to each side."""
        session, now = self._session, self._plane.now
        return TunnelState(
            client=self.client.export(unsent_to_upstream),
            upstream=self.upstream.export(unsent_to_client),
            origin=self.origin,
            upstream_id=self._pool.upstream_id,
            digest=self._pool.digest,
            client_id=b"" if session is None else session.client_id,
            pinned_to=b"" if session is None else session.digest,
            pinned_at=0 if session is None else session.pinned_at,
            record=self._record,
            pinger=None if self._pinger is None else self._pinger.export(now),
            age_s=perf_counter() - self._started_at,
            left_s=None if self._ends_at == OFF else max(0.0, self._ends_at - now),
            idle_s=max(0.0, now - self._seen_at),
            seen_bytes=self._seen_bytes,
            initiator=self._initiator or "",
            cause=self._cause,
        )

    def go_on(self, client: asyncio.Transport, upstream: asyncio.Transport, state: TunnelState) -> None:
        """Take over both connections from another process; neither is read yet."""
        plane = self._plane
        self._join(client, upstream)
        self._started_at -= state.age_s
        self._seen_bytes, self._seen_at = state.seen_bytes, plane.now - state.idle_s
        self._initiator, self._cause = _INITIATORS.get(state.initiator), state.cause
        if state.left_s is not None and self._ends_at != OFF:
            self._ends_at = plane.now + state.left_s
        if state.pinger is not None and self._pinger is not None:
            self._pinger.go_on_from(state.pinger, plane.now)
        self.client.go_on_from(state.client)
        self.upstream.go_on_from(state.upstream)
        self._counted_received, self._counted_sent = self.client.received_bytes, self.upstream.received_bytes
        for side in (self.client, self.upstream):
            if not side.is_eof:
                side.transport.resume_reading()
        self._limit_buffers()  # before anything is written: the writes below may stop the reading again
        self.client.pass_on(state.client.unsent)
        self.upstream.pass_on(state.upstream.unsent)
        for side in (self.client, self.upstream):
            if side.is_eof:
                _write_eof(self.opposite(side).transport)
        if plane.is_stopping:
            self.shut()

    def opposite(self, side: Side) -> Side:
        """Return the other side."""
        return self.upstream if side is self.client else self.client

    @property
    def upstream_id(self) -> str:
        """Return the id of the upstream that holds the tunnel."""
        return self._pool.upstream_id

    def say(self, side: Side, frame: bytes) -> None:
        """Write a frame of the proxy's own to a side, where the frames of the other one stand at a boundary."""
        side.transport.write(frame)
        opposite = self.opposite(side)
        if opposite.tail is not None:
            opposite.tail += frame

    def on_eof(self, side: Side) -> None:
        """Pass a half-close on; an upstream that ends without a Close frame has vanished."""
        self._blame(side, "eof")
        if side is self.upstream and not self._has_close:
            self._say_close(SERVICE_RESTART, "the application ended")
        if self.client.is_eof and self.upstream.is_eof:
            self.end()
            return
        _write_eof(self.opposite(side).transport)
        if side is self.upstream:
            self._say_farewell()

    def on_lost(self, side: Side, error: Exception | None) -> None:
        """Close the side that is left; a client is told why."""
        if self._is_over:
            return
        if side is self.upstream and side.is_eof and self._timer is not None:  # over TLS its loss follows its end
            self.client.other = _DISCARD
            return
        self._blame(side, "reset" if error is not None else "eof")
        other = self.opposite(side)
        other.other = _DISCARD
        if side is self.upstream and not self._has_close:
            self._say_close(BAD_GATEWAY if error is not None else SERVICE_RESTART, "the application broke off")
            _write_eof(other.transport)
            side.is_eof = True
            self._say_farewell()
            return
        self.end()

    def shut(self, code: int = GOING_AWAY, reason: str = "the proxy is going away", cause: str = "stopping") -> None:
        """Close both sides with a Close frame, each at its next frame boundary, and cut them if they do not follow."""
        if self._is_over or self._shut_as is not None:
            return
        self._shut_as = code, reason, cause
        if self._initiator is not None or self._has_close:  # it is ending already, and not waited for any longer
            self._blame(self.client, cause)
            if not (self._has_close or self.upstream.is_eof):
                self._say_close(code, reason)
            self._end_within(self._plane.settings.timeouts.linger_s)
            return
        for side in (self.client, self.upstream):
            if side.scanner.is_at_boundary:
                self.close_direction(side)
            else:
                side.transport.set_protocol(_Ending(side))
        if self._timer is None:
            self._wait_for_boundary(-1)

    def close_direction(self, side: Side) -> None:
        """End what a side sends, at a frame boundary, with a Close frame to the other; what still comes is dropped."""
        if self._is_over or self._shut_as is None or side.other is _DISCARD:
            return
        code, reason, cause = self._shut_as
        opposite = self.opposite(side)
        if not side.scanner.close_code:
            mask = os.urandom(4) if opposite is self.upstream else None
            self.say(opposite, write_close(code, reason, mask=mask))
            if self._initiator is None:
                self._initiator, self._cause = "proxy", cause
            if opposite is self.client:
                self._said = code
        side.other = _DISCARD
        if opposite.other is _DISCARD:
            self._end_within(self._plane.settings.timeouts.linger_s)

    def _wait_for_boundary(self, before: int) -> None:
        """Wait for a side in the middle of a frame for as long as it goes on; one that is stuck there is cut."""
        passed = self.client.received_bytes + self.upstream.received_bytes
        if passed == before:
            self._blame_proxy()
            self.end()
        else:
            linger_s = self._plane.settings.timeouts.linger_s
            self._timer = self._plane.loop.call_later(linger_s, self._wait_for_boundary, passed)

    def _blame_proxy(self) -> None:
        if self._initiator is None and self._shut_as is not None:
            self._initiator, self._cause = "proxy", self._shut_as[2]

    def sweep(self, now: float) -> None:
        """Close the tunnel if it is too old, or idle for too long, or a side is gone; send the Pings that are due.

        `now` is coarse monotonic seconds.
        """
        if self._is_over or self._shut_as is not None:
            return
        passed = self.client.received_bytes + self.upstream.received_bytes
        if passed != self._seen_bytes:
            self._seen_bytes, self._seen_at = passed, now
        elif now - self._seen_at >= self._plane.settings.timeouts.tunnel_idle_s:
            self.shut(reason="nothing was sent for too long", cause="idle")
            return
        if now >= self._ends_at:
            self.shut(SERVICE_RESTART, "the connection has reached its age", "max_age")
        elif self._pinger is not None and not self._has_close:
            silent = self._pinger.sweep(self.client, self.upstream, now)
            if silent is not None:
                self._on_silent(silent)

    def _on_silent(self, side: Side) -> None:
        """Give up a side that has not answered a Ping, and tell the other one."""
        self._blame(side, "ping_timeout")
        side.transport.abort()

    def count_bytes(self) -> None:
        """Count what both sides have sent since the last time."""
        received, sent = self.client.received_bytes, self.upstream.received_bytes
        if received != self._counted_received or sent != self._counted_sent:
            cells = self._pool.counters.cells
            cells[TUNNEL_RECEIVED_BYTES] += received - self._counted_received
            cells[TUNNEL_SENT_BYTES] += sent - self._counted_sent
            self._counted_received, self._counted_sent = received, sent

    def drop_reset(self) -> None:
        """Drop a side that was reset while it was not read, since the other one takes nothing."""
        for side in (self.client, self.upstream):
            if not side.transport.is_reading() and is_reset(side.transport):
                side.transport.abort()

    def abort(self) -> None:
        """Cut both sides at once."""
        self._initiator = self._initiator or "proxy"
        self._cause = self._cause or "aborted"
        self.end(at_once=True)

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
            self.say(self.client, write_close(code, reason))
            self._said = code
            self.client.other = _DISCARD

    def _say_farewell(self) -> None:
        """Let the client answer the last Close frame, its application's or the proxy's own."""
        client = self.client
        if not client.transport.can_write_eof():
            if client.scanner.close_code:
                self.end()
                return
            client.transport.set_protocol(_Farewell(client))
        self._end_when_quiet()

    def _end_when_quiet(self, times: int = _MAX_LINGERS) -> None:
        """End once the client has stopped sending, so that no reset overtakes the Close frame on its way to it."""
        before = self.client.received_bytes

        def look() -> None:
            if self.client.received_bytes != before and times > 0:
                self._end_when_quiet(times - 1)
            else:
                self.end()

        self._stop_timer()
        self._timer = self._plane.loop.call_later(self._plane.settings.timeouts.linger_s, look)

    def _end_within(self, delay_s: float) -> None:
        self._stop_timer()
        self._timer = self._plane.loop.call_later(delay_s, self.end)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def end(self, *, at_once: bool = False) -> None:
        """Close both connections, once all is sent or at once, and count the tunnel."""
        if self._is_over:
            return
        self._is_over = True
        self._stop_timer()
        timeouts = self._plane.settings.timeouts
        for side in (self.client, self.upstream):
            if at_once:
                side.transport.abort()
            else:
                side.transport.close()
                is_tls = not side.transport.can_write_eof()  # and waits for the other end to close too
                if side.transport.get_write_buffer_size() or (is_tls and is_queued(side.transport)):
                    self._plane.loop.call_later(min(timeouts.send_s, _FLUSH_S), side.transport.abort)
                elif is_tls:
                    self._plane.loop.call_later(timeouts.linger_s, side.transport.abort)
        self._count()

    def release(self) -> None:
        """Count the tunnel as open no more."""
        plane = self._plane
        plane.tunnels.discard(self)
        plane.on_closed(self.origin)
        self.client.scanner.peer = self.upstream.scanner.peer = None
        self.count_bytes()
        self._pool.counters.cells[TUNNELS_OPEN] -= 1
        if self._session is not None:
            self._session.open -= 1
            plane.sessions.touch(self._session, plane.now)
        else:
            self._pool.strangers -= 1

    def lose(self) -> None:
        """Count a tunnel as ended that nobody could go on with."""
        self._initiator = self._initiator or "proxy"
        self._cause = self._cause or "aborted"
        self._count()

    def _count(self) -> None:
        plane, counters, client, upstream = self._plane, self._pool.counters, self.client, self.upstream
        self.release()
        duration_s = perf_counter() - self._started_at
        initiator = self._initiator or "proxy"
        if self._cause == "close_frame":
            code = (client if initiator == "client" else upstream).scanner.close_code
        else:
            said = 0 if initiator == "client" else self._said  # a client that went away did not hear it
            code = said or client.scanner.close_code or upstream.scanner.close_code or ABNORMAL
        counters.count_close(initiator, code, self._cause)
        counters.observe_tunnel(int(duration_s * NS))
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
