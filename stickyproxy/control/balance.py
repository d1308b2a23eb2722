"""Evens out how many connections the workers have: the kernel lets whichever wakes first accept all that wait.

A burst of clients may so end up at one worker, and one core, for as long as their tunnels live. Connections that can
move then go to the worker that has the fewest, as in an upgrade: nobody notices, nothing is lost.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.errors import ChannelError
from stickyproxy.observe.counters import NS
from stickyproxy.tasks import spawn

if TYPE_CHECKING:
    from stickyproxy.control.fleet import Fleet
    from stickyproxy.control.worker_link import WorkerLink

logger = logging.getLogger(__name__)

LOOK_S: Final = 1.0
_LEAST: Final = 8  # connections that one may have more than another, and
_PART: Final = 0.1  # of what the other has
_AT_ONCE: Final = 200  # some batches
_REST_S: Final = 60.0  # after nothing could move: TLS connections do not
_ARRIVE_S: Final = 5.0
_SHARE_S: Final = 20.0  # for a worker to answer; it waits a second for connections that are in use
_HANGING_S: Final = 2.0  # without a tick


class Balancer:
    """Looks at the workers of a fleet each second, and has one that is ahead hand some connections to the last."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._before: dict[WorkerLink, int] = {}
        self._rests_until = 0.0
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._looking = spawn(self._keep_looking(), "connections of the workers")

    def stop(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            async with self._fleet.moving:
                await self._look()

    async def _look(self) -> None:
        counts = self._count()
        before, self._before = self._before, counts
        if len(counts) < 2 or time.monotonic() < self._rests_until:  # noqa: PLR2004 -- one has nobody to share with
            return
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        # Twice in a row: what comes and goes evens itself out.
        ahead = min(one.get(most, 0) - one.get(least, 0) for one in (before, counts))
        if ahead > _LEAST + _PART * counts[least]:
            await self._share(most, least, min(ahead // 2, _AT_ONCE))

    def _count(self) -> dict[WorkerLink, int]:
        """Return how many connections each worker has that serves and does not hang; nothing where there is but one."""
        if len(self._fleet.links) < 2:  # noqa: PLR2004 -- nobody to share with
            return {}
        now_ns = time.monotonic_ns()
        planes = {link: link.table.read().plane for link in self._fleet.links if link.is_ready}
        return {
            link: plane.connections_open
            for link, plane in planes.items()
            if now_ns - plane.ticked_at_ns < _HANGING_S * NS and not link.ended.done()
        }

    async def _share(self, most: WorkerLink, least: WorkerLink, count: int) -> None:
        """Have one worker give so many connections to another one."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            try:
                await least.channel.request("arrive", {}, [ours.fileno()], timeout_s=_ARRIVE_S)
                answer = await most.channel.request("share", {"count": count}, [theirs.fileno()], timeout_s=_SHARE_S)
            except ChannelError as error:
                logger.warning("worker %d cannot give connections to worker %d: %s", most.index, least.index, error)
                moved = 0
            else:
                moved = sum(answer.body.get("moved", {}).values())
                logger.debug("%d connections went from worker %d to worker %d", moved, most.index, least.index)
        if not moved:
            self._rests_until = time.monotonic() + _REST_S

    @override
    def __repr__(self) -> str:
        return f"<Balancer of {self._fleet}>"
