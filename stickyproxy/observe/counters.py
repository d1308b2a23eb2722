"""Counters of the data plane: cells of 64 bits in one block of memory for each upstream, and one for the plane.

The block may be shared (see `table.py`): what was counted then outlives the process that counted it, and another one
reads it. The constants name the cells; where exchanges are served, `counters.cells[IN_FLIGHT] += 1` is all that is
done. Everything that is counted has its place in a closed set; what is new to a set is counted as "other".

The properties are for those who read: they return copies.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Final, Literal

from stickyproxy.affinity.choose import BreakReason, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

METHODS: Final = (b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT")
OTHER: Final = "other"
METHOD_NAMES: Final = (*(method.decode() for method in METHODS), OTHER)
STATUS_CLASSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx")
# What came of a try at an upstream: of the exchange itself, of the dial, and the error types of RFC 9209.
ATTEMPTS: Final = (
    "ok",
    "closed",
    "truncated",
    "client_gone",
    "refused",
    "timeout",
    "tls",
    "error",
    "http_request_error",
    "http_request_denied",
    "http_protocol_error",
    "http_response_timeout",
    "http_response_header_section_size",
    "connection_limit_reached",
    "connection_terminated",
    "connection_timeout",
    "destination_not_found",
    "destination_unavailable",
    "proxy_internal_error",
    "tls_protocol_error",
    OTHER,
)
INITIATORS: Final = ("client", "upstream", "proxy")
# RFC 6455, section 7.4.1, and the IANA registry of close codes: 1012 to 1014 were added later.
_REGISTERED_CLOSES: Final = range(1000, 1016)
_PRIVATE_CLOSES: Final = {3: "3xxx", 4: "4xxx"}  # registered by libraries; for applications
CLOSE_CODES: Final = (*map(str, _REGISTERED_CLOSES), *_PRIVATE_CLOSES.values(), OTHER)
CAUSES: Final = ("close_frame", "eof", "reset", "stopping", "idle", "max_age", "ping_timeout", "aborted", OTHER)
HANDSHAKE_OUTCOMES: Final = ("tls_completed", "tls_failed", "proxy_protocol_refused")
HANDED_OVER: Final = ("connections", "tunnels")
PROBE_OUTCOMES: Final = ("passed", "failed", "refused", "timeout")
# Seconds: from a cached file on the same machine to an LLM that thinks.
DURATION_BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# Seconds: a tunnel shorter than 5 s is the mark of broken affinity, one of days a healthy dashboard.
TUNNEL_BOUNDS_S: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
# Seconds: how late a timer of the event loop fires. 5 ms is one switch of Python threads, 1 s is felt by clients.
LAG_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
BEYOND: Final = "inf"  # the label of a histogram's last place
NS: Final = 1_000_000_000  # in a second
CELL_BYTES: Final = 8

Kind = Literal["counter", "gauge", "mark"]


@dataclass(frozen=True, slots=True)
class Field:
    """The cells of a block that have one name, from `at` on; `axes` are their labels, the last one's change fastest.

    A counter only grows, and is added to those of other processes, dead ones too. A gauge stands for what is there
    now, and is added to those of living processes. A mark (a key, a point in time) is never added to anything.
    """

    name: str
    at: int
    kind: Kind
    axes: tuple[tuple[str, ...], ...] = ()

    @property
    def size(self) -> int:
        """Return how many cells there are."""
        return math.prod(map(len, self.axes))

    @property
    def cells(self) -> range:
        """Return where they are."""
        return range(self.at, self.at + self.size)


class Layout:
    """Where the cells of a block are; fields are added one behind the other."""

    def __init__(self) -> None:
        self.fields: list[Field] = []
        self.size = 0

    def add(self, kind: Kind, name: str, *axes: Iterable[str]) -> int:
        """Add a field and return its first cell."""
        field = Field(name, self.size, kind, tuple(tuple(axis) for axis in axes))
        self.fields.append(field)
        self.size += field.size
        return field.at

    def add_histogram(self, name: str, bounds_ns: tuple[int, ...]) -> tuple[int, int]:
        """Add a histogram of nanoseconds, and return its first cell and that of its total."""
        return self.add("counter", name, (*map(str, bounds_ns), BEYOND)), self.add("counter", f"{name}_ns")


def _to_ns(bounds_s: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(bound * NS) for bound in bounds_s)


DURATION_BOUNDS_NS: Final = _to_ns(DURATION_BOUNDS_S)
TUNNEL_BOUNDS_NS: Final = _to_ns(TUNNEL_BOUNDS_S)
LAG_BOUNDS_NS: Final = _to_ns(LAG_BOUNDS_S)
_OPCODES: Final = tuple(map(str, range(16)))

UPSTREAM: Final = Layout()
DIGEST: Final = UPSTREAM.add("mark", "digest")  # the 8 bytes that stand for the upstream; 0 where there is none
IN_FLIGHT: Final = UPSTREAM.add("gauge", "in_flight")
TUNNELS_OPEN: Final = UPSTREAM.add("gauge", "tunnels_open")
IDLE_CONNECTIONS: Final = UPSTREAM.add("gauge", "idle_connections")  # this and the next two are as of the last tick
STRANGERS: Final = UPSTREAM.add("gauge", "strangers")
PLACED: Final = UPSTREAM.add("gauge", "placed")
RECEIVED_BYTES: Final = UPSTREAM.add("counter", "received_bytes")  # of bodies, from the clients
SENT_BYTES: Final = UPSTREAM.add("counter", "sent_bytes")  # of bodies, to the clients
TUNNELS: Final = UPSTREAM.add("counter", "tunnels")
TUNNEL_RECEIVED_BYTES: Final = UPSTREAM.add("counter", "tunnel_received_bytes")  # from the clients
TUNNEL_SENT_BYTES: Final = UPSTREAM.add("counter", "tunnel_sent_bytes")
EXCHANGES: Final = UPSTREAM.add("counter", "exchanges", METHOD_NAMES, STATUS_CLASSES)
_ATTEMPTS: Final = UPSTREAM.add("counter", "attempts", ATTEMPTS)
DURATION, DURATION_NS = UPSTREAM.add_histogram("duration", DURATION_BOUNDS_NS)
RESPONSE, RESPONSE_NS = UPSTREAM.add_histogram("response", DURATION_BOUNDS_NS)
TUNNEL_DURATION, TUNNEL_DURATION_NS = UPSTREAM.add_histogram("tunnel_duration", TUNNEL_BOUNDS_NS)
FRAMES_RECEIVED: Final = UPSTREAM.add("counter", "frames_received", _OPCODES)
FRAMES_SENT: Final = UPSTREAM.add("counter", "frames_sent", _OPCODES)
_CLOSES: Final = UPSTREAM.add("counter", "closes", INITIATORS, CLOSE_CODES, CAUSES)

PLANE: Final = Layout()
TICKED_AT: Final = PLANE.add("mark", "ticked_at")  # of the last tick, in nanoseconds of the monotonic clock
DOWNSTREAMS: Final = PLANE.add("gauge", "downstreams")  # open connections of clients, as of the last tick
CONNECTIONS_OPEN: Final = PLANE.add("gauge", "connections_open")  # likewise, with tunnels and handshakes
IS_ACCEPTING: Final = PLANE.add("gauge", "is_accepting")  # likewise
CONNECTIONS: Final = PLANE.add("counter", "connections")  # accepted in all
ACCEPT_PAUSES: Final = PLANE.add("counter", "accept_pauses")
ACCESS_LOG_DROPPED: Final = PLANE.add("counter", "access_log_dropped")
_AFFINITY: Final = PLANE.add("counter", "affinity", Outcome)
KEY_CONFLICTS: Final = PLANE.add("counter", "key_conflicts")  # two rungs of the ladder led to two upstreams
KEYS_LEARNED: Final = PLANE.add("counter", "keys_learned")
KEYS_EVICTED: Final = PLANE.add("counter", "keys_evicted")
_BREAKS: Final = PLANE.add("counter", "breaks", BreakReason)
_HANDSHAKES: Final = PLANE.add("counter", "handshakes", HANDSHAKE_OUTCOMES)
_HANDED_OVER: Final = PLANE.add("counter", "handed_over", HANDED_OVER)
LAG, LAG_NS = PLANE.add_histogram("lag", LAG_BOUNDS_NS)

# The cells of those that are counted by name.
ATTEMPT: Final = {name: _ATTEMPTS + at for at, name in enumerate(ATTEMPTS)}
OTHER_ATTEMPT: Final = ATTEMPT[OTHER]
CLOSE: Final = {key: _CLOSES + at for at, key in enumerate(product(INITIATORS, CLOSE_CODES, CAUSES))}
AFFINITY: Final = {outcome: _AFFINITY + at for at, outcome in enumerate(Outcome)}
HITS: Final = AFFINITY[Outcome.HIT]  # apart, because it is counted for nearly every exchange
BREAKS: Final = {reason: _BREAKS + at for at, reason in enumerate(BreakReason)}
HANDSHAKES: Final = {name: _HANDSHAKES + at for at, name in enumerate(HANDSHAKE_OUTCOMES)}
HANDED: Final = {name: _HANDED_OVER + at for at, name in enumerate(HANDED_OVER)}
_ROW: Final = {method: EXCHANGES + at * len(STATUS_CLASSES) - 1 for at, method in enumerate(METHODS)}
_OTHER_ROW: Final = EXCHANGES + len(METHODS) * len(STATUS_CLASSES) - 1


def make_cells(count: int) -> memoryview[int]:
    """Return cells that are nobody else's, all 0."""
    return memoryview(bytearray(count * CELL_BYTES)).cast("q")


