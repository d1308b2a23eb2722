"""Closes the tunnels of upstreams whose drain timeout is over, client after client."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Final

from stickyproxy.affinity.choose import Question, choose
from stickyproxy.affinity.sessions import Session
from stickyproxy.observe.counters import BREAKS
from stickyproxy.tasks import spawn
from stickyproxy.wire.frames import SERVICE_RESTART

if TYPE_CHECKING:
    from collections.abc import Collection

    from stickyproxy.proxy.plane import Plane
    from stickyproxy.proxy.tunnel import Tunnel

logger = logging.getLogger(__name__)

_LOOK_S: Final = 1.0  # between two looks for tunnels that have come to a closing upstream
_CATCH_UP_S: Final = 0.1  # timers are late by some milliseconds: so much of it is made good


class Closing:
    """Closes the tunnels of some upstreams, client after client, as long as one of these upstreams is closing.

    A client's turn is for all of its tunnels, and its pin moves with it: what it opens next, be it before the last of
    them has ended, goes where it can stay. A tunnel that comes later, from another worker or of a request that was
    under way, has its turn too. `task` does it.
    """

    def __init__(self, plane: Plane, digests: Collection[bytes], per_s: float, reason: str) -> None:
        if not (math.isfinite(per_s) and per_s > 0):
            raise ValueError(f"{per_s!r} a second is no pace")
        self.digests = set(digests)
        self._plane = plane
        self._pause_s = 1 / per_s
        self._reason = reason
        self._last_at = -math.inf  # when the last turn was due, on the loop's clock
        self.task = spawn(self._run(), "close tunnels")

    def take_from(self, former: Closing) -> None:
        """Do what another one has begun, where both have the same upstreams, and keep the distance to its last turn."""
        common = self.digests & former.digests
        if common:
            self._last_at = max(self._last_at, former._last_at)
            former.digests -= common
        if not former.digests:
            former.task.cancel()

    def find_tunnels(self) -> list[Tunnel]:
        """Return the tunnels that have not been told to end. O(n) in all tunnels."""
        return [tunnel for tunnel in self._plane.tunnels if self._is_due(tunnel)]

    def _is_due(self, tunnel: Tunnel) -> bool:
        return tunnel.pool.digest in self.digests and not tunnel.is_ending

    async def _run(self) -> None:
        await self._close_all()
        while True:
            self.digests = {one for one in self.digests if self._is_closing(one)}
            if not self.digests:
                return
            await asyncio.sleep(_LOOK_S)
            await self._close_all()

    def _is_closing(self, digest: bytes) -> bool:
        cluster = self._plane.find_cluster(digest)
        return cluster is not None and cluster.snapshot.by_digest[digest].is_closing

    async def _close_all(self) -> None:
        for tunnel in self.find_tunnels():
            if self._is_due(tunnel):  # it was not another one of a client that has had its turn
                await self._wait_for_turn()
            if self._is_due(tunnel):
                self._close_client(tunnel)

    async def _wait_for_turn(self) -> None:
        delay_s = self._last_at + self._pause_s - self._plane.loop.time()
        if delay_s > 0:
            await asyncio.sleep(delay_s)

    def _close_client(self, tunnel: Tunnel) -> None:
        """Close a tunnel and all others of its client, and move the pin."""
        now, due_at = self._plane.loop.time(), self._last_at + self._pause_s
        self._last_at = due_at if now - due_at < _CATCH_UP_S else now
        session, tunnels = tunnel.session, [tunnel]
        if session is not None:
            if session.open > 1:
                tunnels += [one for one in self.find_tunnels() if one.session is session and one is not tunnel]
            self._move(session)
        for one in tunnels:
            one.shut(SERVICE_RESTART, self._reason)

    def _move(self, session: Session) -> None:
        """Pin a client anew, as if nothing of its session were open; its next response has the cookie."""
        plane = self._plane
        cluster = plane.find_cluster(session.digest)
        if cluster is None or not self._is_closing(session.digest):
            return
        unused = Session(session.client_id, session.digest, session.pinned_at)
        choice = choose(cluster.snapshot, Question(unused), cluster.chance, plane.load)
        if choice.upstream is not None and choice.broken is not None:
            plane.counters.cells[BREAKS[choice.broken]] += 1
            logger.info("a client was moved to upstream %s: its own is %s", choice.upstream.id, choice.broken)
            plane.sessions.move(session, choice.upstream.digest, plane.wall)
