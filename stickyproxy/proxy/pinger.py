"""Keeps an idle tunnel alive with Pings of the proxy's own, and finds out when a side is gone.

Each side that has sent nothing for the interval gets a Ping at a frame boundary; any byte from it is a sign of life.
The Pong is taken out of the stream: the other side never asked for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.wire.pings import PongFilter, write_ping

if TYPE_CHECKING:
    from stickyproxy.proxy.settings import Pings
    from stickyproxy.proxy.side import Side

_PREFIX_BYTES: Final = 8  # random, so that nobody else's Pong can be taken for ours


@dataclass(frozen=True, slots=True)
class PulseState:
    """What is known of the life of one side, in seconds before now; `pinged_s` is None while no Ping is unanswered."""

    silent_s: float = 0.0
    heard_bytes: int = 0
    pinged_s: float | None = None


@dataclass(frozen=True, slots=True)
class PingerState:
    """Where the Pings of a tunnel stand; `prefix` is empty while none was sent."""

    prefix: bytes = b""
    client: PulseState = PulseState()
    upstream: PulseState = PulseState()


class _Pulse:
    """What is known of the life of one side; times are coarse monotonic seconds."""

    __slots__ = ("heard_at", "heard_bytes", "pinged_at")

    def __init__(self, now: float) -> None:
        self.heard_at = now
        self.heard_bytes = 0
        self.pinged_at: float | None = None

    def listen(self, side: Side, now: float) -> None:
        """Take what came from the side since the last look for a sign of life."""
        is_answered = self.pinged_at is not None and (side.filter is None or side.filter.pongs > 0)
        # A side that is not read, since the other one takes nothing, cannot be heard.
        if is_answered or side.received_bytes != self.heard_bytes or not side.transport.is_reading():
            self.heard_at, self.heard_bytes, self.pinged_at = now, side.received_bytes, None

    def export(self, now: float) -> PulseState:
        """Return what is known."""
        pinged_s = None if self.pinged_at is None else max(0.0, now - self.pinged_at)
        return PulseState(max(0.0, now - self.heard_at), self.heard_bytes, pinged_s)

    def go_on_from(self, state: PulseState, now: float) -> None:
        """Go on with what another process knew."""
        self.heard_at, self.heard_bytes = now - state.silent_s, state.heard_bytes
        self.pinged_at = None if state.pinged_s is None else now - state.pinged_s


class Pinger:
    """The Pings of one tunnel."""

    __slots__ = ("_client", "_pings", "_prefix", "_upstream")

    def __init__(self, pings: Pings, now: float) -> None:
        self._pings = pings
        self._prefix = b""
        self._client = _Pulse(now)
        self._upstream = _Pulse(now)

    def export(self, now: float) -> PingerState:
        """Return where the Pings stand."""
        return PingerState(self._prefix, self._client.export(now), self._upstream.export(now))

    def go_on_from(self, state: PingerState, now: float) -> None:
        """Go on where those of another process stand, so that a Ping already sent has its time, and not more."""
        self._prefix = state.prefix
        self._client.go_on_from(state.client, now)
        self._upstream.go_on_from(state.upstream, now)

    def sweep(self, client: Side, upstream: Side, now: float) -> Side | None:
        """Send the Pings that are due; return a side that has not answered one in time, if there is any."""
        for side, other, pulse in ((client, upstream, self._client), (upstream, client, self._upstream)):
            pulse.listen(side, now)
            if side.is_eof or side.scanner.is_lost:
                continue
            if pulse.pinged_at is not None:
                if now - pulse.pinged_at >= self._pings.timeout_s:
                    return side
            elif other.is_eof:
                continue  # nothing can be sent to the side any more
            elif now - pulse.heard_at >= self._pings.interval_s and other.scanner.is_at_boundary:
                self._ping(side, is_upstream=side is upstream)
                pulse.pinged_at = now
        return None

    def _ping(self, side: Side, *, is_upstream: bool) -> None:
        self._prefix = self._prefix or os.urandom(_PREFIX_BYTES)
        if side.filter is None:
            side.filter = PongFilter(self._prefix, side.scanner)
        side.filter.pongs = 0
        side.say(write_ping(self._prefix, mask=os.urandom(4) if is_upstream else None))

    @override
    def __repr__(self) -> str:
        return f"<Pinger client={self._client.pinged_at} upstream={self._upstream.pinged_at}>"
