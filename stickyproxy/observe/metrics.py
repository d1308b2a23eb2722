"""The metrics: names, help texts and labels for the numbers that the planes count.

A scrape has two halves. The one on the event loop copies the numbers into a `Numbers` (see `control/readings.py`); the
other, `write_metrics`, writes the text from that copy alone, and so may run in a thread.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from platform import python_version
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from typing_extensions import override

from stickyproxy.affinity.snapshot import AdminState, Health
from stickyproxy.observe.counters import (
    HANDED_OVER,
    HANDSHAKE_OUTCOMES,
    METHOD_NAMES,
    STATUS_CLASSES,
    Histogram,
    ProbeCounters,
    UpstreamCounters,
)
from stickyproxy.wire.frames import OPCODES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from prometheus_client import Metric

_UPSTREAM: Final = ("cluster", "upstream")
RELOAD_OUTCOMES: Final = ("ok", "failed", "unchanged")
UPGRADE_OUTCOMES: Final = ("ok", "failed")


@dataclass(frozen=True, slots=True)
class UpstreamCounts:
    """What was counted of one upstream until one moment; `counters` and `probes` are copies that nobody changes."""

    cluster: str
    id: str
    counters: UpstreamCounters
    probes: ProbeCounters

    @property
    def labels(self) -> tuple[str, str]:
        """Return the values of the labels `cluster` and `upstream`."""
        return self.cluster, self.id


@dataclass(frozen=True, slots=True)
class UpstreamNumbers(UpstreamCounts):
    """The numbers of one upstream that is there, at one moment."""

    health: Health
    admin: AdminState
    is_refused: bool
    sessions: int
    idle_connections: int


@dataclass(frozen=True, slots=True)
class Numbers:
    """All numbers of the proxy at one moment; `none` are those of exchanges that reached no upstream, by cluster.

    `removed` are upstreams that are no longer there, of which the counters are shown, but no state.
    `affinity`, `handshakes`, `name_lookups` and `certificate_reloads` are by outcome and `breaks` by reason; `guarded`
    says of each cluster whether it serves although no upstream is healthy; `certificates` are the times at which they
    expire, in seconds since 1970, by listener and file. `event_loop_lag` is by kind of process. `ticks` says of each
    worker how many seconds ago its loop last ticked, `connections_open` how many it has; `reloads` and
    `upgrades` are by outcome, `reloaded_at` is the time since 1970 of the last configuration that was taken, and
    `handed_over` counts connections and tunnels. `count_keys` takes 0.1 s for a million of them: it is for the thread
    that makes the scrape.
    """

    version: str
    upstreams: tuple[UpstreamNumbers, ...]
    none: Mapping[str, UpstreamCounters]
    guarded: Mapping[str, bool]
    affinity: Mapping[str, int]
    breaks: Mapping[str, int]
    downstream_connections: int
    downstream_connections_total: int
    access_log_dropped: int
    event_loop_lag: Mapping[str, Histogram]
    handshakes: Mapping[str, int]
    is_accepting: bool
    accept_pauses: int
    name_lookups: Mapping[str, int]
    certificate_reloads: Mapping[str, int]
    certificates: Mapping[tuple[str, str], float]
    workers: int = 0
    worker_restarts: int = 0
    ticks: Mapping[str, float] = field(default_factory=dict)
    connections_open: Mapping[str, int] = field(default_factory=dict)
    reloads: Mapping[str, int] = field(default_factory=dict)
    reloaded_at: float | None = None
    upgrades: Mapping[str, int] = field(default_factory=dict)
    handed_over: Mapping[str, int] = field(default_factory=dict)
    removed: tuple[UpstreamCounts, ...] = ()
    key_conflicts: int = 0
    keys_learned: int = 0
    keys_evicted: int = 0
    count_keys: Callable[[], int] = lambda: 0

    @property
    def counted(self) -> tuple[UpstreamCounts, ...]:
        """Return all upstreams of which something is counted."""
        return (*self.upstreams, *self.removed)


class NumbersCollector(Collector):
    """Names the numbers of one moment for prometheus_client."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers

    @override
    def collect(self) -> Iterator[Metric]:
        numbers = self._numbers
        yield from _name_exchanges(numbers)
        yield from _name_affinity(numbers)
        yield from _name_tunnels(numbers)
        yield from _name_upstreams(numbers)
        yield from _name_probes(numbers.counted)
        yield from _name_connections(numbers)
        yield from _name_certificates(numbers)
        yield from _name_workers(numbers)
        yield from _name_proxy(numbers)


