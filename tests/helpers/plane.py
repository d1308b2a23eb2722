"""A data plane in the test's own event loop, with raw upstreams behind it and raw clients before it.

At its end all is closed, and what must always hold is checked: nothing is left open, each counter of what is under way
is back at zero, each exchange was recorded once, and nothing was raised where nobody sees it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from typing_extensions import override

from stickyproxy.affinity.health import HealthEvent, Observed, Thresholds, observe
from stickyproxy.affinity.sessions import SessionTable
from stickyproxy.affinity.snapshot import AdminState, Health, Rules, Snapshot, Upstream
from stickyproxy.affinity.token import Lifetimes, TokenCodec
from stickyproxy.config import DEFAULT_CLUSTER, Address
from stickyproxy.observe.counters import UPSTREAM, make_cells
from stickyproxy.observe.table import Table
from stickyproxy.proxy.endpoint import Endpoint
from stickyproxy.proxy.listener import Listener, Role, bind
from stickyproxy.proxy.plane import Plane
from stickyproxy.proxy.settings import ClusterSettings, Settings, Timeouts
from tests.helpers.raw import RawLink, RawUpstream, eventually

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Sequence

    from stickyproxy.affinity.sessions import Session
    from stickyproxy.observe.counters import UpstreamCounters
    from stickyproxy.observe.record import Record
    from stickyproxy.proxy.pool import Pool

LOOPBACK = Address("127.0.0.1", 0)
SECRET = b"0123456789abcdef0123456789abcdef"
CODEC = TokenCodec([SECRET])


def cluster_settings(**options: Any) -> dict[str, ClusterSettings]:
    """Return the settings of the one cluster, for `Settings.clusters`."""
    return {DEFAULT_CLUSTER: ClusterSettings(**options)}


class Start(Protocol):
    """Start a plane; the arguments are those of `start_plane`."""

    async def __call__(self, upstreams: int | Sequence[RawUpstream] = 1, **options: Any) -> PlaneUnderTest: ...


class _Sessions(SessionTable):
    """A session table that remembers every session, so that the test can look at them all in the end."""

    def __init__(self, lifetimes: Lifetimes, *, idle_s: float, refresh_s: float | None) -> None:
        super().__init__(CODEC, lifetimes, idle_s=idle_s, refresh_s=refresh_s)
        self.all: list[Session] = []

    @override
    def begin(self, client_id: bytes, digest: bytes, wall: float) -> Session:
        session = super().begin(client_id, digest, wall)
        self.all.append(session)
        return session

    @override
    def touch(self, session: Session, now: float) -> bool:
        if session not in self.all:
            self.all.append(session)
        return super().touch(session, now)


class _Faults(logging.Handler):
    """Collects what is logged as an error: the crash of a task, a transport misused."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.name.startswith("asyncio"):
            self.seen.append(logging.Formatter().format(record))


