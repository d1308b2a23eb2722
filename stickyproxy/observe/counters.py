"""Counters of the data plane: plain integers on objects made beforehand, one object for each upstream.

Nothing here is looked up by label while a request is served; `metrics.py` gives the numbers their names at a scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Final

METHODS: Final = (b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT")
METHOD_NAMES: Final = (*(method.decode() for method in METHODS), "other")
STATUS_CLASSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx")
_ROW: Final = {method: at * len(STATUS_CLASSES) - 1 for at, method in enumerate(METHODS)}
_OTHER_ROW: Final = len(METHODS) * len(STATUS_CLASSES) - 1
# Seconds: from a cached file on the same machine to an LLM that thinks.
DURATION_BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# Seconds: a tunnel shorter than 5 s is the mark of broken affinity, one of days a healthy dashboard.
TUNNEL_BOUNDS_S: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)


class Histogram:
    """Counts of durations in seconds; `counts` has one place for each bound and one beyond the last."""

    __slots__ = ("bounds", "counts", "total_s")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total_s = 0.0

    def observe(self, duration_s: float) -> None:
        """Count one duration in seconds."""
        self.counts[bisect_left(self.bounds, duration_s)] += 1
        self.total_s += duration_s


class UpstreamCounters:
    """What is counted for one upstream, or for exchanges that reached none."""

    __slots__ = (
        "attempts",
        "closes",
        "duration",
        "exchanges",
        "frames_received",
        "frames_sent",
        "in_flight",
        "received_bytes",
        "response",
        "sent_bytes",
        "tunnel_duration",
        "tunnel_received_bytes",
        "tunnel_sent_bytes",
        "tunnels",
        "tunnels_open",
    )

    def __init__(self) -> None:
        self.exchanges = [0] * (len(METHOD_NAMES) * len(STATUS_CLASSES))
        self.duration = Histogram(DURATION_BOUNDS_S)
        self.response = Histogram(DURATION_BOUNDS_S)
        self.attempts: Counter[str] = Counter()
        self.in_flight = 0
        self.received_bytes = 0  # bodies, from the clients
        self.sent_bytes = 0  # bodies, to the clients
        self.tunnels = 0
        self.tunnels_open = 0
        self.tunnel_duration = Histogram(TUNNEL_BOUNDS_S)
        self.tunnel_received_bytes = 0  # of tunnels that have ended, from the clients
        self.tunnel_sent_bytes = 0
        self.frames_received = [0] * 16  # by opcode, from the clients
        self.frames_sent = [0] * 16
        self.closes: Counter[tuple[str, int, str]] = Counter()  # (initiator, code, cause)

    def count_exchange(self, method: bytes, status: int) -> None:
        """Count a finished exchange by its method and the class of its status (100 to 599)."""
        self.exchanges[_ROW.get(method, _OTHER_ROW) + status // 100] += 1

    def count_close(self, initiator: str, code: int, cause: str) -> None:
        """Count the end of a tunnel. Codes of applications (3000 to 4999) are folded by thousands, others to 0.

        Clients choose the codes: each of 65,536 would be a counter of its own (RFC 6455, section 7.4.2).
        """
        if not 1000 <= code <= 1015:  # noqa: PLR2004 -- the registered ones
            code = code // 1000 * 1000 if 3000 <= code < 5000 else 0  # noqa: PLR2004
        self.closes[initiator, code, cause] += 1


class PlaneCounters:
    """What is counted for the whole data plane. `affinity` and `breaks` are by outcome and reason."""

    __slots__ = ("affinity", "breaks", "connections", "handshakes", "hits", "none")

    def __init__(self) -> None:
        self.hits = 0  # affinity outcome "hit", apart because it is counted for nearly every exchange
        self.affinity: Counter[str] = Counter()
        self.breaks: Counter[str] = Counter()
        self.connections = 0  # accepted in all
        self.handshakes: Counter[str] = Counter()  # by the names in HANDSHAKE_OUTCOMES
        self.none = UpstreamCounters()  # exchanges that reached no upstream


HANDSHAKE_OUTCOMES: Final = ("tls_completed", "tls_failed", "proxy_protocol_refused")
PROBE_OUTCOMES: Final = ("passed", "failed", "refused", "timeout")
# Seconds: how late a timer of the event loop fires. 5 ms is one switch of Python threads, 1 s is felt by clients.
LAG_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class ProbeCounters:
    """What is counted of the probes of one upstream; `outcomes` are by the names in PROBE_OUTCOMES."""

    __slots__ = ("duration", "outcomes")

    def __init__(self) -> None:
        self.duration = Histogram(DURATION_BOUNDS_S)
        self.outcomes = Counter(dict.fromkeys(PROBE_OUTCOMES, 0))