def write_metrics(numbers: Numbers, accept: str) -> tuple[bytes, str]:
    """Return the exposition and its media type, as the Accept header of the scrape asks for.

    O(n) in the upstreams, about 0.3 ms for each: with many, call it in a thread.
    """
    try:
        encode, content_type = choose_encoder(accept)
    except TypeError:  # it compares a version that is no number
        encode, content_type = choose_encoder("")
    registry = CollectorRegistry()
    for collector in (NumbersCollector(numbers), ProcessCollector(registry=None), PlatformCollector(registry=None)):
        registry.register(collector)
    return encode(registry), content_type


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"stickyproxy_{name}", text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"stickyproxy_{name}", text, labels=labels)


def _histogram(name: str, text: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"stickyproxy_{name}", text, labels=labels)


def _add(family: HistogramMetricFamily, labels: tuple[str, ...], histogram: Histogram) -> None:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    family.add_metric(labels, list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.total_s)


def _name_exchanges(numbers: Numbers) -> Iterator[Metric]:
    rows = [(upstream.labels, upstream.counters) for upstream in numbers.counted]
    none = [((cluster, ""), counters) for cluster, counters in numbers.none.items()]

    finished = _counter(
        "exchanges",
        "Exchanges that have ended, by the upstream that they reached; the upstream is empty where they reached none.",
        *_UPSTREAM,
        "method",
        "status_class",
    )
    duration = _histogram(
        "exchange_duration_seconds",
        "Seconds from the head of a request to the end of its response; tunnels are not in it.",
        *_UPSTREAM,
    )
    relayed = _counter(
        "relayed_bytes",
        "Bytes of bodies relayed: received from clients, sent to clients; tunnels are not in it.",
        *_UPSTREAM,
        "direction",
    )
    for labels, counters in rows + none:
        for place, count in enumerate(counters.exchanges):
            if count:
                method, status_class = divmod(place, len(STATUS_CLASSES))
                finished.add_metric((*labels, METHOD_NAMES[method], STATUS_CLASSES[status_class]), count)
        _add(duration, labels, counters.duration)
        relayed.add_metric((*labels, "received"), counters.received_bytes)
        relayed.add_metric((*labels, "sent"), counters.sent_bytes)
    yield finished
    yield duration
    yield relayed

    response = _histogram(
        "upstream_response_seconds",
        "Seconds from the head of a request sent to the head of its response.",
        *_UPSTREAM,
    )
    attempts = _counter(
        "attempts", "Tries of exchanges at an upstream; one exchange may need several.", *_UPSTREAM, "outcome"
    )
    in_flight = _gauge("exchanges_in_flight", "Exchanges under way; tunnels are not in it.", *_UPSTREAM)
    for labels, counters in rows:
        _add(response, labels, counters.response)
        for outcome, count in counters.attempts.items():
            attempts.add_metric((*labels, outcome), count)
    for upstream in numbers.upstreams:
        in_flight.add_metric(upstream.labels, upstream.counters.in_flight)
    yield response
    yield attempts
    yield in_flight


def _name_affinity(numbers: Numbers) -> Iterator[Metric]:
    affinity = _counter("affinity", "Exchanges, by how their upstream was found.", "outcome")
    for outcome, count in {"hit": 0, **numbers.affinity}.items():
        affinity.add_metric((outcome,), count)
    yield affinity
    breaks = _counter("affinity_breaks", "Pins that were broken: the client was moved and lost its session.", "reason")
    for reason, count in numbers.breaks.items():
        breaks.add_metric((reason,), count)
    yield breaks
    yield from _keys(numbers)

    active = _gauge("sessions_active", "Sessions in use: something of them is open, or was not long ago.", *_UPSTREAM)
    remaining = _gauge(
        "drain_sessions_remaining", "Sessions that an upstream in drain still holds; none for others.", *_UPSTREAM
    )
    for upstream in numbers.upstreams:
        active.add_metric(upstream.labels, upstream.sessions)
        if upstream.admin is AdminState.DRAIN:
            remaining.add_metric(upstream.labels, upstream.sessions)
    yield active
    yield remaining


def _keys(numbers: Numbers) -> Iterator[Metric]:
    for name, text, count in (
        ("keys_learned", "Keys that were remembered: made by the app or the client, each leads to an upstream.",
         numbers.keys_learned),
        ("keys_evicted", "Keys that were forgotten before their time, because others needed the room.",
         numbers.keys_evicted),
        ("key_conflicts", "Exchanges whose keys or token led to different upstreams.", numbers.key_conflicts),
    ):  # fmt: skip
        counted = _counter(name, text)
        counted.add_metric((), count)
        yield counted
    known = _gauge("keys", "Keys that are remembered now, by all workers together.")
    known.add_metric((), numbers.count_keys())
    yield known


