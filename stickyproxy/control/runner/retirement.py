"""The end of app processes without the end of a session: drained, closed at the drain timeout, then stopped."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import override

from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stickyproxy.control.runner.runner import Runner
    from stickyproxy.control.runner.seat import Seat

logger = logging.getLogger(__name__)

_LOOK_S: Final = 0.2
_AGAIN_S: Final = 5.0
_REASON: Final = "a new version of the app has taken over"


class Retirement:
    """Retires some seats. `drain_timeout_s` is None for as long as their sessions last; `pace_per_s` are clients.

    Each seat drains first: its clients stay, no new one comes. Once nothing of it is in use it is stopped. At the drain
    timeout its tunnels are closed, so many in a second over all seats, and its pins hold only as long as something of
    their session is open; who comes next is placed anew. What is under way even then has the grace of the proxy.
    """

    def __init__(self, host: Runner, seats: Sequence[Seat], drain_timeout_s: float | None, pace_per_s: float) -> None:
        self._host = host
        self.seats = tuple(seats)
        self._pace_per_s = pace_per_s
        self.close_at = math.inf if drain_timeout_s is None else host.now + drain_timeout_s
        self._end_at = math.inf

    @property
    def left(self) -> tuple[Seat, ...]:
        """Return the seats that have not ended."""
        return tuple(seat for seat in self.seats if not seat.ended.done())

    @property
    def sessions_left(self) -> int:
        """Return how many sessions the seats hold."""
        return sum(self._host.count_sessions(seat) for seat in self.left)

    async def run(self) -> None:
        """Retire the seats; return when the last one has ended."""
        for seat in self.left:
            if seat.state == "ready":
                seat.state = "draining"
        self._host.drain(self.left)
        closing = spawn(self._close(), "drain timeout")
        try:
            await asyncio.gather(*(self._retire(seat) for seat in self.left))
        finally:
            closing.cancel()

    async def _close(self) -> None:
        """Close what is left at the drain timeout."""
        host = self._host
        await self._until(lambda: host.now >= self.close_at)
        left = self.left
        host.close_pins(left)
        await host.settle()
        count = await host.shut_tunnels(left, self._pace_per_s, _REASON)
        self._end_at = host.now + count / self._pace_per_s + host.grace_s
        logger.info("the drain timeout is over: %d tunnels are closed, %g clients a second", count, self._pace_per_s)
        while True:  # a worker that has come meanwhile does not know of it
            await asyncio.sleep(_AGAIN_S)
            await host.shut_tunnels(self.left, self._pace_per_s, _REASON)

    async def _retire(self, seat: Seat) -> None:
        host = self._host
        await self._until(lambda: seat.ended.done() or host.is_empty(seat) or host.now >= self.close_at)
        if not seat.ended.done():
            host.close_pins([seat])  # from here on only what is under way goes there
            await host.settle()
            await self._until(lambda: seat.ended.done() or host.is_idle(seat) or host.now >= self._end_at)
        if not seat.ended.done():
            await seat.stop()
        await asyncio.shield(seat.ended)

    @staticmethod
    async def _until(is_so: Callable[[], bool]) -> None:
        """Look again and again: what it waits for is counted in the memory of other processes."""
        while not is_so():  # noqa: ASYNC110 -- as said
            await asyncio.sleep(_LOOK_S)

    def leave(self) -> dict[str, Any]:
        """Return what another image of this process needs to go on."""
        left_s = None if math.isinf(self.close_at) else max(0.0, self.close_at - self._host.now)
        return {"ids": [seat.id for seat in self.left], "left_s": left_s, "pace_per_s": self._pace_per_s}

    @classmethod
    def adopt(cls, host: Runner, left: Mapping[str, Any]) -> Self:
        """Return the retirement that a former image of this process has left."""
        seats = [host.seats[one] for one in left["ids"] if one in host.seats]
        return cls(host, seats, left["left_s"], float(left["pace_per_s"]))

    @override
    def __repr__(self) -> str:
        return f"<Retirement of {len(self.left)} seats>"
