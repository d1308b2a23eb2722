"""Two data planes in one process, and what carries connections from one to the other."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from stickyproxy.proxy.arrival import arrive
from stickyproxy.proxy.departure import Mover
from stickyproxy.proxy.handover import HandOverError, read_state
from tests.helpers.raw import eventually

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Sequence

    from stickyproxy.proxy.departure import Departure
    from stickyproxy.proxy.handover import DownstreamState, TunnelState
    from stickyproxy.proxy.tunnel import Tunnel
    from tests.helpers.plane import PlaneUnderTest, Start


class Carrier:
    """What two processes would do: states as JSON text, duplicates of the descriptors, all of a batch or nothing.

    `tamper` changes a state on its way; `sizes` are those of the batches that came.
    """

    def __init__(self, new: PlaneUnderTest) -> None:
        self.new = new
        self.tamper: Callable[[Any], Any] = lambda state: state
        self.sizes: list[int] = []
        self.refuses = False
        self.error: Exception | None = None
        self.on_send: Callable[[], object] = lambda: None

    async def __call__(self, batch: Sequence[Departure]) -> bool:
        """Take a batch over."""
        self.sizes.append(len(batch))
        self.on_send()
        if self.error is not None:
            raise self.error
        arrivals = []
        try:
            for departure in batch:
                state: TunnelState | DownstreamState = read_state(json.loads(json.dumps(departure.state.to_json())))
                copies = [os.dup(descriptor) for descriptor in departure.descriptors]
                arrivals.append(await arrive(self.new.plane, self.new.listeners, self.tamper(state), copies))
        except HandOverError:
            is_wanted = False
        else:
            is_wanted = not self.refuses
        for arrival in arrivals:
            if is_wanted:
                arrival.go()
            else:
                arrival.drop()
        return is_wanted


class Pair:
    """Two planes with the same upstreams. Clients connect to the old one; everything moves to the new one."""

    def __init__(self, old: PlaneUnderTest, new: PlaneUnderTest) -> None:
        self.old, self.new = old, new
        self.carrier = Carrier(new)
        self.mover = Mover(old.plane, self.carrier)
        self._is_settled = False

    async def move(self) -> Counter[str]:
        """Move all that can be moved."""
        return await self.mover.move()

    def turn(self) -> None:
        """Let the new plane be the old one."""
        self.old, self.new = self.new, self.old
        self.carrier = Carrier(self.new)
        self.mover = Mover(self.old.plane, self.carrier)

    @property
    def tunnel(self) -> Tunnel:
        """Return the only tunnel, wherever it is."""
        (tunnel,) = self.old.plane.tunnels | self.new.plane.tunnels
        return tunnel

    @property
    def records(self) -> list[Any]:
        """Return the records of all tunnels that have ended."""
        return [one for one in self.old.records + self.new.records if one.kind == "tunnel"]

    async def settle(self) -> None:
        """End everything; then check what must always hold of both planes together."""
        if self._is_settled:
            return
        self._is_settled = True
        both = (self.old, self.new)
        for proxy in both:
            proxy.plane.on_idle = None
            for client in proxy._clients:
                if not client.is_lost:
                    client.reset()
            for upstream in proxy.all_upstreams:
                for link in upstream.links:
                    link.follow()
        pools = set[Any]()
        for proxy in both:
            plane = proxy.plane
            await eventually(lambda plane=plane: not plane.connections, f"nothing is left of {plane.connections}")  # type: ignore[misc]
            assert not plane.departing
            assert plane.addresses._counts == {}
            assert [session for session in proxy.sessions.all if session.open] == []
            active = list(proxy.sessions._active.values())
            for digest in {one.digest for one in active} | proxy.sessions.counts.keys():
                assert proxy.sessions.counts[digest] == sum(one.digest == digest for one in active)
            pools |= proxy.pools_seen
        for pool in pools:
            await eventually(lambda pool=pool: pool.counters.in_flight == 0, f"in_flight of {pool}")  # type: ignore[misc]
            assert pool.strangers == 0, pool
            assert pool.counters.tunnels_open == 0, pool
        counters = {pool.counters for pool in pools}
        assert sum(one.tunnels for one in counters) == len(self.records)
        assert sum(sum(one.closes.values()) for one in counters) == len(self.records)
        everything = self.old.records + self.new.records
        assert len({(one.kind, one.request_id) for one in everything}) == len(everything)
        assert len(everything) == self.old.exchanges + self.new.exchanges


async def start_pair(start: Start, upstreams: Any = 1, **options: Any) -> Pair:
    """Start two planes; the options are those of `start_plane`."""
    old = await start(upstreams, **options)
    new = await start(old.upstreams, **options)
    pair = Pair(old, new)
    old.settle = new.settle = pair.settle  # type: ignore[method-assign]
    return pair