def _name_tunnels(numbers: Numbers) -> Iterator[Metric]:
    is_open = _gauge("tunnels_open", "Tunnels (WebSockets) that are open.", *_UPSTREAM)
    opened = _counter("tunnels", "Tunnels that were opened.", *_UPSTREAM)
    duration = _histogram("tunnel_duration_seconds", "Seconds that tunnels were open, of those that ended.", *_UPSTREAM)
    size = _counter(
        "tunnel_bytes",
        "Bytes relayed in tunnels, open ones too: received from clients, sent to clients.",
        *_UPSTREAM,
        "direction",
    )
    frames = _counter(
        "tunnel_frames",
        "WebSocket frames seen in tunnels: received from clients, sent to clients.",
        *_UPSTREAM,
        "direction",
        "opcode",
    )
    closes = _counter(
        "tunnel_closes",
        "Tunnels that ended, by who ended them, the close code (1006: no Close frame) and the cause.",
        *_UPSTREAM,
        "initiator",
        "code",
        "cause",
    )
    for present in numbers.upstreams:
        is_open.add_metric(present.labels, present.counters.tunnels_open)
    for upstream in numbers.counted:
        labels, counters = upstream.labels, upstream.counters
        opened.add_metric(labels, counters.tunnels)
        _add(duration, labels, counters.tunnel_duration)
        size.add_metric((*labels, "received"), counters.tunnel_received_bytes)
        size.add_metric((*labels, "sent"), counters.tunnel_sent_bytes)
        for direction, counts in (("received", counters.frames_received), ("sent", counters.frames_sent)):
            for opcode, count in _by_opcode(counts).items():
                frames.add_metric((*labels, direction, opcode), count)
        for (initiator, code, cause), count in counters.closes.items():
            closes.add_metric((*labels, initiator, code, cause), count)
    yield from (is_open, opened, duration, size, frames, closes)


def _by_opcode(counts: Sequence[int]) -> Counter[str]:
    """Return frame counts by the name of their opcode; reserved opcodes share one."""
    named: Counter[str] = Counter()
    for opcode, count in enumerate(counts):
        if count:
            named[OPCODES.get(opcode, "other")] += count
    return named


def _name_upstreams(numbers: Numbers) -> Iterator[Metric]:
    connections = _gauge(
        "upstream_connections",
        "Connections to upstreams: idle in the pool, or busy (held by an exchange or a tunnel, or being opened).",
        *_UPSTREAM,
        "state",
    )
    health = _gauge("upstream_health", "1 for the health that was observed, else 0.", *_UPSTREAM, "health")
    refused = _gauge(
        "upstream_refused", "1 where the last connection was refused (its process is gone), else 0.", *_UPSTREAM
    )
    admin = _gauge("upstream_admin_state", "1 for the state that the operator set, else 0.", *_UPSTREAM, "admin_state")
    for upstream in numbers.upstreams:
        labels, counters = upstream.labels, upstream.counters
        connections.add_metric((*labels, "idle"), upstream.idle_connections)
        connections.add_metric((*labels, "busy"), counters.in_flight + counters.tunnels_open)
        for possible in Health:
            health.add_metric((*labels, possible), upstream.health is possible)
        refused.add_metric(labels, upstream.is_refused)
        for state in AdminState:
            admin.add_metric((*labels, state), upstream.admin is state)
    guarded = _gauge(
        "upstream_guarded", "1 where a cluster serves new clients although no upstream is healthy, else 0.", "cluster"
    )
    for cluster, is_guarded in numbers.guarded.items():
        guarded.add_metric((cluster,), is_guarded)
    yield from (connections, health, refused, admin, guarded)


def _name_probes(upstreams: tuple[UpstreamCounts, ...]) -> Iterator[Metric]:
    duration = _histogram("probe_duration_seconds", "Seconds that probes took, whatever their outcome.", *_UPSTREAM)
    outcomes = _counter("probes", "Probes (active health checks), by outcome.", *_UPSTREAM, "outcome")
    for upstream in upstreams:
        _add(duration, upstream.labels, upstream.probes.duration)
        for outcome, count in upstream.probes.outcomes.items():
            outcomes.add_metric((*upstream.labels, outcome), count)
    yield duration
    yield outcomes


