"""The idle connections to one upstream, and what the data plane counts about it."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from stickyproxy.observe.counters import IDLE_CONNECTIONS, PLACED, STRANGERS
from stickyproxy.proxy.upstream import UpstreamConnection

if TYPE_CHECKING:
    from stickyproxy.observe.counters import UpstreamCounters
    from stickyproxy.proxy.endpoint import Endpoint
    from stickyproxy.proxy.plane import Plane

# A request that must not be repeated gets a connection that was used this recently, or a new one: the shortest
# keep-alive among Python servers is gunicorn's 2 s.
_FRESH_S: Final = 1.5
PLACED_WINDOW_S: Final = 5.0
_CLOSE_S: Final = 0.01  # the loop closes descriptors in its next turns
_SHUTDOWN_S: Final = 60.0  # for an upstream to take the last bytes over TLS and to close too


class Pool:
    """Connections to one upstream that wait for their next exchange, the last used first.

    `strangers` counts exchanges and tunnels under way that belong to no session; `placed` and `placed_before` the
    clients placed here whose first exchange ended in this window of 5 s and the one before: they have no session yet,
    but will. `authority` stands for a missing Host.
    """

    __slots__ = (
        "_plane",
        "authority",
        "counters",
        "digest",
        "endpoint",
        "idle",
        "is_closed",
        "placed",
        "placed_before",
        "strangers",
        "upstream_id",
    )

    def __init__(
        self, plane: Plane, upstream_id: str, digest: bytes, endpoint: Endpoint, counters: UpstreamCounters
    ) -> None:
        self._plane = plane
        self.upstream_id = upstream_id
        self.digest = digest
        self.endpoint = endpoint
        self.authority = endpoint.authority
        self.idle: list[UpstreamConnection] = []
        self.is_closed = False
        self.strangers = 0
        self.placed = 0
        self.placed_before = 0
        self.counters = counters

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
        """Open a new connection; raise OSError, or TimeoutError (which is one) after the connect timeout.

        Where no descriptor is left, the idle connections of all upstreams are given up for it.
        """
        try:
            return await self._dial()
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE}:
                raise
        for pool in self._plane.pools.values():
            pool.empty()
        await asyncio.sleep(_CLOSE_S)
        return await self._dial()

    async def _dial(self) -> UpstreamConnection:
        plane, endpoint = self._plane, self.endpoint
        address, tls = endpoint.address, endpoint.tls
        async with asyncio.timeout(plane.settings.timeouts.connect_s):
            if address.path:
                _, connection = await plane.loop.create_unix_connection(lambda: UpstreamConnection(self), address.path)
            elif tls is None:
                _, connection = await plane.loop.create_connection(
                    lambda: UpstreamConnection(self), endpoint.ip or address.host, address.port
                )
            else:
                transport, connection = await plane.loop.create_connection(
                    lambda: UpstreamConnection(self),
                    endpoint.ip or address.host,
                    address.port,
                    ssl=tls,
                    server_hostname=endpoint.server_name or address.host,
                    ssl_shutdown_timeout=_SHUTDOWN_S,
                )
                # While nothing is read of it, the layer must not read on: at an end of file it drops what it holds.
                transport.set_read_buffer_limits(1)  # type: ignore[attr-defined]  # of uvloop
        return connection

    def give_back(self, connection: UpstreamConnection) -> None:
        """Keep a connection whose exchange has ended cleanly, unless there are enough."""
        plane = self._plane
        if self.is_closed or len(self.idle) >= plane.settings.idle_connections or not plane.gate.is_open:
            connection.close()
            return
        connection.idle_since = plane.now
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

    def show(self) -> None:
        """Show in the counters how much is here now."""
        cells = self.counters.cells
        cells[IDLE_CONNECTIONS] = len(self.idle)
        cells[STRANGERS] = self.strangers
        cells[PLACED] = max(0, self.placed + self.placed_before)

    def on_return(self, age_s: float) -> None:
        """Count a client that was placed `age_s` seconds ago no more: it came back, and is a session now.

        A client with connections to several workers comes back to each of them; where another one has placed it, it
        counts twice for two windows at most. To count it less often would draw all newcomers to where it went.
        """
        if age_s <= PLACED_WINDOW_S and self.placed > 0:
            self.placed -= 1
        elif age_s <= 2 * PLACED_WINDOW_S and self.placed_before > 0:
            self.placed_before -= 1

    def empty(self) -> None:
        """Close the idle connections."""
        while self.idle:
            self.idle.pop().close()

    def close(self) -> None:
        """Close the idle connections and keep none from now on; busy ones end with their exchange."""
        self.is_closed = True
        self.empty()

    @override
    def __repr__(self) -> str:
        return f"<Pool {self.upstream_id} idle={len(self.idle)}>"
