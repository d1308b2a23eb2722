"""What the admin listener reads: the numbers and the state of the planes, copied on the event loop at one moment."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Final, TypeVar

from stickyproxy import __version__
from stickyproxy.affinity.snapshot import AdminState
from stickyproxy.observe.counters import LAG_BOUNDS_S, Histogram, ProbeCounters, UpstreamCounters
from stickyproxy.observe.metrics import Numbers, UpstreamNumbers

if TYPE_CHECKING:
    from stickyproxy.affinity.snapshot import Upstream
    from stickyproxy.control.certificates import CertificateWatcher
    from stickyproxy.control.probe import Prober
    from stickyproxy.control.resolver import Resolver
    from stickyproxy.control.routing import Routing
    from stickyproxy.control.worker import Worker
    from stickyproxy.observe.access_log import AccessLog

_LAG_PERIOD_S: Final = 0.5

Counters = TypeVar("Counters", UpstreamCounters, ProbeCounters)


class LoopLag:
    """Measures how late the timers of the running loop fire, from `start` to `stop`."""

    def __init__(self) -> None:
        self.histogram = Histogram(LAG_BOUNDS_S)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to measure."""
        loop = asyncio.get_running_loop()
        due = loop.time() + _LAG_PERIOD_S
        self._timer = loop.call_at(due, self._fire, due)

    def stop(self) -> None:
        """Measure no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self, due: float) -> None:
        # A loop whose clock ticks in milliseconds may fire a little early.
        self.histogram.observe(max(0.0, asyncio.get_running_loop().time() - due))
        self.start()


class Readings:
    """What metrics and the state API need from the planes. `is_ready` is set by the supervisor."""

    def __init__(
        self,
        worker: Worker,
        routing: Routing,
        prober: Prober,
        access_log: AccessLog | None,
        *,
        resolver: Resolver | None = None,
        certificates: CertificateWatcher | None = None,
    ) -> None:
        self._worker = worker
        self._plane = worker.plane
        self._routing = routing
        self._prober = prober
        self._resolver = resolver
        self._certificates = certificates
        self._access_log = access_log
        self._began_at = asyncio.get_running_loop().time()
        self._is_ready = False
        self._was_ready = False
        self.loop_lag = LoopLag()

    @property
    def is_ready(self) -> bool:
        """Say whether the listeners accept clients: not before they are open, nor after the proxy was told to stop."""
        return self._is_ready

    @is_ready.setter
    def is_ready(self, is_ready: bool) -> None:
        self._was_ready = self._was_ready or is_ready
        self._is_ready = is_ready

    @property
    def uptime_s(self) -> float:
        """Return the seconds since the start."""
        return asyncio.get_running_loop().time() - self._began_at

    def explain_unready(self) -> str | None:
        """Return why no client should be sent here, as one line, or None where there is no reason."""
        if not self.is_ready:
            return "the proxy is stopping" if self._was_ready else "the proxy is starting"
        upstreams = self._routing.snapshot.upstreams
        if any(upstream.accepts_pinned for upstream in upstreams):
            return None
        in_maint = sum(upstream.admin is AdminState.MAINT for upstream in upstreams)
        return f"no upstream can be used: {len(upstreams) - in_maint} refuse connections, {in_maint} in maintenance"

    def describe(self) -> dict[str, object]:
        """Return the state of the proxy as it goes into JSON."""
        snapshot = self._routing.snapshot
        return {
            "version": __version__,
            "uptime_s": round(self.uptime_s, 3),
            "is_ready": self.is_ready,
            "clusters": [
                {
                    "name": snapshot.cluster,
                    "is_guarded": snapshot.is_guarded,
                    "upstreams": [self.describe_upstream(upstream) for upstream in snapshot.upstreams],
                }
            ],
        }

    def describe_upstream(self, upstream: Upstream) -> dict[str, object]:
        """Return the state of one upstream of the snapshot as it goes into JSON."""
        counters = self._plane.pools[upstream.digest].counters
        return {
            "id": upstream.id,
            "address": str(self._routing.endpoints[upstream.id].address),
            "weight": upstream.weight,
            "max_sessions": upstream.max_sessions,
            "admin_state": upstream.admin,
            "health": upstream.health,
            "is_refused": upstream.is_refused,
            "accepts_new": upstream.accepts_new,
            "accepts_pinned": upstream.accepts_pinned,
            "sessions": self._plane.sessions.counts.get(upstream.digest, 0),
            "tunnels": counters.tunnels_open,
            "in_flight": counters.in_flight,
        }

    def take_numbers(self) -> Numbers:
        """Return a copy of all numbers. O(n) in upstreams and open tunnels: some 10 us for each upstream."""
        plane, snapshot = self._plane, self._routing.snapshot
        counters = plane.counters
        received, sent = self._sum_open_tunnels()
        return Numbers(
            version=__version__,
            upstreams=tuple(
                self._take_upstream(snapshot.cluster, upstream, received[upstream.id], sent[upstream.id])
                for upstream in snapshot.upstreams
            ),
            none={snapshot.cluster: _copy(counters.none)},
            guarded={snapshot.cluster: snapshot.is_guarded},
            affinity={**counters.affinity, "hit": counters.hits},
            breaks=dict(counters.breaks),
            downstream_connections=len(plane.downstreams),
            downstream_connections_total=counters.connections,
            handshakes=dict(counters.handshakes),
            is_accepting=self.is_ready and plane.gate.is_open,
            accept_pauses=plane.gate.pauses,
            name_lookups=dict(self._resolver.lookups) if self._resolver is not None else {},
            certificate_reloads=dict(self._certificates.reloads) if self._certificates is not None else {},
            certificates=self._list_certificates(),
            access_log_dropped=self._access_log.dropped if self._access_log is not None else 0,
            event_loop_lag=_copy_histogram(self.loop_lag.histogram),
        )

    def _list_certificates(self) -> dict[tuple[str, str], float]:
        """Return when each certificate in use expires, in seconds since 1970, by its listener and file."""
        if self._certificates is None:
            return {}
        listeners = self._worker.listeners
        return {
            (str(listeners[position].address), str(one.path)): one.not_after
            for position, facts in self._certificates.facts.items()
            if position < len(listeners)
            for one in facts
        }

    def _sum_open_tunnels(self) -> tuple[Counter[str], Counter[str]]:
        """Return the bytes of open tunnels, received from clients and sent to them, by upstream id."""
        received: Counter[str] = Counter()
        sent: Counter[str] = Counter()
        for tunnel in self._plane.tunnels:
            received[tunnel.upstream_id] += tunnel.client.received_bytes
            sent[tunnel.upstream_id] += tunnel.upstream.received_bytes
        return received, sent

    def _take_upstream(self, cluster: str, upstream: Upstream, received: int, sent: int) -> UpstreamNumbers:
        pool = self._plane.pools[upstream.digest]
        return UpstreamNumbers(
            cluster=cluster,
            id=upstream.id,
            health=upstream.health,
            admin=upstream.admin,
            is_refused=upstream.is_refused,
            sessions=self._plane.sessions.counts.get(upstream.digest, 0),
            idle_connections=len(pool.idle),
            counters=_copy(pool.counters),
            probes=_copy(self._prober.counters.get(upstream.id) or ProbeCounters()),
            open_received_bytes=received,
            open_sent_bytes=sent,
        )


def _copy(counters: Counters) -> Counters:
    """Return counters that do not change any more."""
    copied = type(counters).__new__(type(counters))  # every attribute is set below
    for name in counters.__slots__:
        value = getattr(counters, name)
        if isinstance(value, Histogram):
            value = _copy_histogram(value)
        elif isinstance(value, list | Counter):
            value = value.copy()
        setattr(copied, name, value)
    return copied


def _copy_histogram(histogram: Histogram) -> Histogram:
    copied = Histogram(histogram.bounds)
    copied.counts = histogram.counts.copy()
    copied.total_s = histogram.total_s
    return copied
