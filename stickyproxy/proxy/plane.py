"""The data plane as a whole: what its connections share, and the seam to the control plane.

Control calls `publish`; data calls `report`. Nothing else crosses, and neither waits for the other.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Final

from stickyproxy.affinity.policy import Chance
from stickyproxy.affinity.token import CLIENT_ID_BYTES
from stickyproxy.observe.counters import PlaneCounters
from stickyproxy.proxy.addresses import AddressCounts
from stickyproxy.proxy.gate import Gate
from stickyproxy.proxy.pool import PLACED_WINDOW_S, Pool
from stickyproxy.proxy.settings import OFF
from stickyproxy.proxy.socket_state import is_reset
from stickyproxy.wire.cookies import CookieReader, CookieWriter
from stickyproxy.wire.response_head import write_date

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stickyproxy.affinity.health import HealthEvent
    from stickyproxy.affinity.sessions import SessionTable
    from stickyproxy.affinity.snapshot import Snapshot, Upstream
    from stickyproxy.observe.record import Record
    from stickyproxy.proxy.downstream import Downstream
    from stickyproxy.proxy.endpoint import Endpoint
    from stickyproxy.proxy.handshake import Handshake
    from stickyproxy.proxy.settings import Settings
    from stickyproxy.proxy.tunnel import Tunnel
    from stickyproxy.wire.forwarded import ConnectionOrigin

TICK_S: Final = 0.25
_LOOK_S: Final = 1.0  # between two looks for connections that were reset while nobody read them
_CLIENT_IDS_AT_ONCE: Final = 256


class Plane:
    """What all connections of one data plane share.

    `now` and `wall` are the coarse clocks, monotonic and since 1970, in seconds, renewed each tick.
    """

    def __init__(
        self,
        settings: Settings,
        sessions: SessionTable,
        *,
        report: Callable[[str, HealthEvent], None],
        random: Callable[[], float],
        log: Callable[[Record], None] | None = None,
    ) -> None:
        self.settings = settings
        self.sessions = sessions
        self.report = report
        self.log = log
        self.random = random
        self.chance = Chance(random)
        self.counters = PlaneCounters()
        self.snapshot: Snapshot
        self.pools: dict[bytes, Pool] = {}
        self.handshakes: set[Handshake] = set()
        self.downstreams: set[Downstream] = set()
        self.tunnels: set[Tunnel] = set()
        self.gate = Gate(self, settings.connections)
        self.addresses = AddressCounts(settings.connections_per_address)
        timeouts = settings.timeouts
        self._sweeps_tunnels = (
            settings.pings is not None or min(timeouts.tunnel_idle_s, timeouts.tunnel_max_age_s) < OFF
        )
        self.is_stopping = False
        self._is_empty = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.now = time.monotonic()
        self.wall = time.time()  # noqa: TID251 -- the one place that reads the wall clock
        self.date_line = write_date(self.wall)
        self.cookie_reader = CookieReader(settings.cookie.name) if settings.cookie else None
        self.cookie_writer = CookieWriter(settings.cookie) if settings.cookie else None
        self._changed: set[asyncio.Future[None]] = set()
        self._client_ids = b""
        self._request_ids = int.from_bytes(os.urandom(8), "big") << 32
        self._next_window = self.now + PLACED_WINDOW_S
        self._next_look = self.now + _LOOK_S
        self._ticker = self.loop.call_later(TICK_S, self._tick)

    def publish(self, snapshot: Snapshot, endpoints: Mapping[str, Endpoint]) -> None:
        """Take a new routing state: one assignment. `endpoints` are those of its upstreams, by id.

        Open exchanges and tunnels keep the upstream that they have; requests that wait look again.
        """
        for upstream in snapshot.upstreams:
            pool = self.pools.get(upstream.digest)
            if pool is None or pool.endpoint != endpoints[upstream.id]:
                renewed = Pool(self, upstream.id, upstream.digest, endpoints[upstream.id])
                if pool is not None:  # the same upstream at another place: what was counted of it goes on
                    renewed.counters = pool.counters
                    pool.close()
                self.pools[upstream.digest] = renewed
        for digest in self.pools.keys() - snapshot.by_digest.keys():
            self.pools.pop(digest).close()
        self.snapshot = snapshot
        waiting, self._changed = self._changed, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until the next snapshot is published, or until the time is over."""
        future = self.loop.create_future()
        self._changed.add(future)
        await asyncio.wait((future,), timeout=timeout_s)
        self._changed.discard(future)

    def load(self, upstream: Upstream) -> int:
        """Return how many clients use an upstream: its sessions, those without one, and those placed just now."""
        pool = self.pools[upstream.digest]
        return self.sessions.counts.get(upstream.digest, 0) + pool.strangers + pool.placed + pool.placed_before

    def new_client_id(self) -> bytes:
        """Return 10 random bytes; the system is asked once for many."""
        if not self._client_ids:
            self._client_ids = os.urandom(CLIENT_ID_BYTES * _CLIENT_IDS_AT_ONCE)
        client_id, self._client_ids = self._client_ids[:CLIENT_ID_BYTES], self._client_ids[CLIENT_ID_BYTES:]
        return client_id

    def new_request_id(self) -> bytes:
        """Return an id that no other request has: 24 hexadecimal digits, random by process, then counted."""
        self._request_ids += 1
        return b"%024x" % self._request_ids

    def stop(self) -> None:
        """Close idle connections and let busy ones end with their exchange; listeners are closed by their owner."""
        self.is_stopping = True
        for handshake in tuple(self.handshakes):
            handshake.abort()
        for downstream in tuple(self.downstreams):
            downstream.stop()

    @property
    def connections(self) -> int:
        """Return how many connections of clients are open, whatever they are at."""
        return len(self.downstreams) + len(self.tunnels) + len(self.handshakes)

    def on_accepted(self) -> None:
        """Note that a client has connected."""
        self.gate.on_accepted()

    def on_closed(self, origin: ConnectionOrigin | None = None) -> None:
        """Note that a connection of a client has ended; the last one ends the wait of `wait_until_empty`.

        `origin` is that of a connection that came as far as to be counted by its address.
        """
        if origin is not None:
            self.addresses.release(origin)
        self.gate.on_closed()
        if self.is_stopping and not self.connections:
            self._is_empty.set()

    async def wait_until_empty(self) -> None:
        """Wait, once stopping, until no connection and no tunnel is open."""
        self.on_closed()
        await self._is_empty.wait()

    def close(self) -> None:
        """End everything at once."""
        self.is_stopping = True
        self._ticker.cancel()
        for handshake in tuple(self.handshakes):
            handshake.abort()
        for downstream in tuple(self.downstreams):
            downstream.abort()
        for tunnel in tuple(self.tunnels):
            tunnel.abort()
        for pool in self.pools.values():
            pool.close()

    def _drop_reset(self) -> None:
        """Drop the connections that were reset while nobody read them: the loop does not see that."""
        for downstream in [one for one in self.downstreams if one.is_paused and is_reset(one.transport)]:
            downstream.abort()
        for tunnel in tuple(self.tunnels):
            tunnel.drop_reset()

    def _tick(self) -> None:
        self._ticker = self.loop.call_later(TICK_S, self._tick)
        self.now = now = time.monotonic()
        self.wall = time.time()  # noqa: TID251 -- the one place that reads the wall clock
        self.date_line = write_date(self.wall)
        for downstream in [one for one in self.downstreams if one.deadline <= now]:
            downstream.on_deadline()
        for handshake in [one for one in self.handshakes if one.deadline <= now]:
            handshake.abort()
        if self._sweeps_tunnels:
            for tunnel in tuple(self.tunnels):
                tunnel.sweep(now)
        self.gate.sweep()
        if now >= self._next_look:
            self._next_look = now + _LOOK_S
            self._drop_reset()
        for pool in self.pools.values():
            pool.expire(now)
        self.sessions.expire(now)
        if now >= self._next_window:
            self._next_window = now + PLACED_WINDOW_S
            for pool in self.pools.values():
                pool.placed_before, pool.placed = pool.placed, 0