class PlaneUnderTest:
    """One plane, its listeners, its upstreams and its clients."""

    def __init__(self, upstreams: Sequence[RawUpstream], settings: Settings, sessions: _Sessions, rules: Rules) -> None:
        self.upstreams = self.all_upstreams = tuple(upstreams)
        self.rules = rules
        self.sessions = sessions
        self.records: list[Record] = []
        self.reports: list[tuple[str, HealthEvent]] = []
        self.listeners: list[Listener] = []
        self.endpoint = Endpoint(LOOPBACK)
        self.max_sessions: int | None = None  # of each upstream
        self.pools_seen: set[Pool] = set()
        self._clients: list[RawLink] = []
        self.admin = dict.fromkeys((one.id for one in upstreams), AdminState.READY)
        self.observed = dict.fromkeys((one.id for one in upstreams), Observed())
        self.table = Table.create()
        self.plane = Plane(
            settings,
            sessions,
            report=self._report,
            random=random.Random(7).random,
            log=self.records.append,
            table=self.table,
        )
        self._own_keys = self.plane.keys  # a test may put another in its place
        self.publish()

    # The control plane's part

    def _report(self, upstream_id: str, event: HealthEvent) -> None:
        self.reports.append((upstream_id, event))
        before = self.observed.get(upstream_id)
        if before is not None:
            self.observed[upstream_id] = observe(before, event, Thresholds())
            if self.observed[upstream_id] != before:
                self.publish()

    def publish(self, rules: Rules | None = None) -> None:
        """Publish what the operator wants and what was observed."""
        self.rules = rules or self.rules
        states = tuple(
            Upstream(
                one.id,
                1,
                self.admin[one.id],
                self.observed[one.id].health,
                self.observed[one.id].is_refused,
                self.max_sessions,
            )
            for one in self.upstreams
        )
        endpoints = {
            one.id: replace(self.endpoint, address=Address(one.host, one.port, one.path)) for one in self.upstreams
        }
        self.plane.publish([Snapshot("default", states, self.rules)], endpoints)
        self.pools_seen.update(self.plane.pools.values())

    def set_admin(self, upstream: RawUpstream, state: AdminState) -> None:
        """Publish what the operator wants of an upstream."""
        self.admin[upstream.id] = state
        self.publish()

    def set_health(self, upstream: RawUpstream, health: Health, *, is_refused: bool = False) -> None:
        """Publish what was observed of an upstream."""
        self.observed[upstream.id] = Observed(health, is_refused=is_refused)
        self.publish()

    def remove(self, upstream: RawUpstream) -> None:
        """Publish a cluster without one of its upstreams."""
        self.upstreams = tuple(one for one in self.upstreams if one is not upstream)
        self.publish()

    # The clients' part

    async def listen(self, address: Address = LOOPBACK, role: Role | None = None) -> Listener:
        """Begin to accept at one more address."""
        listener = Listener(self.plane, bind(address), address, role)
        self.listeners.append(listener)
        self.plane.gate.listeners.append(listener)
        await listener.start()
        return listener

    async def client(
        self, listener: Listener | None = None, *, tls: ssl.SSLContext | None = None, name: str = "localhost"
    ) -> RawLink:
        """Connect to the first listener, or the one given; over TLS if `tls` is given, asking for a `name`."""
        listener = listener or self.listeners[0]
        loop, address = asyncio.get_running_loop(), listener.address
        if address.path:
            _, link = await loop.create_unix_connection(RawLink, address.path)
        elif tls is None:
            _, link = await loop.create_connection(RawLink, address.host or "127.0.0.1", int(listener.port))
        else:
            _, link = await loop.create_connection(
                RawLink, address.host or "127.0.0.1", int(listener.port), ssl=tls, server_hostname=name
            )
        self._clients.append(link)
        return link

    async def open(self, request: bytes) -> tuple[RawLink, RawLink]:
        """Connect, send a request, and return the client and the upstream's connection that the request came to."""
        client = await self.client()
        client.send(request)
        return client, await self.upstream.accept()

    @property
    def upstream(self) -> RawUpstream:
        """Return the only upstream, or the first."""
        return self.upstreams[0]

    def pool(self, upstream: RawUpstream | None = None) -> Pool:
        """Return the pool of an upstream."""
        wanted = (upstream or self.upstream).id
        return next(pool for pool in self.plane.pools.values() if pool.upstream_id == wanted)

    @property
    def exchanges(self) -> int:
        """Return how many exchanges were counted in all."""
        return sum(sum(one.exchanges) for one in (self.plane.counters.none, *self._counters))

    @property
    def _counters(self) -> set[UpstreamCounters]:
        return {pool.counters for pool in self.pools_seen}

    async def recorded(self, count: int = 1) -> Record:
        """Wait until so many exchanges and tunnels were recorded, and return the last."""
        await eventually(lambda: len(self.records) >= count, f"{count} records")
        assert len(self.records) == count
        return self.records[-1]

    def forget_counts(self) -> None:
        """Set all counters to 0, for a test in which nothing is logged that they could be compared with."""
        for one in (self.plane.counters.none, *self._counters):
            one.cells[:] = make_cells(UPSTREAM.size)

    async def settle(self) -> None:
        """Reset all clients and wait until nothing is open; then check what must always hold."""
        for client in self._clients:
            if not client.is_lost:
                client.reset()
        plane = self.plane
        links = [link for upstream in self.all_upstreams for link in upstream.links]
        for link in links:
            link.follow()
        await eventually(lambda: not plane.downstreams, f"no client is left of {plane.downstreams}")
        await eventually(lambda: not plane.tunnels, f"no tunnel is left of {plane.tunnels}")
        await eventually(lambda: not plane.handshakes, f"no handshake is left of {plane.handshakes}")
        assert plane.addresses._counts == {}
        for pool in self.pools_seen:
            await eventually(lambda pool=pool: pool.counters.in_flight == 0, f"in_flight of {pool}")  # type: ignore[misc]
            assert pool.strangers == 0, pool
            assert pool.counters.tunnels_open == 0, pool
        assert [session for session in self.sessions.all if session.open] == []
        await eventually(
            lambda: sum(not link.is_over for link in links) <= sum(len(pool.idle) for pool in plane.pools.values()),
            "only idle connections are left",
        )
        exchanges = [record for record in self.records if record.kind == "exchange"]
        tunnels = [record for record in self.records if record.kind == "tunnel"]
        assert len({(record.kind, record.request_id) for record in self.records}) == len(self.records)
        assert len(exchanges) + len(tunnels) == self.exchanges
        assert sum(one.tunnels for one in self._counters) == len(tunnels)
        assert sum(sum(one.closes.values()) for one in self._counters) == len(tunnels)
        active = list(self.sessions._active.values())
        for digest in {one.digest for one in active} | self.sessions.counts.keys():
            assert self.sessions.counts[digest] == sum(one.digest == digest for one in active)

    def close(self) -> None:
        """End all at once."""
        for listener in self.listeners:
            listener.close()
        self.plane.close()
        self._own_keys.close()
        self.table.close()
        for upstream in self.all_upstreams:
            upstream.close()


@asynccontextmanager
async def start_plane(
    upstreams: int | Sequence[RawUpstream] = 1,
    *,
    settings: Settings | None = None,
    rules: Rules | None = None,
    lifetimes: Lifetimes | None = None,
    idle_s: float = 600.0,
    refresh_s: float | None = None,
    listen: Address = LOOPBACK,
    role: Role | None = None,
    **timeouts: float,
) -> AsyncIterator[PlaneUnderTest]:
    """Run a plane with so many upstreams, `app-1` and so on; `timeouts` are those of the settings to set apart."""
    faults = _Faults()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: faults.seen.append(repr(context)))
    watched = [logging.getLogger("stickyproxy"), logging.getLogger("asyncio")]
    for logger in watched:
        logger.addHandler(faults)
    if isinstance(upstreams, int):
        upstreams = [await RawUpstream(f"app-{number}").start() for number in range(1, upstreams + 1)]
    if timeouts:
        settings = replace(settings or Settings(), timeouts=Timeouts(**timeouts))
    table = _Sessions(lifetimes or Lifetimes(), idle_s=idle_s, refresh_s=refresh_s)
    under_test = PlaneUnderTest(upstreams, settings or Settings(), table, rules or Rules())
    try:
        await under_test.listen(listen, role)
        yield under_test
        await under_test.settle()
    finally:
        under_test.close()
        for logger in watched:
            logger.removeHandler(faults)
        await asyncio.sleep(0)
    assert faults.seen == []
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("dial")] == []