def name_close_code(code: int) -> str:
    """Return the label of a close code: the number of a registered one, else 3xxx, 4xxx or other.

    Clients choose the codes: each of 65,536 would be a counter of its own (RFC 6455, section 7.4.2).
    """
    return str(code) if code in _REGISTERED_CLOSES else _PRIVATE_CLOSES.get(code // 1000, OTHER)


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


def _read_histogram(cells: memoryview[int], at: int, bounds_s: tuple[float, ...]) -> Histogram:
    """Return the histogram whose cells, and then its total in nanoseconds, begin at `at`."""
    read = Histogram(bounds_s)
    total = at + len(read.counts)
    read.counts = cells[at:total].tolist()
    read.total_s = cells[total] / NS
    return read


class UpstreamCounters:
    """What is counted for one upstream, or for exchanges that reached none.

    `cells` is its block, by the constants above; without one it gets private memory. `frames_received` and
    `frames_sent` are cells of it, 16 each, by opcode: from the clients, and to them.
    """

    __slots__ = ("cells", "frames_received", "frames_sent")

    def __init__(self, cells: memoryview[int] | None = None) -> None:
        self.cells = make_cells(UPSTREAM.size) if cells is None else cells
        self.frames_received = self.cells[FRAMES_RECEIVED : FRAMES_RECEIVED + len(_OPCODES)]
        self.frames_sent = self.cells[FRAMES_SENT : FRAMES_SENT + len(_OPCODES)]

    def count_exchange(self, method: bytes, status: int) -> None:
        """Count a finished exchange by its method and the class of its status (100 to 599)."""
        self.cells[_ROW.get(method, _OTHER_ROW) + status // 100] += 1

    def count_attempt(self, outcome: str) -> None:
        """Count what came of a try, by the names in ATTEMPTS."""
        self.cells[ATTEMPT.get(outcome, OTHER_ATTEMPT)] += 1

    def observe_duration(self, duration_ns: int) -> None:
        """Count how long an exchange took, in nanoseconds."""
        cells = self.cells
        cells[DURATION + bisect_left(DURATION_BOUNDS_NS, duration_ns)] += 1
        cells[DURATION_NS] += duration_ns

    def observe_response(self, duration_ns: int) -> None:
        """Count how long an upstream took to answer, in nanoseconds."""
        cells = self.cells
        cells[RESPONSE + bisect_left(DURATION_BOUNDS_NS, duration_ns)] += 1
        cells[RESPONSE_NS] += duration_ns

    def observe_tunnel(self, duration_ns: int) -> None:
        """Count how long a tunnel was open, in nanoseconds."""
        cells = self.cells
        cells[TUNNEL_DURATION + bisect_left(TUNNEL_BOUNDS_NS, duration_ns)] += 1
        cells[TUNNEL_DURATION_NS] += duration_ns

    def count_close(self, initiator: str, code: int, cause: str) -> None:
        """Count the end of a tunnel, by the names in INITIATORS and CAUSES and the label of its close code."""
        label = name_close_code(code)
        self.cells[CLOSE.get((initiator, label, cause)) or CLOSE[initiator, label, OTHER]] += 1

    def copy(self) -> UpstreamCounters:
        """Return counters that do not change any more."""
        return UpstreamCounters(_copy(self.cells))

    @property
    def in_flight(self) -> int:
        """Return how many exchanges are under way."""
        return self.cells[IN_FLIGHT]

    @property
    def tunnels_open(self) -> int:
        """Return how many tunnels are open."""
        return self.cells[TUNNELS_OPEN]

    @property
    def idle_connections(self) -> int:
        """Return how many connections waited in the pool at the last tick."""
        return self.cells[IDLE_CONNECTIONS]

    @property
    def strangers(self) -> int:
        """Return how many exchanges and tunnels of no session were under way at the last tick."""
        return self.cells[STRANGERS]

    @property
    def placed(self) -> int:
        """Return how many clients, at the last tick, had been placed in this window and the one before."""
        return self.cells[PLACED]

    @property
    def received_bytes(self) -> int:
        """Return the bytes of bodies received from clients."""
        return self.cells[RECEIVED_BYTES]

    @property
    def sent_bytes(self) -> int:
        """Return the bytes of bodies sent to clients."""
        return self.cells[SENT_BYTES]

    @property
    def tunnels(self) -> int:
        """Return how many tunnels were opened."""
        return self.cells[TUNNELS]

    @property
    def tunnel_received_bytes(self) -> int:
        """Return the bytes that clients sent in tunnels; of open ones, as of the last second."""
        return self.cells[TUNNEL_RECEIVED_BYTES]

    @property
    def tunnel_sent_bytes(self) -> int:
        """Return the bytes that were sent to clients in tunnels; of open ones, as of the last second."""
        return self.cells[TUNNEL_SENT_BYTES]

    @property
    def exchanges(self) -> list[int]:
        """Return the exchanges, by method and then by status class."""
        return self.cells[EXCHANGES:_ATTEMPTS].tolist()

    @property
    def attempts(self) -> dict[str, int]:
        """Return the attempts by outcome, those that there were."""
        return {name: self.cells[at] for name, at in ATTEMPT.items() if self.cells[at]}

    @property
    def duration(self) -> Histogram:
        """Return how long exchanges took."""
        return _read_histogram(self.cells, DURATION, DURATION_BOUNDS_S)

    @property
    def response(self) -> Histogram:
        """Return how long the upstream took to answer."""
        return _read_histogram(self.cells, RESPONSE, DURATION_BOUNDS_S)

    @property
    def tunnel_duration(self) -> Histogram:
        """Return how long tunnels were open."""
        return _read_histogram(self.cells, TUNNEL_DURATION, TUNNEL_BOUNDS_S)

    @property
    def closes(self) -> dict[tuple[str, str, str], int]:
        """Return the ends of tunnels by initiator, label of the close code and cause, those that there were."""
        counts = self.cells[_CLOSES : _CLOSES + len(CLOSE)].tolist()
        return {key: count for key, count in zip(CLOSE, counts, strict=True) if count} if any(counts) else {}


class PlaneCounters:
    """What is counted for the whole data plane; `none` are the counters of exchanges that reached no upstream.

    `cells` is its block with that of `none` behind it, PLANE_CELLS in all; without one it gets private memory.
    """

    __slots__ = ("cells", "none")

    def __init__(self, cells: memoryview[int] | None = None) -> None:
        self.cells = make_cells(PLANE_CELLS) if cells is None else cells
        self.none = UpstreamCounters(self.cells[PLANE.size :])

    def observe_lag(self, lag_s: float) -> None:
        """Count how late a timer of the event loop fired, in seconds."""
        cells, lag_ns = self.cells, int(lag_s * NS)
        cells[LAG + bisect_left(LAG_BOUNDS_NS, lag_ns)] += 1
        cells[LAG_NS] += lag_ns

    def copy(self) -> PlaneCounters:
        """Return counters that do not change any more."""
        return PlaneCounters(_copy(self.cells))

    @property
    def ticked_at_ns(self) -> int:
        """Return when the last tick was, in nanoseconds of the monotonic clock; 0 where there was none."""
        return self.cells[TICKED_AT]

    @property
    def downstreams(self) -> int:
        """Return how many connections of clients were open at the last tick; tunnels are not among them."""
        return self.cells[DOWNSTREAMS]

    @property
    def connections_open(self) -> int:
        """Return how many connections of clients were open at the last tick, whatever they were at."""
        return self.cells[CONNECTIONS_OPEN]

    @property
    def is_accepting(self) -> int:
        """Return 1 where clients were accepted at the last tick, else 0; of several planes, how many accepted."""
        return self.cells[IS_ACCEPTING]

    @property
    def connections(self) -> int:
        """Return how many connections of clients were accepted in all."""
        return self.cells[CONNECTIONS]

    @property
    def accept_pauses(self) -> int:
        """Return how often accepting was paused."""
        return self.cells[ACCEPT_PAUSES]

    @property
    def access_log_dropped(self) -> int:
        """Return how many lines of the access log were dropped."""
        return self.cells[ACCESS_LOG_DROPPED]

    @property
    def hits(self) -> int:
        """Return how many exchanges went to the upstream of their token."""
        return self.cells[HITS]

    @property
    def affinity(self) -> dict[str, int]:
        """Return the exchanges by how their upstream was found, those that there were."""
        return {str(outcome): self.cells[at] for outcome, at in AFFINITY.items() if self.cells[at]}

    @property
    def key_conflicts(self) -> int:
        """Return how many exchanges carried keys or tokens that led to different upstreams."""
        return self.cells[KEY_CONFLICTS]

    @property
    def keys_learned(self) -> int:
        """Return how many keys were remembered in all."""
        return self.cells[KEYS_LEARNED]

    @property
    def keys_evicted(self) -> int:
        """Return how many keys were forgotten before their time, because others needed the room."""
        return self.cells[KEYS_EVICTED]

    @property
    def breaks(self) -> dict[str, int]:
        """Return the pins that were broken, by reason, those that there were."""
        return {str(reason): self.cells[at] for reason, at in BREAKS.items() if self.cells[at]}

    @property
    def handshakes(self) -> dict[str, int]:
        """Return the handshakes by outcome, those that there were."""
        return {name: self.cells[at] for name, at in HANDSHAKES.items() if self.cells[at]}

    @property
    def handed_over(self) -> dict[str, int]:
        """Return what was handed over to another process, by the names in HANDED_OVER."""
        return {name: self.cells[at] for name, at in HANDED.items()}

    @property
    def lag(self) -> Histogram:
        """Return how late timers of the event loop fired."""
        return _read_histogram(self.cells, LAG, LAG_BOUNDS_S)


PLANE_CELLS: Final = PLANE.size + UPSTREAM.size


def _copy(cells: memoryview[int]) -> memoryview[int]:
    return memoryview(bytearray(cells)).cast("q")


class ProbeCounters:
    """What is counted of the probes of one upstream; `outcomes` are by the names in PROBE_OUTCOMES."""

    __slots__ = ("duration", "outcomes")

    def __init__(self) -> None:
        self.duration = Histogram(DURATION_BOUNDS_S)
        self.outcomes = Counter(dict.fromkeys(PROBE_OUTCOMES, 0))
