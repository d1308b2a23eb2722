"""One end of a tunnel, the same for client and app: it sends a numbered message each period and judges what comes.

Both run tens of thousands of messages a second beside the proxy on the same cores, so the path of one is short: no
task, no timer and no buffer of its own; a `Pace` has one timer for all tunnels and sends for a part of them at a time.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final, cast
from zlib import crc32

from typing_extensions import override

from tests.bench.operations.messages import OTHER, RESIDUE, Arrivals, Direction, Scanner

if TYPE_CHECKING:
    from collections.abc import Callable

SLOT_S: Final = 0.01  # between two ticks: the period is cut into so many parts; 2 ms cost a tenth more CPU
BUCKET_NS: Final = 50_000_000  # the worst gap and delay are kept for each stretch of this length
_CLOCK_S: Final = 0.001
_NEVER: Final = 2**63  # later than all: the first arrival ends no gap


class Pace:
    """The timer of all tunnels of a process, and the worst that any of them saw.

    A tick that comes later than a whole period is not made up for, so that an overloaded machine sends less, which
    `missed` tells, and not ever more.
    """

    def __init__(self, period_s: float) -> None:
        self.period_s = period_s
        self.missed = 0
        self.worst_gap_ns = 0
        self.worst_delay_ns = 0
        self.sent = 0
        self.received = 0
        self.buckets: list[tuple[int, int, int]] = []  # end (ns), worst gap (ns), worst delay (ns)
        self.phases: dict[str, dict[str, list[int]]] = {}
        self._phase = ""
        self._ends: dict[End, int] = {}
        self._slots: list[dict[End, None]] = [{} for _ in range(max(1, min(50, round(period_s / SLOT_S))))]
        self._next = 0
        self._due_s = 0.0
        self._bucket_ns = 0
        self._is_running = False

    def add(self, end: End) -> None:
        """Send for this end from now on."""
        slot = min(range(len(self._slots)), key=lambda number: len(self._slots[number]))
        self._slots[slot][end] = None
        self._ends[end] = slot

    def remove(self, end: End) -> None:
        """Send no more for this end."""
        slot = self._ends.pop(end, None)
        if slot is not None:
            del self._slots[slot][end]

    def start(self) -> None:
        """Begin to send."""
        loop = asyncio.get_running_loop()
        self._is_running = True
        self._due_s = loop.time()
        self._tick()

    def stop(self) -> None:
        """Send nothing more; what is under way may still arrive."""
        self._is_running = False

    def begin_phase(self, name: str) -> None:
        """Note the worst gap and delay of each tunnel in the phase that ends, and begin another of this name."""
        gaps, delays = [], []
        for end in self._ends:
            gaps.append(end.worst_gap_ns)
            delays.append(end.worst_delay_ns)
            end.worst_gap_ns = end.worst_delay_ns = 0
        if self._phase:
            self.phases[self._phase] = {"gaps": gaps, "delays": delays}
        self._phase = name

    def report(self) -> dict[str, Any]:
        """Return the facts of all tunnels together, as plain values."""
        self._close_bucket(time.monotonic_ns())
        return {
            "buckets": self.buckets,
            "phases": self.phases,
            "missed": self.missed,
            **self.totals(),
        }

    def totals(self) -> dict[str, int | float]:
        """Return how many messages were sent and came, and the CPU time of this process (s)."""
        return {"sent": self.sent, "received": self.received, "cpu_s": time.process_time()}

    def _tick(self) -> None:
        if not self._is_running:
            return
        loop = asyncio.get_running_loop()
        now_s, now_ns = loop.time(), time.monotonic_ns()
        step_s = self.period_s / len(self._slots)
        if now_s - self._due_s > self.period_s:
            late = int((now_s - self._due_s) / step_s)
            self.missed += late
            self._due_s += late * step_s
        while self._due_s <= now_s:
            ends = self._slots[self._next]
            for end in ends:
                end.send(now_ns)
            self.sent += len(ends)
            self._next = (self._next + 1) % len(self._slots)
            self._due_s += step_s
        if now_ns - self._bucket_ns >= BUCKET_NS:
            self._close_bucket(now_ns)
        # The clock of the loop has milliseconds: what is due within one would come at once, and again and again.
        loop.call_later(max(_CLOCK_S, self._due_s - now_s), self._tick)

    def _close_bucket(self, now_ns: int) -> None:
        self.buckets.append((now_ns, self.worst_gap_ns, self.worst_delay_ns))
        self.worst_gap_ns = self.worst_delay_ns = 0
        self._bucket_ns = now_ns


class End(asyncio.Protocol):
    """One end of one tunnel; `on_lost` is called once, when its connection has ended."""

    __slots__ = (
        "_last_ns",
        "_on_lost",
        "_pace",
        "_read",
        "_scanner",
        "_size",
        "_transport",
        "_write",
        "arrivals",
        "direction",
        "end",
        "lost_ns",
        "sent",
        "tunnel",
        "worst_delay_ns",
        "worst_gap_ns",
    )

    def __init__(self, tunnel: int, direction: Direction, pace: Pace, on_lost: Callable[[End], None]) -> None:
        self.tunnel = tunnel
        self.direction = direction  # what comes to this end
        self.arrivals = Arrivals()
        self.sent = 0
        self.lost_ns = 0  # when the connection ended; 0: it has not
        self.end = ""
        self.worst_gap_ns = 0
        self.worst_delay_ns = 0
        self._last_ns = _NEVER
        self._pace = pace
        self._on_lost = on_lost
        self._read = direction.read
        self._size = direction.frame_bytes
        self._write = OTHER[direction.name].write
        self._scanner = Scanner(direction)

    def open(self, transport: asyncio.Transport, rest: bytes) -> None:
        """Take over a connection whose handshake is done; `rest` came behind it."""
        self._transport = transport
        transport.set_protocol(self)
        self._pace.add(self)
        if rest:
            self.data_received(rest)

    def close(self) -> None:
        """End the connection at once."""
        self._transport.abort()

    def send(self, now_ns: int) -> None:
        """Send the next message."""
        self._transport.write(self._write(self.tunnel, self.sent, now_ns))
        self.sent += 1

    @override
    def data_received(self, data: bytes) -> None:
        if len(data) == self._size and crc32(data) == RESIDUE and not self._scanner.is_inside:
            self._take(data)
        else:
            for frame in self._scanner.feed(data, self.arrivals):
                self._take(frame)

    def _take(self, frame: bytes) -> None:
        """Judge a whole message."""
        tunnel, sequence, sent_ns, number = self._read(frame)
        arrivals = self.arrivals
        if tunnel != self.tunnel or number != self.direction.number:
            arrivals.strayed += 1
            return
        pace, now_ns = self._pace, time.monotonic_ns()
        pace.received += 1
        if sequence == arrivals.expected:
            arrivals.expected = sequence + 1
            arrivals.received += 1
        else:
            arrivals.take(sequence)
        gap_ns, delay_ns, self._last_ns = now_ns - self._last_ns, now_ns - sent_ns, now_ns
        if gap_ns > self.worst_gap_ns:
            self.worst_gap_ns = gap_ns
            pace.worst_gap_ns = max(pace.worst_gap_ns, gap_ns)
        elif gap_ns > pace.worst_gap_ns:
            pace.worst_gap_ns = gap_ns
        if delay_ns > self.worst_delay_ns:
            self.worst_delay_ns = delay_ns
            pace.worst_delay_ns = max(pace.worst_delay_ns, delay_ns)
        elif delay_ns > pace.worst_delay_ns:
            pace.worst_delay_ns = delay_ns

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.lost_ns = time.monotonic_ns()
        self.end = (self._scanner.controls or [""])[-1] or (type(exc).__name__ if exc else "end of file")
        self._pace.remove(self)
        self._on_lost(self)

    def report(self) -> dict[str, Any]:
        """Return the facts of this end, as plain values."""
        counts = self.arrivals.describe()
        # A connection that ended may have ended inside a frame; in one that did not, nothing more would come.
        counts["corrupt"] += not self.lost_ns and self._scanner.is_inside and not self._scanner.is_damaged
        controls = len(self._scanner.controls)
        return {"sent": self.sent, "lost_ns": self.lost_ns, "end": self.end, "controls": controls, **counts}


def as_transport(transport: asyncio.BaseTransport) -> asyncio.Transport:
    """Return what a protocol of a stream is given, by its type."""
    return cast("asyncio.Transport", transport)
