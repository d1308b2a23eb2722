"""The pauses: the worst gap and delay in each stretch of time, and what they were while operations ran.

A *gap* is the time between two arrivals on one tunnel in one direction; a *pause* is what it exceeds the period by. A
*delay* is the time from the write of a message to its arrival: it leaves out what the sender was late by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Bucket = Sequence[int]  # end (ns), worst gap (ns), worst delay (ns); each begins where the one before it ends


@dataclass(frozen=True)
class Span:
    """A stretch of time, on the monotonic clock."""

    began_ns: int
    ended_ns: int

    @property
    def seconds(self) -> float:
        return (self.ended_ns - self.began_ns) / 1e9


@dataclass(frozen=True)
class Worst:
    """The worst of all tunnels in one span, in ms."""

    pause_ms: float
    delay_ms: float


@dataclass(frozen=True)
class Spread:
    """How a value is distributed."""

    p50: float
    p99: float
    worst: float
    number: int


def worst_in(span: Span, streams: Iterable[Sequence[Bucket]], period_ns: int) -> Worst:
    """Return the worst gap, less the period, and the worst delay that arrived within a span.

    `streams` are the buckets of each receiving process. Those on the edge of the span are counted whole.
    """
    gap_ns = delay_ns = 0
    for buckets in streams:
        began_ns = 0
        for ended_ns, gap, delay in buckets:
            if ended_ns > span.began_ns and began_ns < span.ended_ns:
                gap_ns, delay_ns = max(gap_ns, gap), max(delay_ns, delay)
            began_ns = ended_ns
    return Worst(max(0, gap_ns - period_ns) / 1e6, delay_ns / 1e6)


def percentile(values: Iterable[float], percent: int) -> float:
    """Return the smallest value that so many percent of all do not exceed; 0 if there is none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0.0


def spread(values: Sequence[float]) -> Spread:
    """Return median, 99th percentile and worst."""
    return Spread(percentile(values, 50), percentile(values, 99), max(values, default=0.0), len(values))


def cut_up(span: Span, seconds: float) -> list[Span]:
    """Return spans of this length that lie in a row in a longer one; that one if it is shorter."""
    step_ns = round(seconds * 1e9)
    number = (span.ended_ns - span.began_ns) // step_ns if step_ns > 0 else 0
    if number < 1:
        return [span]
    return [Span(span.began_ns + i * step_ns, span.began_ns + (i + 1) * step_ns) for i in range(number)]
