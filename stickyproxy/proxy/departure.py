"""Connections that go to another process, and the one that moves them all.

A connection leaves in two steps. First this process parts from it: its transports are closed, which its two ends do
not see, because duplicates of the descriptors stay open. Only then is it known what is unsent: the loop writes on until
a transport is closed. Then its state and the duplicates are sent. Where the other process confirms that it goes on, the
connection is no longer counted here; where it does not, it comes back from the duplicates, as it would have arrived
there.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import Counter, deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, cast

from typing_extensions import override

from stickyproxy.proxy.arrival import arrive_downstream, arrive_tunnel
from stickyproxy.proxy.handover import HandOverError
from stickyproxy.proxy.tunnel import Tunnel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from stickyproxy.proxy.arrival import Arrival
    from stickyproxy.proxy.downstream import Downstream
    from stickyproxy.proxy.handover import DownstreamState, TunnelState
    from stickyproxy.proxy.plane import Plane
    from stickyproxy.wire.forwarded import ConnectionOrigin

logger = logging.getLogger(__name__)

BATCH: Final = 40
"""Connections that leave together; twice as many descriptors (SCM_RIGHTS takes 253)."""
_LOOK_S: Final = 0.25  # between two looks for connections that may leave now; as the tick of the plane
_MOVABLE_LATER: Final = ("exchange", "handshake", "waiting")


class _Parting(asyncio.Protocol):
    """Stands before a transport that is being closed, and sees what it has left unsent."""

    __slots__ = ("_departure", "_transport", "unsent_bytes")

    def __init__(self, departure: Departure, transport: asyncio.Transport) -> None:
        self._departure = departure
        self._transport = transport
        self.unsent_bytes = 0

    def part(self) -> None:
        """Close the transport in the next turn of the loop; until then it may write on."""
        self._transport.set_protocol(self)
        self._transport.abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.unsent_bytes = self._transport.get_write_buffer_size()  # from here on nothing is written
        self._departure.on_parted()


class Departure:
    """One connection on its way. `state` is there once `parted` is done; `descriptors` are those to be sent.

    Either `confirm` or `come_back` must follow, once; both close the descriptors.
    """

    state: TunnelState | DownstreamState

    def __init__(self, plane: Plane, leaver: Tunnel | Downstream, descriptors: tuple[int, ...]) -> None:
        self._plane = plane
        self._leaver = leaver
        self.descriptors = descriptors
        self.parted: asyncio.Future[None] = plane.loop.create_future()
        plane.departing.add(self)
        leaver.leave()
        self._left = len(descriptors)
        self._partings = [_Parting(self, transport) for transport in leaver.transports]
        for parting in self._partings:
            parting.part()

    @property
    def origin(self) -> ConnectionOrigin:
        """Return who the client is."""
        return self._leaver.origin

    def on_parted(self) -> None:
        """Note that one of the transports is closed."""
        self._left -= 1
        if not self._left:
            self.state = self._leaver.export(*(parting.unsent_bytes for parting in self._partings))
            if not self.parted.done():
                self.parted.set_result(None)

    def confirm(self) -> None:
        """Count the connection no more: another process goes on with it."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self._release()

    def _release(self) -> None:
        self._plane.departing.discard(self)
        self._leaver.release()

    async def come_back(self) -> Tunnel | Downstream | None:
        """Go on with the connection here; None where that cannot be, and it is lost."""
        try:
            arrived = (await self._arrive()).go()
        except HandOverError as error:
            logger.error("a connection that was to move is lost: %s", error)  # noqa: TRY400 -- the text says it all
            self._plane.departing.discard(self)
            self._leaver.lose()
            return None
        self._release()
        return arrived

    async def _arrive(self) -> Arrival:
        plane, leaver, state = self._plane, self._leaver, self.state
        if isinstance(leaver, Tunnel):
            return await arrive_tunnel(plane, cast("TunnelState", state), *self.descriptors, pool=leaver.pool)
        return await arrive_downstream(plane, leaver.listener, cast("DownstreamState", state), *self.descriptors)

    @override
    def __repr__(self) -> str:
        return f"<Departure of {self._leaver}>"


def depart(plane: Plane, leaver: Tunnel | Downstream) -> Departure | None:
    """Part from a connection that may leave; None, and nothing done, where no descriptor is left for its duplicates."""
    descriptors: list[int] = []
    try:
        for transport in leaver.transports:
            descriptors.append(os.dup(transport.get_extra_info("socket").fileno()))  # noqa: PERF401 -- closed below
    except OSError:
        for descriptor in descriptors:
            os.close(descriptor)
        return None
    return Departure(plane, leaver, tuple(descriptors))


