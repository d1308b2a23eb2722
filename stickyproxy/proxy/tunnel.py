"""A tunnel: two connections after 101, bytes relayed as they came, with a frame scanner beside each direction.

What the scanner knows lets the proxy end a tunnel with a Close frame where one frame has ended and the next has not
begun, so that a client learns why, instead of seeing its connection cut (RFC 6455, section 7.1.5: 1006).
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

from typing_extensions import override

from stickyproxy.observe.counters import NS, TUNNEL_RECEIVED_BYTES, TUNNEL_SENT_BYTES, TUNNELS, TUNNELS_OPEN
from stickyproxy.proxy.handover import TunnelState
from stickyproxy.proxy.pinger import Pinger
from stickyproxy.proxy.settings import OFF
from stickyproxy.proxy.side import Side
from stickyproxy.proxy.tunnel_end import INITIATORS, TunnelEnd
from stickyproxy.wire.frames import GOING_AWAY, SERVICE_RESTART

if TYPE_CHECKING:
    import asyncio

    from stickyproxy.affinity.sessions import Session
    from stickyproxy.observe.record import Record
    from stickyproxy.proxy.crowd import Crowd
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.proxy.pool import Pool
    from stickyproxy.wire.forwarded import ConnectionOrigin


class Tunnel:
    """A WebSocket on its way through the proxy. `client` and `upstream` are its sides once it is open."""

    __slots__ = (
        "_counted_received",
        "_counted_sent",
        "_end",
        "_ends_at",
        "_is_over",
        "_pinger",
        "_plane",
        "_pool",
        "_record",
        "_seen_at",
        "_seen_bytes",
        "_session",
        "_started_at",
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
        self._end: TunnelEnd | None = None  # an open tunnel has none
        self._is_over = False
        self._counted_received = self._counted_sent = 0  # bytes that the counters of the upstream hold already
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
        self.crowd.resume(client)
        self.crowd.resume(upstream)
        for side in self.sides:
            side.limit_buffer()

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

    @property
    def sides(self) -> tuple[Side, Side]:
        """Return the client's side and the upstream's."""
        return self.client, self.upstream

    @property
    def transports(self) -> tuple[asyncio.Transport, ...]:
        """Return the transports of the client and of the upstream."""
        return self.client.transport, self.upstream.transport

    def opposite(self, side: Side) -> Side:
        """Return the other side."""
        return self.upstream if side is self.client else self.client

    @property
    def crowd(self) -> Crowd:
        """Return what counts the reads of its sides."""
        return self._plane.crowd

    @property
    def session(self) -> Session | None:
        """Return the session that it holds, None where its client has none."""
        return self._session

    @property
    def pool(self) -> Pool:
        """Return the pool of the upstream that holds the tunnel."""
        return self._pool

    @property
    def upstream_id(self) -> str:
        """Return the id of the upstream that holds the tunnel."""
        return self._pool.upstream_id

    @property
    def passed_bytes(self) -> int:
        """Return how much has come from both sides."""
        return self.client.received_bytes + self.upstream.received_bytes

    @property
    def has_close(self) -> bool:
        """Say whether a Close frame has passed, either way, or the proxy has sent the client one of its own."""
        said = self._end is not None and self._end.said
        return bool(said or self.client.scanner.close_code or self.upstream.scanner.close_code)

    # While it is open

    def sweep(self, now: float) -> None:
        """Close the tunnel if it is too old, or idle for too long, or a side is gone; send the Pings that are due.

        `now` is coarse monotonic seconds.
        """
        if self._is_over or (self._end is not None and self._end.is_shut):
            return
        passed = self.passed_bytes
        if passed != self._seen_bytes:
            self._seen_bytes, self._seen_at = passed, now
        elif now - self._seen_at >= self._plane.settings.timeouts.tunnel_idle_s:
            self.shut(reason="nothing was sent for too long", cause="idle")
            return
        if now >= self._ends_at:
            self.shut(SERVICE_RESTART, "the connection has reached its age", "max_age")
        elif self._pinger is not None and not self.has_close:
            silent = self._pinger.sweep(self.client, self.upstream, now)
            if silent is not None:  # given up; the other one is told
                self._ending.blame(silent, "ping_timeout")
                silent.transport.abort()

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
        for side in self.sides:
            side.drop_reset()

    # On its way to another process, or from there

    @property
    def is_ending(self) -> bool:
        """Say whether the end of the tunnel has begun, and is waited for here."""
        return self._is_over or (self._end is not None and self._end.is_awaited)

    @property
    def is_tls(self) -> bool:
        """Say whether the proxy itself speaks TLS on one of the sides."""
        return self.client.is_tls or self.upstream.is_tls

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
        session, end, now = self._session, self._end, self._plane.now
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
            initiator="" if end is None else end.initiator or "",
            cause="" if end is None else end.cause,
        )

    def go_on(self, client: asyncio.Transport, upstream: asyncio.Transport, state: TunnelState) -> None:
        """Take over both connections from another process; neither is read yet."""
        plane = self._plane
        self._join(client, upstream)
        self._started_at -= state.age_s
        self._seen_bytes, self._seen_at = state.seen_bytes, plane.now - state.idle_s
        if state.initiator:
            self._end = TunnelEnd(self, plane, INITIATORS.get(state.initiator), state.cause)
        if state.left_s is not None and self._ends_at != OFF:
            self._ends_at = plane.now + state.left_s
        if state.pinger is not None and self._pinger is not None:
            self._pinger.go_on_from(state.pinger, plane.now)
        self.client.go_on_from(state.client)
        self.upstream.go_on_from(state.upstream)
        self._counted_received, self._counted_sent = self.client.received_bytes, self.upstream.received_bytes
        for side in self.sides:
            if not side.is_eof:
                side.transport.resume_reading()
            side.limit_buffer()  # before anything is written: the writes below may stop the reading again
        self.client.pass_on(state.client.unsent)
        self.upstream.pass_on(state.upstream.unsent)
        for side in self.sides:
            if side.is_eof:
                self.opposite(side).write_eof()
        if plane.is_stopping:
            self.shut()

    # Its end

    @property
    def _ending(self) -> TunnelEnd:
        """Return the end of the tunnel, which begins with the first use."""
        if self._end is None:
            self._end = TunnelEnd(self, self._plane)
        return self._end

    def on_eof(self, side: Side) -> None:
        """Act on the end of what a side sends."""
        self._ending.on_eof(side)

    def on_lost(self, side: Side, error: Exception | None) -> None:
        """Act on the loss of a side's connection."""
        if not self._is_over:
            self._ending.on_lost(side, error)

    def shut(self, code: int = GOING_AWAY, reason: str = "the proxy is going away", cause: str = "stopping") -> None:
        """Close both sides with a Close frame, each at its next frame boundary, and cut them if they do not follow."""
        if not self._is_over:
            self._ending.shut(code, reason, cause)

    def close_direction(self, side: Side) -> None:
        """End what a side sends: it stands at the frame boundary that was waited for."""
        if not self._is_over:
            self._ending.close_direction(side)

    def abort(self) -> None:
        """Cut both sides at once."""
        self._ending.blame_proxy("aborted")
        self.end(at_once=True)

    def end(self, *, at_once: bool = False) -> None:
        """Close both connections, once all is sent or at once, and count the tunnel."""
        if self._is_over:
            return
        self._is_over = True
        if self._end is not None:
            self._end.stop_waiting()
        for side in self.sides:
            if at_once:
                side.transport.abort()
            else:
                side.close(self._plane)
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
        self._ending.blame_proxy("aborted")
        self._count()

    def _count(self) -> None:
        """Count how the tunnel ended, and log it."""
        plane, counters, end = self._plane, self._pool.counters, self._ending
        self.release()
        duration_s = perf_counter() - self._started_at
        initiator, code = end.initiator or "proxy", end.close_code
        counters.count_close(initiator, code, end.cause)
        counters.observe_tunnel(int(duration_s * NS))
        if plane.log is not None and self._record is not None:
            plane.log(
                replace(
                    self._record,
                    kind="tunnel",
                    duration_s=duration_s,
                    received_bytes=self.client.received_bytes,
                    sent_bytes=self.upstream.received_bytes,
                    close_code=code,
                    initiator=initiator,
                    cause=end.cause,
                )
            )

    @override
    def __repr__(self) -> str:
        return f"<Tunnel {self._pool.upstream_id} {'over' if self._is_over else 'open'}>"
