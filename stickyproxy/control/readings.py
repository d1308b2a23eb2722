"""What the admin listener reads: the state of the control plane, and what the workers count in shared memory."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from stickyproxy import __version__
from stickyproxy.affinity.snapshot import AdminState, nowhere_digest, upstream_digest
from stickyproxy.config import DEFAULT_CLUSTER
from stickyproxy.observe.counters import LAG_BOUNDS_S, NS, Histogram, ProbeCounters
from stickyproxy.observe.metrics import Numbers, UpstreamCounts, UpstreamNumbers
from stickyproxy.observe.table import sum_readings

if TYPE_CHECKING:
    from stickyproxy.affinity.snapshot import Upstream
    from stickyproxy.control.supervisor import Supervisor
    from stickyproxy.observe.table import Reading

_LAG_PERIOD_S: Final = 0.5
_HANGING_S: Final = 10.0


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
    """What metrics and the state API need of a supervisor and its workers. `is_ready` is set by the supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
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
        if not self._supervisor.fleet.links:
            return "no worker is running"
        upstreams = self._supervisor.routing.upstreams
        if any(upstream.accepts_pinned for upstream in upstreams):
            return None
        in_maint = sum(upstream.admin is AdminState.MAINT for upstream in upstreams)
        return f"no upstream can be used: {len(upstreams) - in_maint} refuse connections, {in_maint} in maintenance"

    def describe(self) -> dict[str, object]:
        """Return the state of the proxy as it goes into JSON."""
        supervisor = self._supervisor
        reading = self._read_live()
        return {
            "version": __version__,
            "uptime_s": round(self.uptime_s, 3),
            "is_ready": self.is_ready,
            "workers": [
                {
                    "index": link.index,
                    "pid": link.process_id,
                    "version": link.version,
                    "is_leaving": link in supervisor.fleet.leaving,
                }
                for link in supervisor.fleet
            ],
            "clusters": [
                {
                    "name": snapshot.cluster,
                    "is_guarded": snapshot.is_guarded,
                    "upstreams": [self._describe(upstream, reading) for upstream in snapshot.upstreams],
                }
                for snapshot in supervisor.routing.snapshots.values()
            ],
            "run": self._describe_run(),
        }

    def _describe_run(self) -> dict[str, object] | None:
        runner = self._supervisor.runner
        return None if runner is None else runner.describe()

    def describe_upstream(self, upstream: Upstream) -> dict[str, object]:
        """Return the state of one upstream of the snapshot as it goes into JSON."""
        return self._describe(upstream, self._read_live())

    def _describe(self, upstream: Upstream, reading: Reading) -> dict[str, object]:
        routing, counters = self._supervisor.routing, reading.upstream(upstream.digest)
        return {
            "id": upstream.id,
            "address": str(routing.endpoints[upstream.id].address),
            "weight": upstream.weight,
            "max_sessions": upstream.max_sessions,
            "admin_state": upstream.admin,
            "health": upstream.health,
            "is_refused": upstream.is_refused,
            "is_leaving": upstream.id in routing.leaving,
            "accepts_new": upstream.accepts_new,
            "accepts_pinned": upstream.accepts_pinned,
            "sessions": self._supervisor.fleet.registry.count(upstream.digest),
            "tunnels": counters.tunnels_open,
            "in_flight": counters.in_flight,
            **self._describe_process(upstream.id),
        }

    def _describe_process(self, upstream_id: str) -> dict[str, object]:
        """Return what is known of an upstream that is an app process."""
        runner = self._supervisor.runner
        seat = None if runner is None else runner.seats.get(upstream_id)
        return {} if runner is None or seat is None else {"process": runner.describe_seat(seat)}

    def is_idle(self, upstream_id: str) -> bool:
        """Say whether no tunnel and no exchange is at an upstream; its clients may still have sessions."""
        counters = self._read_live().upstream(upstream_digest(upstream_id))
        return not (counters.tunnels_open or counters.in_flight)

    def is_empty(self, upstream_id: str) -> bool:
        """Say whether nothing of an upstream is in use, or its process is gone, and with it all that it held."""
        supervisor, digest = self._supervisor, upstream_digest(upstream_id)
        if supervisor.routing.observed[upstream_id].is_refused:
            return True
        idle_s = supervisor.config.affinity.session_idle_s
        if supervisor.fleet.registry.count(digest) or not supervisor.fleet.knows_sessions(idle_s):
            return False
        return self.is_idle(upstream_id)

    def is_any_alive(self) -> bool:
        """Say whether the loop of any worker has ticked lately; before the first tick of all, yes.

        One that hangs is told of by its metrics. Were it ended, all its clients would lose their connections.
        """
        ticks = [link.table.read().plane.ticked_at_ns for link in self._supervisor.fleet.links]
        now_ns = time.monotonic_ns()
        return not any(ticks) or any(now_ns - at < _HANGING_S * NS for at in ticks)

    def _read_live(self) -> Reading:
        """Return the sums of what the living workers count."""
        return sum_readings([link.table.read() for link in self._supervisor.fleet])

    def take_numbers(self) -> Numbers:
        """Return a copy of all numbers. O(n) in upstreams: some 10 us for each upstream and worker."""
        supervisor = self._supervisor
        fleet, snapshots = supervisor.fleet, supervisor.routing.snapshots.values()
        readings = {link: link.table.read() for link in fleet}
        summed = sum_readings(list(readings.values()), fleet.totals)
        plane, now_ns = summed.plane, time.monotonic_ns()
        return Numbers(
            version=__version__,
            upstreams=tuple(
                self._take_upstream(snapshot.cluster, one, summed)
                for snapshot in snapshots
                for one in snapshot.upstreams
            ),
            removed=self._take_removed(summed),
            none={
                DEFAULT_CLUSTER: plane.none,
                **{
                    one.cluster: summed.upstream(nowhere_digest(one.cluster))
                    for one in snapshots
                    if one.cluster != DEFAULT_CLUSTER
                },
            },
            guarded={snapshot.cluster: snapshot.is_guarded for snapshot in snapshots},
            affinity=plane.affinity,
            breaks=plane.breaks,
            key_conflicts=plane.key_conflicts,
            keys_learned=plane.keys_learned,
            keys_evicted=plane.keys_evicted,
            count_keys=lambda: fleet.keys.count(time.monotonic()),
            downstream_connections=plane.downstreams,
            downstream_connections_total=plane.connections,
            handshakes=plane.handshakes,
            is_accepting=self.is_ready and plane.is_accepting > 0,
            accept_pauses=plane.accept_pauses,
            name_lookups=dict(supervisor.resolver.lookups),
            certificate_reloads=dict(supervisor.certificates.reloads),
            certificates=self._list_certificates(),
            access_log_dropped=plane.access_log_dropped,
            event_loop_lag={"supervisor": _copy_histogram(self.loop_lag.histogram), "worker": plane.lag},
            workers=len(fleet.links),
            worker_restarts=fleet.restarts,
            ticks={
                str(link.index): max(0.0, (now_ns - readings[link].plane.ticked_at_ns) / NS)
                for link in fleet.links
                if link in readings and readings[link].plane.ticked_at_ns
            },
            connections_open={
                str(link.index): readings[link].plane.connections_open for link in fleet.links if link in readings
            },
            reloads=dict(supervisor.reloader.outcomes),
            reloaded_at=supervisor.reloader.succeeded_at,
            upgrades=dict(supervisor.upgrader.outcomes),
            handed_over=plane.handed_over,
        )

    def _list_certificates(self) -> dict[tuple[str, str], float]:
        """Return when each certificate in use expires, in seconds since 1970, by its listener and file."""
        listeners = self._supervisor.config.listeners
        return {
            (str(listeners[position].address), str(one.path)): one.not_after
            for position, facts in self._supervisor.certificates.facts.items()
            for one in facts
        }

    def _take_upstream(self, cluster: str, upstream: Upstream, reading: Reading) -> UpstreamNumbers:
        counters, supervisor = reading.upstream(upstream.digest), self._supervisor
        return UpstreamNumbers(
            cluster=cluster,
            id=upstream.id,
            health=upstream.health,
            admin=upstream.admin,
            is_refused=upstream.is_refused,
            sessions=supervisor.fleet.registry.count(upstream.digest),
            idle_connections=counters.idle_connections,
            counters=counters,
            probes=self._copy_probes(upstream.id),
        )

    def _take_removed(self, reading: Reading) -> tuple[UpstreamCounts, ...]:
        """Return what was counted of the upstreams that were removed lately."""
        removed = self._supervisor.fleet.removed.clusters(asyncio.get_running_loop().time())
        return tuple(
            UpstreamCounts(cluster, one, reading.upstream(upstream_digest(one)), self._copy_probes(one))
            for one, cluster in removed.items()
            if one not in self._supervisor.routing.clusters  # it may be back, and not published yet
        )

    def _copy_probes(self, upstream_id: str) -> ProbeCounters:
        counters = self._supervisor.prober.counters.get(upstream_id) or ProbeCounters()
        copied = ProbeCounters()
        copied.duration = _copy_histogram(counters.duration)
        copied.outcomes = Counter(counters.outcomes)
        return copied


def _copy_histogram(histogram: Histogram) -> Histogram:
    copied = Histogram(histogram.bounds)
    copied.counts = histogram.counts.copy()
    copied.total_s = histogram.total_s
    return copied