class Mover:
    """Moves the connections of a plane to another process, in batches, each of them paused for its own batch only.

    `send` gives a batch to the other process: each departure's `state` with its `descriptors`. It returns True once
    that process goes on with all of them, and False if it goes on with none; it raises where it cannot be reached, and
    then too it must go on with none. Nothing that it raises is caught, but for the connections to come back first.
    `limit` is how many may leave at most.
    """

    def __init__(
        self, plane: Plane, send: Callable[[Sequence[Departure]], Awaitable[bool]], *, limit: float = math.inf
    ) -> None:
        self._plane = plane
        self._send = send
        self._free = limit  # so many more may leave
        self._taken: deque[Departure] = deque()  # between two exchanges
        self._staying: set[Tunnel | Downstream] = set()  # the other process did not want them
        self._woken = asyncio.Event()
        self.moved: Counter[str] = Counter()
        """How many have moved, by kind: "downstream" and "tunnel"."""

    async def move(self) -> Counter[str]:
        """Move all that can be moved now, idle connections first, and return how many are left, by kind.

        "tls" and "refused" cannot move, and "ending" ones end here; "exchange", "handshake" and "waiting" ones, whose
        bytes are not sent, can move later. From now on a connection also leaves at the end of its exchange; it is sent
        by `move` or `finish`, so one of them must run, or `stop` end it.
        """
        self._plane.on_idle = self._on_idle
        before = -1
        while before != (before := self.moved.total()):
            candidates = iter(self._here)
            while batch := self._next_batch(candidates):
                await self._move(batch)
        self._staying.intersection_update(self._here)
        return self.left()

    async def finish(self) -> Counter[str]:
        """Move what can be moved later, as it can, until nothing but what cannot is left; return that, by kind.

        That may be for ever: a response can be endless. Give it a deadline and `stop`.
        """
        left = await self.move()
        while self._taken or (self._free and any(left[kind] for kind in _MOVABLE_LATER)):
            self._woken.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), _LOOK_S)
            left = await self.move()
        return left

    async def stop(self) -> None:
        """Let connections stay from now on; those that have left and were not sent come back."""
        self._plane.on_idle = None
        batch = list(self._taken)
        self._taken.clear()
        await self._bring_back(batch)

    @property
    def _here(self) -> list[Tunnel | Downstream]:
        return [*self._plane.downstreams, *self._plane.tunnels]

    def left(self) -> Counter[str]:
        """Return how many connections are here, by what keeps them."""
        left: Counter[str] = Counter(handshake=len(self._plane.handshakes))
        left.update(self._reason(one) for one in self._here)
        return +left

    def _reason(self, one: Tunnel | Downstream) -> str:
        if one.is_tls:
            return "tls"
        if one in self._staying:
            return "refused"
        if one.is_ending:
            return "ending"
        return "waiting" if isinstance(one, Tunnel) or one.exchange is None else "exchange"

    def _on_idle(self, downstream: Downstream) -> bool:
        departure = self._depart(downstream)
        if departure is None:
            return False
        self._taken.append(departure)
        self._woken.set()
        return True

    def _depart(self, one: Tunnel | Downstream) -> Departure | None:
        if not (self._free and one.may_leave and one not in self._staying):
            return None
        departure = depart(self._plane, one)
        if departure is not None:
            self._free -= 1
        return departure

    def _next_batch(self, candidates: Iterator[Tunnel | Downstream]) -> list[Departure]:
        batch = [self._taken.popleft() for _ in range(min(BATCH, len(self._taken)))]
        while len(batch) < BATCH and (one := next(candidates, None)) is not None:
            departure = self._depart(one)
            if departure is not None:
                batch.append(departure)
        return batch

    async def _move(self, batch: list[Departure]) -> None:
        """Send a batch. Where the other process refuses it, each of its connections is asked for alone."""
        for departure in batch:
            await departure.parted
        try:
            is_confirmed = await self._send(batch)
        except BaseException:
            await self._bring_back(batch)
            raise
        if is_confirmed:
            for departure in batch:
                departure.confirm()
                self.moved[departure.state.kind] += 1
        elif len(batch) == 1:
            self._staying.update(await self._bring_back(batch))
        else:
            while batch:
                try:
                    await self._move([batch.pop()])
                except BaseException:
                    await self._bring_back(batch)
                    raise

    async def _bring_back(self, batch: Sequence[Departure]) -> list[Tunnel | Downstream]:
        for departure in batch:
            await departure.parted
        back = await asyncio.gather(*(departure.come_back() for departure in batch))
        return [one for one in back if one is not None]

    @override
    def __repr__(self) -> str:
        return f"<Mover moved={self.moved.total()} left={self.left().total()}>"
