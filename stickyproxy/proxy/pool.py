"""The idle connections to one upstream, and what the data plane counts about it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.observe.counters import UpstreamCounters
from stickyproxy.proxy.upstream import UpstreamConnection

if TYPE_CHECKING:
    from stickyproxy.config import Address
    from stickyproxy.proxy.plane import Plane

# A request that must not be repeated gets a connection that was used this recently, or a new one: the shortest
# keep-alive among Python servers is gunicorn's 2 s.
_FRESH_S: Final = 1.5


class Pool:
    """Connections to one upstream that wait for their next exchange, the last used first.

    `strangers` counts exchanges and tunnels under way that belong to no session; `placed` and `placed_before` the
    clients placed here in this window of 5 s and the one before: they have no session yet, but will. `authority`
    stands for a missing Host.
    """

    __slots__ = (
        "_plane",
        "address",
        "authority",
        "counters",
        "digest",
        "idle",
        "is_closed",
        "placed",
        "placed_before",
        "strangers",
        "upstream_id",
    )

    def __init__(self, plane: Plane, upstream_id: str, digest: bytes, address: Address) -> None:
        self._plane = plane
        self.upstream_id = upstream_id
        self.digest = digest
        self.address = address
        self.authority = b"localhost" if address.is_unix else str(address).encode("ascii")
        self.idle: list[UpstreamConnection] = []
        self.is_closed = False
        self.strangers = 0
        self.placed = 0
        self.placed_before = 0
        self.counters = UpstreamCounters()

    def take(self, *, is_idempotent: bool) -> UpstreamConnection | None:
        """Return an idle connection for an exchange, or None when a new one must be dialled."""
        idle = self.idle
        while idle:
            connection = idle.pop()
            age_s = self._plane.now - connection.idle_since
            if connection.is_closing or age_s > self._plane.settings.timeouts.upstream_keep_alive_s:
                connection.close()
            elif age_s > _FRESH_S and not is_idempotent:
                idle.append(connection)
                return None
            else:
                connection.is_reused = True
                return connection
        return None

    @property
    def buffer_bytes(self) -> int:
        """Return how much may wait to be written to one connection before its client is no longer read."""
        return self._plane.settings.buffer_bytes

    async def dial(self) -> UpstreamConnection:
        """Open a new connection; raise OSError, or TimeoutError (which is one) after the connect timeout."""
        address = self.address
        loop = self._plane.loop
        async with asyncio.timeout(self._plane.settings.timeouts.connect_s):
            if address.path:
                _, connection = await loop.create_unix_connection(lambda: UpstreamConnection(self), address.path)
            else:
                _, connection = await loop.create_connection(
                    lambda: UpstreamConnection(self), address.host, address.port
                )
        return connection

    def give_back(self, connection: UpstreamConnection) -> None:
        """Keep a connection whose exchange has ended cleanly, unless there are enough."""
        if self.is_closed or len(self.idle) >= self._plane.settings.idle_connections:
            connection.close()
            return
        connection.idle_since = self._plane.now
        self.idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """Take out a connection that was closed while idle."""
        if connection in self.idle:
            self.idle.remove(connection)

    def expire(self, now: float) -> None:
        """Close the connections that have been idle too long; the oldest are first in the list."""
        limit = now - self._plane.settings.timeouts.upstream_keep_alive_s
        while self.idle and self.idle[0].idle_since <= limit:
            self.idle.pop(0).close()

    def close(self) -> None:
        """Close the idle connections and keep none from now on; busy ones end with their exchange."""
        self.is_closed = True
        while self.idle:
            self.idle.pop().close()

    @override
    def __repr__(self) -> str:
        return f"<Pool {self.upstream_id} idle={len(self.idle)}>"
