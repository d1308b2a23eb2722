"""The data plane as a whole: what its connections share, and the seam to the control plane.

Control calls `publish`; data calls `report`. Nothing else crosses, and neither waits for the other.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Final

from stickyproxy.affinity.snapshot import Rules, Snapshot, nowhere_digest
from stickyproxy.affinity.token import CLIENT_ID_BYTES
from stickyproxy.config import DEFAULT_CLUSTER
from stickyproxy.observe.counters import (
    CONNECTIONS_OPEN,
    DOWNSTREAMS,
    IS_ACCEPTING,
    KEYS_EVICTED,
    KEYS_LEARNED,
    TICKED_AT,
    PlaneCounters,
    UpstreamCounters,
)
from stickyproxy.proxy.addresses import AddressCounts
from stickyproxy.proxy.cluster import Cluster
from stickyproxy.proxy.crowd import Crowd
from stickyproxy.proxy.gate import Gate
from stickyproxy.proxy.key_table import KeyStore, KeyTable
from stickyproxy.proxy.pool import PLACED_WINDOW_S, Pool
from stickyproxy.proxy.router import Router
from stickyproxy.proxy.settings import OFF, ClusterSettings
from stickyproxy.proxy.socket_state import is_reset
from stickyproxy.wire.cookies import CookieReader, CookiesReader
from stickyproxy.wire.response_head import write_date

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from stickyproxy.affinity.health import HealthEvent
    from stickyproxy.affinity.sessions import SessionTable
    from stickyproxy.affinity.snapshot import Upstream
    from stickyproxy.observe.record import Record
    from stickyproxy.observe.table import Table
    from stickyproxy.proxy.board import Place
    from stickyproxy.proxy.departure import Departure
    from stickyproxy.proxy.downstream import Downstream
    from stickyproxy.proxy.endpoint import Endpoint
    from stickyproxy.proxy.handshake import Handshake
    from stickyproxy.proxy.settings import Settings
    from stickyproxy.proxy.tunnel import Tunnel
    from stickyproxy.wire.forwarded import ConnectionOrigin

TICK_S: Final = 0.25
_LOOK_S: Final = 1.0  # between two looks for connections that were reset while nobody read them
_CLIENT_IDS_AT_ONCE: Final = 256
_OWN_KEYS: Final = 4096  # of a plane that shares its table with nobody


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
        table: Table | None = None,
    ) -> None:
        self.sessions = sessions
        self.report = report
        self.log = log
        self.random = random
        self._place: Place | None = None
        self.on_tick: Callable[[], None] | None = None
        """What the process around the plane does regularly, too."""
        self._table = table
        self.counters = PlaneCounters() if table is None else table.plane
        self.clusters: dict[str, Cluster] = {}
        """By name: those of the settings, and those that upstreams are leaving."""
        self.router: Router | None = None
        """Finds the cluster of a request; None where there is but one."""
        self.cookie_reader: CookieReader | CookiesReader | None = None
        """Takes the affinity cookies of all clusters out of requests."""
        self._nowhere = Cluster("", ClusterSettings(None), random, self.counters.none)
        self._published: frozenset[str] = frozenset()  # the clusters of the last routing state
        self._is_routed = False  # as the settings say
        self.is_shared = False
        """Whether other workers place clients, too."""
        self.keys: KeyStore = KeyTable.create(_OWN_KEYS)
        """The keys that were learned; another table may be put in its place, which others use, too."""
        self.pools: dict[bytes, Pool] = {}
        """Of the upstreams of all clusters, by digest."""
        self.handshakes: set[Handshake] = set()
        self.downstreams: set[Downstream] = set()
        self.tunnels: set[Tunnel] = set()
        self.departing: set[Departure] = set()  # on their way to another process, which has not confirmed them
        self.on_idle: Callable[[Downstream], bool] | None = None
        """Takes a connection that has ended an exchange to another process, and says whether it does."""
        self.gate = Gate(self)
        self.addresses = AddressCounts(settings.connections_per_address)
        self._apply(settings)
        self.is_stopping = False
        self.is_leaving = False
        """Whether connections go to another process; those that cannot are closed with their next response."""
        self._is_gone = asyncio.Event()
        self._is_end_awaited = False  # somebody waits until no connection is open
        self.loop = asyncio.get_running_loop()
        self.crowd = Crowd(self.loop)
        self.now = time.monotonic()
        self.wall = time.time()  # noqa: TID251 -- the one place that reads the wall clock
        self.date_line = write_date(self.wall)
        self._changed: set[asyncio.Future[None]] = set()
        self._client_ids = b""
        self._request_ids = int.from_bytes(os.urandom(8), "big") << 32
        self._next_window = _next_window(self.now)
        self._next_look = self.now + _LOOK_S
        self._due = self.now + TICK_S
        self._ticker = self.loop.call_later(TICK_S, self._tick)

    def _apply(self, settings: Settings) -> None:
        self.settings = settings
        timeouts = settings.timeouts
        self._sweeps_tunnels = (
            settings.pings is not None or min(timeouts.tunnel_idle_s, timeouts.tunnel_max_age_s) < OFF
        )
        for name, of_cluster in settings.clusters.items():
            cluster = self.clusters.get(name)
            if cluster is None:
                self._add_cluster(name, of_cluster)
            elif cluster.settings != of_cluster:
                cluster.change_settings(of_cluster)
        self._is_routed = False
        self._route()

    def _add_cluster(self, name: str, settings: ClusterSettings) -> Cluster:
        """Begin to know a cluster; that of no route counts what reaches no upstream with what is no request at all."""
        if name == DEFAULT_CLUSTER:
            none = self.counters.none
        else:
            none = UpstreamCounters() if self._table is None else self._table.upstream(nowhere_digest(name))
        cluster = self.clusters[name] = Cluster(name, settings, self.random, none)
        return cluster

    def _route(self) -> None:
        """Go by the routes of the settings, once the routing state of each of their clusters is known.

        Until then those before hold: a cluster that was added just now could serve nobody yet.
        """
        settings = self.settings
        if self._is_routed or not self._published.issuperset(settings.clusters):
            return
        self._is_routed = True
        names = [one.cookie.name for one in settings.clusters.values() if one.cookie is not None]
        if settings.routes:
            self.router = Router(settings, self.clusters, self._nowhere)
            self.cookie_reader = CookiesReader(names) if names else None
        else:
            self.router = None
            self.cookie_reader = CookieReader(names[0]) if names else None
        for downstream in self.downstreams:
            downstream.change_settings()

    def change_settings(self, settings: Settings) -> None:
        """Work by other settings from the next request on; tunnels keep the age and the Pings they were opened with."""
        if settings == self.settings:
            return
        if settings.connections_per_address != self.settings.connections_per_address:
            self._recount_addresses(settings.connections_per_address)
        self._apply(settings)
        for downstream in self.downstreams:
            downstream.change_settings()
        self.gate.sweep()

    def _recount_addresses(self, limit: float) -> None:
        """Count the connections of each address anew: without a limit nobody has."""
        open_now: list[Downstream | Tunnel | Departure | Handshake] = [*self.downstreams, *self.tunnels]
        open_now += [*self.departing, *self.handshakes]
        self.addresses.recount(limit, [one.origin for one in open_now if one.origin is not None])

    @property
    def place(self) -> Place | None:
        """Where the plane shares what it knows with other workers; None where there are no others."""
        return self._place

    @place.setter
    def place(self, place: Place | None) -> None:
        self._place = place
        self.addresses.share(None if place is None else place.addresses)

    def publish(self, snapshots: Iterable[Snapshot], endpoints: Mapping[str, Endpoint]) -> None:
        """Take a new routing state: a snapshot of each cluster, and the endpoints of all upstreams, by id.

        Open exchanges and tunnels keep the upstream that they have; requests that wait look again.
        """
        by_name = {one.cluster: one for one in snapshots}
        present: set[bytes] = set()
        for snapshot in by_name.values():
            present |= snapshot.by_digest.keys()
            for upstream in snapshot.upstreams:
                self._keep_pool(upstream, endpoints[upstream.id])
        for digest in self.pools.keys() - present:
            self.pools.pop(digest).close()
            if self._table is not None:
                self._table.release(digest)
        for name in self.clusters.keys() - by_name.keys():
            self._empty_cluster(name)
        for name, snapshot in by_name.items():
            cluster = self.clusters.get(name) or self._add_cluster(name, ClusterSettings(None))
            cluster.snapshot = snapshot
            self.is_shared = snapshot.rules.is_shared
        self._published = frozenset(by_name)
        self._route()
        waiting, self._changed = self._changed, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _keep_pool(self, upstream: Upstream, endpoint: Endpoint) -> None:
        """Have a pool for an upstream at its endpoint."""
        pool = self.pools.get(upstream.digest)
        if pool is None or pool.endpoint != endpoint:
            if pool is not None:  # the same upstream at another place: what was counted of it goes on
                counters = pool.counters
                pool.close()
            else:
                counters = UpstreamCounters() if self._table is None else self._table.upstream(upstream.digest)
            self.pools[upstream.digest] = Pool(self, upstream.id, upstream.digest, endpoint, counters)

    def _empty_cluster(self, name: str) -> None:
        """Let a cluster be without upstreams; forget it where it is not among the settings either."""
        cluster = self.clusters[name]
        cluster.snapshot = Snapshot(name, (), Rules())
        if name not in self.settings.clusters:
            del self.clusters[name]
            if self._table is not None:
                self._table.release(nowhere_digest(name))

    @property
    def default(self) -> Cluster:
        """Return the cluster of all requests, where there are no routes."""
        return self.clusters.get(DEFAULT_CLUSTER, self._nowhere)

    def find_cluster(self, digest: bytes) -> Cluster | None:
        """Return the cluster that an upstream belongs to, by its digest; O(clusters)."""
        return next((one for one in self.clusters.values() if digest in one.snapshot.by_digest), None)

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until the next snapshot is published, or until the time is over."""
        future = self.loop.create_future()
        self._changed.add(future)
        await asyncio.wait((future,), timeout=timeout_s)
        self._changed.discard(future)

    def load(self, upstream: Upstream) -> int:
        """Return how many clients use an upstream: its sessions, those without one, and those placed just now."""
        digest = upstream.digest
        pool = self.pools[digest]
        if self._place is None or not self.is_shared:
            return self.sessions.counts.get(digest, 0) + pool.strangers + pool.placed + pool.placed_before
        return self._place.read(digest) + self._beyond(pool)

    def _beyond(self, pool: Pool) -> int:
        """Return how many clients this process knows of at an upstream beyond the sessions that all know of."""
        return pool.strangers + pool.placed + pool.placed_before + self.sessions.count_unreported(pool.digest)

    def show_load(self, pool: Pool) -> None:
        """Let other workers, where there are any, see at once how many clients an upstream has here."""
        if self._place is not None and self.is_shared:
            self._place.write(pool.digest, self._beyond(pool))

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
        return len(self.downstreams) + len(self.tunnels) + len(self.handshakes) + len(self.departing)

    def on_accepted(self) -> None:
        """Note that a client has connected."""
        self.gate.on_accepted()

    def on_closed(self, origin: ConnectionOrigin | None = None) -> None:
        """Note that a connection of a client has ended; the last one ends the wait of `wait_until_gone`.

        `origin` is that of a connection that came as far as to be counted by its address.
        """
        if origin is not None:
            self.addresses.release(origin)
        self.gate.on_closed()
        if self._is_end_awaited and not self.connections:
            self._is_gone.set()

    async def wait_until_gone(self) -> None:
        """Wait until no connection and no tunnel is open, while all go on: it may be for ever, so set a deadline."""
        self._is_end_awaited = True
        while self.connections:
            self._is_gone.clear()
            await self._is_gone.wait()

    async def wait_until_empty(self) -> None:
        """Wait, once stopping, until no connection and no tunnel is open."""
        await self.wait_until_gone()

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

    def _tick(self) -> None:
        self._ticker = self.loop.call_later(TICK_S, self._tick)
        self._read_clocks()
        self._sweep(self.now)
        self._show()
        if self.on_tick is not None:
            self.on_tick()
        if self._place is not None:  # after what `on_tick` reports, which is no longer beyond what all know
            for pool in self.pools.values():
                self._place.write(pool.digest, self._beyond(pool))

    def _read_clocks(self) -> None:
        self.now = now = time.monotonic()
        self.counters.observe_lag(max(0.0, now - self._due))  # the loop's own clock is a little behind
        self._due = now + TICK_S
        self.wall = time.time()  # noqa: TID251 -- the one place that reads the wall clock
        self.date_line = write_date(self.wall)

    def _sweep(self, now: float) -> None:
        """Act on all that is due."""
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
            self._look_at_connections()
        self._sweep_pools(now)
        self.sessions.expire(now)

    def _look_at_connections(self) -> None:
        """Drop the connections that were reset while nobody read them, which the loop does not see; count bytes."""
        for downstream in [one for one in self.downstreams if one.is_paused and is_reset(one.transport)]:
            downstream.abort()
        for tunnel in tuple(self.tunnels):
            tunnel.count_bytes()
            tunnel.drop_reset()

    def _sweep_pools(self, now: float) -> None:
        is_next_window = now >= self._next_window
        if is_next_window:
            self._next_window = _next_window(now)
        for pool in self.pools.values():
            pool.expire(now)
            if is_next_window:
                pool.placed_before, pool.placed = pool.placed, 0

    def _show(self) -> None:
        """Show in the counters how much is open now, and that the loop goes on."""
        cells = self.counters.cells
        cells[DOWNSTREAMS] = len(self.downstreams)
        cells[CONNECTIONS_OPEN] = self.connections
        cells[IS_ACCEPTING] = bool(self.gate.listeners) and self.gate.is_open and not self.is_stopping
        cells[TICKED_AT] = time.monotonic_ns()
        cells[KEYS_LEARNED], cells[KEYS_EVICTED] = self.keys.learned, self.keys.evicted
        for pool in self.pools.values():
            pool.show()


def _next_window(now: float) -> float:
    """Return when the present window ends; windows are the same for all workers, which count each other's clients."""
    return (now // PLACED_WINDOW_S + 1) * PLACED_WINDOW_S