def _name_connections(numbers: Numbers) -> Iterator[Metric]:
    connections = _gauge("downstream_connections", "Connections of clients that are open; tunnels are not in it.")
    connections.add_metric((), numbers.downstream_connections)
    yield connections
    # Not "downstream_connections": OpenMetrics has one family, and so one type, for each name without its suffix.
    accepted = _counter("downstream_connections_accepted", "Connections of clients that were accepted.")
    accepted.add_metric((), numbers.downstream_connections_total)
    yield accepted
    accepting = _gauge("accepting", "1 while clients are accepted, 0 near the limit of connections and when stopping.")
    accepting.add_metric((), numbers.is_accepting)
    yield accepting
    pauses = _counter("accept_pauses", "How often accepting was paused, by reason.", "reason")
    pauses.add_metric(("connections",), numbers.accept_pauses)
    yield pauses
    handshakes = _counter("handshakes", "What clients must do before their first request, by outcome.", "outcome")
    for outcome in HANDSHAKE_OUTCOMES:
        handshakes.add_metric((outcome,), numbers.handshakes.get(outcome, 0))
    yield handshakes


def _name_certificates(numbers: Numbers) -> Iterator[Metric]:
    reloads = _counter("certificate_reloads", "Certificates that were taken anew because a file changed.", "outcome")
    for outcome, count in numbers.certificate_reloads.items():
        reloads.add_metric((outcome,), count)
    yield reloads
    ends = _gauge(
        "certificate_not_after_timestamp_seconds",
        "When a certificate in use expires, in seconds since 1970.",
        "listener",
        "certificate",
    )
    for labels, not_after in numbers.certificates.items():
        ends.add_metric(labels, not_after)
    yield ends


def _name_workers(numbers: Numbers) -> Iterator[Metric]:
    running = _gauge("workers", "Workers that are running.")
    running.add_metric((), numbers.workers)
    yield running
    restarts = _counter("worker_restarts", "Workers that ended unasked and were replaced.")
    restarts.add_metric((), numbers.worker_restarts)
    yield restarts
    ticks = _gauge(
        "worker_last_tick_age_seconds",
        "Seconds since the event loop of a worker last ticked, which it does every 0.25 s.",
        "worker",
    )
    for worker, age_s in numbers.ticks.items():
        ticks.add_metric((worker,), age_s)
    yield ticks
    connections = _gauge(
        "worker_connections", "Connections of clients that a worker has, tunnels among them.", "worker"
    )
    for worker, count in numbers.connections_open.items():
        connections.add_metric((worker,), count)
    yield connections
    reloads = _counter("reloads", "Times that the configuration was read again, by outcome.", "outcome")
    for outcome in RELOAD_OUTCOMES:
        reloads.add_metric((outcome,), numbers.reloads.get(outcome, 0))
    yield reloads
    reloaded_at = _gauge(
        "config_last_reload_success_timestamp_seconds",
        "When the configuration in use was read, in seconds since 1970.",
    )
    if numbers.reloaded_at is not None:
        reloaded_at.add_metric((), numbers.reloaded_at)
    yield reloaded_at
    upgrades = _counter("upgrades", "Times that the program was to be replaced by another, by outcome.", "outcome")
    for outcome in UPGRADE_OUTCOMES:
        upgrades.add_metric((outcome,), numbers.upgrades.get(outcome, 0))
    yield upgrades
    handed_over = _counter("handed_over", "What workers handed over to others that took their place, by kind.", "kind")
    for kind in HANDED_OVER:
        handed_over.add_metric((kind,), numbers.handed_over.get(kind, 0))
    yield handed_over


def _name_proxy(numbers: Numbers) -> Iterator[Metric]:
    lookups = _counter("name_lookups", "Look-ups of the names of upstreams, by outcome.", "outcome")
    for outcome, count in numbers.name_lookups.items():
        lookups.add_metric((outcome,), count)
    yield lookups
    dropped = _counter("access_log_dropped", "Lines of the access log that were dropped: nobody took them in time.")
    dropped.add_metric((), numbers.access_log_dropped)
    yield dropped
    lag = _histogram(
        "event_loop_lag_seconds",
        "Seconds that a timer of the event loop fired late, two or four times each second.",
        "process",
    )
    for process, histogram in numbers.event_loop_lag.items():
        _add(lag, (process,), histogram)
    yield lag
    yield InfoMetricFamily(
        "stickyproxy_build",
        "Always 1; the labels name the version of the proxy and of Python.",
        {"version": numbers.version, "python": python_version()},
    )
